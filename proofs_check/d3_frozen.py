"""D3: training with a frozen kernel, in closed form.

The theory's formula with Θ(X̃, X̃)⁻¹ needs an invertible kernel; (1 − e^{−tλ/N})/λ for each
eigenvalue, t/N for λ = 0, is the same there and also right for a singular kernel, since Θ(Z, X̃)
maps the null space of Θ(X̃, X̃) to 0. The last instance has one. neural-tangents divides the loss by
all N·C entries of y, so its time is C times ours.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.special

from ntk_awt import masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.attacks import PGD
from ntk_awt.kernels import empirical
from ntk_awt.kernels.compat import linearize, predict
from ntk_awt.theory.dynamics.flow import frozen
from ntk_awt.threats import Linf
from ntk_awt.types import ApplyFn, Gain, Mask, Params
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
from proofs_check.instances.networks import draw, untrained

STATEMENT = Statement(
    number="D3",
    title="Frozen kernel",
    claim="with a frozen kernel, squared loss and fixed adversarial inputs, the outputs at all "
    "points and times are known in closed form",
    formula="f_t(X̃) = y + e^{−tΘ/N}(f_0 − y);  "
    "f_t(x) = f_0(x) − Θ(x, X̃) Θ(X̃, X̃)⁻¹ (I − e^{−tΘ/N})(f_0(X̃) − y)",
    hypotheses={
        "frozen": "frozen kernel: a linearised network, or infinite width",
        "squared loss": "½‖f − y‖² on the mean",
        "fixed inputs": "the same X̃ all the time",
        "semidefinite": "Θ(X̃, X̃) symmetric, positive semidefinite (it may be singular)",
        "masked Jacobian": "the kernel is that of the masked network",
        "step": "gradient steps: η ≤ 2N/λ_max",
    },
    instances="an MLP, dense and masked, with full kernels, and models linear in their parameters "
    "with Θ ⊗ I, regular and singular; points trained on and others",
    rule="equal to neural-tangents' prediction, to gradient flow and gradient steps of the "
    "linearised network in parameter space, and to the formula by a matrix exponential",
    tolerance="1e-8, a thousand times the integrator's; the statement asks for 1e-6",
    source="Lee et al. 2019; Shi et al. 2022 (AISTATS)",
)

CLASSES = 2
EPOCHS = np.array([0.0, 0.1, 0.5, 2.0, 10.0, 50.0])
"""Times in units of N/λ_max, the fastest mode's; the slow modes have then still to learn."""
COUNTS = np.array([0, 1, 2, 5, 20, 100])
"""Numbers of gradient steps."""
STEP = 1.5
"""η in units of N/λ_max: the fastest mode overshoots at every step, and converges."""
TOLERANCE = 1e-8


class _Instance(NamedTuple):
    """One network (dense, masked or another one), or a model that is linear in its parameters.

    Attributes:
        xx, zx: Θ(X̃, X̃), Θ(Z, X̃).
        f_x, f_z: outputs at the start.
        jacobian_x, jacobian_z: [n·C, parameters] by differentiation, no kernel engine.
        step: η.
        steps_x, steps_z: outputs of the linearised network after each of `COUNTS` gradient steps.
        full_xx, full_zx: kernels of the unmasked Jacobian.
    """

    xx: Any
    zx: Any
    f_x: Any
    f_z: Any
    jacobian_x: Any
    jacobian_z: Any
    step: Any
    steps_x: Any
    steps_z: Any
    full_xx: Any
    full_zx: Any


class _Outputs(NamedTuple):
    """Along the training: f_t(X̃) and f_t(Z), [times, n, C]."""

    x: Any
    z: Any


