"""The statements by number, each loaded when it is asked for, and how they are run."""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ntk_awt.errors import check_count, choose
from proofs_check.core import SIZES, Context, Outcome, Size, Statement

MODULES = {
    "D1": "d1_flow",
    "D2": "d2_energy",
    "D3": "d3_frozen",
    "D4": "d4_infinite_width",
    "D5": "d5_lazy",
    "P1": "p1_identity",
    "P2": "p2_posterior",
    "P3": "p3_prior",
    "P4": "p4_robustness",
    "E1": "e1_concentration",
    "E2": "e2_depth",
    "E3": "e3_gain",
    "E4": "e4_magnitude",
    "E5": "e5_width",
    "L1": "l1_rates",
    "L2": "l2_strong",
    "L3": "l3_existence",
    "L4": "l4_learned",
    "L5": "l5_knowledge",
    "L6": "l6_networks",
}
"""File of each statement, by its number in the theory; it defines `STATEMENT` and `check`."""


class Proof(NamedTuple):
    """A statement, and what checks it."""

    statement: Statement
    check: Callable[[Context], Outcome]


def load(name: str) -> Proof:
    """The statement of that number, in capital or small letters, and its check.

    Raises:
        InputError: unknown number.
    """
    number = name.upper()
    choose("statement", number, MODULES)
    module = importlib.import_module(f"proofs_check.{MODULES[number]}")
    return Proof(module.STATEMENT, module.check)


@dataclass(frozen=True)
class Result:
    """A statement, what its check found, and how long that took."""

    statement: Statement
    outcome: Outcome
    seconds: float

    @property
    def unbroken(self) -> list[str]:
        """Names of the hypotheses that no control breaks."""
        broken = {control.breaks for control in self.outcome.controls if control.rejected}
        return [name for name in self.statement.hypotheses if name not in broken]

    @property
    def holds(self) -> bool:
        """Every case holds, every control is rejected and every hypothesis is broken by one.

        There is at least one case and one control. A margin that is no number is none.
        """
        cases, controls = self.outcome.cases, self.outcome.controls
        sound = bool(cases) and all(c.holds and c.margin >= 0 for c in cases)
        return sound and bool(controls) and all(c.rejected for c in controls) and not self.unbroken

    @property
    def margin(self) -> float:
        """The least margin of all cases."""
        return min((case.margin for case in self.outcome.cases), default=-math.inf)

    @property
    def tightness(self) -> float | None:
        """Median tightness of the cases that bound something."""
        known = [case.tightness for case in self.outcome.cases if case.tightness is not None]
        return float(np.median(known)) if known else None

    def record(self) -> dict[str, Any]:
        """As one entry of `ntk-awt verify --json`; null is a number that is not finite."""
        return {
            "name": self.statement.number,
            "statement": f"{self.statement.title}: {self.statement.claim}",
            "holds": self.holds,
            "margin": _finite(self.margin),
            "tightness": _finite(self.tightness),
            "controls": [control._asdict() for control in self.outcome.controls],
            "seconds": round(self.seconds, 3),
            "cases": [
                case._asdict()
                | {"margin": _finite(case.margin), "tightness": _finite(case.tightness)}
                for case in self.outcome.cases
            ],
            "skipped": list(self.outcome.skipped),
            "precision": self.statement.precision,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def verify(
    names: Sequence[str] = (),
    *,
    size: Size = "default",
    seed: int = 0,
    precision: str | None = None,
    on_start: Callable[[Statement], Callable[[float], None]] = lambda statement: lambda share: None,
    on_done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check statements, one after the other, each in its own precision.

    Args:
        names: numbers of the theory, e.g. ("P3", "E2"); all if none.
        size: how much to compute, in `SIZES`.
        seed: of all randomness, ≥ 0.
        precision: "float32" or "float64" in place of the statements' own; checks of theorems are
            expected to fail in float32.
        on_start: called before each, returns what is told the share that is done.
        on_done: called after each.

    Returns:
        One `Result` a statement, in the order of the names.

    Raises:
        InputError: an unknown number or size.
    """
    choose("size", size, SIZES)
    check_count("seed", seed, low=0)
    results, before = [], None
    for statement, check in [load(name) for name in names or MODULES]:
        context = Context(size, seed, on_start(statement))
        start, wanted = time.perf_counter(), precision or statement.precision
        # JAX 0.10 may take a part of a program that was traced in the other precision.
        if precision is not None or before not in (None, wanted):
            jax.clear_caches()
        with jax.enable_x64(wanted == "float64"):
            outcome = check(context)
        before = wanted
        results.append(Result(statement, outcome, time.perf_counter() - start))
        on_done(results[-1])
    return results
