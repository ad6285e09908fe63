"""L4: the angle of a trained classifier to the signal, predicted without training.

n points of N(yμ, σ²I), as many of each class, in the limit d → ∞ with n/d fixed.
"""

from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from ntk_awt.errors import InputError, check_count, check_number, choose
from ntk_awt.theory.linear.sets import Array


def _check_setting(n: int, d: int, mean_norm: float, sigma: float, *, signal: bool = False) -> None:
    check_count("n", n, low=1)
    check_count("d", d, low=1)
    check_number("mean norm", mean_norm, low=0, low_open=signal)
    check_number("sigma", sigma, low=0, low_open=True)


def mean_difference_cosine(n: int, d: int, mean_norm: float, sigma: float = 1.0) -> float:
    """cos θ between the difference of the sample means and μ: cos²θ = ‖μ‖²/(‖μ‖² + σ²d/n).

    In the limit d → ∞ with n/d fixed, for n points of N(yμ, σ²I), as many of each class. The sample
    mean of y·x is μ plus noise of variance σ²/n in each of d directions.

    Args:
        n: training points.
        d: dimension.
        mean_norm: ‖μ‖.
        sigma: σ > 0.

    Returns:
        cos θ ≥ 0.

    Raises:
        InputError: a number outside its range.

    Source: theory L4.

    Example:
        >>> round(mean_difference_cosine(100, 300, 1.0), 3)
        0.5
    """
    _check_setting(n, d, mean_norm, sigma)
    return float(mean_norm / np.sqrt(mean_norm**2 + sigma**2 * d / n))


def ridge_cosine(
    n: int, d: int, mean_norm: float, sigma: float = 1.0, *, penalty: float = 0.0
) -> float:
    """cos θ of ridge regression on the labels, min Σ(y_i − wᵀx_i)² + penalty·‖w‖², without bias.

    w is proportional to Q(μ + g) with g ~ N(0, σ²I/n), the mean noise, and Q = (S + λ)⁻¹ of the
    scatter S about the mean, independent of g; λ = penalty/n, γ = d/n. So
    cos²θ = m²/m₂ · ‖μ‖²/(‖μ‖² + σ²γ) with m = tr Q/d and m₂ = tr Q²/d of the Marchenko–Pastur law:
    γσ²λm² + (λ + σ²(1 − γ))m = 1 and m₂ = (γσ²m² + m)/(2γσ²λm + λ + σ²(1 − γ)).
    Without a penalty, least squares (d < n) and the least-norm interpolator (d > n):
    m²/m₂ = 1 − γ and 1 − 1/γ.

    Args:
        n, d, mean_norm, sigma: as in `mean_difference_cosine`, to which an infinite penalty leads.
        penalty: scikit-learn's `alpha` of `Ridge(fit_intercept=False)`, ≥ 0.

    Returns:
        cos θ ≥ 0.

    Source: theory L4; the spectrum from Marchenko and Pastur (1967), the setting as in Mignacco et
    al. (2020).

    Example:
        >>> round(ridge_cosine(200, 100, 1.0) ** 2, 3)  # (1 − ½)·1/(1 + ½)
        0.333
    """
    check_number("penalty", penalty, low=0)
    plain = mean_difference_cosine(n, d, mean_norm, sigma)
    gamma, scale, shift = d / n, sigma**2, penalty / n
    if shift == 0:
        return float(plain * np.sqrt(1 - min(gamma, 1 / gamma)))
    half = (shift + scale * (1 - gamma)) / 2
    # The positive root, without cancellation.
    m = 1 / (half + np.sqrt(half**2 + gamma * scale * shift))
    m2 = (gamma * scale * m**2 + m) / (2 * gamma * scale * shift * m + 2 * half)
    return float(plain * np.sqrt(m**2 / m2))


LOSSES = ("hinge", "squared_hinge")
"""What an SVM sums: max(0, 1 − yf) (`SVC`) or its square (`LinearSVC`)."""


def _shift_moments(loss: str, mean: float, spread: float, tau: float) -> tuple[float, ...]:
    """E[s], E[s²] and E[−ds/dV] of s = prox_τ(V) − V, V ~ N(mean, spread²).

    Hinge: s = τ for V < 1 − τ, 1 − V up to 1, 0 above. Squared hinge: s = k(1 − V)₊,
    k = 2τ/(1 + 2τ). For τ = ∞ both are (1 − V)₊.
    """

    def below_one(start: float) -> tuple[float, float, float]:
        """P(start < V < 1) and the first two moments of 1 − V there."""
        ends = (np.array([start, 1.0]) - mean) / spread
        share = np.diff(scipy.special.ndtr(ends))[0]
        density = np.exp(-(ends**2) / 2) / np.sqrt(2 * np.pi)
        fall = density[0] - density[1]
        tilt = np.where(np.isinf(ends), 0.0, ends * density)
        first = (1 - mean) * share - spread * fall
        second = (1 - mean) ** 2 * share - 2 * (1 - mean) * spread * fall
        return share, first, second + spread**2 * (share + tilt[0] - tilt[1])

    if loss == "squared_hinge" or np.isinf(tau):
        k = 2 * tau / (1 + 2 * tau) if np.isfinite(tau) else 1.0
        with np.errstate(invalid="ignore"):
            share, first, second = below_one(-np.inf)
        return k * first, k**2 * second, k * share
    share, first, second = below_one(1 - tau)
    low = float(scipy.special.ndtr((1 - tau - mean) / spread))
    return first + tau * low, second + tau**2 * low, share


