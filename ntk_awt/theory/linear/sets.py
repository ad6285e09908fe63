"""Linear classifiers, Gaussian classes, and the sets of perturbations with their reach.

All in float64 NumPy: these are closed forms and small convex problems.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ntk_awt.errors import InputError, check_finite, check_number
from ntk_awt.threats import L2, Linf, StrongL2, orthonormal

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def signs(labels: Any) -> Array:
    """The labels of two classes as −1 and +1, in their sorted order.

    Args:
        labels: [n], of two classes: whole numbers, bools or names.

    Returns:
        [n], ±1.

    Raises:
        InputError: another number of classes, labels that are none, or not [n].

    Example:
        >>> signs([3, 7, 3]), signs(["no", "yes"])
        (array([-1.,  1., -1.]), array([-1.,  1.]))
    """
    values, known = classes(labels)
    if len(known) != 2:
        raise InputError("labels", expected="two classes", got=f"{len(known)}: {_listed(known)}")
    return np.where(values == known[1], 1.0, -1.0)


def classes(labels: Any, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The labels as an array [n], and the sorted classes among them; raise unless they are labels.

    Args:
        labels: whole numbers, bools or names.
        n: how many there have to be.
    """
    try:
        values = np.asarray(labels)
    except ValueError as error:
        raise InputError("labels", expected="shape [n]", got="lists of lists") from error
    if values.ndim != 1 or (n is not None and len(values) != n):
        wanted = "[n]" if n is None else f"({n},)"
        raise InputError("labels", expected=f"shape {wanted}", got=f"shape {values.shape}")
    whole = values.dtype.kind in "iubUS"
    if values.dtype.kind == "f":
        whole = bool(np.all(values == np.round(values)))
    if not whole:
        got = f"dtype {values.dtype}"
        if values.dtype.kind == "f":
            got = f"{values[~(values == np.round(values))][0]:g} among them"
        raise InputError("labels", expected="whole numbers, bools or names", got=got)
    return values, np.unique(values)


def _listed(values: np.ndarray) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return f"{shown}, …" if len(values) > 5 else shown or "none"


def check_signs(y: Any, n: int | None = None) -> Array:
    """Labels ±1 as float64, one or [n]; raise if any is something else.

    There is no guess which of two other labels is +1: of one label alone nobody could tell.
    """
    values = np.asarray(y)
    if n is not None and values.shape not in ((), (n,)):
        raise InputError("labels", expected=f"shape ({n},)", got=f"shape {values.shape}")
    if values.dtype.kind not in "iuf" or not np.isin(values, (-1, 1)).all():
        numbers = values.dtype.kind in "iuf"
        got = _listed(np.unique(values)) if numbers else f"dtype {values.dtype}"
        raise InputError(
            "labels",
            expected="−1 and +1",
            got=got,
            fix="make them of two classes with linear.signs",
        )
    return values.astype(np.float64)


