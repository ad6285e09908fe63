"""Singular kernels, linear classifiers, and interval bounds of operations that networks have."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.special

from ntk_awt import masks, threats
from ntk_awt.app.config import ModelConfig
from ntk_awt.attacks import PGD
from ntk_awt.kernels import analytic
from ntk_awt.masks import Ticket
from ntk_awt.robustness.certified import intervals
from ntk_awt.theory import linear
from ntk_awt.theory.dynamics import existence, flow, infinite, preservation
from ntk_awt.threats import Linf
from proofs_check import core
from proofs_check import runner as verification
from tests.situations import Outcome, near, refused, same, situation, warned

# Any: NumPy's arrays are taken as well.
frozen: Any = flow.frozen
train: Any = infinite.adversarial_training
prior_gap: Any = preservation.prior_gap

# ---------------------------------------------------------------- singular kernels


def _on_a_line(dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Θ(X, X), Θ(Z, X) and y of 100 points on a line: without bias the kernel is singular."""
    x = np.linspace(-30.0, 30.0, 100)[:, None]
    z = (x[1:] + x[:-1]) / 2
    config = ModelConfig(parametrization="ntk", activation="relu", weight_std=1.5, bias_std=0.0)
    with jax.enable_x64(dtype == np.float64):
        kernel = analytic.network(config, (1,), 1).kernel_fn
        points, others = x.astype(dtype), z.astype(dtype)
        return (
            np.asarray(kernel(points, None).ntk),
            np.asarray(kernel(others, points).ntk),
            np.sin(x / 10).astype(dtype),
        )


def _integrated(kernel_xx: Any, kernel_zx: Any, y: Any, t: float) -> np.ndarray:
    """f_t(Z) from f_0 = 0 by one matrix exponential: Θ(Z, X)/N times the integral of y − f."""
    n = len(y)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n], system[:n, n:] = -kernel_xx / n, y
    return kernel_zx @ scipy.linalg.expm(t * system)[:n, n:] / n


