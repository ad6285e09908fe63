"""D4: adversarial training of an infinitely wide network is the limit of that of finite ones.

Why the error falls like width^{-1/2}: the kernel of a drawn network differs from its mean by
O(n^{-1/2}) and drifts by less (D5); both enter the outputs linearly, and the centred network
f − f_0 starts at the limit's f_0 = 0. The points enter as well, and that takes an attack that
depends on the predictor in a Lipschitz way, as L2 steps do. Steps of signs do not: a gradient that
is off by δ = O(n^{-1/2}) turns the signs of the pixels with |∂ℓ/∂z_i| < δ, a share O(δ) of them,
and each moves by up to 2ε. The points then move by O(√δ) = O(n^{-1/4}) in the L2 norm, and outputs
by a sum of as many terms of either sign, O(n^{-1/4}) again, until n is so large that δ is below the
smallest |∂ℓ/∂z_i| of the data; from there on the rate is n^{-1/2}. So for L∞ the slope may be
anything from −½ to −¼.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats

from ntk_awt import data, masks, models
from ntk_awt.app.config import DataConfig, ModelConfig
from ntk_awt.attacks import PGD
from ntk_awt.kernels import analytic
from ntk_awt.masks import Ticket
from ntk_awt.theory.dynamics import infinite
from ntk_awt.theory.dynamics.infinite import InfiniteTraining, KernelFn
from ntk_awt.threats import L2, Linf, Threat
from ntk_awt.types import ApplyFn, Images, Key, Logits, Params
from proofs_check.core import (
    FORMULA,
    Case,
    Context,
    Line,
    Outcome,
    Panel,
    Recorder,
    Statement,
    slope,
)
from proofs_check.instances import trainings
from proofs_check.instances.networks import untrained

STATEMENT = Statement(
    number="D4",
    title="infinite width",
    claim=(
        "Attacking the predictor of the analytic kernel and advancing the flow of D3, in turn, is "
        "the limit of adversarial training of dense and of masked networks as they grow wide."
    ),
    formula=(
        "f_K(z) = Σ_k Θ(z, X̃_k) Θ_k⁻¹(I − e^{−Δt·Θ_k/N})(y − f_k(X̃_k)),   ‖f^n − f^∞‖ = O(n^{−½})"
    ),
    hypotheses={
        "NTK parametrisation": "weights N(0, 1) over the root of their inputs",
        "dense first layer": "the first layer is not masked",
        "gain": "the gains of the masked layers keep their energy",
        "flow": "gradient flow on the mean of ½‖f − y‖²",
        "centred": "networks minus their initial outputs",
        "same attack": "both sides are attacked alike, in a way that depends on the predictor "
        "alone, and Lipschitz: with steps of signs (L∞) the rate is between n^{−¼} and n^{−½}",
    },
    instances=(
        "three digits, 16 training images, Z of 32 images; 4 phases of time 5; networks drawn with "
        "1 hidden layer (dense, erf, L2) and 2 (random masks, gelu, L2; magnitude masks, erf, L∞)"
    ),
    rule=(
        "the 95 % interval of the slope in width lies in [−0.65, −0.35], for L∞ in "
        "[−0.65, −0.25]; with erf, the predictor agrees to 1e-9 with matrix exponentials in NumPy"
    ),
    tolerance=(
        "0.15 for terms of higher order at small widths. The finite networks are in float32 and "
        "integrated by Runge and Kutta's method: both errors are below 1e-3 of the outputs, those "
        "of the width above 1e-2. 1e-9: nothing in the closed form is larger than Δt/N·Θ."
    ),
    source="theory D4; after Shi et al. 2022; infinite width: Jacot et al. 2018, Lee et al. 2019",
)

CLASSES = (3, 5, 8)
WEIGHT_STD, BIAS_STD = 2.0**0.5, 0.1
ATTACK = PGD(steps=10, random_start=False)
"""Without random starts the points follow from the predictor, so those of both sides converge."""

PHASES, PHASE_TIME = 4, 5.0
RUNGE_KUTTA = 5
"""Steps within a phase: h·λ_max/N ≈ 1, well inside the stable range (2.78)."""

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        threat: model and radius, in pixels of [0, 1].
        depth: hidden layers, all of one width.
        kind, density: of the masks of all layers but the first, which has 64 inputs a unit.
    """

    threat: Threat
    activation: str = "erf"
    depth: int = 1
    kind: str = "random"
    density: float = 1.0

    @property
    def label(self) -> str:
        """In a few words."""
        mask = "dense" if self.density == 1 else f"{self.kind} masks p = {self.density:g}"
        norm = "L2" if isinstance(self.threat, L2) else "L∞"
        return f"{mask}, {norm}"

    def config(self, width: int) -> ModelConfig:
        """The finite network."""
        return ModelConfig(
            widths=(width,) * self.depth,
            activation=self.activation,
            parametrization="ntk",
            weight_std=WEIGHT_STD,
            bias_std=BIAS_STD,
        )

    def kernel_fn(self, shape: tuple[int, ...]) -> KernelFn:
        """The analytic kernel."""
        densities = (1.0, *[self.density] * self.depth)
        config, classes = self.config(1), len(CLASSES)
        return analytic.network(config, shape, classes, density=densities, kind=self.kind).kernel_fn