def numbers(what: str, value: Any) -> Array:
    """Real numbers as float64; raise if they are something else."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(what, expected="an array of numbers", got="lists of lists") from error
    if array.dtype.kind not in "biuf":
        raise InputError(what, expected="real numbers", got=f"dtype {array.dtype}")
    return array.astype(np.float64)


def points_of(x: Any, d: int | None = None) -> Array:
    """Points [n, d] as float64; raise unless they are finite, and of d entries each."""
    points = numbers("points", x)
    if points.ndim != 2 or (d is not None and points.shape[1] != d):
        wanted = "d" if d is None else d
        raise InputError("points", expected=f"shape [n, {wanted}]", got=f"shape {points.shape}")
    check_finite("points", points)
    return points


def rows_of(x: Any) -> Array:
    """Points [n, *shape] as rows [n, d]; raise unless there is one, and all are finite."""
    values = np.asarray(x)
    if values.ndim < 2 or not values.size:
        got = f"shape {values.shape}"
        raise InputError("points", expected="shape [n, *shape], not empty", got=got)
    return points_of(values.reshape(len(values), -1))


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """x ↦ sign(wᵀx + b).

    Attributes:
        w: [d], not zero; its length does not matter.
        b: the bias.

    Raises:
        InputError: w is zero, not finite or no array [d], or b is not finite.

    Example:
        >>> LinearClassifier([3, 4], 5).margins(np.array([[0.0, 0.0], [-3.0, 0.0]]), [1, 1])
        array([ 5., -4.])
    """

    w: Any
    b: Any = 0.0

    def __post_init__(self):
        w, b = numbers("classifier w", self.w), numbers("classifier b", self.b)
        if w.ndim != 1 or b.ndim != 0:
            raise InputError(
                "classifier", expected="w [d] and a number b", got=f"shapes {w.shape}, {b.shape}"
            )
        check_finite("classifier", {"w": w, "b": b})
        if not w.any():
            raise InputError("classifier w", expected="a vector that is not zero", got="zero")
        object.__setattr__(self, "w", w)
        object.__setattr__(self, "b", float(b))

    def margins(self, x: Any, y: Any) -> Array:
        """y(wᵀx + b) for points [n, d] and labels ±1 [n] (or one for all)."""
        points = points_of(x, len(self.w))
        return check_signs(y, len(points)) * (points @ self.w + self.b)


def classifier_of(model: Any) -> LinearClassifier:
    """A linear classifier from a fitted scikit-learn estimator, or the same one again.

    Args:
        model: a `LinearClassifier`, or anything binary with `coef_` ([d] or [1, d]) and
            `intercept_`; `classes_[1]` is the class +1.

    Raises:
        InputError: no such attributes, or more than two classes.

    Example:
        >>> from sklearn.svm import LinearSVC
        >>> fitted = LinearSVC().fit([[0.0], [2.0]], [0, 1])
        >>> bool(classifier_of(fitted).w[0] > 0)
        True
    """
    if isinstance(model, LinearClassifier):
        return model
    if not hasattr(model, "coef_") or not hasattr(model, "intercept_"):
        raise InputError(
            "classifier",
            expected="a LinearClassifier or a fitted estimator with coef_ and intercept_",
            got=type(model).__name__,
        )
    w, b = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
    if w.ndim == 2 and len(w) > 1:
        raise InputError("classifier", expected="two classes", got=f"coef_ of shape {w.shape}")
    return LinearClassifier(w.reshape(-1), b.reshape(()))


@dataclass(frozen=True, eq=False)
class Gaussians:
    """Two classes: x | y ~ N(μ_y, Σ_y) with probability π_y; class −1 comes first everywhere.

    Attributes:
        means: [2, d].
        covariances: [2, d, d]; or one matrix [d, d], or a variance σ² that stands for σ²I.
        priors: [2], positive, sum 1.

    Raises:
        InputError: shapes that do not fit, covariances that are not symmetric positive
            semi-definite, or priors that are none.

    Example:
        >>> Gaussians([[-1.0, 0.0], [1.0, 0.0]], 4.0).covariances.shape
        (2, 2, 2)
    """

    means: Any
    covariances: Any = 1.0
    priors: Any = (0.5, 0.5)

    def __post_init__(self):
        means = numbers("means", self.means)
        if means.ndim != 2 or len(means) != 2 or not means.size:
            raise InputError("means", expected="shape [2, d], d ≥ 1", got=f"shape {means.shape}")
        d = means.shape[1]
        given = numbers("covariances", self.covariances)
        if given.shape not in ((), (d, d), (2, d, d)):
            raise InputError(
                "covariances",
                expected=f"a number or shape {(d, d)} or {(2, d, d)}",
                got=f"shape {given.shape}",
            )
        priors = numbers("priors", self.priors)
        check_finite("classes", {"means": means, "covariances": given, "priors": priors})
        if priors.shape != (2,) or np.any(priors <= 0) or abs(priors.sum() - 1) > 1e-12:
            raise InputError(
                "priors", expected="two positive numbers of sum 1", got=f"{priors.tolist()}"
            )
        for matrix in {(): [], (d, d): [given]}.get(given.shape, given):
            scale = np.abs(matrix).max()
            symmetric = np.abs(matrix - matrix.T).max() <= 1e-10 * scale
            if not symmetric or np.linalg.eigvalsh(matrix)[0] < -1e-10 * scale * d:
                raise InputError(
                    "covariances", expected="symmetric positive semi-definite", got="another matrix"
                )
        if given.ndim == 0:
            check_number("variance", float(given), low=0)
            given = given * np.eye(d)
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "covariances", np.broadcast_to(given, (2, d, d)))
        object.__setattr__(self, "priors", priors)


def gaussians(problem: Any) -> Gaussians:
    """The classes; raise if they are none."""
    if not isinstance(problem, Gaussians):
        raise InputError("classes", expected="linear.Gaussians", got=type(problem).__name__)
    return problem


def symmetric(mean: Any, covariance: Any = 1.0, prior: float = 0.5) -> Gaussians:
    """Classes N(yμ, Σ) with π_{+1} = `prior`.

    Example:
        >>> symmetric([1.0, 2.0], 4.0).means
        array([[-1., -2.],
               [ 1.,  2.]])
    """
    mean = numbers("mean", mean)
    return Gaussians(np.stack([-mean, mean]), covariance, (1 - prior, prior))


@dataclass(frozen=True, eq=False)
class Ball:
    """V = {v: ‖v‖_p ≤ ε}.

    Attributes:
        epsilon: ε ≥ 0, a number or an array; functions work on all its entries at once.
        p: from 1 to ∞.
    """

    epsilon: Any
    p: float = 2.0

    def __post_init__(self):
        object.__setattr__(self, "epsilon", _limits("epsilon", self.epsilon))
        if not (isinstance(self.p, int | float | np.number) and self.p >= 1):
            raise InputError("p", expected="a number in [1, ∞]", got=f"{self.p}")


@dataclass(frozen=True, eq=False)
class Strong:
    """V = {v: ‖v‖₂ ≤ ε and ‖Uᵀv‖₂ ≤ δ}: the signal, the span of U, changes by δ at most.

    Attributes:
        epsilon: ε ≥ 0, a number or an array.
        delta: δ ≥ 0, a number or an array; the two broadcast.
        basis: U, directions [d, k], or one direction [d]; made orthonormal.

    Source: theory L2.
    """

    epsilon: Any
    delta: Any
    basis: Any

    def __post_init__(self):
        basis = numbers("basis", self.basis)
        object.__setattr__(self, "epsilon", _limits("epsilon", self.epsilon))
        object.__setattr__(self, "delta", _limits("delta", self.delta))
        object.__setattr__(self, "basis", orthonormal(basis[:, None] if basis.ndim == 1 else basis))


Threat: TypeAlias = Ball | Strong
PixelThreat: TypeAlias = Linf | L2 | StrongL2
"""Taken in place of a `Threat`, if its box has no bounds; see `threat_of`."""


def threat_of(threat: Any) -> Threat:
    """The set of a threat, without a pixel box.

    Args:
        threat: a `Ball` or `Strong`; or `threats.Linf`, `L2` or `StrongL2` without a pixel box.

    Raises:
        InputError: another object, or bounds that are finite: with a box the set is not the same
            around every point, and no formula here holds.

    Example:
        >>> from ntk_awt import threats
        >>> threat_of(threats.L2(0.5, (-np.inf, np.inf)))
        Ball(epsilon=array(0.5), p=2.0)
    """
    if isinstance(threat, Ball | Strong):
        return threat
    if not isinstance(threat, PixelThreat):
        raise InputError(
            "threat", expected="linear.Ball or linear.Strong", got=type(threat).__name__
        )
    if not all(np.isinf(bound).all() for bound in threat.bounds):
        raise InputError(
            "threat",
            expected="one without a pixel box",
            got=f"{type(threat).__name__} in a box",
            fix="take linear.Ball or linear.Strong, or bounds=(-inf, inf)",
        )
    epsilon = float(threat.epsilon)
    if isinstance(threat, StrongL2):
        return Strong(epsilon, float(threat.delta), threat.basis)
    return Ball(epsilon, np.inf if isinstance(threat, Linf) else 2.0)


def strong_of(threat: Any) -> Strong:
    """The same, for what needs a signal."""
    found = threat_of(threat)
    if isinstance(found, Ball):
        raise InputError("threat", expected="linear.Strong, with a signal", got="a ball")
    return found


def _limits(what: str, value: Any) -> Array:
    array = numbers(what, value)
    check_finite(what, array)
    if np.any(array < 0):
        raise InputError(what, expected="numbers in [0, ∞)", got=f"{array.min():g}")
    return array


def single(threat: Any) -> Threat:
    """The threat's set; raise unless the radii are numbers."""
    threat = threat_of(threat)
    for name in ("epsilon", "delta"):
        if np.ndim(getattr(threat, name, 0.0)):
            raise InputError(
                name, expected="one number", got=f"shape {getattr(threat, name).shape}"
            )
    return threat


