"""Shared names for arrays and functions. Imports nothing of ours.

A network is a pure function `ApplyFn = (params, x) -> logits` and a pytree of parameters; every
part of the package accepts any such pair, whoever wrote it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Key: TypeAlias = jax.Array
"""A typed JAX random key, from `jax.random.key(seed)`."""

Params: TypeAlias = Any
"""A pytree of float arrays."""

Mask: TypeAlias = Any
"""A pytree with the structure of the parameters and boolean leaves; `True` keeps an entry."""

Gain: TypeAlias = Any
"""A pytree with the structure of the parameters and scalar leaves: γ of each leaf."""

Images: TypeAlias = Float[Array, "n *shape"]
Labels: TypeAlias = Int[Array, "n"]
Logits: TypeAlias = Float[Array, "n c"]
PerExample: TypeAlias = Float[Array, "n"]

Box: TypeAlias = tuple[Any, Any]
"""The lowest and the highest value of a pixel, in pixel units.

Each one is a number, ∓∞ where there is no limit, or an array that broadcasts to one image: [c] for
images [h, w, c], [c, 1, 1] for images [c, h, w].
"""

ApplyFn: TypeAlias = Callable[[Params, Images], Logits]


class Split(NamedTuple):
    """Images with their labels; a slice, a mask or an array of rows takes both.

    Attributes:
        x: images [n, *shape], JAX or NumPy.
        y: labels [n], integers.

    Example:
        >>> split = Split(jnp.zeros((5, 28, 28, 1)), jnp.arange(5))
        >>> split[:2].x.shape, split[jnp.array([4, 0])].y.tolist()
        ((2, 28, 28, 1), [4, 0])
    """

    x: Any
    y: Any

    def __getitem__(self, rows: Any) -> "Split":  # pyright: ignore[reportIncompatibleMethodOverride]
        """The examples of these rows."""
        return Split(self.x[rows], self.y[rows])


# ---------------------------------------------------------------- precision


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
        >>> widened({"n": 3, "w": jnp.ones(2, jnp.float16)})
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
