"""Adversarial training of dense and sparse networks: an epoch is one jitted scan."""

from ntk_awt.training.loop import (
    LOSSES,
    OPTIMIZERS,
    Batch,
    Callback,
    EpochRecord,
    Observe,
    TrainState,
    Weights,
    fit,
    make_optimizer,
    nothing,
    steps_per_epoch,
)

__all__ = [
    "LOSSES",
    "OPTIMIZERS",
    "Batch",
    "Callback",
    "EpochRecord",
    "Observe",
    "TrainState",
    "Weights",
    "fit",
    "make_optimizer",
    "nothing",
    "steps_per_epoch",
]
