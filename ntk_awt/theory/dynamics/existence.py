"""How wide a network must be for a random mask to keep its dynamics (theory E1, E5).

Two layers, n units, d inputs, every kernel that of gradient descent on all a_j and w_j:

    f(x) = n^{-1/2} Σ_j (m_j/√p) a_j φ(w_j·x/√d),   a_j = ±1,  w_j ~ N(0, I),  |φ|, |φ'| ≤ 1,

with a mask m_j ~ Bernoulli(p) of units, or masks m_ij of the weights, φ(Σ_i m_ij w_ij x_i/√(dp)).
A pruned unit neither acts nor moves: the gradient in w_j carries m_j too. Either way an entry of
the kernel is a mean of n independent terms

    (m_j/p)·[φφ' + φ̇φ̇'·x·x'/d],   or   φφ' + φ̇φ̇'·(1/d) Σ_i (m_ij/p) x_i x'_i,

that are bounded, and Hoeffding's inequality says how far it is from its expectation Θ^∞. For masked
units that is the dense limit. For masked weights it is the mixture over masks
(`kernels.analytic.mixture`), another kernel at every finite d.

The inputs enter through R² = max_x ‖x‖²/d, which bounds (1/d) Σ_i |x_i x'_i| for every pair. Kernel
distances are ‖·‖_F/N, which is at most the largest error of an entry.
"""

import math
from typing import NamedTuple

from ntk_awt.errors import InputError, check_count, check_number, choose

MASKED = ("units", "weights", "both")
PAIRINGS = ("shared", "independent")


def _check(n_points: int, density: float, radius2: float) -> None:
    check_count("n_points", n_points, low=1)
    check_number("density", density, low=0, high=1, low_open=True)
    check_number("radius2", radius2, low=0)


def _entries(n_points: int, delta: float) -> float:
    """ln(N(N+1)/δ): two tails for each of the N(N+1)/2 entries of a symmetric kernel."""
    check_number("delta", delta, low=0, high=1, low_open=True)
    return math.log(n_points * (n_points + 1) / delta)


# ---------------------------------------------------------------- E1: one kernel and its limit


def entry_bound(density: float, radius2: float, *, masked: str = "units") -> float:
    """B: the largest that one unit can add to n times an entry of the kernel.

    - "units": (1 + R²)/p;
    - "weights" (of the first layer): 1 + R²/p;
    - "both": (1 + R²/p)/p.

    Args:
        density: p in (0, 1].
        radius2: R² = max ‖x‖²/d.
        masked: what the mask prunes.

    Returns:
        B > 0.

    Raises:
        InputError: density outside (0, 1], a negative radius, an unknown kind of mask.

    Source: theory E1; "both" is derived here, since (1 + R²)/p does not hold for it.

    Example:
        >>> [entry_bound(0.5, 1.0, masked=masked) for masked in MASKED]
        [4.0, 3.0, 6.0]
    """
    _check(1, density, radius2)
    choose("masked", masked, MASKED)
    first = 1 + (radius2 if masked == "units" else radius2 / density)
    return first if masked == "weights" else first / density


def tail_probability(
    distance: float,
    n_points: int,
    width: int,
    density: float,
    radius2: float,
    *,
    masked: str = "units",
) -> float:
    """P(an entry of Θ^s is off by t or more) ≤ N(N+1)·exp(−n·t²/(2B²)), at most 1.

    Args:
        distance: t ≥ 0.
        n_points: N.
        width: n.
        density, radius2, masked: as in `entry_bound`.

    Returns:
        A probability.

    Raises:
        InputError: a number outside its range.

    Source: theory E1; Hoeffding, "Probability inequalities for sums of bounded random variables"
        (1963).

    Example:
        >>> round(tail_probability(0.5, 4, 4096, 0.2, 1.0), 4)
        0.1195
    """
    _check(n_points, density, radius2)
    check_count("width", width, low=1)
    check_number("distance", distance, low=0)
    bound = entry_bound(density, radius2, masked=masked)
    return min(1.0, n_points * (n_points + 1) * math.exp(-width * (distance / bound) ** 2 / 2))


def concentration_bound(
    n_points: int,
    width: int,
    density: float,
    radius2: float,
    delta: float,
    *,
    masked: str = "units",
) -> float:
    """With probability ≥ 1 − δ, ‖Θ^s − Θ^∞‖_F/N ≤ B·√(2 ln(N(N+1)/δ)/n).

    So is the largest error of an entry. Density 1 gives the dense network.

    Args:
        n_points: N.
        width: n.
        density, radius2, masked: as in `entry_bound`.
        delta: δ in (0, 1].

    Returns:
        A kernel distance.

    Raises:
        InputError: a number outside its range.

    Source: theory E1.

    Example:
        >>> t = concentration_bound(4, 4096, 0.2, 1.0, 0.1)
        >>> round(t, 4), round(tail_probability(t, 4, 4096, 0.2, 1.0), 4)
        (0.5086, 0.1)
    """
    _check(n_points, density, radius2)
    check_count("width", width, low=1)
    bound = entry_bound(density, radius2, masked=masked)
    return bound * math.sqrt(2 * _entries(n_points, delta) / width)


