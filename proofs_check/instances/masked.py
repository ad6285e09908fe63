"""Deep masked networks in NTK parametrisation, drawn with their masks in JAX, and their kernels."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import models
from ntk_awt.app.config import ModelConfig
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket
from ntk_awt.types import ApplyFn, Key

WEIGHT_STD, BIAS_STD = 2.0**0.5, 0.1


OUTPUTS = 16
"""Logits of each network: as many kernels Θ^aa, whose errors together fluctuate less than one's."""


class Shapes(NamedTuple):
    """An MLP without its weights: function, and (inputs, outputs) of each layer by name."""

    apply: ApplyFn
    layers: tuple[tuple[str, int, int], ...]


class Masks(NamedTuple):
    """Of each layer: a weight is kept with probability `density` if |w| > `cut`; γ = `gain`."""

    density: Any
    cut: Any
    gain: Any


def random_masks(densities: Any, *, gain: bool = True) -> Masks:
    """Random masks with γ = 1/√p, or 1."""
    p = np.asarray(densities, float)
    return Masks(p, np.full_like(p, -1), p**-0.5 if gain else np.ones_like(p))


def mlp(
    width: int, depth: int, inputs: int, activation: str, *, bias_std: float = BIAS_STD
) -> Shapes:
    """`depth` layers of weights, in NTK parametrisation; nothing is drawn."""
    config = config_of(width, depth, activation, bias_std=bias_std)
    found = []

    def build(key: Key) -> Any:
        network = models.build(config, (inputs,), OUTPUTS, key)
        found.append(network.apply)
        return network.params

    like = jax.eval_shape(build, jax.random.key(0))
    return Shapes(found[0], tuple((name, *like[name]["kernel"].shape) for name in sorted(like)))


def config_of(
    width: int, depth: int, activation: str, *, bias_std: float = BIAS_STD
) -> ModelConfig:
    """The same as the package's settings."""
    return ModelConfig(
        widths=(width,) * (depth - 1),
        activation=activation,
        parametrization="ntk",
        weight_std=WEIGHT_STD,
        bias_std=bias_std,
    )


def draw(shapes: Shapes, key: Key, masks: Masks) -> Ticket:
    """Weights and biases N(0, 1), masks and gains, in the precision of the gains."""
    params, mask, gain = {}, {}, {}
    for index, (name, *sizes) in enumerate(shapes.layers):
        keys = jax.random.split(jax.random.fold_in(key, index), 3)
        dtype = masks.gain.dtype
        w = jax.random.normal(keys[0], sizes, dtype)
        b = jax.random.normal(keys[1], sizes[1:], dtype)
        kept = jax.random.uniform(keys[2], sizes, dtype) < masks.density[index]
        kept = jnp.logical_and(kept, jnp.abs(w) > masks.cut[index])
        params[name] = {"kernel": w, "bias": b}
        mask[name] = {"kernel": kept, "bias": jnp.ones_like(b, bool)}
        gain[name] = {"kernel": masks.gain[index], "bias": jnp.ones((), dtype)}
    return Ticket(params, mask, gain)


@partial(jax.jit, static_argnames="shapes")
def _kernels(shapes: Shapes, x: jax.Array, keys: Key, masks: Masks) -> jax.Array:
    def one(key: Key) -> jax.Array:
        params, mask, gain = draw(shapes, key, masks)
        found = empirical(shapes.apply, params, x, mask=mask, gain=gain, outputs="diagonal")
        return found.transpose(2, 0, 1)

    return jax.lax.map(one, keys)


def in_float32(masks: Masks) -> Masks:
    """For networks whose rounding (1e-6) is far below the differences between draws (1e-2)."""
    return Masks(*(jnp.asarray(part, jnp.float32) for part in masks))


def drawn_kernels(shapes: Shapes, x: np.ndarray, masks: Masks, keys: Key) -> np.ndarray:
    """Masked tangent kernels Θ^aa of drawn networks, in float32, [draws, outputs, N, N]."""
    return np.asarray(_kernels(shapes, jnp.asarray(x, jnp.float32), keys, in_float32(masks)), float)
