"""Threat models against their definitions in float64, and wrong ones that the checks reject."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import example, given, settings

from ntk_awt import threats
from ntk_awt.app.config import ThreatConfig
from ntk_awt.errors import InputError
from ntk_awt.threats import L2, THREATS, Linf, StrongL2
from tests import threat_models
from tests.threat_models import ORDER, RATIO, make

SLOW = ("test_random_start_is_inside l2",)

U = 2.0**-24  # unit roundoff of float32
NAMES = sorted(THREATS)
every_threat = pytest.mark.parametrize("name", NAMES)
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def norms(v: Any, order: float) -> np.ndarray:
    """Norm of each image, in float64."""
    v = np.asarray(v, np.float64)
    return np.linalg.norm(v.reshape(len(v), -1), ord=order, axis=1)


project = jax.jit(lambda threat, z, x: threat.project(z, x))
random_start = jax.jit(lambda threat, keys, x: threat.random_start(keys, x))


def wrong(base: type, **methods: Any) -> Any:
    """A threat model like `base` with some methods replaced."""
    cls = type(f"Wrong{base.__name__}", (base,), methods)
    return threats.register(cls)


# ---------------------------------------------------------------- cases


class Case(NamedTuple):
    """One projection: `z` onto B(x)."""

    z: np.ndarray
    x: np.ndarray
    epsilon: float
    bounds: Any


UNIT = (0.0, 1.0)
Z_SCORED = (-0.857142857142857, 2.0)  # of (pixel − 0.3)/0.35; the lower end is no float32
OPEN = (-math.inf, math.inf)


def by_pixel(d: int) -> Any:
    """Bounds of every other pixel: [-1, 1/3], and open above from 0.1."""
    odd = np.arange(d) % 2
    return np.where(odd, 0.1, -1.0), np.where(odd, math.inf, 1 / 3)


BOXES: dict[str, Callable[[int], Any]] = {
    "unit": lambda d: UNIT,
    "z-scored": lambda d: Z_SCORED,
    "open": lambda d: OPEN,
    "by pixel": by_pixel,
}


KINDS = ("far", "near", "inside", "sphere", "shift", "inward", "huge", "same")


def case(name: str, n: int, d: int, kind: str, epsilon: float, seed: int, bounds: Any) -> Case:
    """Random images with about half of their coordinates exactly at the ends of the box.

    Where the box is open the images are of any size up to 1e6.
    """
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-2, 6)
    low, high = (np.broadcast_to(np.asarray(bound, np.float64), d) for bound in bounds)
    darkest = np.where(np.isinf(low), -size, low)
    brightest = np.where(np.isinf(high), darkest + 2 * size, high)
    width = brightest - darkest
    x = np.clip(rng.uniform(darkest - width / 2, brightest + width / 2, (n, d)), low, high)
    x = x.astype(np.float32)
    noise = rng.normal(size=(n, d))
    noise /= norms(noise, ORDER[name])[:, None]  # on the unit sphere of the ball's norm
    v = {
        "far": 1e3 * noise,
        "near": epsilon * noise * (1 + 1e-6 * rng.normal(size=(n, 1))),
        "inside": epsilon * noise * rng.uniform(0, 1, (n, 1)),
        "sphere": epsilon * noise,
        "shift": np.full((n, d), rng.uniform(-1, 1)),
        "inward": 2
        * epsilon
        * np.abs(noise)
        * np.where(x < (darkest + brightest) / 2, 1, -1),  # no clip
        "huge": 1e15 * noise,
        "same": 0 * noise,
    }[kind]
    return Case((x + v).astype(np.float32), x, epsilon, bounds)


EPSILONS = [0.0, 1e-6, 1e-3, 8 / 255, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0]
SHAPES = [(4, 1), (1, 2), (4, 17), (2, 784), (4, 3000)]


def cases(name: str) -> st.SearchStrategy[Case]:
    return st.builds(
        lambda where, kind, epsilon, seed: case(
            name, where[0][0], where[0][1], kind, epsilon, seed, BOXES[where[1]](where[0][1])
        ),
        st.sampled_from(list(itertools.product(SHAPES, BOXES))[::3]),  # each of both is among them
        st.sampled_from(KINDS),
        st.one_of(st.sampled_from(EPSILONS), st.floats(1e-6, 10)),
        st.integers(0, 2**32 - 1),
    )


# ---------------------------------------------------------------- checks


def check_inside(z: Any, x: Any, name: str, epsilon: float, bounds: Any) -> None:
    """Both constraints hold in float64 without any slack, and nothing is NaN.

    What the images were scaled to may itself be beyond the box by a rounding.

    For L∞ float64 subtraction of float32 values and the comparison are exact wherever it matters;
    the float64 L2 norm errs by less than 1e-12 relative, against a margin of 1e-6.
    """
    z, x = np.asarray(z), np.asarray(x)
    assert z.dtype == x.dtype == np.float32
    assert z.shape == x.shape
    v = (z.astype(np.float64) - x.astype(np.float64)).reshape(len(x), -1)
    assert np.all(norms(v, ORDER[name]) <= epsilon)
    if name == "strong-l2":  # for the stored basis, and for the one that was given
        stored = np.asarray(make(name, epsilon, v.shape[1]).basis, np.float64)
        assert np.all(norms(v @ stored, 2) <= RATIO * epsilon)
        assert np.all(norms(threat_models.signal(v), 2) <= RATIO * epsilon)
    low, high = (np.asarray(bound, np.float64) for bound in bounds)
    assert np.all(z >= np.minimum(low, x))
    assert np.all(z <= np.maximum(high, x))


def check_projection(cls: Any, name: str, c: Case) -> None:
    """Inside, closed form, unchanged inside the set, x at ε = 0, a second time no change."""
    z, x, epsilon, bounds = c
    threat = make(name, epsilon, x.shape[1], bounds, cls)
    p = np.asarray(project(threat, z, x))
    check_inside(p, x, name, epsilon, bounds)

    # Closed form in float64. L∞ moves an end by one float, after two roundings, and so is within
    # 4u·(|x| + ε) of it. L2: the documented shrinking of the radius, relative 4(√d + 4)u, and the
    # rounding of each entry of the sum and of the box by less than a spacing, 2u(|x| + ε); rounding
    # errors of v = z − x and of its norm, of the size of that at most. The strong model's limit on
    # the signal is shrunk by 4√k(√d + 4)u·ε more; its nearest points have tests of their own.
    z64, x64 = z.astype(np.float64), x.astype(np.float64)
    low, high = (np.asarray(bound, np.float64) for bound in bounds)
    v = z64 - x64
    root = math.sqrt(x[0].size)
    if name == "linf":
        slack = 4 * U * (norms(x, np.inf) + epsilon)
        wanted = np.clip(np.clip(z64, x64 - epsilon, x64 + epsilon), low, high)
    else:
        slack = 2 * (4 * (root + 4) * U * epsilon + 2 * U * (norms(x, 2) + epsilon))
        length = norms(v, 2)[:, None]
        wanted = np.clip(x64 + v * np.minimum(1, epsilon / np.where(length, length, 1)), low, high)
    inside = (norms(v, ORDER[name]) <= epsilon - slack) & (z >= low).all(1) & (z <= high).all(1)
    if name == "strong-l2":
        slack += 8 * math.sqrt(3) * (root + 4) * U * epsilon
        inside &= norms(threat_models.signal(v), 2) <= RATIO * epsilon - slack
    else:
        assert np.all(norms(p - wanted, ORDER[name]) <= slack)

    # What lies in the set, by that margin, comes back bit by bit.
    np.testing.assert_array_equal(p[inside], z[inside])
    np.testing.assert_array_equal(project(threat, x, x), x)

    again = np.asarray(project(threat, p, x))
    check_inside(again, x, name, epsilon, bounds)
    # L2 and strong L2 measure the point that they made with a rounded norm, so they may scale a
    # second time.
    assert np.all(norms(again - p, ORDER[name]) <= (0 if name == "linf" else slack))

    nothing = make(name, 0.0, x.shape[1], bounds, cls)
    np.testing.assert_array_equal(project(nothing, z, x), x)


def check_ascent(cls: Any, name: str, gradient: np.ndarray) -> None:
    """In the set over ε, the largest inner product with the gradient there, zero for a zero one."""
    n, d = len(gradient), gradient[0].size
    threat = make(name, 0.1, d, cls=cls)
    direction = np.asarray(threat.ascent(jnp.asarray(gradient)), np.float64).reshape(n, d)
    g = gradient.astype(np.float64).reshape(n, d)
    zero = ~g.any(axis=1)
    assert not direction[zero].any()
    # Roundings: the norm at most (d + 4)u relative, one more for the division. In the strong model
    # the parts are differences of numbers of the gradient's size, and are few times smaller here.
    slack = (10 if name == "strong-l2" else 1) * (d + 8) * U
    np.testing.assert_allclose(norms(direction, ORDER[name])[~zero], 1, atol=slack)
    if name == "strong-l2":
        assert np.all(norms(threat_models.signal(direction), 2) <= RATIO + slack)
    inner = (direction * g).sum(1)
    scale = threat_models.reach(name, g, 1.0)
    np.testing.assert_allclose(inner, scale, rtol=slack, atol=0)  # the bound is reached
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = rng.normal(size=g.shape)
        other /= norms(other, ORDER[name])[:, None]
        if name == "strong-l2":
            other *= np.minimum(1, RATIO / norms(threat_models.signal(other), 2))[:, None]
        assert np.all((other * g).sum(1) <= inner + slack * scale)


def check_uniform_start(cls: Any, name: str) -> None:
    """Far from the box's ends the start is uniform in the ball, by Kolmogorov–Smirnov distances.

    The distance of n independent draws exceeds t with probability at most 2·exp(−2nt²) (Massart
    1990), so a right sampler fails with probability 1e-6 at most; and the radius is cut by 1e-4 at
    most, which moves a distribution function by 3e-4 at most.
    """
    n, d, epsilon = 4000, 3, 0.3
    x = jnp.full((n, d), 0.5)
    threat = cls(epsilon, 2 * epsilon, threat_models.basis(d)) if cls is StrongL2 else cls(epsilon)
    z = random_start(threat, jax.random.split(jax.random.key(1), n), x)
    v = (np.asarray(z, np.float64) - 0.5) / epsilon
    threshold = math.sqrt(math.log(2 / 1e-6) / (2 * n)) + 3e-4

    def uniform(samples: np.ndarray, low: float, high: float) -> None:
        result = scipy.stats.kstest(samples, "uniform", (low, high - low))
        assert result.statistic <= threshold

    uniform(norms(v, ORDER[name]) ** d, 0, 1)
    if name == "linf":
        for i in range(d):
            uniform(v[:, i], -1, 1)
    else:  # Archimedes: in three dimensions the height on the sphere is uniform
        direction = v / norms(v, 2)[:, None]
        for axis in [*np.eye(3).tolist(), [0.6, 0.0, 0.8], [1 / 3, 2 / 3, -2 / 3]]:
            uniform(direction @ np.array(axis), -1, 1)


def check_own_key(cls: Any, name: str) -> None:
    """An image's start does not change with the others' images and keys, or with its place."""
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 1, (4, 17)).astype(np.float32)
    other_x = rng.uniform(0, 1, (4, 17)).astype(np.float32)
    keys, other_keys = (jax.random.split(jax.random.key(k), 4) for k in (1, 2))
    threat = make(name, 0.2, 17, cls=cls)
    start = np.asarray(random_start(threat, keys, x))
    assert len(np.unique(start - x, axis=0)) == 4
    for i in range(4):
        mixed_keys = other_keys.at[i].set(keys[i])
        mixed_x = other_x.copy()
        mixed_x[i] = x[i]
        mixed = np.asarray(random_start(threat, mixed_keys, mixed_x))
        np.testing.assert_array_equal(mixed[i], start[i])
        assert np.any(np.delete(mixed - mixed_x != start - x, i, axis=0))
    order = np.array([2, 0, 3, 1])
    moved = random_start(threat, keys[order], x[order])
    np.testing.assert_array_equal(moved, start[order])


# ---------------------------------------------------------------- projection


@every_threat
def test_projection(name: str):
    @property_test
    @given(cases(name))
    def check(c: Case) -> None:
        check_projection(THREATS[name], name, c)

    check()


@every_threat
@pytest.mark.parametrize("shift", [1e-23, 1e-30, 1.2e-38])
@pytest.mark.parametrize("epsilon", [0.0, 1e-35])
def test_differences_whose_squares_underflow(name: str, shift: float, epsilon: float):
    x = np.zeros((2, 5), np.float32)
    z = np.full((2, 5), shift, np.float32)
    check_inside(project(make(name, epsilon, 5), z, x), x, name, epsilon, (0.0, 1.0))


def test_linf_is_the_nearest_point():
    """No feasible point is nearer in the Euclidean norm (up to the inward rounding)."""
    rng = np.random.default_rng(5)
    x = np.clip(rng.uniform(-0.5, 1.5, (4, 6)), 0, 1).astype(np.float32)
    z = (x + rng.normal(size=x.shape)).astype(np.float32)
    threat = Linf(0.3)
    nearest = norms(z - np.asarray(threat.project(jnp.asarray(z), jnp.asarray(x))), 2)
    for _ in range(200):
        other = np.clip(x + 0.3 * rng.uniform(-1.2, 1.2, x.shape).clip(-1, 1), 0, 1)
        assert np.all(nearest <= norms(z - other, 2) + 4 * U * 2 * math.sqrt(6))


@every_threat
@given(epsilon=st.floats(0, 10))
@property_test
@example(epsilon=0.1)
def test_radius_is_never_rounded_up(name: str, epsilon: float):
    threat = make(name, epsilon, 2)
    given = {"epsilon": epsilon, "delta": RATIO * epsilon}
    for radius in [radius for radius in given if hasattr(threat, radius)]:
        rounded = np.float64(getattr(threat, radius))
        assert rounded <= given[radius]
        assert float(np.nextafter(np.float32(rounded), np.float32(np.inf))) > given[radius]


@every_threat
def test_images_of_any_shape(name: str):
    c = case(name, 3, 24, "far", 0.25, 0, (0.0, 1.0))
    threat = make(name, c.epsilon, 24)
    flat = project(threat, c.z, c.x)
    image = project(threat, c.z.reshape(3, 2, 4, 3), c.x.reshape(3, 2, 4, 3))
    assert image.shape == (3, 2, 4, 3)
    # The sum of 24 squares may be taken in another order: (24 + 4)u of the radius, doubled.
    np.testing.assert_allclose(image.reshape(3, -1), flat, rtol=0, atol=56 * U)
    check_inside(image, c.x.reshape(3, 2, 4, 3), name, c.epsilon, (0.0, 1.0))


# ---------------------------------------------------------------- random start


@every_threat
@given(
    shape=st.sampled_from(SHAPES),
    epsilon=st.sampled_from(EPSILONS),
    seed=st.integers(0, 2**32 - 1),
)
@property_test
def test_random_start_is_inside(name: str, shape: tuple[int, int], epsilon: float, seed: int):
    x = case(name, *shape, "same", epsilon, seed, (0.0, 1.0)).x
    keys = jax.random.split(jax.random.key(seed), shape[0])
    start = random_start(make(name, epsilon, shape[1]), keys, x)
    check_inside(start, x, name, epsilon, (0.0, 1.0))


@every_threat
def test_random_start_is_uniform(name: str):
    check_uniform_start(THREATS[name], name)


@every_threat
def test_random_start_depends_on_its_own_key(name: str):
    check_own_key(THREATS[name], name)


# ---------------------------------------------------------------- ascent and distance


def gradients(scale: float) -> np.ndarray:
    g = np.random.default_rng(7).normal(size=(4, 3, 5)) * scale
    g[1, 0] = 0  # some zero coordinates
    g[2] = 0  # a zero gradient
    return g.astype(np.float32)


@every_threat
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_ascent(name: str, scale: float):
    check_ascent(THREATS[name], name, gradients(scale))


@every_threat
def test_distance(name: str):
    c = case(name, 4, 784, "far", 1.0, 1, (0.0, 1.0))
    z, x = c.z.reshape(4, 28, 28), c.x.reshape(4, 28, 28)
    got = make(name, 1.0, 784).distance(jnp.asarray(z), jnp.asarray(x))
    # One rounding of each difference and (d + 1)/2 of the norm at most.
    wanted = norms(c.z.astype(np.float64) - c.x, ORDER[name])
    np.testing.assert_allclose(got, wanted, rtol=400 * U)


@every_threat
def test_gauge(name: str):
    """By how much all radii must grow to hold the point; 0 at x, ∞ if nothing may move."""
    c = case(name, 4, 784, "far", 1.0, 1, (0.0, 1.0))
    z, x = jnp.asarray(c.z), jnp.asarray(c.x)
    v = c.z.astype(np.float64) - c.x
    wanted = norms(v, ORDER[name]) / 0.7
    if name == "strong-l2":
        wanted = np.maximum(wanted, norms(threat_models.signal(v), 2) / (RATIO * 0.7))
    np.testing.assert_allclose(make(name, 0.7, 784).gauge(z, x), wanted, rtol=1e-5)
    np.testing.assert_array_equal(make(name, 0.7, 784).gauge(x, x), 0)
    np.testing.assert_array_equal(make(name, 0.0, 784).gauge(x, x), 0)
    assert np.isinf(make(name, 0.0, 784).gauge(z, x)).all()


# ---------------------------------------------------------------- as a pytree, under jit


@every_threat
def test_radius_is_traced(name: str):
    traces = []

    @jax.jit
    def step(threat: Any, z: Any, x: Any, keys: Any) -> Any:
        traces.append(threat)
        start = threat.random_start(keys, x)
        return threat.project(start + threat.epsilon * threat.ascent(z), x), threat.epsilon

    x = jnp.full((2, 5), 0.5)
    keys = jax.random.split(jax.random.key(0), 2)
    for epsilon in (0.1, 0.2, 0.0, 8 / 255):
        z, radius = step(make(name, epsilon, 5), x, x, keys)
        check_inside(z, x, name, epsilon, (0.0, 1.0))
        assert radius == make(name, epsilon, 5).epsilon
    assert len(traces) == 1
    step(make(name, 0.1, 5, (-1.0, 1.0)), x, x, keys)  # the box is compiled in
    assert len(traces) == 2
    threat = make(name, 0.5, 5, (-1.0, 1.0))
    leaves, structure = jax.tree.flatten(threat)
    assert leaves[0] == 0.5
    again = structure.unflatten(leaves)
    assert vars(again) == vars(threat)
    assert type(again) is type(threat)


@every_threat
def test_eager_and_jit_agree(name: str):
    c = case(name, 4, 17, "far", 0.3, 2, (0.0, 1.0))
    threat, z, x = make(name, c.epsilon, 17), jnp.asarray(c.z), jnp.asarray(c.x)
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = [
        (threat.project(z, x), project(threat, z, x)),
        (threat.random_start(keys, x), random_start(threat, keys, x)),
        (threat.ascent(z), jax.jit(lambda t, g: t.ascent(g))(threat, z)),
    ]
    for eager, jitted in pairs:
        # Compiled as one, x + v·s is rounded once rather than twice, and a sum of 17 squares may be
        # taken in another order: (17 + 4)u relative.
        np.testing.assert_allclose(eager, jitted, rtol=21 * U, atol=21 * U)


def test_jit_tells_classes_apart():
    """A jit cache looks programs up by structure: two classes must never compare equal."""
    classes = [Linf, L2, wrong(Linf), wrong(Linf)]
    structures = [jax.tree.structure(cls(0.1)) for cls in classes]
    assert all(
        (a == b) == (i == j) for i, a in enumerate(structures) for j, b in enumerate(structures)
    )
    assert jax.tree.structure(Linf(0.1)) == jax.tree.structure(Linf(0.2))
    assert jax.tree.structure(Linf(0.1)) != jax.tree.structure(Linf(0.1, (-1.0, 1.0)))
    assert jax.tree.unflatten(structures[0], [classes[0](0.1).epsilon]) == classes[0](0.1)
    strong, other = (make("strong-l2", 0.1, 4, cls=c) for c in (StrongL2, wrong(StrongL2)))
    assert jax.tree.structure(strong) != jax.tree.structure(other)


def test_build():
    for name in NAMES:
        config = ThreatConfig(name=name, epsilon=0.1, delta=RATIO * 0.1)
        built = threats.build(config, (-1.0, 1.0), threat_models.basis(7))
        wanted = make(name, 0.1, 7, (-1.0, 1.0))
        assert jax.tree.structure(built) == jax.tree.structure(wanted)
        for leaf, wanted_leaf in zip(*map(jax.tree.leaves, (built, wanted)), strict=True):
            np.testing.assert_array_equal(leaf, wanted_leaf)
        with pytest.raises(dataclasses.FrozenInstanceError):
            built.epsilon = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="threat model: expected one of l2, linf, strong-l2"):
        threats.build(ThreatConfig(name="l3"), (0.0, 1.0))
    with pytest.raises(InputError, match="epsilon: expected a number in"):
        threats.build(ThreatConfig(name="l2", epsilon=-0.1), (0.0, 1.0))


# ---------------------------------------------------------------- the strong model's own


def convex_solver(
    w: np.ndarray, u: np.ndarray, epsilon: float, delta: float, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The nearest v to w with ‖v‖ ≤ ε, ‖Uᵀv‖ ≤ δ and low ≤ v ≤ high, by SciPy."""
    limits = [
        {"type": "ineq", "fun": lambda v: epsilon**2 - v @ v, "jac": lambda v: -2 * v},
        {
            "type": "ineq",
            "fun": lambda v: delta**2 - np.sum((u.T @ v) ** 2),
            "jac": lambda v: -2 * u @ (u.T @ v),
        },
    ]
    return scipy.optimize.minimize(
        lambda v: np.sum((v - w) ** 2) / 2,
        np.zeros_like(w),
        jac=lambda v: v - w,
        bounds=list(zip(low, high, strict=True)),
        constraints=limits,
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 300},
    ).x


