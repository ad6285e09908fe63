"""E5: a width from which on a random mask keeps the dynamics, and a ticket that needs far less."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import masks, tickets
from ntk_awt.app.config import TicketConfig
from ntk_awt.attacks import PGD
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket
from ntk_awt.theory.dynamics.existence import gap_bound, sufficient_width
from ntk_awt.theory.dynamics.preservation import Frozen, prior_gap
from ntk_awt.threats import Linf
from ntk_awt.types import Params
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
    close,
)
from proofs_check.instances import two_layer

STATEMENT = Statement(
    number="E5",
    title="A width that suffices",
    claim="from a width n* on, a random mask of units keeps the dense network's dynamics to τ up "
    "to T with probability 1 − δ; an optimised ticket does so at a width far below it",
    formula="n* = ⌈½ ln(N(N+1)/δ)·((1+R²)·T·r_0/(p·τ))²⌉ for a mask of the same network; with "
    "independent ones α√n = (1+R²)(1+1/p)√(2 ln(2N(N+1)/δ)), n* = ⌈(T·α√n·r_0/τ)²⌉; for T = ∞ the "
    "horizon is N/(λ_min(Θ^∞) − Nα_d)",
    hypotheses={
        "masked units": "not weights, whose limit is another kernel; two layers as in E1",
        "gain": "gain 1/√p",
        "frozen": "gradient flow of the squared loss with frozen kernels",
        "centred": "f − f_0, or starts that coincide: else β² → 2(1 − √p) E φ² at any width",
        "wide": "a width of n* or more",
    },
    instances="sin, R² = 1; N = 6, T = 1, δ = 0.1, p = 0.1: masks of the same network (τ = 0.06) "
    "and independent networks (τ = 0.3); N = 2, T = ∞, p = 0.2, τ = 0.2; 200 draws each; 3 "
    "tickets of width 100, which match the outputs as well",
    rule="all but the share δ of the draws stay within τ at 65 times up to T, at n*; no draw at "
    "any width exceeds P3 (a); the library's n* is the formula's; the tickets stay within τ",
    tolerance="1e-9: rounding of eigenvalues; 2/n*: n* is rounded up to whole units; initial gap: "
    "4 standard errors",
    source="theory E5, from E1 and P3 (a); the version for a shared network is derived here",
)

ACTIVATION = "sin"
MOMENTS = 65
"""Times in [0, T] at which the gap is looked at; it changes on the scale T."""
PIECE = 2**18
"""Units drawn at once, over all draws."""


@dataclass(frozen=True)
class Setting:
    """What is asked: tolerance τ up to the time T with probability 1 − δ, for masks of density p.

    Attributes:
        name: of the setting.
        x: inputs [N, d] with (1/d)‖x‖² ≤ 1; y: targets [N].
        tolerance, horizon, delta, density, pairing: as in `existence.sufficient_width`.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    tolerance: float
    horizon: float
    delta: float = 0.1
    density: float = 0.1
    pairing: str = "shared"

    @property
    def residual(self) -> float:
        """r_0 = ‖y‖/√N of centred networks."""
        return float(np.sqrt((self.y**2).mean()))

    @property
    def smallest(self) -> float:
        """λ_min(Θ^∞), which an infinite horizon needs; else 0, for unknown."""
        if math.isfinite(self.horizon):
            return 0.0
        return float(np.linalg.eigvalsh(two_layer.dense_limit(ACTIVATION, self.x))[0])

    @property
    def times(self) -> np.ndarray:
        """From 0 to T, or until nothing moves any more."""
        if math.isfinite(self.horizon):
            return np.linspace(0, self.horizon, MOMENTS)
        return np.concatenate([[0], np.geomspace(0.01, 30 * len(self.x) / self.smallest, MOMENTS)])

    def library(self, function: Any, first: Any) -> Any:
        """`sufficient_width` of a tolerance, or `gap_bound` of a width."""
        return function(
            first, self.horizon, self.delta, self.density, len(self.x), radius2=1.0,
            residual=self.residual, smallest_eigenvalue=self.smallest, pairing=self.pairing,
        )  # fmt: skip


