"""L3: the least robust error of any linear classifier, and where robust ones exist."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from ntk_awt.errors import InputError, check_count
from ntk_awt.theory.linear.sets import (
    Array,
    Ball,
    Gaussians,
    LinearClassifier,
    PixelThreat,
    Strong,
    Threat,
    gaussians,
    has_projection,
    maximiser,
    nearest,
    numbers,
    p_norm,
    reach,
    single,
)


def best_isotropic_error(
    mean_norm: Any, epsilon: Any, delta: Any = np.inf, sigma: Any = 1.0
) -> Array:
    """The least robust error of any linear classifier of N(±μ, σ²I) with equal priors.

    min(½, Φ((min(ε, δ) − ‖μ‖)/σ)), at w = μ, with the strong threat's signal along μ; the ordinary
    L2 threat is δ = ∞. The ½ is that of a constant answer, which is best where the reach is ‖μ‖ or
    more: then Φ(…) ≥ ½ for every w, and a growing bias lowers the error to ½.

    Args:
        mean_norm: ‖μ‖, a number or an array.
        epsilon, delta: radii, numbers or arrays.
        sigma: σ > 0, a number or an array.

    Returns:
        The common shape of the arguments.

    Raises:
        InputError: a negative length, σ ≤ 0, NaN.

    Source: theory L3, with the bias.

    Example:
        >>> print(best_isotropic_error(1.0, [0.0, 1.0, 2.0]).round(4))
        [0.1587 0.5    0.5   ]
        >>> print(best_isotropic_error(1.0, 2.0, [0.0, 0.5]).round(4))
        [0.1587 0.3085]
    """
    lengths = {"mean norm": mean_norm, "epsilon": epsilon, "delta": delta, "sigma": sigma}
    for name, value in lengths.items():
        array = np.asarray(value, np.float64)
        if not np.all(array > 0 if name == "sigma" else array >= 0):
            low = "(" if name == "sigma" else "["
            got = f"{array[~(array > 0)].flat[0]:g}"
            raise InputError(name, expected=f"numbers in {low}0, ∞)", got=got)
    gap = np.minimum(epsilon, delta) - np.asarray(mean_norm, np.float64)
    return np.minimum(scipy.special.ndtr(gap / sigma), 0.5)


class _Direction(NamedTuple):
    """w, and the interval that holds the best value of (wᵀΔ − r(w))/√(wᵀΣw)."""

    w: Array
    low: float
    high: float


def _best_direction(half: Array, covariance: Array, threat: Threat) -> _Direction:
    """argmax_w (wᵀΔ − r(w))/√(wᵀΣw) for one covariance: convex, and certified by its dual.

    The maximum is min_{v ∈ V} √((Δ − v)ᵀΣ⁻¹(Δ − v)), and the best w is Σ⁻¹(Δ − v) (Bhagoji et al.
    2019; Dan et al. 2020): accelerated projected gradient steps in v, restarted where they do not
    descend. A ball of another p has no simple projection, but its reach is smooth: L-BFGS in w on
    ½wᵀΣw − wᵀΔ + r(w), the same problem's other side.
    """
    if isinstance(threat, Ball) and p_norm(half, threat.p) <= threat.epsilon:
        return _Direction(half, 0.0, 0.0)
    factor = scipy.linalg.cho_factor(covariance)

    def bounds(v: Array) -> _Direction:
        w = scipy.linalg.cho_solve(factor, half - v)
        high = np.sqrt(max(float(w @ (half - v)), 0.0))
        spread = np.sqrt(float(w @ covariance @ w))
        low = (float(w @ half) - float(reach(w, threat))) / spread if spread else 0.0
        return _Direction(w, low, high)

    def done(found: _Direction) -> bool:
        return found.high - found.low <= 1e-10 * max(found.high, 1e-8)

    if not has_projection(threat):

        def objective(w: Array) -> tuple[float, Array]:
            v = maximiser(w, threat) if w.any() else np.zeros_like(w)
            pull = covariance @ w
            return float(w @ (pull / 2 - half + v)), pull - half + v

        start = scipy.linalg.cho_solve(factor, half)
        options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-12}
        solved = scipy.optimize.minimize(
            objective, start, jac=True, method="L-BFGS-B", options=options
        ).x
        return bounds(maximiser(solved, threat))

    step = float(scipy.linalg.eigvalsh(covariance, subset_by_index=(0, 0))[0])
    v = ahead = nearest(half, threat)
    found, momentum = bounds(v), 1.0
    for _ in range(20_000):
        if done(found):
            break
        w = scipy.linalg.cho_solve(factor, half - ahead)
        following = nearest(ahead + step * w, threat)
        if (ahead - following) @ (following - v) > 0:
            momentum = 1.0
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / grown * (following - v)
        v, momentum = following, grown
        found = bounds(v)
    return found


class Best(NamedTuple):
    """The best found.

    Attributes:
        robust_error: over all linear classifiers and the two constant answers.
        classifier: that reaches it; None where a constant answer is best.
    """

    robust_error: float
    classifier: LinearClassifier | None


def _log_error(w: Array, b: float, problem: Gaussians, threat: Threat) -> tuple[float, Array]:
    """log of the robust error and its gradient in (w, b)."""
    signs, r, v = np.array([-1.0, 1.0]), float(reach(w, threat)), maximiser(w, threat)
    pull = problem.covariances @ w
    spread = np.sqrt(pull @ w)
    t = (r - signs * (problem.means @ w + b)) / spread
    terms = np.log(problem.priors) + scipy.special.log_ndtr(t)
    value = scipy.special.logsumexp(terms)
    weights = np.exp(np.log(problem.priors) - t**2 / 2 - value) / np.sqrt(2 * np.pi)
    slopes = (v - signs[:, None] * problem.means) / spread[:, None]
    slopes -= (t / spread**2)[:, None] * pull
    return float(value), np.append(weights @ slopes, weights @ (-signs / spread))


def _best_bias(w: Array, problem: Gaussians, threat: Threat) -> tuple[float, float]:
    """The bias of least robust error for this w, and that error; (0, ∞) if no bias is a minimum.

    Where the errors of both classes change at the same pace:
    (π₊/σ₊)φ((c₊ − b)/σ₊) = (π₋/σ₋)φ((b − c₋)/σ₋) with c₊ = r − wᵀμ₊, c₋ = −r − wᵀμ₋: a quadratic
    equation in b.
    """
    spread = np.sqrt(problem.covariances @ w @ w)
    centre = np.array([-1.0, 1.0]) * float(reach(w, threat)) - problem.means @ w
    inverse = 1 / spread**2
    quadratic = (inverse[0] - inverse[1]) / 2
    linear = centre[1] * inverse[1] - centre[0] * inverse[0]
    constant = (centre[0] ** 2 * inverse[0] - centre[1] ** 2 * inverse[1]) / 2
    constant += np.log(problem.priors[1] / spread[1]) - np.log(problem.priors[0] / spread[0])
    coefficients = np.array([quadratic, linear, constant])
    if abs(quadratic) * max(1.0, float(np.abs(centre).max())) <= 1e-12 * abs(linear):
        coefficients = coefficients[1:]
    roots = np.roots(coefficients)
    errors = [(np.exp(_log_error(w, float(b), problem, threat)[0]), float(b)) for b in roots.real]
    errors = [pair for pair, b in zip(errors, roots, strict=True) if b.imag == 0]
    error, b = min(errors, default=(np.inf, 0.0))
    return b, float(error)


def best_classifier(
    problem: Gaussians, threat: Threat | PixelThreat, *, starts: int = 8, seed: int = 0
) -> Best:
    """The least robust error of any linear classifier, and the classifier that has it.

    One covariance Σ for both classes, any priors: with t = min_{v ∈ V} ‖Σ^{-1/2}(Δ − v)‖ and
    Δ = (μ₊ − μ₋)/2 the least error is π₊Φ(−t − β) + π₋Φ(−t + β), β = ln(π₊/π₋)/(2t), at
    w = Σ⁻¹(Δ − v), or min(π₊, π₋), that of a constant answer. The problem is convex, and solved to
    a duality gap of 1e-10.

    Two covariances: every classifier that cannot be improved in one class without loss in the other
    is best for some λΣ₊ + (1 − λ)Σ₋ (Anderson and Bahadur 1962), so the search is over λ; then
    L-BFGS over (w, b) from there and from random starts, since where one class is given up the
    problem is not convex. This part finds local minima only.

    Args:
        problem: the classes, with positive definite covariances.
        threat: with single radii.
        starts: random starts, with two covariances.
        seed: of these starts.

    Returns:
        `Best(robust_error, classifier)`.

    Raises:
        InputError: a singular covariance.

    Source: theory L3.

    Example:
        >>> from ntk_awt.theory.linear import symmetric
        >>> found = best_classifier(symmetric([3.0, 4.0]), Ball(2.0))
        >>> print(round(found.robust_error, 6), found.classifier.w)  # Φ(2 − 5)
        0.00135 [1.8 2.4]
        >>> best_classifier(symmetric([3.0, 4.0]), Ball(5.5))
        Best(robust_error=0.5, classifier=None)
    """
    threat = single(threat)
    check_count("starts", starts, low=0)
    first, second = gaussians(problem).covariances
    for matrix in (first, second):
        if np.linalg.eigvalsh(matrix)[0] <= 1e-12 * np.abs(matrix).max():
            raise InputError(
                "covariances", expected="positive definite", got="singular", fix="add a small σ²I"
            )
    half = (problem.means[1] - problem.means[0]) / 2

    def at(weight: float) -> _Direction:
        return _best_direction(half, weight * second + (1 - weight) * first, threat)

    def scored(w: Array) -> tuple[float, Array, float]:
        b, error = _best_bias(w, problem, threat)
        return error, w, b

    if np.array_equal(first, second):
        found = at(0.5)
        candidates = [scored(found.w)] if found.low > 0 else []
    else:
        candidates = _search(problem, threat, half, at, scored, starts, seed)
    error, w, b = min(candidates, key=lambda c: c[0], default=(np.inf, half, 0.0))
    constant = float(problem.priors.min())
    if error >= constant:
        return Best(constant, None)
    return Best(error, LinearClassifier(w, b))


def _search(
    problem: Gaussians,
    threat: Threat,
    half: Array,
    at: Callable[[float], _Direction],
    scored: Callable[[Array], tuple[float, Array, float]],
    starts: int,
    seed: int,
) -> list[tuple[float, Array, float]]:
    """Candidates for two covariances: over λ, then from several starts over (w, b)."""

    def error_at(weight: float) -> float:
        found = at(weight)
        return scored(found.w)[0] if found.low > 0 else np.inf

    grid = np.linspace(0.0, 1.0, 11)
    errors = [error_at(weight) for weight in grid]
    best = int(np.argmin(errors))
    candidates, rng = [], np.random.default_rng(seed)
    directions = [half] if half.any() else []
    if np.isfinite(errors[best]):
        around = (grid[max(best - 1, 0)], grid[min(best + 1, 10)])
        finest: Any = scipy.optimize.minimize_scalar(
            error_at, bounds=around, method="bounded", options={"xatol": 1e-6}
        )
        directions += [at(float(finest.x)).w, at(grid[best]).w]
    directions += list(rng.standard_normal((starts, len(half))))

    def objective(point: Array) -> tuple[float, Array]:
        return _log_error(point[:-1], point[-1], problem, threat)

    for w in directions:
        error, w, b = scored(w / np.linalg.norm(w))
        candidates.append((error, w, b))
        start = np.append(w, b if np.isfinite(error) else -w @ problem.means.mean(0))
        end = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B").x
        if end[:-1].any():
            candidates.append(scored(end[:-1]))
    return candidates


class Phases(NamedTuple):
    """Least robust errors over a grid of radii.

    Attributes:
        epsilon: [m], ε/‖μ‖.
        delta: [k], δ/‖μ‖.
        ordinary: [k, m], of the L2 ball of radius ε.
        strong: [k, m], of the strong threat.
        phase: [k, m]: 2 where both are below that of the better constant answer, 1 where only the
            strong one is, 0 where none is.
    """

    epsilon: Array
    delta: Array
    ordinary: Array
    strong: Array
    phase: np.ndarray


def phase_diagram(
    problem: Gaussians,
    epsilon: Any,
    delta: Any,
    basis: Any = None,
    *,
    on_cell: Callable[[int], None] = lambda done: None,
) -> Phases:
    """Where robust linear classifiers exist, in the ordinary and in the strong sense.

    Args:
        problem: the classes; lengths are in units of ‖μ‖ = ‖μ₊ − μ₋‖/2.
        epsilon: [m], ε/‖μ‖.
        delta: [k], δ/‖μ‖.
        basis: the signal [d, k] or [d]; the direction of μ if not given.
        on_cell: called with the number of optima found, of m + k·m in all.

    Returns:
        `Phases`; each optimum by `best_classifier`.

    Source: theory L3.

    Example:
        >>> from ntk_awt.theory.linear import symmetric
        >>> found = phase_diagram(symmetric([2.0, 0.0]), [0.5, 2.0], [0.25])
        >>> print(found.phase, found.strong.round(4))  # Φ(0.5 − 2)
        [[2 1]] [[0.0668 0.0668]]
    """
    means = gaussians(problem).means
    half = (means[1] - means[0]) / 2
    unit = float(np.linalg.norm(half))
    if not unit:
        raise InputError("means", expected="two different ones", got="equal ones")
    given = {"epsilon": epsilon, "delta": delta}
    epsilon, delta = (np.atleast_1d(numbers(name, value)) for name, value in given.items())
    for name, array in (("epsilon", epsilon), ("delta", delta)):
        if array.ndim != 1 or not array.size:
            raise InputError(name, expected="a list of numbers", got=f"shape {array.shape}")
    cells = 0

    def best(threat: Threat) -> float:
        nonlocal cells
        error = best_classifier(problem, threat).robust_error
        cells += 1
        on_cell(cells)
        return error

    row = [best(Ball(unit * e)) for e in epsilon]
    signal = half if basis is None else basis
    strong = np.array([[best(Strong(unit * e, unit * d, signal)) for e in epsilon] for d in delta])
    ordinary = np.broadcast_to(row, strong.shape).copy()
    below = problem.priors.min() * (1 - 1e-9)
    phase = (ordinary < below).astype(int) + (strong < below)
    return Phases(epsilon, delta, ordinary, strong, phase)


# ---------------------------------------------------------------- L4: what training finds
