"""One contract for every attack over every threat model, closed forms, and attacks that fail."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.attacks import (
    ATTACKS,
    AUTO,
    CRITERIA,
    FAB,
    PGD,
    NetworkLoss,
    Square,
    example_keys,
    perturb,
    suite,
)
from ntk_awt.errors import InputError
from ntk_awt.network import Network
from ntk_awt.threats import THREATS, Linf
from tests import threat_models
from tests.counting import Counting
from tests.keys import keys_of
from tests.threat_models import ORDER, RATIO

SLOW = (
    "test_float64 *l2",
    "test_finite_losses_before_a_nan_count *l2",
    "test_nan_loss_leaves_the_image *l2",
    "test_finite_losses_before_a_nan_count apgd-t-linf",
    "test_nan_loss_leaves_the_image apgd-t-linf",
    "test_pgd_finds_the_optimum_of_linear_classifiers l2-from a random point",
    "test_one_trace_serves_every_radius_key_and_network *l2",
    "test_more_restarts_and_larger_radii_are_never_weaker *l2",
    "test_an_image_depends_on_itself_and_its_key pgd-l2",
    "test_pgd_without_steps_is_its_start *e-l*2",
    "test_wrong_attacks_are_rejected *[!g]-l2",
    "test_never_above_the_optimum pgd-l2",
    "test_perturb *l2",
    "test_wrong_attacks_are_rejected attack[02]-*-strong-l2",
    "test_[!c]* apgd-*l2",
    "test_contract apgd-[dt]*l2",
    "* apgd-dlr-linf",
    "test_[!ca]* fab-t-*l2",
    "test_[!ca]* square-*l2",
    "test_a* fab-t-*l2",
    "test_a* square-*l2",
    "test_float64 fab-*",
    "test_float64 square-*",
    "test_float64 apgd-*",
)

U = 2.0**-24  # unit roundoff of float32
N, D, CLASSES = 6, 12, 4
EPSILON = {"linf": 0.125, "l2": 0.4, "strong-l2": 0.4}
STEPS = 6


def make_attack(name: str) -> Any:
    """With two restarts where the first run has no random start."""
    return ATTACKS[name](steps=STEPS, **({"restarts": 2} if name == "fab-t" else {}))


def over(names: list[str]) -> Any:
    """These attacks over every threat model."""
    cases = [
        pytest.param(make_attack(attack), name, id=f"{attack}-{name}")
        for attack in names
        for name in sorted(THREATS)
    ]
    return pytest.mark.parametrize(("attack", "name"), cases)


contract = over(sorted(ATTACKS))
of_losses = over(["pgd"])  # they return the point of the highest loss
of_errors = over(sorted(set(ATTACKS) - {"pgd"}))  # they return a misclassified point


def make(name: str, epsilon: float) -> Any:
    return threat_models.make(name, epsilon, D)


# ---------------------------------------------------------------- a small network


def apply(params: Any, x: Any) -> Any:
    w1, b1, w2 = params
    return jnp.tanh(x @ w1 + b1) @ w2


def network(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shapes = [(D, 16), (16,), (16, CLASSES)]
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def images(seed: int, n: int = N) -> tuple[Any, Any]:
    """Images in turn with many pixels at the ends of the box and far from them, and labels."""
    rng = np.random.default_rng(seed)
    x = np.clip(rng.uniform(-0.5, 1.5, (n, D)), 0, 1).astype(np.float32)
    x[1::2] = 0.42 + 0.16 * x[1::2]
    return x, rng.integers(0, CLASSES, n)


PARAMS = network(0)
X, Y = images(1)


@partial(jax.jit, static_argnames=("attack", "apply"))
def _run(attack: Any, apply: Any, params: Any, x: Any, y: Any, threat: Any, keys: Any) -> Any:
    return attack.run(NetworkLoss(Network(apply, params), y), x, threat, keys)


def run(attack: Any, threat: Any, **changes: Any) -> Any:
    """The compiled attack; left out arguments are arguments of the compiled program as well."""
    default = {"apply": apply, "params": PARAMS, "x": X, "y": Y, "keys": keys_of(2, N)}
    return _run(attack=attack, threat=threat, **(default | changes))


def losses(z: Any) -> np.ndarray:
    return np.asarray(NetworkLoss(Network(apply, PARAMS), jnp.asarray(Y))(jnp.asarray(z)))


@lru_cache
def _recorder(attack: Any) -> Any:
    """A compiled run of the attack that passes every loss it sees to a host function."""
    seen: list[np.ndarray] = []

    def loss(z: Any) -> Any:
        values = NetworkLoss(Network(apply, PARAMS), jnp.asarray(Y))(z)
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), values, ordered=True)
        return values

    return jax.jit(lambda threat: attack.run(loss, jnp.asarray(X), threat, keys_of(2, N))[1]), seen


def visited(attack: Any, threat: Any) -> tuple[np.ndarray, np.ndarray]:
    """Loss that the attack reports, and all that it saw on the way [evaluations, n]."""
    run_recorded, seen = _recorder(attack)
    seen.clear()
    best = np.asarray(run_recorded(threat))
    jax.effects_barrier()
    return best, np.stack(seen)


# ---------------------------------------------------------------- the contract


def check_feasible(attack: Any, name: str, scale: float = 1.0) -> None:
    """Ball and box hold in float64 without slack; with radius 0 the images come back."""
    epsilon = scale * EPSILON[name]
    z = np.asarray(run(attack, make(name, epsilon))[0])
    assert z.shape == X.shape
    assert z.dtype == np.float32
    distance = np.linalg.norm(z.astype(np.float64) - X, ord=ORDER[name], axis=1)
    assert np.all(distance <= epsilon)
    if name == "strong-l2":
        signal = threat_models.signal(z.astype(np.float64) - X)
        assert np.all(np.linalg.norm(signal, axis=1) <= RATIO * epsilon)
    assert z.min() >= 0
    assert z.max() <= 1
    np.testing.assert_array_equal(run(attack, make(name, 0.0))[0], X)


def check_loss(attack: Any, name: str) -> None:
    """The reported loss is that of the images that come back (two evaluations: some roundings)."""
    z, loss = run(attack, make(name, EPSILON[name]))
    np.testing.assert_allclose(loss, losses(z), rtol=100 * U, atol=100 * U)


def check_best(attack: Any, name: str, scale: float = 1.0) -> None:
    """The reported loss is the highest one seen, the start's included."""
    best, seen = visited(attack, make(name, scale * EPSILON[name]))
    np.testing.assert_array_equal(best, seen.max(0))
    assert np.all(best >= seen[0])


