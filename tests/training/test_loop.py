"""Training against an explicit float64 loop, resuming, recording and compiling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import masks, training
from ntk_awt.app.config import TrainConfig
from ntk_awt.attacks import PGD
from ntk_awt.checkpoints import Checkpoints
from ntk_awt.errors import InputError
from ntk_awt.masks import Ticket
from ntk_awt.network import Network
from ntk_awt.robustness.accuracy import measure
from ntk_awt.schedules import SCHEDULES
from ntk_awt.threats import L2, Linf
from ntk_awt.training import Batch, EpochRecord, fit, steps_per_epoch
from ntk_awt.types import Split
from tests.keys import key_of

SLOW = (
    "test_against_a_loop trades-*",
    "test_squared_error_against_a_loop trades",
    "test_against_a_loop adversarial-momentum",
    "test_against_a_loop adversarial-adamw",
)

N, D, HIDDEN, CLASSES, SIZE = 20, 6, 5, 3, 8  # two batches of 8 an epoch; 4 images are left out
RNG = np.random.default_rng(0)
X = RNG.uniform(0, 1, (N, D)).astype(np.float32)
Y = RNG.integers(0, CLASSES, N)
THREAT = L2(0.25)
traces: list[int] = []


def apply(params: Any, x: Any) -> Any:
    traces.append(1)
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"]


def parameters(seed: int = 0, hidden: int = HIDDEN) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"a": (D, hidden), "b": (hidden, CLASSES)}
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[1:]), jnp.float32),
        }
        for name, shape in shapes.items()
    }


def dense(params: Any) -> Ticket:
    return masks.dense(params)


def sparse(params: Any, seed: int = 1) -> Ticket:
    mask = masks.make(masks.random_scores(jax.random.key(seed), params), 0.5, "uniform")
    return Ticket(params, mask, masks.energy_gain(params, mask))


@dataclass(frozen=True)
class OneStep:
    """A smooth attack without randomness: a fixed offset, then a step of one radius."""

    def run(self, loss: Any, x: Any, threat: Any, keys: Any) -> Any:
        start = x + 0.5 * threat.epsilon * (-1.0) ** jnp.arange(D) / D**0.5
        gradient = jax.grad(lambda z: loss(z).sum())(start)
        z = threat.project(start + threat.epsilon * threat.ascent(gradient), x)
        return z, loss(z)


CONFIG = TrainConfig(
    loss="natural",
    epochs=2,
    batch_size=SIZE,
    optimizer="sgd",
    learning_rate=0.1,
    schedule="constant",
    weight_decay=0.0,
)


def train(ticket: Ticket | None = None, config: TrainConfig = CONFIG, **changes: Any) -> Ticket:
    default: dict[str, Any] = {
        "images": X, "labels": Y, "threat": THREAT, "attack": OneStep(), "key": key_of(3),
    }  # fmt: skip
    ticket = sparse(parameters()) if ticket is None else ticket
    return fit(apply, ticket, config=config, **(default | changes))


def weights(ticket: Ticket) -> Any:
    """γ⊙m⊙θ in NumPy."""
    return jax.tree.map(lambda *leaves: np.prod(np.broadcast_arrays(*leaves), axis=0), *ticket)


def assert_trees(a: Any, b: Any, atol: float = 0.0) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), a, b)


# ---------------------------------------------------------------- which images are in a batch


def reveal_rows(
    apply: Any, params: Any, batch: Batch, attack: Any, threat: Any, config: TrainConfig
) -> tuple[Any, Any]:
    """A loss whose value is Σ 2^row over the batch: exact in float32, for 20 images."""
    rows = jnp.argmax((batch.x[:, None] == jnp.asarray(X)).all(-1), 1)
    return jnp.sum(2.0**rows), apply(params, batch.x)


def reveal_keys(
    apply: Any, params: Any, batch: Batch, attack: Any, threat: Any, config: TrainConfig
) -> tuple[Any, Any]:
    """A loss whose value is a random number drawn with the key of the batch's first image."""
    return jax.random.uniform(batch.keys[0]), apply(params, batch.x)