@partial(
    jax.jit,
    static_argnames="apply",
    compiler_options={"xla_backend_optimization_level": 0},  # it compiles longer than it runs
)
def _networks(
    apply: ApplyFn, drawn: tuple[Params, Mask, Gain], x: jax.Array, y: jax.Array, threat: Linf
) -> _Instance:
    """All networks at the adversarial inputs of the first one."""
    first = jax.tree.map(lambda leaf: leaf[0], drawn)

    def loss(z: jax.Array) -> jax.Array:
        return jnp.sum((masks.masked(apply, *first[1:])(first[0], z) - y) ** 2, -1) / 2

    keys = jax.random.split(jax.random.key(0), len(x))
    adversarial, _ = PGD(steps=10, random_start=False).run(loss, x, threat, keys)

    def one(network: tuple[Params, Mask, Gain]) -> _Instance:
        params, mask, gain = network
        function = masks.masked(apply, mask, gain)
        both = jnp.concatenate([adversarial, x])
        kernel = partial(empirical, apply, params, both, adversarial, mask=mask, gain=gain)
        kernels, full = kernel(), kernel(jacobian="full")
        n = len(x)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        jacobian = jax.jacobian(lambda w: function(unravel(w), both))(flat)
        jacobian = jacobian.reshape(2, n * CLASSES, -1)
        step = STEP * n / jnp.linalg.norm(jacobian[0], ord=2) ** 2
        linear = linearize(function, params)

        def descend(weights: Params, _: None) -> tuple[Params, jax.Array]:
            f = linear(weights, both)
            gradient = jax.grad(lambda w: jnp.sum((linear(w, adversarial) - y) ** 2) / (2 * n))
            return jax.tree.map(lambda w, g: w - step * g, weights, gradient(weights)), f

        _, outputs = jax.lax.scan(descend, params, length=int(COUNTS[-1]) + 1)
        f = function(params, both)
        steps = outputs[COUNTS]
        return _Instance(
            kernels[:n], kernels[n:], f[:n], f[n:], jacobian[0], jacobian[1], step,
            steps[:, :n], steps[:, n:], full[:n], full[n:],
        )  # fmt: skip

    return jax.lax.map(one, drawn)


def _linear_model(rng: np.random.Generator, features: int, points: int) -> _Instance:
    """f(x) = Wᵀφ(x) with random φ(x): Θ = ⟨φ, φ'⟩ ⊗ I, singular with fewer features than points."""
    phi_x, phi_z = rng.normal(size=(2, points, features)) / features**0.5
    weights = rng.normal(size=(features, CLASSES))
    xx, zx = phi_x @ phi_x.T, phi_z @ phi_x.T
    jacobian_x, jacobian_z = (np.kron(phi, np.eye(CLASSES)) for phi in (phi_x, phi_z))
    step = STEP * points / np.linalg.norm(phi_x, 2) ** 2
    none = np.zeros(0)
    return _Instance(
        xx, zx, phi_x @ weights, phi_z @ weights, jacobian_x, jacobian_z, step,
        none, none, none, none,
    )  # fmt: skip


# ---------------------------------------------------------------- references


def _matrix(kernel: np.ndarray) -> np.ndarray:
    """[m·C, n·C], row i·C + a; Θ ⊗ I of a kernel without outputs."""
    if kernel.ndim == 2:
        return np.kron(kernel, np.eye(CLASSES))
    return np.moveaxis(kernel, 2, 1).reshape(kernel.shape[0] * CLASSES, -1)


def _formula(found: _Instance, y: np.ndarray, times: np.ndarray) -> _Outputs:
    """The theory's formula, by the matrix exponential and a linear solver."""
    xx, zx, n = _matrix(found.xx), _matrix(found.zx), len(y)
    residual = (found.f_x - y).ravel()
    decays = [scipy.linalg.expm(-t * xx / n) @ residual for t in times]
    moved = [zx @ scipy.linalg.solve(xx, residual - decay, assume_a="pos") for decay in decays]
    x = [y + decay.reshape(y.shape) for decay in decays]
    return _Outputs(np.stack(x), np.stack([found.f_z - m.reshape(y.shape) for m in moved]))


def _integrated(
    found: _Instance,
    y: np.ndarray,
    times: np.ndarray,
    *,
    bend: float = 0.0,
    gradient: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda residual, y: residual,
    moving: bool = False,
) -> _Outputs:
    """Gradient flow of the linearised network in the space of its parameters.

    Controls alone change the rest: outputs f_0 + u + bend·u²/2 with u = Jw, whose kernel moves; the
    gradient of the loss, of f − y and y; and inputs that jump from X̃ to Z at the first time.
    """
    starts, jacobians = (found.f_x, found.f_z), (found.jacobian_x, found.jacobian_z)

    def velocity(t: float, w: np.ndarray) -> np.ndarray:
        place = int(moving and t > times[1])
        j, u = jacobians[place], jacobians[place] @ w
        residual = (starts[place] - y).ravel() + (u + bend * u**2 / 2)
        return -j.T @ ((1 + bend * u) * gradient(residual, y.ravel())) / len(y)

    solved = scipy.integrate.solve_ivp(
        velocity,
        (0, times[-1]),
        np.zeros(found.jacobian_x.shape[1]),
        method="DOP853",
        t_eval=times,
        rtol=1e-11,
        atol=1e-13,
    )
    moves = (jacobian @ solved.y for jacobian in jacobians)
    return _Outputs(
        *(
            f + (u + bend * u**2 / 2).T.reshape(-1, *y.shape)
            for f, u in zip(starts, moves, strict=True)
        )
    )