@contract
def test_contract(attack: Any, name: str):
    for scale in (1.0, 1e-5, 0.8, 20.0):
        check_feasible(attack, name, scale)
    check_loss(attack, name)


@of_losses
def test_the_highest_loss_is_returned(attack: Any, name: str):
    for scale in (1.0, 8.0):  # with the large radius the steps overshoot
        check_best(attack, name, scale)


def check_misclassified(attack: Any, name: str) -> None:
    """Where a point of the set that was seen is misclassified, so is the one that comes back."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def recorded(params: Any, x: Any) -> Any:
        logits = apply(params, x)
        jax.debug.callback(
            lambda x, z: seen.append((np.asarray(x), np.asarray(z))), x, logits, ordered=True
        )
        return logits

    y = np.asarray(apply(PARAMS, X)).argmax(1)
    # Six queries of random search need more room.
    scale = 4.0 if isinstance(attack, Square) and name == "linf" else 1.0
    loss = NetworkLoss(Network(recorded, PARAMS), jnp.asarray(y))
    threat = make(name, scale * EPSILON[name])
    z = jax.jit(lambda t: attack.run(loss, jnp.asarray(X), t, keys_of(2, N))[0])(threat)
    jax.effects_barrier()
    points, logits = (np.stack(values) for values in zip(*seen, strict=True))
    inside = np.stack([np.asarray(threat.project(p, X)) == p for p in points]).all(2)
    wrong = (inside & (logits.argmax(2) != y)).any(0)
    assert 0 < wrong.sum() < N
    np.testing.assert_array_equal(np.asarray(apply(PARAMS, z)).argmax(1) != y, wrong)


@of_errors
def test_a_misclassified_point_is_returned(attack: Any, name: str):
    check_misclassified(attack, name)


@of_losses
def test_more_restarts_and_larger_radii_are_never_weaker(attack: Any, name: str):
    # A loop of one pass may be compiled otherwise than one of several: some roundings.
    threat = make(name, EPSILON[name])
    by_restarts = [np.asarray(run(replace(attack, restarts=r), threat)[1]) for r in (1, 3)]
    for fewer, more in pairwise(by_restarts):
        assert np.all(more >= fewer - 100 * U * (1 + fewer))
    assert np.any(by_restarts[-1] > by_restarts[0] + 1e-4)

    # Not a theorem for each image, but the mean over a few must grow at such distant radii.
    radii = [make(name, EPSILON[name] * s) for s in (0.0, 0.25, 0.5, 1.0, 2.0)]
    means = [float(run(attack, radius)[1].mean()) for radius in radii]
    assert np.all(np.diff(means) > 0.01)
    assert means[0] == pytest.approx(losses(X).mean(), rel=100 * U)


@contract
def test_an_image_depends_on_itself_and_its_key(attack: Any, name: str):
    threat = make(name, EPSILON[name])
    z, loss = map(np.asarray, run(attack, threat))
    np.testing.assert_array_equal(run(attack, threat)[0], z)  # deterministic in the key
    other_keys = example_keys(jax.random.key(9), jnp.arange(N))
    assert np.any(run(attack, threat, keys=other_keys)[0] != z)

    # The same program on other neighbours, and on the same ones in another order. Each row of a
    # matrix product is summed in an order that the shapes decide: bit by bit the same.
    other_x, other_y = images(7)
    kept = np.arange(N) % 2 == 0
    mixed = {
        "x": np.where(kept[:, None], X, other_x),
        "y": np.where(kept, Y, other_y),
        "keys": jnp.where(kept, keys_of(2, N), other_keys),
    }
    np.testing.assert_array_equal(run(attack, threat, **mixed)[0][kept], z[kept])
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = run(attack, threat, x=X[order], y=Y[order], keys=keys_of(2, N)[order])
    np.testing.assert_array_equal(moved[0], z[order])

    # Another batch size is another program, with sums in another order: a relative error of
    # (D + 16)u an evaluation, which each of the steps can pass on enlarged. An image of another key
    # differs by a good part of the radius.
    some_z, some_loss = run(attack, threat, x=X[1:2], y=Y[1:2], keys=keys_of(2, N)[1:2])
    np.testing.assert_allclose(some_z, z[1:2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(some_loss, loss[1:2], rtol=1e-5, atol=1e-5)


@contract
def test_one_trace_serves_every_radius_key_and_network(attack: Any, name: str):
    counting: Any = Counting(attack)
    z = [
        perturb(
            counting, Network(apply, params), x, y, make(name, epsilon), jax.random.key(k)
        ).images
        for params, (x, y), epsilon, k in [
            (PARAMS, (X, Y), 0.1, 0),
            (PARAMS, (X, Y), 0.3, 0),
            (PARAMS, (X, Y), 0.3, 1),
            (network(5), (X, Y), 0.3, 1),
            (network(5), images(8), 0.3, 1),
        ]
    ]
    assert len(counting.traces) == 1
    assert all(np.any(a != b) for a, b in pairwise(z))


@contract
def test_nan_loss_leaves_the_image(attack: Any, name: str):
    def all_nan(params: Any, x: Any) -> Any:
        return jnp.where(jnp.arange(N)[:, None] == 1, jnp.nan, apply(params, x))

    threat = make(name, EPSILON[name])
    z, loss = map(np.asarray, run(attack, threat, apply=all_nan))
    np.testing.assert_array_equal(z[1], X[1])
    assert loss[1] == -np.inf
    others = np.arange(N) != 1
    wanted = run(attack, threat)
    # The program has one operation more, so the rest may be rounded in another way.
    np.testing.assert_allclose(z[others], wanted[0][others], rtol=0, atol=1e-5)


@contract
def test_finite_losses_before_a_nan_count(attack: Any, name: str):
    """The best of the finite losses is kept where others are NaN."""
    limit = losses(X).mean()

    def sometimes_nan(params: Any, x: Any) -> Any:
        logits = apply(params, x)
        loss = -jax.nn.log_softmax(logits)[jnp.arange(N), Y]
        return jnp.where((loss > limit)[:, None], jnp.nan, logits)

    z, loss = map(np.asarray, run(attack, make(name, EPSILON[name]), apply=sometimes_nan))
    assert not np.isnan(loss).any()
    assert not np.isnan(z).any()
    assert np.all(loss <= limit)
    assert np.isfinite(loss).any()


# ---------------------------------------------------------------- closed forms


def linear(params: Any, x: Any) -> Any:
    """Two classes with the margin w·x + b."""
    w, b = params
    return jnp.stack([jnp.zeros(len(x)), x @ w + b], axis=1)


SETTINGS = {
    "from the image": {"random_start": False},
    # Each step is ten radii long, so the part of the start across the gradient shrinks elevenfold.
    "from a random point": {"step_ratio": 200.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", sorted(THREATS))
def test_pgd_finds_the_optimum_of_linear_classifiers(name: str, setting: str):
    rng = np.random.default_rng(3)
    w = rng.normal(size=D).astype(np.float32)
    w[0] = 0  # this pixel does not matter
    b, y = np.float32(0.3), rng.integers(0, 2, N)
    x = rng.uniform(0.4, 0.6, (N, D)).astype(np.float32)
    epsilon, attack = 0.2, PGD(steps=20, **SETTINGS[setting])
    z, loss = map(
        np.asarray, run(attack, make(name, epsilon), x=x, y=y, params=(w, b), apply=linear)
    )
    w64, sign = w.astype(np.float64), 2 * y - 1
    wanted = x - sign[:, None] * threat_models.worst(name, w64[None], epsilon)
    margin = sign * (x @ w64 + b) - threat_models.reach(name, w64[None], epsilon)
    np.testing.assert_allclose(loss, np.logaddexp(0, -margin), atol=1e-5, rtol=0)
    # L2 inwards: 4(√D + 4)u·ε + 2√D·u < 1e-6; a few steps' roundings beside it. From a random point
    # the loss is flat about the optimum of the L2 ball: δ across the gradient costs δ²‖w‖/2ε, so
    # roundings of the loss, 1e-6, hide δ = 4e-4.
    relevant = (w != 0) | (name == "strong-l2")
    flat = name != "linf" and setting != "from the image"
    atol = 1e-3 if flat else 5e-6
    np.testing.assert_allclose(z[:, relevant], wanted[:, relevant], atol=atol, rtol=0)


def test_pgd_finds_the_optimum_of_linear_classifiers_in_the_box():
    """L∞ with an active box is still solved pixel by pixel."""
    rng = np.random.default_rng(4)
    w, b, y = rng.normal(size=D).astype(np.float32), np.float32(0.1), Y % 2
    attack = PGD(steps=20)
    z, loss = run(attack, Linf(0.3), y=y, params=(w, b), apply=linear)
    sign = 2 * y - 1
    wanted = np.clip(X - 0.3 * sign[:, None] * np.sign(w.astype(np.float64)), 0, 1)
    np.testing.assert_allclose(z, wanted, atol=2e-6, rtol=0)
    np.testing.assert_allclose(loss, np.logaddexp(0, -sign * (wanted @ w + b)), atol=1e-5, rtol=0)


@of_losses
def test_never_above_the_optimum(attack: Any, name: str):
    rng = np.random.default_rng(6)
    w, b, y = rng.normal(size=D).astype(np.float32), np.float32(0.1), Y % 2
    _, loss = run(attack, make(name, EPSILON[name]), y=y, params=(w, b), apply=linear)
    sign = 2 * y - 1
    margin = sign * (X @ w.astype(np.float64) + b)
    bound = margin - threat_models.reach(name, w.astype(np.float64)[None], EPSILON[name])
    assert np.all(np.asarray(loss) <= np.logaddexp(0, -bound) + 1e-5)
    assert np.all(np.asarray(loss) > np.logaddexp(0, -margin))


# ---------------------------------------------------------------- PGD itself


def count_passes(attack: PGD) -> Counter[str]:
    """Passes that are really executed: plain forward, forward with backward, backward."""
    counts: Counter[str] = Counter()

    def note(what: str) -> None:
        jax.debug.callback(lambda: counts.update([what]))

    @jax.custom_vjp
    def tapped(z: Any) -> Any:
        note("plain")
        return z

    def forward(z: Any) -> Any:
        note("forward")
        return z, None

    def backward(_: None, g: Any) -> Any:
        note("backward")
        return (g,)

    tapped.defvjp(forward, backward)

    def loss(z: Any) -> Any:
        return NetworkLoss(Network(apply, PARAMS), jnp.asarray(Y))(tapped(z))

    jax.block_until_ready(
        jax.jit(lambda t: attack.run(loss, jnp.asarray(X), t, keys_of(2, N)))(Linf(EPSILON["linf"]))
    )
    jax.effects_barrier()
    return counts


@pytest.mark.parametrize(("steps", "restarts"), [(0, 1), (3, 4)])
def test_pgd_costs_what_it_says(steps: int, restarts: int):
    gradients = steps * restarts
    counts = {"plain": restarts, "forward": gradients, "backward": gradients}
    found = count_passes(PGD(steps=steps, restarts=restarts))
    assert found == {what: count for what, count in counts.items() if count}


@pytest.mark.parametrize("name", sorted(THREATS))
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_without_steps_is_its_start(name: str, random_start: bool):
    threat = make(name, EPSILON[name])
    z, loss = run(PGD(steps=0, random_start=random_start), threat)
    np.testing.assert_allclose(loss, losses(z), rtol=100 * U)
    if not random_start:
        np.testing.assert_array_equal(z, X)
    else:
        assert np.all(np.asarray(threat.distance(z, jnp.asarray(X))) > 0)
        # The start is visited first, so steps cannot make it worse.
        assert np.all(run(PGD(steps=3), threat)[1] >= loss - 100 * U * (1 + loss))


@pytest.mark.parametrize("steps", [1, 4])
def test_pgd_against_numpy(steps: int):
    """The best iterate of projected sign gradients on a linear classifier, in float64."""
    w, b, y = np.linspace(-1, 1, D), 0.2, Y % 2
    attack = PGD(steps=steps, step_ratio=1.5, random_start=False)
    z, loss = run(attack, Linf(0.25), y=y, params=(jnp.float32(w), jnp.float32(b)), apply=linear)
    sign, path = 2 * y - 1, [X.astype(np.float64)]
    for _ in range(steps):
        moved = path[-1] - 1.5 * 0.25 / steps * sign[:, None] * np.sign(w)
        path.append(np.clip(np.clip(moved, X - 0.25, X + 0.25), 0, 1))
    values = np.array([np.logaddexp(0, -sign * (p @ w + b)) for p in path])
    wanted = np.stack(path)[values.argmax(0), np.arange(N)]
    np.testing.assert_allclose(z, wanted, atol=1e-6, rtol=0)  # a few roundings a step
    np.testing.assert_allclose(loss, values.max(0), atol=1e-5, rtol=0)


def test_pgd_may_prefer_a_misclassified_point():
    """On its way the loss is highest where ten other classes are all a little below the label's."""

    def apply(_: Any, z: jax.Array) -> jax.Array:
        rise, late = 10 * (z - 0.6) - 0.1, jax.nn.relu(z - 0.65)
        others = jnp.repeat(rise - 400 * late, 9, axis=1)
        return jnp.concatenate([jnp.zeros_like(z), rise + 2 * late, others], axis=1)

    def found(misclassified: bool) -> float:
        attack = PGD(2, step_ratio=1.0, random_start=False, misclassified=misclassified)
        result = perturb(
            attack, Network(apply, ()), image, jnp.array([0]), Linf(0.2), jax.random.key(0)
        )
        assert bool(result.success[0]) is misclassified
        return float(result.images[0, 0])

    image = jnp.full((1, 1), 0.5)
    # Visited are 0.5, 0.6 with loss log(1 + 10 e^{−0.1}), and 0.7 with loss log(1 + e).
    assert found(False) == pytest.approx(0.6, abs=1e-6)
    assert found(True) == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": -1}, "PGD steps: expected a whole number"),
        ({"steps": 2.5}, "PGD steps: expected a whole number"),
        ({"restarts": 0}, "PGD restarts: expected a whole number"),
        ({"step_ratio": 0.0}, "PGD step ratio: expected a number in"),
        ({"step_ratio": -1.0}, "PGD step ratio"),
        ({"step_ratio": float("nan")}, "PGD step ratio"),
    ],
)
def test_pgd_bad_settings(options: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match):
        PGD(**options)