@situation("theory: frozen flow of a kernel that is singular, in float32")
def _() -> Outcome:
    right = _integrated(*_on_a_line(np.float64), 1e4)
    kernel_xx, kernel_zx, y = _on_a_line(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its least eigenvalue is where the warning begins
        found = frozen(kernel_xx, 0 * y, y, [1e4], kernel_zx=kernel_zx, f_z=0 * kernel_zx[:, :1])
    assert found.z is not None
    return near(found.z[0], right, absolute=0.01)


def _factors(rank: int, n: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, rank] of training points, of 5 others, and targets; float64."""
    rng = np.random.default_rng(rank)
    return rng.normal(size=(n, rank)), rng.normal(size=(5, rank)), rng.normal(size=(n, 1))


def _limit(step: float | None) -> Outcome:
    phi, psi, y = _factors(4)
    single = [a.astype(np.float32) for a in (phi @ phi.T, 0 * y, y)]
    other = {"kernel_zx": (psi @ phi.T).astype(np.float32), "f_z": np.zeros((5, 1), np.float32)}
    found = frozen(*single, [np.inf], step=step, **other)
    weights = np.linalg.lstsq(phi, y)[0]
    right = np.concatenate([phi @ weights, psi @ weights])
    return near(np.concatenate([found.x[0], found.z[0]]), right, absolute=1e-4)


@situation("theory: limit of the frozen flow, t = ∞, singular kernel")
def _() -> Outcome:
    return _limit(None)


@situation("theory: limit of gradient steps, k = ∞, singular kernel")
def _() -> Outcome:
    return _limit(0.3)


def _spoilt(size: float) -> np.ndarray:
    """A singular kernel less `size` times the identity, in parts of N·u·λ_max of float32."""
    phi = _factors(4)[0]
    kernel = phi @ phi.T
    unit = len(kernel) * 2.0**-24 * np.linalg.eigvalsh(kernel)[-1]
    return (kernel - size * unit * np.eye(len(kernel))).astype(np.float32)


@situation("theory: a kernel that is more negative than rounding")
def _() -> Outcome:
    y = _factors(4)[2].astype(np.float32)
    return warned(lambda: frozen(_spoilt(8), 0 * y, y, [1.0]), "count as 0", "float64")


@situation("theory: gap of two singular kernels, in float32")
def _() -> Outcome:
    """The gap of D' = −Θ r, whose integral is as bounded as both flows."""
    (phi, _, y), chi = _factors(3), _factors(4)[0]
    wide, narrow = phi @ phi.T, chi @ chi.T
    t = 1e7
    outputs = [
        y - scipy.linalg.expm(-t / len(y) * kernel) @ y for kernel in (wide, narrow)
    ]  # both from 0
    start = np.zeros_like(y, np.float32)
    pair = [preservation.Frozen(k.astype(np.float32), start) for k in (wide, narrow)]
    found = prior_gap(*pair, y.astype(np.float32), [t])
    return near(found[0], outputs[0] - outputs[1], absolute=1e-3)


@situation("theory: bound on the gap where the least eigenvalue is rounding")
def _() -> Outcome:
    """β + min(t, N/0)·α·r_0 with β = 0: linear in t for ever."""
    y, t = _factors(4)[2].astype(np.float32), 1e9
    start, kernel = 0 * y, _spoilt(-0.5)  # λ_min = N·u·λ_max/2 > 0
    pair = preservation.Frozen(kernel, start), preservation.Frozen(kernel / 2, start)
    alpha = np.linalg.norm(kernel / 2) / len(y)
    residual = np.linalg.norm(y) / np.sqrt(len(y))
    return near(preservation.prior_bound(*pair, y, [t]), [t * alpha * residual], relative=1e-5)


def _linear_kernel(x1: Any, x2: Any = None) -> Any:
    return SimpleNamespace(ntk=x1 @ (x1 if x2 is None else x2).T)


@situation("theory: infinitely wide training on more points than features, in float32")
def _() -> Outcome:
    """f(x) = ⟨w, x⟩ ends at least squares, whatever the phases; ε = 0, so nothing moves."""
    phi, psi, y = _factors(3)
    phi, psi = phi / 10, psi / 10
    training = train(
        _linear_kernel, phi.astype(np.float32), y.astype(np.float32), threat=Linf(0.0, (-1.0, 1.0)),
        attack=PGD(steps=1, random_start=False), key=jax.random.key(0), phases=2, phase_time=1e9,
    )  # fmt: skip
    found = infinite.predict(_linear_kernel, training, jnp.asarray(psi, jnp.float32))[-1]
    return near(found, psi @ np.linalg.lstsq(phi, y)[0], absolute=1e-3)


def _indefinite_kernel(x1: Any, x2: Any = None) -> Any:
    return SimpleNamespace(ntk=-_linear_kernel(x1, x2).ntk)


@situation("theory: infinitely wide training with a kernel that is not one")
def _() -> Outcome:
    x = np.eye(2, dtype=np.float32)
    return refused(
        lambda: train(
            _indefinite_kernel, x, x, threat=Linf(0.0), attack=PGD(steps=1, random_start=False),
            key=jax.random.key(0), phases=1, phase_time=1.0,
        ),
        "kernel of phase 0", "positive semidefinite",
    )  # fmt: skip


# ---------------------------------------------------------------- precision


@situation("theory: frozen flow in float16")
def _() -> Outcome:
    f = np.full((3, 1), 300, np.float16)
    found = frozen(200 * np.eye(3, dtype=np.float16), f, 0 * f, [0.01])
    return near(found.x[0], np.full((3, 1), 300 * np.exp(-2 / 3)), relative=1e-6)


def _followed(dtype: Any, scale: float = 1.0) -> preservation.Trajectory:
    ones: Any = jnp.ones((1, 4, 1), dtype)
    return preservation.Trajectory(
        z=ones[0], x=ones, outputs=scale * jnp.ones((2, 4, 1), dtype), gradients=ones,
        kernels=jnp.full((1, 4, 4, 1, 1), 200, dtype), remainders=0 * ones,
    )  # fmt: skip


@situation("theory: bound on a gap in float16, whose squares overflow")
def _() -> Outcome:
    found = preservation.posterior_bound(
        _followed(np.float16, 300.0), _followed(np.float16, 0.0), 1.0
    )
    return near(found, [600.0, 600.0], relative=1e-6)


@situation("theory: bound on a gap of NaN")
def _() -> Outcome:
    pair = _followed(np.float32), _followed(np.float32, np.nan)
    return refused(lambda: preservation.posterior_bound(*pair, 1.0), "sparse outputs", "NaN")


@situation("theory: frozen flow with complex targets")
def _() -> Outcome:
    f = np.ones((2, 1), np.float32)
    return refused(lambda: frozen(np.eye(2), f, 1j * f, [1.0]), "y: expected real numbers")


@situation("theory: loss gradient in float16 of logits that are far apart")
def _() -> Outcome:
    """Four classes with equal logits but for one 8 below: p = e^{−8}/(3 + e^{−8}) = 1.1e-4."""
    logits, targets = jnp.array([[8.0, 8, 8, 0]], jnp.float16), jnp.zeros((1, 4), jnp.float16)
    share = np.exp(-8) / (3 + np.exp(-8))
    found = flow.loss_gradient("cross-entropy", logits, targets)
    return near(found[0, 3] / share, 1.0, absolute=1e-5)


# ---------------------------------------------------------------- labels of two classes

MODEL = linear.LinearClassifier([1.0, -1.0])
POINTS = np.array([[0.0, 2.0], [3.0, 1.0], [2.0, 0.0]])


LABELS: dict[str, tuple[Any, str]] = {
    "0 and 1": ([0, 1, 1], "got 0, 1; make them of two classes with linear.signs"),
    "bools": ([False, True, True], "dtype bool"),
    "NaN": ([-1.0, np.nan, 1.0], "nan"),
    "halves": ([-0.5, 0.5, 0.5], "got -0.5, 0.5"),
    "a column, which broadcasts": ([[-1], [1], [1]], "shape (3, 1)"),
    "too few": ([1, -1], "shape (2,)"),
}

CALLS: dict[str, Callable[[Any], Any]] = {
    "margins": lambda y: MODEL.margins(POINTS, y),
    "certified radius": lambda y: linear.certified_radius(MODEL, POINTS, y),
}


def _refused_labels(call: Callable[[Any], Any], y: Any, text: str) -> Callable[[], Outcome]:
    return lambda: refused(lambda: call(y), "labels: expected", text)


for _name, _call in CALLS.items():
    for _kind, (_y, _text) in LABELS.items():
        situation(f"theory: {_name} of labels that are {_kind}")(_refused_labels(_call, _y, _text))

situation("theory: worst perturbation of label 0")(
    _refused_labels(lambda y: linear.worst_perturbation(MODEL, y, linear.Ball(1.0)), 0, "got 0")
)

TRAINED: dict[str, tuple[Any, str]] = {
    "one class": ([1, 1, 1], "two classes, got 1: 1"),
    "three classes": ([0, 1, 2], "two classes, got 3: 0, 1, 2"),
    "NaN": ([0, 1, np.nan], "nan among them"),
    "halves": ([0.5, 1.5, 0.5], "0.5 among them"),
    "too few": ([0, 1], "shape (2,)"),
}

TRAININGS: dict[str, Callable[[Any], Any]] = {
    "SVM": lambda y: linear.train_svm(POINTS, y).coef_,
    "SVM of the signal": lambda y: linear.signal_svm(POINTS, y, [1.0, 0.0]).w,
    "penalised SVM": lambda y: linear.penalised_svm(POINTS, y, [1.0, 0.0]).w,
    "robust SVM": lambda y: linear.robust_svm(POINTS, y, linear.Ball(0.1)).w,
}

for _name, _call in TRAININGS.items():
    for _kind, (_y, _text) in TRAINED.items():
        if (_name, _kind) != ("robust SVM", "one class"):  # was refused
            situation(f"theory: {_name} of labels of {_kind}")(_refused_labels(_call, _y, _text))


@situation("theory: labels of any two classes as −1 and +1")
def _() -> Outcome:
    """y(wᵀx + b) of the second class is +(x₀ − x₁)."""
    found = [MODEL.margins(POINTS, linear.signs(y)) for y in ([3, 7, 7], ["a", "b", "b"])]
    return near(found, [[2.0, 2.0, 2.0]] * 2)


# ---------------------------------------------------------------- threats of the formulas

CLASSES = linear.symmetric([1.0, 0.5])
EVERYWHERE = (-np.inf, np.inf)


@situation("theory: rates under threats.L2: the strong threat with δ = ε")
def _() -> Outcome:
    pair = threats.L2(0.5, EVERYWHERE), linear.Strong(0.5, 0.5, [1.0, 0.0])
    found, right = (linear.rates(MODEL, CLASSES, threat).robust for threat in pair)
    return near(found, right, relative=1e-6)


@situation("theory: rates under threats.Linf: the ball of p = ∞")
def _() -> Outcome:
    """Φ((ε‖w‖₁ − m)/σ) with m = wᵀμ = 0.5 and σ = √2."""
    right = scipy.special.ndtr((2 * 0.25 - 0.5) / np.sqrt(2))
    return near(linear.rates(MODEL, CLASSES, threats.Linf(0.25, EVERYWHERE)).robust, right)


@situation("theory: rates under a threat with a pixel box")
def _() -> Outcome:
    return refused(
        lambda: linear.rates(MODEL, CLASSES, threats.L2(0.5)), "pixel box", "linear.Ball"
    )


@situation("theory: rates under something that is no threat")
def _() -> Outcome:
    call: Any = linear.rates
    return refused(lambda: call(MODEL, CLASSES, 0.5), "linear.Ball or linear.Strong, got float")


@situation("theory: SVMs of the signal without a signal")
def _() -> Outcome:
    call: Any = linear.knowing_svms
    return refused(lambda: call(POINTS, [0, 1, 1], linear.Ball(0.1)), "linear.Strong", "a ball")


NUMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "no training point": (lambda: linear.mean_difference_cosine(0, 3, 1.0), "n: expected"),
    "no dimension": (lambda: linear.ridge_cosine(3, 0, 1.0), "d: expected"),
    "σ = 0": (lambda: linear.svm_cosine(10, 5, 1.0, 0.0, c=1.0), "sigma: expected"),
    "negative ‖μ‖": (lambda: linear.mean_difference_cosine(3, 3, -1.0), "mean norm: expected"),
    "negative ε": (lambda: linear.best_isotropic_error(1.0, -1.0), "epsilon: expected"),
    "σ of NaN": (lambda: linear.best_isotropic_error(1.0, 1.0, sigma=np.nan), "sigma: expected"),
    "no trial": (lambda: linear.binomial_interval(0.5, 0)[0], "trials: expected"),
    "probability 2": (lambda: linear.binomial_interval(2.0, 5)[0], "probability: expected"),
    "points of NaN": (lambda: MODEL.margins(POINTS * np.nan, [1, 1, 1]), "points: expected"),
    "points of another d": (lambda: MODEL.margins(POINTS[:, :1], [1, 1, 1]), "points: expected"),
    "discriminants of no point": (
        lambda: linear.discriminant_basis(np.zeros((0, 2)), []), "points: expected",
    ),
    "discriminants of NaN": (
        lambda: linear.discriminant_basis(POINTS, [0, 1, np.nan]), "nan among them",
    ),
    "no dimension of classes": (lambda: linear.Gaussians(np.zeros((2, 0))).means, "means:"),
    "simulation in another dimension": (
        lambda: linear.simulate(
            MODEL, linear.symmetric([1.0]), linear.Ball(0.1), 5, np.random.default_rng(0)
        ),
        "classifier w: expected 1",
    ),
}  # fmt: skip


