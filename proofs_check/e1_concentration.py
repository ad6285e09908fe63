"""E1: the kernel of a masked two-layer network concentrates, with an explicit constant."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from ntk_awt.kernels import empirical
from ntk_awt.theory.dynamics.existence import concentration_bound, entry_bound, tail_probability
from proofs_check.core import (
    Context,
    Line,
    Outcome,
    Panel,
    Statement,
    below,
    close,
    refuses,
    rejects,
    slope,
)

STATEMENT = Statement(
    number="E1",
    title="Concentration with explicit constants",
    claim="the kernel of a randomly masked two-layer network is near its limit, with a probability "
    "and a distance that the width decides",
    formula="P(max entry error ≥ t) ≤ N(N+1) exp(−n t²/(2B²)), so with probability ≥ 1 − δ "
    "‖Θ^s − Θ^∞‖_F/N ≤ B √(2 ln(N(N+1)/δ)/n); B = (1+R²)/p for masked units, 1 + R²/p for masked "
    "weights of the first layer, (1 + R²/p)/p for both",
    hypotheses=(
        "two layers, a_j = ±1, w_j ~ N(0, I), independent units, Bernoulli masks, gain 1/√p",
        "|φ|, |φ'| ≤ 1 and R² = max ‖x‖²/d",
        "Θ^∞ is the expectation: the dense limit for masked units, the mixture over masks for "
        "masked weights",
    ),
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


class Activation(NamedTuple):
    """φ, φ', and E φ(u)φ(v), E φ'(u)φ'(v) for variances a, b and covariance c."""

    value: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    expectations: Callable[[Any, Any, Any], tuple[np.ndarray, np.ndarray]]


