"""E3: the gain belongs in the forward pass; baked into the weights it costs a factor p."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ntk_awt import masks
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket
from ntk_awt.types import ApplyFn
from proofs_check.core import (
    FORMULA,
    Case,
    Context,
    Line,
    Outcome,
    Panel,
    Recorder,
    Statement,
    below,
)
from proofs_check.instances.masked import WEIGHT_STD, draw, in_float32, mlp, random_masks

STATEMENT = Statement(
    number="E3",
    title="Where the gain goes",
    claim="in NTK parametrisation a random mask keeps the kernel if its gain is in the forward "
    "pass; if it is baked into the weights, the kernel is p times as large; without gain about p^L "
    "times (L layers)",
    formula="tr Θ^s/tr Θ^d = 1; p; p^L without biases and with all L layers masked. First layer "
    "dense: 1; (1 + (L−1)p)/L; p^{L−1}. With biases: the ratio of NTK' = kσ_w²T + σ_b² + "
    "eσ_w²ṪNTK, NNGP' = eσ_w²T + σ_b², with (e, k) = (1, 1); (1, p); (p, p) in masked layers",
    hypotheses={
        "ReLU": "positively homogeneous of degree 1, with T half the variance",
        "random masks": "of one density p, independent of the weights",
        "no biases": "for the factors p and p^L: the biases' terms are not masked",
    },
    instances="3-layer ReLU MLPs of width 1500 with p = 0.2, 12 seeds: all layers masked without "
    "and with biases, first layer dense",
    rule="the mean ratio over seeds equals the expected one within standard errors; without gain "
    "and biases, seed by seed, Θ = Π_l γ_l^{−2} times the kernel with it",
    tolerance="Student's quantile for a risk of 1e-3; the mean has no bias, since for ReLU the "
    "diagonal is linear in the energies that masks keep; 1e-4: float32",
    source="theory E3, with the exact factors derived here",
)

LAYERS, INPUTS, POINTS = 3, 32, 4
BIAS_STD = 0.3
RISK = 1e-3
"""Probability that a comparison within standard errors fails by chance."""

PLACES = ("forward pass", "weights", "nowhere")
"""Where the gain is."""


class Setting(NamedTuple):
    """What is masked: the first layer too, or not; with or without biases."""

    first: bool
    biases: bool

    @property
    def name(self) -> str:
        layers = "all layers masked" if self.first else "first layer dense"
        return f"{layers}, {'with' if self.biases else 'without'} biases"


SETTINGS = (Setting(True, False), Setting(True, True), Setting(False, False))


# ---------------------------------------------------------------- measured


@partial(jax.jit, static_argnames="apply")
def _trace(apply: ApplyFn, ticket: Ticket, x: jax.Array) -> jax.Array:
    params, mask, gain = ticket
    return jnp.trace(empirical(apply, params, x, mask=mask, gain=gain, outputs="trace"))


def _with_bias_gain(gain: Any, value: float) -> Any:
    """1 leaves the biases as they are; with 0 the network has none."""
    return {name: leaf | {"bias": jnp.asarray(value, jnp.float32)} for name, leaf in gain.items()}


def _place(ticket: Ticket, place: str) -> Ticket:
    """The same mask, with the gain there."""
    unit = masks.unit_gain(ticket.params)
    if place == "weights":
        return Ticket(masks.effective(*ticket), ticket.mask, unit)
    return ticket if place == "forward pass" else ticket._replace(gain=unit)


_draw = jax.jit(draw, static_argnames="shapes")


class Measured(NamedTuple):
    """Traces of one setting: dense [seeds], of each place [seeds], and Π γ_l^{−2} [seeds]."""

    dense: np.ndarray
    sparse: dict[str, np.ndarray]
    lost: np.ndarray


def _measure(
    width: int,
    density: float,
    seeds: int,
    x: jax.Array,
    key: jax.Array,
    *,
    activation: str = "relu",
    cut: float | None = None,
) -> dict[Setting, Measured]:
    """`cut`: masks keep the weights |w| > cut in place of random ones."""
    shapes = mlp(width, LAYERS, INPUTS, activation, bias_std=BIAS_STD)
    rows: dict[Setting, list[list[float]]] = {setting: [] for setting in SETTINGS}
    drawn = random_masks([density] * LAYERS)
    if cut is not None:
        drawn = drawn._replace(density=np.ones(LAYERS), cut=np.full(LAYERS, cut))
    drawn = in_float32(drawn)
    for seed in range(seeds):
        params, mask, _ = _draw(shapes, jax.random.fold_in(key, seed), drawn)
        dense = masks.dense(params)
        without_first = mask | {"dense1": dense.mask["dense1"]}
        tickets = {
            first: Ticket(params, kept, masks.energy_gain(params, kept))
            for first, kept in ((True, mask), (False, without_first))
        }
        for setting in SETTINGS:
            ticket = tickets[setting.first]
            found = []
            for one in (dense, *(_place(ticket, place) for place in PLACES)):
                gain = _with_bias_gain(one.gain, float(setting.biases))
                found.append(float(_trace(shapes.apply, one._replace(gain=gain), x)))
            gains = [float(leaf["kernel"]) for leaf in ticket.gain.values()]
            rows[setting].append([*found, float(np.prod(gains)) ** -2])
    return {
        setting: Measured(
            table[:, 0], {place: table[:, 1 + i] for i, place in enumerate(PLACES)}, table[:, -1]
        )
        for setting, row in rows.items()
        for table in [np.array(row)]
    }


# ---------------------------------------------------------------- expected


def _expected_trace(squares: np.ndarray, setting: Setting, density: float, place: str) -> float:
    """Σ_x Θ(x, x), in closed form: for ReLU on the diagonal T is half the variance, and Ṫ is ½.

    A layer keeps the share e of the energy in its output, and k in the kernel: e = k = 1 with the
    gain in the forward pass, e = 1 and k = p in the weights, e = k = p without.

    Args:
        squares: ‖x‖²/d of each input.
        setting, density, place: of the network; "dense" for none of the places.
    """
    bias = BIAS_STD**2 * setting.biases
    product, tangent = squares, np.zeros_like(squares)
    for layer in range(LAYERS):
        masked = place != "dense" and (setting.first or layer > 0)
        kept = density if masked and place == "nowhere" else 1.0
        moves = density if masked and place != "forward pass" else 1.0
        variance = kept * WEIGHT_STD**2 * product + bias
        tangent = WEIGHT_STD**2 * (moves * product + kept * tangent) + bias
        product, tangent = variance / 2, tangent / 2
    return float(2 * tangent.sum())


def predicted(squares: np.ndarray, setting: Setting, density: float, place: str) -> float:
    """tr Θ^s / tr Θ^d at infinite width."""
    sparse = _expected_trace(squares, setting, density, place)
    return sparse / _expected_trace(squares, setting, density, "dense")


SIMPLE = {
    "forward pass": lambda p, setting: 1.0,
    "weights": lambda p, setting: p if setting.first else (1 + (LAYERS - 1) * p) / LAYERS,
    "nowhere": lambda p, setting: p ** (LAYERS if setting.first else LAYERS - 1),
}
"""The same without biases."""


# ---------------------------------------------------------------- the check


def _within(name: str, ratios: np.ndarray, expected: float) -> Case:
    """|mean − expected| ≤ q standard errors."""
    q = scipy.stats.t.isf(RISK / 2, len(ratios) - 1)
    error = ratios.std(ddof=1) / np.sqrt(len(ratios))
    case = below(name, abs(ratios.mean() - expected), q * error)
    found = f"{ratios.mean():.4f} ± {error:.4f}, expected {expected:.4f}"
    return case._replace(measured=f"{found}; {case.measured}", tightness=None)


def check(context: Context) -> Outcome:
    """Traces of dense and masked networks, seed by seed, for each place of the gain."""
    width, seeds = context.pick((256, 8), (1500, 12), (4000, 16))
    density = 0.2
    x = context.rng(1).normal(size=(POINTS, INPUTS))
    squares = (x**2).mean(1)
    key = jax.random.key(context.seed)
    found = _measure(width, density, seeds, jnp.asarray(x, jnp.float32), key)
    context.progress(0.9)
    check = Recorder(STATEMENT)
    for setting, measured in found.items():
        for place, traces in measured.sparse.items():
            ratios = traces / measured.dense
            expected = predicted(squares, setting, density, place)
            name = f"{setting.name}: gain in the {place}".replace("in the nowhere", "nowhere")
            check.case(_within(name, ratios, expected))
            if not setting.biases:
                simple = SIMPLE[place](density, setting)
                check.close(f"{name}: closed form {simple:.4g}", expected, simple, tolerance=1e-12)
            for other in PLACES:
                wrong = predicted(squares, setting, density, other)
                if other != place:
                    case = _within("ratio", ratios, wrong)
                    check.control(f"{name}, against the ratio of {other}", case, breaks=FORMULA)
        if not setting.biases:
            check.close(
                f"{setting.name}: without gain, exactly Π γ^−2 of it",
                measured.sparse["nowhere"],
                measured.lost * measured.sparse["forward pass"],
                tolerance=1e-4,
            )

    def ratio(traces: Measured, place: str, expected: float) -> Case:
        return _within("ratio", traces.sparse[place] / traces.dense, expected)

    case = ratio(found[SETTINGS[1]], "nowhere", density**LAYERS)
    check.control("p³ where there are biases", case, breaks="no biases")
    plain = partial(_measure, width, density, seeds, jnp.asarray(x, jnp.float32), key)
    largest = plain(cut=float(scipy.stats.norm.isf(density / 2)))[SETTINGS[0]]
    case = ratio(largest, "forward pass", 1.0)
    check.control("masks that keep the largest weights", case, breaks="random masks")
    case = ratio(plain(activation="erf")[SETTINGS[0]], "nowhere", density**LAYERS)
    check.control("erf", case, breaks="ReLU")
    check.panel(_panel(found[SETTINGS[0]], density))
    return check.outcome()


def _panel(measured: Measured, density: float) -> Panel:
    lines = []
    for place in PLACES:
        ratios = np.sort(measured.sparse[place] / measured.dense)
        order = np.arange(1, len(ratios) + 1)
        expected = SIMPLE[place](density, SETTINGS[0])
        label = f"gain in the {place}".replace("in the nowhere", "nowhere")
        lines.append(Line(label, order, ratios))
        lines.append(Line(f"{expected:.3g}", order, np.full(len(ratios), expected), "reference"))
    return Panel(SETTINGS[0].name, "seed, sorted", "tr Θ of masked over dense", lines)
