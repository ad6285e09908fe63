"""The linear theory against Monte Carlo, brute force and SciPy, and wrong formulas that fail."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import SVC, LinearSVC

from ntk_awt.errors import InputError
from ntk_awt.theory import linear
from ntk_awt.theory.linear import Ball, Gaussians, LinearClassifier, Strong, symmetric
from ntk_awt.threats import class_mean_basis

ORDERS = [1.0, 1.5, 2.0, 3.0, np.inf]


def random_covariance(d: int, rng: np.random.Generator) -> np.ndarray:
    a = rng.normal(size=(d, d))
    return a @ a.T / d + 0.1 * np.eye(d)


def random_threat(kind: int, d: int, rng: np.random.Generator) -> Any:
    """A ball of each order, then strong threats of which δ limits, limits little, or not at all."""
    if kind < len(ORDERS):
        return Ball(rng.uniform(0.05, 0.5), ORDERS[kind])
    basis = rng.normal(size=(d, rng.integers(1, d)))
    return Strong(0.6, [0.1, 0.4, 0.9][kind - len(ORDERS)], basis)


KINDS = range(len(ORDERS) + 3)


def in_set(v: np.ndarray, threat: Any, slack: float = 1e-12) -> bool:
    if isinstance(threat, Ball):
        return bool(np.linalg.norm(v, ord=threat.p) <= threat.epsilon + slack)
    signal = threat.basis @ np.linalg.pinv(threat.basis) @ v
    inside = np.linalg.norm(signal) <= threat.delta + slack
    return bool(inside and np.linalg.norm(v) <= threat.epsilon + slack)


def furthest(w: np.ndarray, threat: Any) -> float:
    """max wᵀv over the set, by SciPy; for the balls with many corners, over the corners."""
    d = len(w)
    if isinstance(threat, Ball) and threat.p == 1:
        return float(threat.epsilon * np.abs(w).max())
    if isinstance(threat, Ball) and np.isinf(threat.p):
        corners = np.stack(np.meshgrid(*[[-1, 1]] * d), -1).reshape(-1, d)
        return float(threat.epsilon * (corners @ w).max())
    if isinstance(threat, Ball):
        power = threat.p
        limits: list[Any] = [
            {
                "type": "ineq",
                "fun": lambda v: 1 - np.sum(np.abs(v / threat.epsilon) ** power),
            }
        ]
    else:
        u = threat.basis
        limits = [
            {"type": "ineq", "fun": lambda v: threat.epsilon**2 - v @ v},
            {"type": "ineq", "fun": lambda v: threat.delta**2 - np.sum((u.T @ v) ** 2)},
        ]
    found = [
        scipy.optimize.minimize(
            lambda v: -w @ v, start, constraints=limits, method="SLSQP", options={"ftol": 1e-14}
        )
        for start in (0.01 * w, 0.01 * np.roll(w, 1))
    ]
    return max(float(w @ f.x) for f in found if in_set(f.x, threat, 1e-7))


# ---------------------------------------------------------------- reach and worst perturbation


def check_reach(reach: Callable[..., Any]) -> None:
    for kind in KINDS:
        rng = np.random.default_rng(kind)
        for _ in range(3):
            w, d = rng.normal(size=4), 4
            threat = random_threat(kind, d, rng)
            # SciPy stops at about 1e-7 of the optimum.
            np.testing.assert_allclose(reach(w, threat), furthest(w, threat), rtol=1e-5)


def test_reach():
    check_reach(linear.reach)


def same_norm(w: Any, threat: Any) -> Any:
    if isinstance(threat, Ball):
        return threat.epsilon * np.linalg.norm(w, ord=threat.p)
    return linear.reach(w, threat)


def strong_as(change: Callable[..., float]) -> Callable[..., Any]:
    """A reach with another formula for the strong threat, of (ε, δ, cos θ, sin θ)."""

    def reach(w: Any, threat: Any) -> Any:
        if isinstance(threat, Ball):
            return linear.reach(w, threat)
        length = np.linalg.norm(w)
        cosine = min(1.0, np.linalg.norm(threat.basis.T @ w) / length)
        return change(threat.epsilon, threat.delta, cosine, np.sqrt(1 - cosine**2)) * length

    return reach


def right(e: float, d: float, c: float, s: float) -> float:
    return e if e * c <= d else d * c + np.sqrt(e**2 - d**2) * s


WRONG_REACH = {
    "the norm itself, not its dual": same_norm,
    "no sin θ": strong_as(lambda e, d, c, s: e if e * c <= d else d * c + np.sqrt(e**2 - d**2)),
    "δ and ε swapped": strong_as(
        lambda e, d, c, s: d if d * c <= e else e * c + np.sqrt(max(d**2 - e**2, 0)) * s
    ),
    "always the corner": strong_as(
        lambda e, d, c, s: d * c + np.sqrt(max(e**2 - d**2, 0)) * s  # also where δ does not limit
    ),
    "w not normalised": lambda w, t: linear.reach(w, t) / np.linalg.norm(w),
}


@pytest.mark.parametrize("wrong", WRONG_REACH)
def test_wrong_reaches_are_rejected(wrong: str):
    check_reach(strong_as(right))
    with pytest.raises(AssertionError):
        check_reach(WRONG_REACH[wrong])


@pytest.mark.parametrize("kind", KINDS)
def test_worst_perturbation_is_in_the_set_and_reaches(kind: int):
    rng = np.random.default_rng(100 + kind)
    for d in (2, 5, 40):
        model = LinearClassifier(rng.normal(size=d), 0.3)
        threat = random_threat(kind, d, rng)
        x, y = rng.normal(size=(6, d)), np.array([1, -1, 1, 1, -1, -1])
        v = linear.worst_perturbation(model, y, threat)
        assert v.shape == (6, d)
        assert all(in_set(row, threat) for row in v)
        moved = model.margins(x, y) - model.margins(x + v, y)
        np.testing.assert_allclose(moved, linear.reach(model.w, threat), rtol=1e-12)
        np.testing.assert_array_equal(linear.worst_perturbation(model, -1, threat), v[1])


def test_worst_perturbation_where_a_part_is_missing():
    """w all signal, all across, with zeros, and a basis of the whole space."""
    w = np.array([0.0, 2.0, 0.0])
    cases = [
        (Strong(1.0, 0.2, [0.0, 1.0, 0.0]), [0.0, 0.2, 0.0]),
        (Strong(1.0, 0.2, [1.0, 0.0, 0.0]), [0.0, 1.0, 0.0]),
        (Strong(1.0, 0.2, np.eye(3)), [0.0, 0.2, 0.0]),
        (Strong(1.0, 0.0, [0.0, 1.0, 0.0]), [0.0, 0.0, 0.0]),
        (Ball(1.0, 1), [0.0, 1.0, 0.0]),
        (Ball(1.0, np.inf), [0.0, 1.0, 0.0]),
        (Ball(0.0, 3.0), [0.0, 0.0, 0.0]),
    ]
    for threat, wanted in cases:
        v = linear.worst_perturbation(LinearClassifier(w), -1, threat)
        np.testing.assert_allclose(v, wanted, atol=1e-15)
        assert linear.reach(w, threat) == pytest.approx(w @ v, abs=1e-15)


def test_reach_over_grids_and_lengths():
    rng = np.random.default_rng(1)
    w, basis = rng.normal(size=5), rng.normal(size=(5, 2))
    epsilon, delta = np.linspace(0, 1, 4), np.linspace(0, 1, 3)[:, None]
    grid = linear.reach(w, Strong(epsilon, delta, basis))
    assert grid.shape == (3, 4)
    for i, d in enumerate(delta[:, 0]):
        for j, e in enumerate(epsilon):
            assert grid[i, j] == linear.reach(w, Strong(e, d, basis))
    np.testing.assert_allclose(linear.reach(7 * w, Strong(epsilon, delta, basis)), 7 * grid)
    for p in ORDERS:
        np.testing.assert_allclose(
            linear.reach(3 * w, Ball(epsilon, p)), 3 * linear.reach(w, Ball(epsilon, p))
        )
    huge = linear.reach(w, Ball(1.0, 1 + 1e-6))  # a dual order of a million
    assert huge == pytest.approx(np.abs(w).max(), rel=1e-5)


# ---------------------------------------------------------------- rates


def random_problem(seed: int) -> tuple[Any, LinearClassifier, Any]:
    """Means, covariances, priors, classifier with a bias, threat; about half are hard."""
    rng = np.random.default_rng(seed)
    d = int(rng.choice([2, 3, 10, 60]))
    first = random_covariance(d, rng)
    second = first if seed % 2 else random_covariance(d, rng)
    mean, prior = rng.normal(size=d) / np.sqrt(d), rng.uniform(0.2, 0.8)
    centre = rng.normal(size=d)
    problem = Gaussians([centre - mean, centre + mean], [first, second], [1 - prior, prior])
    w = 3.0 * (mean + 0.5 * rng.normal(size=d) / np.sqrt(d))
    model = LinearClassifier(w, -w @ centre + 0.1 * rng.normal())
    return problem, model, random_threat(seed % len(KINDS), d, rng)


@functools.cache
def sampled_margins(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Margins of fresh points, made whole with Cholesky factors, and their labels."""
    problem, model, _ = random_problem(seed)
    rng = np.random.default_rng(1000 + seed)
    y = np.where(rng.uniform(size=n) < problem.priors[1], 1, -1)
    x = np.empty((n, problem.means.shape[1]))
    for index, label in enumerate((-1, 1)):
        rows = y == label
        factor = np.linalg.cholesky(problem.covariances[index])
        x[rows] = problem.means[index] + rng.normal(size=(rows.sum(), len(factor))) @ factor.T
    return model.margins(x, y), y