def p_norm(w: Array, q: float) -> float:
    """‖w‖_q; scaled first, since powers of a large q over- and underflow."""
    largest = np.abs(w).max()
    return float(largest * np.linalg.norm(w / largest, ord=q)) if largest else 0.0


def parts(w: Array, basis: Array) -> tuple[Array, Array]:
    """Inside the span of the basis and across it."""
    inside = basis @ (basis.T @ w)
    across = w - inside
    noise = 1e-14 * np.linalg.norm(w)
    return inside, np.where(np.linalg.norm(across) > noise, across, 0.0)


def dual(p: float) -> float:
    """q with 1/p + 1/q = 1.

    Example:
        >>> dual(1), dual(2), dual(np.inf)
        (inf, 2.0, 1.0)
    """
    if not p >= 1:
        raise InputError("p", expected="a number in [1, ∞]", got=f"{p}")
    if p == 1:
        return np.inf
    return 1.0 if np.isinf(p) else p / (p - 1)


# ---------------------------------------------------------------- L1, L2: rates, exactly


def reach(w: Any, threat: Threat | PixelThreat) -> Array:
    """r = max_{v ∈ V} wᵀv: how far the threat can move the margin.

    Ball: ε‖w‖_q, 1/p + 1/q = 1. Strong, with a = ‖Uᵀw‖, b² = ‖w‖² − a²: ε‖w‖ where εa ≤ δ‖w‖, and
    else δa + √(ε² − δ²)·b.

    Args:
        w: [d].
        threat: its radii may be arrays.

    Returns:
        The shape of the radii, broadcast; linear in ‖w‖.

    Source: theory L1, L2.

    Example:
        >>> reach([3.0, 4.0], Ball([1.0, 2.0], np.inf))
        array([ 7., 14.])
        >>> float(reach([3.0, 4.0], Strong(5.0, 3.0, [1.0, 0.0])))
        25.0
        >>> float(reach([3.0, 4.0], Strong(5.0, 0.0, [1.0, 0.0])))
        20.0
    """
    w, threat = numbers("w", w), threat_of(threat)
    if w.ndim != 1 or not w.size:
        raise InputError("w", expected="shape [d], d ≥ 1", got=f"shape {w.shape}")
    check_finite("w", w)
    if isinstance(threat, Ball):
        return threat.epsilon * p_norm(w, dual(threat.p))
    inside, across = parts(w, fitting(threat, w))
    a, b, length = (np.linalg.norm(part) for part in (inside, across, w))
    epsilon, delta = np.broadcast_arrays(threat.epsilon, threat.delta)
    corner = delta * a + np.sqrt(np.maximum(epsilon**2 - delta**2, 0.0)) * b
    return np.where(epsilon * a <= delta * length, epsilon * length, corner)


