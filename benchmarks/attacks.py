"""PGD and a PGD training step against their floor: the bare forward-backward passes in them.

40-step PGD is 40 passes of loss and input gradient and one forward pass; a training step under
10-step PGD is 11 of the former plus one pass of loss and parameter gradient. Both floors are timed
as a jitted scan of such passes and nothing else, so a ratio of 1 would be free projections, starts,
and updates. The same PGD is also timed against foolbox (Rauber et al., 2017 and 2020), where it is
installed: `pip install -e ".[bench]"`.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntk_awt import masks, models, training
from ntk_awt.app.config import ModelConfig, TrainConfig
from ntk_awt.attacks import PGD, NetworkLoss, example_keys
from ntk_awt.network import Network
from ntk_awt.threats import Linf
from ntk_awt.types import Params

from .timing import compare

BATCH = 128
SMALL = 32
"""A batch so small that the MLP's passes cost little beside what surrounds them."""
EPSILON = {"mlp": 0.01, "lenet5": 0.05}
"""Radii at which PGD leaves some of the images."""
STARTS = 5
"""Runs of each attack whose survivors are counted, each from another start."""


def networks() -> dict[str, Network]:
    """MLP 784-300-100-10 and LeNet-5 (Caffe) on 28×28 images."""
    return {
        name: models.build(ModelConfig(name=name), (28, 28, 1), 10, jax.random.key(0))
        for name in ("mlp", "lenet5")
    }


class Inputs(NamedTuple):
    """One batch of random images with labels."""

    x: jax.Array
    y: jax.Array


def inputs(n: int) -> Inputs:
    """Random images [n, 28, 28, 1] and labels [n]."""
    x = jax.random.uniform(jax.random.key(1), (n, 28, 28, 1))
    return Inputs(x, jax.random.randint(jax.random.key(2), (n,), 0, 10))


def passes(network: Network, batch: Inputs, count: int) -> Callable[[], jax.Array]:
    """A jitted scan of `count` passes of loss and input gradient."""

    @jax.jit
    def run(params: Params, batch: Inputs) -> jax.Array:
        loss = NetworkLoss(network.replace(params=params), batch.y)
        gradient = jax.grad(lambda z: loss(z).sum())

        def step(z: jax.Array, _: None) -> tuple[jax.Array, None]:
            # The next input depends on the last gradient, or the compiler would drop the pass.
            return z + 1e-3 * gradient(z), None

        return jax.lax.scan(step, batch.x, length=count)[0]

    return lambda: run(network.params, batch)


def attacked(
    network: Network, batch: Inputs, attack: PGD, threat: Linf
) -> Callable[..., jax.Array]:
    """The jitted attack: the images it finds, from the start that the seed draws."""

    @jax.jit
    def run(params: Params, batch: Inputs, keys: jax.Array) -> jax.Array:
        return attack.run(
            NetworkLoss(network.replace(params=params), batch.y), batch.x, threat, keys
        )[0]

    def call(seed: int = 3) -> jax.Array:
        keys = example_keys(jax.random.key(seed), jnp.arange(len(batch.x)))
        return run(network.params, batch, keys)

    return call


def attack_row(name: str, network: Network, repeats: int) -> dict[str, Any]:
    """40-step PGD."""
    batch = inputs(BATCH)
    return compare(
        f"PGD-40, L∞, {name}, batch {BATCH}",
        attacked(network, batch, PGD(steps=40), Linf(0.1)),
        passes(network, batch, 40),
        "40 bare forward-backward passes",
        repeats=repeats,
    )


def foolbox_row(name: str, network: Network, repeats: int, n: int = BATCH) -> dict[str, Any]:
    """40-step PGD against foolbox's, with the same step size and a random start.

    Labels are the network's own predictions, and ε leaves some images right, so that the row also
    compares what the attacks leave: the mean over `STARTS` runs of each.
    """
    foolbox: Any = importlib.import_module("foolbox")
    x, epsilon, attack = inputs(n).x, EPSILON[name], PGD(steps=40, misclassified=True)
    y, threat = jnp.argmax(network.apply(network.params, x), -1), Linf(epsilon)
    ours = attacked(network, Inputs(x, y), attack, threat)
    model = foolbox.JAXModel(lambda x: network.apply(network.params, x), bounds=threat.bounds)
    peer = foolbox.attacks.LinfPGD(
        steps=attack.steps, rel_stepsize=attack.step_ratio / attack.steps, random_start=True
    )

    def theirs() -> jax.Array:
        return peer(model, x, y, epsilons=epsilon)[0]

    def survivors(images: Iterable[jax.Array]) -> float:
        right = [jnp.argmax(network.apply(network.params, z), -1) == y for z in images]
        return float(jnp.stack(right).sum(-1).mean())

    row = compare(
        f"PGD-40, L∞ ε = {epsilon}, {name}, batch {n}",
        ours,
        theirs,
        f"foolbox {foolbox.__version__}",
        repeats=repeats,
    )
    left = {
        "ours": survivors(ours(seed) for seed in range(STARTS)),
        "peer": survivors(theirs() for _ in range(STARTS)),
    }
    return row | {"survivors": left, "images": n}


def training_row(name: str, network: Network, repeats: int) -> dict[str, Any]:
    """32 training steps under 10-step PGD, through `fit` with all its set-up."""
    steps = 32
    many = inputs(steps * BATCH)
    config = TrainConfig(epochs=1, batch_size=BATCH)
    params = network.params
    ticket = masks.dense(params)
    options = {"threat": Linf(0.1), "attack": PGD(steps=10), "key": jax.random.key(4)}
    return compare(
        f"{steps} training steps under PGD-10, {name}, batch {BATCH}",
        lambda: training.fit(network.apply, ticket, *many, config=config, **options).params,
        passes(network, inputs(BATCH), 11),
        f"11 bare forward-backward passes, times {steps}",
        repeats=repeats,
        peer_calls=steps,
    )


def run(repeats: int = 5) -> list[dict[str, Any]]:
    """Two rows for each network, and more where foolbox is installed."""
    built = networks()
    rows = [row(*item, repeats) for item in built.items() for row in (attack_row, training_row)]
    if importlib.util.find_spec("foolbox") is None:
        print('left out: foolbox is not installed (pip install -e ".[bench]")', file=sys.stderr)
        return rows
    rows += [foolbox_row(*item, repeats) for item in built.items()]
    return [*rows, foolbox_row("mlp", built["mlp"], repeats, SMALL)]