def stated_width(setting: Setting, inverse_density: float | None = None) -> int:
    """n* once more.

    With L(δ) = ln(N(N+1)/δ) and R² = 1, α√n is (2/p)·√(L/2) for a mask of the same network and
    2(1 + 1/p)·√(2L(δ/2)) for independent ones.
    """
    n, delta, tau, r = len(setting.x), setting.delta, setting.tolerance, setting.residual
    per = 1 / setting.density if inverse_density is None else inverse_density

    def log(share: float) -> float:
        return np.log(n * (n + 1) / share)

    near = 2 * np.sqrt(2 * log(delta / 2))  # α_d√n
    if setting.pairing == "independent":
        return math.ceil((setting.horizon * (1 + per) * near * r / tau) ** 2)
    if math.isfinite(setting.horizon):
        return math.ceil((setting.horizon * 2 * per * np.sqrt(log(delta) / 2) * r / tau) ** 2)
    alpha = 2 * per * np.sqrt(log(delta / 2) / 2)
    return math.ceil((n * (alpha * r + near * tau) / (setting.smallest * tau)) ** 2)


# ---------------------------------------------------------------- drawn networks


class Drawn(NamedTuple):
    """Kernels [draws, widths, N, N] and outputs [draws, widths, N] at initialisation."""

    kernels: np.ndarray
    outputs: np.ndarray


def _features(x: np.ndarray, rng: np.random.Generator, shape: tuple[int, int]) -> Any:
    """φ, φ' [*shape, N], and the signs a_j [*shape, 1] of drawn units."""
    u = rng.normal(size=(*shape, x.shape[1])) @ x.T / np.sqrt(x.shape[1])
    act = two_layer.ACTIVATIONS[ACTIVATION]
    signs = 2.0 * rng.integers(0, 2, size=(*shape, 1)) - 1
    return act.value(u), act.slope(u), signs


def simulate(
    setting: Setting, rng: np.random.Generator, draws: int, widths: Any, *, gain: bool = True
) -> tuple[Drawn, Drawn]:
    """Dense and sparse networks at each width; a wider one holds the units of the narrower.

    Kernel and outputs are sums over units, so no network is ever held as a whole.
    """
    x, p = setting.x, setting.density
    n = len(x)
    covariance = x @ x.T / x.shape[1]
    scale = p**-0.5 if gain else 1.0
    sums = [(np.zeros((draws, n, n)), np.zeros((draws, n))) for _ in range(2)]
    found: list[Any] = [[], []]
    size = max(PIECE // draws, 1)

    def add(total: Any, features: Any, kept: np.ndarray | float) -> None:
        value, derivative, signs = features
        for part, factor in ((value, 1.0), (derivative, covariance)):
            total[0][:] += factor * (np.swapaxes(part * kept**2, 1, 2) @ part)
        total[1][:] += (value * (signs * kept)).sum(1)

    for low, high in zip([0, *widths[:-1]], widths, strict=True):
        for start in range(low, high, size):
            shape = (draws, min(size, high - start))
            features = _features(x, rng, shape)
            add(sums[0], features, 1.0)
            if setting.pairing == "independent":
                features = _features(x, rng, shape)
            add(sums[1], features, scale * (rng.random((*shape, 1)) < p))
        for rows, (kernel, outputs) in zip(found, sums, strict=True):
            rows.append((kernel / high, outputs / np.sqrt(high)))
    dense, sparse = (
        Drawn(*(np.stack(part, axis=1) for part in zip(*rows, strict=True))) for rows in found
    )
    return dense, sparse


def _residuals(kernels: np.ndarray, start: np.ndarray, times: np.ndarray) -> np.ndarray:
    """e^{−tΘ/N} r_0, [..., times, N]."""
    values, vectors = np.linalg.eigh(kernels)
    coordinates = np.swapaxes(vectors, -1, -2) @ start[..., None]
    decay = np.exp(-np.maximum(values, 0)[..., None] * times / kernels.shape[-1])
    return np.swapaxes(vectors @ (decay * coordinates), -1, -2)


def gaps(
    dense: Drawn, sparse: Drawn, y: np.ndarray, times: np.ndarray, *, centred: bool = True
) -> np.ndarray:
    """‖f^d_t − f^s_t‖/√N with frozen kernels, [draws, widths, times]."""
    starts = [0 * drawn.outputs if centred else drawn.outputs for drawn in (dense, sparse)]
    residuals = [
        _residuals(drawn.kernels, start - y, times)
        for drawn, start in zip((dense, sparse), starts, strict=True)
    ]
    return np.sqrt(((residuals[0] - residuals[1]) ** 2).mean(-1))


def prior_bounds(setting: Setting, dense: Drawn, sparse: Drawn) -> np.ndarray:
    """min(T, N/λ_min(Θ^d))·α·r_0 of each pair, [draws, widths]."""
    alpha = np.sqrt(((dense.kernels - sparse.kernels) ** 2).mean((-1, -2)))
    smallest = np.linalg.eigvalsh(dense.kernels)[..., 0]
    with np.errstate(divide="ignore"):
        reach = np.minimum(setting.horizon, len(setting.x) / np.maximum(smallest, 0))
    return reach * alpha * setting.residual


def _quantile(worst: np.ndarray, delta: float) -> np.ndarray:
    """What all but the share δ of the draws stay below, [widths]."""
    return two_layer.quantiles(worst, (delta,))[0]


def _keeps(name: str, worst: np.ndarray, setting: Setting) -> Case:
    """The rule: all but the share δ of the draws stay within τ at every time up to T."""
    return below(name, _quantile(worst, setting.delta), setting.tolerance)


def _smallest_width(widths: Any, found: np.ndarray, tolerance: float) -> float:
    """Where the quantile reaches τ, between two widths as a power law; the last if it does not."""
    if found[-1] > tolerance:
        return float(widths[-1])
    first = int(np.argmax(found <= tolerance))
    if first == 0:
        return float(widths[0])
    share = np.log(found[first - 1] / tolerance) / np.log(found[first - 1] / found[first])
    return float(widths[first - 1] * (widths[first] / widths[first - 1]) ** share)


# ---------------------------------------------------------------- the optimised ticket


class Network(NamedTuple):
    """The two-layer network of E1 as the package sees it; w [d, n] and a [n, 1]."""

    params: Params
    mask: Any

    @staticmethod
    def apply(params: Params, x: Any) -> jax.Array:
        """f(x) = n^{-1/2} Σ_j a_j sin(w_j·x/√d)."""
        d, n = params["w"].shape
        return jnp.sin(x @ params["w"] / np.sqrt(d)) @ params["a"] / np.sqrt(n)


def _start(setting: Setting, rng: np.random.Generator, width: int) -> Network:
    """A dense network and a random mask of units with exactly pn of them."""
    kept = np.zeros((width, 1), bool)
    kept[rng.choice(width, round(setting.density * width), replace=False)] = True
    d = setting.x.shape[1]
    params = {"w": rng.normal(size=(d, width)), "a": rng.choice([-1.0, 1.0], (width, 1))}
    mask = {"w": np.ones((d, width), bool), "a": kept}
    return Network(jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, mask))


