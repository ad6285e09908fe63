"""L1, L2: rates of adversarial and strong adversarial examples, exactly, and by simulation."""

from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

from ntk_awt.errors import InputError, check_count, check_number
from ntk_awt.theory.linear.sets import (
    Array,
    Ball,
    Gaussians,
    LinearClassifier,
    PixelThreat,
    Strong,
    Threat,
    check_signs,
    classifier_of,
    fitting,
    gaussians,
    maximiser,
    parts,
    reach,
    single,
)


def worst_perturbation(classifier: Any, y: Any, threat: Threat | PixelThreat) -> Array:
    """The v in V that lowers the margin y(wᵀ(x + v) + b) most: by r, wherever x lies.

    v = −y·argmax_{u ∈ V} wᵀu: ε·sign(w)(|w|/‖w‖_q)^{q−1} for a ball, and for the strong threat
    δ·UUᵀw/a + √(ε² − δ²)(w − UUᵀw)/b where εa > δ‖w‖, else εw/‖w‖ (see `reach`).

    Args:
        classifier: a `LinearClassifier` or a fitted estimator.
        y: ±1, one label or [n]; see `signs`.
        threat: with single radii.

    Returns:
        [d] for one label, else [n, d].

    Source: theory L1, L2.

    Example:
        >>> from ntk_awt.theory.linear import LinearClassifier
        >>> worst_perturbation(LinearClassifier([3.0, -4.0]), 1, Ball(1.0, np.inf))
        array([-1.,  1.])
    """
    threat, y = single(threat), check_signs(y)
    return -y[..., None] * maximiser(classifier_of(classifier).w, threat)


