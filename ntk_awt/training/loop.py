"""Adversarial training of dense and sparse networks: an epoch is one jitted scan.

Batches and attacks depend on the key and the step only. So networks trained with the same key see
the same images in the same order, and a training resumed from a checkpoint gives the numbers of an
uninterrupted one. Pruned entries of θ keep their values, bit by bit, whatever the optimiser: the
network is f(x; γ⊙m⊙θ), and no update reaches them. Weight decay acts on all that is kept, biases
and normalisation included.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntk_awt.app.config import TrainConfig
from ntk_awt.attacks import (
    CRITERIA,
    Attack,
    NetworkLoss,
    check_examples,
    check_given,
    example_keys,
)
from ntk_awt.checkpoints import Checkpoints
from ntk_awt.errors import InputError, check_count, check_finite, choose
from ntk_awt.masks import Ticket, effective
from ntk_awt.network import Network
from ntk_awt.schedules import SCHEDULES
from ntk_awt.threats import Threat
from ntk_awt.types import ApplyFn, Gain, Images, Key, Labels, Logits, Mask, Params

# ---------------------------------------------------------------- losses


class Batch(NamedTuple):
    """One batch: images [n, *shape], labels [n], one random key an image [n]."""

    x: Images
    y: Labels
    keys: Key


def _kl(reference: Logits, logits: Logits) -> jax.Array:
    """KL(softmax(reference) ‖ softmax(logits)) for each image, in nats."""
    p = jax.nn.log_softmax(reference)
    return jnp.sum(jnp.exp(p) * (p - jax.nn.log_softmax(logits)), -1)


def _natural(
    apply: ApplyFn,
    params: Params,
    batch: Batch,
    attack: Attack | None,
    threat: Threat | None,
    config: TrainConfig,
) -> tuple[jax.Array, Logits]:
    logits = apply(params, batch.x)
    return CRITERIA[config.criterion](logits, batch.y).mean(), logits


def _attacked(loss: NetworkLoss, batch: Batch, attack: Attack, threat: Threat) -> Images:
    return jax.lax.stop_gradient(attack.run(loss, batch.x, threat, batch.keys)[0])


def _adversarial(
    apply: ApplyFn,
    params: Params,
    batch: Batch,
    attack: Attack,
    threat: Threat,
    config: TrainConfig,
) -> tuple[jax.Array, Logits]:
    fixed = jax.lax.stop_gradient(params)
    loss = NetworkLoss(Network(apply, fixed), batch.y, CRITERIA[config.criterion])
    x = _attacked(loss, batch, attack, threat)
    return _natural(apply, params, batch._replace(x=x), attack, threat, config)


def _trades(
    apply: ApplyFn,
    params: Params,
    batch: Batch,
    attack: Attack,
    threat: Threat,
    config: TrainConfig,
) -> tuple[jax.Array, Logits]:
    fixed = jax.lax.stop_gradient(params)
    reference = apply(fixed, batch.x)
    divergence = NetworkLoss(
        Network(apply, fixed), batch.y, lambda logits, _: _kl(reference, logits)
    )
    x = _attacked(divergence, batch, attack, threat)
    natural, clean_logits = _natural(apply, params, batch, attack, threat, config)
    logits = apply(params, x)
    return natural + config.trades_beta * _kl(clean_logits, logits).mean(), logits


LOSSES: dict[str, Callable[..., tuple[jax.Array, Logits]]] = {
    "natural": _natural,
    "adversarial": _adversarial,
    "trades": _trades,
}
"""Losses by name: `(apply, params, batch, attack, threat, config) -> (loss, logits)`.

natural: mean of `config.criterion` (cross-entropy, or squared). adversarial: the same at images
that maximise it (Madry et al., 2018). trades: natural + β·mean KL(f(x) ‖ f(x̃)), x̃ maximising that
KL (Zhang et al., 2019). The logits are those at the attacked images, or at the clean ones for
`natural`.
"""

# ---------------------------------------------------------------- optimisers


def _with_penalty(optimizer: Callable[..., optax.GradientTransformation], **options: Any):
    return lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay), optimizer(rate, **options)
    )


OPTIMIZERS: dict[str, Callable[[Any, float], optax.GradientTransformation]] = {
    "sgd": _with_penalty(optax.sgd),
    "momentum": _with_penalty(optax.sgd, momentum=0.9),
    "adam": _with_penalty(optax.adam),
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
}
"""Optimisers by name: `(learning rate or schedule, weight decay) -> gradient transformation`.