# ---------------------------------------------------------------- perturb


@contract
def test_perturb(attack: Any, name: str):
    x, y = jnp.asarray(X), jnp.asarray(Y)
    result = perturb(
        attack, Network(apply, PARAMS), x, y, make(name, EPSILON[name]), jax.random.key(2)
    )
    z, loss = run(attack, make(name, EPSILON[name]))
    # The same attack in another program.
    np.testing.assert_allclose(result.images, z, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.success, apply(PARAMS, result.images).argmax(1) != Y)
    assert np.any(result.success)
    x64: Any = X.astype(np.float64)
    from_float64 = perturb(
        attack, Network(apply, PARAMS), x64, y, make(name, 0.1), jax.random.key(2)
    )
    assert from_float64.images.dtype == np.float32


@contract
def test_float64(attack: Any, name: str):
    """With x64 and float64 images all of it is in float64, and the constraints hold as well."""
    epsilon = EPSILON[name]
    with jax.enable_x64(True):
        params = tuple(np.asarray(w, float) for w in PARAMS)
        threat, x = make(name, epsilon), X.astype(float)
        result = perturb(attack, Network(apply, params), x, Y, threat, jax.random.key(2))
        assert result.images.dtype == result.loss.dtype == np.float64
        values = NetworkLoss(Network(apply, params), jnp.asarray(Y))(result.images)
        np.testing.assert_allclose(result.loss, values, rtol=1e-13)
        z = np.asarray(result.images)
        few = perturb(attack, Network(apply, PARAMS), X, Y, threat, jax.random.key(2))
        assert few.images.dtype == np.float32
    assert np.all(np.linalg.norm(z - X, ord=ORDER[name], axis=1) <= epsilon)
    assert z.min() >= 0
    assert z.max() <= 1
    if name == "strong-l2":
        signal = np.linalg.norm(threat_models.signal(z - X), axis=1)
        assert np.all(signal <= RATIO * epsilon)
    assert np.any(z != z.astype(np.float32))