def svm_cosine(
    n: int, d: int, mean_norm: float, sigma: float = 1.0, *, c: float, loss: str = "hinge"
) -> float:
    """cos θ of the linear SVM min ½‖w‖² + C Σ ℓ(y_i wᵀx_i) in the proportional limit.

    By the convex Gaussian min-max theorem ŵ behaves as w = ρμ₀ + q·(a random direction), with
    (ρ, q, τ) from three equations in s = prox_{τℓ}(V) − V, V ~ N(ρ‖μ‖, ρ² + q²), at σ = 1:
    E[s²] = γq², γρ = ‖μ‖E[s], E[−ds/dV] = γ − λτ, where γ = d/n and λ = 1/(Cn). So
    cos θ = ρ/√(ρ² + q²). They are the stationary points of the scalar problem
    min_{ρ,q} max_τ E[min_u ℓ(u) + (u − V)²/2τ] − γq²/2τ + λ(ρ² + q²)/2.
    Solved from λ = ∞, where ŵ is the mean difference, downwards.

    Args:
        n, d, mean_norm, sigma: as in `mean_difference_cosine`.
        c: scikit-learn's `C`, > 0.
        loss: hinge (`SVC`) or squared_hinge (`LinearSVC`).

    Returns:
        cos θ ≥ 0.

    Source: theory L4; the theorem from Thrampoulidis, Oymak and Hassibi (2015), Gaussian mixtures
    as in Mignacco et al. (2020) and Deng, Kammoun and Thrampoulidis (2021).

    Example:
        >>> cosines = [svm_cosine(100, 300, 1.0, c=c) for c in (1e-6, 1.0)]
        >>> print(round(cosines[0], 3), cosines[1] < 0.5)
        0.5 True
    """
    choose("loss", loss, LOSSES)
    check_number("C", c, low=0, low_open=True)
    _check_setting(n, d, mean_norm, sigma, signal=True)
    mu, gamma, target = mean_norm / sigma, d / n, 1 / (c * n * sigma**2)

    def equations(point: Array, penalty: float) -> Array:
        rho, q, tau = np.exp(point)
        first, second, slope = _shift_moments(loss, rho * mu, np.hypot(rho, q), tau)
        return np.array(
            [
                np.log(second / (gamma * q**2)),
                np.log(mu * first / (gamma * rho)),
                (slope + penalty * tau) / gamma - 1,
            ]
        )

    # Where no point reaches its margin: w = C Σ y x, and τ = γ/λ. The squared hinge has twice the
    # slope, and then prox has not the step τ but k/2.
    penalty = max(target, 100.0 * (1 + mu**2) * (1 + gamma))
    slope = 1.0 if loss == "hinge" else 2.0
    point = np.log(np.array([mu, np.sqrt(gamma), gamma / slope]) * slope / penalty)
    while True:
        solved = scipy.optimize.root(equations, point, args=(penalty,), tol=1e-12)
        error = np.abs(solved.fun).max()
        if not error < 1e-6:
            raise ArithmeticError(f"no fixed point of the SVM at λ = {penalty:g}: {error:g} off")
        point = solved.x
        if penalty == target:
            break
        penalty = max(target, penalty / 2)
    rho, q, _ = np.exp(point)
    return float(rho / np.hypot(rho, q))


def hard_margin_cosine(n: int, d: int, mean_norm: float, sigma: float = 1.0) -> float:
    """cos θ of the largest-margin classifier of separable classes, in the proportional limit.

    The margin is κ = max_c κ(c), where E[(κ − c‖μ‖/σ − G)₊²] = γ(1 − c²), G standard normal and
    γ = d/n; cos θ is the c of the maximum. The limit C → ∞ of `svm_cosine`.

    Args:
        n, d, mean_norm, sigma: as in `mean_difference_cosine`.

    Returns:
        cos θ ≥ 0.

    Raises:
        InputError: the classes are not separable in the limit (κ ≤ 0).

    Source: theory L4; Montanari, Ruan, Sohn and Yan (2019), Deng, Kammoun and Thrampoulidis (2021).

    Example:
        >>> round(hard_margin_cosine(100, 10_000, 1.0) / ridge_cosine(100, 10_000, 1.0), 2)
        1.0
    """
    _check_setting(n, d, mean_norm, sigma, signal=True)
    mu, gamma = mean_norm / sigma, d / n

    def margin(cosine: float) -> float:
        def excess(kappa: float) -> float:
            # E[(κ − U)₊²] of U ~ N(cμ, 1), by E[(1 − V)₊²] of V = U + 1 − κ.
            _, second, _ = _shift_moments("hinge", cosine * mu + 1 - kappa, 1.0, np.inf)
            return second - gamma * (1 - cosine**2)

        high = mu + np.sqrt(gamma) + 2
        root: Any = scipy.optimize.brentq(excess, cosine * mu - 30, high, xtol=1e-13)
        return float(root)

    # The end c = 1 asks for a zero moment: no finite κ has it.
    found: Any = scipy.optimize.minimize_scalar(
        lambda c: -margin(c), bounds=(0.0, 1 - 1e-9), method="bounded", options={"xatol": 1e-10}
    )
    if -found.fun <= 0:
        raise InputError(
            "classes",
            expected="separable ones",
            got=f"margin {-found.fun:.3g} at n/d = {n / d:g}",
            fix="take fewer points, or `svm_cosine` with a finite C",
        )
    return float(found.x)