@pytest.fixture(scope="module", autouse=True)
def _reveal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.LOSSES, "rows", reveal_rows)
        patch.setitem(training.LOSSES, "keys", reveal_keys)
        yield


def revealed(what: str, epochs: int = 2, **changes: Any) -> np.ndarray:
    """The revealing loss of every step."""
    records: list[EpochRecord] = []
    config = replace(CONFIG, loss=what, epochs=epochs)
    train(config=config, callbacks=[records.append], **changes)
    return np.concatenate([record.loss for record in records])


def batches(epochs: int = 2, **changes: Any) -> list[np.ndarray]:
    values = revealed("rows", epochs, **changes).astype(int)
    return [np.flatnonzero(value >> np.arange(N) & 1) for value in values]


def test_batches():
    rows = batches(epochs=3)
    assert [len(r) for r in rows] == [SIZE] * 6  # all different: a repeated row would carry over
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert not set(first) & set(second)  # without replacement
    assert len({tuple(r) for r in rows}) == 6  # another order in each epoch


@pytest.mark.parametrize("what", ["rows", "keys"])
def test_same_key_same_batches_and_attacks(what: str):
    values = revealed(what)
    assert len(set(values.tolist())) == len(values)
    for ticket in (dense(parameters(5)), sparse(parameters(6), seed=7)):
        np.testing.assert_array_equal(revealed(what, ticket=ticket), values)
    assert np.all(revealed(what, key=jax.random.key(4)) != values)


# ---------------------------------------------------------------- against an explicit loop


def log_softmax(logits: Any) -> Any:
    return logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))


def loss_of(w: Any, x: Any, y: Any, config: TrainConfig) -> Any:
    """The three losses by their formulas, with the attack written out."""
    name = config.loss

    def values(w: Any, z: Any) -> Any:
        if config.criterion == "squared":
            return 0.5 * ((apply(w, z) - jnp.eye(CLASSES)[y]) ** 2).sum(-1)
        return -log_softmax(apply(w, z))[jnp.arange(len(y)), y]

    def divergences(w_clean: Any, w: Any, z: Any) -> Any:
        p, q = log_softmax(apply(w_clean, x)), log_softmax(apply(w, z))
        return (jnp.exp(p) * (p - q)).sum(-1)

    if name == "natural":
        return values(w, x).mean()
    fixed = jax.lax.stop_gradient(w)
    inner = {
        "adversarial": lambda z: values(fixed, z),
        "trades": lambda z: divergences(fixed, fixed, z),
    }[name]
    epsilon = 0.25
    start = x + 0.5 * epsilon * (-1.0) ** np.arange(D) / np.sqrt(D)
    gradient = jax.grad(lambda z: inner(z).sum())(start)
    v = start - x + epsilon * gradient / jnp.linalg.norm(gradient, axis=1, keepdims=True)
    v *= jnp.minimum(1, epsilon / jnp.linalg.norm(v, axis=1, keepdims=True))
    z = jax.lax.stop_gradient(jnp.clip(x + v, 0, 1))
    if name == "adversarial":
        return values(w, z).mean()
    return values(w, x).mean() + config.trades_beta * divergences(w, w, z).mean()


@partial(jax.jit, static_argnames="config")
def gradient_of(theta: Any, mask: Any, gain: Any, x: Any, y: Any, config: TrainConfig) -> Any:
    def loss(theta: Any) -> Any:
        w = jax.tree.map(lambda t, m, g: t * m * g, theta, mask, gain)
        return loss_of(w, x, y, config)

    return jax.value_and_grad(loss)(theta)


def update(name: str, state: dict[str, Any], w: Any, g: Any, rate: float, decay: float) -> Any:
    """One step of an optimiser on one leaf; the textbook formulas."""
    if name != "adamw":
        g = g + decay * w
    if name == "sgd":
        return w - rate * g
    if name == "momentum":
        state["m"] = 0.9 * state.get("m", 0) + g
        return w - rate * state["m"]
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    direction = state["m"] / (1 - 0.9**t) / (np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8)
    return w - rate * (direction + (decay * w if name == "adamw" else 0))