def _stepped(found: _Instance, y: np.ndarray) -> _Outputs:
    """Gradient steps of the model that is linear in its parameters, one after the other."""
    w, outputs = np.zeros(found.jacobian_x.shape[1]), []
    for _ in range(COUNTS[-1] + 1):
        x, z = found.jacobian_x @ w, found.jacobian_z @ w
        outputs.append((found.f_x + x.reshape(y.shape), found.f_z + z.reshape(y.shape)))
        residual = (outputs[-1][0] - y).ravel()
        w = w - found.step * found.jacobian_x.T @ residual / len(y)
    return _Outputs(*(np.stack([outputs[k][part] for k in COUNTS]) for part in (0, 1)))


def _neural_tangents(found: _Instance, y: np.ndarray, times: np.ndarray) -> _Outputs:
    """neural-tangents' prediction; its time is C times ours."""
    axes = () if found.xx.ndim == 4 else (-1,)
    arrays = jax.tree.map(jnp.asarray, (found.xx, y, found.f_x, found.f_z, found.zx))
    kernel, targets, *rest = arrays
    prediction = predict.gradient_descent_mse(kernel, targets, CLASSES, trace_axes=axes)
    return _Outputs(*map(np.asarray, jax.jit(prediction)(jnp.asarray(times), *rest)))


# ---------------------------------------------------------------- the check


def _frozen(found: _Instance, y: np.ndarray, moments: np.ndarray, **options: Any) -> _Outputs:
    kernels = {"kernel_xx": found.xx, "kernel_zx": found.zx} | options
    outputs = frozen(kernels.pop("kernel_xx"), found.f_x, y, moments, f_z=found.f_z, **kernels)
    return _Outputs(*outputs)


def _compare(name: str, found: _Outputs, expected: _Outputs) -> list[Case]:
    """At the points trained on and at the others."""
    places = (("X̃", found.x, expected.x), ("Z", found.z, expected.z))
    return [close(f"{name}, {place}", a, b, tolerance=TOLERANCE) for place, a, b in places]


def _times(found: _Instance) -> np.ndarray:
    return EPOCHS * STEP**-1 * float(found.step)  # step = STEP·N/λ_max


def _judge(name: str, found: _Instance, y: np.ndarray) -> list[Case]:
    """The library against every reference that fits."""
    times = _times(found)
    flow = _frozen(found, y, times)
    cases = _compare(f"{name}: parameter space", flow, _integrated(found, y, times))
    steps = found.steps_x.size and _Outputs(found.steps_x, found.steps_z)
    by_steps = _frozen(found, y, COUNTS, step=float(found.step))
    cases += _compare(f"{name}: gradient steps", by_steps, steps or _stepped(found, y))
    if np.linalg.matrix_rank(_matrix(found.xx)) == y.size:
        cases += _compare(f"{name}: neural-tangents", flow, _neural_tangents(found, y, times))
        cases += _compare(f"{name}: formula", flow, _formula(found, y, times))
    return cases


