"""Interval propagation against closed forms, exact arithmetic and points of the threat sets."""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from ntk_awt import masks
from ntk_awt.errors import InputError
from ntk_awt.models import average_pool, max_pool
from ntk_awt.robustness.certified import intervals
from ntk_awt.robustness.certified.intervals import (
    Bounds,
    gap_bounds,
    loss_bounds,
    output_bounds,
    robustness_gap_bound,
    sup_gap,
)
from ntk_awt.threats import L2, Linf, StrongL2

SLOW = ("test_no_point_of_a_threat_set_is_outside cnn*",)

EVERYWHERE = (-np.inf, np.inf)
FUNCTIONS: dict[str, Any] = {
    name: intervals._UNARY[name] for name in ("tanh", "erf", "erfc", "logistic", "exp")
} | {"gelu": intervals._GELU}


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Patches inside the compiled propagation: what was traced before and after is forgotten."""
    yield monkeypatch
    monkeypatch.undo()
    forget()


def forget() -> None:
    compiled: Any = intervals._propagated
    compiled.clear_cache()


def linear(w: Any, x: Any) -> Any:
    return x.reshape(x.shape[0], -1) @ w


def mlp(w: Any, x: Any) -> Any:
    """Three activations in one network, in NTK parametrisation."""
    h = linear(w["a"], x) / 2.0 + 0.1 * w["bias"]
    parts = jnp.split(h, 3, axis=1)
    functions: list[Callable[[Any], Any]] = [
        jax.nn.relu,
        jnp.tanh,
        lambda z: jax.nn.gelu(z, approximate=False),
    ]
    h = jnp.concatenate([f(part) for f, part in zip(functions, parts, strict=True)], axis=1)
    return 0.25 * h @ w["b"]


def cnn(w: Any, x: Any) -> Any:
    """Convolutions with both poolings of the package and one of Flax's."""
    numbers = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, w["a"], (1, 1), "SAME", dimension_numbers=numbers)
    h = jax.nn.relu(h + w["bias"])
    pooled = jnp.concatenate(
        [
            max_pool(h),
            average_pool(h),
            nnx.max_pool(h, (2, 2), (2, 2)),
            nnx.avg_pool(h, (2, 2), (2, 2)),
        ],
        axis=-1,
    )
    return linear(w["b"], pooled)


def odd(w: Any, x: Any) -> Any:
    """The other operations: sub, neg, min, clip, exp, pad, rev, slices, sums, remat, division."""
    h = jax.checkpoint(lambda z: -linear(w["a"], z) - w["bias"])(x)
    low = jnp.minimum(h[:, ::-1], 0.3) + jnp.clip(h, -0.2, 0.2)
    padded = jnp.pad(jnp.exp(h[:, 1:4] / (1 + w["scale"] ** 2)), ((0, 0), (1, 2)))
    pooled = jnp.stack([h.max(1), h.min(1), h.sum(1)], axis=1)
    square = h * jnp.minimum(h, h + 0.1)
    return jnp.concatenate([linear(w["b"], low), padded, pooled, square], axis=1)


def weights(rng: np.random.Generator, **shapes: tuple[int, ...]) -> Any:
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


