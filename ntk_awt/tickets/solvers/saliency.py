"""Weights removed in rounds, those first whose removal changes the objective least.

The objective is a sum of squared residuals r(m), J = ‖r‖² with r = (√w (f^d − f^s)/…,
√λ (Θ^d − Θ^s)/…). Removing a kept entry changes it by

    ΔJ_i ≈ −m_i ∂J/∂m_i + m_i² ‖∂r/∂m_i‖²,

the second term being half of the Gauss-Newton curvature. At the dense network r = 0, so that the
first-order saliency |m_i ∂J/∂m_i| is zero for every weight and can choose nothing; what decides
there is the first-order change of the residuals. ‖∂r/∂m_i‖² is the mean of (∂⟨v, r⟩/∂m_i)² over
random signs v: one reverse pass a draw, of which each step makes one. Source of the idea, for
another objective (how the outputs react to perturbed weights) and with first-order saliency:
Wang et al., "NTK-SAP: improving neural network pruning by aligning training dynamics" (2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntk_awt.app.config import TicketConfig
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket
from ntk_awt.network import Prunable
from ntk_awt.tickets.objective import KernelFn, Target, residuals
from ntk_awt.tickets.solver import Selection, Solver, SolverState, kept_counts, regain
from ntk_awt.types import ApplyFn, Key, Params


class Memory(NamedTuple):
    """Of the solver `saliency`.

    Attributes:
        weights: all weights, pruned ones included.
        counts: kept entries of each leaf in the end.
        rises: summed estimates of what removing each entry adds to the objective.
        key: bits of the key of the random signs.
    """

    weights: Params
    counts: Any
    rises: Any
    key: jax.Array


def removal(compute: Callable[[Any], Any], mask: Any, key: Key) -> tuple[jax.Array, Any]:
    """The objective, and estimates of what removing each entry of the mask adds to it.

    Args:
        compute: residuals of a real-valued mask, a pytree of arrays.
        mask: real numbers; entries at 0 have a rise of 0.
        key: of the random signs.

    Returns:
        J = ‖r‖², and ΔJ of every entry, the structure of the mask.
    """
    found, back = jax.vjp(compute, mask)
    leaves, structure = jax.tree.flatten(found)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, r.shape, r.dtype) for k, r in zip(keys, leaves, strict=True)]
    (slope,) = back(jax.tree.map(lambda r: 2 * r, found))
    (change,) = back(structure.unflatten(signs))
    value = sum((jnp.sum(r**2) for r in leaves), jnp.zeros(()))
    rise = jax.tree.map(lambda m, s, c: -m * s + (m * c) ** 2, mask, slope, change)
    return value, rise


def round_counts(counts: Any, sizes: Any, done: jax.Array) -> Any:
    """Kept entries after a share of the rounds: from all, geometrically, to `counts`."""
    return jax.tree.map(
        lambda c, n: jnp.round(n * (c / n) ** done).astype(jnp.int32), counts, sizes
    )


def saliency(
    apply: ApplyFn, config: TicketConfig, gain: str, prunable: Prunable | None = None
) -> Solver:
    """From the dense network to the density in `config.rounds` rounds; weights stay as they are.

    Each step adds one batch's estimate; a round ends with the removal of the lowest.

    Args:
        apply: the dense network's function.
        config: steps, rounds, weights of the objective, the allocation. The step sizes don't count.
        gain: a name in `masks.GAINS`; that of the current mask is used in every step.
        prunable: see `masks.prunable_leaves`.
    """
    select = Selection(config.learn_allocation, prunable)
    steps, rounds = config.ticket_steps, config.rounds

    def init(params: Params, ticket: Ticket, key: Key) -> SolverState:
        everything = jax.tree.map(jnp.ones_like, ticket.mask)
        first = Ticket(params, everything, regain(gain, params, everything, ticket.gain, prunable))
        rises = jax.tree.map(jnp.zeros_like, params)
        memory = Memory(params, kept_counts(ticket.mask), rises, jax.random.key_data(key))
        return SolverState(jnp.zeros((), jnp.int32), first, memory)

    def update(
        state: SolverState, target: Target, kernel: KernelFn = empirical
    ) -> tuple[SolverState, jax.Array]:
        params, mask, gains = state.ticket
        memory: Memory = state.memory
        key = jax.random.fold_in(jax.random.wrap_key_data(memory.key), state.step)

        def compute(mask: Any) -> Any:
            return residuals(apply, Ticket(params, mask, gains), target, config, kernel=kernel)

        real = jax.tree.map(lambda m, w: m.astype(w.dtype), mask, params)
        value, rise = removal(compute, real, key)
        rises = jax.tree.map(jnp.add, memory.rises, rise)
        before, now = (t * rounds // steps for t in (state.step, state.step + 1))

        def remove(rises: Any) -> tuple[Ticket, Any]:
            sizes = jax.tree.map(jnp.size, rises)
            # Entries that are gone stay gone, whatever the estimates of the others.
            scores = jax.tree.map(lambda r, m: jnp.where(m, r, -jnp.inf), rises, mask)
            left = select(scores, round_counts(memory.counts, sizes, now / rounds))
            kept = jax.tree.map(lambda w, m: w * m, memory.weights, left)
            ticket = Ticket(kept, left, regain(gain, memory.weights, left, gains, prunable))
            return ticket, jax.tree.map(jnp.zeros_like, rises)

        ticket, rises = jax.lax.cond(
            now > before, remove, lambda rises: (state.ticket, rises), rises
        )
        return SolverState(state.step + 1, ticket, memory._replace(rises=rises)), value

    return Solver(init, update)
