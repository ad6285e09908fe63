"""The adversarial-winning-ticket solver: optimise the kept weights, re-select the mask if asked.

Source of the idea: Shi et al., "Finding dynamics preserving adversarial winning tickets" (2022).
Source of re-selection (drop the smallest kept weights, grow where the gradient is largest, as many,
with a share that falls along a cosine): Evci et al., "Rigging the lottery" (2020).
"""

import jax
import jax.numpy as jnp
import optax

from ntk_awt.config import TicketConfig
from ntk_awt.masks import Ticket, effective, is_prunable, top_k
from ntk_awt.tickets.objective import Target, distances, objective
from ntk_awt.tickets.solver import Solver, SolverState
from ntk_awt.types import ApplyFn, Mask, Params


def reselect(params: Params, mask: Mask, gradient: Params, share: jax.Array) -> tuple[Params, Mask]:
    """Drop the smallest kept weights of each layer and grow as many pruned ones.

    Args:
        params: θ.
        mask: m; every leaf keeps its number of entries, exactly.
        gradient: of the objective with respect to the effective weights, pruned ones included.
        share: of the kept weights to replace, traced scalar in [0, 1].

    Returns:
        θ with dropped and grown weights at zero, and the new mask.
    """

    def leaf(w: jax.Array, m: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not is_prunable(w):
            return w, m
        kept = jnp.sum(m)
        swap = jnp.minimum(jnp.floor(share * kept).astype(kept.dtype), m.size - kept)
        stay = top_k(jnp.where(m, jnp.abs(w), -1.0), kept - swap)
        grow = top_k(jnp.where(m, -1.0, jnp.abs(g)), swap)
        return jnp.where(stay, w, 0.0), jnp.logical_or(stay, grow)

    leaves = [jax.tree.leaves(tree) for tree in (params, mask, gradient)]
    new_params, new_mask = zip(*map(leaf, *leaves), strict=True)
    structure = jax.tree.structure(params)
    return structure.unflatten(new_params), structure.unflatten(new_mask)


def awt(apply: ApplyFn, config: TicketConfig) -> Solver:
    """Adam with a cosine schedule on the kept weights of a fixed or re-selected mask.

    Args:
        apply: the dense network's function.
        config: steps, step size, λ, the distance, the Jacobian, the re-selection.

    Returns:
        A `Solver` whose `init` takes the starting ticket.
    """
    schedule = optax.cosine_decay_schedule(config.ticket_learning_rate, config.ticket_steps)
    optimizer = optax.adam(schedule)

    def init(ticket: Ticket) -> SolverState:
        return SolverState(jnp.zeros((), jnp.int32), ticket, optimizer.init(ticket.params))

    def update(state: SolverState, target: Target):
        params, mask, gain = state.ticket

        def loss(params: Params):
            values = distances(apply, Ticket(params, mask, gain), target, config.jacobian)
            return objective(values, config), values

        # Zero at pruned weights, whatever the Jacobian: they enter through γ⊙m⊙θ only.
        (value, values), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        ticket = Ticket(params, mask, gain)
        if config.reselect_every:
            due = (state.step + 1) % config.reselect_every == 0
            ticket = jax.lax.cond(due, lambda t: regrow(t, target, state.step), lambda t: t, ticket)
            # A dropped weight's momentum would move it on, and come back when it is grown again.
            optimizer_state = optax.tree_utils.tree_map_params(
                optimizer, lambda moment, m: moment * m, optimizer_state, ticket.mask
            )
        return SolverState(state.step + 1, ticket, optimizer_state), (value, values)

    def regrow(ticket: Ticket, target: Target, step: jax.Array) -> Ticket:
        params, mask, gain = ticket

        def loss(weights: Params):
            values = distances(apply, ticket, target, config.jacobian, at=weights)
            return objective(values, config)

        gradient = jax.grad(loss)(effective(params, mask, gain))
        share = 0.5 * config.reselect_fraction * (1 + jnp.cos(jnp.pi * step / config.ticket_steps))
        return Ticket(*reselect(params, mask, gradient, share), gain)

    return Solver(init, update)
