"""D1: the outputs of adversarial training follow the mixed tangent kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.attacks import PGD
from ntk_awt.kernels import empirical
from ntk_awt.network import Network
from ntk_awt.theory.dynamics.flow import loss_gradient, output_change
from ntk_awt.threats import L2, Linf, Threat
from ntk_awt.types import ApplyFn, Gain, Key, Mask, Params
from proofs_check.core import (
    Context,
    Control,
    Line,
    Outcome,
    Panel,
    Statement,
    close,
    rejects,
    slope,
)

STATEMENT = Statement(
    number="D1",
    title="Flow of adversarial training",
    claim="a gradient step on the adversarial risk moves the outputs along the mixed tangent "
    "kernel, up to the square of the step",
    formula="df_t(x)/dt = −(1/N) Σ_j Θ_t(x, x̃_j) g_j;  "
    "‖f_{t+η}(X) − f_t(X) + (η/N) Θ_t(X, X̃) g‖ = O(η²)",
    hypotheses=(
        "twice differentiable activation",
        "the adversarial inputs stay where they are during the step",
        "columns of the kernel at the adversarial inputs; Jacobian of the masked network",
    ),
    instances="a dense MLP with tanh, a masked one with GELU, a masked CNN with tanh; both losses, "
    "inputs by PGD in L∞ and L2 balls; the step halved five times",
    rule="slope of the remainder in η inside 2 ± 0.1 (95 % interval over seeds); the instantaneous "
    "change equals forward differentiation along −∇R_adv",
    tolerance="slope: the cubic term bends it by about 0.01 (see SHARE); 1e-12 and 1e-10: rounding "
    "of sums over outputs, and over parameters, in float64",
    source="Shi et al. 2022 (AISTATS); Jacot et al. 2018",
)

CLASSES = 3
LOSSES = ("cross-entropy", "squared")
SHARE = 0.01
"""The largest step changes the outputs by this share of their norm.

Quadratic against cubic term of the remainder are then as 1 to about 0.01, which bends the slope by
about as much, and after five halvings the remainder is still 1e-8 of the outputs or more, 1e7 times
the rounding of float64.
"""
HALVINGS = 5
STEPS = 0.5 ** np.arange(HALVINGS + 1)


class _Setting(NamedTuple):
    """One network, dense (density 1: without a mask) or masked, and its threat model."""

    name: str
    network: Network
    density: float
    threat: Threat
    images: np.ndarray


class _Measured(NamedTuple):
    """Of each instance (loss × seed): what one gradient step did, and what it is compared with.

    Attributes:
        y: one-hot labels [N, C].
        adversarial: f(X̃) [N, C].
        before: f(X) [N, C]; after: [steps, N, C]; steps: η [steps].
        change: df/dt by the library [N, C]; derivative: the same by forward differentiation.
        mixed, clean, full: Θ(X, X̃); Θ(X, X); Θ(X, X̃) with the unmasked Jacobian, [N, N, C, C].
    """

    y: Any
    adversarial: Any
    before: Any
    after: Any
    steps: Any
    change: Any
    derivative: Any
    mixed: Any
    clean: Any
    full: Any


def untrained(make: Callable[[Key], Network]) -> Network:
    """A network with the shapes of its parameters alone: drawing them would be compiled."""
    applies = []

    def params(key: Key) -> Params:
        network = make(key)
        applies.append(network.apply)
        return network.params

    shapes = jax.eval_shape(params, jax.random.key(0))
    return Network(applies[0], shapes)


def draw(
    rng: np.random.Generator, shapes: Params, density: float, count: int
) -> tuple[Params, Mask, Gain]:
    """Weights N(0, 1) (NTK parametrisation), random masks and the gain 1/√p of `count` networks."""

    def mask(w: Any) -> np.ndarray:
        prune = density if len(w.shape) > 1 else 1.0
        return rng.random((count, *w.shape)) < prune

    def gain(w: Any) -> np.ndarray:
        return np.full(count, density**-0.5 if len(w.shape) > 1 else 1.0)

    weights = jax.tree.map(lambda w: rng.standard_normal((count, *w.shape)), shapes)
    return weights, jax.tree.map(mask, shapes), jax.tree.map(gain, shapes)


@partial(
    jax.jit,
    static_argnames=("apply", "dense"),
    compiler_options={"xla_backend_optimization_level": 0},  # it compiles longer than it runs
)
def _measure(
    apply: ApplyFn,
    dense: bool,
    threat: Threat,
    x: jax.Array,
    instances: tuple[Params, Mask, Gain, jax.Array, jax.Array],
) -> _Measured:
    def one(instance: tuple[Params, Mask, Gain, jax.Array, jax.Array]) -> _Measured:
        params, mask, gain, y, squared = instance
        if dense:
            mask = gain = None
        function = apply if dense else masks.masked(apply, mask, gain)

        def losses(weights: Params, z: jax.Array) -> jax.Array:
            f = function(weights, z)
            entropy = -jnp.sum(y * jax.nn.log_softmax(f), -1)
            return jnp.where(squared, jnp.sum((f - y) ** 2, -1) / 2, entropy)

        attack = PGD(steps=10, random_start=False)
        keys = jax.random.split(jax.random.key(0), len(x))
        adversarial, _ = attack.run(lambda z: losses(params, z), x, threat, keys)
        gradient = jax.grad(lambda w: losses(w, adversarial).mean())(params)
        backwards = jax.tree.map(jnp.negative, gradient)
        before, derivative = jax.jvp(lambda w: function(w, x), (params,), (backwards,))
        steps = SHARE * jnp.linalg.norm(before) / jnp.linalg.norm(derivative) * STEPS

        def after(step: jax.Array) -> jax.Array:
            return function(jax.tree.map(lambda w, g: w - step * g, params, gradient), x)

        kernel = partial(empirical, apply, params, x, mask=mask, gain=gain)
        mixed, clean = jnp.split(kernel(jnp.concatenate([adversarial, x])), 2, axis=1)
        full = mixed if dense else kernel(adversarial, jacobian="full")
        logits = function(params, adversarial)
        entropy, square = (loss_gradient(loss, logits, y) for loss in LOSSES)
        change = output_change(mixed, jnp.where(squared, square, entropy))
        return _Measured(
            y, logits, before, jax.vmap(after)(steps), steps, change, derivative,
            mixed, clean, full,
        )  # fmt: skip

    return jax.lax.map(one, instances)


def _gradients(logits: np.ndarray, y: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """∇_f ℓ of each instance, [instances, N, C]."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    softmax = powers / powers.sum(-1, keepdims=True)
    return np.where(squared[:, None, None], logits, softmax) - y


