"""L3: the least robust error of any linear classifier, and where robust ones exist.

Classes N(±μ, σ²I) with equal priors, ‖w‖ = 1, margins m_± with m₊ + m₋ = 2wᵀμ, r = r(w). The error
½[Φ((r − m₊)/σ) + Φ((r − m₋)/σ)] depends on the bias through m₊ − m₋ alone. With s = (wᵀμ − r)/σ it
is least without a bias where s ≥ 0, Φ(−s), and where s < 0 it falls towards ½ with a growing bias:
min(½, Φ(−s)). The step v = min(ε, δ)μ₀ is allowed, so r(w) ≥ min(ε, δ)wᵀμ₀ and
σs ≤ (‖μ‖ − min(ε, δ))wᵀμ₀, with equality at w = μ₀. Hence the least error is
min(½, Φ((min(ε, δ) − ‖μ‖)/σ)).

The theory has it without the ½, for ε ≤ ‖μ‖ or δ ≤ ‖μ‖ only: beyond that Φ(…) > ½, and a constant
answer is better. A control shows it. Nothing else changes: no robust classifier exists there.

One covariance, any priors: for every v of the set r(w) ≥ wᵀv, so no w has a larger
(wᵀΔ − r(w))/√(wᵀΣw) than t = ‖Σ^{-1/2}(Δ − v)‖, and no error is below π₊Φ(−t − β) + π₋Φ(−t + β),
β = ln(π₊/π₋)/2t, of the two Gaussians that v leaves. The library's w = Σ⁻¹(Δ − v) names such a v,
which is a certificate: nobody has to trust its solver.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from scipy.special import ndtr

from ntk_awt.theory import linear
from proofs_check.core import (
    FORMULA,
    Case,
    Context,
    Line,
    Outcome,
    Panel,
    Recorder,
    Statement,
    close,
)
from proofs_check.instances.linear import SIGNS, Array, dual, norm, strong_reach

STATEMENT = Statement(
    number="L3",
    title="where robust linear classifiers exist",
    claim="For equal round classes the least robust error of any linear classifier is that of "
    "w = μ, or ½ of a constant answer; so for δ < ‖μ‖ < ε no classifier is robust in the ordinary "
    "sense, and one is in the strong sense.",
    formula="min_{w,b} = min(½, Φ((ρ − ‖μ‖)/σ)), ρ = ε ordinary, ρ = min(ε, δ) strong",
    hypotheses={
        "round": "Σ = σ²I (closed form)",
        "equal priors": "of both classes (closed form)",
        "signal along μ": "(closed form)",
        "one covariance": "positive definite, of both classes (certificate)",
    },
    instances="48 random (‖μ‖, σ, ε, δ) in 2 to 20 dimensions (240 with --full), a phase diagram "
    "of 10 × 10 cells (24 × 24), 30 problems in the plane with any covariances and priors (200), "
    "40 certificates in 5 to 39 dimensions (200)",
    rule="closed form, search over (w, b) and the library's optimum agree; no classifier has less; "
    "the phases are as said",
    tolerance="1e-6 relative is where the simplex search over (w, b) stops; 1e-8 what the "
    "library's duality gap of 1e-10 in t leaves in the error; float64 rounding elsewhere",
    source="theory L3, with the constant answer that it leaves out; Shi and Ding 2019; Bhagoji et "
    "al. 2019",
)

ORDERS = (1.0, 1.5, 2.0, 3.0, np.inf)


class Set(NamedTuple):
    """A ball of order p, or the strong threat with a signal of one direction."""

    epsilon: float
    p: float = 2.0
    delta: float = np.inf
    signal: Array | None = None

    def library(self) -> linear.Threat:
        if self.signal is None:
            return linear.Ball(self.epsilon, self.p)
        return linear.Strong(self.epsilon, self.delta, self.signal)

    def reach(self, w: Array) -> float:
        if self.signal is None:
            return self.epsilon * norm(w, dual(self.p))
        unit = self.signal / np.linalg.norm(self.signal)
        across = np.linalg.norm(w - unit * (unit @ w))
        return float(strong_reach(self.epsilon, self.delta, abs(unit @ w), across))

    def excess(self, v: Array) -> float:
        """How far v is outside, in units of ε; ≤ 0 inside."""
        if self.signal is None:
            return norm(v, self.p) / self.epsilon - 1
        inside = abs(v @ self.signal) / np.linalg.norm(self.signal)
        return max(float(np.linalg.norm(v)) - self.epsilon, float(inside) - self.delta) / (
            self.epsilon
        )


class Classes(NamedTuple):
    """Means [2, d], covariances [2, d, d], priors [2]."""

    means: Array
    covariances: Array
    priors: Array

    def library(self) -> linear.Gaussians:
        return linear.Gaussians(*self)

    def error(self, w: Array, b: Any, s: Set) -> Any:
        """Robust error; any shape of b."""
        total, r = 0.0, s.reach(w)
        for y, mean, covariance, prior in zip(SIGNS, *self, strict=True):
            margin = y * (mean @ w + b)
            total = total + prior * ndtr((r - margin) / np.sqrt(w @ covariance @ w))
        return total


def _isotropic(mean: Array, sigma: float) -> Classes:
    covariance = np.broadcast_to(sigma**2 * np.eye(len(mean)), (2, len(mean), len(mean)))
    return Classes(SIGNS[:, None] * mean, covariance, np.array([0.5, 0.5]))


def _least(mean_norm: Any, epsilon: Any, delta: Any, sigma: Any) -> Array:
    """The statement's closed form."""
    reach = np.minimum(epsilon, delta)
    return np.minimum(0.5, ndtr((reach - mean_norm) / sigma))