def _refused_number(call: Callable[[], Any], text: str) -> Callable[[], Outcome]:
    return lambda: refused(call, text)


for _name, (_bad, _text) in NUMBERS.items():
    situation(f"theory: linear classes, {_name}")(_refused_number(_bad, _text))


# ---------------------------------------------------------------- interval bounds

_E = np.e
BOUNDED: dict[str, tuple[Callable[[Any], Any], float, float]] = {
    "abs": (jnp.abs, 0.0, 2.0),
    "leaky ReLU": (jax.nn.leaky_relu, -0.02, 1.0),
    "ELU": (jax.nn.elu, _E**-2 - 1, 1.0),
    "softplus": (jax.nn.softplus, np.log1p(_E**-2), np.log1p(_E)),
    "SiLU": (jax.nn.silu, -0.278464542761, _E / (1 + _E)),
    "GELU with tanh": (jax.nn.gelu, -0.170040639661, 0.841191990608),
    "mish": (jax.nn.mish, -0.308840645687, 0.865098388267),
    "hard SiLU": (jax.nn.hard_swish, -0.375, 2 / 3),
    "hard tanh": (jax.nn.hard_tanh, -1.0, 1.0),
    "square": (jnp.square, 0.0, 4.0),
    "cube": (lambda x: x**3, -8.0, 1.0),
    "square root": (lambda x: jnp.sqrt(x + 3), 1.0, 2.0),
    "logarithm": (lambda x: jnp.log(x + 3), 0.0, np.log(4)),
    "inverse": (lambda x: 1 / (x + 3), 0.25, 1.0),
    "inverse root": (lambda x: jax.lax.rsqrt(x + 3), 0.5, 1.0),
    "a case": (lambda x: jnp.where(x > 0, 3.0, -1.0), -1.0, 3.0),
    "clamp": (lambda x: jax.lax.clamp(-1.0, x, 0.5), -1.0, 0.5),
}
"""Functions, and their least and largest values on [−2, 1]."""