def fitting(threat: Strong, w: Array) -> Array:
    if len(threat.basis) != len(w):
        raise InputError("basis", expected=f"{len(w)} rows", got=f"shape {threat.basis.shape}")
    return threat.basis


def maximiser(w: Array, threat: Threat) -> Array:
    """argmax_{v ∈ V} wᵀv, [d]; one of them where there are several."""
    if isinstance(threat, Strong):
        inside, across = parts(w, fitting(threat, w))
        a, b, length = (np.linalg.norm(part) for part in (inside, across, w))
        epsilon, delta = float(threat.epsilon), float(threat.delta)
        if epsilon * a <= delta * length:
            return epsilon * w / length
        sideways = across / b if b else across
        return delta * inside / a + np.sqrt(max(epsilon**2 - delta**2, 0.0)) * sideways
    size = np.abs(w)
    if threat.p == 1:
        share = np.eye(len(w))[size.argmax()]
    else:
        q = dual(threat.p)
        share = (size / p_norm(w, q)) ** (q - 1)
    return threat.epsilon * np.sign(w) * share


def has_projection(threat: Threat) -> bool:
    return isinstance(threat, Strong) or threat.p in (1, 2, np.inf)


def nearest(z: Array, threat: Threat) -> Array:
    """The Euclidean projection of z onto V, for the strong threat and balls of p = 1, 2, ∞."""
    epsilon = float(threat.epsilon)
    if isinstance(threat, Strong):
        # See `threats.StrongL2`: the parts inside and across the signal are scaled alone.
        inside, across = parts(z, threat.basis)
        a, b, delta = np.linalg.norm(inside), np.linalg.norm(across), float(threat.delta)
        length = np.hypot(a, b)
        to_ball = epsilon / length if length > epsilon else 1.0
        if a * to_ball <= delta:
            return to_ball * z
        corner = np.sqrt(max(epsilon**2 - delta**2, 0.0))
        return delta / a * inside + (corner / b if b > corner else 1.0) * across
    if np.isinf(threat.p):
        return np.clip(z, -epsilon, epsilon)
    if threat.p == 2:
        return z * min(1.0, epsilon / max(float(np.linalg.norm(z)), 1e-300))
    size = np.abs(z)
    if size.sum() <= epsilon:
        return z
    # Soft threshold whose remainder has the 1-norm ε (Duchi et al. 2008).
    ordered = np.sort(size)[::-1]
    thresholds = (np.cumsum(ordered) - epsilon) / np.arange(1, len(z) + 1)
    threshold = thresholds[np.nonzero(ordered > thresholds)[0][-1]]
    return np.sign(z) * np.maximum(size - threshold, 0.0)