STRONG = {"epsilon": 0.5, "delta": 0.15}


def strong_points(d: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, odd ones well inside the box, and points to 1.5ε away, mostly signal or mostly not.

    SciPy's nearest points lie on every combination of the three faces: ball, signal, box.
    """
    rng = np.random.default_rng(11)
    x = np.clip(rng.uniform(-0.5, 1.5, (n, d)), 0, 1)
    x[1::2] = rng.uniform(0.45, 0.55, (n, d))[1::2]
    inside = threat_models.signal(rng.normal(size=(n, d)))
    across = rng.normal(size=(n, d))
    across -= threat_models.signal(across)
    angle = np.arange(n) % 7 / 6 * np.pi / 2
    v = np.cos(angle)[:, None] * inside / norms(inside, 2)[:, None]
    v += np.sin(angle)[:, None] * across / norms(across, 2)[:, None]
    v *= STRONG["epsilon"] * rng.choice([0.1, 0.5, 0.9, 1.1, 1.5], n)[:, None]
    return x.astype(np.float32), (x + v).astype(np.float32)


@functools.cache
def solved(d: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, points and SciPy's nearest ones in the pixel box [low, high]."""
    x, z = strong_points(d, 84)
    u = np.linalg.qr(threat_models.basis(d))[0]
    x64, z64 = x.astype(np.float64), z.astype(np.float64)
    nearest = [
        x_i + convex_solver(z_i - x_i, u, **STRONG, low=low - x_i, high=high - x_i)
        for x_i, z_i in zip(x64, z64, strict=True)
    ]
    return x, z, np.array(nearest)


def check_nearest(cls: Any, d: int, bounds: tuple[float, float]) -> None:
    """The nearest point by SciPy: to rounding without the box, to 1 % of ε with it."""
    x, z, wanted = solved(d, *bounds)
    threat = cls(**STRONG, basis=threat_models.basis(d), bounds=bounds)
    p = np.asarray(project(threat, z, x), np.float64)
    assert np.all(norms(p - x, 2) <= STRONG["epsilon"])
    assert np.all(norms(threat_models.signal(p - x), 2) <= STRONG["delta"])
    assert p.min() >= bounds[0]
    assert p.max() <= bounds[1]
    distance = norms(p - wanted, 2)
    open_box = bounds == (-9.0, 9.0)
    # Without the box the formula is exact: 1e-5 covers the rounding of the radii and SciPy's error.
    # With it Dykstra's algorithm stops after some rounds; most points are done by then.
    assert distance.max() <= (1e-5 if open_box else 0.01 * STRONG["epsilon"])
    assert np.median(distance) <= 1e-4
    # What lies on the faces stays there.
    on = wanted.astype(np.float32)
    again = np.asarray(project(threat, on, x), np.float64)
    assert norms(again - wanted, 2).max() <= (1e-5 if open_box else 1e-4)


@pytest.mark.parametrize("d", [4, 9])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-9.0, 9.0)])
def test_strong_is_the_nearest_point(d: int, bounds: tuple[float, float]):
    check_nearest(StrongL2, d, bounds)