def _bounded(function: Callable[[Any], Any], x: Any, radius: Any) -> intervals.Bounds:
    threat: Any = threats.Linf(np.float32(1.0), EVERYWHERE)
    return intervals.output_bounds(
        lambda w, z: function(w * z + x), np.asarray(radius, np.float32),
        np.zeros_like(x, np.float32), threat,
    )  # fmt: skip


def _bounds_of(function: Callable[[Any], Any], *ends: float) -> Callable[[], Outcome]:
    def outcome() -> Outcome:
        found = _bounded(function, np.full((1, 1), -0.5, np.float32), [1.5])
        return near(np.ravel(found), ends, absolute=1e-4)  # outward rounding of float32

    return outcome


for _name, (_function, _least, _largest) in BOUNDED.items():
    situation(f"theory: bounds of {_name} on [−2, 1]")(_bounds_of(_function, _least, _largest))

LOGITS = np.array([[0.0, 1.0, -1.0]], np.float32)
RADII = np.array([0.5, 0.25, 1.0], np.float32)


def _extreme_softmax(function: Callable[[Any], Any]) -> np.ndarray:
    """Each entry at its least and largest: its own logit at one end, all others at the other."""
    rows = []
    for sign in (-1, 1):
        signs = sign * (2 * np.eye(3) - 1)
        rows.append(np.diag(function(LOGITS.astype(float) + signs * RADII)))
    return np.stack(rows)