def _brute(classes: Classes, s: Set) -> float:
    """Over a grid of directions in the plane and of biases, then from the best of them."""
    angles = (np.arange(150) + 0.3) * 2 * np.pi / 150  # not the optimum itself
    reach = 2 * np.abs(classes.means).max() + 4 * np.sqrt(np.abs(classes.covariances).max())
    biases = np.linspace(-reach, 1.01 * reach, 100)

    def error(point: Array) -> float:
        w = np.array([np.cos(point[0]), np.sin(point[0])])
        return float(classes.error(w, point[1], s))

    grid = np.stack([classes.error(np.array([np.cos(a), np.sin(a)]), biases, s) for a in angles])
    best = float(classes.priors.min())  # a constant answer
    order = np.argsort(grid.min(1))[:2]
    for row in order:
        found = scipy.optimize.minimize(
            error,
            np.array([angles[row], biases[grid[row].argmin()]]),
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 600},
        )
        best = min(best, float(found.fun))
    return best


# ---------------------------------------------------------------- equal round classes


class Round(NamedTuple):
    """Equal round classes under both threats: parameters, and least errors found."""

    mean_norm: Array
    epsilon: Array
    delta: Array
    sigma: Array
    brute: NDArray[np.float64]
    library: NDArray[np.float64]
    cosine: NDArray[np.float64]
    random: NDArray[np.float64]

    def closed(self) -> Array:
        """[2, instances]: ordinary, strong."""
        return np.stack(
            [
                _least(self.mean_norm, self.epsilon, limit, self.sigma)
                for limit in (np.inf, self.delta)
            ]
        )


def _round(context: Context) -> Round:
    count = context.pick(6, 48, 240)
    rng = context.rng(1)
    mean_norm, sigma = rng.uniform(0.5, 2.0, count), rng.uniform(0.4, 1.5, count)
    # A third each with both radii below ‖μ‖, δ alone below it, and both above.
    small, large = rng.uniform(0.05, 0.95, (2, count)), rng.uniform(1.05, 2.0, (2, count))
    third = np.arange(count) % 3
    epsilon = mean_norm * np.where(third == 0, small.max(0), large.max(0))
    delta = mean_norm * np.where(third == 2, large.min(0), small.min(0))
    brute, library, random, cosine = (np.empty((2, count)) for _ in range(4))
    for i in range(count):
        direction = rng.standard_normal(2 + i % 3 * 9)
        mean = mean_norm[i] * direction / np.linalg.norm(direction)
        plane = _isotropic(np.array([mean_norm[i], 0.0]), sigma[i])
        classes = _isotropic(mean, sigma[i])
        problem = classes.library()
        for j, limit in enumerate((np.inf, delta[i])):
            signal = None if np.isinf(limit) else mean
            s = Set(epsilon[i], 2.0, limit, signal)
            flat = None if signal is None else np.array([1.0, 0.0])
            # Every w enters through wᵀμ alone, so the plane has them all.
            brute[j, i] = _brute(plane, s._replace(signal=flat))
            found = linear.best_classifier(problem, s.library())
            library[j, i] = found.robust_error
            w = mean if found.classifier is None else found.classifier.w
            cosine[j, i] = w @ mean / np.linalg.norm(w) / mean_norm[i]
            tried = [mean + rng.standard_normal(len(mean)) * size for size in (0.01, 0.1, 1, 3)]
            bias = sigma[i] * rng.standard_normal(5)
            random[j, i] = min(classes.error(w, bias * np.linalg.norm(w), s).min() for w in tried)
        context.progress(0.4 * (i + 1) / count)
    return Round(mean_norm, epsilon, delta, sigma, brute, library, cosine, random)