def check_rates(rates: Callable[..., Any], seeds: Any = range(16), n: int = 40_000) -> None:
    """Every rate inside its 99.9 % binomial interval, overall and in each class."""
    for seed in seeds:
        problem, model, threat = random_problem(seed)
        margins, y = sampled_margins(seed, n)
        shift = model.w @ linear.worst_perturbation(model, 1, threat)  # the same loss for both y
        wrong, turned = margins <= 0, (margins > 0) & (margins + shift <= 0)
        found = rates(model, problem, threat)
        events = {"clean": wrong, "adversarial": turned, "robust": wrong | turned}
        for name, event in events.items():
            low, high = scipy.stats.binom.interval(0.999, n, getattr(found, name))
            assert low <= event.sum() <= high, (seed, name)
            for index, label in enumerate((-1, 1)):
                probability = getattr(found, f"{name}_by_class")[index]
                of_class = int((y == label).sum())
                low, high = scipy.stats.binom.interval(0.9999, of_class, probability)
                assert low <= event[y == label].sum() <= high, (seed, name, label)


def test_rates():
    check_rates(linear.rates)


def rates_with(reach: Callable[..., Any], **swap: Any) -> Callable[..., Any]:
    """The formula written again, with another reach or another treatment of w."""

    def rates(model: Any, problem: Any, threat: Any) -> Any:
        r = float(reach(model.w, threat))
        parts = []
        for index, y in enumerate((-1, 1)):
            mean = y * (model.w @ problem.means[index] + model.b)
            spread = np.sqrt(
                model.w @ problem.covariances[swap.get("classes", 1) * index] @ model.w
            )
            clean, robust = scipy.stats.norm.cdf([-mean / spread, (r - mean) / spread])
            parts.append((clean, robust - clean, robust))
        by_class = np.array(parts).T
        priors = problem.priors[:: swap.get("order", 1)]
        return linear.Rates(*(by_class @ priors), *by_class)

    return rates


def test_wrong_rates_are_rejected():
    check_rates(rates_with(linear.reach))
    wrong_ones = [
        *(rates_with(reach) for reach in WRONG_REACH.values()),
        rates_with(linear.reach, order=-1),  # the other class's prior
        rates_with(linear.reach, classes=0),  # the other class's covariance
    ]
    for wrong in wrong_ones:
        with pytest.raises(AssertionError):
            check_rates(wrong)