The decay λ adds λθ to the gradient (an L2 penalty of λ/2 ‖θ‖²); with adamw it is decoupled, −ηλθ in
each update. It acts on every leaf; `fit` keeps pruned entries where they are.
"""


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of `config` for a training of so many steps.

    Raises:
        InputError: unknown optimiser or schedule.
    """
    choose("optimizer", config.optimizer, OPTIMIZERS)
    choose("schedule", config.schedule, SCHEDULES)
    rate = SCHEDULES[config.schedule](config.learning_rate, steps)
    return OPTIMIZERS[config.optimizer](rate, config.weight_decay)


# ---------------------------------------------------------------- the loop


class TrainState(NamedTuple):
    """State of a training between two epochs; a pytree of arrays.

    Attributes:
        step: updates done, int32.
        params: θ.
        optimizer: Optax's state.
    """

    step: jax.Array
    params: Params
    optimizer: Any


class EpochRecord(NamedTuple):
    """What one epoch reports.

    Attributes:
        epoch: 1 for the first one.
        steps: update counts at which `observations` were taken, [records]. The first epoch starts
            with one before the first update; every epoch ends with one after its last.
        loss: training loss of each step, in nats with cross-entropy, [steps of the epoch].
        accuracy: share of each step's batch classified correctly (under attack, if the loss
            attacks), [steps of the epoch].
        observations: what `observe` gave, each leaf with a leading axis [records].
        ticket: the network after the epoch.
    """

    epoch: int
    steps: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    observations: Any
    ticket: Ticket


Observe: TypeAlias = Callable[[Ticket], Any]
"""A pure function of the network, evaluated inside the jitted epoch.

Arrays bound to it by `jax.tree_util.Partial` are arguments of the epoch, not constants: observing
at other points compiles nothing anew.
"""

Callback: TypeAlias = Callable[[EpochRecord], None]

Weights: TypeAlias = Callable[[Params, Mask, Gain], Params]
"""`(params, mask, gain) -> effective weights`, differentiable in the parameters."""


def nothing(ticket: Ticket) -> None:
    """Observe nothing."""


def steps_per_epoch(n: int, config: TrainConfig, records: int) -> int:
    """Updates an epoch: whole batches of n images, rounded down to a multiple of `records`.

    Raises:
        InputError: not even one batch between two records.
    """
    chunk = n // (config.batch_size * records)
    if chunk == 0:
        raise InputError(
            "batch_size",
            expected=f"at most {n // records} ({n} training images, {records} records an epoch)",
            got=str(config.batch_size),
            fix="lower it, or records_per_epoch",
        )
    return chunk * records


class _Static(NamedTuple):
    """Everything of a training that jit compiles in."""

    apply: ApplyFn
    attack: Attack | None
    config: TrainConfig
    records: int
    epoch_steps: int
    weights: Weights

    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config, self.config.epochs * self.epoch_steps)


@partial(jax.jit, static_argnames="static", donate_argnames="state")
def _epoch(
    state: TrainState,
    ticket: Ticket,
    images: Images,
    labels: Labels,
    threat: Threat | None,
    key: Key,
    observe: jax.tree_util.Partial,
    static: _Static,
) -> tuple[TrainState, tuple[jax.Array, jax.Array], Any]:
    optimizer = static.optimizer()
    batch_size = static.config.batch_size
    order_key, attack_key = jax.random.split(jax.random.fold_in(key, state.step))
    order = jax.random.permutation(order_key, images.shape[0])
    order = order[: static.epoch_steps * batch_size]
    chunks = order.reshape(static.records, -1, batch_size)

    def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        keys = example_keys(jax.random.fold_in(attack_key, state.step), rows)
        batch = Batch(images[rows], labels[rows], keys)

        def loss(params: Params) -> tuple[jax.Array, Logits]:
            weights = static.weights(params, ticket.mask, ticket.gain)
            arguments = (static.apply, weights, batch, static.attack, threat, static.config)
            return LOSSES[static.config.loss](*arguments)

        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        moved = optax.apply_updates(state.params, updates)
        # Weight decay knows no mask: it would move what is pruned and not zero.
        params = jax.tree.map(jnp.where, ticket.mask, moved, state.params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch.y)
        return TrainState(state.step + 1, params, optimizer_state), (value, accuracy)

    def chunk(state: TrainState, rows: jax.Array) -> tuple[TrainState, Any]:
        state, metrics = jax.lax.scan(step, state, rows)
        return state, (metrics, observe(ticket._replace(params=state.params)))

    state, (metrics, observations) = jax.lax.scan(chunk, state, chunks)
    return state, jax.tree.map(jnp.ravel, metrics), observations