def _scaled_erf(a: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    """Arcsine kernels of erf(√π·u/2), whose slope exp(−πu²/4) is at most 1."""
    a, b, c = (np.pi / 4 * np.asarray(k) for k in (a, b, c))
    size = (1 + 2 * a) * (1 + 2 * b)
    return 2 / np.pi * np.arcsin(2 * c / np.sqrt(size)), 1 / np.sqrt(size - 4 * c**2)


def _sine(a: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    half = np.exp(-(np.asarray(a) + b) / 2)
    return half * np.sinh(c), half * np.cosh(c)


def _quadrature(value: Callable[[Any], Any], derivative: Callable[[Any], Any]) -> Any:
    """Gauss–Hermite with 80² nodes: for tanh at variances up to 1.5 the error is below 1e-5."""

    def expectations(a: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        weights = weights / weights.sum()
        a, b, c = (k[..., None, None] for k in np.broadcast_arrays(a, b, c))
        first = np.sqrt(a) * nodes[:, None]
        second = c / np.sqrt(a) * nodes[:, None] + np.sqrt(np.maximum(b - c**2 / a, 0)) * nodes
        found = [
            np.einsum("...st,s,t", f(first) * f(second), weights, weights)
            for f in (value, derivative)
        ]
        return found[0], found[1]

    return expectations


def _tanh_slope(u: Any) -> Any:
    return 1 - np.tanh(u) ** 2


def _cube_slope(u: Any) -> Any:
    return 3 * u**2


ACTIVATIONS = {
    "erf": Activation(
        lambda u: scipy.special.erf(np.sqrt(np.pi) / 2 * u),
        lambda u: np.exp(-np.pi / 4 * u**2),
        _scaled_erf,
    ),
    "sin": Activation(np.sin, np.cos, _sine),
    "tanh": Activation(np.tanh, _tanh_slope, _quadrature(np.tanh, _tanh_slope)),
    "cube": Activation(lambda u: u**3, _cube_slope, _quadrature(lambda u: u**3, _cube_slope)),
}
"""Of these only the cube breaks |φ|, |φ'| ≤ 1; it is for a control."""

TRACED: dict[str, Callable[[Any], Any]] = {
    "erf": lambda u: jax.scipy.special.erf(np.sqrt(np.pi) / 2 * u),
    "sin": jnp.sin,
    "tanh": jnp.tanh,
}
"""The same in JAX, for a network that the library differentiates."""


class Setting(NamedTuple):
    """One network without its weights: what is masked, and at which inputs x [N, d]."""

    activation: str
    masked: str
    density: float
    x: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.activation}, {self.masked} masked, p = {self.density:g}"

    @property
    def radius2(self) -> float:
        """R² = max (1/d) Σ_i |x_i x'_i| over all pairs."""
        return float((np.abs(self.x) @ np.abs(self.x).T).max() / self.x.shape[1])


def inputs(rng: np.random.Generator, points: int, dimension: int, square: float) -> np.ndarray:
    """Points with (1/d)‖x‖² = `square` that are correlated with each other, [N, d]."""
    x = rng.normal(size=dimension) + rng.normal(size=(points, dimension))
    return x * np.sqrt(square * dimension / (x**2).sum(1, keepdims=True))


def dense_limit(activation: str, x: np.ndarray) -> np.ndarray:
    """Θ^∞ = T + Ṫ·(x·x'/d), [N, N]."""
    c = x @ x.T / x.shape[1]
    a = np.diag(c)
    products, slopes = ACTIVATIONS[activation].expectations(a[:, None], a[None, :], c)
    return products + slopes * c


def limit(setting: Setting) -> np.ndarray:
    """Θ^∞: the dense limit if only units are masked, else the mean over all 2^d masks."""
    if setting.masked == "units":
        return dense_limit(setting.activation, setting.x)
    d, p = setting.x.shape[1], setting.density
    total = np.zeros((len(setting.x),) * 2)
    for kept in itertools.product((0, 1), repeat=d):
        chance = p ** sum(kept) * (1 - p) ** (d - sum(kept))
        total += chance * dense_limit(setting.activation, setting.x * kept / np.sqrt(p))
    return total


# ---------------------------------------------------------------- networks


def kernel_terms(
    setting: Setting, w: np.ndarray, units: np.ndarray | None, weights: np.ndarray | None
) -> np.ndarray:
    """Σ over units of what each adds to n·Θ, [..., N, N].

    Args:
        setting: inputs and activation.
        w: [..., n, d].
        units: m_j/√p [..., n], or None for 1.
        weights: m_ij/√p [..., n, d], or None for 1.
    """
    x, act = setting.x, ACTIVATIONS[setting.activation]
    d = x.shape[1]
    u = (w if weights is None else w * weights) @ x.T / np.sqrt(d)
    value, derivative = act.value(u), act.slope(u)
    if units is not None:
        value, derivative = value * units[..., None], derivative * units[..., None]

    def gram(rows: np.ndarray) -> np.ndarray:
        return np.swapaxes(rows, -1, -2) @ rows

    if weights is None:
        return gram(value) + gram(derivative) * (x @ x.T / d)
    parts = (derivative * (weights[..., i : i + 1] * x[:, i] / np.sqrt(d)) for i in range(d))
    return gram(value) + sum(map(gram, parts))


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
) -> np.ndarray:
    """Θ^s of drawn networks at each of WIDTHS, [draws, widths, N, N].

    Args:
        setting: of the network.
        rng: of weights and masks.
        draws: number of networks.
        gain: False forgets the factor 1/√p.
        copies: every unit is there that many times, 1 or a multiple of BLOCK.
    """
    found = []
    blocks = WIDTHS[-1] // BLOCK
    counts = WIDTHS // BLOCK
    different = (blocks, BLOCK) if copies == 1 else (WIDTHS[-1] // copies, 1)
    for start in range(0, draws, 32):  # not all at once: memory
        shape = (min(32, draws - start), *different)
        w = rng.normal(size=(*shape, setting.x.shape[1]))
        sums = kernel_terms(setting, w, *_masks(setting, rng, shape, gain=gain))
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


def quantiles(errors: np.ndarray, deltas: tuple[float, ...] = DELTAS) -> np.ndarray:
    """The largest value but the share δ of the draws that may violate, [deltas, …]."""
    return np.quantile(errors, 1 - np.asarray(deltas), axis=0, method="higher")


def _errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Largest error of an entry, [draws, widths]; ‖·‖_F/N is at most that."""
    return np.abs(found - expected).max((-1, -2))


def _concentrates(name: str, setting: Setting, errors: np.ndarray, b: float) -> Any:
    """The violation rate is at most δ: all but the share δ of the draws are below the bound."""
    allowed = bound(b, len(setting.x), WIDTHS[None, :], np.array(DELTAS)[:, None])
    return below(name, quantiles(errors), allowed)


def _falls(name: str, found: np.ndarray, expected: np.ndarray) -> Any:
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
    cases, panels = [], []
    for done, setting in enumerate(settings):
        name, points = setting.name, len(setting.x)
        b, expected = constant(setting), limit(setting)
        found = kernels(setting, rng, draws)
        errors = _errors(found, expected)
        library = [
            concentration_bound(
                points, int(n), setting.density, setting.radius2, delta, masked=setting.masked
            )
            for n in WIDTHS
            for delta in DELTAS
        ]
        stated = bound(b, points, WIDTHS[:, None], np.array(DELTAS)).ravel()
        tails = [
            tail_probability(
                t, points, int(n), setting.density, setting.radius2, masked=setting.masked
            )
            for t, n in zip(stated, np.repeat(WIDTHS, len(DELTAS)), strict=True)
        ]
        cases += [
            close(f"{name}: library's bound", library, stated, tolerance=1e-12),
            close(f"{name}: library's tail", tails, np.tile(DELTAS, len(WIDTHS)), tolerance=1e-9),
            close(f"{name}: kernel by gradients", *_network(setting, rng), tolerance=1e-12),
            below(f"{name}: |terms| ≤ B", _entries(setting, rng).max(), b),
            _concentrates(f"{name}: all but δ of the draws", setting, errors, b),
            _falls(f"{name}: rate", found, expected),
        ]
        if done < 2:
            panels.append(_panel(setting, errors))
        context.progress((done + 1) / (len(settings) + 1))
    return Outcome(cases, _controls(rng, draws), panels)


def _controls(rng: np.random.Generator, draws: int) -> list[Any]:
    x = inputs(rng, 4, 6, 1.0)
    sparse = Setting("sin", "units", 0.02, x)
    cube = Setting("cube", "units", 0.5, x)
    plain = Setting("tanh", "units", 0.2, x)
    weights = Setting("sin", "weights", 0.3, x)
    both = Setting("erf", "both", 0.25, inputs(rng, 4, 4, 2.0))

    def errors(setting: Setting, expected: np.ndarray | None = None, **options: Any) -> np.ndarray:
        found = kernels(setting, rng, draws, **options)
        return _errors(found, limit(setting) if expected is None else expected)

    few = min(draws, 200)
    mixed = kernels(weights, rng, few)
    single = entry_bound(both.density, both.radius2)
    return [
        rejects(
            "B = 1 + R², without 1/p",
            _concentrates("p = 0.02", sparse, errors(sparse), constant(sparse) * sparse.density),
        ),
        rejects(
            "unbounded activation u³",
            _concentrates("p = 0.5", cube, errors(cube), constant(cube)),
        ),
        rejects(
            "units that are not independent (each 2048 times)",
            _concentrates("p = 0.2", plain, errors(plain, copies=2048), constant(plain)),
        ),
        rejects(
            "no gain", _falls("rate", kernels(plain, rng, few, gain=False), limit(plain))
        ),
        rejects(
            "masked weights against the dense limit",
            _falls("rate", mixed, dense_limit(weights.activation, weights.x)),
        ),
        rejects(
            "both layers masked with the B of one",
            below("|terms|", _entries(both, rng).max(), single),
        ),
        refuses(
            "density 0", lambda: concentration_bound(len(x), 64, 0.0, plain.radius2, 0.1)
        ),
    ]  # fmt: skip


def _panel(setting: Setting, errors: np.ndarray) -> Panel:
    lines = []
    for delta, found in zip(DELTAS[1:], quantiles(errors)[1:], strict=True):
        allowed = bound(constant(setting), len(setting.x), WIDTHS, delta)
        lines += [
            Line(f"measured, 1 − δ = {1 - delta:g}", WIDTHS, found),
            Line(f"bound, 1 − δ = {1 - delta:g}", WIDTHS, allowed, "bound"),
        ]
    first = lines[0].y[0]
    lines.append(Line("n^{−1/2}", WIDTHS, first * np.sqrt(WIDTHS[0] / WIDTHS), "reference"))
    return Panel(setting.name, "width n [units]", "largest error of an entry", lines, xscale="log")