def test_nearest_points_lie_on_every_face():
    x, _, nearest = solved(9, 0.0, 1.0)
    v = nearest - x
    on_ball = norms(v, 2) > STRONG["epsilon"] - 1e-5
    on_signal = norms(threat_models.signal(v), 2) > STRONG["delta"] - 1e-5
    on_box = np.any((nearest < 1e-7) | (nearest > 1 - 1e-7), axis=1)
    assert len(set(zip(on_ball, on_signal, on_box, strict=True))) == 8


def test_strong_radii_and_basis_are_traced():
    traces = []

    @jax.jit
    def step(threat: Any, z: Any, x: Any) -> Any:
        traces.append(threat)
        return dataclasses.replace(threat, epsilon=2 * threat.epsilon).project(z, x)

    x, z = strong_points(5, 6)
    for epsilon, delta, seed in [(0.2, 0.1, 0), (0.3, 0.1, 0), (0.3, 0.05, 0), (0.3, 0.05, 1)]:
        b = np.random.default_rng(seed).normal(size=(5, 2))
        v = np.asarray(step(StrongL2(epsilon, delta, b), z, x), np.float64) - x
        assert np.all(norms(v, 2) <= 2 * epsilon)
        assert np.all(norms(v @ np.linalg.qr(b)[0], 2) <= delta)
        assert norms(v @ np.linalg.qr(b)[0], 2).max() > 0.999 * delta
    assert len(traces) == 1