def loop(
    ticket: Ticket, config: TrainConfig, rows: Sequence[np.ndarray]
) -> tuple[list[Any], list[float]]:
    """Parameters before and after every step, and the losses, in float64."""
    with jax.enable_x64(True):
        theta, mask, gain = (
            [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(part)] for part in ticket
        )
        structure = jax.tree.structure(ticket.params)
        states: list[dict[str, Any]] = [{} for _ in theta]
        path, losses = [theta], []
        for t, r in enumerate(rows):
            rate = config.learning_rate
            if config.schedule == "cosine":
                rate *= 0.5 * (1 + np.cos(np.pi * t / len(rows)))
            trees = [structure.unflatten(part) for part in (theta, mask, gain)]
            x, y = X[r].astype(np.float64), Y[r]
            value, gradient = gradient_of(*trees, x, y, config)
            theta = [
                update(config.optimizer, *args, rate, config.weight_decay)
                for args in zip(
                    states, theta, map(np.asarray, jax.tree.leaves(gradient)), strict=True
                )
            ]
            path.append(theta)
            losses.append(float(value))
    return [structure.unflatten(p) for p in path], losses


def check_against_loop(
    trained: Ticket, records: Sequence[EpochRecord], ticket: Ticket, config: TrainConfig, rows: Any
) -> None:
    """Effective weights and losses, to float32 accuracy.

    A gradient errs by some 10u relative to its largest entry; a step of Adam divides an entry by
    its own size, which may be 100 times smaller: 1000u·η a step, so 4 steps stay below 5e-5.
    """
    path, losses = loop(ticket, config, rows)
    assert_trees(weights(trained), weights(ticket._replace(params=path[-1])), atol=5e-5)
    np.testing.assert_allclose(np.concatenate([r.loss for r in records]), losses, atol=5e-5)


LOSSES = ["natural", "adversarial", "trades"]
OPTIMIZERS = ["sgd", "momentum", "adam", "adamw"]


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    return batches()


def settings(loss: str, optimizer: str) -> TrainConfig:
    return replace(
        CONFIG,
        loss=loss,
        optimizer=optimizer,
        learning_rate=0.2 if optimizer in ("sgd", "momentum") else 0.02,
        weight_decay=0.05,
        schedule="cosine" if optimizer in ("momentum", "adam") else "constant",
        trades_beta=2.0,
    )


