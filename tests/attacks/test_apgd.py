"""APGD against a slow float64 loop, its checkpoints by hand, its losses by differences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.attacks import APGD, NetworkLoss, apgd
from ntk_awt.attacks.apgd import checkpoints
from ntk_awt.attacks.found import targets_of
from ntk_awt.attacks.losses import dlr, margin, targeted_dlr, targeted_margin
from ntk_awt.errors import InputError
from ntk_awt.network import Network
from ntk_awt.threats import THREATS, Linf
from tests import threat_models
from tests.keys import keys_of
from tests.quick import quick

N, D, CLASSES = 6, 12, 5
EPSILON = {"linf": 0.03, "l2": 0.1, "strong-l2": 0.1}
RNG = np.random.default_rng(0)
X, Y = RNG.uniform(0, 1, (N, D)), RNG.integers(0, CLASSES, N)


def network(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s)) for s in ((D, 16), (16,), (16, CLASSES))]


def apply(params: Any, x: Any) -> Any:
    w1, b1, w2 = params
    return jnp.tanh(x @ w1 + b1) @ w2


# ---------------------------------------------------------------- the schedule


def test_checkpoints_by_hand():
    """Gaps of 22, 19, 16, 13, 10, 7, 6, 6, … for 100 steps."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20) == [4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    assert checkpoints(50)[:5] == [11, 21, 30, 38, 45]  # gaps fall by 1, not below 3
    assert checkpoints(1) == [1]
    assert checkpoints(0) == []


# ---------------------------------------------------------------- a loop


PROJECT = jax.jit(lambda threat, z, x: threat.project(z, x))
ASCENT = jax.jit(lambda threat, g: threat.ascent(g))


def objective_of(name: str, z: np.ndarray, y: int, t: int) -> float:
    top = np.sort(z)[::-1]
    if name == "cross-entropy":
        return float(np.log(np.exp(z - top[0]).sum()) + top[0] - z[y])
    if name == "dlr":
        return float(-(z[y] - np.delete(z, y).max()) / (top[0] - top[2] + 1e-12))
    return float(-(z[y] - z[t]) / (top[0] - 0.5 * (top[2] + top[3]) + 1e-12))


def loop(
    name: str,
    params: Any,
    threat: Any,
    x: np.ndarray,
    y: int,
    start: np.ndarray,
    t: int,
    steps: int,
) -> tuple[np.ndarray, bool]:
    """One run on one image, as the paper has it, in float64."""
    w1, b1, w2 = (np.asarray(w) for w in params)

    def value(z: np.ndarray) -> float:
        return objective_of(name, np.tanh(z @ w1 + b1) @ w2, y, t)

    def gradient(z: np.ndarray) -> np.ndarray:
        steps = 1e-6 * np.eye(D)
        return np.array([(value(z + h) - value(z - h)) / 2e-6 for h in steps])

    def project(z: np.ndarray) -> np.ndarray:
        return np.asarray(PROJECT(threat, z[None], x[None])[0])

    def ascent(g: np.ndarray) -> np.ndarray:
        return np.asarray(ASCENT(threat, g[None])[0])

    def wrong(z: np.ndarray) -> bool:
        return bool((np.tanh(z @ w1 + b1) @ w2).argmax() != y)

    eta = 2 * float(threat.epsilon)
    values = [value(start)]
    best, best_value = start, values[0]
    fooling = start if wrong(start) else None
    last_check, checked, halved, rises = 0, values[0], True, 0
    schedule = checkpoints(steps)
    z, before = start, start
    for i in range(steps):
        if i in schedule:
            window = i - last_check
            few, stuck = rises <= 0.75 * window, not halved and checked >= best_value
            halved = few or stuck
            if halved:
                eta, z = eta / 2, best
            last_check, checked, rises = i, best_value, 0
        a = 1.0 if i == 0 else 0.75
        trial = project(z + eta * ascent(gradient(z)))
        z, before = project(z + a * (trial - z) + (1 - a) * (z - before)), z
        values.append(value(z))
        rises += values[-1] > values[-2]
        if values[-1] > best_value:
            best, best_value = z, values[-1]
        if wrong(z):
            fooling = z
    return (best if fooling is None else fooling), fooling is not None


CASES = [
    (name, threat, seed)
    for seed, name in enumerate(("cross-entropy", "dlr", "targeted-dlr"))
    for threat in sorted(THREATS)
]
SLOW = ("test_against_a_loop *-strong-l2*",)


def check_against_loop(attack: APGD, name: str, threat_name: str, seed: int) -> None:
    """The same points, in float64; gradients by differences err by some 1e-9, which grows."""
    with jax.enable_x64(True):
        params, threat = network(seed), threat_models.make(threat_name, EPSILON[threat_name], D)
        x, logits = jnp.asarray(X), np.asarray(apply(network(seed), X))
        # Every second label is wrong at first, so that both endings occur.
        y = np.where(np.arange(N) % 2, logits.argmax(1), np.argsort(logits)[:, -2])
        loss = NetworkLoss(Network(apply, params), jnp.asarray(y))
        found, _ = quick(lambda x, keys: attack.run(loss, x, threat, keys))(x, keys_of(2, N))
        keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys_of(2, N))
        starts = np.asarray(threat.sphere_start(keys, x))
        second = np.argsort(logits)[:, -2]
        fooled = 0
        for i in range(N):
            wanted, wrong = loop(
                name, params, threat, X[i], int(y[i]), starts[i], int(second[i]), attack.steps
            )
            fooled += wrong
            # Where y has rank 3, DLR is 1 and has no gradient: differences go astray from there.
            if name == "cross-entropy" or not wrong:
                np.testing.assert_allclose(found[i], wanted, atol=2e-4)
            assert bool(apply(params, found[i]).argmax() != y[i]) == wrong
    assert 0 < fooled < N


