"""Attacks: keyed, jitted maximisers of the loss over any threat model.

`ATTACKS` lists every implementation; the contract tests run over it.
"""

from collections.abc import Callable
from functools import partial

from ntk_awt.attacks.apgd import APGD
from ntk_awt.attacks.base import (
    Attack,
    Attacked,
    LossFn,
    NetworkLoss,
    check_classes,
    check_examples,
    check_given,
    example_keys,
    perturb,
)
from ntk_awt.attacks.fab import FAB
from ntk_awt.attacks.losses import CRITERIA, Criterion, cross_entropy, squared
from ntk_awt.attacks.pgd import PGD
from ntk_awt.attacks.square import Square
from ntk_awt.errors import choose

ATTACKS: dict[str, Callable[..., Attack]] = {
    "pgd": PGD,
    "apgd-ce": partial(APGD, "cross-entropy"),
    "apgd-dlr": partial(APGD, "dlr"),
    "apgd-t": partial(APGD, "targeted-dlr"),
    "fab-t": FAB,
    "square": Square,
}
"""Makers of attacks by name."""

AUTO = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The standard ensemble, in its order (Croce and Hein, 2020)."""


_QUERIES_PER_STEP = 50
"""5,000 queries of Square beside 100 steps of the others, as in the standard ensemble."""


def suite(name: str, steps: int, restarts: int = 1, step_ratio: float = 2.5) -> dict[str, Attack]:
    """The attacks that a name stands for, to be run in turn; one, or the four of `auto`.

    Args:
        name: one in `ATTACKS`, or auto.
        steps: gradient steps of each; Square makes 50 queries for each of them.
        restarts: independent runs of each; Square makes one.
        step_ratio: how far all steps of PGD together could go, in radii.

    Raises:
        InputError: an unknown name.

    Example:
        >>> list(suite("auto", steps=100))
        ['apgd-ce', 'apgd-t', 'fab-t', 'square']
        >>> suite("square", steps=100)["square"].steps
        5000
    """
    choose("attack", name, (*ATTACKS, "auto"))
    makers: dict[str, Callable[..., Attack]] = ATTACKS | {
        "pgd": partial(PGD, step_ratio=step_ratio, misclassified=True)
    }

    def make(one: str) -> Attack:
        if one == "square":
            return Square(_QUERIES_PER_STEP * steps)
        return makers[one](steps=steps, restarts=restarts)

    return {one: make(one) for one in (AUTO if name == "auto" else (name,))}


__all__ = [
    "APGD",
    "ATTACKS",
    "AUTO",
    "CRITERIA",
    "FAB",
    "PGD",
    "Attack",
    "Attacked",
    "Criterion",
    "LossFn",
    "NetworkLoss",
    "Square",
    "check_classes",
    "check_examples",
    "check_given",
    "cross_entropy",
    "example_keys",
    "perturb",
    "squared",
    "suite",
]
