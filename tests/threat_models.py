"""Threat models of every kind for images of d pixels, and what they are in float64."""

from typing import Any

import numpy as np

from ntk_awt.threats import THREATS, StrongL2

ORDER = {"linf": np.inf, "l2": 2, "strong-l2": 2}
DUAL = {"linf": 1, "l2": 2, "strong-l2": 2}
RATIO = 0.3
"""δ/ε of the strong threat model."""


def basis(d: int) -> np.ndarray:
    """Up to three directions in general position, [d, k]; not orthonormal."""
    return np.random.default_rng(d).normal(size=(d, min(3, d)))


def make(name: str, epsilon: float, d: int, bounds: Any = (0.0, 1.0), cls: Any = None) -> Any:
    """The threat model `name`, or one of class `cls` with the same fields."""
    cls = cls or THREATS[name]
    if issubclass(cls, StrongL2):
        return cls(epsilon, RATIO * epsilon, basis(d), bounds)
    return cls(epsilon, bounds)


def signal(v: np.ndarray) -> np.ndarray:
    """The limited part UUᵀv of each row, in float64, by a pseudo-inverse."""
    b = basis(v.shape[1])
    return v @ (b @ np.linalg.pinv(b))


def reach(name: str, g: np.ndarray, epsilon: float) -> np.ndarray:
    """max ⟨g, v⟩ over the set without the box, for each row g, in float64."""
    if name != "strong-l2":
        return epsilon * np.linalg.norm(g, ord=DUAL[name], axis=1)
    a, b = (np.linalg.norm(part, axis=1) for part in (signal(g), g - signal(g)))
    limited = epsilon * (RATIO * a + np.sqrt(1 - RATIO**2) * b)
    return np.where(a <= RATIO * np.hypot(a, b), epsilon * np.hypot(a, b), limited)


def worst(name: str, g: np.ndarray, epsilon: float) -> np.ndarray:
    """The maximiser itself, [n, d]."""
    if name == "linf":
        return epsilon * np.sign(g)
    length = np.linalg.norm(g, axis=1, keepdims=True)
    if name == "l2":
        return epsilon * g / length
    inside = signal(g)
    a, b = (np.linalg.norm(part, axis=1, keepdims=True) for part in (inside, g - inside))
    limited = RATIO * inside / a + np.sqrt(1 - RATIO**2) * (g - inside) / b
    return epsilon * np.where(a <= RATIO * length, g / length, limited)