DENSE = Setting(L2(0.7))
RANDOM = Setting(L2(0.7), "gelu", 2, "random", 0.4)
MAGNITUDE = Setting(Linf(0.1), "erf", 2, "magnitude", 0.4)
SIGNS = Setting(Linf(0.1))


class Problem(NamedTuple):
    """n training images, their targets [n, c], and the points Z [m, *shape] that are compared."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray


def problem(seed: int, n: int) -> Problem:
    """Three digits that look alike; Z: the training images and as many others."""
    digits = data.load(DataConfig("digits"), seed)
    chosen = np.isin(digits.y_train, CLASSES)
    x, y = digits.x_train[chosen][: 2 * n].astype(np.float64), digits.y_train[chosen][:n]
    targets = (y[:, None] == CLASSES) - 1 / len(CLASSES)
    return Problem(x[:n], targets, x)


# ---------------------------------------------------------------- the limit in NumPy


def ntk(setting: Setting, x: np.ndarray) -> np.ndarray:
    """Θ [m, m] of an infinitely wide network with erf, by the recursion of the theory (E4)."""
    flat = x.reshape(len(x), -1)
    p = setting.density
    c = scipy.stats.norm.isf(p / 2)
    energy = p + (2 * c * scipy.stats.norm.pdf(c) if setting.kind == "magnitude" else 0)
    nngp = WEIGHT_STD**2 * flat @ flat.T / flat.shape[1] + BIAS_STD**2
    kernel = nngp
    for _ in range(setting.depth):
        variances = 1 + 2 * np.diag(nngp)
        sizes = np.outer(variances, variances)
        products = 2 / np.pi * np.arcsin(2 * nngp / np.sqrt(sizes))
        slopes = 4 / np.pi / np.sqrt(sizes - 4 * nngp**2)
        below = WEIGHT_STD**2 * slopes * kernel
        kernel = p / energy * WEIGHT_STD**2 * products + BIAS_STD**2 + below
        nngp = WEIGHT_STD**2 * products + BIAS_STD**2
    return kernel


def flow(setting: Setting, points: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """f_k(Z) [K + 1, m, c]: the linear ODE on given points X̃_k, by matrix exponentials.

    In each phase d/dt (r, f) = −(1/N)·(Θ(X̃_k, X̃_k) r, Θ(·, X̃_k) r) for the residuals r at X̃_k and
    the outputs f at Z and at all X̃.
    """
    phases, n = points.shape[:2]
    everywhere = np.concatenate([z, points.reshape(-1, *z.shape[1:])])
    kernel = ntk(setting, everywhere)
    outputs = np.zeros((phases + 1, len(everywhere), y.shape[1]))
    for k in range(phases):
        here = slice(len(z) + k * n, len(z) + (k + 1) * n)
        residuals = outputs[k, here] - y
        generator = np.zeros((n + len(everywhere),) * 2)
        generator[:n, :n], generator[n:, :n] = kernel[here, here], kernel[:, here]
        state = np.concatenate([residuals, outputs[k]])
        outputs[k + 1] = (scipy.linalg.expm(-PHASE_TIME / n * generator) @ state)[n:]
    return outputs[:, : len(z)]


# ---------------------------------------------------------------- finite networks


class Broken(NamedTuple):
    """What the controls change of the finite networks.

    Attributes:
        mean_field: outputs times (128/width)^{1/2}.
        masked: a layer, the density of its random mask, and whether it has the gain p^{−1/2}.
        decay: of the weights, per time.
        centre: share of the initial outputs that is taken off.
    """

    mean_field: bool = False
    masked: tuple[str, float, bool] | None = None
    decay: float = 0.0
    centre: float = 1.0


SOUND, FIRST_WIDTH = Broken(), 128


def draw(setting: Setting, shapes: Params, rng: np.random.Generator, seeds: int) -> Ticket:
    """Initial values and masks of `seeds` networks, stacked; the gain preserves the energy."""
    params = trainings.normal(shapes, rng, seeds)

    def mask(path: Any, w: np.ndarray) -> np.ndarray:
        layer, leaf = (entry.key for entry in path)
        if leaf == "bias" or layer == "dense1" or setting.density == 1:
            return np.ones((seeds, 1, 1)[: w.ndim], bool)
        scores = rng.uniform(size=w.shape) if setting.kind == "random" else np.abs(w)
        flat = scores.reshape(seeds, -1)
        kept = round(setting.density * flat.shape[1])
        least = np.partition(flat, -kept, axis=1)[:, -kept].reshape(seeds, 1, 1)
        return scores >= least

    def gain(w: np.ndarray, m: np.ndarray) -> np.ndarray:
        axes = tuple(range(1, w.ndim))
        return np.sqrt(np.sum(w**2, axes) / np.sum((w * m) ** 2, axes))

    kept = jax.tree_util.tree_map_with_path(mask, params)
    return Ticket(params, kept, jax.tree.map(gain, params, kept))


@partial(jax.jit, static_argnames=("apply", "steps"))
def train(
    tickets: Ticket,
    x: Images,
    y: Logits,
    z: Images,
    decay: jax.Array,
    centre: jax.Array,
    threat: Threat,
    keys: Key,
    apply: ApplyFn,
    steps: int,
) -> jax.Array:
    """f_t(Z) − f_0(Z) of each network at the start and after each phase, [seeds, K + 1, m, c].

    Gradient flow of the centred network on the mean of ½‖f − y‖², by Runge and Kutta's method of
    fourth order, `steps` of them a phase, on points that PGD finds at its start.
    """

    h = PHASE_TIME / steps

    def one(ticket: Ticket) -> jax.Array:
        f = masks.masked(apply, ticket.mask, ticket.gain)

        def centred(params: Params, points: Images) -> jax.Array:
            return f(params, points) - centre * f(ticket.params, points)

        def losses(params: Params, points: Images) -> jax.Array:
            return jnp.sum((centred(params, points) - y) ** 2, -1) / 2

        def phase(params: Params, _: None) -> tuple[Params, jax.Array]:
            points = ATTACK.run(partial(losses, params), x, threat, keys)[0]

            def step(params: Params, _: None) -> tuple[Params, None]:
                def stage(carry: tuple[Params, Params], share: jax.Array) -> tuple[tuple, None]:
                    gradient, after = carry
                    at = trainings.stepped(params, gradient, share[0] * h)
                    gradient = jax.grad(lambda p: jnp.mean(losses(p, points)))(at)
                    gradient = jax.tree.map(lambda g, w: g + decay * w, gradient, at)
                    return (gradient, trainings.stepped(after, gradient, share[1] * h)), None

                shares = jnp.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]])
                start = (jax.tree.map(jnp.zeros_like, params), params)
                return jax.lax.scan(stage, start, shares.astype(x.dtype))[0][1], None

            params, _ = jax.lax.scan(step, params, length=steps)
            return params, centred(params, z)

        _, outputs = jax.lax.scan(phase, ticket.params, length=PHASES)
        return jnp.concatenate([jnp.zeros_like(outputs[:1]), outputs])

    return jax.lax.map(one, tickets)


def single(tree: Any) -> Any:
    """Floating arrays in float32."""
    return jax.tree.map(
        lambda a: jnp.asarray(a, np.float32 if np.issubdtype(a.dtype, np.floating) else None), tree
    )


def finite(
    setting: Setting,
    p: Problem,
    width: int,
    rng: np.random.Generator,
    seeds: int,
    broken: Broken = SOUND,
) -> np.ndarray:
    """Outputs at Z of `seeds` drawn networks of one width, [seeds, K + 1, m, c]."""
    network = untrained(
        lambda key: models.build(setting.config(width), p.x.shape[1:], len(CLASSES), key)
    )
    tickets = draw(setting, network.params, rng, seeds)
    last = f"dense{len(tickets.params)}"
    if broken.mean_field:
        tickets.gain[last]["kernel"] *= (FIRST_WIDTH / width) ** 0.5
    if broken.masked is not None:
        name, density, gain = broken.masked
        w = tickets.params[name]["kernel"]
        tickets.mask[name]["kernel"] = rng.uniform(size=w.shape) < density
        tickets.gain[name]["kernel"] = np.full(seeds, density**-0.5 if gain else 1.0)
    keys = jax.random.split(jax.random.key(0), len(p.x))
    arrays = single((tickets, *p, *(np.asarray(a) for a in (broken.decay, broken.centre))))
    return np.asarray(train(*arrays, setting.threat, keys, network.apply, RUNGE_KUTTA), np.float64)


# ---------------------------------------------------------------- the check


def limit(
    kernel_fn: KernelFn, p: Problem, threat: Threat, time: float = PHASE_TIME
) -> tuple[InfiniteTraining, np.ndarray]:
    """The library's infinitely wide network, and its outputs at Z, [K + 1, m, c]."""
    x, z = jnp.asarray(p.x), jnp.asarray(p.z)
    training = infinite.adversarial_training(
        kernel_fn, x, jnp.asarray(p.y), threat=threat, attack=ATTACK, key=jax.random.key(0),
        phases=PHASES, phase_time=time,
    )  # fmt: skip
    return training, np.asarray(infinite.predict(kernel_fn, training, z), np.float64)