def test_without_a_tighter_limit_it_is_the_ball():
    g = jnp.asarray(gradients(1.0))
    for delta in (0.1, 0.7):
        strong = StrongL2(0.1, delta, threat_models.basis(15))
        np.testing.assert_allclose(strong.ascent(g), L2(0.1).ascent(g), rtol=0, atol=4 * U)


def test_ascent_of_a_gradient_that_is_all_signal():
    """There is no direction across: the step is δ/ε long, and no rounding error is blown up."""
    b = threat_models.basis(15)
    g = (b @ [1.0, -2.0, 0.5]).reshape(1, 3, 5).astype(np.float32)
    step = np.asarray(StrongL2(0.1, 0.03, b).ascent(jnp.asarray(g)), np.float64)
    wanted = 0.3 * g / norms(g, 2)[0]
    np.testing.assert_allclose(step, wanted, rtol=0, atol=40 * U)
    whole = StrongL2(0.1, 0.03, np.eye(15)).ascent(jnp.asarray(g))
    np.testing.assert_allclose(whole, wanted, rtol=0, atol=40 * U)


def check_strong_start(cls: Any) -> None:
    """Far from the box's ends: uniform in the ball, with its signal part h cut at ±δ.

    In three dimensions the height h/ε of a uniform point has density 3(1 − h²)/4, and its distance
    from the axis b/ε has P(b ≤ r) = 1 − (1 − r²)^{3/2}; the cut leaves b as it is. Distances of
    distribution functions as for the uniform start.
    """
    n, epsilon, delta = 4000, 0.3, 0.12
    direction = np.array([[0.6], [0.0], [0.8]])
    x = jnp.full((n, 3), 0.5)
    threat = cls(epsilon, delta, direction)
    z = random_start(threat, jax.random.split(jax.random.key(1), n), x)
    v = (np.asarray(z, np.float64) - 0.5) / epsilon
    h = v @ direction[:, 0]
    b = norms(v - h[:, None] * direction[:, 0], 2)
    threshold = math.sqrt(math.log(2 / 1e-6) / (2 * n)) + 3e-4
    assert scipy.stats.kstest(1 - (1 - b**2) ** 1.5, "uniform").statistic <= threshold
    inner = np.linspace(-0.99, 0.99, 50) * delta / epsilon
    below = np.mean(h[:, None] <= inner, axis=0)
    np.testing.assert_allclose(below, 0.5 + (3 * inner - inner**3) / 4, rtol=0, atol=threshold)
    assert np.abs(h).max() <= delta / epsilon


