"""E4: the analytic kernel of magnitude-pruned networks, against wide drawn ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
import scipy.stats

from ntk_awt.kernels import analytic
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
    slope,
)
from proofs_check.instances.masked import (
    BIAS_STD,
    WEIGHT_STD,
    Masks,
    Shapes,
    config_of,
    drawn_kernels,
    mlp,
)

STATEMENT = Statement(
    number="E4",
    title="Magnitude pruning, analytic",
    claim="in NTK parametrisation keeping the largest weights of each layer, with the gain 1/√s "
    "that keeps the energy, leaves the covariance as it is and shrinks each layer's own term in "
    "the kernel to p/s",
    formula="s(p) = 2[cφ(c) + Φ(−c)] with p = 2Φ(−c); NNGP' = σ_w²T + σ_b², "
    "NTK' = (p/s)σ_w²T + σ_b² + σ_w²Ṫ·NTK; random masks s = p, no mask p = s = 1",
    hypotheses={
        "magnitude": "each layer keeps its largest Gaussian weights",
        "dense first layer": "the first layer is not masked",
        "gain": "1/√s in the forward pass",
        "wide": "the fan-in that is kept, np, is large",
    },
    instances="3-layer ReLU MLPs, 16 outputs, 5 inputs, widths 256, 1024 and 4096, 10 draws: "
    "magnitude and random masks of p = 0.1 above the first layer (410 kept inputs at 4096), and "
    "no mask",
    rule="relative error of the mean over draws ≤ 3 % or 3 standard errors at the largest width; "
    "the slope of a draw's error in the width in [−1, −1/4] (95 % interval over draws); the "
    "library's limit equals the recursion",
    tolerance="3 % or 3 standard errors: as the theory states it; slope: the root mean square of a "
    "fluctuation n^{−1/2} and a mean error 1/(np) has one in [−1, −1/2], and up to half-way to 0 "
    "(no shrinking) is left to the scatter of draws; 1e-7: arccos near equal inputs in float64",
    source="theory E4; networks in float32, limits in float64",
)

DEPTH, INPUTS, POINTS = 3, 16, 5
SHARE, ERRORS = 0.03, 3.0
"""The mean over draws may be off by this share, or by this many standard errors."""

RATE = {"low": -1.0, "high": -0.25}
"""Slope of a draw's error: fluctuations fall as n^{−1/2}, the mean's own error as 1/(np), so their
root mean square has a slope in [−1, −1/2]; up to half-way to 0 is left to the scatter of draws."""


class Kind(NamedTuple):
    """A mask of the layers above the first: kept share p, energy s, and the threshold of |w|."""

    name: str
    p: float
    s: float
    cut: float

    def masks(self, gain: float | None = None) -> Masks:
        """Of all layers; γ = 1/√s unless told otherwise."""
        above = DEPTH - 1
        random = 1.0 if self.cut > 0 else self.p
        return Masks(
            np.array([1.0, *[random] * above]),
            np.array([-1.0, *[self.cut or -1.0] * above]),
            np.array([1.0, *[self.s**-0.5 if gain is None else gain] * above]),
        )


def magnitude(p: float) -> Kind:
    """|w| > c with p = 2Φ(−c) keeps s = 2[cφ(c) + Φ(−c)]."""
    c = -scipy.stats.norm.ppf(p / 2)
    s = 2 * (c * scipy.stats.norm.pdf(c) + scipy.stats.norm.sf(c))
    return Kind(f"magnitude mask, p = {p:g}", p, float(s), float(c))


def random(p: float) -> Kind:
    """s = p; p = 1 keeps everything."""
    return Kind("no mask" if p == 1 else f"random mask, p = {p:g}", p, p, 0.0)


# ---------------------------------------------------------------- the limit in NumPy


def _relu(nngp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T and Ṫ of ReLU: arc-cosine kernels."""
    scale = np.sqrt(np.outer(np.diag(nngp), np.diag(nngp)))
    angle = np.arccos(np.clip(nngp / scale, -1, 1))
    products = scale * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    return products, (np.pi - angle) / (2 * np.pi)


def limit(x: np.ndarray, ratios: Any, energies: Any = (1.0,) * DEPTH) -> np.ndarray:
    """NNGP' = eσ_w²T + σ_b², NTK' = (p/s)eσ_w²T + σ_b² + eσ_w²Ṫ·NTK, layer after layer.

    Args:
        x: [N, d].
        ratios: p/s of each layer.
        energies: e = γ²s of each layer; 1 with the right gain.
    """
    products, tangent = x @ x.T / x.shape[1], np.zeros((len(x),) * 2)
    for index, (ratio, energy) in enumerate(zip(ratios, energies, strict=True)):
        weights = energy * WEIGHT_STD**2
        nngp = weights * products + BIAS_STD**2
        ntk = ratio * weights * products + BIAS_STD**2 + weights * tangent
        if index < len(ratios) - 1:
            products, slopes = _relu(nngp)
            tangent = slopes * ntk
        else:
            tangent = ntk
    return tangent


def _ratios(kind: Kind) -> list[float]:
    return [1.0, *[kind.p / kind.s] * (DEPTH - 1)]


# ---------------------------------------------------------------- rules


def _mean_is_near(name: str, draws: np.ndarray, expected: np.ndarray) -> Case:
    """‖mean − Θ^∞‖_F ≤ max(3 %, 3 standard errors)."""
    means = draws.mean(1)  # over the outputs of a draw, which share its hidden layers
    scale = np.linalg.norm(expected)
    error = np.linalg.norm(means.mean(0) - expected) / scale
    spread = np.sqrt((means.var(0, ddof=1) / len(means)).sum()) / scale
    case = below(name, error, max(SHARE, ERRORS * spread))
    measured = f"relative error {error:.2%}, standard error {spread:.2%}"
    return case._replace(measured=measured, tightness=None)


