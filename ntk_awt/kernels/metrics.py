"""Distances between kernels and between outputs of two networks on the same inputs (theory §0)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def _squares(x: Array) -> Array:
    return jnp.sum(jnp.square(x))


def kernel_distance(
    dense: Float[Array, "n1 n2 *c"], sparse: Float[Array, "n1 n2 *c"]
) -> Float[Array, ""]:
    """α = ‖Θ^d − Θ^s‖_F / √(n1·n2); for a square kernel that is 1/N times the norm (theory §0).

    Args:
        dense, sparse: kernels of the two networks on the same inputs, any output axes.

    Returns:
        A scalar, in the unit of the kernels (squared logits per squared parameter).
    """
    n1, n2 = dense.shape[:2]
    return jnp.sqrt(_squares(dense - sparse)) / jnp.sqrt(1.0 * n1 * n2)


def relative_kernel_distance(
    dense: Float[Array, "n1 n2 *c"], sparse: Float[Array, "n1 n2 *c"]
) -> Float[Array, ""]:
    """‖Θ^d − Θ^s‖_F² / ‖Θ^d‖_F², without unit: 0 for equal kernels, 1 for a zero one (theory §0).

    Example:
        >>> import jax.numpy as jnp
        >>> float(relative_kernel_distance(jnp.full((2, 2), 2.0), jnp.ones((2, 2))))
        0.25
    """
    return _squares(dense - sparse) / _squares(dense)


def target_distance(dense: Float[Array, "n c"], sparse: Float[Array, "n c"]) -> Float[Array, ""]:
    """β = ‖f^d − f^s‖_F / √N of outputs on the same N inputs, in logits (theory §0).

    Along a training this is the dynamics gap ‖f^d_t − f^s_t‖ / √N.
    """
    return jnp.sqrt(_squares(dense - sparse) / dense.shape[0])


def relative_target_distance(
    dense: Float[Array, "n c"], sparse: Float[Array, "n c"]
) -> Float[Array, ""]:
    """‖f^d − f^s‖_F² / ‖f^d‖_F², without unit (theory §0)."""
    return _squares(dense - sparse) / _squares(dense)
