"""E1: the kernel of a masked two-layer network concentrates, with an explicit constant."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.kernels import empirical
from ntk_awt.theory.dynamics.existence import concentration_bound, entry_bound, tail_probability
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
    slope,
)
from proofs_check.instances.two_layer import (
    Setting,
    dense_limit,
    inputs,
    kernel_terms,
    limit,
    quantiles,
)

STATEMENT = Statement(
    number="E1",
    title="Concentration with explicit constants",
    claim="the kernel of a randomly masked two-layer network is near its limit, with a probability "
    "and a distance that the width decides",
    formula="P(max entry error ≥ t) ≤ N(N+1) exp(−n t²/(2B²)), so with probability ≥ 1 − δ "
    "‖Θ^s − Θ^∞‖_F/N ≤ B √(2 ln(N(N+1)/δ)/n); B = (1+R²)/p for masked units, 1 + R²/p for masked "
    "weights of the first layer, (1 + R²/p)/p for both; Θ^∞ = E Θ^s: the dense limit for masked "
    "units, the mixture over masks for masked weights",
    hypotheses={
        "Gaussian weights": "w_j ~ N(0, I), a_j = ±1",
        "independent units": "units are drawn independently of each other",
        "Bernoulli masks": "m ~ Bernoulli(p), p > 0, independent of the weights",
        "gain": "gain 1/√p",
        "bounded": "|φ|, |φ'| ≤ 1",
        "inputs": "R² = max ‖x‖²/d",
    },
    instances="erf(√π u/2), sin and tanh, N = 4 and 5 inputs, p from 0.05 to 0.5, masked units, "
    "weights and both, widths 64 to 4096, 400 draws",
    rule="all but the share δ of the draws are below the bound, for the largest error of an entry, "
    "which is at least ‖·‖_F/N; the slope of the distance in the width is −1/2 ± 0.1 (95 % "
    "interval over ten groups of draws); no unit's term exceeds B; the kernel of one network by "
    "the library equals the formula",
    tolerance="slope: as the theory states it; bounds: 1e-9, and 1e-12 for sums, rounding",
    source="theory E1; Hoeffding 1963",
)

DELTAS = (0.3, 0.1, 0.02)
BLOCK = 64
WIDTHS = BLOCK * 4 ** np.arange(4)
"""Widths at which each drawn network is looked at: its first 64, 256, 1024 and 4096 units."""


# ---------------------------------------------------------------- activations and their limits


TRACED: dict[str, Callable[[Any], Any]] = {
    "erf": lambda u: jax.scipy.special.erf(np.sqrt(np.pi) / 2 * u),
    "sin": jnp.sin,
    "tanh": jnp.tanh,
}
"""The same in JAX, for a network that the library differentiates."""


# ---------------------------------------------------------------- networks


def _masks(
    setting: Setting, rng: np.random.Generator, shape: tuple[int, ...], *, gain: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Masks of units [*shape] and of weights [*shape, d], times the gain 1/√p."""
    p = setting.density
    scale = p**-0.5 if gain else 1.0

    def draw(*size: int) -> np.ndarray:
        return scale * (rng.random(size) < p)

    units = None if setting.masked == "weights" else draw(*shape)
    weights = None if setting.masked == "units" else draw(*shape, setting.x.shape[1])
    return units, weights


