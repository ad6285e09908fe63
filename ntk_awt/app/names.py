"""Sparse networks that start from the trained dense one, by name."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import masks, training
from ntk_awt.app.config import MaskConfig, TrainConfig
from ntk_awt.attacks import Attack
from ntk_awt.masks import Scores, Ticket
from ntk_awt.network import Prunable
from ntk_awt.threats import Threat
from ntk_awt.tickets.solvers.scores import straight_through
from ntk_awt.types import ApplyFn, Gain, Key, Mask, Params

# ---------------------------------------------------------------- after dense training


class Trained(NamedTuple):
    """What a pipeline starts from.

    Attributes:
        apply: the dense network's function.
        initial: its weights at initialisation.
        params: its weights after adversarial training.
        x, y: training images [n, *shape] and labels [n].
        threat, attack: as in training.
        key: of batches and attacks.
        mask, train: settings of the run.
        callbacks, checkpoints: as of `training.fit`, for pipelines that train once more.
        prunable: see `masks.prunable_leaves`.
    """

    apply: ApplyFn
    initial: Params
    params: Params
    x: np.ndarray
    y: np.ndarray
    threat: Threat
    attack: Attack
    key: Key
    mask: MaskConfig
    train: TrainConfig
    callbacks: tuple[training.Callback, ...] = ()
    checkpoints: Path | None = None
    prunable: Prunable | None = None


def _largest(start: Trained) -> Mask:
    scores = masks.magnitude_scores(start.params)
    return masks.make(scores, start.mask.density, start.mask.allocation, start.prunable)


def rewind(start: Trained) -> Ticket:
    """Lottery ticket: the largest weights of the trained network, at their initial values.

    Source: Frankle & Carbin, "The lottery ticket hypothesis" (2019), one round of pruning.
    """
    return masks.sparse(start.initial, _largest(start), start.mask.gain, start.prunable)


def prune(start: Trained) -> Ticket:
    """Three stages: the largest weights of the trained network, at their trained values.

    They keep gain 1: they are the weights that were trained. Training goes on from there.

    Source: Sehwag et al., "Towards compact and robust deep neural networks" (2019).
    """
    return masks.sparse(start.params, _largest(start), "none")


def _relative(w: jax.Array) -> jax.Array:
    """θ/max|θ|; zero where all of them are."""
    return w / jnp.max(jnp.abs(w), initial=jnp.finfo(w.dtype).tiny)


def hydra(start: Trained) -> Ticket:
    """Three stages: scores that learn under attack which trained weights to keep (HYDRA).

    Scores start at θ/max|θ| of each layer; the largest absolute ones are kept, the gradient goes
    straight through to all of them, the weights stay. It trains as long as the run's training.

    Source: Sehwag et al., "HYDRA: pruning adversarially robust neural networks" (2020).
    """
    first = jax.tree.map(_relative, start.params)
    absolute = masks.magnitude_scores
    counts = masks.allocate(
        absolute(first), start.mask.density, start.mask.allocation, start.prunable
    )

    def weights(scores: Scores, mask: Mask, gain: Gain) -> Params:
        hard = masks.top_k(absolute(jax.lax.stop_gradient(scores)), counts)
        soft = straight_through(hard, absolute(scores), start.prunable)
        return jax.tree.map(jnp.multiply, start.params, soft)

    found = training.fit(
        start.apply,
        masks.dense(first),
        start.x,
        start.y,
        config=start.train,
        threat=start.threat,
        attack=start.attack,
        key=start.key,
        weights=weights,
        callbacks=start.callbacks,
        checkpoints=start.checkpoints,
    )
    mask = masks.top_k(absolute(found.params), counts)
    return masks.sparse(start.params, mask, "none")


PIPELINES: dict[str, Callable[[Trained], Ticket]] = {
    "rewind": rewind,
    "prune": prune,
    "hydra": hydra,
}
"""Sparse networks that need the trained dense one, by name."""
