"""Convolutions whose derivatives are matrix products on a CPU.

XLA's convolutions on CPUs are several times slower inside loops than outside, and their transposes
slower still; attacks and training are loops over such gradients. Of the patches P(x), all windows
of the input as rows, a convolution is the product P(x)·W, and so are its derivatives.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

_NUMBERS = ("NHWC", "HWIO", "NHWC")


def patches(
    x: Float[Array, "n h w c"], window: Sequence[int], padding: str
) -> Float[Array, "n h2 w2 p"]:
    """All windows of each image, with stride 1.

    Args:
        x: images.
        window: height and width, in pixels.
        padding: SAME or VALID.

    Returns:
        [n, height', width', window pixels · channels], in the order of a kernel [*window, c, out].

    Example:
        >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> print(patches(x, (2, 2), "VALID").ravel())
        [0. 1. 2. 3.]
    """
    borders = jax.lax.padtype_to_pads(x.shape[1:3], window, (1, 1), padding)
    x = jnp.pad(x, [(0, 0), *borders, (0, 0)])
    # In two stages: the transpose then adds height + width terms rather than their product.
    (height, width), (rows, columns) = window, x.shape[1:3]
    x = jnp.concatenate([x[:, :, j : j + columns - width + 1] for j in range(width)], axis=3)
    return jnp.concatenate([x[:, i : i + rows - height + 1] for i in range(height)], axis=3)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k1 k2 c o"], padding: str
) -> Float[Array, "n h2 w2 o"]:
    """Convolution with stride 1: y = P(x)·W, whose derivative is P(dx)·W + P(x)·dW.

    On a CPU the derivative, and the value beside it, are computed as these products, so loops over
    gradients run at the speed of matrix products; elsewhere by XLA's convolutions.

    Args:
        x: images.
        kernel: [*window, channels, outputs].
        padding: SAME or VALID.

    Example:
        >>> x, kernel = jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1))
        >>> print(jax.grad(lambda x: convolve(x, kernel, "VALID").sum())(x)[0, :, :, 0])
        [[1. 2. 1.]
         [2. 4. 2.]
         [1. 2. 1.]]
    """
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_NUMBERS)


def _product(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """P(x)·W, of matrices: XLA's products of arrays with more axes are slower."""
    rows = patches(x, kernel.shape[:2], padding)
    found = rows.reshape(-1, rows.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return found.reshape(*rows.shape[:3], -1)


def _by_products(primals: tuple[Any, Any], tangents: tuple[Any, Any], padding: str) -> Any:
    """The rule on a CPU."""
    (x, kernel), (dx, d_kernel) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_product(dx, kernel, padding))
    if not isinstance(d_kernel, SymbolicZero):
        terms.append(_product(x, d_kernel, padding))
    return _product(x, kernel, padding), sum(terms[1:], start=terms[0])


def _rule(padding: str, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> Any:
    if jax.default_backend() == "cpu":
        return _by_products(primals, tangents, padding)
    dense = tuple(
        jnp.zeros_like(value) if isinstance(tangent, SymbolicZero) else tangent
        for value, tangent in zip(primals, tangents, strict=True)
    )
    return jax.jvp(partial(convolve.fun, padding=padding), primals, dense)


convolve.defjvp(_rule, symbolic_zeros=True)