_observe_once = jax.jit(lambda observe, ticket: observe(ticket))


def fit(
    apply: ApplyFn,
    ticket: Ticket,
    images: Images | np.ndarray,
    labels: Labels | np.ndarray,
    *,
    config: TrainConfig,
    threat: Threat | None = None,
    attack: Attack | None = None,
    key: Key,
    observe: Observe = nothing,
    records: int = 1,
    callbacks: Sequence[Callback] = (),
    checkpoints: Path | None = None,
    weights: Weights = effective,
) -> Ticket:
    """Train the sparse (or dense) network f(x; γ⊙m⊙θ) with respect to θ.

    Args:
        apply: the dense network's function, `(weights, x[n, *shape]) -> logits[n, c]`.
        ticket: where to start; a dense network is `masks.dense(params)`. Mask and gain are
            arguments of the compiled epoch, so all tickets of one `apply` share one compilation.
        images: [n, *shape], inside `threat.bounds` (pixel units); float32, or float64 where x64 is
            enabled, and then the parameters should be as well.
        labels: [n], integers.
        config: loss, optimiser, schedule, epochs, batch size.
        threat, attack: the threat model and the maximiser inside the loss; natural training needs
            neither, and without a threat model images are in no box.
        key: decides batches and attacks; the same key gives the same batches to every network.
        observe: evaluated inside the epoch, `records` times; see `Observe`.
        records: observations an epoch, evenly spaced.
        callbacks: called after every epoch with its `EpochRecord`, before the checkpoint.
        checkpoints: folder to save the state in after each epoch, and to resume from; the caller
            sees to it that the settings are the same when resuming.
        weights: of the network at some parameters; γ⊙m⊙θ if not given. What is trained may be
            other things than weights, such as scores of a mask.

    Returns:
        The trained ticket.

    Raises:
        InputError: unknown loss, criterion, optimiser or schedule, a loss that attacks without
            anything to attack with, bad images or labels, too few images for a batch, a loss or
            weights that are no longer finite.
    """
    choose("loss", config.loss, LOSSES)
    choose("criterion", config.criterion, CRITERIA)
    check_count("records", records, low=1)
    if config.loss != "natural":
        check_given(f"loss {config.loss}", threat, attack)
    images, labels = check_examples(Network(apply, ticket.params), images, labels, threat)
    epoch_steps = steps_per_epoch(images.shape[0], config, records)
    static = _Static(apply, attack, config, records, epoch_steps, weights)
    if not isinstance(observe, jax.tree_util.Partial):
        observe = jax.tree_util.Partial(observe)
    # Copies: the epoch donates its state, and the ticket belongs to the caller.
    params = jax.tree.map(jnp.array, ticket.params)
    state = TrainState(jnp.zeros((), jnp.int32), params, static.optimizer().init(params))
    with Checkpoints(checkpoints) as saved:
        state = saved.latest(state)
        arrays = (jnp.asarray(images), jnp.asarray(labels))
        for epoch in range(int(state.step) // epoch_steps + 1, config.epochs + 1):
            steps = int(state.step) + epoch_steps // records * np.arange(1, records + 1)
            first = None
            if epoch == 1:
                first = _observe_once(observe, ticket)
            state, (loss, accuracy), observed = _epoch(
                state, ticket, *arrays, threat, key, observe, static
            )
            check_finite(f"training loss in epoch {epoch}", loss)
            if first is not None:
                steps = np.concatenate([[0], steps])
                observed = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, observed)
            # A copy, since the next epoch donates the state.
            after = ticket._replace(params=jax.tree.map(jnp.array, state.params))
            record = EpochRecord(
                epoch, steps, np.asarray(loss), np.asarray(accuracy), observed, after
            )
            for callback in callbacks:
                callback(record)
            saved.save(epoch, state)
    check_finite("trained weights", state.params)
    return ticket._replace(params=state.params)