def test_the_registries_are_covered():
    assert set(training.LOSSES) - {"rows", "keys"} == set(LOSSES)
    assert set(training.OPTIMIZERS) == set(OPTIMIZERS)
    assert set(SCHEDULES) == {"constant", "cosine"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_against_a_loop(loss: str, optimizer: str, rows: list[np.ndarray]):
    config, ticket = settings(loss, optimizer), sparse(parameters())
    records: list[EpochRecord] = []
    trained = train(ticket, config, callbacks=[records.append])
    check_against_loop(trained, records, ticket, config, rows)

    for w, start, m in zip(
        *map(jax.tree.leaves, (weights(trained), weights(ticket), ticket.mask)), strict=True
    ):
        assert not np.any(np.asarray(w)[~np.asarray(m)])  # pruned ones are zero
        assert np.all(w[m] != start[m])  # kept ones move
    if loss == "adversarial":  # the same check rejects what a wrong implementation would do
        forgotten = ticket._replace(mask=masks.ones(ticket.params))
        for wrong_ticket, wrong_config, wrong_rows in [
            (forgotten, config, rows),
            (ticket._replace(gain=masks.unit_gain(ticket.params)), config, rows),
            (ticket, replace(config, weight_decay=0.0), rows),
            (ticket, replace(config, schedule="linear"), [*rows, rows[0]]),
            (ticket, replace(config, loss="natural"), rows),
            (ticket, config, rows[::-1]),
        ]:
            with pytest.raises(AssertionError):
                check_against_loop(trained, records, wrong_ticket, wrong_config, wrong_rows)


@pytest.mark.parametrize("loss", LOSSES)
def test_squared_error_against_a_loop(loss: str, rows: list[np.ndarray]):
    config, ticket = replace(settings(loss, "sgd"), criterion="squared"), sparse(parameters())
    records: list[EpochRecord] = []
    trained = train(ticket, config, callbacks=[records.append])
    check_against_loop(trained, records, ticket, config, rows)
    with pytest.raises(AssertionError):
        check_against_loop(trained, records, ticket, settings(loss, "sgd"), rows)


def test_float64(rows: list[np.ndarray]):
    """With x64, float64 images and parameters, the loop's numbers to 1e-12."""
    config, ticket = replace(settings("natural", "sgd"), criterion="squared"), sparse(parameters())
    wide = jax.tree.map(lambda a: np.asarray(a, a.dtype if a.dtype == bool else float), ticket)
    records: list[EpochRecord] = []
    with jax.enable_x64(True):
        trained = train(wide, config, images=X.astype(float), callbacks=[records.append])
    path, losses = loop(ticket, config, rows)
    assert_trees(weights(trained), weights(ticket._replace(params=path[-1])), atol=1e-12)
    np.testing.assert_allclose(np.concatenate([r.loss for r in records]), losses, atol=1e-12)
    narrow = train(ticket, config, images=X.astype(float))  # without x64 all of it is float32
    assert {w.dtype for w in jax.tree.leaves(narrow.params)} == {np.dtype(np.float32)}
    with pytest.raises(AssertionError):
        assert_trees(weights(narrow), weights(ticket._replace(params=path[-1])), atol=1e-12)


def test_accuracy(rows: list[np.ndarray]):
    """The share of each batch that is right before its update."""
    records: list[EpochRecord] = []
    ticket = sparse(parameters())
    train(ticket, callbacks=[records.append])
    path, _ = loop(ticket, CONFIG, rows)
    wanted = [
        np.mean(apply(weights(ticket._replace(params=p)), X[r]).argmax(1) == Y[r])
        for p, r in zip(path, rows, strict=False)
    ]
    np.testing.assert_allclose(np.concatenate([r.accuracy for r in records]), wanted, atol=1e-6)


# ---------------------------------------------------------------- records


def observe(ticket: Ticket) -> Any:
    return {"params": ticket.params, "mask": ticket.mask["a"]["kernel"]}


@pytest.mark.parametrize("count", [1, 2])
def test_observations(count: int, rows: list[np.ndarray]):
    ticket, records = sparse(parameters()), []
    trained = train(ticket, observe=observe, records=count, callbacks=[records.append])
    assert [r.epoch for r in records] == [1, 2]
    assert [r.steps.tolist() for r in records] == {
        1: [[0, 2], [4]],
        2: [[0, 1, 2], [3, 4]],
    }[count]
    path, _ = loop(ticket, CONFIG, rows)
    for record in records:
        assert record.loss.shape == record.accuracy.shape == (2,)
        seen = record.observations
        assert len(seen["mask"]) == len(record.steps)
        for i, step in enumerate(record.steps):
            at = jax.tree.map(lambda leaf, i=i: leaf[i], seen["params"])
            assert_trees(at, path[step], atol=5e-5)  # as in check_against_loop
            np.testing.assert_array_equal(seen["mask"][i], ticket.mask["a"]["kernel"])
        last = jax.tree.map(lambda leaf: leaf[-1], seen["params"])
        assert_trees(last, record.ticket.params)
        assert_trees(record.ticket.mask, ticket.mask)
    first = jax.tree.map(lambda leaf: leaf[0], records[0].observations["params"])
    assert_trees(first, ticket.params)
    assert_trees(records[-1].ticket, trained)


def test_the_callers_arrays_survive():
    ticket, images = sparse(parameters()), jnp.asarray(X)
    before = jax.tree.map(np.array, ticket)
    records: list[EpochRecord] = []
    trained = train(ticket, images=images, callbacks=[records.append])
    assert_trees(ticket, before)  # deleted buffers would raise
    np.testing.assert_array_equal(images, X)
    again = train(ticket, images=images, callbacks=[records.append])
    assert_trees(again, trained)
    assert_trees(records[0].ticket, records[2].ticket)
    assert np.any(records[0].ticket.params["a"]["kernel"] != trained.params["a"]["kernel"])


def test_one_compilation_for_all_tickets_and_epochs():
    config = replace(CONFIG, epochs=3, loss="adversarial", learning_rate=0.123)
    counts = []
    for ticket in (sparse(parameters()), dense(parameters(1)), sparse(parameters(2), 5)):
        train(ticket, config, callbacks=[lambda _: counts.append(len(traces))])
    train(dense(parameters()), config, key=jax.random.key(8), threat=L2(0.1), images=X[::-1].copy())
    counts.append(len(traces))
    assert len(counts) == 10
    assert len(set(counts)) == 1


def seen_at(points: Any, ticket: Ticket) -> Any:
    return apply(masks.effective(*ticket), points)


def test_observing_at_other_points_compiles_nothing():
    """Arrays bound by `Partial` are arguments of the epoch; bound otherwise they are constants."""
    records: list[EpochRecord] = []
    one, two = jnp.asarray(X[:2]), jnp.asarray(X[2:4])
    train(observe=jax.tree_util.Partial(seen_at, one))
    before = len(traces)
    trained = train(observe=jax.tree_util.Partial(seen_at, two), callbacks=[records.append])
    assert len(traces) == before
    np.testing.assert_allclose(records[-1].observations[-1], seen_at(two, trained), atol=1e-6)
    before = len(traces)
    train(observe=partial(seen_at, two))
    assert len(traces) > before


# ---------------------------------------------------------------- checkpoints


class Interrupted(Exception):
    pass


RESUMED = replace(CONFIG, epochs=4, optimizer="adam", learning_rate=0.02, schedule="cosine")


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[Ticket, list[EpochRecord]]:
    records: list[EpochRecord] = []
    return train(config=RESUMED, callbacks=[records.append]), records


def check_resumed(
    folder: Path, uninterrupted: tuple[Ticket, list[EpochRecord]], epochs: list[int]
) -> None:
    """A further call does these epochs only, and ends bit by bit like an uninterrupted training."""
    records: list[EpochRecord] = []
    trained = train(config=RESUMED, callbacks=[records.append], checkpoints=folder)
    assert_trees(trained, uninterrupted[0])
    assert [r.epoch for r in records] == epochs
    for record in records:
        wanted = uninterrupted[1][record.epoch - 1]
        np.testing.assert_array_equal(record.steps, wanted.steps)
        np.testing.assert_array_equal(record.loss, wanted.loss)
        assert_trees(record.ticket, wanted.ticket)


@pytest.mark.parametrize("last", [1, 3])
def test_interrupted_in_a_callback(last: int, tmp_path: Path, uninterrupted: Any):
    def stop(record: EpochRecord) -> None:
        if record.epoch == last:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config=RESUMED, callbacks=[stop], checkpoints=tmp_path / "c")
    # The epoch of the callback was not saved, so it is done and reported again.
    check_resumed(tmp_path / "c", uninterrupted, list(range(last, 5)))
    check_resumed(tmp_path / "c", uninterrupted, [])  # finished: nothing to do