# ---------------------------------------------------------------- E5: dense against masked units


class _Rates(NamedTuple):
    """√n times the bounds on α = ‖Θ^d − Θ^s‖_F/N and on α_d = ‖Θ^d − Θ^∞‖_F/N."""

    pair: float
    dense: float


def _rates(
    n_points: int, density: float, radius2: float, delta: float, pairing: str, *, limit: bool
) -> _Rates:
    """Both hold together with probability 1 − δ; the second only if `limit`, else it is unused."""
    choose("pairing", pairing, PAIRINGS)
    half = concentration_bound(n_points, 1, 1.0, radius2, delta / 2)
    if pairing == "independent":
        return _Rates(half + concentration_bound(n_points, 1, density, radius2, delta / 2), half)
    bound = entry_bound(density, radius2)
    return _Rates(bound * math.sqrt(_entries(n_points, delta / 2 if limit else delta) / 2), half)


def distance_bound(
    n_points: int,
    width: int,
    density: float,
    radius2: float,
    delta: float,
    *,
    pairing: str = "shared",
) -> float:
    """A bound on ‖Θ^d − Θ^s‖_F/N, dense against masked units, with probability ≥ 1 − δ.

    - "shared": the sparse network is a mask of the dense one, with the same w_j. The difference is
      (1/n) Σ_j (1 − m_j/p) X_j with |X_j| ≤ 1 + R². Given the w_j, its terms have mean 0 and lie in
      intervals of width (1 + R²)/p, so that the limit is not needed:
      ((1 + R²)/p)·√(ln(N(N+1)/δ)/(2n)).
    - "independent": any two draws, each near the limit with probability 1 − δ/2 (E1):
      (1 + R²)(1 + 1/p)·√(2 ln(2N(N+1)/δ)/n).

    There is no such bound for masked weights: their limit is another one.

    Args:
        n_points, width, density, radius2, delta: as in `concentration_bound`.
        pairing: "shared" or "independent".

    Returns:
        A kernel distance α.

    Raises:
        InputError: a number outside its range, an unknown pairing.

    Source: theory E5 ("independent"); "shared" is derived here.

    Example:
        >>> round(distance_bound(4, 4096, 0.2, 1.0, 0.1), 4)
        0.2543
        >>> round(distance_bound(4, 4096, 0.2, 1.0, 0.1, pairing="independent"), 4)
        0.6491
    """
    _check(n_points, density, radius2)
    check_count("width", width, low=1)
    rates = _rates(n_points, density, radius2, delta, pairing, limit=False)
    return rates.pair / math.sqrt(width)


def _check_dynamics(
    horizon: float, residual: float, initial_gap: float, smallest_eigenvalue: float
) -> None:
    check_number("residual", residual, low=0)
    check_number("initial_gap", initial_gap, low=0)
    check_number("smallest_eigenvalue", smallest_eigenvalue, low=0)
    if horizon != math.inf:
        check_number("horizon", horizon, low=0)
    elif smallest_eigenvalue == 0:
        raise InputError(
            "horizon",
            expected="a finite number where smallest_eigenvalue is 0",
            got="inf",
            fix="give the smallest eigenvalue of the limit, or a horizon",
        )


