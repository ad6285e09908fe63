"""Threat models against their definitions in float64, and wrong ones that the checks reject."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings

from ntk_awt import threats
from ntk_awt.config import ThreatConfig
from ntk_awt.errors import InputError
from ntk_awt.threats import L2, THREATS, Linf

U = 2.0**-24  # unit roundoff of float32
ORDER = {"linf": np.inf, "l2": 2}
DUAL = {"linf": 1, "l2": 2}
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
    bounds: tuple[float, float]


KINDS = ("far", "near", "inside", "sphere", "shift", "inward", "huge", "same")


def case(
    name: str, n: int, d: int, kind: str, epsilon: float, seed: int, bounds: tuple[float, float]
) -> Case:
    """Random images with about half of their coordinates exactly at the ends of the box."""
    rng = np.random.default_rng(seed)
    low, high = bounds
    x = np.clip(rng.uniform(low - (high - low) / 2, high + (high - low) / 2, (n, d)), low, high)
    x = x.astype(np.float32)
    noise = rng.normal(size=(n, d))
    noise /= norms(noise, ORDER[name])[:, None]  # on the unit sphere of the ball's norm
    v = {
        "far": 1e3 * noise,
        "near": epsilon * noise * (1 + 1e-6 * rng.normal(size=(n, 1))),
        "inside": epsilon * noise * rng.uniform(0, 1, (n, 1)),
        "sphere": epsilon * noise,
        "shift": np.full((n, d), rng.uniform(-1, 1)),
        "inward": 2 * epsilon * np.abs(noise) * np.where(x < (low + high) / 2, 1, -1),  # no clip
        "huge": 1e15 * noise,
        "same": 0 * noise,
    }[kind]
    return Case((x + v).astype(np.float32), x, epsilon, bounds)


EPSILONS = [0.0, 1e-6, 1e-3, 8 / 255, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0]
SHAPES = [(4, 1), (1, 2), (4, 17), (2, 784), (4, 3000)]


def cases(name: str) -> st.SearchStrategy[Case]:
    return st.builds(
        lambda shape, *rest: case(name, *shape, *rest),
        st.sampled_from(SHAPES),
        st.sampled_from(KINDS),
        st.one_of(st.sampled_from(EPSILONS), st.floats(1e-6, 10)),
        st.integers(0, 2**32 - 1),
        st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-0.5, 2.0)]),
    )


# ---------------------------------------------------------------- checks


def check_inside(z: Any, x: Any, name: str, epsilon: float, bounds: tuple[float, float]) -> None:
    """Both constraints hold in float64 without any slack, and nothing is NaN.

    For L∞ float64 subtraction of float32 values and the comparison are exact wherever it matters;
    the float64 L2 norm errs by less than 1e-12 relative, against a margin of 1e-6.
    """
    z, x = np.asarray(z), np.asarray(x)
    assert z.dtype == x.dtype == np.float32
    assert z.shape == x.shape
    assert np.all(norms(z.astype(np.float64) - x.astype(np.float64), ORDER[name]) <= epsilon)
    assert z.min() >= bounds[0]
    assert z.max() <= bounds[1]


def check_projection(cls: Any, name: str, c: Case) -> None:
    """Inside, closed form, unchanged inside the set, x at ε = 0, a second time no change."""
    z, x, epsilon, bounds = c
    threat = cls(epsilon, bounds)
    p = np.asarray(project(threat, z, x))
    check_inside(p, x, name, epsilon, bounds)

    # Closed form in float64. L∞ moves an end by one float, after two roundings, and so is within
    # 4u·(|x| + ε) of it. L2: the documented shrinking of the radius (relative 4(√d + 4)u, absolute
    # 2√d·max|bounds|·u) with rounding errors of v = z − x, of its norm and of the sum of the size
    # of that margin at most.
    z64, x64 = z.astype(np.float64), x.astype(np.float64)
    v = z64 - x64
    root, largest = math.sqrt(x[0].size), max(map(abs, bounds))
    if name == "linf":
        slack = 4 * U * (largest + epsilon)
        wanted = np.clip(np.clip(z64, x64 - epsilon, x64 + epsilon), *bounds)
    else:
        slack = 2 * (4 * (root + 4) * U * epsilon + 2 * root * largest * U)
        length = norms(v, 2)[:, None]
        wanted = np.clip(x64 + v * np.minimum(1, epsilon / np.where(length, length, 1)), *bounds)
    assert norms(p - wanted, ORDER[name]).max() <= slack

    # What lies in the set, by that margin, comes back bit by bit.
    inside = (norms(v, ORDER[name]) <= epsilon - slack) & (z >= bounds[0]).all(1)
    inside &= (z <= bounds[1]).all(1)
    np.testing.assert_array_equal(p[inside], z[inside])
    np.testing.assert_array_equal(project(threat, x, x), x)

    again = np.asarray(project(threat, p, x))
    check_inside(again, x, name, epsilon, bounds)
    # L2 measures the point that it made with a rounded norm, so it may scale a second time.
    assert norms(again - p, ORDER[name]).max() <= (0 if name == "linf" else slack)

    np.testing.assert_array_equal(project(cls(0.0, bounds), z, x), x)


def check_ascent(cls: Any, name: str, gradient: np.ndarray) -> None:
    """Unit norm, the largest inner product with the gradient, zero for a zero gradient."""
    threat = cls(0.1)
    direction = np.asarray(threat.ascent(jnp.asarray(gradient)), np.float64)
    g = gradient.astype(np.float64)
    d = gradient[0].size
    zero = ~gradient.any(axis=tuple(range(1, gradient.ndim)))
    assert not direction[zero].any()
    # Roundings: the norm at most (d + 4)u relative, one more for the division.
    slack = (d + 8) * U
    np.testing.assert_allclose(norms(direction, ORDER[name])[~zero], 1, atol=slack)
    inner = (direction * g).reshape(len(g), -1).sum(1)
    scale = norms(g, DUAL[name])
    np.testing.assert_allclose(inner, scale, rtol=slack, atol=0)  # Hölder's bound is reached
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = rng.normal(size=g.shape)
        other /= norms(other, ORDER[name]).reshape(-1, *[1] * (g.ndim - 1))
        assert np.all((other * g).reshape(len(g), -1).sum(1) <= inner + slack * scale)


def check_uniform_start(cls: Any, name: str) -> None:
    """Far from the box's ends the start is uniform in the ball, by Kolmogorov–Smirnov distances.

    The distance of n independent draws exceeds t with probability at most 2·exp(−2nt²) (Massart
    1990), so a right sampler fails with probability 1e-6 at most; and the radius is cut by 1e-4 at
    most, which moves a distribution function by 3e-4 at most.
    """
    n, d, epsilon = 4000, 3, 0.3
    x = jnp.full((n, d), 0.5)
    z = random_start(cls(epsilon), jax.random.split(jax.random.key(1), n), x)
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
    start = np.asarray(random_start(cls(0.2), keys, x))
    assert len(np.unique(start - x, axis=0)) == 4
    for i in range(4):
        mixed_keys = other_keys.at[i].set(keys[i])
        mixed_x = other_x.copy()
        mixed_x[i] = x[i]
        mixed = np.asarray(random_start(cls(0.2), mixed_keys, mixed_x))
        np.testing.assert_array_equal(mixed[i], start[i])
        assert np.any(np.delete(mixed - mixed_x != start - x, i, axis=0))
    order = np.array([2, 0, 3, 1])
    moved = random_start(cls(0.2), keys[order], x[order])
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
    check_inside(project(THREATS[name](epsilon), z, x), x, name, epsilon, (0.0, 1.0))


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
    rounded = np.float64(THREATS[name](epsilon).epsilon)
    assert rounded <= epsilon
    assert float(np.nextafter(np.float32(rounded), np.float32(np.inf))) > epsilon


@every_threat
def test_images_of_any_shape(name: str):
    c = case(name, 3, 24, "far", 0.25, 0, (0.0, 1.0))
    threat = THREATS[name](c.epsilon)
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
    start = random_start(THREATS[name](epsilon), keys, x)
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
    got = THREATS[name](1.0).distance(jnp.asarray(z), jnp.asarray(x))
    # One rounding of each difference and (d + 1)/2 of the norm at most.
    wanted = norms(c.z.astype(np.float64) - c.x, ORDER[name])
    np.testing.assert_allclose(got, wanted, rtol=400 * U)


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
        z, radius = step(THREATS[name](epsilon), x, x, keys)
        check_inside(z, x, name, epsilon, (0.0, 1.0))
        assert radius == THREATS[name](epsilon).epsilon
    assert len(traces) == 1
    step(THREATS[name](0.1, (-1.0, 1.0)), x, x, keys)  # the box is compiled in
    assert len(traces) == 2
    leaves, structure = jax.tree.flatten(THREATS[name](0.5, (-1.0, 1.0)))
    assert leaves == [0.5]
    assert structure.unflatten(leaves) == THREATS[name](0.5, (-1.0, 1.0))


@every_threat
def test_eager_and_jit_agree(name: str):
    c = case(name, 4, 17, "far", 0.3, 2, (0.0, 1.0))
    threat, z, x = THREATS[name](c.epsilon), jnp.asarray(c.z), jnp.asarray(c.x)
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
    classes = [*THREATS.values(), wrong(Linf), wrong(Linf)]
    structures = [jax.tree.structure(cls(0.1)) for cls in classes]
    assert all(
        (a == b) == (i == j) for i, a in enumerate(structures) for j, b in enumerate(structures)
    )
    assert jax.tree.structure(Linf(0.1)) == jax.tree.structure(Linf(0.2))
    assert jax.tree.structure(Linf(0.1)) != jax.tree.structure(Linf(0.1, (-1.0, 1.0)))
    assert jax.tree.unflatten(structures[0], [0.1]) == classes[0](0.1)


def test_build():
    for name in NAMES:
        built = threats.build(ThreatConfig(name=name, epsilon=0.1), (-1.0, 1.0))
        assert built == THREATS[name](0.1, (-1.0, 1.0))
        with pytest.raises(dataclasses.FrozenInstanceError):
            built.epsilon = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="threat model: expected one of l2, linf"):
        threats.build(ThreatConfig(name="l3"), (0.0, 1.0))
    with pytest.raises(InputError, match="epsilon: expected a number in"):
        threats.build(ThreatConfig(name="l2", epsilon=-0.1), (0.0, 1.0))


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


WRONG_PROJECTIONS = {
    "linf: ends rounded to nearest": ("linf", nearest_ends),
    "linf: box forgotten": ("linf", lambda s, z, x: Linf(s.epsilon, (-9.0, 9.0)).project(z, x)),
    "l2: full radius": ("l2", full_radius),
    "l2: clip before ball": ("l2", partial(full_radius, box_first=True)),
    "l2: box forgotten": ("l2", lambda s, z, x: L2(s.epsilon, (-9.0, 9.0)).project(z, x)),
    "l2: an L∞ ball": ("l2", lambda s, z, x: Linf(s.epsilon).project(z, x)),
}


@pytest.mark.parametrize("wrong_one", WRONG_PROJECTIONS)
def test_wrong_projections_are_rejected(wrong_one: str):
    name, method = WRONG_PROJECTIONS[wrong_one]

    def check(cls: Any) -> None:
        for kind in KINDS:
            for seed in range(3):  # 0.25 is a float, so no rounding of the radius helps
                check_projection(cls, name, case(name, 4, 17, kind, 0.25, seed, (0.0, 1.0)))

    check(THREATS[name])
    with pytest.raises(AssertionError):  # a lambda, since a partial is no method
        check(wrong(THREATS[name], project=lambda self, z, x: method(self, z, x)))


WRONG_OTHERS = {
    "linf: sign(0) = 1": ("linf", "ascent", lambda self, g: jnp.where(g >= 0, 1.0, -1.0), 1.0),
    "linf: descent": ("linf", "ascent", lambda self, g: -jnp.sign(g), 1.0),
    "l2: the square underflows": ("l2", "ascent", gradient_over_norm, 1e-30),
    "l2: the sign": ("l2", "ascent", lambda self, g: jnp.sign(g) / math.sqrt(15), 1.0),
    "linf: one key for all": ("linf", "random_start", one_key(Linf), None),
    "l2: one key for all": ("l2", "random_start", one_key(L2), None),
    "linf: not uniform": ("linf", "random_start", not_uniform, None),
    "l2: not uniform": ("l2", "random_start", not_uniform, None),
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
