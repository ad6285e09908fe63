"""Interval bounds of every operation that networks have: points inside, ends, and the gap."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from flax import nnx

from ntk_awt.errors import InputError
from ntk_awt.robustness.certified import intervals
from ntk_awt.robustness.certified.intervals import gap_bounds, output_bounds
from ntk_awt.threats import Linf

EVERYWHERE = (-np.inf, np.inf)


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


TIGHT: dict[str, Callable[[Any], Any]] = {
    "abs": jnp.abs,
    "leaky ReLU": jax.nn.leaky_relu,
    "leaky ReLU, 0.2": lambda x: jax.nn.leaky_relu(x, 0.2),
    "leaky ReLU, negative": lambda x: jax.nn.leaky_relu(x, -0.7),
    "ELU": jax.nn.elu,
    "ELU, 0.5": lambda x: jax.nn.elu(x, 0.5),
    "SELU": jax.nn.selu,
    "CELU": lambda x: jax.nn.celu(x, 2.0),
    "softplus": jax.nn.softplus,
    "log-sigmoid": jax.nn.log_sigmoid,
    "SiLU": jax.nn.silu,
    "SiLU, written out": lambda x: 2 * x * jax.nn.sigmoid(-3 * x),
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "GELU with tanh": jax.nn.gelu,
    "mish": jax.nn.mish,
    "hard SiLU": jax.nn.hard_swish,
    "hard tanh": jax.nn.hard_tanh,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "ReLU6": jax.nn.relu6,
    "soft sign": jax.nn.soft_sign,
    "clip": lambda x: jnp.clip(x, -0.5, 0.75),
    "clamp": lambda x: jax.lax.clamp(x.dtype.type(-0.5), x, x.dtype.type(0.75)),
    "sigmoid": jax.nn.sigmoid,
    "square": jnp.square,
    "x³": lambda x: x**3,
    "x⁴": lambda x: x**4,
    "x⁰": lambda x: x**0 + 0 * x,
    "expm1": jnp.expm1,
    "2^x": jnp.exp2,
    "one minus": lambda x: 1 - x / 3,
    "sign": jnp.sign,
    "step": lambda x: jnp.where(x > 0.125, 2.0, -1.0),
    "square root": lambda x: jnp.sqrt(x + 8),
    "logarithm": lambda x: jnp.log(x + 8),
    "log1p": lambda x: jnp.log1p(jnp.square(x)),
    "inverse root": lambda x: jax.lax.rsqrt(x + 8),
    "inverse": lambda x: 1 / (x + 8),
    "inverse square": lambda x: (x + 8) ** -2,
    "power": lambda x: (x + 8) ** 1.5,
}
"""Functions of one number whose least and largest values the bounds attain."""

LOOSE: dict[str, Callable[[Any], Any]] = {
    "own leaky ReLU": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "root of a size": lambda x: jnp.sqrt(jnp.abs(x)),
    "own step": lambda x: jnp.where((x > 0) & ~(x >= 1) | (x < -2), x, -x),
    "equal": lambda x: jnp.where((x == 0.5) | (x != x), 1.0, x),
    "logaddexp": lambda x: jnp.logaddexp(x, 0.3),
    "squareplus": jax.nn.squareplus,
    "log of a sum": lambda x: jnp.broadcast_to(jax.nn.logsumexp(x, 1, keepdims=True), x.shape),
    "GLU": lambda x: jnp.tile(jax.nn.glu(x, 1), (1, 2)),
    "layer norm": lambda x: nnx.LayerNorm(x.shape[1], epsilon=1.0, rngs=nnx.Rngs(0))(x),
    "RMS norm": lambda x: x / jnp.sqrt(jnp.mean(x**2, 1, keepdims=True) + 1),
    "softmax by hand": lambda x: jnp.exp(x) / jnp.exp(x).sum(1, keepdims=True),
    "softmax": lambda x: jax.nn.softmax(x, 1),
    "log-softmax": lambda x: jax.nn.log_softmax(x, 1),
    "softmax of columns": lambda x: jax.nn.softmax(x.reshape(-1, 2, x.shape[1] // 2), 1).reshape(
        x.shape
    ),
    "attention": lambda x: jax.nn.softmax(2 * x, -1) * x,
}
"""Others, bounded from outside."""


def network(functions: dict[str, Callable[[Any], Any]]) -> Callable[[Any, Any], Any]:
    """All functions of w·x + b side by side, [n, functions·pixels]."""

    def apply(w: Any, x: Any) -> Any:
        z = w["w"] * x + w["b"]
        return jnp.concatenate([f(z) for f in functions.values()], axis=1)

    return apply


PIXELS = 8


def drawn(seed: int, change: float = 0.3) -> tuple[Any, Any, Any, Any]:
    """Two weights, of very different sizes for each pixel, four images, and their threat."""
    rng = np.random.default_rng(seed)
    w = {
        "w": rng.choice([-1, 1], PIXELS) * 10 ** rng.uniform(-2, 0.8, PIXELS),
        "b": np.zeros(PIXELS),
    }
    w["b"] = rng.uniform(-1, 1, PIXELS)
    v = {name: leaf + change * rng.uniform(-1, 1, PIXELS) for name, leaf in w.items()}
    return w, v, rng.uniform(-1, 1, (4, PIXELS)), Linf(np.asarray(0.5), EVERYWHERE)


def points(x: Any, radius: float, count: int = 301) -> Any:
    """Points of the boxes: all ends and grid lines in one direction, then vertices and insides."""
    rng = np.random.default_rng(9)
    grid = np.linspace(-1, 1, count)[:, None, None] * np.ones(x.shape)
    inside = rng.uniform(-1, 1, (count, *x.shape))
    vertices = rng.choice([-1.0, 1.0], (count, *x.shape))
    return x + radius * np.concatenate([grid, inside, vertices])


def values(apply: Any, w: Any, z: Any) -> Any:
    flat = jax.jit(apply)(w, z.reshape(-1, z.shape[-1]))
    return np.asarray(flat).reshape(*z.shape[:2], -1)


def outside(names: Any, lower: Any, upper: Any, found: Any, allowance: float) -> set[str]:
    """Names of the functions that have a value outside of the bounds."""
    size = allowance * (1 + np.abs(found))
    wrong = ((found < np.asarray(lower) - size) | (found > np.asarray(upper) + size)).any((0, 1))
    return {
        name for name, bad in zip(names, wrong.reshape(len(names), -1).any(1), strict=True) if bad
    }


@pytest.mark.parametrize("functions", [TIGHT, LOOSE], ids=["tight", "loose"])
def test_points_are_inside_and_so_are_gaps(functions: dict[str, Any]):
    """Rounding of the values themselves is below 1e-13 of 1 + |f|, at arguments up to 10."""
    apply = network(functions)
    w, v, x, threat = drawn(0)
    z = points(x, 0.5)
    first, second = values(apply, w, z), values(apply, v, z)
    bounds, gap = intervals._checked(apply, w, v, x, threat)
    assert outside(functions, *bounds, first, 1e-13) == set()
    assert outside(functions, *gap, first - second, 1e-12) == set()
    assert np.isfinite(gap).all()


TURNS = (0.0, 0.125, -1.278464542761, -0.751791524694, -0.752461422071, -1.192431214515, -1.5)
"""Where a function of `TIGHT` has an inner extreme; a third of one, with its sign, written out."""


def test_functions_of_one_number_attain_their_bounds():
    apply = network(TIGHT)
    w, _, x, threat = drawn(1)
    turns = np.array([*TURNS, 1.278464542761 / 3])[:, None, None]
    z = np.clip((turns - w["b"]) / w["w"], x - 0.5, x + 0.5)
    # Both sides of a jump lie beside it.
    z = np.concatenate([z, x[None] - 0.5, x[None] + 0.5, np.clip(z + 1e-9, x - 0.5, x + 0.5)])
    found = values(apply, w, z)
    lower, upper = map(np.asarray, output_bounds(apply, w, x, threat))
    wide = np.maximum(np.abs(lower - found.min(0)), np.abs(upper - found.max(0)))
    size = 1e-11 * (1 + np.abs(found).max(0))
    loose = (wide > size).T.reshape(len(TIGHT), -1).any(1)
    assert [name for name, bad in zip(TIGHT, loose, strict=True) if bad] == []


def test_gaps_of_smooth_and_kinked_functions_shrink_with_the_weights():
    """A change of 1e-6: the gap is of that size, where plain differences are of the width."""
    jumps = {"sign", "step"}
    functions = {name: f for name, f in TIGHT.items() if name not in jumps}
    apply = network(functions)
    w, v, x, threat = drawn(2, 1e-6)
    gap = gap_bounds(apply, w, v, x, threat)
    widths = np.asarray(gap.upper - gap.lower).T.reshape(len(functions), -1).max(1)
    assert dict(zip(functions, widths, strict=True)) == {
        name: pytest.approx(0, abs=2e-3) for name in functions
    }


def test_softmax_is_exact_on_a_box_and_knows_no_level():
    low, high = np.array([[-1.0, 0.5, 0.0, 700.0]]), np.array([[0.0, 2.5, 0.1, 705.0]])
    right = {}
    for name, f in (("p", scipy.special.softmax), ("log", scipy.special.log_softmax)):
        ends = []
        for own, other in ((low, high), (high, low)):
            best = [f(np.where(np.arange(4) == i, own, other))[0, i] for i in range(4)]
            ends.append(np.array([best]))
        right[name] = ends
    x, radius = (low + high) / 2, (high - low) / 2

    def apply(w: Any, z: Any) -> Any:
        logits = w * z + x + 5 * z.sum(1, keepdims=True) * 0
        return jnp.concatenate([jax.nn.softmax(logits), jax.nn.log_softmax(logits)], axis=1)

    found = output_bounds(apply, radius, np.zeros((1, 4)), Linf(np.asarray(1.0), EVERYWHERE))
    for bound, ends in zip(found, zip(right["p"], right["log"], strict=True), strict=True):
        expected = np.concatenate(ends, axis=1)
        np.testing.assert_allclose(bound, expected, rtol=1e-9, atol=1e-11)

    def shifted(w: Any, z: Any) -> Any:
        return jax.nn.softmax(w * z[:, :1] + jnp.arange(3.0))

    # The same amount for all classes: nothing moves.
    gap = gap_bounds(shifted, np.ones(3), 2 * np.ones(3), np.ones((1, 2)), Linf(np.asarray(0.0)))
    assert np.abs(gap).max() < 1e-10


def test_float32_bounds_hold_in_float64():
    functions = TIGHT | LOOSE
    apply = network(functions)
    w, v, x = jax.tree.map(np.float32, drawn(3)[:3])
    threat = Linf(np.asarray(0.25, np.float32), EVERYWHERE)
    bounds, gap = intervals._checked(apply, w, v, x, threat)
    assert bounds.lower.dtype == jnp.float32
    wide, other = (jax.tree.map(np.float64, tree) for tree in (w, v))
    z = points(x.astype(np.float64), 0.25)
    first, second = values(apply, wide, z), values(apply, other, z)
    # Literals such as 0.1 are rounded to float32 in one of both networks.
    exact = set(functions) - {"own leaky ReLU", "leaky ReLU", "leaky ReLU, 0.2"}
    assert outside(functions, *bounds, first, 0.0) & exact == set()
    assert outside(functions, *gap, first - second, 0.0) & exact == set()


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("abs", lambda f: f._replace(turns=())),
        ("square", lambda f: f._replace(slope=lambda x: x)),
        ("rsqrt", lambda f: f._replace(value=jnp.sqrt)),
    ],
)
def test_a_wrong_rule_is_seen(name: str, defect: Any, monkeypatch: pytest.MonkeyPatch):
    functions = {n: TIGHT[n] for n in ("abs", "square", "inverse root")}
    w, v, x, threat = drawn(0)
    z = points(x, 0.5)
    monkeypatch.setitem(intervals._UNARY, name, defect(intervals._UNARY[name]))

    def apply(w: Any, x: Any) -> Any:  # traced anew
        return network(functions)(w, x)

    first, second = values(apply, w, z), values(apply, v, z)
    bounds, gap = intervals._checked(apply, w, v, x, threat)
    assert outside(functions, *bounds, first, 1e-13) | outside(
        functions, *gap, first - second, 1e-12
    )


def test_inner_extremes_are_zeros_of_the_derivatives():
    """The turns and bends of each function: φ' and φ'' change their signs there."""
    smooth = {
        "silu": intervals._SILU,
        "mish": intervals._mish(),
        "tanh-gelu": intervals._tanh_gelu(np.sqrt(2 / np.pi), 0.044715),
        "gelu": intervals._GELU,
    }
    grid, zero = np.linspace(-8, 8, 1601), partial(scipy.optimize.brentq, xtol=1e-15)
    for name, function in smooth.items():
        slope: Any = function.slope
        np.testing.assert_allclose(
            jax.vmap(jax.grad(function.value))(grid), slope(grid), atol=1e-12, err_msg=name
        )
        for derivative, inner in ((slope, function.turns), (jax.grad(slope), function.bends)):
            found = np.asarray(jax.vmap(derivative)(grid))
            at = np.nonzero(found[1:] * found[:-1] < 0)[0]
            zeros: Any = [zero(derivative, grid[i], grid[i + 1]) for i in at]
            np.testing.assert_allclose(zeros, inner, atol=1e-9, err_msg=name)