def test_killed_between_callback_and_checkpoint(
    tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
):
    save, seen = Checkpoints.save, []

    def killed(self: Checkpoints, step: int, state: Any) -> None:
        if step == 3:
            raise Interrupted
        save(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(Interrupted):
            train(config=RESUMED, callbacks=[seen.append], checkpoints=tmp_path)
    assert [r.epoch for r in seen] == [1, 2, 3]
    check_resumed(tmp_path, uninterrupted, [3, 4])


def test_a_wrong_resume_is_rejected(tmp_path: Path, uninterrupted: Any):
    """The check notices a state of another training in the folder."""
    train(config=replace(RESUMED, epochs=2, learning_rate=0.03), checkpoints=tmp_path)
    with pytest.raises(AssertionError):
        check_resumed(tmp_path, uninterrupted, [3, 4])


@pytest.mark.parametrize(
    ("hidden", "optimizer"),
    [(HIDDEN + 1, "adam"), (HIDDEN, "sgd"), (HIDDEN, "momentum")],
    ids=["other width", "no moments", "one moment"],
)
def test_a_checkpoint_of_another_structure(tmp_path: Path, hidden: int, optimizer: str):
    train(config=replace(RESUMED, epochs=1), checkpoints=tmp_path)
    ticket = dense(parameters(hidden=hidden))
    with pytest.raises(InputError, match=r"checkpoint in .*expected"):
        train(ticket, replace(RESUMED, optimizer=optimizer), checkpoints=tmp_path)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loss": "hinge"}, "loss: expected one of adversarial"),
        ({"loss": "trade"}, "did you mean 'trades'"),
        ({"criterion": "hinge"}, "criterion: expected one of cross-entropy, squared"),
        ({"optimizer": "lion"}, "optimizer: expected one of adam"),
        ({"schedule": "step"}, "schedule: expected one of constant, cosine"),
        ({"batch_size": N + 1}, "batch_size: expected at most 20"),
    ],
)
def test_bad_settings(change: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match):
        train(config=replace(CONFIG, **change))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": Y[:5]}, "labels: expected shape"),
        ({"labels": Y + 100}, "labels: expected labels in"),
        ({"images": X + 1}, "images: expected values in"),
        ({"records": 0}, "records: expected a whole number"),
    ],
)
def test_bad_examples(change: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match):
        train(**change)


