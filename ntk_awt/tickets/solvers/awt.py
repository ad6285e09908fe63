"""The adversarial-winning-ticket solver: optimise the kept weights, re-select the mask if asked.

Source of the idea: Shi et al., "Finding dynamics preserving adversarial winning tickets" (2022).
Source of regrowth (drop kept weights, grow as many where the gradient is largest, with a share that
falls along a cosine): Evci et al., "Rigging the lottery" (2020), who drop the smallest; here the
least sensitive go, since a large weight behind a pixel that is always black is of no use. Source of
a constant number of incoming weights a unit: Lasby et al., "Dynamic sparse training with structured
sparsity" (2024). Source of re-selection by magnitude with pruned weights at their initial values:
Liu & Zenke, "Finding trainable sparse networks through Neural Tangent Transfer" (2020).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntk_awt.app.config import TicketConfig
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket, effective, top_k
from ntk_awt.network import Prunable, prunable_leaves
from ntk_awt.tickets.objective import (
    KernelFn,
    Target,
    Terms,
    objective,
    objective_gradient,
    terms,
)
from ntk_awt.tickets.solver import Solver, SolverState, kept_counts, step_size
from ntk_awt.types import ApplyFn, Images, Key, Mask, Params

DRAWS = 16
"""Reverse passes of an estimated sensitivity."""


class Memory(NamedTuple):
    """Of the solver `awt`: Adam's state, the factor of λ, pruned weights' values."""

    optimizer: Any
    balance: jax.Array
    pruned: Params


def sensitivity(apply: ApplyFn, params: Params, x: Images, key: Key, draws: int = DRAWS) -> Params:
    """What removing a weight takes from the outputs, to first order: |w| ‖∂f(x)/∂w‖.

    ‖∂f/∂w‖² = E⟨v, ∂f/∂w⟩² over random signs v of all outputs, estimated by the mean of a few
    draws. It is exactly 0 where nothing depends on a weight, e.g. behind a pixel that is always 0.

    Args:
        apply: `(params, x) -> logits`.
        params: effective weights w.
        x: images [n, *shape].
        key: of the signs.
        draws: reverse passes.
    """
    logits, back = jax.vjp(lambda w: apply(w, x), params)

    def once(key: Key) -> Params:
        (slope,) = back(jax.random.rademacher(key, logits.shape, logits.dtype))
        return jax.tree.map(jnp.square, slope)

    squares = jax.lax.map(once, jax.random.split(key, draws))
    return jax.tree.map(lambda w, s: jnp.abs(w) * jnp.sqrt(s.mean(0)), params, squares)


def reselect(
    params: Params,
    mask: Mask,
    scores: Params,
    gradient: Params,
    share: jax.Array,
    *,
    units: bool = False,
    prunable: Prunable | None = None,
) -> tuple[Params, Mask]:
    """Drop the kept weights of each layer with the lowest scores and grow as many pruned ones.

    Args:
        params: θ.
        mask: m; every leaf keeps its number of entries, exactly.
        scores: of the kept weights, not negative.
        gradient: of the objective with respect to the effective weights, pruned ones included.
        share: of the kept weights to replace, traced scalar in [0, 1].
        units: do so for each output unit (or channel), which then keeps its number of weights.
        prunable: see `masks.prunable_leaves`.

    Returns:
        θ with dropped and grown weights at zero, and the new mask.
    """

    def swapped(
        w: jax.Array, m: jax.Array, s: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        kept = jnp.sum(m)
        swap = jnp.minimum(jnp.floor(share * kept).astype(kept.dtype), m.size - kept)
        stay = top_k(jnp.where(m, s, -1.0), kept - swap)
        grow = top_k(jnp.where(m, -1.0, jnp.abs(g)), swap)
        return jnp.where(stay, w, 0.0), jnp.logical_or(stay, grow)

    rule = jax.vmap(swapped, in_axes=-1, out_axes=-1) if units else swapped  # units come last

    leaves = [jax.tree.leaves(tree) for tree in (params, mask, scores, gradient)]
    chosen = jax.tree.leaves(prunable_leaves(params, prunable))

    def leaf(
        p: bool, w: jax.Array, m: jax.Array, s: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return rule(w, m, s, g) if p else (w, m)

    new_params, new_mask = zip(*map(leaf, chosen, *leaves), strict=True)
    structure = jax.tree.structure(params)
    return structure.unflatten(new_params), structure.unflatten(new_mask)


def _decay(ticket: Ticket, l2: float, prunable: Prunable | None = None) -> Params:
    """Gradient of l2/density · ‖γ⊙m⊙θ‖² with respect to θ, over prunable leaves."""
    params, mask, gain = ticket
    chosen = prunable_leaves(params, prunable)
    layers = [m for m, p in zip(*map(jax.tree.leaves, (mask, chosen)), strict=True) if p]
    scale = 2 * l2 * sum(m.size for m in layers) / sum(jnp.sum(m) for m in layers)
    return jax.tree.map(
        lambda w, m, g, p: jnp.where(m, scale * jnp.square(g) * w, 0) if p else jnp.zeros_like(w),
        params,
        mask,
        gain,
        chosen,
    )


def awt(
    apply: ApplyFn, config: TicketConfig, gain: str, prunable: Prunable | None = None
) -> Solver:
    """Adam on the kept weights of a fixed or re-selected mask.

    What it minimises is J + l2/density · ‖γ⊙m⊙θ‖²; what it reports is J.

    Args:
        apply: the dense network's function.
        config: steps, step size, weights of the objective and of ‖w‖², the Jacobian, re-selection.
        gain: not used: the gain of the start stays, since the weights themselves are optimised.
        prunable: see `masks.prunable_leaves`.
    """
    optimizer = optax.adam(step_size(config.ticket_learning_rate, config))
    units = config.reselect == "regrow-units"

    def init(params: Params, ticket: Ticket, key: Key) -> SolverState:
        pruned = jax.tree.map(lambda w, m: jnp.where(m, 0, w), params, ticket.mask)
        kept = jax.tree.map(lambda w, m: jnp.where(m, w, 0), ticket.params, ticket.mask)
        ticket = ticket._replace(params=kept)
        memory = Memory(optimizer.init(ticket.params), jnp.zeros(()), pruned)
        return SolverState(jnp.zeros((), jnp.int32), ticket, memory)

    def update(
        state: SolverState, target: Target, kernel: KernelFn = empirical
    ) -> tuple[SolverState, jax.Array]:
        params, mask, gain = state.ticket
        memory: Memory = state.memory

        def compute(params: Params) -> Terms:
            return terms(apply, Ticket(params, mask, gain), target, config, kernel=kernel)

        # Zero at pruned weights, whatever the Jacobian: they enter through γ⊙m⊙θ only.
        value, gradient, balance = objective_gradient(compute, params, memory.balance, config)
        if config.l2:
            gradient = jax.tree.map(jnp.add, gradient, _decay(state.ticket, config.l2, prunable))
        updates, optimizer_state = optimizer.update(gradient, memory.optimizer, params)
        ticket = Ticket(optax.apply_updates(params, updates), mask, gain)
        memory = Memory(optimizer_state, balance, memory.pruned)
        return SolverState(state.step + 1, ticket, memory), value

    def regrow(state: SolverState, target: Target) -> Ticket:
        params, mask, gain = state.ticket

        def loss(weights: Params) -> jax.Array:
            found = terms(apply, state.ticket, target, config, at=weights)
            return objective(found, config, state.memory.balance if config.balance else 1.0)

        weights = effective(params, mask, gain)
        gradient = jax.grad(loss)(weights)
        scores = sensitivity(apply, weights, target.x, target.key)
        done = state.step / config.ticket_steps
        share = 0.5 * config.reselect_fraction * (1 + jnp.cos(jnp.pi * done))
        return Ticket(
            *reselect(params, mask, scores, gradient, share, units=units, prunable=prunable), gain
        )

    def largest(state: SolverState) -> tuple[Ticket, Params]:
        params, mask, gain = state.ticket
        everything = jax.tree.map(jnp.add, params, state.memory.pruned)
        mask = top_k(jax.tree.map(jnp.abs, everything), kept_counts(mask))
        kept = jax.tree.map(lambda w, m: jnp.where(m, w, 0), everything, mask)
        return Ticket(kept, mask, gain), jax.tree.map(jnp.subtract, everything, kept)

    def refresh(state: SolverState, target: Target) -> SolverState:
        memory: Memory = state.memory
        if config.reselect.startswith("regrow"):
            ticket, pruned = regrow(state, target), memory.pruned
        else:
            ticket, pruned = largest(state)
        # A dropped weight's momentum would move it on, and come back when it is grown again.
        optimizer_state = optax.tree_utils.tree_map_params(
            optimizer, lambda moment, m: moment * m, memory.optimizer, ticket.mask
        )
        return SolverState(state.step, ticket, Memory(optimizer_state, memory.balance, pruned))

    return Solver(init, update, refresh, fixed_mask=True, fixed_units=units)