# ---------------------------------------------------------------- suites


def test_suites():
    auto = suite("auto", steps=100, restarts=2)
    assert list(auto) == list(AUTO) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert auto["square"] == Square(steps=5000)
    assert auto["fab-t"] == FAB(steps=100, restarts=2, targets=9)
    pgd = PGD(steps=7, step_ratio=1.5, misclassified=True)
    assert suite("pgd", steps=7, step_ratio=1.5) == {"pgd": pgd}
    for name in ATTACKS:
        assert list(suite(name, steps=3)) == [name]
    with pytest.raises(InputError, match=r"attack: expected one of .*auto"):
        suite("autoattack", steps=3)


# ---------------------------------------------------------------- criteria


def test_criteria():
    logits = np.asarray(apply(PARAMS, X), np.float64)
    wanted = {
        "cross-entropy": np.log(np.exp(logits).sum(1)) - logits[np.arange(N), Y],
        "squared": np.array(
            [0.5 * np.sum((f - np.eye(CLASSES)[y]) ** 2) for f, y in zip(logits, Y, strict=True)]
        ),
    }
    for kind, values in wanted.items():
        loss = NetworkLoss(Network(apply, PARAMS), jnp.asarray(Y), CRITERIA[kind])
        np.testing.assert_allclose(loss(jnp.asarray(X)), values, rtol=1e-5)


