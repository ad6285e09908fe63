"""Infinitely wide adversarial training against slow loops, closed forms and neural-tangents."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ntk_awt.app.config import ModelConfig
from ntk_awt.attacks import PGD, example_keys
from ntk_awt.errors import InputError
from ntk_awt.kernels import analytic
from ntk_awt.kernels.compat import predict as nt_predict
from ntk_awt.theory.dynamics import infinite
from ntk_awt.theory.dynamics.infinite import InfiniteTraining, adversarial_training, predict
from ntk_awt.threats import L2, Linf
from tests.counting import Counting
from tests.keys import key_of

SLOW = (
    "test_results_have_the_dtype_of_the_images",
    "test_equals_a_slow_loop_over_phases kernel_fn-False",
)

STILL = PGD(steps=8, random_start=False)
N, SHAPE, CLASSES = 5, (3, 2), 2


class Kernel(NamedTuple):
    """What a kernel function returns here."""

    ntk: jax.Array


def linear(x1: jax.Array, x2: jax.Array | None = None) -> Kernel:
    """The kernel of f(x) = Wᵀx, which no width changes."""
    other = x1 if x2 is None else x2
    return Kernel(x1.reshape(len(x1), -1) @ other.reshape(len(other), -1).T)


def network(activation: str, **masks: Any) -> Callable[..., analytic.Kernels]:
    config = ModelConfig(widths=(1,), activation=activation, parametrization="ntk")
    return analytic.network(config, SHAPE, CLASSES, **masks).kernel_fn


KERNELS = {"erf": network("erf", density=(1.0, 0.2), kind="magnitude"), "relu": network("relu")}


def problem(dtype: Any = np.float64, c: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 0.8, (N, *SHAPE)).astype(dtype)
    return x, rng.normal(size=(N, c)).astype(dtype)


def train(kernel_fn: Any, x: Any, y: Any, **options: Any) -> InfiniteTraining:
    defaults: dict[str, Any] = {
        "threat": L2(0.2), "attack": STILL, "key": key_of(3), "phases": 4, "phase_time": 3.0,
    }  # fmt: skip
    return adversarial_training(kernel_fn, x, y, **defaults | options)


def close(found: Any, wanted: Any, tolerance: float = 1e-9) -> bool:
    error = np.linalg.norm(np.asarray(found) - np.asarray(wanted))
    return bool(error <= tolerance * np.linalg.norm(np.asarray(wanted)))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------- oracles


def slow_loop(
    kernel_fn: Any,
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    attack: Any,
    threat: Any,
    phases: int,
    time: float,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Points and outputs at z after each phase: the anchors so far, and matrix exponentials."""
    anchors: list[np.ndarray] = []
    steps: list[np.ndarray] = []

    def value(points: Any) -> Any:
        if not anchors:
            return jnp.zeros((len(points), y.shape[1]))
        return kernel_fn(points, jnp.concatenate(anchors)).ntk @ jnp.concatenate(steps)

    outputs = [np.asarray(value(jnp.asarray(z)))]
    for k in range(phases):
        keys = example_keys(jax.random.fold_in(key_of(3), k), jnp.arange(len(x)))

        def loss(points: Any) -> Any:
            return jnp.sum((value(points) - y) ** 2, -1) / 2

        run = jax.jit(lambda x, keys, loss=loss: attack.run(loss, x, threat, keys)[0])
        points = np.asarray(run(x, keys))
        kernel = np.asarray(kernel_fn(jnp.asarray(points), None).ntk)
        gone = np.eye(len(x)) - scipy.linalg.expm(-time / len(x) * kernel)
        step = np.linalg.solve(kernel, gone) @ (y - np.asarray(value(jnp.asarray(points))))
        anchors.append(points)
        steps.append(step)
        outputs.append(np.asarray(value(jnp.asarray(z))))
    return anchors, outputs