@situation("theory: bounds of softmax")
def _() -> Outcome:
    found = _bounded(jax.nn.softmax, LOGITS, RADII)
    right = _extreme_softmax(lambda f: scipy.special.softmax(f, axis=1))
    return near(np.concatenate(found), right, absolute=1e-4)


@situation("theory: bounds of log-softmax")
def _() -> Outcome:
    found = _bounded(jax.nn.log_softmax, LOGITS, RADII)
    right = _extreme_softmax(lambda f: scipy.special.log_softmax(f, axis=1))
    return near(np.concatenate(found), right, absolute=1e-4)


@situation("theory: bounds of a normalised layer hold its values")
def _() -> Outcome:
    """No corner of the box is outside, and the bounds are finite."""

    def layer(x: Any) -> Any:
        return x / jnp.sqrt(jnp.mean(x**2, 1, keepdims=True) + 1)

    lower, upper = map(np.asarray, _bounded(layer, LOGITS, RADII))
    corners = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 3)
    values = np.asarray(layer(LOGITS + corners * RADII))
    return same(bool(((values >= lower) & (values <= upper)).all()), True)


@situation("theory: bounds of images in float16")
def _() -> Outcome:
    """The sum of 4000 pixels of 1 ± 0: in float16 sums stand still at 2048."""
    found = intervals.output_bounds(
        lambda w, x: x.sum(1, keepdims=True) * w, np.float32(1.0), np.ones((1, 4000), np.float16),
        threats.Linf(0.0),
    )  # fmt: skip
    return near(np.ravel(found), [4000.0, 4000.0], relative=2e-3)


