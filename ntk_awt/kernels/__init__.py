"""Tangent kernels of dense and masked networks, and measures of them.

`empirical` computes the kernel of any network; `plan` says beforehand how, and at what cost. Import
`kernels.probes` for estimates of kernels that don't fit, `kernels.analytic` for infinite width
(through neural-tangents, which `kernels.compat` makes work on current JAX).
"""

from ntk_awt.kernels.empirical import empirical, selection
from ntk_awt.kernels.engine.planning import Plan
from ntk_awt.kernels.engine.planning import make as plan
from ntk_awt.kernels.metrics import (
    centre,
    centred_alignment,
    condition_number,
    cosine_kernel_distance,
    effective_rank,
    eigenpictures,
    eigenvectors,
    flatten,
    kernel_distance,
    kernel_velocity,
    label_alignment,
    participation_ratio,
    polar,
    relative_kernel_distance,
    relative_target_distance,
    specialisation,
    spectrum,
    spectrum_mass,
    target_distance,
)

__all__ = [
    "Plan",
    "centre",
    "centred_alignment",
    "condition_number",
    "cosine_kernel_distance",
    "effective_rank",
    "eigenpictures",
    "eigenvectors",
    "empirical",
    "flatten",
    "kernel_distance",
    "kernel_velocity",
    "label_alignment",
    "participation_ratio",
    "plan",
    "polar",
    "relative_kernel_distance",
    "relative_target_distance",
    "selection",
    "specialisation",
    "spectrum",
    "spectrum_mass",
    "target_distance",
]