def test_strong_start():
    check_strong_start(StrongL2)


def test_class_means_span_the_signal():
    rng = np.random.default_rng(4)
    y = rng.permutation(np.repeat([3, 5, 6, 9], [10, 20, 5, 5]))
    x = rng.uniform(size=(40, 4, 3)).astype(np.float32)
    u = threats.class_mean_basis(x, y)
    assert u.shape == (12, 3)
    np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-14)
    flat = x.reshape(40, 12).astype(np.float64)
    for one in (3, 5, 6, 9):
        for other in (3, 5, 6):
            difference = flat[y == one].mean(0) - flat[y == other].mean(0)
            np.testing.assert_allclose(u @ (u.T @ difference), difference, atol=1e-14)


BAD_BASES = {
    "one axis": (np.ones(4), r"basis: expected directions as columns .* got shape \(4,\)"),
    "no direction": (np.ones((4, 0)), "basis: expected directions as columns"),
    "rows, not columns": (np.eye(4)[:2], r"basis: expected .* 1 ≤ k ≤ d, got shape \(2, 4\)"),
    "dependent": (np.ones((4, 2)), "basis: expected 2 linearly independent columns, got rank 1"),
    "zero": (np.zeros((4, 1)), "got rank 0"),
    "NaN": (np.full((4, 1), np.nan), "basis: expected finite values"),
}


