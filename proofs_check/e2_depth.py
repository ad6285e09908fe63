"""E2: with masked layers above a dense first one, a deep network has the dense kernel's limit."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ntk_awt.kernels import analytic
from proofs_check.core import Case, Context, Line, Outcome, Panel, Recorder, Statement, below, slope
from proofs_check.instances.masked import (
    BIAS_STD,
    WEIGHT_STD,
    Masks,
    config_of,
    drawn_kernels,
    mlp,
    random_masks,
)

STATEMENT = Statement(
    number="E2",
    title="Depth: random masks keep the limit",
    claim="in NTK parametrisation random masks with the gain 1/√p in the forward pass leave the "
    "infinitely wide network's kernel as it is, if the first layer is dense; with a masked first "
    "layer the limit is a mixture over masks, which differs by O(1/(dp))",
    formula="Θ^s → Θ^∞ of the dense network, error O(n^{−1/2}); first layer masked: Θ^s → the "
    "kernels behind the mean of T(Σ_m) and of Ṫ(Σ_m)·Σ_m over masks, "
    "Σ_m = σ_w² (1/d) Σ_i (m_i/p) x_i x'_i + σ_b²",
    hypotheses={
        "random masks": "Bernoulli masks, independent of the Gaussian weights",
        "dense first layer": "the first layer is not masked",
        "gain": "1/√p in the forward pass of every masked layer",
    },
    instances="MLPs with 2, 3 and 4 layers of weights, erf, p = 0.05, 0.2 and 0.5, widths 256 to "
    "1024 with 64 to 16 draws (p = 0.05: 192 to 48) of 16 outputs; 6 inputs with a masked first "
    "layer; inputs ±1 with d up to 512",
    rule="slope of the error in the width −1/2 ± 0.15 (95 % interval over 16 groups of draws); the "
    "mean of the draws, and the library's mixture, equal the limits within standard errors; the "
    "library's limits of masked and dense networks are equal; slope of the mixture's distance in d "
    "−1 ± 0.15",
    tolerance="standard errors: Student's quantile for a risk of 1e-3 over all entries, only where "
    "the mean has no bias (two layers; the mixture); 1e-10: rounding of the recursions in float64",
    source="theory E2; Jacot et al. 2018; networks in float32, limits in float64",
)

POINTS = 5
GROUPS = 16
"""Groups of draws; the root mean square error of each gives one slope."""
RISK = 1e-3
"""Probability that a comparison within standard errors fails by chance, over all entries."""


# ---------------------------------------------------------------- finite networks


# ---------------------------------------------------------------- limits in NumPy


def erf_expectations(a: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    """T and Ṫ of erf for variances a, b and covariance c: arcsine kernels."""
    size = (1 + 2 * a) * (1 + 2 * b)
    return 2 / np.pi * np.arcsin(2 * c / np.sqrt(size)), 4 / np.pi / np.sqrt(size - 4 * c**2)


def first_layer(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Covariance and tangent kernel of the first pre-activations: equal, [N, N] each."""
    c = WEIGHT_STD**2 * x @ x.T / x.shape[1] + BIAS_STD**2
    return c, c