def kernels(
    setting: Setting,
    rng: np.random.Generator,
    draws: int,
    *,
    gain: bool = True,
    copies: int = 1,
    spread: float = 1.0,
    aligned: bool = False,
) -> np.ndarray:
    """Θ^s of drawn networks at each of WIDTHS, [draws, widths, N, N].

    Args:
        setting: of the network.
        rng: of weights and masks.
        draws: number of networks.
        gain: False forgets the factor 1/√p.
        copies: every unit is there that many times, 1 or a multiple of BLOCK.
        spread: standard deviation of the weights.
        aligned: masks keep the units with the largest |w·x_1|.
    """
    found = []
    blocks = WIDTHS[-1] // BLOCK
    counts = WIDTHS // BLOCK
    different = (blocks, BLOCK) if copies == 1 else (WIDTHS[-1] // copies, 1)
    for start in range(0, draws, 32):  # not all at once: memory
        shape = (min(32, draws - start), *different)
        w = spread * rng.normal(size=(*shape, setting.x.shape[1]))
        units, weights = _masks(setting, rng, shape, gain=gain)
        if aligned:
            size = np.abs(w @ setting.x[0])
            units = setting.density**-0.5 * (size > np.quantile(size, 1 - setting.density))
        sums = kernel_terms(setting, w, units, weights)
        means = np.repeat(sums, blocks // shape[1], axis=1) / shape[2]
        found.append(np.cumsum(means, axis=1)[:, counts - 1] / counts[:, None, None])
    return np.concatenate(found)


# ---------------------------------------------------------------- the rules


def constant(setting: Setting) -> float:
    """B of the statement."""
    p, r2 = setting.density, setting.radius2
    return {"units": (1 + r2) / p, "weights": 1 + r2 / p, "both": (1 + r2 / p) / p}[setting.masked]


def bound(b: float, points: int, width: Any, delta: Any) -> np.ndarray:
    """B·√(2 ln(N(N+1)/δ)/n)."""
    return b * np.sqrt(2 * np.log(points * (points + 1) / np.asarray(delta)) / width)


def _errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Largest error of an entry, [draws, widths]; ‖·‖_F/N is at most that."""
    return np.abs(found - expected).max((-1, -2))


def _concentrates(name: str, setting: Setting, errors: np.ndarray, b: float) -> Case:
    """The violation rate is at most δ: all but the share δ of the draws are below the bound."""
    allowed = bound(b, len(setting.x), WIDTHS[None, :], np.array(DELTAS)[:, None])
    return below(name, quantiles(errors, DELTAS), allowed)


def _falls(name: str, found: np.ndarray, expected: np.ndarray) -> Case:
    """‖Θ^s − Θ^∞‖_F/N, root mean square over each of ten groups of draws, against the width."""
    squares = ((found - expected) ** 2).mean((-1, -2))
    groups = np.sqrt([part.mean(0) for part in np.array_split(squares, 10)])
    return slope(name, WIDTHS, groups, low=-0.6, high=-0.4)


def _entries(setting: Setting, rng: np.random.Generator, *, size: int = 4096) -> np.ndarray:
    """Largest |term| of each unit, [units]."""
    w = rng.normal(size=(size, 1, setting.x.shape[1]))
    return np.abs(kernel_terms(setting, w, *_masks(setting, rng, (size, 1), gain=True))).max((1, 2))


def _network(setting: Setting, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One network's kernel: by the library, through its gradients, and by the formula."""
    n, d = 40, setting.x.shape[1]
    p, act = setting.density, TRACED[setting.activation]
    w = rng.normal(size=(n, d))
    signs = rng.choice([-1.0, 1.0], size=(n, 1))
    units, weights = _masks(setting, rng, (n,), gain=False)

    def apply(params: Any, x: Any) -> jax.Array:
        return act(x @ params["w"] / np.sqrt(d)) @ params["a"] / np.sqrt(n)

    mask = {
        "w": np.ones((d, n), bool) if weights is None else weights.T > 0,
        "a": np.ones((n, 1), bool) if units is None else units[:, None] > 0,
    }
    gain = {"w": 1.0 if weights is None else p**-0.5, "a": 1.0 if units is None else p**-0.5}
    params = jax.tree.map(jnp.asarray, {"w": w.T, "a": signs})
    by_library = empirical(
        apply, params, jnp.asarray(setting.x), mask=mask, gain=jax.tree.map(jnp.asarray, gain)
    )
    scaled = (None if m is None else m / np.sqrt(p) for m in (units, weights))
    return np.asarray(by_library)[..., 0, 0], kernel_terms(setting, w, *scaled) / n


# ---------------------------------------------------------------- the check


def check(context: Context) -> Outcome:
    """Drawn networks against the bound and the rate; one network against the library's kernel."""
    draws = context.pick(200, 400, 2000)
    rng = context.rng(1)
    x = inputs(rng, 4, 6, 1.0)
    settings = [
        Setting("tanh", "units", 0.2, x),
        Setting("sin", "weights", 0.3, inputs(rng, 4, 6, 1.5)),
    ]
    if context.size != "reduced":
        settings += [
            Setting("erf", "units", 0.5, inputs(rng, 5, 6, 1.5)),
            Setting("sin", "units", 0.05, x),
            Setting("erf", "weights", 0.5, x),
            Setting("erf", "both", 0.3, x),
        ]
    check = Recorder(STATEMENT)
    for done, setting in enumerate(settings):
        name, points = setting.name, len(setting.x)
        b, expected = constant(setting), limit(setting)
        found = kernels(setting, rng, draws)
        errors = _errors(found, expected)
        of = (setting.density, setting.radius2)
        library = [
            concentration_bound(points, int(n), *of, delta, masked=setting.masked)
            for n in WIDTHS
            for delta in DELTAS
        ]
        stated = bound(b, points, WIDTHS[:, None], np.array(DELTAS)).ravel()
        tails = [
            tail_probability(t, points, int(n), *of, masked=setting.masked)
            for t, n in zip(stated, np.repeat(WIDTHS, len(DELTAS)), strict=True)
        ]
        check.close(f"{name}: library's bound", library, stated, tolerance=1e-12)
        check.close(f"{name}: library's tail", tails, np.tile(DELTAS, len(WIDTHS)), tolerance=1e-9)
        check.close(f"{name}: kernel by gradients", *_network(setting, rng), tolerance=1e-12)
        check.below(f"{name}: |terms| ≤ B", _entries(setting, rng).max(), b)
        check.case(
            _concentrates(f"{name}: all but δ of the draws", setting, errors, b),
            _falls(f"{name}: rate", found, expected),
        )
        if done < 2:
            check.panel(_panel(setting, errors))
        context.progress((done + 1) / (len(settings) + 1))
    _controls(check, rng, draws)
    return check.outcome()


def _controls(check: Recorder, rng: np.random.Generator, draws: int) -> None:
    x = inputs(rng, 4, 6, 1.0)
    sparse = Setting("sin", "units", 0.02, x)
    cube = Setting("cube", "units", 0.5, x)
    plain = Setting("tanh", "units", 0.2, x)
    weights = Setting("sin", "weights", 0.3, x)
    both = Setting("erf", "both", 0.25, inputs(rng, 4, 4, 2.0))
    few = min(draws, 200)
    mixed = kernels(weights, rng, few)

    def concentrates(setting: Setting, share: float = 1.0, **options: Any) -> Case:
        errors = _errors(kernels(setting, rng, draws, **options), limit(setting))
        name = f"p = {setting.density:g}"
        return _concentrates(name, setting, errors, share * constant(setting))

    def falls(**options: Any) -> Case:
        return _falls("rate", kernels(plain, rng, few, **options), limit(plain))

    check.control("B = 1 + R², without 1/p", concentrates(sparse, sparse.density), breaks=FORMULA)
    check.control("unbounded activation u³", concentrates(cube), breaks="bounded")
    name = "units that are not independent (each 2048 times)"
    check.control(name, concentrates(plain, copies=2048), breaks="independent units")
    check.control("no gain", falls(gain=False), breaks="gain")
    case = _falls("rate", mixed, dense_limit(weights.activation, weights.x))
    check.control("masked weights against the dense limit", case, breaks=FORMULA)
    single = entry_bound(both.density, both.radius2)
    case = below("|terms|", _entries(both, rng).max(), single)
    check.control("both layers masked with the B of one", case, breaks=FORMULA)
    check.control(
        "density 0",
        lambda: concentration_bound(len(x), 64, 0.0, plain.radius2, 0.1),
        breaks="Bernoulli masks",
    )
    name = "masks that keep the largest |w·x_1|"
    check.control(name, falls(aligned=True), breaks="Bernoulli masks")
    check.control("weights N(0, I/9)", falls(spread=1 / 3), breaks="Gaussian weights")
    longer = _entries(plain._replace(x=4 * x), rng).max()
    case = below("|terms|", longer, constant(plain))
    check.control("inputs four times as long as R says", case, breaks="inputs")


def _panel(setting: Setting, errors: np.ndarray) -> Panel:
    lines = []
    for delta, found in zip(DELTAS[1:], quantiles(errors, DELTAS)[1:], strict=True):
        allowed = bound(constant(setting), len(setting.x), WIDTHS, delta)
        lines += [
            Line(f"measured, 1 − δ = {1 - delta:g}", WIDTHS, found),
            Line(f"bound, 1 − δ = {1 - delta:g}", WIDTHS, allowed, "bound"),
        ]
    first = lines[0].y[0]
    lines.append(Line("n^{−1/2}", WIDTHS, first * np.sqrt(WIDTHS[0] / WIDTHS), "reference"))
    return Panel(setting.name, "width n [units]", "largest error of an entry", lines, xscale="log")