def test_rates_over_a_grid_of_radii():
    problem, model, _ = random_problem(4)
    d = len(model.w)
    epsilon, delta = np.linspace(0, 2, 5), np.linspace(0, 1, 3)[:, None]
    basis = np.eye(d)[:, :1]
    grid = linear.rates(model, problem, Strong(epsilon, delta, basis))
    assert grid.robust.shape == (3, 5)
    assert grid.robust_by_class.shape == (3, 5, 2)
    for i in range(3):
        for j in range(5):
            one = linear.rates(model, problem, Strong(epsilon[j], delta[i, 0], basis))
            assert grid.robust[i, j] == pytest.approx(one.robust, rel=1e-14)
            assert grid.adversarial[i, j] == pytest.approx(one.adversarial, rel=1e-12)
    assert np.all(np.diff(grid.robust, axis=0) >= 0)
    assert np.all(np.diff(grid.robust, axis=1) >= 0)
    np.testing.assert_allclose(grid.clean + grid.adversarial, grid.robust, rtol=1e-13)
    longer = LinearClassifier(100 * model.w, 100 * model.b)
    scaled = linear.rates(longer, problem, Strong(epsilon, delta, basis))
    np.testing.assert_allclose(scaled.robust, grid.robust, rtol=1e-12)


def test_rates_far_out_and_without_spread():
    """Small differences keep their digits; a margin without spread is a step."""
    far = linear.rates(LinearClassifier([1.0]), symmetric([20.0]), Ball(0.5))
    wanted = scipy.stats.norm.sf(19.5) - scipy.stats.norm.sf(20.0)
    assert far.adversarial == pytest.approx(wanted, rel=1e-12)
    wrong_side = linear.rates(LinearClassifier([-1.0]), symmetric([20.0]), Ball(0.5))
    assert wrong_side.adversarial == pytest.approx(
        scipy.stats.norm.sf(20.0) - scipy.stats.norm.sf(20.5), rel=1e-12
    )
    flat = symmetric([1.0, 0.0], np.diag([0.0, 1.0]))
    step = linear.rates(LinearClassifier([1.0, 0.0]), flat, Ball([0.0, 0.5, 1.0, 1.5]))
    np.testing.assert_array_equal(step.robust, [0, 0, 1, 1])
    assert step.clean == 0


def test_simulate_counts_what_rates_say():
    for seed in range(8):
        problem, model, threat = random_problem(seed)
        counts = linear.simulate(model, problem, threat, 30_000, np.random.default_rng(seed))
        found = linear.rates(model, problem, threat)
        for name in ("clean", "adversarial", "robust"):
            low, high = linear.binomial_interval(getattr(found, name), counts.n)
            assert low <= getattr(counts, name) <= high
        assert counts.clean + counts.adversarial == counts.robust
    problem, model, threat = random_problem(0)
    blocks = linear.simulate(model, problem, threat, 100_001, np.random.default_rng(0))
    assert blocks.n == 100_001


def test_binomial_interval_covers():
    low, high = linear.binomial_interval(0.03, 1000)
    inside = scipy.stats.binom.cdf(high, 1000, 0.03) - scipy.stats.binom.cdf(low - 1, 1000, 0.03)
    assert 0.999 <= inside <= 0.9995
    assert linear.binomial_interval(0.0, 10) == (0, 0)


# ---------------------------------------------------------------- certified radius