@pytest.mark.parametrize("bad", BAD_BASES)
def test_bad_basis(bad: str):
    basis, match = BAD_BASES[bad]
    with pytest.raises(InputError, match=match):
        StrongL2(0.1, 0.05, basis)


def test_bad_strong_settings():
    threat = StrongL2(0.1, 0.05, np.eye(4)[:, :2])
    x = jnp.full((2, 2, 3), 0.5)
    for use in (lambda: threat.project(x, x), lambda: threat.ascent(x)):
        with pytest.raises(InputError, match=r"basis: expected 6 rows for images of .*\(4, 2\)"):
            use()
    config = ThreatConfig(name="strong-l2", epsilon=0.1, delta=0.05)
    with pytest.raises(InputError, match="basis: expected the signal's directions"):
        threats.build(config, (0.0, 1.0))
    for delta in (0.0, 1e-7):
        lost = dataclasses.replace(config, delta=delta)
        with pytest.raises(InputError, match="delta: expected a limit that float32 images can"):
            threats.build(lost, (0.0, 1.0), np.eye(784)[:, :2])
    natural = dataclasses.replace(config, epsilon=0.0, delta=0.0)
    assert threats.build(natural, (0.0, 1.0), np.eye(4)[:, :2]).epsilon == 0
    with pytest.raises(InputError, match="labels: expected two classes or more, got 1"):
        threats.class_mean_basis(np.ones((3, 4)), [1, 1, 1])
    with pytest.raises(InputError, match="basis: expected 1 linearly independent columns"):
        threats.class_mean_basis(np.ones((3, 4)), [0, 1, 1])