def _frozen(ticket: Ticket, x: jax.Array) -> Frozen:
    outputs = masks.masked(Network.apply, ticket.mask, ticket.gain)(ticket.params, x)
    kernel = empirical(Network.apply, ticket.params, x, mask=ticket.mask, gain=ticket.gain)
    return Frozen(kernel, outputs)


def ticket_gaps(
    setting: Setting, start: Network, steps: int, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """‖D_t‖/√N of the random mask that the search starts from, and of its result, [times].

    The random one is centred; the ticket is not: it has to match the outputs too.
    """
    params, mask = start
    x = jnp.asarray(setting.x)
    y = jnp.asarray(setting.y)[:, None]
    gain = {"w": jnp.ones(()), "a": jnp.asarray(setting.density**-0.5)}
    ticket = Ticket(params, mask, gain)
    config = TicketConfig(
        ticket_steps=steps,
        ticket_learning_rate=0.03,
        ticket_batch_size=len(setting.x),  # drawn with replacement
        distance="absolute",
        reselect_every=0,
        ticket_records=1,
    )
    attack = PGD(steps=0, random_start=False)
    labels = jnp.zeros(len(setting.x), int)  # a single output: the attack has nothing to do
    problem = tickets.Problem(params, x, labels, Linf(0.0, (-10.0, 10.0)), key)
    found = tickets.search(
        Network.apply,
        problem,
        tickets.start(Network.apply, config, params, ticket, key),
        tickets.held_out_target(Network.apply, attack, problem, config),
        attack=attack,
        config=config,
        on_record=lambda state, record: None,
    )
    dense = _frozen(masks.dense(params), x)
    random = _frozen(ticket, x)

    def centred(network: Frozen) -> Frozen:
        return network._replace(outputs=0 * network.outputs)

    pairs = [(centred(dense), centred(random)), (dense, _frozen(found, x))]
    gap = [np.asarray(prior_gap(d, s, y, jnp.asarray(setting.times)))[..., 0] for d, s in pairs]
    return np.sqrt((gap[0] ** 2).mean(1)), np.sqrt((gap[1] ** 2).mean(1))


# ---------------------------------------------------------------- the check


def _settings(context: Context) -> list[Setting]:
    rng = context.rng(1)
    y = np.array([1.0, -1.0] * 3)
    x = y[:, None] * two_layer.inputs(rng, 6, 4, 1.0)  # two classes around ± a common mean
    shared = Setting("mask of the same network", x, y, 0.06, 1.0)
    if context.size == "reduced":
        return [Setting("mask of the same network", x, y, 0.06, 1.0, density=0.2)]
    apart = np.array([[2.0, 0.0, 0.0, 0.0], [0.5, np.sqrt(3.75), 0.0, 0.0]])
    return [
        shared,
        Setting("independent networks", x, y, 0.3, 1.0, pairing="independent"),
        Setting("infinite horizon", apart, np.array([1.0, -1.0]), 0.2, math.inf, density=0.2),
    ]


def check(context: Context) -> Outcome:
    """Simulation at n* and below it, and the ticket at a small width."""
    draws = context.pick(64, 200, 1000)
    rng = context.rng(2)
    check = Recorder(STATEMENT)
    settings = _settings(context)
    for done, setting in enumerate(settings):
        stated = stated_width(setting)
        library = setting.library(sufficient_width, setting.tolerance)
        widths = [*(2 ** np.arange(4, int(np.log2(stated)) + 1)), stated]
        dense, sparse = simulate(setting, rng, draws, widths)
        found = gaps(dense, sparse, setting.y, setting.times)
        worst = found.max(-1)
        bounds = prior_bounds(setting, dense, sparse)
        quantile = _quantile(worst, setting.delta)
        enough = _smallest_width(widths, quantile, setting.tolerance)
        name = setting.name
        check.close(f"{name}: library's n* = {library}", library, stated, tolerance=1e-15)
        check.close(
            f"{name}: library's bound at n* is τ",
            setting.library(gap_bound, stated),
            setting.tolerance,
            tolerance=2 / stated,
        )
        check.below(f"{name}: gap of every draw and width against P3 (a)", worst, bounds)
        check.case(
            _keeps(f"{name}: P3 (a) at n*, all but δ of the draws", bounds[:, -1:], setting),
            _keeps(f"{name}: gap at n*, all but δ of the draws", worst[:, -1:], setting),
        )
        check.below(f"{name}: smallest width that does", enough, stated)
        check.panel(_width_panel(setting, widths, quantile))
        if done == 0:
            check.case(_library_gap(setting, dense, sparse, found))
            _tickets(check, context, setting, rng, draws, (widths, quantile))
            _controls(check, setting, rng, draws)
        context.progress((done + 1) / len(settings))
    return check.outcome()


def _library_gap(setting: Setting, dense: Drawn, sparse: Drawn, found: np.ndarray) -> Case:
    """The library's gap of one pair, at the smallest width."""
    outputs = jnp.zeros((len(setting.x), 1))
    first, second = (Frozen(jnp.asarray(drawn.kernels[0, 0]), outputs) for drawn in (dense, sparse))
    gap = prior_gap(first, second, jnp.asarray(setting.y)[:, None], jnp.asarray(setting.times))
    size = np.sqrt((np.asarray(gap)[..., 0] ** 2).mean(1))
    return close(f"{setting.name}: library's gap of one pair", size, found[0, 0], tolerance=1e-9)


def _initial_gap(setting: Setting, dense: Drawn, sparse: Drawn) -> Case:
    """β² = 2(1 − √p)·mean E φ² for independent signs, at every width."""
    products, _ = two_layer.ACTIVATIONS[ACTIVATION].expectations(1.0, 1.0, 1.0)
    squares = ((dense.outputs - sparse.outputs) ** 2).mean(-1).ravel()
    expected = 2 * (1 - np.sqrt(setting.density)) * float(products)
    error = squares.std(ddof=1) / np.sqrt(len(squares))
    case = below("initial gap β² = 2(1 − √p) E φ²", abs(squares.mean() - expected), 4 * error)
    found = f"{squares.mean():.3f} ± {error:.3f}, expected {expected:.3f}"
    return case._replace(measured=found, tightness=None)


def _controls(check: Recorder, setting: Setting, rng: np.random.Generator, draws: int) -> None:
    fewer, wide = stated_width(setting) - 1, 4096
    sparse_setting = replace(setting, density=0.002)
    without = stated_width(sparse_setting, inverse_density=1.0)

    def keeps(
        name: str, at: Setting, width: int, *, centred: bool = True, gain: bool = True,
        drift: float = 1.0,
    ) -> Case:  # fmt: skip
        dense, sparse = simulate(at, rng, draws, [width], gain=gain)
        moved = sparse._replace(kernels=drift * sparse.kernels)
        return _keeps(name, gaps(dense, moved, at.y, at.times, centred=centred).max(-1), at)

    name, case = "n* without 1/p", keeps("p = 0.002", sparse_setting, without)
    check.control(name, case, breaks=FORMULA)
    case = below("library's bound", setting.library(gap_bound, fewer), setting.tolerance)
    check.control("one unit less than n*", case, breaks="wide")
    case = keeps(f"β > 0, width {wide}", setting, wide, centred=False)
    check.control("networks that are not centred", case, breaks="centred")
    check.control("no gain", keeps(f"width {wide}", setting, wide, gain=False), breaks="gain")
    name = "masked weights in place of units"
    check.control(name, _masked_weights(setting), breaks="masked units")
    check.control(
        "τ below the initial gap",
        lambda: sufficient_width(0.1, 1.0, 0.1, 0.1, 6, radius2=1.0, residual=1.0, initial_gap=0.5),
        breaks="centred",
    )
    case = keeps(f"width {wide}", setting, wide, drift=1.5)
    check.control("a sparse kernel that has grown by a half", case, breaks="frozen")


def _masked_weights(setting: Setting) -> Case:
    """Infinitely wide: the limit of masked weights is another kernel than the dense one."""
    mixed = two_layer.Setting(ACTIVATION, "weights", setting.density, setting.x)
    limits = [two_layer.dense_limit(ACTIVATION, setting.x), two_layer.limit(mixed)]
    nothing = np.zeros((1, 1, len(setting.x)))
    pair = [Drawn(kernel[None, None], nothing) for kernel in limits]
    worst = gaps(pair[0], pair[1], setting.y, setting.times).max(-1)
    return _keeps("at infinite width", worst, setting)


def _tickets(
    check: Recorder,
    context: Context,
    setting: Setting,
    rng: np.random.Generator,
    draws: int,
    masked: Any,
) -> None:
    """Optimised tickets at a width at which random masks fail.

    `masked`: widths, and the gap that all but δ of the random masks stay below.
    """
    width, networks, steps = context.pick((60, 1, 300), (100, 3, 1000), (100, 10, 3000))
    stated = stated_width(setting)
    dense, sparse = simulate(setting, rng, draws, [width])
    random = gaps(dense, sparse, setting.y, setting.times)[:, 0]
    found = []
    for index in range(networks):
        key = jax.random.fold_in(jax.random.key(context.seed), index)
        found.append(ticket_gaps(setting, _start(setting, rng, width), steps, key))
    starts, ends = (np.array(part) for part in zip(*found, strict=True))
    name = f"optimised tickets of width {width}, {stated / width:.0f} times below n*"
    check.below(name, ends.max(1), setting.tolerance)
    name = "their width, against one at which random masks just reach their gap, or not yet"
    check.below(name, width, _smallest_width(masked[0], masked[1], float(ends.max())))
    check.case(_initial_gap(setting, dense, sparse))
    case = _keeps("gap, all but δ of the draws", random.max(-1)[:, None], setting)
    check.control(f"random masks of width {width}", case, breaks="wide")
    lines = [
        Line(f"random masks, {1 - setting.delta:.0%} of draws", setting.times,
             np.quantile(random, 1 - setting.delta, axis=0)),
        Line("random mask that the search starts from", setting.times, starts[0]),
        Line("optimised ticket", setting.times, ends[0]),
        Line("tolerance τ", setting.times, np.full(MOMENTS, setting.tolerance), "bound"),
    ]  # fmt: skip
    labels = ("time t", "gap ‖f^d − f^s‖/√N [logits]")
    check.panel(Panel(f"width {width}", *labels, lines, yscale="linear"))


def _width_panel(setting: Setting, widths: Any, quantile: np.ndarray) -> Panel:
    sizes = np.asarray(widths)
    bound = [setting.library(gap_bound, int(n)) for n in sizes]
    finite = np.isfinite(bound)
    return Panel(
        setting.name,
        "width n [units]",
        "largest gap up to T [logits]",
        [
            Line(f"measured, {1 - setting.delta:.0%} of draws", sizes, quantile),
            Line("bound", sizes[finite], np.asarray(bound)[finite], "bound"),
            Line("tolerance τ", sizes, np.full(len(sizes), setting.tolerance), "reference"),
        ],
        xscale="log",
    )