@pytest.mark.parametrize(("kernel_fn", "random_start"), [(KERNELS["relu"], False), (linear, True)])
def test_equals_a_slow_loop_over_phases(x64: None, kernel_fn: Any, random_start: bool):
    x, y = problem()
    z = np.random.default_rng(1).uniform(size=(3, *SHAPE))
    attack = PGD(steps=3, random_start=random_start)
    threat = Linf(0.1) if random_start else L2(0.2)
    training = train(kernel_fn, x, y, attack=attack, threat=threat, phases=3)
    points, outputs = slow_loop(kernel_fn, x, y, z, attack, threat, 3, 3.0)
    assert close(training.points, points, 1e-6)  # the step of the attack is rounded to float32
    found = predict(kernel_fn, training, jnp.asarray(z))
    assert found.shape == (4, 3, CLASSES)
    assert close(found, outputs, 1e-6)
    moved = np.linalg.norm((np.array(points) - x).reshape(3, -1), axis=1)
    assert moved[1] > 0.1
    assert (moved[0] > 0.1) == random_start  # f_0 = 0 gives no gradient
    # The comparison sees a wrong time, and points that do not follow the predictor.
    for change in {"phase_time": 3.1}, {"threat": replace(threat, epsilon=0.0)}:
        options = {"attack": attack, "threat": threat, "phases": 3} | change
        other = train(kernel_fn, x, y, **options)
        assert not close(predict(kernel_fn, other, jnp.asarray(z)), outputs, 1e-3)


def test_outputs_are_those_before_each_phase(x64: None):
    x, y = problem()
    training = train(KERNELS["erf"], x, y)
    for k in range(4):
        values = predict(KERNELS["erf"], training, training.points[k])
        assert close(training.outputs[k], values[k]) if k else not training.outputs[0].any()


@pytest.mark.parametrize("activation", KERNELS)
def test_without_attack_it_is_the_frozen_flow_of_neural_tangents(x64: None, activation: str):
    x, y = problem()
    z = jnp.asarray(np.random.default_rng(1).uniform(size=(3, *SHAPE)))
    kernel_fn = KERNELS[activation]
    training = train(kernel_fn, x, y, threat=L2(0.0), phase_time=30.0)
    k_xx, k_zx = kernel_fn(jnp.asarray(x)).ntk, kernel_fn(z, jnp.asarray(x)).ntk
    flow = nt_predict.gradient_descent_mse(k_xx, jnp.asarray(y), diag_reg=0.0)
    found = predict(kernel_fn, training, z)
    for phase, time in enumerate([0.0, 30.0, 60.0, 90.0, 120.0]):
        # Its loss is a mean over images and outputs.
        _, wanted = flow(time * CLASSES, jnp.zeros_like(y), jnp.zeros((3, CLASSES)), k_zx)
        assert close(found[phase], wanted, 1e-6) if phase else not found[0].any()


def dual(threat: Any, w: np.ndarray) -> np.ndarray:
    """Where ⟨w, v⟩ is largest over the ball."""
    radius = float(threat.epsilon)
    return radius * (np.sign(w) if isinstance(threat, Linf) else w / np.linalg.norm(w))


@pytest.mark.parametrize("threat", [Linf(0.05, (-9.0, 9.0)), L2(0.1, (-9.0, 9.0))])
def test_linear_network_in_closed_form(x64: None, threat: Any):
    rng = np.random.default_rng(2)
    x, y, w = rng.normal(size=(4, 3)), rng.normal(size=(4, 1)) * 3, rng.normal(size=3)
    start = jnp.asarray(w)[:, None]

    def initial(z: jax.Array) -> jax.Array:
        return z @ start

    options = {"threat": threat, "phases": 5, "phase_time": 0.5, "initial": initial}
    training = train(linear, x, y, **options)
    weights = predict(linear, training, jnp.eye(3), initial=initial)[..., 0]
    for k in range(5):
        assert close(weights[k], w, 1e-5)
        residuals = x @ w - y[:, 0]
        points = x + np.sign(residuals)[:, None] * dual(threat, w)
        assert close(training.points[k], points, 1e-5)  # the radius is rounded inwards
        # dw/dt = −(1/N) X̃ᵀ(X̃w − y)
        generator = np.zeros((4, 4))
        generator[:3, :3], generator[:3, 3] = -points.T @ points / 4, points.T @ y[:, 0] / 4
        w = (scipy.linalg.expm(0.5 * generator) @ np.append(w, 1.0))[:3]
    assert close(weights[5], w, 1e-5)


def test_a_singular_kernel_is_no_exception(x64: None):
    x, y = problem()
    x, y = np.concatenate([x, x[:1]]), np.concatenate([y, y[:1]])  # one image twice
    training = train(linear, x, y, threat=L2(0.0), phases=1, phase_time=2.0)
    kernel = np.asarray(linear(jnp.asarray(x)).ntk)
    wanted = y - scipy.linalg.expm(-2.0 / len(x) * kernel) @ y
    assert close(predict(linear, training, jnp.asarray(x))[1], wanted, 1e-8)


