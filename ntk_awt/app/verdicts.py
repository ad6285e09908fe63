"""What the hygiene rules say of a network, in one line, with what to do; from records alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

STRONGER = (
    "attack harder: add apgd-t, fab-t and square to the attacks (or take auto), or raise their "
    "steps and restarts"
)

REMEDIES: dict[str, str] = {
    "finite": "find the NaN or infinity in the images, the weights or the network; nothing else "
    "was judged",
    "ball": "the attack leaves the threat model: mend it, or take one of the package's",
    "box": "the attack leaves the box: mend it, or take one of the package's",
    "zero radius": "the attack moves images that it may not: mend it, or take one of the package's",
    "deterministic": "evaluate without dropout, batch statistics and other random parts",
    "logits": "give the logits, not a softmax of them",
    "zero gradient, cross-entropy": "the cross-entropy is flat there: add apgd-t and square to the "
    "attacks, or take auto",
    "zero gradient, dlr": "gradients say nothing there: add square to the attacks, or take auto",
    "batch": "make an image's logits independent of the others in its batch (batch statistics)",
    "radius": STRONGER,
    "steps": STRONGER,
    "large radius": "gradients are hidden: add square to the attacks, and look for rounding, "
    "saturation or randomness in the network",
    "single step": STRONGER,
    "black box": STRONGER,
    "transfer": STRONGER,
    "mask": "prune with the ticket's own mask, and keep pruned weights at zero: train it again",
    "selection": "take validation images that are not in the test set",
}
"""What to do where a hygiene rule does not pass, by its name."""


NOT_JUDGED = "not judged"
"""The status of a network that is not evaluated."""


_OTHER = "see that rule in the documentation of `ntk_awt.robustness.hygiene`"  # of another version


class Verdict(NamedTuple):
    """What all rules together say of one network.

    Attributes:
        name: whose it is, e.g. network and seed.
        status: passed, warned, failed (where one rule fails) or not judged.
        raised: the flags that did not pass, as recorded (`hygiene.Flag`).
    """

    name: str
    status: str
    raised: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        reasons = (
            f"{flag['name']} {_number(flag['value'])}, limit {_number(flag['limit'])} "
            f"[{flag['unit']}] ({flag['meaning']}): {REMEDIES.get(flag['name'], _OTHER)}"
            for flag in self.raised
        )
        return "; ".join([f"{self.name}: {self.status}", *reasons])


def _number(value: float) -> str:
    return f"{value:.3g}"


def verdict(name: str, flags: Iterable[Mapping[str, Any]]) -> Verdict:
    """The verdict of recorded flags.

    Args:
        name: whose they are.
        flags: `hygiene.Hygiene.record()["flags"]`.

    Example:
        >>> flag = {"name": "logits", "value": 1.0, "limit": 0.5, "unit": "share of images",
        ...         "meaning": "outputs ≥ 0 that sum to 1: probabilities", "status": "fail"}
        >>> verdict("dense, seed 0", [flag]).status
        'failed'
        >>> print(verdict("dense, seed 0", [flag | {"status": "pass"}]))
        dense, seed 0: passed
    """
    raised = tuple(flag for flag in flags if flag["status"] != "pass")
    failed = any(flag["status"] == "fail" for flag in raised)
    return Verdict(name, "failed" if failed else "warned" if raised else "passed", raised)


def of_run(results: Mapping[str, Any], label: str = "") -> dict[str, Verdict]:
    """The verdict of each network of a run.

    Args:
        results: content of its `results.json`.
        label: what else tells it from others, e.g. a density.
    """
    return {
        name: verdict(f"{name}, {label}seed {results['seed']}", values["hygiene"]["flags"])
        for name, values in results["networks"].items()
    }


def count(verdicts: Sequence[Verdict]) -> str:
    """How many of several are of each kind.

    Example:
        >>> count([verdict("a", []), verdict("b", [])])
        '2 of 2 passed, 0 warned, 0 failed'
    """
    kinds = [found.status for found in verdicts]
    named = ["warned", "failed", *[NOT_JUDGED] * (NOT_JUDGED in kinds)]
    rest = ", ".join(f"{kinds.count(kind)} {kind}" for kind in named)
    return f"{kinds.count('passed')} of {len(kinds)} passed, {rest}"