def certified_radius(
    classifier: Any,
    x: Any,
    y: Any,
    *,
    p: float = 2.0,
    basis: Any = None,
    delta: float | None = None,
    ratio: float | None = None,
) -> Array:
    """The smallest ε for which V reaches the boundary from a point; 0 where it is wrong already.

    Ball: M/‖w‖_q. Strong with δ = ratio·ε: M/r(1, ratio). Strong with δ given, a and b as in
    `reach`: M/‖w‖ where that is ≤ δ‖w‖/a, and else √(δ² + ((M − δa)/b)²), ∞ if b = 0.

    Args:
        classifier: a `LinearClassifier` or a fitted estimator.
        x: points [n, d].
        y: labels ±1, [n]; see `signs`.
        p: of the ball, if no basis is given.
        basis: directions [d, k] or [d] of the strong threat, with either `delta` or `ratio`.
        delta: the limit δ on the signal, fixed.
        ratio: the limit in parts of ε, so δ = ratio·ε.

    Returns:
        [n].

    Raises:
        InputError: a basis without exactly one of `delta` and `ratio`, or these without it; points
            or labels that are not [n, d] and ±1 [n].

    Source: theory L1, L2.

    Example:
        >>> from ntk_awt.theory.linear import LinearClassifier
        >>> f, x, y = LinearClassifier([3.0, 4.0]), np.array([[5.0, 0.0]]), [1]
        >>> certified_radius(f, x, y)
        array([3.])
        >>> certified_radius(f, x, y, basis=[1.0, 0.0], delta=0.0)
        array([3.75])
    """
    model = classifier_of(classifier)
    margins = np.maximum(model.margins(x, y), 0.0)
    if basis is None:
        if delta is not None or ratio is not None:
            raise InputError("delta or ratio", expected="a basis beside it", got="none")
        return margins / reach(model.w, Ball(1.0, p))
    if (delta is None) == (ratio is None):
        raise InputError("strong threat", expected="either delta or ratio", got="both or none")
    if ratio is not None:
        unit = float(reach(model.w, Strong(1.0, ratio, basis)))
        return margins / unit if unit else np.where(margins > 0, np.inf, 0.0)
    strong = Strong(0.0, delta, basis)
    single(strong)
    inside, across = parts(model.w, fitting(strong, model.w))
    a, b, length = (np.linalg.norm(part) for part in (inside, across, model.w))
    limit = float(strong.delta)
    over = np.maximum(margins - limit * a, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        corner = np.where(over > 0, np.sqrt(limit**2 + (over / b) ** 2), margins / length)
    return np.where(margins * a <= limit * length**2, margins / length, corner)


class Rates(NamedTuple):
    """Probabilities over both classes, and in each class (last axis: class −1, class +1).

    Attributes:
        clean: of an error without an adversary.
        adversarial: of a correctly classified point that the threat turns around.
        robust: of an error under the threat, clean + adversarial: the robust error.
        clean_by_class, adversarial_by_class, robust_by_class: the same given the class.
    """

    clean: Array
    adversarial: Array
    robust: Array
    clean_by_class: Array
    adversarial_by_class: Array
    robust_by_class: Array


def _gaussian_below(gap: Array, scale: Array) -> tuple[Array, Array]:
    """gap/scale, where a scale of 0 gives ∞ for a gap ≥ 0 and −∞ else; and Φ of it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(scale > 0, gap / scale, np.where(gap >= 0, np.inf, -np.inf))
    return t, scipy.special.ndtr(t)


def _fitting(classifier: Any, problem: Gaussians) -> LinearClassifier:
    """The classifier; raise unless it has the dimension of the classes."""
    model, d = classifier_of(classifier), gaussians(problem).means.shape[1]
    if len(model.w) != d:
        raise InputError("classifier w", expected=f"{d} entries", got=f"{len(model.w)}")
    return model


def rates(classifier: Any, problem: Gaussians, threat: Threat | PixelThreat) -> Rates:
    """Clean error, rate of adversarial examples and robust error of a linear classifier, exactly.

    With m_y = y(wᵀμ_y + b), σ_y² = wᵀΣ_y w and the reach r: robust error Σ_y π_y Φ((r − m_y)/σ_y),
    clean error the same with r = 0, adversarial rate their difference.

    Args:
        classifier: a `LinearClassifier` or a fitted estimator; any ‖w‖.
        problem: the classes.
        threat: its radii may be arrays, of a common shape [*grid]. The L2 ball is the strong threat
            with δ = ε; one of `ntk_awt.threats` must have no pixel box.

    Returns:
        `Rates`; adversarial and robust [*grid], by class [*grid, 2].

    Raises:
        InputError: a classifier of another dimension, an unknown threat or one with a pixel box.

    Source: theory L1, L2.

    Example:
        >>> from ntk_awt.theory.linear import LinearClassifier, symmetric
        >>> f, classes = LinearClassifier([2.0, 0.0]), symmetric([1.0, 0.0])
        >>> found = rates(f, classes, Ball([0.0, 1.0]))
        >>> print(found.clean.round(4), found.adversarial.round(4), found.robust.round(4))
        0.1587 [0.     0.3413] [0.1587 0.5   ]
    """
    model = _fitting(classifier, problem)
    centre = np.array([-1.0, 1.0]) * (problem.means @ model.w + model.b)
    spread = np.sqrt(np.maximum(problem.covariances @ model.w @ model.w, 0.0))
    r = np.asarray(reach(model.w, threat))[..., None]
    at_zero, clean = _gaussian_below(-centre, spread)
    at_reach, robust = _gaussian_below(r - centre, spread)
    # The difference of two small numbers, on whichever side they are small.
    upper = scipy.special.ndtr(-at_zero) - scipy.special.ndtr(-at_reach)
    adversarial = np.where(at_zero > 0, upper, robust - clean)
    pi = problem.priors
    return Rates(clean @ pi, adversarial @ pi, robust @ pi, clean, adversarial, robust)


class Counts(NamedTuple):
    """How many of n fresh points: errors, points turned around, and their sum."""

    n: int
    clean: int
    adversarial: int
    robust: int


def simulate(
    classifier: Any,
    problem: Gaussians,
    threat: Threat | PixelThreat,
    n: int,
    rng: np.random.Generator,
) -> Counts:
    """Draw n points, add the worst perturbation to each, count the errors before and after.

    Args:
        classifier: a `LinearClassifier` or a fitted estimator.
        problem: the classes.
        threat: with single radii.
        n: points, at least 1.
        rng: random numbers.

    Returns:
        `Counts`, to be compared with n times the `rates`; see `binomial_interval`.

    Example:
        >>> from ntk_awt.theory.linear import LinearClassifier, symmetric
        >>> problem, f = symmetric([1.0, 0.0]), LinearClassifier([1.0, 0.5])
        >>> counts = simulate(f, problem, Ball(0.3), 10_000, np.random.default_rng(0))
        >>> low, high = binomial_interval(rates(f, problem, Ball(0.3)).robust, counts.n)
        >>> bool(low <= counts.robust <= high)
        True
    """
    check_count("points", n, low=1)
    if not isinstance(rng, np.random.Generator):
        expected = "a NumPy generator, e.g. np.random.default_rng(0)"
        raise InputError("rng", expected=expected, got=type(rng).__name__)
    model, d, threat = _fitting(classifier, problem), problem.means.shape[1], single(threat)
    positive = rng.binomial(n, problem.priors[1])
    clean = robust = 0
    for index, (y, total) in enumerate([(-1, n - positive), (1, positive)]):
        values, vectors = np.linalg.eigh(problem.covariances[index])
        # x = μ + Rz enters as wᵀx = wᵀμ + (Rᵀw)ᵀz, which spares a product of matrices.
        along = np.sqrt(np.maximum(values, 0.0)) * (vectors.T @ model.w)
        shift = float(model.w @ worst_perturbation(model, y, threat))
        centre, block = float(model.w @ problem.means[index]) + model.b, max(1, 2**21 // d)
        for start in range(0, total, block):
            output = centre + rng.standard_normal((min(block, total - start), d)) @ along
            clean += int(np.sum(y * output <= 0))
            robust += int(np.sum(y * (output + shift) <= 0))
    return Counts(n, clean, robust - clean, robust)


def binomial_interval(probability: Any, n: int, level: float = 0.999) -> tuple[Any, Any]:
    """Counts [low, high] that n trials leave with probability 1 − `level` at most.

    Raises:
        InputError: a probability or level outside [0, 1], no trial.

    Example:
        >>> print(*binomial_interval(0.5, 100))
        34.0 66.0
    """
    check_count("trials", n, low=1)
    check_number("level", level, low=0, high=1)
    if not np.all((np.asarray(probability) >= 0) & (np.asarray(probability) <= 1)):
        raise InputError("probability", expected="numbers in [0, 1]", got=f"{probability}")
    return scipy.stats.binom.interval(level, n, probability)


# ---------------------------------------------------------------- L3: what any classifier can do