def activate(nngp: np.ndarray, ntk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T and Ṫ·NTK."""
    a = np.diag(nngp)
    products, slopes = erf_expectations(a[:, None], a[None, :], nngp)
    return products, slopes * ntk


def rest(nngp: np.ndarray, ntk: np.ndarray, layers: int) -> np.ndarray:
    """The tangent kernel of that many dense layers on top of an activation, [N, N]."""
    for index in range(layers):
        nngp, ntk = (
            WEIGHT_STD**2 * nngp + BIAS_STD**2,
            WEIGHT_STD**2 * (nngp + ntk) + BIAS_STD**2,
        )
        if index < layers - 1:
            nngp, ntk = activate(nngp, ntk)
    return ntk


def dense_limit(x: np.ndarray, depth: int) -> np.ndarray:
    """The tangent kernel of the infinitely wide dense network."""
    return rest(*activate(*first_layer(x)), depth - 1)


def mixture_limit(x: np.ndarray, depth: int, density: float) -> np.ndarray:
    """The same with a masked first layer: the mean over all 2^d masks behind the activation."""
    d = x.shape[1]
    nngp, ntk = np.zeros((2, len(x), len(x)))
    for kept in itertools.product((0, 1), repeat=d):
        chance = density ** sum(kept) * (1 - density) ** (d - sum(kept))
        products, slopes = activate(*first_layer(x * kept / np.sqrt(density)))
        nngp, ntk = nngp + chance * products, ntk + chance * slopes
    return rest(nngp, ntk, depth - 1)


def sign_mixture(agree: int, d: int, density: float) -> float:
    """The entry of `mixture_limit` at depth 2 for inputs ±1 that agree in `agree` of d places.

    Its covariance depends on the mask only through two binomial numbers: kept places where the
    inputs agree, and where they don't.
    """
    same, other = np.arange(agree + 1)[:, None], np.arange(d - agree + 1)
    chances = scipy.stats.binom.pmf(same, agree, density) * scipy.stats.binom.pmf(
        other, d - agree, density
    )
    variance, covariance = (
        WEIGHT_STD**2 * k / (d * density) + BIAS_STD**2 for k in (same + other, same - other)
    )
    products, slopes = erf_expectations(variance, variance, covariance)
    means = [np.sum(chances * k) for k in (products, slopes * covariance)]
    return float(WEIGHT_STD**2 * sum(means) + BIAS_STD**2)


# ---------------------------------------------------------------- rules


def approaches(
    name: str, widths: Any, found: list[np.ndarray], expected: np.ndarray
) -> tuple[Case, np.ndarray]:
    """The error falls as n^{-1/2}; also the errors, [groups, widths], relative."""
    scale = np.linalg.norm(expected)
    squares = [((k - expected) ** 2).sum((2, 3)).reshape(GROUPS, -1).mean(1) for k in found]
    errors = np.sqrt(squares).T / scale
    return slope(name, widths, errors, low=-0.65, high=-0.35), errors


def agrees(
    name: str, found: np.ndarray, expected: np.ndarray, error: np.ndarray, degrees: int
) -> Case:
    """|found − expected| ≤ q standard errors, entry by entry; Student's q for `RISK` in all."""
    upper = np.triu_indices(len(expected))
    q = scipy.stats.t.isf(RISK / 2 / len(upper[0]), degrees)
    case = below(name, np.abs(found - expected)[upper], q * error[upper])
    return case._replace(tightness=None)


def _within(name: str, draws: np.ndarray, expected: np.ndarray) -> Case:
    means = draws.mean(1)  # over the outputs of a draw, which share its hidden layers
    error = means.std(0, ddof=1) / np.sqrt(len(means))
    return agrees(name, means.mean(0), expected, error, len(means) - 1)


# ---------------------------------------------------------------- the check


SPARSE, MORE = 0.1, 3
"""Below this density errors fluctuate more between draws, so there are that many times as many."""


class _Plan(NamedTuple):
    depths: tuple[int, ...]
    densities: tuple[float, ...]
    widths: tuple[int, ...]
    draws: tuple[int, ...]


def check(context: Context) -> Outcome:
    """Drawn networks against the dense limit, and against the mixture where the first is masked."""
    plan = context.pick(
        _Plan((2,), (0.2,), (64, 256), (64, 64)),
        _Plan((2, 3, 4), (0.05, 0.2, 0.5), (256, 512, 1024), (64, 32, 16)),
        _Plan((2, 3, 4), (0.05, 0.2, 0.5), (256, 512, 1024, 2048), (128, 64, 64, 32)),
    )
    x = context.rng(1).normal(size=(POINTS, 6))
    key = jax.random.key(context.seed)
    widths = plan.widths
    check = Recorder(STATEMENT)
    for step, depth in enumerate(plan.depths):
        expected = dense_limit(x, depth)
        networks = [mlp(width, depth, x.shape[1], "erf") for width in widths]

        def kernels(label: int, masks: Masks, networks: Any = networks) -> list[np.ndarray]:
            found = []
            more = MORE if masks.density.min() < SPARSE else 1
            for index, (network, draws) in enumerate(zip(networks, plan.draws, strict=True)):
                keys = jax.random.split(jax.random.fold_in(key, label * 64 + index), more * draws)
                found.append(drawn_kernels(network, x, masks, keys))
            return found

        errors = {}
        for index, p in enumerate(plan.densities):
            name = f"{depth} layers, p = {p:g}"
            masks = random_masks([1, *[p] * (depth - 1)])
            if depth == plan.depths[-1]:
                by_library = analytic.network(
                    config_of(8, depth, "erf"), x.shape[1:], 1, density=tuple(masks.density)
                ).kernel_fn(jnp.asarray(x))
                limits = (by_library.ntk, expected)
                check.close(f"{name}: library's limit is the dense one", *limits, tolerance=1e-10)
            found = kernels(10 * depth + index, masks)
            case, errors[p] = approaches(f"{name}: approaches it", widths, found, expected)
            check.case(case)
            if depth == 2:  # every unit adds an independent term: no bias at any width
                check.case(_within(f"{name}: mean of the draws", found[-1], expected))
            context.progress((step + (index + 1) / len(plan.densities)) / (len(plan.depths) + 1))
        check.panel(_panel(f"{depth} layers, first one dense", widths, errors))
        p = 0.2
        if depth <= 3:
            found = kernels(10 * depth + 8, random_masks([p] * depth))
            name = f"{depth} layers, all masked, p = {p:g}"
            mixed = mixture_limit(x, depth, p)
            check.case(approaches(f"{name}: approaches the mixture", widths, found, mixed)[0])
            wrong = approaches("slope", widths, found, expected)[0]
            if depth == 2:
                check.case(_within(f"{name}: mean of the draws", found[-1], mixed))
                wrong = _within("mean of the draws", found[-1], expected)
            check.control(f"{name}, against the dense limit", wrong, breaks="dense first layer")
        if depth == plan.depths[0]:
            forgotten = kernels(10 * depth + 9, random_masks([1, *[p] * (depth - 1)], gain=False))
            wrong = approaches("slope", widths, forgotten, expected)[0]
            name = f"{depth} layers, p = {p:g}"
            check.control(f"{name}, without gain", wrong, breaks="gain")
            largest = kernels(10 * depth + 7, largest_masks(p, depth))
            wrong = approaches("slope", widths, largest, expected)[0]
            name = f"{name}, masks that keep the largest weights and the energy"
            check.control(name, wrong, breaks="random masks")
    _mixtures(check, context, x)
    check.panel(_order(check))
    return check.outcome()


def largest_masks(p: float, depth: int) -> Masks:
    """Above the first layer the weights of |w| > c, with the gain that keeps their energy."""
    c = scipy.stats.norm.isf(p / 2)
    gain = (p + 2 * c * scipy.stats.norm.pdf(c)) ** -0.5
    above = depth - 1
    return Masks(np.ones(depth), np.array([-1.0, *[c] * above]), np.array([1.0, *[gain] * above]))


def _mixtures(check: Recorder, context: Context, x: np.ndarray) -> None:
    """The library's mixture, from drawn masks, against the mean over all masks."""
    samples, groups = context.pick(2048, 8192, 65536), 32
    for depth, p in context.pick([(2, 0.3)], [(3, 0.3)], [(3, 0.3), (4, 0.5)]):
        config = config_of(8, depth, "erf")
        mixed = analytic.mixture(config, x.shape[1:], density=p, samples=samples, groups=groups)
        found = mixed(jax.random.key(context.seed), jnp.asarray(x))
        mean, error = np.asarray(found.mean.ntk), np.asarray(found.error.ntk)
        name = f"{depth} layers, all masked, p = {p:g}: library's mixture"
        check.case(agrees(name, mean, mixture_limit(x, depth, p), error, groups - 1))
        case = agrees("difference", mean, dense_limit(x, depth), error, groups - 1)
        check.control(f"{name} against the dense limit", case, breaks="dense first layer")


def _order(check: Recorder) -> Panel:
    """The mixture's distance from the dense limit against dp, for random inputs ±1."""
    sizes = np.array([64, 128, 256, 512])
    rows = {}
    for p in (0.1, 0.2, 0.5):
        rows[p] = []
        for d in sizes:
            # The same angle at every d: the inputs agree in three quarters of the places.
            agree = [d, 3 * d // 4]
            x = np.ones((2, d))
            x[1, : d // 4] = -1
            dense = dense_limit(x, 2)[0]
            mixed = np.array([sign_mixture(int(k), int(d), p) for k in agree])
            rows[p].append(np.linalg.norm(mixed - dense) / np.linalg.norm(dense))
    name = "distance of the mixture from the dense limit against d"
    check.slope(name, sizes, list(rows.values()), low=-1.15, high=-0.85)
    lines = [Line(f"p = {p:g}", sizes * p, row) for p, row in rows.items()]
    reference = lines[0].y[0] * lines[0].x[0] / np.asarray(lines[-1].x)
    lines.append(Line("1/(dp)", lines[-1].x, reference, "reference"))
    return Panel(
        "first layer masked",
        "kept inputs a unit dp",
        "distance from the dense limit, relative",
        lines,
        xscale="log",
    )


def _panel(title: str, widths: Any, errors: dict[float, np.ndarray]) -> Panel:
    means = {p: np.sqrt((e**2).mean(0)) for p, e in errors.items()}
    lines = [Line(f"p = {p:g}", widths, mean) for p, mean in means.items()]
    first = next(iter(means.values()))[0]
    falling = first * np.sqrt(widths[0] / np.asarray(widths))
    lines.append(Line("n^{−1/2}", widths, falling, "reference"))
    return Panel(
        title, "width n [units]", "distance from the dense limit, relative", lines, xscale="log"
    )