# ---------------------------------------------------------------- wrong ones are rejected


def nearest_ends(self: Any, z: Any, x: Any) -> Any:
    """Without rounding inwards."""
    return jnp.clip(jnp.clip(z, x - self.epsilon, x + self.epsilon), *self.bounds)


def full_radius(self: Any, z: Any, x: Any, box_first: bool = False) -> Any:
    """Without rounding inwards, or with the clip before the ball."""
    epsilon = 0.9999 * self.epsilon if box_first else self.epsilon
    z = jnp.clip(z, *self.bounds) if box_first else z
    v = z - x
    length = jnp.linalg.norm(v, axis=1, keepdims=True)
    return jnp.clip(x + v * jnp.minimum(1, epsilon / jnp.maximum(length, 1e-30)), *self.bounds)


def one_key(base: type) -> Callable[..., Any]:
    def start(self: Any, keys: Any, x: Any) -> Any:
        return base.random_start(self, jnp.broadcast_to(keys[0], keys.shape), x)

    return start


def not_uniform(self: Any, keys: Any, x: Any) -> Any:
    """The length, not its d-th power, is uniform."""
    v = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
    v /= self.distance(v, 0 * v)[:, None]
    length = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(keys)
    return self.project(x + self.epsilon * length[:, None] * v, x)


def gradient_over_norm(self: Any, gradient: Any) -> Any:
    flat = gradient.reshape(len(gradient), -1)
    length = jnp.linalg.norm(flat, axis=1).reshape(-1, 1, 1)
    return gradient / jnp.maximum(length, 1e-38)


def to_nearest(self: Any, z: Any, x: Any) -> Any:
    """With a sum that is rounded to the nearest float."""
    v = z - x
    inner = 0.9999 * self.epsilon  # below the rounding of the norm
    length = jnp.linalg.norm(v, axis=1, keepdims=True)
    moved = jnp.where(length > inner, x + v * (inner / jnp.maximum(length, 1e-30)), z)
    return jnp.clip(moved, *threats.ends(self.bounds, x))


def into_the_box(self: Any, z: Any, x: Any) -> Any:
    """Also where the image itself is beyond it by a rounding."""
    p = Linf.project(self, z, x)
    return jnp.clip(p, *threats.ends(self.bounds, jnp.zeros_like(x)))


WRONG_PROJECTIONS = {
    "linf: images moved into the box": ("linf", into_the_box),
    "l2: sum rounded to nearest": ("l2", to_nearest),
    "linf: ends rounded to nearest": ("linf", nearest_ends),
    "linf: box forgotten": ("linf", lambda s, z, x: Linf(s.epsilon, (-9.0, 9.0)).project(z, x)),
    "l2: full radius": ("l2", full_radius),
    "l2: clip before ball": ("l2", partial(full_radius, box_first=True)),
    "l2: box forgotten": ("l2", lambda s, z, x: L2(s.epsilon, (-9.0, 9.0)).project(z, x)),
    "l2: an L∞ ball": ("l2", lambda s, z, x: Linf(s.epsilon).project(z, x)),
    "strong: no limit on the signal": ("strong-l2", lambda s, z, x: strong_without_limit(s, z, x)),
    "strong: box forgotten": ("strong-l2", lambda s, z, x: strong_without_box(s, z, x)),
    "strong: limit rounded up": ("strong-l2", lambda s, z, x: strong_rounded_up(s, z, x)),
}


@pytest.mark.parametrize("wrong_one", WRONG_PROJECTIONS)
def test_wrong_projections_are_rejected(wrong_one: str):
    name, method = WRONG_PROJECTIONS[wrong_one]

    def check(cls: Any) -> None:
        for kind, box in itertools.product(KINDS, BOXES):
            for seed in range(3):  # 0.25 is a float, so no rounding of the radius helps
                check_projection(cls, name, case(name, 4, 17, kind, 0.25, seed, BOXES[box](17)))

    check(THREATS[name])
    with pytest.raises(AssertionError):  # a lambda, since a partial is no method
        check(wrong(THREATS[name], project=lambda self, z, x: method(self, z, x)))