def _phase(check: Recorder, context: Context) -> Panel:
    """The library's phase diagram, each optimum by its solver, against the closed form."""
    mean = np.array([0.9, -1.2, 0.0])
    steps = context.pick(5, 10, 24)
    ratio = (np.arange(steps) + 0.5) * 2 / steps  # none at the phases' limit, which is 1
    sigma = 0.8
    found = linear.phase_diagram(linear.symmetric(mean, sigma**2), ratio, ratio)
    unit = float(np.linalg.norm(mean))
    strong = _least(unit, unit * ratio, unit * ratio[:, None], sigma)
    ordinary = np.broadcast_to(_least(unit, unit * ratio, np.inf, sigma), strong.shape)
    phase = (ratio < 1).astype(int) + (np.minimum(ratio, ratio[:, None]) < 1)
    name, both = f"phase diagram, {steps} × {steps} cells", [found.ordinary, found.strong]
    check.close(name, both, [ordinary, strong], tolerance=1e-8)
    check.close("its phases", found.phase, phase, tolerance=1e-9)
    lines = [
        Line("ordinary against ε, numerical", ratio, found.ordinary[0]),
        Line("ordinary, closed form", ratio, ordinary[0], "reference"),
        Line("strong against δ, ε = 2‖μ‖, numerical", ratio, found.strong[:, -1]),
        Line("strong, closed form", ratio, strong[:, -1], "reference"),
    ]
    return Panel(
        f"least robust error, ‖μ‖ = {unit / sigma:.2f} σ",
        "radius ε or δ [units of ‖μ‖]",
        "error [probability]",
        lines,
        yscale="linear",
    )


# ---------------------------------------------------------------- any covariance, any priors


def _random_classes(d: int, equal: bool, rng: np.random.Generator) -> Classes:
    factors = rng.standard_normal((2, d, d)) / np.sqrt(d)
    covariances = factors @ factors.transpose(0, 2, 1) + 0.2 * np.eye(d)
    if equal:
        covariances[1] = covariances[0]
    half, centre = rng.standard_normal(d), rng.standard_normal(d)
    half *= rng.uniform(1.0, 2.0) / np.linalg.norm(half)
    prior = rng.uniform(0.25, 0.75)
    means = centre + SIGNS[:, None] * half
    return Classes(means, covariances, np.array([1 - prior, prior]))