@situation("theory: bounds of a division by what may be zero")
def _() -> Outcome:
    return refused(lambda: _bounded(lambda x: 1 / x, np.zeros((1, 1)), [1.0]).lower, "its domain")


@situation("theory: bounds of a network that computes in float16")
def _() -> Outcome:
    x = np.zeros((1, 1), np.float32)
    text = "from float32 to float16"
    return refused(lambda: _bounded(lambda z: z.astype(jnp.float16), x, [1.0]).lower, text)


# ---------------------------------------------------------------- inputs of another kind


def _path() -> Ticket:
    """Two values of a weight [1, 2]."""
    w = jnp.array([[[1.0, 0.0]], [[0.9, 0.1]]])
    return Ticket(w, masks.ones(w[0]), masks.unit_gain(w[0]))


def _product(w: Any, x: Any) -> Any:
    return x @ w


def _followed_with(y: Any, value: float = 1.0) -> Any:
    x: Any = jnp.full((1, 1, 1), value)
    return preservation.trajectory(_product, _path(), x, np.array(y), x[0]).outputs


def _trained_with(**change: Any) -> Any:
    given = {"x": jnp.eye(2), "y": jnp.ones((2, 1)), "threat": threats.Linf(0.0),
             "attack": PGD(steps=1, random_start=False)}  # fmt: skip
    return train(
        _linear_kernel, key=jax.random.key(0), phases=1, phase_time=1.0, **given | change
    ).outputs


def _attacked_by(threat: Any) -> Any:
    attack = PGD(random_start=False)
    x, y = np.ones((1, 1), np.float32), np.zeros(1, int)
    return preservation.attacked_path(_product, _path(), x, y, threat=threat, attack=attack)


