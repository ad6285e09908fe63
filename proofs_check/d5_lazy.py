"""D5: how far the tangent kernel moves in adversarial training, by the width of the network.

The rate is n^{-1}; n^{-1/2} is an upper bound, and what is left if the output weights have a mean.
For f(x) = n^{-1/2} Σ_j a_j φ(w_j·x) the kernel moves at dΘ/dt = −(1/N) Σ_i ⟨∇Θ, ∇f(x̃_i)⟩ g_i. Each
of the n hidden units has a share n^{-3/2}·a_j·(…) in ⟨∇Θ, ∇f⟩, with (…) even in a_j and O(1):
together O(n^{-1/2}) at most. But a_j is symmetric around 0, so these are n independent terms of
mean 0, whose sum is O(n^{-1}); and as a_j moves by O(n^{-1/2}) in a fixed time, that adds at most
n·n^{-3/2}·n^{-1/2}. The attack changes none of this: x̃_i enters only as the place where ∇f is
taken, and it may jump. For deeper networks see Dyer & Gur-Ari, "Asymptotics of wide networks from
Feynman diagrams" (2020); Lee et al. (2019) prove the bound.

A network of width n is kept as one of width N ≥ n whose other units have masked weights, with the
gain (N/n)^{1/2} above them: the same outputs and kernel, and one program for all widths.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import data, models
from ntk_awt.app.config import DataConfig, ModelConfig, TrainConfig
from ntk_awt.attacks import example_keys
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket
from ntk_awt.threats import Threat
from ntk_awt.training import Batch
from ntk_awt.types import ApplyFn, Images, Labels, Params
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
    number="D5",
    title="lazy drift",
    claim=(
        "Over a fixed time of adversarial training the tangent kernel of a network in NTK "
        "parametrisation drifts by O(n^{-1}) of itself, dense or masked: faster than the known "
        "upper bound O(n^{-1/2})."
    ),
    formula="‖Θ_T − Θ_0‖_F/‖Θ_0‖_F = O(1/n)  (≤ C·n^{−½})",
    hypotheses={
        "NTK parametrisation": "outputs of order 1 at every width",
        "symmetric": "initial weights symmetric around 0",
        "fixed time": "step size, time and images do not change with the width n",
        "fixed density": "masks of a density that does not change with the width",
    },
    instances=(
        "digits, 16 images in one batch, attacked by PGD at each of 10 steps: 1 hidden layer, "
        "dense, cross-entropy, L∞, n = 64…2048; 2 hidden layers, random masks, squared loss, L2, "
        "n = 64…1024"
    ),
    rule="the 95 % interval of the slope in the width lies in [−1.15, −0.85]",
    tolerance=(
        "0.15 for terms of higher order at small widths. float32: a drift is 1e-3 at least, the "
        "rounding of a kernel 1e-6."
    ),
    source=(
        "theory D5; Jacot et al. 2018, Lee et al. 2019 (upper bound), Dyer & Gur-Ari 2020 (rate)"
    ),
    precision="float32",
)

IMAGES = 16
RECORDS, STEPS = 2, 5
"""Times at which the kernel is taken, and the steps before each."""

ROUND = 8
"""Networks of each width in one call of the program."""


class Setting(NamedTuple):
    """What is trained: hidden layers, criterion, threat model, step size η, and the density of the
    random masks above the first layer."""

    depth: int
    criterion: str
    threat: str
    step: float
    density: float = 1.0

    @property
    def label(self) -> str:
        """In a few words."""
        mask = "dense" if self.density == 1 else f"random masks p = {self.density:g}"
        return f"{self.depth} hidden, {mask}, {self.criterion}, {self.threat}"


DENSE = Setting(1, "cross-entropy", "linf", 0.5)
SPARSE = Setting(2, "squared", "l2", 0.1, 0.4)


class Networks(NamedTuple):
    """Drawn networks, stacked, and the step size η of each."""

    tickets: Ticket
    steps: np.ndarray


def draw(
    shapes: Params,
    widths: list[int],
    seeds: int,
    setting: Setting,
    rng: np.random.Generator,
    *,
    output_scale: float = 0.0,
    step_scale: float = 0.0,
    one_sign: bool = False,
    kept_units: int | None = None,
) -> Networks:
    """`seeds` networks of each width, width after width, inside the wide network's parameters.

    Args:
        shapes: of the wide network's parameters.
        output_scale: s ≥ 0: outputs times n^{−s/2} and the step times n^s, which is 0 in NTK
            parametrisation and 1 in the mean-field one.
        step_scale: the step times as many powers of n more.
        one_sign: output weights |a| in place of a.
        kept_units: of the masks above the first layer, at every width; by the density if None.
    """
    n = np.repeat(widths, seeds)
    density = np.full(len(n), setting.density) if kept_units is None else kept_units / n
    params = trainings.normal(shapes, rng, len(n))
    last = f"dense{len(params)}"
    if one_sign:
        params[last]["kernel"] = np.abs(params[last]["kernel"])
    mask = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    gain = jax.tree.map(lambda w: np.ones(len(n)), params)
    for name, leaves in params.items():
        kept, inputs = mask[name]["kernel"], leaves["kernel"].shape[1]
        if name != "dense1":
            kept &= rng.uniform(size=kept.shape) < density[:, None, None]
            kept &= np.arange(inputs)[:, None] < n[:, None, None]
            gain[name]["kernel"] = np.sqrt(inputs / (density * n))
    gain[last] = jax.tree.map(lambda g: g * n ** (-output_scale / 2), gain[last])
    return Networks(Ticket(params, mask, gain), setting.step * n ** (output_scale + step_scale))


@partial(jax.jit, static_argnames=("apply", "criterion"))
def drifts(
    networks: Networks, x: Images, y: Labels, threat: Threat, apply: ApplyFn, criterion: str
) -> jax.Array:
    """‖Θ_t − Θ_0‖_F/‖Θ_0‖_F of the clean images at `RECORDS` times, [networks, records].

    Gradient descent by the package's own adversarial loss, all images in one batch.
    """
    config = TrainConfig(loss="adversarial", criterion=criterion)
    batch = Batch(x, y, example_keys(jax.random.key(0), jnp.arange(len(y))))

    def one(network: Networks) -> jax.Array:
        ticket, step = network

        def kernel(params: Params) -> jax.Array:
            return empirical(apply, params, x, mask=ticket.mask, gain=ticket.gain)

        def update(_: Any, params: Params) -> Params:
            now = ticket._replace(params=params)
            gradient = trainings.gradient_of(apply, now, batch, threat, config)
            return trainings.stepped(params, gradient, step)

        def record(params: Params, _: None) -> tuple[Params, Params]:
            return jax.lax.fori_loop(0, STEPS, update, params), params

        last, path = jax.lax.scan(record, ticket.params, length=RECORDS)
        path = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), path, last)
        kernels = jax.lax.map(kernel, path)  # one kernel to compile for all times
        change = kernels[1:] - kernels[0]
        return jnp.linalg.norm(change.reshape(RECORDS, -1), axis=1) / jnp.linalg.norm(kernels[0])

    return jax.lax.map(one, networks)


class Problem:
    """Networks of one setting, all inside the widest one, and what they are trained on."""

    def __init__(self, setting: Setting, widths: list[int], seed: int):
        self.setting, self.widths = setting, widths
        digits = data.load(DataConfig("digits"), seed)
        self.x, self.y = digits.x_train[:IMAGES], digits.y_train[:IMAGES]
        config = ModelConfig(
            widths=(max(widths),) * setting.depth, activation="gelu", parametrization="ntk"
        )
        network = untrained(
            lambda key: models.build(config, digits.image_shape, digits.num_classes, key)
        )
        self.shapes, self.apply = network.params, network.apply

    def drifts(self, rng: np.random.Generator, rounds: int = 1, **options: Any) -> np.ndarray:
        """Of `ROUND` networks a round drawn with these options, [seeds, widths, records]."""
        threat = trainings.make_threat(self.setting.threat)
        found = []
        for _ in range(rounds):
            drawn = draw(self.shapes, self.widths, ROUND, self.setting, rng, **options)
            values = drifts(drawn, self.x, self.y, threat, self.apply, self.setting.criterion)
            found.append(np.asarray(values, float).reshape(len(self.widths), ROUND, RECORDS))
        return np.concatenate(found, 1).swapaxes(0, 1)


# ---------------------------------------------------------------- the check

BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "NTK parametrisation": (
        "mean-field scaling: outputs n^{-1/2} smaller, step n times larger",
        {"output_scale": 1.0},
    ),
    "symmetric": ("output weights of one sign", {"one_sign": True}),
    "fixed time": ("steps that grow as n^{1/2}", {"step_scale": 0.5}),
    "fixed density": ("masks that keep 32 hidden units at every width", {"kept_units": 32}),
}
"""For each hypothesis a control that breaks it, by options of `draw`."""


class Group(NamedTuple):
    """A setting, rounds of networks drawn, and the widths that share a program."""

    setting: Setting
    rounds: int
    parts: list[list[int]]


def rate(name: str, widths: list[int], values: np.ndarray, exponent: float = -1.0) -> Case:
    """The rule: the drift at time T falls like n^{-1}."""
    return slope(name, widths, values[..., -1], low=exponent - 0.15, high=exponent + 0.15)


def check(context: Context) -> Outcome:
    """Drawn networks of growing width, dense and masked."""
    groups = context.pick(
        [Group(DENSE, 4, [[64, 1024]])],
        [
            Group(DENSE, 4, [[64, 128, 256, 512, 1024, 2048]]),
            Group(SPARSE, 4, [[64, 128, 256], [1024]]),
        ],
        [
            Group(DENSE, 8, [[64, 128, 256, 512, 1024, 2048]]),
            Group(SPARSE, 6, [[64, 128, 256], [512, 1024], [2048]]),
        ],
    )
    check = Recorder(STATEMENT)
    lines: list[Line] = []
    course: list[Line] = []
    for i, (setting, rounds, parts) in enumerate(groups):
        problems = [Problem(setting, part, context.seed) for part in parts]
        widths = [n for part in parts for n in part]
        found = []
        for k, problem in enumerate(problems):
            found.append(problem.drifts(context.rng(i, k), rounds))
            context.progress((i + (k + 1) / len(parts)) / len(groups))
        values = np.concatenate(found, 1)
        check.case(rate(setting.label, widths, values))
        lines.append(Line(setting.label, widths, values[..., -1].mean(0)))
        if setting == DENSE:
            name = "rate n^{-1/2} of the upper bound"
            check.control(name, rate(name, widths, values, -0.5), breaks=FORMULA)
            for breaks, (name, options) in BROKEN.items():
                other = problems[0].drifts(context.rng(i, 0), **options)
                check.control(name, rate(name, widths, other), breaks=breaks)
                lines.append(Line(name, widths, other[..., -1].mean(0)))
            times = STEPS * setting.step * np.arange(1, RECORDS + 1)
            means = values.mean(0)
            course = [Line(f"width {n}", times, means[j]) for j, n in enumerate(widths)]
    first = lines[0]
    for name, power in (("n^{-1}", -1.0), ("n^{-1/2}", -0.5)):
        y = first.y[0] * (np.array(first.x) / first.x[0]) ** power
        lines.append(Line(name, first.x, y, "reference"))
    label = "relative drift of the kernel"
    check.panel(
        Panel("Drift at time T", "hidden width n, units", label, lines, xscale="log"),
        Panel(f"Drift over time, {DENSE.label}", "time t, 1/learning rate", label, course),
    )
    return check.outcome()
