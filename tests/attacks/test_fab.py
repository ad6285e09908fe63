"""FAB: steps to a plane against a sorted solver in float64, distances of linear classifiers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.attacks import FAB, NetworkLoss, example_keys
from ntk_awt.attacks.fab import to_boundary
from ntk_awt.errors import InputError
from ntk_awt.network import Network
from ntk_awt.threats import L2, Linf
from tests import threat_models

N, D, CLASSES = 8, 12, 5


# ---------------------------------------------------------------- the step to a plane


def slow_step(name: str, z: np.ndarray, g: np.ndarray, gap: float) -> np.ndarray:
    """Shortest v with ⟨g, v⟩ = gap and z + v in [0, 1], by halving an interval of t."""
    a = np.sign(gap) * (np.sign(g) if name == "linf" else g)

    def at(t: float) -> np.ndarray:
        return np.clip(t * a, -z, 1 - z)

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if abs(g @ at(middle)) < abs(gap) else (low, middle)
    return at(high)


def check_step(step: Any, name: str) -> None:
    rng = np.random.default_rng(0)
    z = np.clip(rng.uniform(-0.3, 1.3, (40, D)), 0, 1)
    g = rng.normal(size=(40, D)) * rng.choice([0.01, 1.0], (40, D))
    gap = rng.normal(size=40) * np.linspace(0.01, 3, 40)  # also out of the box's reach
    threat = {"linf": Linf, "l2": L2}[name](0.3)
    v = np.asarray(step(threat, *(jnp.asarray(a, jnp.float32) for a in (z, g, gap))))
    wanted = np.stack([slow_step(name, *case) for case in zip(z, g, gap, strict=True)])
    np.testing.assert_allclose(v, wanted, atol=2e-5)
    reached = abs((wanted * g).sum(1)) > abs(gap) - 1e-6
    assert 5 < reached.sum() < 40
    # Among the points on the plane none is closer: v is orthogonal to the plane where it is free.
    size = np.abs(wanted).max(1) if name == "linf" else np.linalg.norm(wanted, axis=1)
    assert np.all(size[reached] >= abs(gap[reached]) / np.linalg.norm(
        g[reached], ord=threat_models.DUAL[name], axis=1) - 1e-6)  # fmt: skip


@pytest.mark.parametrize("name", ["linf", "l2"])
def test_steps_to_a_plane(name: str):
    check_step(jax.jit(to_boundary), name)


@pytest.mark.parametrize("name", ["linf", "l2"])
def test_a_step_that_forgets_the_box_is_rejected(name: str):
    def without_box(threat: Any, z: Any, g: Any, gap: Any) -> Any:
        a = threat.ascent(g)
        return jnp.clip(z + (gap / (a * g).sum(1))[:, None] * a, 0, 1) - z

    with pytest.raises(AssertionError):
        check_step(without_box, name)


# ---------------------------------------------------------------- closed forms


def linear(params: Any, x: Any) -> Any:
    return x @ params


def problem(name: str) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A linear network, images far from the box, labels, and the distance to the closest error."""
    rng = np.random.default_rng(2)
    w = rng.normal(size=(D, CLASSES))
    w[:, -1] = 0.7 * w[:, 0] + 0.3 * w[:, -1]  # far from winning, as hard to tell from class 0
    x = rng.uniform(0.45, 0.55, (N, D))
    logits = x @ w
    y = logits.argmax(1)
    distances = np.empty((N, CLASSES))
    for n in range(N):
        for t in range(CLASSES):
            difference = w[:, t] - w[:, y[n]]
            # max ⟨difference, v⟩ over the set of radius 1 is its dual norm.
            length = threat_models.reach(name, difference[None], 1.0)[0]
            distances[n, t] = np.inf if t == y[n] else (logits[n, y[n]] - logits[n, t]) / length
    return jnp.asarray(w, jnp.float32), x.astype(np.float32), y, distances.min(1)


def attacked(attack: FAB, name: str, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which images are broken at `factor` times the smallest distance, found points, distances."""
    w, x, y, distance = problem(name)
    broken = []
    for n in range(N):
        threat = threat_models.make(name, float(factor * distance[n]), D)
        key = example_keys(jax.random.key(0), jnp.arange(1))
        loss = NetworkLoss(Network(linear, w), jnp.asarray(y[n : n + 1]))
        z = RUN(attack, loss.network.params, loss.labels, jnp.asarray(x[n : n + 1]), threat, key)
        broken.append(bool((np.asarray(z @ w).argmax(1) != y[n])[0]))
    return np.array(broken), x, distance


def _run(attack: Any, params: Any, labels: Any, x: Any, threat: Any, keys: Any) -> Any:
    return attack.run(NetworkLoss(Network(linear, params), labels), x, threat, keys)[0]


RUN = jax.jit(_run, static_argnums=0)


@pytest.mark.parametrize("name", ["linf", "l2", "strong-l2"])
def test_the_closest_error_of_linear_classifiers(name: str):
    """Broken a little outside the closest boundary, and right a little inside it."""
    attack = FAB(steps=30, targets=CLASSES - 1)
    assert attacked(attack, name, 1.03)[0].all()
    assert not attacked(attack, name, 0.99)[0].any()
    # A single target misses the errors of the other classes.
    assert not attacked(FAB(steps=30, targets=1), name, 1.03)[0].all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": -1}, "FAB steps: expected a whole number"),
        ({"restarts": 0}, "FAB restarts: expected a whole number"),
        ({"targets": 0}, "FAB targets: expected a whole number"),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match):
        FAB(**options)