def errors(outputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """‖f^n_T(Z) − f^∞_T(Z)‖/‖f^∞_T(Z)‖ of each network, [...]."""
    gap = outputs[..., -1, :, :] - wanted[-1]
    return np.linalg.norm(gap, axis=(-2, -1)) / np.linalg.norm(wanted[-1])


def rate(setting: Setting, widths: list[int], values: np.ndarray, name: str = "") -> Case:
    """The rule: −½ ± 0.15; with steps of signs anything between that and −¼."""
    high = -0.35 if isinstance(setting.threat, L2) else -0.25
    return slope(name or setting.label, widths, values, low=-0.65, high=high)


class Size(NamedTuple):
    """Which networks are drawn for a setting."""

    setting: Setting
    widths: list[int]
    seeds: int


def scaled(threat: Any, factor: float) -> Threat:
    """The threat model with another radius."""
    return replace(threat, epsilon=factor * float(threat.epsilon))


BROKEN = {
    "NTK parametrisation": (
        "mean-field scaling: outputs n^{-1/2} smaller", Broken(mean_field=True)
    ),
    "dense first layer": ("first layer masked too", Broken(masked=("dense1", 0.05, True))),
    "gain": ("masks without gain", Broken(masked=("dense2", 0.4, False))),
    "flow": ("weights that decay", Broken(decay=0.05)),
    "centred": ("networks with their initial outputs", Broken(centre=0.0)),
}  # fmt: skip
"""For each hypothesis of the finite networks a control that breaks it."""


def check(context: Context) -> Outcome:
    """Finite networks of growing width against the library's limit, and against wrong limits."""
    p = problem(context.seed, context.pick(8, 16, 16))
    sizes = context.pick(
        [Size(DENSE, [128, 1024], 24)],
        [
            Size(DENSE, [256, 512, 1024, 2048, 4096], 24),
            Size(RANDOM, [128, 256, 512, 1024], 16),
            Size(MAGNITUDE, [128, 256, 512, 1024], 16),
        ],
        [
            Size(DENSE, [256, 512, 1024, 2048, 4096], 48),
            Size(SIGNS, [256, 512, 1024, 2048, 4096], 24),
            Size(RANDOM, [128, 256, 512, 1024, 2048], 24),
            Size(MAGNITUDE, [128, 256, 512, 1024, 2048], 24),
        ],
    )
    check = Recorder(STATEMENT)
    lines: list[Line] = []
    course: list[Line] = []
    for i, (setting, widths, seeds) in enumerate(sizes):
        kernel_fn = setting.kernel_fn(p.x.shape[1:])
        training, wanted = limit(kernel_fn, p, setting.threat)
        if setting.activation == "erf":
            points = np.asarray(training.points, np.float64)
            found = flow(setting, points, p.y, p.z)
            check.close(f"{setting.label}: kernel predictor", wanted, found, tolerance=TOLERANCE)
        wrong: list[tuple[str, np.ndarray, str]] = []
        if setting == DENSE:
            clean, half = (scaled(setting.threat, factor) for factor in (0, 0.5))
            late = limit(kernel_fn, p, setting.threat, PHASE_TIME * len(p.x))[1]
            wrong += [
                ("limit that is not attacked", limit(kernel_fn, p, clean)[1], "same attack"),
                ("limit attacked with half the radius", limit(kernel_fn, p, half)[1],
                 "same attack"),
                ("1/N missing", late, FORMULA),
            ]  # fmt: skip
        if setting == MAGNITUDE:
            dense = replace(setting, density=1.0).kernel_fn(p.x.shape[1:])
            name = "kernel of the dense network for magnitude masks"
            wrong.append((name, limit(dense, p, setting.threat)[1], FORMULA))

        outputs = []
        for width in widths:
            outputs.append(finite(setting, p, width, context.rng(i, width), seeds))
            context.progress((i + len(outputs) / len(widths)) / len(sizes))
        networks = np.stack(outputs, 1)
        values = errors(networks, wanted)
        check.case(rate(setting, widths, values))
        lines.append(Line(setting.label, widths, values.mean(0)))
        for name, other, breaks in wrong:
            values = errors(networks, other)
            check.control(name, rate(setting, widths, values, name), breaks=breaks)
            lines.append(Line(name, widths, values.mean(0), "reference"))
        if setting == DENSE:
            course = _course(networks[0, -1], wanted, widths[-1])
            for breaks, (name, broken) in BROKEN.items():
                rng = context.rng(i, 0)
                found = [finite(setting, p, n, rng, seeds, broken) for n in widths[:2]]
                values = errors(np.stack(found, 1), wanted)
                check.control(name, rate(setting, widths[:2], values, name), breaks=breaks)
    start = lines[0].y[0]
    widths = sizes[0].widths
    line = Line("width^{-1/2}", widths, start * np.sqrt(widths[0] / np.array(widths)), "reference")
    check.panel(
        Panel(
            "Approach to the limit", "hidden width n, units",
            "relative error of the trained outputs", [*lines, line], xscale="log",
        ),
        Panel("Outputs over time", "time t, 1/learning rate", "output f_t(z)", course,
              yscale="linear"),
    )  # fmt: skip
    return check.outcome()


def _course(network: np.ndarray, wanted: np.ndarray, width: int) -> list[Line]:
    """One output at the first images, over time."""
    times = PHASE_TIME * np.arange(PHASES + 1)
    lines = []
    for j in range(3):
        lines.append(Line(f"image {j}, width {width}", times, network[:, j, 0]))
        lines.append(Line(f"image {j}, infinite", times, wanted[:, j, 0], "reference"))
    return lines