def _flow(kernel: np.ndarray, g: np.ndarray) -> np.ndarray:
    """−(1/N) Θ g for each instance."""
    return -np.einsum("sijab,sjb->sia", kernel, g) / g.shape[1]


def _remainders(found: _Measured, change: np.ndarray) -> np.ndarray:
    """‖f_{t+η}(X) − f_t(X) − η·change‖, [instances, steps]."""
    moved = found.after - found.before[:, None] - found.steps[..., None, None] * change[:, None]
    return np.linalg.norm(moved, axis=(2, 3))


def _settings(context: Context) -> list[_Setting]:
    rng = context.rng(1)
    flat, pictures = rng.uniform(0, 1, (6, 16)), rng.uniform(0, 1, (4, 6, 6, 1))

    def config(activation: str, **settings: Any) -> ModelConfig:
        return ModelConfig(parametrization="ntk", activation=activation, **settings)

    def mlp(activation: str) -> Network:
        chosen = config(activation, widths=(32, 32))
        return untrained(lambda key: models.build(chosen, (16,), CLASSES, key))

    def cnn(key: Key) -> Network:
        chosen = config("tanh", pooling="average")
        layers = {"blocks": ((6,), (8,)), "hidden": (16,), "rngs": nnx.Rngs(params=key)}
        return Network.from_nnx(models.Classifier((6, 6, 1), CLASSES, chosen, **layers))

    masked = _Setting("masked MLP, GELU, L∞", mlp("gelu"), 0.3, Linf(0.1), flat)
    if context.size == "reduced":
        return [masked]
    return [
        _Setting("dense MLP, tanh, L∞", mlp("tanh"), 1.0, Linf(0.1), flat),
        masked,
        _Setting("masked CNN, tanh, L2", untrained(cnn), 0.3, L2(0.5), pictures),
    ]


def check(context: Context) -> Outcome:
    """One gradient step on the adversarial risk against the kernel's prediction."""
    seeds = context.pick(3, 5, 20)
    squared = np.repeat([False, True], seeds)
    cases, controls, panels = [], [], []
    settings = _settings(context)
    for done, setting in enumerate(settings):
        rng = context.rng(2, done)
        labels = rng.integers(0, CLASSES, (len(squared), len(setting.images)))
        drawn = draw(rng, setting.network.params, setting.density, len(squared))
        instances = (*drawn, np.eye(CLASSES)[labels], squared)
        dense = setting.density == 1
        arrays = _measure(
            setting.network.apply, dense, setting.threat, jnp.asarray(setting.images), instances
        )
        found = _Measured(*(np.asarray(array, float) for array in arrays))
        g = _gradients(found.adversarial, found.y, squared)
        change = _flow(found.mixed, g)
        name = setting.name
        cases += [
            close(f"{name}: library", found.change, change, tolerance=1e-12),
            close(f"{name}: derivative", change, found.derivative, tolerance=1e-10),
        ]
        right = _remainders(found, change)
        wrong = {
            "without 1/N": change * g.shape[1],
            "clean kernel Θ(X, X) for the mixed one": _flow(found.clean, g),
        }
        if setting.density < 1:
            wrong["kernel of the unmasked Jacobian"] = _flow(found.full, g)
        controls += _reject(name, found, wrong, squared)
        for loss, chosen in zip(LOSSES, (~squared, squared), strict=True):
            cases.append(slope(f"{name}, {loss}", STEPS, right[chosen], low=1.9, high=2.1))
        panels.append(_panel(name, right, _remainders(found, _flow(found.clean, g))))
        context.progress((done + 1) / len(settings))
    return Outcome(cases, controls, panels)


def _reject(
    name: str, found: _Measured, wrong: dict[str, np.ndarray], squared: np.ndarray
) -> list[Control]:
    """Each wrong formula under the statement's rule, for the two losses."""
    controls = []
    for what, change in wrong.items():
        remainders = _remainders(found, change)
        for loss, chosen in zip(LOSSES, (~squared, squared), strict=True):
            case = slope(loss, STEPS, remainders[chosen], low=1.9, high=2.1)
            controls.append(rejects(f"{name}: {what}", case))
    return controls


def _panel(name: str, right: np.ndarray, clean: np.ndarray) -> Panel:
    mean, mean_clean = right.mean(0), clean.mean(0)
    return Panel(
        name,
        "step size, relative to the largest",
        "remainder of the outputs [logits]",
        [
            Line("mixed kernel", STEPS, mean),
            Line("clean kernel (wrong)", STEPS, mean_clean),
            Line("η²", STEPS, mean[0] * STEPS**2, "reference"),
        ],
        xscale="log",
    )
