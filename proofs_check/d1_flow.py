"""D1: the outputs of adversarial training follow the mixed tangent kernel."""

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
from proofs_check.core import FORMULA, Context, Line, Outcome, Panel, Recorder, Statement, slope
from proofs_check.instances.networks import draw, untrained

STATEMENT = Statement(
    number="D1",
    title="Flow of adversarial training",
    claim="a gradient step on the adversarial risk moves the outputs along the mixed tangent "
    "kernel, up to the square of the step",
    formula="df_t(x)/dt = −(1/N) Σ_j Θ_t(x, x̃_j) g_j;  "
    "‖f_{t+η}(X) − f_t(X) + (η/N) Θ_t(X, X̃) g‖ = O(η²)",
    hypotheses={
        "smooth": "twice differentiable activation",
        "one set of inputs": "the gradient is taken at the inputs X̃ of the kernel's columns",
        "masked Jacobian": "the kernel is that of the masked network",
    },
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


def _mlp(activation: str) -> Network:
    config = ModelConfig(parametrization="ntk", activation=activation, widths=(32, 32))
    return untrained(lambda key: models.build(config, (16,), CLASSES, key))


def _settings(context: Context) -> list[_Setting]:
    rng = context.rng(1)
    flat, pictures = rng.uniform(0, 1, (6, 16)), rng.uniform(0, 1, (4, 6, 6, 1))

    def cnn(key: Key) -> Network:
        chosen = ModelConfig(parametrization="ntk", activation="tanh", pooling="average")
        layers = {"blocks": ((6,), (8,)), "hidden": (16,), "rngs": nnx.Rngs(params=key)}
        return Network.from_nnx(models.Classifier((6, 6, 1), CLASSES, chosen, **layers))

    masked = _Setting("masked MLP, GELU, L∞", _mlp("gelu"), 0.3, Linf(0.1), flat)
    if context.size == "reduced":
        return [masked]
    return [
        _Setting("dense MLP, tanh, L∞", _mlp("tanh"), 1.0, Linf(0.1), flat),
        masked,
        _Setting("masked CNN, tanh, L2", untrained(cnn), 0.3, L2(0.5), pictures),
    ]


def _found(
    setting: _Setting, rng: np.random.Generator, squared: np.ndarray, *, kink: bool = False
) -> _Measured:
    """Drawn instances; `kink`: without biases, so that an image of zeros is where ReLU bends."""
    labels = rng.integers(0, CLASSES, (len(squared), len(setting.images)))
    weights, *mask = draw(rng, setting.network.params, setting.density, len(squared))
    if kink:
        weights = {name: leaf | {"bias": 0 * leaf["bias"]} for name, leaf in weights.items()}
    instances = (weights, *mask, np.eye(CLASSES)[labels], squared)
    images = jnp.asarray(setting.images)
    arrays = _measure(
        setting.network.apply, setting.density == 1, setting.threat, images, instances
    )
    return _Measured(*(np.asarray(array, float) for array in arrays))


def check(context: Context) -> Outcome:
    """One gradient step on the adversarial risk against the kernel's prediction."""
    check = Recorder(STATEMENT)
    seeds = context.pick(3, 5, 20)
    squared = np.repeat([False, True], seeds)
    chosen = dict(zip(LOSSES, (~squared, squared), strict=True))
    rule = partial(slope, low=1.9, high=2.1)

    def wrong(name: str, found: _Measured, change: np.ndarray, breaks: str) -> None:
        remainders = _remainders(found, change)
        for loss, rows in chosen.items():
            check.control(name, rule(loss, STEPS, remainders[rows]), breaks=breaks)

    settings = _settings(context)
    for done, setting in enumerate(settings):
        found, name = _found(setting, context.rng(2, done), squared), setting.name
        g = _gradients(found.adversarial, found.y, squared)
        change, clean = _flow(found.mixed, g), _flow(found.clean, g)
        check.close(f"{name}: library", found.change, change, tolerance=1e-12)
        check.close(f"{name}: derivative", change, found.derivative, tolerance=1e-10)
        right = _remainders(found, change)
        for loss, rows in chosen.items():
            check.case(rule(f"{name}, {loss}", STEPS, right[rows]))
        wrong(f"{name}: without 1/N", found, change * g.shape[1], FORMULA)
        wrong(f"{name}: clean kernel Θ(X, X) for the mixed one", found, clean, "one set of inputs")
        if setting.density < 1:
            full = _flow(found.full, g)
            wrong(f"{name}: kernel of the unmasked Jacobian", found, full, "masked Jacobian")
        check.panel(_panel(name, right, _remainders(found, clean)))
        context.progress((done + 1) / (len(settings) + 1))
    images = context.rng(3).uniform(0, 1, (6, 16)) * (np.arange(6) > 0)[:, None]
    bent = _Setting("ReLU", _mlp("relu"), 1.0, Linf(0.0), images)
    found = _found(bent, context.rng(4), squared, kink=True)
    wrong("ReLU, one image where it bends", found, found.derivative, "smooth")
    return check.outcome()


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