def test_steps_per_epoch():
    for n, size, records in [(20, 8, 1), (100, 7, 3), (64, 8, 8), (9, 3, 2)]:
        steps = steps_per_epoch(n, replace(CONFIG, batch_size=size), records)
        assert steps % records == 0
        assert steps * size <= n < (steps + records) * size
    with pytest.raises(InputError, match=r"at most 6 \(20 training images, 3 records an epoch\)"):
        steps_per_epoch(20, CONFIG, 3)


def test_a_loss_that_is_not_finite(tmp_path: Path):
    far = replace(CONFIG, learning_rate=1e30, weight_decay=1e10)
    with pytest.raises(InputError, match="training loss in epoch 1: expected finite values"):
        train(config=far, checkpoints=tmp_path)
    train(checkpoints=tmp_path)  # and nothing of it was saved


# ---------------------------------------------------------------- learning


def linear(params: Any, x: Any) -> Any:
    return (x - 0.5) @ params["w"]


def toy(n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """One pixel with a large margin, right nine times of ten; 30 right ones with a tiny margin."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, n)
    sign = 2 * y[:, None] - 1
    flip = np.where(rng.uniform(size=(n, 1)) < 0.1, -1, 1)
    x = np.concatenate([0.5 + 0.3 * sign * flip, np.repeat(0.5 + 0.03 * sign, 30, axis=1)], axis=1)
    return x.astype(np.float32), y


def test_learning():
    """Natural training separates the classes; adversarial training keeps to the robust pixel.

    With radius 0.1 the adversary turns the tiny margins round and only the large one is left: no
    classifier that uses the tiny ones much is robust, and a robust one is right nine times of ten.
    """
    x, y = toy()
    params = {"w": jnp.zeros((31, 2))}
    threat, attack = Linf(0.1), PGD(steps=3)
    config = replace(CONFIG, epochs=30, batch_size=50, optimizer="adam", learning_rate=0.05)
    result = {}
    for loss in ("natural", "adversarial"):
        trained = fit(
            linear, dense(params), x, y, config=replace(config, loss=loss),
            threat=threat, attack=attack, key=key_of(3),
        )  # fmt: skip
        result[loss] = measure(
            Network(linear, trained.params), Split(x, y), threat, attack, key=key_of(3)
        )
    assert result["natural"].natural.value == 1
    assert result["natural"].robust.value < 0.3
    assert result["adversarial"].robust.value > 0.8
