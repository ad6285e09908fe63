"""Square: its schedule by hand, its moves by their definition, the optimum of linear networks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.attacks import NetworkLoss, Square
from ntk_awt.attacks.square import shares
from ntk_awt.errors import InputError
from ntk_awt.network import Network
from ntk_awt.threats import L2, Linf
from tests import threat_models
from tests.keys import keys_of

N, SHAPE = 6, (6, 6, 2)
RNG = np.random.default_rng(0)
X = RNG.uniform(0.3, 0.7, (N, *SHAPE)).astype(np.float32)
W = RNG.normal(size=(int(np.prod(SHAPE)), 3)).astype(np.float32)


def linear(params: Any, x: Any) -> Any:
    return x.reshape(len(x), -1) @ params


Y = linear(W, X).argmax(1)


def visited(attack: Square, threat: Any, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """All points that are evaluated [queries + 1, n, *shape], and the one that comes back.

    Args:
        offset: added to the label's logit; with a large one nothing is ever misclassified.
    """
    seen: list[np.ndarray] = []

    def recorded(params: Any, x: Any) -> Any:
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), x, ordered=True)
        return linear(params, x) + offset * jax.nn.one_hot(Y, 3)

    loss = NetworkLoss(Network(recorded, W), jnp.asarray(Y))
    z = jax.jit(lambda t: attack.run(loss, jnp.asarray(X), t, keys_of(0, N))[0])(threat)
    jax.effects_barrier()
    return np.stack(seen), np.asarray(z)


def test_shares_by_hand():
    """Halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries."""
    of_all = shares(10_000, 0.8)
    edges = [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    np.testing.assert_allclose(of_all[edges], 0.8 / 2.0 ** np.arange(10))
    np.testing.assert_allclose(of_all[[10, 50, 200, 8000]], [0.8, 0.4, 0.2, 0.8 / 2**8])
    np.testing.assert_array_equal(shares(5_000, 0.8), of_all[::2])


def check_squares(points: np.ndarray) -> None:
    """Stripes first; each query then changes one square to ±ε, one sign a channel."""
    v = points - X
    assert np.allclose(abs(v), 0.125, atol=1e-6)  # the box is far
    assert np.all(np.ptp(v[0], axis=1) < 1e-6)  # one sign a column and channel
    sides = np.maximum(np.round(np.sqrt(shares(len(points) - 1, 0.8) * 36)), 1)
    for n in range(N):
        best, highest = v[0, n], -np.inf
        for i in range(len(points)):
            logits = np.asarray(linear(W, jnp.asarray(X[n : n + 1] + v[i, n])), np.float64)[0]
            margin = np.delete(logits, Y[n]).max() - logits[Y[n]]
            if i:
                changed = abs(v[i, n] - best).max(-1) > 1e-3
                rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
                for places in (rows, columns):
                    assert len(places) == 0 or np.ptp(places) < sides[i - 1]
            if margin > highest:
                best, highest = v[i, n], margin


def test_squares():
    points, _ = visited(Square(steps=40), Linf(0.125), offset=100.0)
    assert len(points) == 41
    check_squares(points)
    shuffled = points[[0, *np.random.default_rng(1).permutation(np.arange(1, 41))]]
    with pytest.raises(AssertionError):
        check_squares(shuffled)


def test_the_best_point_comes_back():
    points, z = visited(Square(steps=40), Linf(0.125), offset=100.0)
    logits = np.stack([np.asarray(linear(W, jnp.asarray(p)), np.float64) for p in points])
    right = np.take_along_axis(logits, Y[None, :, None], 2)[..., 0]
    others = np.where(np.eye(3, dtype=bool)[Y], -np.inf, logits).max(2)
    best = (others - right).argmax(0)
    np.testing.assert_array_equal(z, points[best, np.arange(N)])
    assert len(set(best)) > 2


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_it_ends_when_all_images_are_misclassified(offset: float):
    points, z = visited(Square(steps=60), Linf(0.3), offset)
    wrong = np.asarray(linear(W, jnp.asarray(points.reshape(-1, *SHAPE)))).argmax(1)
    wrong = wrong.reshape(len(points), N) != Y
    if offset:
        assert len(points) == 61
    else:
        assert len(points) == wrong.argmax(0).max() + 1 < 61
        np.testing.assert_array_equal(z, points[wrong.argmax(0), np.arange(N)])


def test_l2_moves_keep_the_norm():
    points, _ = visited(Square(steps=40), L2(0.5), offset=100.0)
    v = (points - X).reshape(41, N, -1).astype(np.float64)
    # Inwards by less than 4(√d + 4)u·ε + 2√d·u; the box is far.
    np.testing.assert_allclose(np.linalg.norm(v, axis=2), 0.5, atol=1e-5)
    assert len(np.unique(v[:, 0], axis=0)) > 30


@pytest.mark.parametrize("name", ["linf", "l2", "strong-l2"])
def test_near_the_optimum_of_linear_classifiers(name: str):
    """Two classes: the largest margin in the ball is known. Weights are smooth, as bumps are."""
    rows, columns = np.cos(np.arange(6) / 2), np.sin(np.arange(6) / 2)
    w = (rows[:, None, None] * columns[:, None] * np.array([1.0, -0.5])).reshape(-1)
    d, epsilon = len(w), 0.2
    threat = threat_models.make(name, epsilon, d)

    def two(params: Any, x: Any) -> Any:
        ahead = x.reshape(len(x), -1) @ params
        return jnp.stack([100.0 + 0 * ahead, ahead], axis=1)

    loss = NetworkLoss(Network(two, jnp.asarray(w, jnp.float32)), jnp.zeros(N, int))
    z = jax.jit(lambda t: Square(steps=1500).run(loss, jnp.asarray(X), t, keys_of(0, N))[0])(threat)
    gained = (np.asarray(z, np.float64) - X).reshape(N, -1) @ w
    most = threat_models.reach(name, w[None], epsilon)[0]
    # One pixel is the smallest square of L∞; windows of L2 have three pixels a side at least.
    # A random direction has 1/√72 = 0.12 of the optimum.
    assert np.all(gained > {"linf": 0.999, "l2": 0.5, "strong-l2": 0.5}[name] * most)
    assert np.all(gained < most * (1 + 1e-5))


def test_images_that_are_vectors():
    x, w = X.reshape(N, -1), W
    loss = NetworkLoss(Network(linear, w), jnp.asarray(Y))
    keys = keys_of(0, N)
    z, _ = jax.jit(lambda t: Square(steps=200).run(loss, jnp.asarray(x), t, keys))(Linf(0.1))
    assert z.shape == x.shape
    assert np.any(np.asarray(linear(w, z)).argmax(1) != Y)


def test_channels_that_are_given():
    """Where the shape does not tell, a setting does: [c, h, w] gets the moves of [h, w, c]."""
    x, first = X[:, :2, :, :], np.moveaxis(X[:, :2, :, :], -1, 1)  # [2, 6, 2] and [2, 2, 6]
    w = RNG.normal(size=(24, 3)).astype(np.float32)

    def found(z: np.ndarray, channels: int | None) -> np.ndarray:
        def never_wrong(params: Any, z: Any) -> Any:
            z = z if z.shape[1:] == x.shape[1:] else jnp.moveaxis(z, 1, -1)
            return linear(params, z) + 100 * jax.nn.one_hot(Y, 3)

        attack, loss = (
            Square(20, channels=channels),
            NetworkLoss(Network(never_wrong, w), jnp.asarray(Y)),
        )
        return np.asarray(
            jax.jit(lambda t: attack.run(loss, jnp.asarray(z), t, keys_of(0, N))[0])(Linf(0.1))
        )

    wanted = found(x, None)
    np.testing.assert_array_equal(np.moveaxis(found(first, 0), 1, -1), wanted)
    assert abs(np.moveaxis(found(first, None), 1, -1) - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": -1}, "Square steps: expected a whole number"),
        ({"share": 0.0}, "Square share: expected a number in"),
        ({"share": 1.5}, "Square share: expected a number in"),
        ({"channels": 3}, "Square channels: expected an axis of a picture"),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match):
        Square(**options)
