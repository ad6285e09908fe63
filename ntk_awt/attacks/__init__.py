"""Attacks: keyed, jitted maximisers of the loss over any threat model.

`ATTACKS` lists every implementation; the contract tests run over it.
"""

from collections.abc import Callable
from functools import partial

from ntk_awt.attacks.apgd import APGD
from ntk_awt.attacks.base import (
    CRITERIA,
    Attack,
    Attacked,
    LossFn,
    NetworkLoss,
    check_examples,
    criterion,
    cross_entropy,
    example_keys,
    perturb,
)
from ntk_awt.attacks.pgd import PGD

ATTACKS: dict[str, Callable[..., Attack]] = {
    "pgd": PGD,
    "apgd-ce": partial(APGD, "cross-entropy"),
    "apgd-dlr": partial(APGD, "dlr"),
    "apgd-t": partial(APGD, "targeted-dlr"),
}
"""Makers of attacks by name."""

__all__ = [
    "APGD",
    "ATTACKS",
    "CRITERIA",
    "PGD",
    "Attack",
    "Attacked",
    "LossFn",
    "NetworkLoss",
    "check_examples",
    "criterion",
    "cross_entropy",
    "example_keys",
    "perturb",
]
