"""Solvers that learn the mask: trainable scores, of which the highest are kept.

The forward pass has the exact mask of the highest scores, the gradient goes to all scores as if the
mask were the scores themselves (straight-through). Source of the idea: Ramanujan et al., "What's
hidden in a randomly weighted neural network?" (2020); here the scores follow the ticket objective.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntk_awt.app.config import TicketConfig
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket
from ntk_awt.network import Prunable, prunable_leaves
from ntk_awt.tickets.objective import KernelFn, Target, Terms, objective_gradient, terms
from ntk_awt.tickets.solver import (
    Selection,
    Solver,
    SolverState,
    kept_counts,
    regain,
    step_size,
)
from ntk_awt.types import ApplyFn, Gain, Key, Mask, Params

START = 0.1
"""Scores start uniform in (0, START), with a minus sign at weights that the first mask prunes."""


class Memory(NamedTuple):
    """Of the solvers with scores.

    Attributes:
        weights: all weights, pruned ones included.
        scores: of all weights.
        optimizer: Optax's state.
        balance: the factor of λ.
    """

    weights: Params
    scores: Any
    optimizer: Any
    balance: jax.Array


def straight_through(hard: Mask, scores: Any, prunable: Prunable | None = None) -> Any:
    """The mask as real numbers, with derivative 1 with respect to the scores of prunable leaves."""

    def leaf(m: jax.Array, s: jax.Array, p: bool) -> jax.Array:
        return m + (s - jax.lax.stop_gradient(s)) if p else m.astype(s.dtype)

    return jax.tree.map(leaf, hard, scores, prunable_leaves(hard, prunable))


def _solver(
    apply: ApplyFn,
    config: TicketConfig,
    gain: str,
    prunable: Prunable | None,
    *,
    train_weights: bool,
) -> Solver:
    optimizer = optax.multi_transform(
        {
            "scores": optax.adam(step_size(config.score_learning_rate, config)),
            "weights": optax.adam(step_size(config.ticket_learning_rate, config))
            if train_weights
            else optax.set_to_zero(),
        },
        {"scores": "scores", "weights": "weights"},
    )
    select = Selection(config.learn_allocation, prunable)

    def gain_of(weights: Params, mask: Mask, before: Gain) -> Gain:
        """Trained weights absorb a gain; frozen ones need that of their mask."""
        return before if train_weights else regain(gain, weights, mask, before, prunable)

    def init(params: Params, ticket: Ticket, key: Key) -> SolverState:
        leaves, structure = jax.tree.flatten(ticket.mask)
        keys = structure.unflatten(list(jax.random.split(key, len(leaves))))
        scores = jax.tree.map(
            lambda m, k, w: jnp.where(m, 1, -1) * START * jax.random.uniform(k, m.shape, w.dtype),
            ticket.mask,
            keys,
            params,
        )
        trained = {"scores": scores, "weights": params}
        memory = Memory(params, scores, optimizer.init(trained), jnp.zeros(()))
        return SolverState(jnp.zeros((), jnp.int32), ticket, memory)

    def update(
        state: SolverState, target: Target, kernel: KernelFn = empirical
    ) -> tuple[SolverState, jax.Array]:
        memory: Memory = state.memory
        hard, gains = state.ticket.mask, state.ticket.gain
        counts = kept_counts(hard)

        def compute(at: dict[str, Any]) -> Terms:
            soft = straight_through(hard, at["scores"], prunable)
            return terms(apply, Ticket(at["weights"], soft, gains), target, config, kernel=kernel)

        at = {"scores": memory.scores, "weights": memory.weights}
        value, gradient, balance = objective_gradient(compute, at, memory.balance, config)
        updates, optimizer_state = optimizer.update(gradient, memory.optimizer, at)
        new: Any = optax.apply_updates(at, updates)
        mask = select(new["scores"], counts)
        kept = jax.tree.map(lambda w, m: w * m, new["weights"], mask)
        ticket = Ticket(kept, mask, gain_of(new["weights"], mask, gains))
        memory = Memory(new["weights"], new["scores"], optimizer_state, balance)
        return SolverState(state.step + 1, ticket, memory), value

    return Solver(init, update)


def awt_scores(
    apply: ApplyFn, config: TicketConfig, gain: str, prunable: Prunable | None = None
) -> Solver:
    """The mask alone: scores learn, weights stay at their initial values.

    Args:
        apply: the dense network's function.
        config: steps, step size of the scores, weights of the objective, the allocation.
        gain: a name in `masks.GAINS`; that of the current mask is used in every step.
        prunable: see `masks.prunable_leaves`.
    """
    return _solver(apply, config, gain, prunable, train_weights=False)


def awt_joint(
    apply: ApplyFn, config: TicketConfig, gain: str, prunable: Prunable | None = None
) -> Solver:
    """The mask and the weights together.

    Args:
        apply, config, prunable: see `awt_scores`; both step sizes count.
        gain: not used: the gain of the start stays, since the weights themselves are optimised.
    """
    return _solver(apply, config, gain, prunable, train_weights=True)