def clip_then_scale(self: Any, z: Any, x: Any) -> Any:
    """Inside all three limits, but far from z where the clip turns it into the signal."""
    boxed = jnp.clip(StrongL2(self.epsilon, self.delta, self.basis, (-9, 9)).project(z, x), 0, 1)
    return L2.project(self, x + (boxed - x) * signal_scale(self, boxed - x), x)


def signal_scale(self: Any, v: Any) -> Any:
    """The factor that brings the signal part of v to δ."""
    length = jnp.linalg.norm(v @ self.basis, axis=1, keepdims=True)
    return jnp.minimum(1, 0.9999 * self.delta / jnp.maximum(length, 1e-30))


def ball_then_signal(self: Any, z: Any, x: Any) -> Any:
    """The projections one after the other: wrong where both are active."""
    v = L2(self.epsilon, (-9.0, 9.0)).project(z, x) - x
    inside = (v @ self.basis) @ self.basis.T
    return x + v - inside * (1 - signal_scale(self, v))


def radius_for_both(self: Any, z: Any, x: Any) -> Any:
    return StrongL2(self.epsilon, self.epsilon, self.basis, self.bounds).project(z, x)


def scaled(self: Any, z: Any, x: Any) -> Any:
    """Towards x until all fits."""
    v = z - x
    v *= jnp.minimum(1, 0.9999 * self.epsilon / jnp.maximum(L2.distance(self, z, x), 1e-30))[
        :, None
    ]
    return jnp.clip(x + v * signal_scale(self, v), *self.bounds)


WRONG_NEAREST = {
    "clip, then scale": (clip_then_scale, (0.0, 1.0)),
    "ball, then signal": (ball_then_signal, (-9.0, 9.0)),
    "the ball alone": (radius_for_both, (-9.0, 9.0)),
    "scaled into the set": (scaled, (-9.0, 9.0)),
}


@pytest.mark.parametrize("wrong_one", WRONG_NEAREST)
def test_wrong_nearest_points_are_rejected(wrong_one: str):
    method, bounds = WRONG_NEAREST[wrong_one]
    with pytest.raises(AssertionError):
        check_nearest(wrong(StrongL2, project=method), 9, bounds)


def strong_without_limit(self: Any, z: Any, x: Any) -> Any:
    return L2(self.epsilon, self.bounds).project(z, x)


def strong_without_box(self: Any, z: Any, x: Any) -> Any:
    return StrongL2(self.epsilon, self.delta, self.basis, (-9.0, 9.0)).project(z, x)


def strong_rounded_up(self: Any, z: Any, x: Any) -> Any:
    larger = dataclasses.replace(self, delta=self.delta * (1 + 1e-4))
    return StrongL2.project(larger, z, x)


def ball_ascent(self: Any, gradient: Any) -> Any:
    return L2(self.epsilon).ascent(gradient)


def no_sideways(self: Any, gradient: Any) -> Any:
    """The gradient scaled until its signal part fits."""
    unit = L2(1.0).ascent(gradient).reshape(len(gradient), -1)
    return (unit * jnp.minimum(1, signal_scale(self, unit) / self.epsilon)).reshape(gradient.shape)


WRONG_OTHERS = {
    "linf: sign(0) = 1": ("linf", "ascent", lambda self, g: jnp.where(g >= 0, 1.0, -1.0), 1.0),
    "linf: descent": ("linf", "ascent", lambda self, g: -jnp.sign(g), 1.0),
    "l2: the square underflows": ("l2", "ascent", gradient_over_norm, 1e-30),
    "l2: the sign": ("l2", "ascent", lambda self, g: jnp.sign(g) / math.sqrt(15), 1.0),
    "linf: one key for all": ("linf", "random_start", one_key(Linf), None),
    "l2: one key for all": ("l2", "random_start", one_key(L2), None),
    "linf: not uniform": ("linf", "random_start", not_uniform, None),
    "l2: not uniform": ("l2", "random_start", not_uniform, None),
    "strong: one key for all": ("strong-l2", "random_start", one_key(StrongL2), None),
    "strong: steepest in the ball": ("strong-l2", "ascent", ball_ascent, 1.0),
    "strong: scaled": ("strong-l2", "ascent", no_sideways, 1.0),
}


@pytest.mark.parametrize("wrong_one", WRONG_OTHERS)
def test_wrong_moves_are_rejected(wrong_one: str):
    name, what, method, scale = WRONG_OTHERS[wrong_one]
    cls = wrong(THREATS[name], **{what: method})

    def check() -> None:
        if scale is not None:
            check_ascent(cls, name, gradients(scale))
        else:
            check_own_key(cls, name)
            check_uniform_start(cls, name)

    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("name", sorted(THREATS))
def test_a_start_on_the_sphere_has_length_epsilon(name: str):
    """Far from the box; the strong set cuts what is left of the signal, and each key its own."""
    x, keys = jnp.full((5, 12), 0.5), jax.random.split(jax.random.key(0), 5)
    threat = threat_models.make(name, 0.01, 12)
    z = threat.sphere_start(keys, x)
    length = np.asarray(threat.distance(z, x))
    assert np.all(length <= 0.01 * (1 + 1e-6))
    if name != "strong-l2":
        np.testing.assert_allclose(length, 0.01, rtol=1e-3)
    assert len(np.unique(np.asarray(z - x)[:, 0])) == 5