def _errors(found: list[np.ndarray], expected: np.ndarray) -> np.ndarray:
    """Relative error of each draw, root mean square over its outputs, [draws, widths]."""
    squares = [((k - expected) ** 2).sum((2, 3)).mean(1) for k in found]
    return np.sqrt(np.array(squares)).T / np.linalg.norm(expected)


# ---------------------------------------------------------------- the check


def _moments(densities: Any) -> list[Case]:
    """The library's s(p) against the integral of w² over |w| > c."""
    cases = []
    for p in densities:
        kind = magnitude(p)
        tail, _ = scipy.integrate.quad(
            lambda w: 2 * w**2 * scipy.stats.norm.pdf(w), kind.cut, np.inf, epsrel=1e-12
        )
        name = f"second moment at p = {p:g}"
        cases.append(close(name, analytic.moment(p, "magnitude"), tail, tolerance=1e-9))
    return cases


def _library(kind: Kind, x: np.ndarray) -> Case:
    """The library's limit against the recursion."""
    found = analytic.network(
        config_of(8, DEPTH, "relu"),
        x.shape[1:],
        1,
        density=(1.0, *[kind.p] * (DEPTH - 1)),
        kind="magnitude" if kind.cut > 0 else "random",
    ).kernel_fn(jnp.asarray(x))
    expected = limit(x, _ratios(kind))
    return close(f"{kind.name}: library's limit", found.ntk, expected, tolerance=1e-7)


def check(context: Context) -> Outcome:
    """Wide networks with magnitude, random and no masks against the limits."""
    widths, draws, p = context.pick(
        ((128, 512), 24, 0.3), ((256, 1024, 4096), 10, 0.1), ((512, 2048, 8192), 16, 0.1)
    )
    x = context.rng(1).normal(size=(POINTS, INPUTS))
    key = jax.random.key(context.seed)
    networks = [mlp(width, DEPTH, INPUTS, "relu") for width in widths]
    pruned = magnitude(p)
    kinds = (pruned, random(p), random(1.0))
    wanted = limit(x, _ratios(pruned))
    check = Recorder(STATEMENT)
    check.case(*_moments((p, 0.01, 0.9)))
    lines = []
    for index, kind in enumerate(kinds):
        expected = limit(x, _ratios(kind))
        found = []
        for step, network in enumerate(networks):
            keys = jax.random.split(jax.random.fold_in(key, 8 * index + step), draws)
            found.append(drawn_kernels(network, x, kind.masks(), keys))
            context.progress((index + (step + 1) / len(widths)) / (len(kinds) + 1))
        errors = _errors(found, expected)
        check.case(
            _library(kind, x),
            _mean_is_near(f"{kind.name}: mean at width {widths[-1]}", found[-1], expected),
            slope(f"{kind.name}: shrinks with the width", widths, errors, **RATE),
        )
        lines.append(Line(kind.name, widths, errors.mean(0)))
        if kind is pruned:
            dense = limit(x, [1.0] * DEPTH)
            name, case = "the random mask's formula, s = p", _mean_is_near("mean", found[-1], dense)
            check.control(name, case, breaks=FORMULA)
            case = slope("errors", widths, _errors(found, dense), **RATE)
            check.control("the random mask's formula: rate", case, breaks=FORMULA)
        elif kind.p < 1:
            case = _mean_is_near("mean", found[-1], wanted)
            name = "the magnitude mask's formula for a random one"
            check.control(name, case, breaks="magnitude")

    def drawn(label: int, masks: Masks, network: Shapes = networks[0]) -> np.ndarray:
        keys = jax.random.split(jax.random.fold_in(key, label), draws)
        return drawn_kernels(network, x, masks, keys)

    gained = drawn(100, pruned.masks(p**-0.5))
    check.control("gain 1/√p for 1/√s", _mean_is_near("mean", gained, wanted), breaks="gain")
    excess = [1.0, *[pruned.s / p] * (DEPTH - 1)]
    name = f"gain 1/√p for 1/√s: {pruned.s / p:.2f} times the energy a layer, width {widths[0]}"
    check.case(_mean_is_near(name, gained, limit(x, _ratios(pruned), excess)))
    everywhere = Masks(*(np.full(DEPTH, part[-1]) for part in pruned.masks()))
    case = _mean_is_near("mean", drawn(101, everywhere), wanted)
    check.control("first layer masked too", case, breaks="dense first layer")
    few = [magnitude(8 / width) for width in widths[:2]]
    narrow = [
        _errors([drawn(102 + i, kind.masks(), networks[i])], limit(x, _ratios(kind)))
        for i, kind in enumerate(few)
    ]
    case = slope("errors", widths[:2], np.concatenate(narrow, axis=1), **RATE)
    check.control("eight kept inputs a unit at every width", case, breaks="wide")
    first = lines[0].y[0]
    falling = first * np.sqrt(widths[0] / np.asarray(widths))
    lines.append(Line("n^{−1/2}", widths, falling, "reference"))
    check.panel(
        Panel(
            f"{DEPTH} layers, first one dense",
            "width n [units]",
            "distance of a draw from the limit, relative",
            lines,
            xscale="log",
        ),
        _moment_panel(),
    )
    return check.outcome()


def _moment_panel() -> Panel:
    p = np.geomspace(0.01, 1, 41)
    ratios = [q / analytic.moment(float(q), "magnitude") for q in p]
    lines = [
        Line("magnitude mask", p, ratios),
        Line("random mask", p, np.ones_like(p), "reference"),
    ]
    return Panel("share of a layer's own term", "density p", "p/s", lines, xscale="log")