SETTINGS = {
    "p = 1": {"p": 1.0},
    "p = 2": {},
    "p = 3": {"p": 3.0},
    "p = ∞": {"p": np.inf},
    "δ fixed": {"delta": 0.2},
    "δ = 0": {"delta": 0.0},
    "δ in parts of ε": {"ratio": 0.3},
    "δ = 2ε": {"ratio": 2.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_certified_radius_is_where_the_reach_meets_the_margin(setting: str):
    rng = np.random.default_rng(5)
    model, options = LinearClassifier(rng.normal(size=6), 0.4), SETTINGS[setting]
    x, y = rng.normal(size=(20, 6)), rng.choice([-1, 1], 20)
    basis = rng.normal(size=(6, 2))
    known = {"basis": basis} if "delta" in options or "ratio" in options else {}
    found = linear.certified_radius(model, x, y, **known, **options)

    def threat(epsilon: float) -> Any:
        if not known:
            return Ball(epsilon, options.get("p", 2.0))
        return Strong(epsilon, options.get("delta", options.get("ratio", 0) * epsilon), basis)

    for margin, radius in zip(model.margins(x, y), found, strict=True):
        if margin <= 0:
            assert radius == 0
            continue
        crossing = scipy.optimize.brentq(
            lambda e, m=margin: float(linear.reach(model.w, threat(e))) - m, 0, 1e3, xtol=1e-13
        )
        assert radius == pytest.approx(crossing, rel=1e-9)


def test_certified_radius_may_be_infinite():
    """All of w is signal, so no ε lowers the margin by more than δ‖w‖."""
    x, y = np.array([[0.05, 9.0], [0.5, 9.0], [-1.0, 0.0]]), [1, 1, 1]
    model = LinearClassifier([2.0, 0.0])
    found = linear.certified_radius(model, x, y, basis=[1.0, 0.0], delta=0.1)
    np.testing.assert_allclose(found, [0.05, np.inf, 0.0])
    found = linear.certified_radius(model, x, y, basis=[1.0, 0.0], ratio=0.0)
    np.testing.assert_allclose(found, [np.inf, np.inf, 0.0])


# ---------------------------------------------------------------- estimators


@pytest.mark.parametrize(
    "estimator",
    [
        SVC(kernel="linear"),
        LinearSVC(),
        LogisticRegression(),
        LinearDiscriminantAnalysis(),
        Ridge(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_estimators_give_the_same_decisions(estimator: Any):
    rng = np.random.default_rng(2)
    y = np.where(np.arange(40) % 2, 1, -1)
    x = rng.normal(size=(40, 3)) + 0.5 * y[:, None]
    fitted = estimator.fit(x, y)
    fresh = rng.normal(size=(100, 3))
    model = linear.classifier_of(fitted)
    np.testing.assert_array_equal(model.margins(fresh, 1) > 0, np.sign(fitted.predict(fresh)) > 0)
    problem = symmetric([0.5] * 3)
    assert linear.rates(fitted, problem, Ball(0.1)).robust == (
        linear.rates(model, problem, Ball(0.1)).robust
    )


# ---------------------------------------------------------------- L3


@pytest.mark.parametrize("mean_norm", [0.5, 2.0])
def test_least_error_of_isotropic_classes(mean_norm: float):
    mean = mean_norm * np.array([0.6, 0.0, 0.8])
    for sigma in (0.5, 2.0):
        problem = symmetric(mean, sigma**2)
        for epsilon, delta in [
            (0.0, 0.0),
            (0.3, 0.1),
            (1.0, 0.2),
            (1.0, 3.0),
            (3.0, 0.4),
            (3, 2.5),
        ]:
            strong = linear.best_classifier(problem, Strong(epsilon, delta, mean)).robust_error
            ordinary = linear.best_classifier(problem, Ball(epsilon)).robust_error
            formula = linear.best_isotropic_error
            assert strong == pytest.approx(formula(mean_norm, epsilon, delta, sigma), rel=1e-9)
            assert ordinary == pytest.approx(formula(mean_norm, epsilon, sigma=sigma), rel=1e-9)


def test_a_bias_beats_the_formula_without_it():
    """Where ε > ‖μ‖ the error Φ((ε − ‖μ‖)/σ) of w = μ₀, b = 0 is above a constant answer's."""
    problem, threat = symmetric([1.0, 0.0]), Ball(1.5)
    without = linear.rates(LinearClassifier([1.0, 0.0]), problem, threat).robust
    assert without == pytest.approx(scipy.stats.norm.cdf(0.5))
    with_bias = linear.rates(LinearClassifier([1.0, 0.0], 50.0), problem, threat).robust
    assert with_bias == pytest.approx(0.5)
    assert linear.best_isotropic_error(1.0, 1.5) == 0.5 < without


def brute_force(problem: Any, threat: Any) -> float:
    """The least robust error over a grid of directions in the plane and of biases, refined."""

    def error(angle: float, b: Any) -> Any:
        w = np.array([np.cos(angle), np.sin(angle)])
        r = float(linear.reach(w, threat))
        total = 0.0
        for index, y in enumerate((-1, 1)):
            spread = np.sqrt(w @ problem.covariances[index] @ w)
            gap = r - y * (w @ problem.means[index] + b)
            total = total + problem.priors[index] * scipy.special.ndtr(gap / spread)
        return total

    b = np.linspace(-8, 8, 161)
    errors = [error(angle, b) for angle in ANGLES]
    points = [(e.min(), a, b[e.argmin()]) for a, e in zip(ANGLES, errors, strict=True)]
    best = float(problem.priors.min())
    for _, *start in sorted(points)[:5]:
        options = {"xatol": 1e-10, "fatol": 1e-13, "maxiter": 1000}
        found = scipy.optimize.minimize(
            lambda point: error(*point), start, method="Nelder-Mead", options=options
        )
        best = min(best, float(found.fun))
    return best


ANGLES = np.linspace(0, 2 * np.pi, 361)

PLANE = {
    "one covariance": ([[2.0, 0.6], [0.6, 0.5]], [[2.0, 0.6], [0.6, 0.5]], 0.3),
    "two covariances": ([[2.0, 0.6], [0.6, 0.5]], [[0.4, -0.2], [-0.2, 1.0]], 0.5),
    "one class wide": ([[9.0, 0.0], [0.0, 9.0]], [[0.1, 0.0], [0.0, 0.2]], 0.4),
}


def check_least_error(best: Callable[..., Any], problem: Any, threat: Any) -> None:
    """What brute force finds, and attained."""
    found = best(problem, threat)
    assert found.robust_error == pytest.approx(brute_force(problem, threat), rel=1e-6)
    if found.classifier is not None:
        attained = linear.rates(found.classifier, problem, threat).robust
        assert found.robust_error == pytest.approx(float(attained), rel=1e-9)


THREATS = {
    "L1": Ball(0.4, 1),
    "L1.5": Ball(0.4, 1.5),
    "L2": Ball(0.4),
    "L3": Ball(0.4, 3.0),
    "L∞": Ball(0.4, np.inf),
    "strong": Strong(1.2, 0.3, [1.0, 0.2]),
    "strong, far off": Strong(0.8, 0.1, [0.1, 1.0]),
    "too strong": Ball(5.0),
}


@pytest.mark.parametrize("case", PLANE)
def test_least_error_against_brute_force(case: str):
    first, second, prior = PLANE[case]
    problem = Gaussians([[-1.0, 0.3], [1.2, 0.5]], [first, second], [1 - prior, prior])
    for threat in THREATS.values():
        check_least_error(linear.best_classifier, problem, threat)


def test_wrong_least_errors_are_rejected():
    """The best classifier without an adversary, and the best one without a bias."""
    first, _, prior = PLANE["one covariance"]
    problem = Gaussians([[-1.0, 0.3], [1.2, 0.5]], first, [1 - prior, prior])

    def natural(problem: Any, threat: Any) -> Any:
        model = linear.best_classifier(problem, Ball(0.0)).classifier
        return linear.Best(float(linear.rates(model, problem, threat).robust), model)

    def unbiased(problem: Any, threat: Any) -> Any:
        model = linear.best_classifier(problem, threat).classifier
        assert model is not None
        centre = LinearClassifier(model.w, -model.w @ problem.means.mean(0))
        return linear.Best(float(linear.rates(centre, problem, threat).robust), centre)

    for wrong, threat in [(natural, THREATS["L∞"]), (unbiased, THREATS["L2"])]:
        with pytest.raises(AssertionError):
            check_least_error(wrong, problem, threat)


@pytest.mark.parametrize("kind", KINDS)
def test_no_random_classifier_is_better(kind: int):
    rng = np.random.default_rng(kind)
    d = 8
    first, second = random_covariance(d, rng), random_covariance(d, rng)
    mean = rng.normal(size=d)
    for covariance in (first, [first, second]):
        problem = Gaussians([-mean, mean], covariance, [0.35, 0.65])
        threat = random_threat(kind, d, rng)
        best = linear.best_classifier(problem, threat)
        tried = [rng.normal(size=d) for _ in range(100)]
        if best.classifier is not None:
            near = best.classifier.w / np.linalg.norm(best.classifier.w)
            tried += [near + s * rng.normal(size=d) for s in (1e-3, 1e-2, 0.1) for _ in range(100)]
        for w in tried:
            for b in rng.normal(size=3):
                error = linear.rates(LinearClassifier(w, b), problem, threat).robust
                assert error >= best.robust_error * (1 - 1e-9)


def test_phase_diagram():
    epsilon, delta = np.array([0.4, 0.9, 1.2, 2.0]), np.array([0.2, 0.8, 1.1])
    seen: list[int] = []
    found = linear.phase_diagram(symmetric([3.0, 0.0], 4.0), epsilon, delta, on_cell=seen.append)
    assert seen == list(range(1, 17))
    # Both exist where ε < 1; the strong one alone where δ < 1 < ε.
    np.testing.assert_array_equal(found.phase, [[2, 2, 1, 1], [2, 2, 1, 1], [2, 2, 0, 0]])
    formula = linear.best_isotropic_error(3.0, 3 * epsilon, 3 * delta[:, None], 2.0)
    np.testing.assert_allclose(found.strong, formula, rtol=1e-9)
    wanted = np.broadcast_to(linear.best_isotropic_error(3.0, 3 * epsilon, sigma=2.0), (3, 4))
    np.testing.assert_allclose(found.ordinary, wanted, rtol=1e-9)
    other = linear.phase_diagram(symmetric([3.0, 0.0], 4.0), [2.0], [0.2], basis=[0.0, 1.0])
    assert other.phase.tolist() == [[0]]  # a signal that is none


# ---------------------------------------------------------------- L4: predicted angles


def training_set(n: int, d: int, mean_norm: float, sigma: float, rng: Any) -> tuple[Any, Any]:
    y = np.repeat([-1.0, 1.0], n // 2)
    x = sigma * rng.normal(size=(n, d))
    x[:, 0] += mean_norm * y
    return x, y


def ridge(penalty: float) -> Callable[..., Any]:
    return lambda x, y: Ridge(penalty, fit_intercept=False, solver="svd").fit(x, y).coef_.ravel()


def svm(c: float, loss: str) -> Callable[..., Any]:
    return lambda x, y: linear.classifier_of(linear.train_svm(x, y, c=c, loss=loss)).w


LEARNERS: dict[str, tuple[Callable[..., Any], Callable[..., float]]] = {
    "mean difference": (lambda x, y: y @ x, linear.mean_difference_cosine),
    "least squares": (ridge(1e-9), linear.ridge_cosine),
    "ridge": (ridge(300.0), lambda *a: linear.ridge_cosine(*a, penalty=300.0)),
    "soft margin": (svm(1e-3, "hinge"), lambda *a: linear.svm_cosine(*a, c=1e-3)),
    "squared hinge": (
        svm(0.003, "squared_hinge"),
        lambda *a: linear.svm_cosine(*a, c=0.003, loss="squared_hinge"),
    ),
    "hard margin": (svm(1e3, "hinge"), linear.hard_margin_cosine),
}


def check_angle(learner: str, predicted: Callable[..., float]) -> None:
    """The mean over ten training sets, within 4 standard errors and 2/d of finite size."""
    train, _ = LEARNERS[learner]
    for n, d, mean_norm, sigma in [(240, 120, 3.0, 2.0), (120, 240, 2.0, 1.0)]:
        rng = np.random.default_rng(8)
        found = []
        for _ in range(10):
            w = train(*training_set(n, d, mean_norm, sigma, rng))
            found.append(w[0] / np.linalg.norm(w))
        error = np.std(found, ddof=1) / np.sqrt(10)
        assert abs(np.mean(found) - predicted(n, d, mean_norm, sigma)) <= 4 * error + 2 / d


@pytest.mark.parametrize("learner", LEARNERS)
def test_predicted_angle(learner: str):
    check_angle(learner, LEARNERS[learner][1])


WRONG_ANGLES = {
    "n and d swapped": (
        "mean difference",
        lambda n, d, m, s: linear.mean_difference_cosine(d, n, m, s),
    ),
    "σ forgotten": ("mean difference", lambda n, d, m, s: linear.mean_difference_cosine(n, d, m)),
    "no interpolation": ("least squares", linear.mean_difference_cosine),
    "the other penalty": ("ridge", lambda *a: linear.ridge_cosine(*a, penalty=3.0)),
    "least squares for SVM": ("soft margin", linear.ridge_cosine),
    "C without n": ("soft margin", lambda *a: linear.svm_cosine(*a, c=1e-3 * 200)),
    "least squares for the margin": ("hard margin", linear.ridge_cosine),
}


@pytest.mark.parametrize("wrong", WRONG_ANGLES)
def test_wrong_angles_are_rejected(wrong: str):
    with pytest.raises(AssertionError):
        check_angle(*WRONG_ANGLES[wrong])


@pytest.mark.parametrize(("n", "d"), [(100, 400), (400, 100), (200, 260)])
def test_angles_meet_in_their_limits(n: int, d: int):
    plain = linear.mean_difference_cosine(n, d, 1.5, 0.8)
    assert linear.ridge_cosine(n, d, 1.5, 0.8, penalty=1e9) == pytest.approx(plain, rel=1e-5)
    small = linear.ridge_cosine(n, d, 1.5, 0.8, penalty=1e-9)
    assert small == pytest.approx(linear.ridge_cosine(n, d, 1.5, 0.8), abs=1e-3)
    for loss in ("hinge", "squared_hinge"):
        tiny = linear.svm_cosine(n, d, 1.5, 0.8, c=1e-9, loss=loss)
        assert tiny == pytest.approx(plain, rel=1e-5)
        if d >= n:  # separable
            hard = linear.hard_margin_cosine(n, d, 1.5, 0.8)
            assert linear.svm_cosine(n, d, 1.5, 0.8, c=1e6, loss=loss) == pytest.approx(
                hard, rel=1e-5
            )
    # Only lengths in units of σ matter, and C in units of 1/σ².
    one, other = (linear.svm_cosine(n, d, 1.5 * s, s, c=0.1 / s**2) for s in (1.0, 7.0))
    assert one == pytest.approx(other, rel=1e-9)


def gaussian_mean(f: Callable[..., Any], mean: float, spread: float) -> float:
    """E f(V), V ~ N(mean, spread²), by a fine sum."""
    g = np.linspace(-12, 12, 4001)
    return float(np.sum(f(mean + spread * g) * scipy.stats.norm.pdf(g)) * (g[1] - g[0]))


@pytest.mark.parametrize("loss", linear.LOSSES)
def test_svm_angle_solves_its_scalar_problem(loss: str):
    """min over (ρ, q) of max over τ, by brute force on a sum for the expectation."""
    n, d, mu, c = 100, 150, 1.2, 0.05
    gamma, penalty = d / n, 1 / (c * n)

    def envelope(v: Any, tau: float) -> Any:
        if loss == "squared_hinge":
            return np.maximum(1 - v, 0) ** 2 / (1 + 2 * tau)
        lack = np.maximum(1 - v, 0)
        return np.where(lack > tau, lack - tau / 2, lack**2 / (2 * tau))

    def value(point: Any) -> float:
        rho, q = np.exp(point)

        def inner(log_tau: float) -> float:
            tau = np.exp(log_tau)
            mean = gaussian_mean(lambda v: envelope(v, tau), rho * mu, np.hypot(rho, q))
            return -(mean - gamma * q**2 / (2 * tau))

        best: Any = scipy.optimize.minimize_scalar(inner, bounds=(-8, 8), method="bounded")
        return -best.fun + penalty * (rho**2 + q**2) / 2

    found = scipy.optimize.minimize(value, [-1.0, -1.0], method="Nelder-Mead")
    rho, q = np.exp(found.x)
    assert linear.svm_cosine(n, d, mu, c=c, loss=loss) == pytest.approx(
        rho / np.hypot(rho, q), abs=2e-4
    )


def test_hard_margin_needs_separable_classes():
    # No signal: separable below n/d = 2 only (Cover 1965).
    assert linear.hard_margin_cosine(199, 100, 1e-3) < 0.05
    with pytest.raises(InputError, match="classes: expected separable ones, got margin"):
        linear.hard_margin_cosine(201, 100, 1e-3)


# ---------------------------------------------------------------- L4, L5: trained classifiers


def objective(kind: str, model: Any, x: Any, y: Any, c: float, **known: Any) -> float:
    """What each SVM minimises, as its definition says; y = ±1."""
    w, extra, size = model.w, 0.0, model.w @ model.w
    if kind == "penalised":
        u = known["basis"]
        inside = u @ np.linalg.pinv(u) @ w
        size = inside @ inside + known["penalty"] * np.sum((w - inside) ** 2)
    if kind == "robust":
        extra = float(linear.reach(w, known["threat"]))
    lack = np.maximum(1 - y * (x @ w + model.b) + extra, 0)
    return float(size / 2 + c * np.sum(lack))


def check_minimum(kind: str, model: Any, x: Any, y: Any, c: float, **known: Any) -> None:
    """No small step improves: enough, since the objectives are convex."""
    rng = np.random.default_rng(0)
    value = objective(kind, model, x, y, c, **known)
    inside = known.get("inside", np.eye(len(model.w)))
    for scale in (1e-4, 1e-3, 1e-2, 0.1, 1.0):
        for _ in range(300):
            step = scale * np.linalg.norm(model.w) * (inside @ rng.normal(size=len(model.w)))
            sparse = step * rng.integers(0, 2, len(step))
            for dw in (step, sparse if "inside" not in known else step, -0.9 * scale * model.w):
                other = LinearClassifier(model.w + dw, model.b + scale * rng.normal())
                assert objective(kind, other, x, y, c, **known) >= value * (1 - 1e-3)


def overlapping(seed: int = 3) -> tuple[Any, Any]:
    return training_set(60, 4, 1.0, 1.0, np.random.default_rng(seed))


BASIS = np.array([[1.0], [0.3], [0.0], [0.0]])
ROBUST = {
    "L1": Ball(0.3, 1),
    "L2": Ball(0.3),
    "L∞": Ball(0.2, np.inf),
    "strong": Strong(1.0, 0.1, BASIS),
    "strong, two directions": Strong(0.5, 0.2, np.eye(4)[:, :2]),
    "nothing": Ball(0.0),
}


@pytest.mark.parametrize("name", ROBUST)
def test_robust_svm_minimises_its_objective(name: str):
    x, y = overlapping()
    for c in (0.05, 2.0):
        model = linear.robust_svm(x, y, ROBUST[name], c=c)
        check_minimum("robust", model, x, y, c, threat=ROBUST[name])


@pytest.mark.parametrize("seed", range(12))
def test_robust_svm_is_better_than_no_classifier_or_says_so(seed: int):
    """Also where the least value is that of w = 0, which rounding can seem to undercut."""
    rng = np.random.default_rng(seed)
    d, c = int(rng.integers(2, 40)), float(10 ** rng.uniform(-9, 1))
    x, y = training_set(2 * d, d, 2.0, 1.0, rng)
    shown = np.concatenate(
        [np.flatnonzero(y < 0)[: int(rng.integers(1, d + 1))], np.flatnonzero(y > 0)]
    )
    x, y = x[shown], y[shown]
    nothing = 2 * c * min(np.sum(y > 0), np.sum(y < 0))
    easy = linear.robust_svm(x, y, Strong(0.1, 0.05, np.eye(d)[0]), c=c)
    assert objective("robust", easy, x, y, c, threat=Strong(0.1, 0.05, np.eye(d)[0])) < nothing
    hard = Strong(4.0, 3.9, np.eye(d)[0])
    with pytest.raises(InputError, match="expected classes that it can tell apart"):
        linear.robust_svm(x, y, hard, c=c)
    for _ in range(300):
        w = rng.normal(size=d) * 10 ** rng.uniform(-6, 0)
        other = LinearClassifier(w, float(np.sign(y.sum()) or 1) + rng.normal() * np.linalg.norm(w))
        assert objective("robust", other, x, y, c, threat=hard) > nothing


def test_penalised_and_signal_svms_minimise_their_objectives():
    x, y = overlapping()
    model = linear.penalised_svm(x, y, BASIS, penalty=20.0, c=0.5)
    check_minimum("penalised", model, x, y, 0.5, basis=BASIS, penalty=20.0)
    signal = linear.signal_svm(x, y, BASIS, c=0.5)
    onto = BASIS @ np.linalg.pinv(BASIS)
    np.testing.assert_allclose(onto @ signal.w, signal.w, atol=1e-12)
    check_minimum("plain", signal, x, y, 0.5, inside=onto)
    plain = linear.classifier_of(linear.train_svm(x, y, c=0.5))
    check_minimum("plain", plain, x, y, 0.5)
    same = linear.penalised_svm(x, y, BASIS, penalty=1.0, c=0.5)
    np.testing.assert_allclose(same.w, plain.w, atol=1e-3)
    stiff = linear.penalised_svm(x, y, BASIS, penalty=1e8, c=0.5)
    np.testing.assert_allclose(stiff.w, signal.w, atol=1e-3)


def test_wrong_minima_are_rejected():
    x, y = overlapping()
    plain = linear.classifier_of(linear.train_svm(x, y, c=2.0))
    known = {"basis": BASIS, "penalty": 20.0}
    shifted = linear.robust_svm(x, y, ROBUST["L2"], c=2.0)
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("robust", plain, {"threat": ROBUST["strong"]}),
        ("robust", shifted, {"threat": ROBUST["strong"]}),
        ("robust", dataclasses.replace(shifted, b=shifted.b + 0.3), {"threat": ROBUST["L2"]}),
        ("penalised", plain, known),
        ("plain", linear.signal_svm(x, y, BASIS, c=2.0), {}),
    ]
    for kind, model, more in cases:
        with pytest.raises(AssertionError):
            check_minimum(kind, model, x, y, 2.0, **more)


def test_labels_of_any_two_kinds():
    x, y = overlapping()
    for other in (np.where(y > 0, 7, 3), np.where(y > 0, "b", "a")):
        for train in (linear.signal_svm, linear.penalised_svm):
            np.testing.assert_array_equal(train(x, other, BASIS).w, train(x, y, BASIS).w)
        one, two = (linear.robust_svm(x, labels, ROBUST["L2"]) for labels in (other, y))
        np.testing.assert_array_equal(one.w, two.w)


def test_svm_experiment():
    cases = [
        linear.SvmCase(n=60, d=40, mean_norm=2.0, epsilon=3.0, delta=0.5, c=0.01),
        linear.SvmCase(40, 80, 2.0, 1.0, 0.5, 1.0, "squared_hinge"),
    ]
    seen: list[int] = []
    rows = linear.svm_experiment(cases, [0, 1, 2], samples=20_000, on_row=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert [(row["d"], row["seed"]) for row in rows] == [(40, s) for s in range(3)] + [
        (80, s) for s in range(3)
    ]
    for row in rows:
        for threat in ("ordinary", "strong"):
            for kind in ("clean", "adversarial", "robust"):
                low, high = row[f"{threat}_{kind}_interval"]
                assert low <= row[f"{threat}_{kind}_count"] <= high
                assert high - low < 0.03 * row["samples"]
        # By hand, from the angle: the margin is N(‖μ‖cos θ, 1) for a unit w without bias.
        assert abs(row["cosine"] - row["predicted_cosine"]) < 0.2
    assert len({row["cosine"] for row in rows}) == 6
    in_two = linear.svm_experiment(cases[:1], [0, 1], samples=20_000, n_jobs=2)
    assert in_two == rows[:2]


def test_knowledge_makes_robust_where_nothing_else_does():
    """δ < ‖μ‖ < ε: none is robust, the plain SVM is not strong-robust, a knowing one is."""
    d, mean_norm, epsilon, delta = 100, 3.0, 4.0, 1.0
    assert linear.best_isotropic_error(mean_norm, epsilon) == 0.5
    least = float(linear.best_isotropic_error(mean_norm, epsilon, delta))
    cases = [linear.SvmCase(n, d, mean_norm, epsilon, delta) for n in (50, 200)]
    rows = linear.knowledge_experiment(cases, [0, 1])
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        assert row["ordinary_robust"] >= 0.5 - 1e-12
        assert row["strong_robust"] >= least - 1e-12
        if row["method"] == "plain":
            assert row["strong_robust"] > 0.4
        else:
            assert row["strong_robust"] < 0.1
        if row["method"] == "signal":
            assert row["cosine"] == pytest.approx(1.0, abs=1e-6)
        # The robust SVM leaves the signal where few support vectors have a mean far off it.
        assert row["method"] != "robust" or row["cosine"] > 0.99


def test_real_data():
    """Digits 3 and 7 on the class means' direction: knowledge costs little and gives much."""
    digits: Any = load_digits()
    images, target = digits.images / 16.0, digits.target
    keep = np.isin(target, [3, 7])
    x, y = images[keep], target[keep]
    basis = class_mean_basis(x[:200], y[:200])
    threat = Strong(1.5, 0.2, basis)
    rows = linear.knowledge_case(x[:200], y[:200], x[200:], y[200:], threat, c=1.0)
    by_method = {row["method"]: row for row in rows}
    assert list(by_method) == list(linear.METHODS)
    for row in rows:
        assert row["ordinary_accuracy"] <= row["strong_accuracy"] <= row["natural_accuracy"]
        assert row["natural_accuracy"] > 0.9
    assert by_method["signal"]["signal_share"] == pytest.approx(1)
    assert by_method["plain"]["signal_share"] < 0.9
    for method in ("signal", "robust"):
        assert by_method[method]["strong_accuracy"] > by_method["plain"]["strong_accuracy"] + 0.2

    # By hand for one: margins above the reach.
    flat = x.reshape(len(x), -1)
    model = linear.robust_svm(flat[:200], y[:200], threat, c=1.0)
    signs = np.where(y[200:] == 7, 1, -1)
    v = linear.worst_perturbation(model, signs, threat)
    robust = np.mean(model.margins(flat[200:] + v, signs) > 0)
    assert by_method["robust"]["strong_accuracy"] == robust


def test_discriminants():
    """The span of Σ⁻¹ times the differences of the means, which the means alone do not have."""
    rng = np.random.default_rng(6)
    y = rng.integers(0, 3, 20_000)
    means, spread = 2.0 * rng.normal(size=(3, 5)), np.array([1.0, 2.0, 0.5, 1.0, 3.0])
    x = means[y] + rng.normal(size=(len(y), 5)) * spread
    wanted = np.linalg.qr(((means[1:] - means[0]) / spread**2).T)[0]

    def angles(u: np.ndarray) -> np.ndarray:
        return np.linalg.svd(u.T @ wanted, compute_uv=False)

    u = linear.discriminant_basis(x, y)
    assert u.shape == (5, 2)
    assert angles(u).min() > 0.999
    assert angles(class_mean_basis(x, y)).min() < 0.97


# ---------------------------------------------------------------- bad input

TWO = np.array([[-1.0, 0.0], [1.0, 0.0]])
MODEL = LinearClassifier([1.0, 1.0])
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "zero w": (lambda: LinearClassifier([0.0, 0.0]), "classifier w: expected a vector that is not"),
    "matrix w": (lambda: LinearClassifier(np.ones((2, 2))), r"classifier: expected w \[d\]"),
    "NaN b": (lambda: LinearClassifier([1.0], np.nan), "classifier b: expected finite"),
    "no estimator": (
        lambda: linear.classifier_of("svm"),
        "expected a LinearClassifier or a fitted",
    ),
    "not fitted": (lambda: linear.classifier_of(SVC(kernel="linear")), "got SVC"),
    "three classes": (
        lambda: linear.classifier_of(LinearSVC().fit(np.eye(3), [0, 1, 2])),
        "expected two classes, got coef_",
    ),
    "one mean": (lambda: Gaussians([[1.0]]), r"means: expected shape \[2, d\]"),
    "covariance shape": (lambda: Gaussians(TWO, np.ones(2)), "covariances: expected a number or"),
    "not symmetric": (lambda: Gaussians(TWO, [[1, 2], [0, 1]]), "symmetric positive"),
    "not positive": (lambda: Gaussians(TWO, [[1, 2], [2, 1]]), "symmetric positive"),
    "negative variance": (lambda: Gaussians(TWO, -1.0), "variance: expected a number in"),
    "priors": (lambda: Gaussians(TWO, 1.0, [0.5, 0.6]), "priors: expected two positive"),
    "zero prior": (lambda: Gaussians(TWO, 1.0, [0.0, 1.0]), "priors: expected two positive"),
    "negative ε": (lambda: Ball(-0.1), "epsilon: expected numbers in"),
    "infinite ε": (lambda: Ball([0.1, np.inf]), "epsilon: expected finite"),
    "p < 1": (lambda: Ball(0.1, 0.5), r"p: expected a number in \[1, ∞\]"),
    "NaN p": (lambda: Ball(0.1, np.nan), r"p: expected a number in \[1, ∞\]"),
    "negative δ": (lambda: Strong(0.1, -0.1, [1.0]), "delta: expected numbers in"),
    "dependent basis": (lambda: Strong(1, 1, np.ones((3, 2))), "linearly independent"),
    "another d": (lambda: linear.reach([1.0, 2.0], Strong(1, 1, [1.0])), "basis: expected 2 rows"),
    "another problem": (
        lambda: linear.rates(MODEL, symmetric([1.0]), Ball(1.0)),
        "classifier w: expected 1 entries, got 2",
    ),
    "a grid for one": (
        lambda: linear.worst_perturbation(MODEL, 1, Ball([1.0, 2.0])),
        "epsilon: expected one number",
    ),
    "a grid of δ for one": (
        lambda: linear.best_classifier(symmetric([1.0, 0.0]), Strong(1, [0.1, 0.2], [1.0, 0.0])),
        "delta: expected one number",
    ),
    "basis alone": (
        lambda: linear.certified_radius(MODEL, TWO, [1, 1], basis=[1.0, 0.0]),
        "either delta or ratio",
    ),
    "delta alone": (
        lambda: linear.certified_radius(MODEL, TWO, [1, 1], delta=0.1),
        "expected a basis",
    ),
    "singular": (
        lambda: linear.best_classifier(symmetric([1.0, 0.0], np.diag([1.0, 0.0])), Ball(1.0)),
        "covariances: expected positive definite",
    ),
    "equal means": (
        lambda: linear.phase_diagram(Gaussians(np.ones((2, 2))), [1.0], [1.0]),
        "means: expected two different",
    ),
    "loss": (lambda: linear.svm_cosine(10, 10, 1.0, c=1.0, loss="log"), "loss: expected one of"),
    "C": (lambda: linear.svm_cosine(10, 10, 1.0, c=0.0), r"C: expected a number in \(0"),
    "penalty": (lambda: linear.ridge_cosine(10, 10, 1.0, penalty=-1.0), "penalty: expected"),
    "odd n": (lambda: linear.SvmCase(3, 2, 1.0, 1.0, 1.0), "training points: expected an even"),
    "method": (
        lambda: linear.knowing_svms(TWO, [0, 1], Strong(1, 0, [1.0, 0.0]), methods=["kernel"]),
        "method: expected one of",
    ),
    "robust p": (
        lambda: linear.robust_svm(TWO, [0, 1], Ball(0.1, 3.0)),
        "p: expected 1, 2 or ∞",
    ),
    "robust nothing": (
        lambda: linear.robust_svm(TWO, [0, 1], Ball(5.0)),
        r"robust SVM: expected classes that it can tell apart",
    ),
    "one label": (
        lambda: linear.robust_svm(TWO, [1, 1], Ball(0.1)),
        "labels: expected two classes",
    ),
    "other labels": (
        lambda: linear.knowledge_case(TWO, [0, 1], TWO, [0, 2], Strong(1, 0, [1.0, 0.0])),
        "labels: expected the same two classes",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str):
    call, match = BAD[bad]
    with pytest.raises(InputError, match=match):
        call()
