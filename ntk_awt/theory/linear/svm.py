"""L5: support vector machines that know nothing, the signal, or the threat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg

from ntk_awt.errors import InputError, check_number, choose
from ntk_awt.theory.linear.angles import LOSSES
from ntk_awt.theory.linear.sets import (
    Array,
    LinearClassifier,
    PixelThreat,
    Strong,
    Threat,
    classes,
    classifier_of,
    fitting,
    has_projection,
    nearest,
    points_of,
    rows_of,
    signs,
    single,
    strong_of,
)
from ntk_awt.threats import orthonormal


def train_svm(x: Any, y: Any, *, c: float = 1.0, loss: str = "hinge", seed: int = 0) -> Any:
    """A fitted scikit-learn SVM: `SVC(kernel="linear")` or, for the squared hinge, `LinearSVC`.

    Args:
        x: points [n, d].
        y: two labels, [n].
        c: `C`.
        loss: hinge or squared_hinge.
        seed: of `LinearSVC`'s own draws.

    Returns:
        The estimator; `classifier_of` reads it.

    Raises:
        InputError: labels of another number of classes, points that do not fit them or are not
            finite, C ≤ 0, an unknown loss.
    """
    # Imported where it is needed: it takes a second.
    from sklearn.svm import SVC, LinearSVC

    choose("loss", loss, LOSSES)
    check_number("C", c, low=0, low_open=True)
    points, _ = _examples(x, y)
    model = (
        SVC(C=c, kernel="linear")
        if loss == "hinge"
        else LinearSVC(C=c, dual="auto", tol=1e-6, max_iter=100_000, random_state=seed)
    )
    return model.fit(points, np.asarray(y))


def _examples(x: Any, y: Any) -> tuple[Array, Array]:
    """Points [n, d], and ±1 for their labels of two classes."""
    points, labels = points_of(x), signs(y)
    if len(points) != len(labels):
        raise InputError("labels", expected=f"shape ({len(points)},)", got=f"shape {labels.shape}")
    return points, labels


def signal_svm(
    x: Any, y: Any, basis: Any, *, c: float = 1.0, loss: str = "hinge"
) -> LinearClassifier:
    """The SVM on the signal coordinates Uᵀx alone; its w lies in the span of U.

    So it moves by δ‖w‖ at most under the strong threat, whatever ε is.

    Args:
        x: points [n, d].
        y: two labels, [n].
        basis: the signal, [d, k] or [d].
        c: `C`.
        loss: hinge or squared_hinge.

    Source: theory L5.

    Example:
        >>> x = np.array([[-1.0, 5.0], [1.0, 5.0], [2.0, -5.0]])
        >>> signal_svm(x, [0, 1, 1], [1.0, 0.0]).w
        array([1., 0.])
    """
    u = Strong(0.0, 0.0, basis).basis
    fitted = classifier_of(train_svm(points_of(x, len(u)) @ u, y, c=c, loss=loss))
    return LinearClassifier(u @ fitted.w, fitted.b)


def penalised_svm(
    x: Any, y: Any, basis: Any, *, penalty: float = 100.0, c: float = 1.0, loss: str = "hinge"
) -> LinearClassifier:
    """The SVM min ½‖UUᵀw‖² + ½·penalty·‖w − UUᵀw‖² + C Σ ℓ: what is no signal costs more.

    With the points' part across the signal divided by √penalty it is the plain SVM, so it goes
    from that (penalty 1) to the signal's alone (∞).

    Args:
        x, y, basis, c, loss: as in `signal_svm`.
        penalty: > 0.

    Source: theory L5.

    Example:
        >>> x = np.array([[-1.0, -1.0], [1.0, 1.0]])
        >>> penalised_svm(x, [0, 1], [1.0, 0.0], penalty=9.0).w.round(3)
        array([0.9, 0.1])
    """
    check_number("penalty", penalty, low=0, low_open=True)
    u = Strong(0.0, 0.0, basis).basis
    points = points_of(x, len(u))
    root = np.sqrt(penalty)

    def shrink(v: Array) -> Array:
        inside = (v @ u) @ u.T
        return inside + (v - inside) / root

    fitted = classifier_of(train_svm(shrink(points), y, c=c, loss=loss))
    return LinearClassifier(shrink(fitted.w), fitted.b)


def robust_svm(x: Any, y: Any, threat: Threat | PixelThreat, *, c: float = 1.0) -> LinearClassifier:
    """The SVM on the worst perturbed points: min ½‖w‖² + C Σ max(0, 1 − y_i(wᵀx_i + b) + r(w)).

    The reach r is the dual norm of the threat set V, so the problem is convex. Its dual is
    max A − ½‖w‖² over 0 ≤ α_i ≤ C with Σα_i y_i = 0, where A = Σα_i and w = s − A·P_V(s/A),
    s = Σα_i y_i x_i: the SVM whose every support vector is moved by the same worst v = P_V(s/A).
    Accelerated projected gradient steps in α, to a relative duality gap of 1e-5.

    Args:
        x: points [n, d].
        y: two labels, [n]; the larger one is +1.
        threat: with single radii; a ball of p = 1, 2 or ∞, or the strong threat.
        c: `C`.

    Raises:
        InputError: another p, or classes that cannot be told apart under the threat (w = 0).

    Source: theory L5; robust SVMs as in Xu, Caramanis and Mannor (2009).

    Example:
        >>> x = np.array([[-2.0, -1.0], [2.0, 1.0]])
        >>> robust_svm(x, [0, 1], Strong(1.5, 0.5, [1.0, 0.0]), c=100.0).w.round(3)  # 1/(2 − ½)
        array([0.667, 0.   ])
    """
    threat = single(threat)
    check_number("C", c, low=0, low_open=True)
    if not has_projection(threat):
        raise InputError("p", expected="1, 2 or ∞ for a robust SVM", got="another one")
    points, sides = _examples(x, y)
    if isinstance(threat, Strong):
        fitting(threat, points[0])
    points = sides[:, None] * points
    n = len(points)

    def primal(alpha: Array) -> tuple[Array, float, float]:
        """w of these multipliers, its reach, and the dual's value."""
        total, moved = alpha.sum(), alpha @ points
        v = nearest(moved / total, threat) if total > 0 else np.zeros(points.shape[1])
        w = moved - total * v
        return w, float(w @ v), float(total - w @ w / 2)

    def balance(z: Array, multiplier: float) -> float:
        return float(sides @ np.clip(z - multiplier * sides, 0, c))

    def feasible(z: Array) -> tuple[Array, float]:
        """The nearest α, and the multiplier of Σα_i y_i = 0."""
        high = np.abs(z).max() + c
        low, middle = -high, 0.0
        for _ in range(60):
            low, high = (middle, high) if balance(z, middle) > 0 else (low, middle)
            middle = (low + high) / 2
        return np.clip(z - middle * sides, 0, c), middle

    step = 1 / (np.linalg.norm(points, 2) + float(threat.epsilon) * np.sqrt(n)) ** 2
    alpha = ahead = feasible(np.full(n, min(c, 1 / n)))[0]
    # w = 0 says one class always. What beats it by rounding alone is no classifier either.
    momentum, best, w, b = 1.0, c * (n - abs(sides.sum())), np.zeros(points.shape[1]), 0.0
    for _ in range(20_000):
        w_ahead, r_ahead, value = primal(ahead)
        gradient = 1 - points @ w_ahead + r_ahead
        while True:
            following, multiplier = feasible(ahead + step * gradient)
            w_next, r_next, dual_value = primal(following)
            moved = following - ahead
            promised = value + gradient @ moved - moved @ moved / (2 * step)
            if dual_value >= promised - 1e-12 * abs(value):
                break
            step /= 2
        lack = 1 - points @ w_next - sides * (multiplier / step) + r_next
        primal_value = float(w_next @ w_next / 2 + c * np.maximum(lack, 0).sum())
        if primal_value < best * (1 - 1e-12):
            best, w, b = primal_value, w_next, multiplier / step
        if best - dual_value <= (1e-5 if w.any() else 1e-10) * best:
            break
        if (ahead - following) @ (following - alpha) > 0:
            momentum = 1.0
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / grown * (following - alpha)
        alpha, momentum = following, grown
        step *= 1.05
    if not w.any():
        raise InputError(
            "robust SVM",
            expected="classes that it can tell apart",
            got="w = 0",
            fix="lower the radii, or raise C",
        )
    return LinearClassifier(w, b)