_loose: Any = linear
INPUTS: dict[str, tuple[Callable[[], Any], str]] = {
    "trajectory of a label that is no class": (lambda: _followed_with([7]), "labels in 0…1"),
    "trajectory of labels of halves": (lambda: _followed_with([0.5]), "integer labels"),
    "trajectory of points of NaN": (lambda: _followed_with([0], np.nan), "x: expected finite"),
    "infinitely wide training, no output": (
        lambda: _trained_with(y=jnp.ones((2, 0))), "targets: expected an array [2, c]",
    ),
    "infinitely wide training, a threat of linear": (
        lambda: _trained_with(threat=linear.Ball(0.1)), "threats.Linf, L2 or StrongL2, got Ball",
    ),
    "infinitely wide training, no attack": (lambda: _trained_with(attack=3), "attack: expected"),
    "attacked path, a threat of linear": (lambda: _attacked_by(linear.Ball(0.1)), "got Ball"),
    "loss gradient of one image without its axis": (
        lambda: flow.loss_gradient("cross-entropy", jnp.zeros(2), jnp.zeros(2)), "axes [n, c]",
    ),
    "frozen flow, times that are words": (
        lambda: frozen(np.eye(1), np.ones((1, 1)), np.ones((1, 1)), ["a"]), "times: expected",
    ),
    "width that no computer holds": (
        lambda: existence.sufficient_width(1e-300, 1.0, 0.1, 0.5, 3, radius2=1.0, residual=1.0),
        "width: expected",
    ),
    "dual of p < 1": (lambda: linear.dual(0.5), "p: expected"),
    "reach of NaN": (lambda: linear.reach([np.nan], linear.Ball(1.0)), "w: expected finite"),
    "reach of a matrix": (lambda: linear.reach([[1.0, 2.0]], linear.Ball(1.0)), "shape (1, 2)"),
    "rates of no classes": (lambda: _loose.rates(MODEL, 3, linear.Ball(1.0)), "linear.Gaussians"),
    "a classifier of words": (lambda: linear.LinearClassifier(["a"]).w, "real numbers"),
    "a ball whose p is a word": (lambda: _loose.Ball(1.0, "2").epsilon, "p: expected"),
    "robust SVM, a signal of another dimension": (
        lambda: linear.robust_svm(POINTS, [0, 1, 1], linear.Strong(1.0, 1.0, [1.0, 0.0, 0.0])).w,
        "basis: expected 2 rows",
    ),
    "SVMs of no method": (
        lambda: linear.knowing_svms(POINTS, [0, 1, 1], linear.Strong(1, 1, [1.0, 0.0]), methods=[]),
        "methods: expected",
    ),
    "a phase diagram of no radius": (
        lambda: linear.phase_diagram(CLASSES, [], [0.1]).phase, "epsilon: expected a list",
    ),
    "an experiment of no case": (lambda: _loose.svm_experiment([3], [0]), "linear.SvmCase"),
}  # fmt: skip

for _name, (_bad, _text) in INPUTS.items():
    situation(f"theory: {_name}")(_refused_number(_bad, _text))


# ---------------------------------------------------------------- judges of statements


def _raises(call: Callable[[], Any], *words: str) -> Outcome:
    """A check that has nothing to judge is a mistake in it: a `ValueError`, never a yes."""
    try:
        return same(call(), f"ValueError: {words}")
    except ValueError as error:
        return same([word for word in words if word not in str(error)], [])


@situation("theory: two empty computations do not agree")
def _() -> Outcome:
    return _raises(lambda: core.close("none", [], [], tolerance=1e-9).holds, "none: shapes")


@situation("theory: an infinite tolerance is none")
def _() -> Outcome:
    return _raises(lambda: core.close("any", 1.0, 2.0, tolerance=np.inf).holds, "tolerance")


@situation("theory: a bound is not set against each value of another axis")
def _() -> Outcome:
    actual, bound = np.ones(3), np.array([[1.0], [2.0], [3.0]])
    return _raises(lambda: core.below("crossed", actual, bound).holds, "shapes (3,) and (3, 1)")


@situation("theory: a control of NaN has not been rejected")
def _() -> Outcome:
    return same(core.control("lost", core.below("lost", np.nan, 1.0), core.FORMULA).rejected, False)


@situation("theory: a case with a margin of NaN does not hold")
def _() -> Outcome:
    case = core.Case("lost", True, np.nan, None, "nothing")
    statement = verification.load("L1").statement
    controls = [core.Control("wrong", True, "seen", name) for name in statement.hypotheses]
    outcome = core.Outcome([case], controls)
    return same(verification.Result(statement, outcome, 0.0).holds, False)
