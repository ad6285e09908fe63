"""What has fewer than 32 bits is summed in float32. Imports nothing of ours."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """The dtype to sum in: float32 in place of a smaller one; float64 stays.

    Example:
        >>> print(wide(jnp.bfloat16), wide(jnp.float64))
        float32 float64
    """
    dtype = jnp.dtype(dtype)
    small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if small else dtype


def widened(tree: Any) -> Any:
    """The tree with its half-precision leaves in float32, and all others as they are.

    Args:
        tree: a pytree of arrays, or of their shapes and dtypes (`jax.ShapeDtypeStruct`).

    Example:
        >>> widened({"w": jnp.ones(2, jnp.float16), "n": 3})
        {'n': 3, 'w': Array([1., 1.], dtype=float32)}
    """

    def widen(leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or wide(dtype) == dtype:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=wide(dtype))
        return leaf.astype(wide(dtype))

    return jax.tree.map(widen, tree)


def common_dtype(*leaves: Any) -> Any:
    """The largest of the leaves' dtypes, float32 at least."""
    return max((wide(jnp.result_type(leaf)) for leaf in leaves), key=lambda dtype: dtype.itemsize)