@pytest.mark.parametrize(("name", "threat", "seed"), CASES)
def test_against_a_loop(name: str, threat: str, seed: int):
    check_against_loop(APGD(name, steps=12, targets=1), name, threat, seed)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [("_MOMENTUM", 1.0), ("_RISES", 2.0), ("checkpoints", lambda steps: [4, 8])],
)
def test_wrong_attacks_are_rejected(part: str, wrong: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(apgd, part, wrong)
    with pytest.raises(AssertionError):
        check_against_loop(APGD("cross-entropy", steps=12), "cross-entropy", "l2", 0)


# ---------------------------------------------------------------- losses


def check_gradient(loss: Any, wanted: Any) -> None:
    with jax.enable_x64(True):
        z = np.random.default_rng(3).normal(size=(4, CLASSES))
        y, t = np.array([0, 1, 2, int(z[3].argmax())]), np.array([1, 2, 3, int(z[3].argmin())])
        found = np.asarray(jax.grad(lambda z: loss(z, jnp.asarray(y), jnp.asarray(t)).sum())(z))
        for i in range(4):
            for j in range(CLASSES):
                h = np.eye(CLASSES)[j] * 1e-6
                rise = wanted(z[i] + h, y[i], t[i]) - wanted(z[i] - h, y[i], t[i])
                assert found[i, j] == pytest.approx(rise / 2e-6, abs=1e-6)


def test_gradients_flow_through_the_denominators():
    check_gradient(lambda z, y, t: dlr(z, y), lambda z, y, t: objective_of("dlr", z, y, t))
    check_gradient(targeted_dlr, lambda z, y, t: objective_of("targeted-dlr", z, y, t))
    check_gradient(targeted_margin, lambda z, y, t: z[t] - z[y])
    check_gradient(lambda z, y, t: margin(z, y), lambda z, y, t: np.delete(z, y).max() - z[y])

    def stopped(z: Any, y: Any, t: Any) -> Any:
        top = jax.lax.stop_gradient(jax.lax.top_k(z, 3)[0])
        return margin(z, y) / (top[:, 0] - top[:, 2])

    with pytest.raises(AssertionError):
        check_gradient(stopped, lambda z, y, t: objective_of("dlr", z, y, t))


def test_targets_are_the_next_ranks_of_the_clean_image():
    params = network(0)
    loss = NetworkLoss(Network(apply, params), jnp.asarray(Y))
    order = np.argsort(-np.asarray(apply(params, X)), axis=1)
    np.testing.assert_array_equal(targets_of(loss, jnp.asarray(X), 2), order[:, 1:3].T)
    np.testing.assert_array_equal(targets_of(loss, jnp.asarray(X), 9), order[:, 1:].T)


@pytest.mark.parametrize(
    ("objective", "classes", "instead"),
    [("dlr", 2, "cross-entropy"), ("targeted-dlr", 3, "targeted-margin")],
)
def test_few_classes(objective: str, classes: int, instead: str):
    def few(params: Any, x: Any) -> Any:
        return apply(params, x)[:, :classes]

    loss = NetworkLoss(Network(few, network(0)), jnp.asarray(Y % classes))
    x = jnp.asarray(X, jnp.float32)
    with pytest.warns(UserWarning, match=f"the network has {classes}: {instead} takes its place"):
        replaced = APGD(objective, steps=5).run(loss, x, Linf(0.1), keys_of(2, N))[0]
    wanted = APGD(instead, steps=5).run(loss, x, Linf(0.1), keys_of(2, N))[0]
    np.testing.assert_array_equal(replaced, wanted)


def test_more_runs_fool_more():
    """Restarts and targets only ever add fooled images; with no step it is its start."""
    params = network(1)
    x = jnp.asarray(X, jnp.float32)
    y = jnp.argmax(apply(params, x), axis=1)
    loss, threat = NetworkLoss(Network(apply, params), y), Linf(0.03)

    def fooled_by(restarts: int, targets: int) -> np.ndarray:
        attack = APGD("targeted-dlr", 10, restarts, targets)
        moved = quick(lambda x: attack.run(loss, x, threat, keys_of(2, N))[0])(x)
        return np.asarray(loss.logits(moved).argmax(1) != y)

    fooled = [fooled_by(*runs) for runs in ((1, 1), (1, 4), (3, 4))]
    assert np.all(fooled[0] <= fooled[1])
    assert np.all(fooled[1] <= fooled[2])
    assert np.all(threat.distance(APGD(steps=0).run(loss, x, threat, keys_of(2, N))[0], x) > 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"objective": "ce"}, "APGD objective: expected one of"),
        ({"steps": -1}, "APGD steps: expected a whole number"),
        ({"restarts": 0}, "APGD restarts"),
        ({"targets": 0}, "APGD targets"),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match):
        APGD(**options)