NETWORKS: dict[str, tuple[Any, dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "mlp": (mlp, {"a": (6, 12), "bias": (12,), "b": (12, 3)}, (3, 2)),
    "cnn": (cnn, {"a": (3, 3, 2, 3), "bias": (3,), "b": (48, 3)}, (4, 4, 2)),
    "odd": (odd, {"a": (4, 6), "bias": (6,), "b": (6, 2), "scale": (3,)}, (4,)),
}


def pair_of(name: str, rng: np.random.Generator, change: float = 0.2) -> tuple[Any, Any, Any, Any]:
    """A network, two sets of weights that differ by so much, and three images."""
    apply, shapes, shape = NETWORKS[name]
    first = weights(rng, **shapes)
    second = jax.tree.map(lambda w: w * (1 + change * rng.standard_normal(w.shape)), first)
    return apply, first, second, rng.uniform(0.1, 0.9, (3, *shape))


def points(rng: np.random.Generator, x: Any, threat: Any, count: int = 4000) -> Any:
    """Points of each image's threat set, [count, n, *shape]: vertices, spheres and the inside."""
    shape, axes = (count, *x.shape), tuple(range(2, x.ndim + 1))
    epsilon = float(threat.epsilon)
    if isinstance(threat, Linf):
        v = rng.uniform(-1, 1, shape)
        v = epsilon * np.where(rng.random((count, *[1] * x.ndim)) < 0.5, v, np.sign(v))
    else:
        v = rng.standard_normal(shape) * (rng.random(shape) < rng.random((count, *[1] * x.ndim)))
        lengths = np.sqrt((v**2).sum(axes, keepdims=True))
        v *= epsilon * rng.random((count, *[1] * x.ndim)) ** 0.1 / np.maximum(lengths, 1e-300)
    return np.clip(x + v, threat.bounds[0], threat.bounds[1])


def inside(bounds: Bounds, values: Any, allowance: float) -> bool:
    lower, upper = map(np.asarray, bounds)
    return bool((values >= lower - allowance).all() and (values <= upper + allowance).all())


def values_at(apply: Any, params: Any, z: Any) -> Any:
    flat = np.asarray(apply(params, z.reshape(-1, *z.shape[2:])))
    return flat.reshape(*z.shape[:2], -1)


# ---------------------------------------------------------------- soundness


@pytest.mark.parametrize(
    ("name", "threat"),
    [
        *((name, Linf(epsilon)) for name in NETWORKS for epsilon in (0.05, 0.3)),
        *(("cnn", L2(epsilon)) for epsilon in (0.1, 0.6)),
    ],
)
def test_no_point_of_a_threat_set_is_outside(name: str, threat: Any, x64: None):
    rng = np.random.default_rng(3)
    apply, first, second, x = pair_of(name, rng)
    z = points(rng, x, threat)
    run = jax.jit(apply)
    a, b = (values_at(run, w, z) for w in (first, second))
    own, others = (output_bounds(apply, w, x, threat) for w in (first, second))
    gap = gap_bounds(apply, first, second, x, threat)
    assert inside(own, a, 1e-13)
    assert inside(others, b, 1e-13)
    assert inside(gap, a - b, 1e-13)
    plain = Bounds(own.lower - others.upper, own.upper - others.lower)
    assert inside(plain, np.asarray(gap), 1e-12 * float(np.abs(plain).max()))
    lengths = np.asarray(sup_gap(apply, first, second, x, threat))
    assert (np.linalg.norm(a - b, axis=2) <= lengths + 1e-13).all()


def test_float32_bounds_hold_for_the_network_in_float64():
    rng = np.random.default_rng(4)
    apply, first, second, x = pair_of("mlp", rng, change=1e-3)
    first, second, x = jax.tree.map(np.float32, (first, second, x))
    threat = Linf(0.02)
    own = output_bounds(apply, first, x, threat)
    gap = gap_bounds(apply, first, second, x, threat)
    assert own.lower.dtype == gap.upper.dtype == jnp.float32
    with jax.enable_x64(True):
        wide, other = (jax.tree.map(np.float64, w) for w in (first, second))
        z = points(rng, x.astype(np.float64), threat)
        a, b = (values_at(jax.jit(apply), w, z) for w in (wide, other))
        exact = gap_bounds(apply, wide, other, x.astype(np.float64), threat)
    assert inside(own, a, 0.0)
    assert inside(gap, a - b, 0.0)
    assert (np.asarray(gap.upper) >= np.asarray(exact.upper)).all()  # looser, by rounding alone
    np.testing.assert_allclose(gap.upper, exact.upper, rtol=0.2)


def test_a_small_change_of_the_weights_has_a_small_bound(x64: None):
    rng = np.random.default_rng(5)
    for name in NETWORKS:
        apply, first, second, x = pair_of(name, rng, change=1e-6)
        gap = gap_bounds(apply, first, second, x, Linf(0.05))
        own = output_bounds(apply, first, x, Linf(0.05))
        assert np.asarray(gap.upper - gap.lower).max() < 1e-3
        assert np.asarray(own.upper - own.lower).max() > 0.1


def test_equal_weights_have_no_gap_and_the_order_only_turns_the_sign(x64: None):
    rng = np.random.default_rng(6)
    apply, first, second, x = pair_of("mlp", rng)
    zero = gap_bounds(apply, first, jax.tree.map(np.copy, first), x, Linf(0.1))
    assert max(np.abs(zero.lower).max(), np.abs(zero.upper).max()) < 1e-10
    forth = gap_bounds(apply, first, second, x, Linf(0.1))
    back = gap_bounds(apply, second, first, x, Linf(0.1))
    np.testing.assert_allclose(forth.lower, -back.upper, rtol=1e-12)
    np.testing.assert_allclose(forth.upper, -back.lower, rtol=1e-12)


def test_radius_zero_gives_the_network_itself_and_images_do_not_mix(x64: None):
    rng = np.random.default_rng(7)
    apply, first, second, x = pair_of("cnn", rng)
    a, b = (np.asarray(apply(w, x)) for w in (first, second))
    np.testing.assert_allclose(output_bounds(apply, first, x, Linf(0.0)).lower, a, atol=1e-11)
    np.testing.assert_allclose(
        gap_bounds(apply, first, second, x, L2(0.0)).upper, a - b, atol=1e-11
    )
    together = gap_bounds(apply, first, second, x, Linf(0.1))
    others = gap_bounds(apply, first, second, x[[1, 0, 0]], Linf(0.1))
    np.testing.assert_allclose(together.upper[1], others.upper[0], rtol=1e-12)


def test_a_masked_network_is_its_effective_weights(x64: None):
    rng = np.random.default_rng(8)
    apply, first, _, x = pair_of("mlp", rng)
    mask = jax.tree.map(lambda w: rng.random(w.shape) < 0.5, first)
    gain = jax.tree.map(lambda w: np.float64(1.3), first)
    sparse = masks.effective(first, mask, gain)
    z = points(rng, x, Linf(0.05))
    found = gap_bounds(apply, first, sparse, x, Linf(0.05))
    gap = values_at(apply, first, z) - values_at(masks.masked(apply, mask, gain), first, z)
    assert inside(found, gap, 1e-13)


# ---------------------------------------------------------------- closed forms and exact oracles


@pytest.mark.parametrize("bounds", [EVERYWHERE, (0.0, 1.0)])
def test_linear_networks_are_exact(bounds: tuple[float, float], x64: None):
    rng = np.random.default_rng(9)
    w, v, x = rng.standard_normal((8, 3)), rng.standard_normal((8, 3)), rng.uniform(0, 1, (4, 8))
    epsilon = np.asarray(0.3)
    low, high = np.clip(x - epsilon, *bounds), np.clip(x + epsilon, *bounds)
    for first, found in (
        (w, output_bounds(linear, w, x, Linf(epsilon, bounds))),
        (w - v, gap_bounds(linear, w, v, x, Linf(epsilon, bounds))),
    ):
        up, down = np.maximum(first, 0), np.minimum(first, 0)
        np.testing.assert_allclose(found.upper, high @ up + low @ down, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(found.lower, low @ up + high @ down, rtol=1e-12, atol=1e-13)


def test_l2_balls_use_the_norms_of_the_first_weights(x64: None):
    rng = np.random.default_rng(10)
    w, v, x = rng.standard_normal((8, 3)), rng.standard_normal((8, 3)), rng.uniform(0, 1, (4, 8))
    threat = L2(np.asarray(0.3), EVERYWHERE)
    strong = StrongL2(np.asarray(0.3), 0.1, np.eye(8)[:, :1], EVERYWHERE)
    for found in (gap_bounds(linear, w, v, x, t) for t in (threat, strong)):
        reach = 0.3 * np.linalg.norm(w - v, axis=0)
        np.testing.assert_allclose(found.upper, x @ (w - v) + reach, atol=1e-12)
        np.testing.assert_allclose(found.lower, x @ (w - v) - reach, atol=1e-12)
    images = x.reshape(4, 2, 4, 1)
    moved = output_bounds(
        lambda w, z: linear(w, z[:, ::-1].transpose(0, 2, 1, 3)), w, images, threat
    )
    wide = np.asarray(moved.upper - moved.lower)
    np.testing.assert_allclose(wide, 0.6 * np.linalg.norm(w, axis=0) + 0 * wide, rtol=1e-12)
    # A pixel used twice: the copies are no ball of the same radius.
    twice = output_bounds(lambda w, z: (z[:, :, None] + 0 * w[:, 0]).sum(2), w, x, threat)
    np.testing.assert_allclose(twice.upper - twice.lower, 8 * 0.6, rtol=1e-12)


def _exact_product(w: Any, box: list[tuple[Fraction, Fraction]]) -> list[tuple[Fraction, Fraction]]:
    """Interval arithmetic without rounding."""
    ends = []
    for column in np.asarray(w, float).T:
        pairs = [
            sorted((Fraction(float(c)) * low, Fraction(float(c)) * high))
            for c, (low, high) in zip(column, box, strict=True)
        ]
        ends.append(
            (sum((p[0] for p in pairs), Fraction(0)), sum((p[1] for p in pairs), Fraction(0)))
        )
    return ends


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_outward_rounding_against_exact_arithmetic(dtype: str, x64: None):
    """Sums that cancel: bounds that round to the nearest would lie inside the exact interval."""
    rng = np.random.default_rng(11)
    first = rng.standard_normal((40, 30)).astype(dtype) * 10.0 ** rng.integers(-3, 4, (40, 30))
    first, second = first.astype(dtype), rng.standard_normal((30, 20)).astype(dtype)
    x = rng.uniform(-1, 1, (1, 40)).astype(dtype)
    epsilon = np.asarray(2.0**-40 if dtype == "float64" else 2.0**-18, dtype)

    def network(w: Any, z: Any) -> Any:
        return jax.nn.relu(z @ w[0]) @ w[1]

    found = output_bounds(network, (first, second), x, Linf(epsilon, EVERYWHERE))
    radius = Fraction(float(epsilon))
    box = [(Fraction(float(c)) - radius, Fraction(float(c)) + radius) for c in x[0]]
    hidden = [(max(a, Fraction(0)), max(b, Fraction(0))) for a, b in _exact_product(first, box)]
    exact = _exact_product(second, hidden)

    def misses(lower: Any, upper: Any) -> int:
        ends = zip(exact, np.ravel(lower), np.ravel(upper), strict=True)
        return sum(
            a < Fraction(float(low)) or b > Fraction(float(high)) for (a, b), low, high in ends
        )

    assert misses(*found) == 0
    low, high = x - epsilon, x + epsilon
    for w in (first, second):
        up, down = np.maximum(w, 0), np.minimum(w, 0)
        low, high = low @ up + high @ down, high @ up + low @ down
        if w is first:
            low, high = np.maximum(low, 0), np.maximum(high, 0)
    assert misses(low, high) > 0  # the oracle sees roundings
    if dtype == "float64":
        wide = np.asarray(found.upper - found.lower)[0]
        assert (wide <= 1.1 * np.array([float(b - a) for a, b in exact])).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_functions_are_as_accurate_as_the_bounds_take_for_granted(dtype: str, x64: None):
    x = np.linspace(-12, 12, 20_001).astype(dtype)
    wide = x.astype(np.float64)
    bell = np.exp(-(wide**2)) * 2 / np.sqrt(np.pi)
    expit = scipy.special.expit(wide)
    density = np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
    cdf = scipy.special.ndtr(wide)
    exact = {
        "tanh": (np.tanh(wide), 1 - np.tanh(wide) ** 2),
        "erf": (scipy.special.erf(wide), bell),
        "erfc": (scipy.special.erfc(wide), -bell),
        "logistic": (expit, expit * scipy.special.expit(-wide)),
        "exp": (np.exp(wide), np.exp(wide)),
        "gelu": (wide * cdf, cdf + wide * density),
    }
    assert set(FUNCTIONS) == set(exact)
    found = jax.jit(lambda x: {k: (f.value(x), f.slope(x)) for k, f in FUNCTIONS.items()})(x)
    for name, pair in exact.items():
        for computed, expected in zip(found[name], pair, strict=True):
            assert computed.dtype == dtype
            allowed = np.finfo(dtype).eps * (1 + np.abs(expected))
            assert np.max(np.abs(np.asarray(computed) - expected) / allowed) < 8, name


def test_ranges_of_functions_and_slopes_against_a_grid(x64: None):
    rng = np.random.default_rng(12)
    low = rng.uniform(-3, 3, 200)
    high = low + rng.uniform(0, 3, 200)
    grid = low + (high - low) * np.linspace(0, 1, 2001)[:, None]

    def ranges(low: Any, high: Any, grid: Any) -> Any:
        box = intervals._Box(low, high)
        return {
            (name, which): (*intervals._range(value, inner, box)[:2], value(grid))
            for name, f in FUNCTIONS.items()
            for which, value, inner in (("φ", f.value, f.turns), ("φ'", f.slope, f.bends))
        }

    for found in jax.jit(ranges)(low, high, grid).values():
        lower, upper, values = map(np.asarray, found)
        assert (values >= lower).all()
        assert (values <= upper).all()
        np.testing.assert_allclose(lower, values.min(0), atol=1e-5)
        np.testing.assert_allclose(upper, values.max(0), atol=1e-5)


def test_gelu_is_recognised_and_another_product_is_still_bounded(x64: None):
    x, threat = np.zeros((1, 1)), Linf(np.asarray(2.0), EVERYWHERE)

    def gelu(w: Any, z: Any) -> Any:
        return 3.0 * jax.nn.gelu(-(w * z), approximate=False)

    def silu(w: Any, z: Any) -> Any:
        return w * z * jax.nn.sigmoid(w * z + 0.0)

    w, grid = np.ones(1), np.linspace(-2, 2, 1001)[:, None]
    found = output_bounds(gelu, w, x, threat)
    least = -0.5099136224  # 3·min uΦ(u)
    np.testing.assert_allclose(np.ravel(found), [least, 6 * scipy.special.ndtr(2.0)], rtol=1e-9)
    found = output_bounds(silu, w, x, threat)
    assert inside(found, grid * scipy.special.expit(grid), 0.0)
    assert found.lower[0, 0] < -0.5  # wider than the least value, -0.2785
    gap = gap_bounds(gelu, w, 1.1 * w, x, threat)
    exact = [-3 * c * grid * scipy.special.ndtr(-c * grid) for c in (1.0, 1.1)]
    assert inside(gap, exact[0] - exact[1], 1e-14)


# ---------------------------------------------------------------- losses and risks


def test_loss_bounds_contain_the_losses_and_are_the_loss_at_radius_zero(x64: None):
    rng = np.random.default_rng(13)
    apply, first, _, x = pair_of("mlp", rng)
    y, threat = np.array([0, 2, 1]), Linf(0.2)

    def losses(logits: Any) -> Any:
        own = np.take_along_axis(logits, np.broadcast_to(y[:, None], (*logits.shape[:-1], 1)), -1)
        return scipy.special.logsumexp(logits, axis=-1) - own[..., 0]

    values = losses(values_at(apply, first, points(rng, x, threat)))
    assert inside(loss_bounds(apply, first, x, y, threat), values, 1e-13)
    exact = loss_bounds(apply, first, x, y, Linf(0.0))
    np.testing.assert_allclose(exact.upper, losses(np.asarray(apply(first, x))), rtol=1e-9)
    np.testing.assert_allclose(exact.upper, exact.lower, rtol=1e-9)
    # Two classes of a linear network whose logits use different pixels: exact.
    w, one = np.array([[1.0, 0.0], [0.0, -2.0]]), np.array([[0.5, 0.5]])
    certified = loss_bounds(linear, w, one, np.array([0]), Linf(np.asarray(0.25)))
    np.testing.assert_allclose(certified.upper, np.log1p(np.exp(-0.5 - 0.25)), rtol=1e-12)


def test_the_bound_of_the_risks_is_the_constant_times_the_mean(x64: None):
    rng = np.random.default_rng(14)
    apply, first, second, x = pair_of("mlp", rng)
    lengths = np.asarray(sup_gap(apply, first, second, x, Linf(0.1)))
    bound = robustness_gap_bound(apply, first, second, x, Linf(0.1))
    np.testing.assert_allclose(bound, np.sqrt(2) * lengths.mean(), rtol=1e-12)
    assert float(bound) >= np.sqrt(2) * lengths.mean()


def test_the_constants_are_the_largest_gradients(x64: None):
    rng = np.random.default_rng(15)
    logits = rng.standard_normal((10_000, 4)) * 10.0 ** rng.uniform(-1, 2, (10_000, 1))
    gradients = scipy.special.softmax(logits, axis=1) - np.eye(4)[0]
    largest = np.linalg.norm(gradients, axis=1).max()
    assert 1.41 < largest <= intervals.LIPSCHITZ["cross_entropy"] * (1 + 1e-15)
    slopes = scipy.special.expit(-logits)
    assert 0.999 < slopes.max() <= intervals.LIPSCHITZ["logistic"]


# ---------------------------------------------------------------- planted defects


def _signed(times: Any, terms: int, left: Any, right: Any) -> Any:
    """W·r in place of |W|·r."""
    (c1, r1), (c2, r2) = intervals._centred(left), intervals._centred(right)
    centre, radius = times(c1, c2), times(c1, r2) + times(r1, c2)
    return intervals._Box(centre - radius, centre + radius)


def _unchanged(times: Any, terms: int, x: Any, y: Any) -> Any:
    """D = D_in·W without the change of W."""
    first, second = (
        intervals._product(times, terms, a, b) for a, b in zip(x[:2], y[:2], strict=True)
    )
    return intervals._Pair(first, second, intervals._product(times, terms, x.difference(), y[0]))


@pytest.mark.parametrize(
    ("attribute", "defect"),
    [
        ("_product", _signed),
        ("_bilinear", _unchanged),
        ("_start", lambda x, threat: intervals._Box(x, x + threat.epsilon)),
        ("_UNARY", {k: f._replace(bends=()) for k, f in intervals._UNARY.items()}),
    ],
)
def test_planted_defects_are_outside(
    attribute: str, defect: Any, planted: pytest.MonkeyPatch, x64: None
):
    """Linear logits, where intervals are exact, and tanh of one pixel, with equal slopes inside."""

    def apply(w: Any, z: Any) -> Any:
        return jnp.concatenate([z @ w["a"], jnp.tanh(z[:, :1] * w["c"] + w["b"])], axis=1)

    first = {"a": np.array([[1.0], [-1.0]]), "b": np.full(1, -1.0), "c": np.full((1, 1), 2.0)}
    second = {"a": np.array([[0.5], [0.7]]), "b": np.full(1, -0.95), "c": np.full((1, 1), 2.0)}
    x, threat = np.full((1, 2), 0.5), Linf(np.asarray(0.3), EVERYWHERE)
    z = 0.5 + 0.3 * np.stack(np.meshgrid(*[np.linspace(-1, 1, 101)] * 2), -1).reshape(-1, 2)
    gap = np.asarray(apply(first, z) - apply(second, z))
    assert inside(gap_bounds(apply, first, second, x, threat), gap, 1e-14)
    forget()
    planted.setattr(intervals, attribute, defect)
    assert not inside(gap_bounds(apply, first, second, x, threat), gap, 1e-14)


# ---------------------------------------------------------------- bad input


class _Other:
    epsilon, bounds = 0.1, (0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply": lambda w, x: jnp.sin(x @ w)}, "network: expected .*got the operation sin"),
        (
            {"apply": lambda w, x: x / (x @ w - 1)},
            "a division, root or logarithm may leave its domain",
        ),
        (
            {"apply": lambda w, x: (x @ w).astype(int) * 1.0},
            "convert_element_type from float32 to int",
        ),
        (
            {"apply": lambda w, x: (x @ w)[:, 0]},
            "logits: expected shape (1, classes), got shape (1,)",
        ),
        ({"threat": _Other()}, "threat: expected Linf, L2 or StrongL2, got _Other"),
        ({"threat": Linf(-0.1)}, "epsilon: expected a number in [0"),
        ({"x": np.full((1, 2), 1.5)}, "images: expected values in [0, 1]"),
        ({"x": np.zeros((1, 2), int)}, "images: expected floating-point images"),
        ({"x": np.zeros((0, 2))}, "images: expected at least one, got none"),
        ({"w": np.full((2, 2), np.nan)}, "params: expected finite values"),
        ({"v": np.zeros((2, 3))}, "second network : expected shape (2, 2), got shape (2, 3)"),
        ({"v": np.full((2, 2), np.inf)}, "second network: expected finite values"),
        ({"apply": lambda w, x: jnp.exp(1e6 * (1 + x @ w))}, "bounds"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str):
    given = {
        "apply": lambda w, x: x @ w,
        "w": np.ones((2, 2)),
        "v": np.zeros((2, 2)),
        "x": np.full((1, 2), 0.5),
        "threat": Linf(0.1),
    } | change
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(InputError, match=pattern):
        gap_bounds(given["apply"], given["w"], given["v"], given["x"], given["threat"])


def test_bad_labels_and_losses_are_named():
    w, x = np.ones((2, 2)), np.full((1, 2), 0.5)
    with pytest.raises(InputError, match="labels: expected"):
        loss_bounds(linear, w, x, np.array([2]), Linf(0.1))
    with pytest.raises(InputError, match="loss: expected one of cross_entropy, logistic"):
        robustness_gap_bound(linear, w, w, x, Linf(0.1), loss="squared")
    with pytest.raises(InputError, match="logits: expected one for the logistic loss, got 2"):
        robustness_gap_bound(linear, w, w, x, Linf(0.1), loss="logistic")
