"""How everything here is timed: compilation apart, warm-up, ready results, median of several."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

from ntk_awt.files import versions

WARM_UP = 0.3
"""Seconds of calls before one that is timed, for both sides alike."""


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` = peer / ours, so more than 1 means that ours is faster.

    Attributes:
        name: what is computed, with its sizes.
        ours, peer: median time of one call, in `unit`.
        peer_name: what ours is compared with.
        ratio: peer / ours.
        compile_seconds: first call of ours, compilation included.
        unit: of both times.
        device, versions: where it was measured.
    """

    name: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    compile_seconds: float
    unit: str
    device: str
    versions: dict[str, str]


def once(call: Callable[[], Any]) -> float:
    """Seconds of one call, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def medians(calls: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns, each after its own as a warm-up.

    In turns, so that whatever else slows the machine for a while slows all of them; the warm-up,
    one call and then more until `WARM_UP` seconds are over, because the other call leaves caches
    and memory as it needs them (after neural-tangents, a kernel of 20 ms takes 40 ms at first).
    """

    def warm(call: Callable[[], Any]) -> float:
        passed = once(call)
        while passed < WARM_UP:
            passed += once(call)
        return once(call)

    rounds = [{name: warm(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in calls}


def compare(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    peer_name: str,
    *,
    repeats: int,
    peer_calls: float = 1.0,
    compile_seconds: float | None = None,
) -> dict[str, Any]:
    """Time two computations in turns, as a row of the JSON file.

    Args:
        name: what is computed, with its sizes.
        ours, peer: functions without arguments that return arrays.
        peer_name: what ours is compared with.
        repeats: timed calls of each.
        peer_calls: multiplies the peer's time, where ours does the peer's work that many times.
        compile_seconds: of the first call of ours, where it was made before.
    """
    first = once(ours) if compile_seconds is None else compile_seconds
    times = medians({"ours": ours, "peer": peer}, repeats=repeats)
    mine, theirs = 1e3 * times["ours"], 1e3 * peer_calls * times["peer"]
    return row(name, mine, theirs, peer_name, first, "ms")


def row(
    name: str, ours: float, peer: float, peer_name: str, compile_seconds: float, unit: str
) -> dict[str, Any]:
    """One comparison with the device and the versions, as the JSON file has it."""
    found = versions()
    device = found.pop("device")
    return asdict(
        Row(name, ours, peer, peer_name, peer / ours, compile_seconds, unit, device, found)
    )