def test_an_attack_maximises_the_criterion_it_is_given():
    y, attack, threat = jnp.asarray(Y), PGD(steps=10), Linf(0.2)
    network = Network(apply, PARAMS)
    losses = {kind: NetworkLoss(network, y, CRITERIA[kind]) for kind in CRITERIA}
    points = {
        kind: attack.run(loss, jnp.asarray(X), threat, keys_of(2, N))[0]
        for kind, loss in losses.items()
    }
    for kind, loss in losses.items():
        (other,) = set(CRITERIA) - {kind}
        assert loss(points[kind]).mean() > loss(points[other]).mean()


def at(array: np.ndarray, value: float) -> np.ndarray:
    """A copy with one other entry."""
    array = array.copy()
    array.flat[3] = value
    return array


def infinite_logits(params: Any, x: Any) -> Any:
    return apply(params, x) + jnp.where(jnp.arange(N)[:, None] == 2, jnp.inf, 0)


BAD = {
    "NaN image": ({"x": at(X, np.nan)}, "images: expected finite values"),
    "infinite image": ({"x": at(X, np.inf)}, "images: expected finite values"),
    "too bright": ({"x": at(X, 1.5)}, r"images: expected values in \[0, 1\]"),
    "too dark": ({"x": at(X, -0.5)}, r"images: expected values in \[0, 1\]"),
    "integer images": ({"x": X.astype(np.uint8)}, "images: expected floating-point images"),
    "one image without its axis": ({"x": X[0]}, r"images: expected an array \[n"),
    "negative radius": ({"threat": Linf(-0.1)}, "epsilon: expected a number in"),
    "NaN radius": ({"threat": Linf(float("nan"))}, "epsilon: expected a number in"),
    "too few labels": ({"y": Y[:3]}, r"labels: expected shape \(6,\)"),
    "one-hot labels": ({"y": np.eye(CLASSES, dtype=int)[Y]}, r"labels: expected shape \(6,\)"),
    "label too large": ({"y": np.full(N, CLASSES)}, "labels: expected labels in 0…3, got 4…4"),
    "negative label": ({"y": np.full(N, -1)}, "labels: expected labels in 0…3"),
    "float labels": ({"y": Y.astype(float)}, "labels: expected integer labels"),
    "scalar outputs": ({"apply": lambda p, x: apply(p, x)[:, 0]}, "logits: expected shape"),
    "other batch": ({"apply": lambda p, x: apply(p, x)[:2]}, "logits: expected shape"),
    "infinite logits": ({"apply": infinite_logits}, "loss under attack: expected finite values"),
    "NaN weights": (
        {"params": jax.tree.map(lambda w: w * np.nan, PARAMS)},
        "params: 0: expected finite",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_perturb_bad_input(bad: str):
    change, match = BAD[bad]
    good = {"apply": apply, "params": PARAMS, "x": X, "y": Y, "threat": Linf(0.1)}
    given: Any = good | change
    network = Network(given["apply"], given["params"])
    with pytest.raises(InputError, match=match):
        perturb(PGD(steps=2), network, given["x"], given["y"], given["threat"], jax.random.key(0))


# ---------------------------------------------------------------- attacks that break the contract


@dataclass(frozen=True)
class TooFar:
    """Leaves the ball by a few roundings."""

    def run(self, loss: Any, x: Any, threat: Any, keys: Any) -> Any:
        larger = replace(threat, epsilon=threat.epsilon * (1 + 1e-4))
        return PGD(steps=STEPS).run(loss, x, larger, keys)


@dataclass(frozen=True)
class LastIterate:
    """Returns the last point, with steps that overshoot."""

    def run(self, loss: Any, x: Any, threat: Any, keys: Any) -> Any:
        z = threat.random_start(keys, x)
        for _ in range(STEPS):
            gradient = jax.grad(lambda z: loss(z).sum())(z)
            z = threat.project(z + 2 * threat.epsilon * threat.ascent(gradient), x)
        return z, loss(z)


@dataclass(frozen=True)
class StaleLoss:
    """Reports the loss of the clean images."""

    def run(self, loss: Any, x: Any, threat: Any, keys: Any) -> Any:
        return PGD(steps=STEPS).run(loss, x, threat, keys)[0], loss(x)


WRONG: list[tuple[Any, Callable[[Any, str], None]]] = [
    (TooFar(), check_feasible),
    (LastIterate(), partial(check_best, scale=8.0)),
    (StaleLoss(), check_loss),
]


@pytest.mark.parametrize("name", sorted(THREATS))
@pytest.mark.parametrize(("attack", "check"), WRONG)
def test_wrong_attacks_are_rejected(attack: Any, check: Any, name: str):
    with pytest.raises(AssertionError):
        check(attack, name)
