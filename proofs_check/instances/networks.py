"""Networks whose weights are drawn in NumPy, several at once: no drawing is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ntk_awt.network import Network
from ntk_awt.types import Gain, Key, Mask, Params


def untrained(make: Callable[[Key], Network]) -> Network:
    """A network with the shapes of its parameters alone: drawing them would be compiled."""
    applies = []

    def params(key: Key) -> Params:
        network = make(key)
        applies.append(network.apply)
        return network.params

    shapes = jax.eval_shape(params, jax.random.key(0))
    return Network(applies[0], shapes)


def draw(
    rng: np.random.Generator, shapes: Params, density: float, count: int
) -> tuple[Params, Mask, Gain]:
    """Weights N(0, 1) (NTK parametrisation), random masks and the gain 1/√p of `count` networks."""

    def mask(w: Any) -> np.ndarray:
        prune = density if len(w.shape) > 1 else 1.0
        return rng.random((count, *w.shape)) < prune

    def gain(w: Any) -> np.ndarray:
        return np.full(count, density**-0.5 if len(w.shape) > 1 else 1.0)

    weights = jax.tree.map(lambda w: rng.standard_normal((count, *w.shape)), shapes)
    return weights, jax.tree.map(mask, shapes), jax.tree.map(gain, shapes)