METHODS = ("plain", "signal", "penalised", "robust")
"""SVMs that know nothing; the signal alone; that other directions count less; the threat."""


def knowing_svms(
    x: Any,
    y: Any,
    threat: Strong,
    *,
    c: float = 1.0,
    penalty: float = 100.0,
    loss: str = "hinge",
    methods: Sequence[str] = METHODS,
) -> dict[str, LinearClassifier]:
    """The SVMs of `METHODS` on the same points.

    Args:
        x: points [n, d].
        y: two labels, [n].
        threat: its basis is the signal; its radii count for `robust` only.
        c: `C` of all of them.
        penalty: of `penalised`.
        loss: of all but `robust`, which has the hinge.
        methods: which ones.

    Returns:
        Classifier by method.

    Raises:
        InputError: as `train_svm` and `robust_svm`, an unknown method, a threat without a signal.
    """
    threat = strong_of(threat)
    train: Mapping[str, Callable[[], LinearClassifier]] = {
        "plain": lambda: classifier_of(train_svm(x, y, c=c, loss=loss)),
        "signal": lambda: signal_svm(x, y, threat.basis, c=c, loss=loss),
        "penalised": lambda: penalised_svm(x, y, threat.basis, penalty=penalty, c=c, loss=loss),
        "robust": lambda: robust_svm(x, y, threat, c=c),
    }
    if not methods:
        raise InputError("methods", expected="one method or more", got="none")
    for method in methods:
        choose("method", method, train)
    return {method: train[method]() for method in methods}


def discriminant_basis(x: Any, y: Any) -> Array:
    """The leading discriminants of C classes: Σ⁻¹ times the differences of their means.

    Σ is the common covariance, shrunk towards σ²I as Ledoit and Wolf (2004) say, so it may be
    singular in the data.

    Args:
        x: points [n, *shape], d entries each.
        y: labels of C ≥ 2 classes, [n].

    Returns:
        [d, C − 1], orthonormal; `threats.class_mean_basis` is the one without Σ⁻¹.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 9.0]
        >>> y = np.arange(200) % 2
        >>> x += y[:, None] * [[1.0, 1.0]]
        >>> bool(abs(discriminant_basis(x, y)[0, 0]) > 0.9)
        True
    """
    from sklearn.covariance import ledoit_wolf

    points = rows_of(x)
    labels, known = classes(y, len(points))
    if len(known) < 2:
        raise InputError("labels", expected="two classes or more", got=f"{len(known)}")
    means = np.stack([points[labels == label].mean(0) for label in known])
    covariance, _ = ledoit_wolf(points - means[np.searchsorted(known, labels)])
    return orthonormal(scipy.linalg.pinvh(covariance) @ (means[1:] - means[0]).T)
