"""Masked networks of two layers and the limits of their kernels, in NumPy alone.

f(x) = n^{-1/2} Σ_j a_j φ(w_j·x/√d), for E1 and E5.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.special


class Activation(NamedTuple):
    """φ, φ', and E φ(u)φ(v), E φ'(u)φ'(v) for variances a, b and covariance c."""

    value: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    expectations: Callable[[Any, Any, Any], tuple[np.ndarray, np.ndarray]]


def _scaled_erf(a: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    """Arcsine kernels of erf(√π·u/2), whose slope exp(−πu²/4) is at most 1."""
    a, b, c = (np.pi / 4 * np.asarray(k) for k in (a, b, c))
    size = (1 + 2 * a) * (1 + 2 * b)
    return 2 / np.pi * np.arcsin(2 * c / np.sqrt(size)), 1 / np.sqrt(size - 4 * c**2)


def _sine(a: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    half = np.exp(-(np.asarray(a) + b) / 2)
    return half * np.sinh(c), half * np.cosh(c)


def _quadrature(value: Callable[[Any], Any], derivative: Callable[[Any], Any]) -> Any:
    """Gauss–Hermite with 80² nodes: for tanh at variances up to 1.5 the error is below 1e-5."""

    def expectations(a: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        weights = weights / weights.sum()
        a, b, c = (k[..., None, None] for k in np.broadcast_arrays(a, b, c))
        first = np.sqrt(a) * nodes[:, None]
        second = c / np.sqrt(a) * nodes[:, None] + np.sqrt(np.maximum(b - c**2 / a, 0)) * nodes
        found = [
            np.einsum("...st,s,t", f(first) * f(second), weights, weights)
            for f in (value, derivative)
        ]
        return found[0], found[1]

    return expectations


def _tanh_slope(u: Any) -> Any:
    return 1 - np.tanh(u) ** 2


def _cube_slope(u: Any) -> Any:
    return 3 * u**2


ACTIVATIONS = {
    "erf": Activation(
        lambda u: scipy.special.erf(np.sqrt(np.pi) / 2 * u),
        lambda u: np.exp(-np.pi / 4 * u**2),
        _scaled_erf,
    ),
    "sin": Activation(np.sin, np.cos, _sine),
    "tanh": Activation(np.tanh, _tanh_slope, _quadrature(np.tanh, _tanh_slope)),
    "cube": Activation(lambda u: u**3, _cube_slope, _quadrature(lambda u: u**3, _cube_slope)),
}
"""Of these only the cube breaks |φ|, |φ'| ≤ 1; it is for a control."""


class Setting(NamedTuple):
    """One network without its weights: what is masked, and at which inputs x [N, d]."""

    activation: str
    masked: str
    density: float
    x: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.activation}, {self.masked} masked, p = {self.density:g}"

    @property
    def radius2(self) -> float:
        """R² = max (1/d) Σ_i |x_i x'_i| over all pairs."""
        return float((np.abs(self.x) @ np.abs(self.x).T).max() / self.x.shape[1])


def inputs(rng: np.random.Generator, points: int, dimension: int, square: float) -> np.ndarray:
    """Points with (1/d)‖x‖² = `square` that are correlated with each other, [N, d]."""
    x = rng.normal(size=dimension) + rng.normal(size=(points, dimension))
    return x * np.sqrt(square * dimension / (x**2).sum(1, keepdims=True))


def dense_limit(activation: str, x: np.ndarray) -> np.ndarray:
    """Θ^∞ = T + Ṫ·(x·x'/d), [N, N]."""
    c = x @ x.T / x.shape[1]
    a = np.diag(c)
    products, slopes = ACTIVATIONS[activation].expectations(a[:, None], a[None, :], c)
    return products + slopes * c


def limit(setting: Setting) -> np.ndarray:
    """Θ^∞: the dense limit if only units are masked, else the mean over all 2^d masks."""
    if setting.masked == "units":
        return dense_limit(setting.activation, setting.x)
    d, p = setting.x.shape[1], setting.density
    total = np.zeros((len(setting.x),) * 2)
    for kept in itertools.product((0, 1), repeat=d):
        chance = p ** sum(kept) * (1 - p) ** (d - sum(kept))
        total += chance * dense_limit(setting.activation, setting.x * kept / np.sqrt(p))
    return total


def kernel_terms(
    setting: Setting, w: np.ndarray, units: np.ndarray | None, weights: np.ndarray | None
) -> np.ndarray:
    """Σ over units of what each adds to n·Θ, [..., N, N].

    Args:
        setting: inputs and activation.
        w: [..., n, d].
        units: m_j/√p [..., n], or None for 1.
        weights: m_ij/√p [..., n, d], or None for 1.
    """
    x, act = setting.x, ACTIVATIONS[setting.activation]
    d = x.shape[1]
    u = (w if weights is None else w * weights) @ x.T / np.sqrt(d)
    value, derivative = act.value(u), act.slope(u)
    if units is not None:
        value, derivative = value * units[..., None], derivative * units[..., None]

    def gram(rows: np.ndarray) -> np.ndarray:
        return np.swapaxes(rows, -1, -2) @ rows

    if weights is None:
        return gram(value) + gram(derivative) * (x @ x.T / d)
    parts = (derivative * (weights[..., i : i + 1] * x[:, i] / np.sqrt(d)) for i in range(d))
    return gram(value) + sum(map(gram, parts))


def quantiles(errors: np.ndarray, deltas: tuple[float, ...]) -> np.ndarray:
    """The largest value but the share δ of the draws that may violate, [deltas, …]."""
    return np.quantile(errors, 1 - np.asarray(deltas), axis=0, method="higher")
