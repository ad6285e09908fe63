"""Threat models: the set B(x) of allowed images around x, and the moves an attack needs in it."""

from ntk_awt.threats.base import (
    L2,
    THREATS,
    Class,
    Linf,
    StrongL2,
    Threat,
    build,
    check_kind,
    check_threat,
    class_mean_basis,
    corners,
    diameter,
    ends,
    length_of,
    orthonormal,
    register,
)

__all__ = [
    "L2",
    "THREATS",
    "Class",
    "Linf",
    "StrongL2",
    "Threat",
    "build",
    "check_kind",
    "check_threat",
    "class_mean_basis",
    "corners",
    "diameter",
    "ends",
    "length_of",
    "orthonormal",
    "register",
]