def test_a_function_that_only_has_the_name_is_bounded_by_its_operations():
    @jax.jit
    def leaky_relu(x: Any) -> Any:
        return -3.0 * x

    found = output_bounds(
        lambda w, x: leaky_relu(w * x),
        np.ones(1),
        np.zeros((1, 1)),
        Linf(np.asarray(1.0), EVERYWHERE),
    )
    np.testing.assert_allclose(np.ravel(found), [-3, 3], rtol=1e-12)


@pytest.mark.parametrize(
    ("apply", "text"),
    [
        (lambda w, x: jnp.sin(w * x), "got the operation sin"),
        (lambda w, x: jnp.cumsum(w * x, 1), "got the operation cumsum"),
        (lambda w, x: (w * x).astype(jnp.bfloat16), "from float64 to bfloat16"),
        (lambda w, x: jnp.abs(w * x) ** w, "pow with an exponent that is no number"),
        (lambda w, x: jnp.log(w * x), "leave its domain"),
        (lambda w, x: 1 / (w * x), "leave its domain"),
    ],
)
def test_what_has_no_bounds_is_refused(apply: Any, text: str):
    with pytest.raises(InputError, match=text):
        output_bounds(apply, np.ones(1), np.zeros((1, 1)), Linf(np.asarray(1.0), EVERYWHERE))


def test_a_box_for_each_channel():
    """x ± 1 in [0, 0.5] and [−3, 3]."""
    low, high = np.array([0.0, -3.0]), np.array([0.5, 3.0])
    x = jnp.full((1, 2, 2), 0.25)
    threat = Linf(np.asarray(1.0), EVERYWHERE)
    start = intervals._start(x, threat)
    assert np.asarray(start.upper - start.lower).min() >= 2

    class Boxed:
        epsilon, bounds = np.asarray(1.0), (low, high)

    found = intervals._start(x, Boxed())
    np.testing.assert_allclose(found.lower, [[[0.0, -0.75]] * 2], atol=1e-14)
    np.testing.assert_allclose(found.upper, [[[0.5, 1.25]] * 2], atol=1e-14)
