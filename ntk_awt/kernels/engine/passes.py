"""Products with a network's Jacobian, in float32 also where its logits are of half precision.

J·v overflows float16 at 65504, and kernels are far larger. Both products are linear, so there the
vector is divided by its size first, to the next power of two, and the product multiplied by it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntk_awt.types import Params, wide


def _size(tree: Any) -> jax.Array:
    """2^⌈log₂ ‖v‖⌉, or 1 for 0; a constant for gradients."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    norm = jax.lax.stop_gradient(jnp.sqrt(sum(squares[1:], squares[0])))
    return jnp.where(norm > 0, jnp.exp2(jnp.ceil(jnp.log2(jnp.where(norm > 0, norm, 1)))), 1)


def push(f: Callable[[Params], jax.Array], at: Params, direction: Params) -> jax.Array:
    """J·v, J the derivative of f at `at`."""
    dtype = jax.eval_shape(f, at).dtype
    if wide(dtype) == dtype:
        return jax.jvp(f, (at,), (direction,))[1]
    size = _size(direction)
    found = jax.jvp(f, (at,), (jax.tree.map(lambda v: v / size, direction),))[1]
    return found.astype(wide(dtype)) * size


def pull(f: Callable[[Params], jax.Array], at: Params) -> Callable[[jax.Array], Params]:
    """u ↦ Jᵀu, J the derivative of f at `at`."""
    logits, back = jax.vjp(f, at)
    if wide(logits.dtype) == logits.dtype:
        return lambda u: back(u)[0]

    def scaled(u: jax.Array) -> Params:
        size = _size(u)
        (found,) = back((u / size).astype(logits.dtype))
        return jax.tree.map(lambda leaf: leaf * size, found)

    return scaled
