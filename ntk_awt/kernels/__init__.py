"""Tangent kernels of dense and masked networks, and distances between them.

`ntk_awt.kernels.compat` makes neural-tangents work on current JAX; import it for analytic kernels.
"""

from ntk_awt.kernels.empirical import empirical
from ntk_awt.kernels.metrics import (
    kernel_distance,
    relative_kernel_distance,
    relative_target_distance,
    target_distance,
)

__all__ = [
    "empirical",
    "kernel_distance",
    "relative_kernel_distance",
    "relative_target_distance",
    "target_distance",
]
