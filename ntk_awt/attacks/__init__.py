"""Attacks: keyed, jitted maximisers of the loss over any threat model.

`ATTACKS` lists every implementation; the contract tests run over it.
"""

from ntk_awt.attacks.base import (
    CRITERIA,
    Attack,
    Attacked,
    LossFn,
    check_examples,
    criterion,
    cross_entropy,
    example_keys,
    perturb,
)
from ntk_awt.attacks.pgd import PGD

ATTACKS: dict[str, type[PGD]] = {"pgd": PGD}
"""Attacks by name."""

__all__ = [
    "ATTACKS",
    "CRITERIA",
    "PGD",
    "Attack",
    "Attacked",
    "LossFn",
    "check_examples",
    "criterion",
    "cross_entropy",
    "example_keys",
    "perturb",
]