def gap_bound(
    width: int,
    horizon: float,
    delta: float,
    density: float,
    n_points: int,
    *,
    radius2: float,
    residual: float,
    initial_gap: float = 0.0,
    smallest_eigenvalue: float = 0.0,
    pairing: str = "shared",
) -> float:
    """How far a random mask of units can lead from the dense network, with probability ≥ 1 − δ.

    sup_{t ≤ T} ‖f^d_t − f^s_t‖/√N ≤ β + H·α·r_0,  α from `distance_bound` (E1), the rest from P3
    (a), with the smaller of

    - H = T;
    - H = N/(λ − N·α_d), where λ − N·α_d > 0 bounds λ_min(Θ^d) from below (Weyl), with both α and
      α_d holding with probability 1 − δ; for "shared" each takes δ/2.

    It takes for granted: frozen kernels (training of the networks linearised at their start),
    squared loss, gradient flow, masked units and the two layers above.

    **β does not fall with the width.** With independent signs a_j the two start at functions that
    differ by β² → 2(1 − √p)·mean_x E φ², so no width makes the gap small. It is 0 for centred
    networks f − f_0, the default here, or where the starts coincide, as with units in pairs of
    equal w_j and mask and opposite a_j (which count as one unit: take n/2).

    Args:
        width: n.
        horizon: T ≥ 0; `math.inf` if the smallest eigenvalue is known.
        delta: δ in (0, 1].
        density: p in (0, 1].
        n_points: N, which are trained on and compared.
        radius2: R² = max ‖x‖²/d.
        residual: r_0 = ‖f^d_0 − y‖/√N; ‖y‖/√N for centred networks.
        initial_gap: β, a bound on ‖f^d_0 − f^s_0‖/√N.
        smallest_eigenvalue: λ of the limit Θ^∞, or a lower bound.
        pairing: as in `distance_bound`.

    Returns:
        A root mean square over points, in logits; ∞ if the width is too small for an infinite
        horizon.

    Raises:
        InputError: a number outside its range, an infinite horizon without an eigenvalue.

    Source: theory E5 with P3 (a); the hypothesis on β and the second H are derived here.

    Example:
        >>> round(gap_bound(10_000, 1.0, 0.1, 0.1, 6, radius2=1.0, residual=1.0), 4)
        0.3476
    """
    _check(n_points, density, radius2)
    check_count("width", width, low=1)
    _check_dynamics(horizon, residual, initial_gap, smallest_eigenvalue)
    rates = [
        _rates(n_points, density, radius2, delta, pairing, limit=limit) for limit in (False, True)
    ]
    reach = [horizon * rates[0].pair]
    left = smallest_eigenvalue - n_points * rates[1].dense / math.sqrt(width)
    if left > 0:
        reach.append(n_points / left * rates[1].pair)
    return initial_gap + (residual * min(reach) / math.sqrt(width) if residual else 0.0)


def sufficient_width(
    tolerance: float,
    horizon: float,
    delta: float,
    density: float,
    n_points: int,
    *,
    radius2: float,
    residual: float,
    initial_gap: float = 0.0,
    smallest_eigenvalue: float = 0.0,
    pairing: str = "shared",
) -> int:
    """n*: from this width on, a random mask of units keeps the dynamics to τ, P ≥ 1 − δ.

    The least n with `gap_bound` ≤ τ. All kernel distances fall as n^{-1/2}, so with k = α√n,
    k_d = α_d√n and τ' = τ − β it is the smaller of

        (T·k·r_0/τ')²   and   (N·(k·r_0 + k_d·τ')/(λ·τ'))²,   rounded up.

    For "shared" and finite T: n* = ⌈½ ln(N(N+1)/δ)·((1 + R²)·T·r_0/(p·τ'))²⌉.

    Args:
        tolerance: τ > β, root mean square over points, in logits.
        horizon, delta, density, n_points, radius2, residual: as in `gap_bound`.
        initial_gap, smallest_eigenvalue, pairing: as in `gap_bound`.

    Returns:
        A number of units, ≥ 1.

    Raises:
        InputError: τ ≤ β, a case that no width helps; or as `gap_bound`.

    Source: theory E5.

    Example:
        >>> setting = dict(radius2=1.0, residual=1.0)
        >>> n = sufficient_width(0.1, 1.0, 0.1, 0.1, 6, **setting)
        >>> n, gap_bound(n, 1.0, 0.1, 0.1, 6, **setting) <= 0.1
        (120806, True)
    """
    _check(n_points, density, radius2)
    check_number("tolerance", tolerance, low=0, low_open=True)
    _check_dynamics(horizon, residual, initial_gap, smallest_eigenvalue)
    if (left := tolerance - initial_gap) <= 0:
        raise InputError(
            "tolerance",
            expected=f"more than the initial gap, {initial_gap:g}",
            got=f"{tolerance:g}",
            fix="no width makes the initial gap smaller: centre both networks (f − f_0)",
        )
    if residual == 0:
        return 1
    rates = [
        _rates(n_points, density, radius2, delta, pairing, limit=limit) for limit in (False, True)
    ]
    roots = [horizon * rates[0].pair * residual / left]
    if smallest_eigenvalue > 0:
        needed = rates[1].pair * residual + rates[1].dense * left
        roots.append(n_points * needed / (smallest_eigenvalue * left))
    if not min(roots) < 1e150:
        raise InputError(
            "width",
            expected="one that a computer can hold",
            got=f"the square of {min(roots):g}",
            fix="raise the tolerance or the density, or shorten the horizon",
        )
    return max(1, math.ceil(min(roots) ** 2))