# ---------------------------------------------------------------- the predictor


@pytest.mark.parametrize("activation", KERNELS)
def test_gradient_of_the_predictor_is_that_of_differences(x64: None, activation: str):
    x, y = problem()
    training = train(KERNELS[activation], x, y)
    z = jnp.asarray(np.random.default_rng(5).uniform(size=(1, *SHAPE)))

    def value(z: jax.Array) -> jax.Array:
        return predict(KERNELS[activation], training, z)[-1, 0, 0]

    steps = 1e-5 * np.eye(6).reshape(6, 1, *SHAPE)
    differences = [float(value(z + h) - value(z - h)) / 2e-5 for h in steps]
    assert close(np.ravel(jax.grad(value)(z)), differences, 1e-6)


@pytest.mark.parametrize("activation", KERNELS)
def test_attack_starts_at_points_that_are_anchors(x64: None, activation: str):
    # There the kernel of relu has a kink; its gradient is the mean of both sides.
    x, y = problem()
    training = train(KERNELS[activation], x, y)
    before = predict(KERNELS[activation], training, jnp.asarray(x))[1]
    losses = [np.sum((np.asarray(f) - y) ** 2, -1) for f in (before, training.outputs[1])]
    assert np.all(losses[1] > losses[0] * 1.01)
    assert np.all(np.linalg.norm((training.points[1] - x).reshape(N, -1), axis=1) > 0.15)


def test_results_have_the_dtype_of_the_images():
    def outputs(dtype: Any) -> jax.Array:
        x, y = problem(dtype)
        training = train(linear, x, y.astype(np.float64))
        assert {leaf.dtype for leaf in training} == {np.dtype(dtype)}
        return predict(linear, training, jnp.asarray(x))

    found = [outputs(np.float32)]
    with jax.enable_x64(True):
        found += [outputs(np.float32), outputs(np.float64)]
    assert [values.dtype for values in found] == ["float32", "float32", "float64"]
    assert close(found[0], found[2], 1e-4)


# ---------------------------------------------------------------- compilation and input


def test_phases_are_traced_once():
    x, y = problem(np.float32)
    counts = []
    for phases in (2, 7):
        attack = Counting(STILL)
        train(linear, x, y, attack=attack, phases=phases)
        counts.append(len(attack.traces))
        train(linear, x + 0.01, 2 * y, attack=attack, phases=phases, phase_time=7.0, threat=L2(0.1))
        assert len(attack.traces) == counts[-1]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((5, 3, 2), int)}, "images: expected floating-point"),
        ({"x": np.full((5, 3, 2), 1.5)}, "images: expected values in"),
        ({"x": np.full((5, 3, 2), np.nan)}, "images: expected finite"),
        ({"x": np.zeros((0, 3, 2)), "y": np.zeros((0, 2))}, "targets: expected"),
        ({"y": np.zeros(5)}, r"targets: expected an array \[5, c\]"),
        ({"y": np.zeros((4, 2))}, r"targets: expected an array \[5, c\]"),
        ({"y": np.full((5, 2), np.inf)}, "targets: expected finite"),
        ({"phases": 0}, "phases: expected a whole number"),
        ({"phases": 2.0}, "phases: expected a whole number"),
        ({"phase_time": 0.0}, "phase_time: expected a number"),
        ({"phase_time": np.nan}, "phase_time: expected a number"),
        ({"threat": L2(-0.1)}, "epsilon: expected a number"),
        ({"kernel_fn": lambda a, b=None: Kernel(linear(a, b).ntk * jnp.nan)}, "expected finite"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str):
    x, y = problem(np.float32)
    arguments: dict[str, Any] = {"kernel_fn": linear, "x": x, "y": y} | change
    with pytest.raises(InputError, match=message) as caught:
        train(**arguments)
    assert "\n" not in str(caught.value)


def test_points_of_another_shape_are_refused():
    x, y = problem(np.float32)
    with pytest.raises(InputError, match=r"z: expected points \[m, 3, 2\], got shape \(5, 6\)"):
        predict(linear, train(linear, x, y), jnp.asarray(x).reshape(5, 6))


def test_zero_is_zero_everywhere():
    assert infinite.zero(jnp.ones((2, 3))) == 0.0