def _random_set(index: int, half: Array, rng: np.random.Generator) -> Set:
    if index % 2:
        signal = half + 0.5 * np.linalg.norm(half) * rng.standard_normal(len(half))
        return Set(rng.uniform(0.5, 1.5), 2.0, rng.uniform(0.1, 0.5), signal)
    p = ORDERS[index // 2 % len(ORDERS)]
    # A ball of radius ε in L_p reaches ε·d^{1/2 − 1/p} at least in L2.
    return Set(rng.uniform(0.2, 0.6) * len(half) ** min(0.0, 1 / p - 0.5), p)


class Found(NamedTuple):
    """Least errors of general classes."""

    library: list[float]
    attained: list[float]
    other: list[float]
    natural: list[float]
    unbiased: list[float]


def _plane(context: Context) -> Found:
    """In two dimensions, against brute force."""
    found = Found([], [], [], [], [])
    count = context.pick(6, 30, 200)
    for index in range(count):
        rng = context.rng(3, index)
        classes = _random_classes(2, index % 3 > 0, rng)
        s = _random_set(index, classes.means[1] - classes.means[0], rng)
        problem = classes.library()
        best = linear.best_classifier(problem, s.library())
        natural = linear.best_classifier(problem, linear.Ball(0.0)).classifier
        assert natural is not None
        model = best.classifier or natural
        found.library.append(best.robust_error)
        attained = float(classes.error(model.w, model.b, s))
        found.attained.append(attained if best.classifier else float(classes.priors.min()))
        found.other.append(_brute(classes, s))
        found.natural.append(float(classes.error(natural.w, natural.b, s)))
        centred = -float(model.w @ classes.means.mean(0))
        found.unbiased.append(float(classes.error(model.w, centred, s)))
        context.progress(0.5 + 0.4 * (index + 1) / count)
    return found


def _certificates(context: Context, label: int, *, equal: bool = True) -> tuple[Any, ...]:
    """In many dimensions: the error below which the library's own v allows none.

    Returns:
        Least errors by the library, the allowed ones, and how far each v is outside of the set.
    """
    library, allowed, excess = [], [], []
    for index in range(context.pick(10, 40, 200) if equal else 2):
        rng = context.rng(label, index)
        d = int(rng.integers(5, 40))
        classes = _random_classes(d, equal, rng)
        half = (classes.means[1] - classes.means[0]) / 2
        s = _random_set(index, half, rng)
        best = linear.best_classifier(classes.library(), s.library())
        if best.classifier is None:
            continue
        pull = classes.covariances[0] @ best.classifier.w
        excess.append(max(s.excess(half - pull), 0.0))
        t = np.sqrt(best.classifier.w @ pull)
        beta = np.log(classes.priors[1] / classes.priors[0]) / (2 * t)
        allowed.append(classes.priors @ ndtr(-t + np.array([beta, -beta])))
        library.append(best.robust_error)
    return library, allowed, excess


def _certified(library: list[float], allowed: list[float]) -> Case:
    name = f"certificates of {len(library)} optima"
    return close(name, library, allowed, tolerance=1e-6)


def _other_classes(scale: tuple[float, float], prior: float) -> Case:
    """The closed form where the classes are not round, or their priors not equal."""
    covariance = np.broadcast_to(np.diag(np.square(scale)), (2, 2, 2))
    means = SIGNS[:, None] * np.array([1.0, 1.0]) / np.sqrt(2)
    classes = Classes(means, covariance, np.array([1 - prior, prior]))
    found = _brute(classes, Set(0.4))
    return close("least error", _least(1.0, 0.4, np.inf, scale[0]), found, tolerance=1e-6)


def check(context: Context) -> Outcome:
    found = _round(context)
    closed, count = found.closed(), len(found.sigma)
    better = closed < 0.5 - 1e-9
    plane = _plane(context)
    middle = (found.delta < found.mean_norm) & (found.mean_norm < found.epsilon)
    library_closed = [
        linear.best_isotropic_error(found.mean_norm, found.epsilon, limit, found.sigma)
        for limit in (np.inf, found.delta)
    ]
    check = Recorder(STATEMENT)
    name = f"closed form against a search over w and b, {2 * count} problems"
    check.close(name, closed, found.brute, tolerance=1e-6)
    check.close("library's closed form", library_closed, closed, tolerance=1e-12)
    name = "library's optimum, in 2 to 20 dimensions"
    check.close(name, found.library, closed, tolerance=1e-8)
    name, ones = "it lies at w = μ where it is better than a constant", np.ones(int(better.sum()))
    check.close(name, found.cosine[better], ones, tolerance=1e-6)
    check.below("no random classifier has less", closed, found.random)
    halves = np.full(middle.sum(), 0.5)
    name = "δ < ‖μ‖ < ε: every ordinary error is ½ or more"
    check.below(name, halves, found.random[0, middle])
    name = "δ < ‖μ‖ < ε: the least strong error is below ½"
    check.below(name, found.brute[1, middle], halves)
    check.panel(_phase(check, context))
    name = "any covariances and priors in the plane, against brute force"
    check.close(name, plane.library, plane.other, tolerance=1e-6)
    check.close("the classifier has the error", plane.attained, plane.library, tolerance=1e-8)
    library, allowed, excess = _certificates(context, 4)
    check.case(_certified(library, allowed))
    check.below("their v lie in the set", 1 + np.array(excess), np.ones(len(excess)))

    def without(name: str, changed: Array) -> None:
        case = close("closed form against a search", changed, found.brute, tolerance=1e-6)
        check.control(name, case, breaks=FORMULA)

    m, e, d, sigma = found.mean_norm, found.epsilon, found.delta, found.sigma
    name = "no constant answer: Φ((ε − ‖μ‖)/σ) also where it is above ½"
    without(name, ndtr((np.stack([e, np.minimum(e, d)]) - m) / sigma))
    without("δ and ε swapped", np.stack([_least(m, r, np.inf, sigma) for r in (d, e)]))
    without("σ forgotten", np.stack([_least(m, e, limit, 1.0) for limit in (np.inf, d)]))
    across = linear.Strong(1.5, 0.5, [0.0, 1.0])
    error = linear.best_classifier(linear.symmetric([1.0, 0.0]), across).robust_error
    case = close("least strong error", error, _least(1.0, 1.5, 0.5, 1.0), tolerance=1e-6)
    check.control("a signal across μ", case, breaks="signal along μ")
    case = close("error in the plane", plane.natural, plane.other, tolerance=1e-6)
    check.control("the best classifier without an adversary", case, breaks=FORMULA)
    case = close("error in the plane", plane.unbiased, plane.other, tolerance=1e-6)
    check.control("no bias, priors unequal", case, breaks="equal priors")
    name = "the closed form, priors unequal"
    check.control(name, _other_classes((1.0, 1.0), 0.7), breaks="equal priors")
    check.control("the closed form, Σ not round", _other_classes((1.0, 0.5), 0.5), breaks="round")
    case = _certified(*_certificates(context, 5, equal=False)[:2])
    check.control("certificates with two covariances", case, breaks="one covariance")
    return check.outcome()