def _softmax_gradient(residual: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the cross-entropy."""
    f = (residual + y).reshape(-1, CLASSES)
    return scipy.special.softmax(f, axis=1).ravel() - y


def _controls(check: Recorder, found: _Instance, other: _Instance, y: np.ndarray) -> None:
    """Wrong formulas for the masked network, and kernels that the library has to refuse."""
    times = _times(found)

    def worst(outputs: _Outputs, expected: _Outputs) -> Case:
        return min(_compare("parameter space", outputs, expected), key=lambda case: case.margin)

    expected = _integrated(found, y, times)
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("1/N left out", {"n": 1}, FORMULA),
        ("Θ(X̃, Z) for Θ(Z, X̃)", {"kernel_zx": found.zx.swapaxes(0, 1)}, FORMULA),
        ("unmasked Jacobian", {"kernel_xx": found.full_xx, "kernel_zx": found.full_zx},
         "masked Jacobian"),
        ("another network's kernel", {"kernel_xx": other.xx, "kernel_zx": other.zx}, FORMULA),
        ("one gradient step a unit of time", {"step": float(found.step)}, FORMULA),
    ]  # fmt: skip
    for name, options, breaks in wrong:
        moments = COUNTS if "step" in options else times
        case = worst(_frozen(found, y, moments, **options), expected)
        check.control(name, case, breaks=breaks)
    flow = _frozen(found, y, times)
    trained: list[tuple[str, dict[str, Any], str]] = [
        ("a network that is not linear, from the same kernel", {"bend": 0.5}, "frozen"),
        ("cross-entropy", {"gradient": _softmax_gradient}, "squared loss"),
        ("inputs that move to Z", {"moving": True}, "fixed inputs"),
    ]
    for name, options, breaks in trained:
        check.control(name, worst(flow, _integrated(found, y, times, **options)), breaks=breaks)
    n = len(y)
    largest = STEP * n / float(found.step)
    shifted = found.xx - 0.1 * largest * np.einsum("ij,ab->ijab", np.eye(n), np.eye(CLASSES))
    refused: list[tuple[str, np.ndarray, dict[str, Any], str]] = [
        ("the mixed kernel Θ(X, X̃) for Θ(X̃, X̃)", times, {"kernel_xx": found.zx}, "semidefinite"),
        ("a kernel with negative eigenvalues", times, {"kernel_xx": shifted}, "semidefinite"),
        ("a step of 2.5·N/λ_max", COUNTS, {"step": 2.5 * n / largest}, "step"),
        ("negative times", -times, {}, FORMULA),
    ]
    for name, moments, options, breaks in refused:
        check.control(name, partial(_frozen, found, y, moments, **options), breaks=breaks)


def check(context: Context) -> Outcome:
    """The closed form against neural-tangents, and against training the linearised network."""
    points, width = context.pick((5, 12), (8, 24), (16, 64))
    rng = context.rng(1)
    x = rng.uniform(0, 1, (points, 6))
    y = np.eye(CLASSES)[rng.integers(0, CLASSES, points)]
    config = ModelConfig(widths=(width,), parametrization="ntk", activation="tanh")
    network = untrained(lambda key: models.build(config, (6,), CLASSES, key))
    dense, sparse = (draw(rng, network.params, density, 2) for density in (1.0, 0.5))
    drawn = jax.tree.map(lambda a, b: np.concatenate([a[:1], b]), dense, sparse)
    arrays = _networks(network.apply, drawn, jnp.asarray(x), jnp.asarray(y), Linf(0.1))
    stacked = _Instance(*(np.asarray(array, float) for array in arrays))
    first, masked, other = (_Instance(*(a[k] for a in stacked)) for k in range(3))
    context.progress(0.4)
    networks = {"dense": first, "masked": masked}
    instances = networks | {
        "Θ ⊗ I": _linear_model(rng, 2 * points, points),
        "singular Θ ⊗ I": _linear_model(rng, points // 2, points),
    }
    if context.size == "reduced":  # neural-tangents compiles anew for Θ ⊗ I
        del instances["dense"], instances["Θ ⊗ I"]
    check = Recorder(STATEMENT)
    for done, (name, instance) in enumerate(instances.items()):
        check.case(*_judge(name, instance, y))
        context.progress(0.4 + 0.5 * (done + 1) / len(instances))
    _controls(check, masked, other, y)
    check.panel(*_panels(networks, y))
    return check.outcome()


def _panels(instances: dict[str, _Instance], y: np.ndarray) -> Sequence[Panel]:
    """Distances from the targets and from the start, by integration and in closed form."""

    def panel(title: str, part: int, label: str) -> Panel:
        lines = []
        for name, found in instances.items():
            times, start = _times(found)[1:], (y, found.f_z)[part]
            integrated, exact = (
                np.linalg.norm(f(found, y, _times(found))[part] - start, axis=(1, 2))[1:]
                for f in (_integrated, _frozen)
            )
            lines.append(Line(f"{name}, linearised network", times, integrated))
            lines.append(Line(f"{name}, closed form", times, exact, "reference"))
        return Panel(title, "time", label, lines, xscale="log")

    return [
        panel("Points trained on", 0, "distance from the targets"),
        panel("Other points", 1, "distance from the start [logits]"),
    ]
