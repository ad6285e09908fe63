"""A relaxed Bernoulli mask, annealed to its density.

Each mask entry is a binary Concrete variable m = σ((s + log u − log(1 − u))/T), u uniform, with
trainable logits s (Maddison et al., "The Concrete distribution", 2017); a second gradient pulls the
expected density to its target and is scaled to the norm of the objective's, so that neither hides
the other (the idea of Arora & Teuscher, "Winning the lottery by preserving network training
dynamics with concrete ticket search", 2025; the schedule of the density and the taper of that pull
are ours).
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
from ntk_awt.tickets.solver import Selection, Solver, SolverState, kept_counts, regain, step_size
from ntk_awt.types import ApplyFn, Key, Mask, Params

START = 0.5
"""Expected density of every layer before the first step."""

ANNEALING = 0.7
"""Share of the steps after which the expected density is to be at its target."""

TAPER = 0.05
"""Relative excess of density below which the pull weakens in proportion."""


class Memory(NamedTuple):
    """Of the solver `concrete`.

    Attributes:
        weights: all weights.
        logits: of the mask.
        optimizer: Adam's state.
        balance: the factor of λ.
        key: bits of the key of the draws.
    """

    weights: Params
    logits: Any
    optimizer: Any
    balance: jax.Array
    key: jax.Array


def relaxed(logits: Any, key: Key, temperature: float, prunable: Prunable | None = None) -> Any:
    """One draw of the relaxed mask, real numbers in (0, 1); 1 where nothing is prunable."""
    leaves, structure = jax.tree.flatten(logits)

    def leaf(s: jax.Array, key: Key, p: bool) -> jax.Array:
        noise = jax.random.logistic(key, s.shape, s.dtype)
        return jax.nn.sigmoid((s + noise) / temperature) if p else jnp.ones_like(s)

    keys = jax.random.split(key, len(leaves))
    chosen = jax.tree.leaves(prunable_leaves(logits, prunable))
    return structure.unflatten(list(map(leaf, leaves, keys, chosen)))


def wanted_counts(counts: Any, sizes: Any, step: jax.Array, steps: int) -> Any:
    """Expected number of kept weights that is aimed at: from START·size geometrically to counts."""
    done = jnp.minimum(step / (ANNEALING * steps), 1.0)
    return jax.tree.map(lambda c, n: (START * n) ** (1 - done) * (c * 1.0) ** done, counts, sizes)


def pull(logits: Any, wanted: Any, *, learned: bool, prunable: Prunable | None = None) -> Any:
    """Direction in which the expected numbers of kept weights approach the wanted ones.

    The gradient of ½(relative excess)² of each layer, or of all together if the allocation is
    learned; of norm 1 or less: it is tapered near the target.
    """

    chosen = jax.tree.leaves(prunable_leaves(logits, prunable))

    def expected(s: Any) -> list[jax.Array]:
        layers = [leaf for leaf, p in zip(jax.tree.leaves(s), chosen, strict=True) if p]
        found = [jnp.sum(jax.nn.sigmoid(leaf)) for leaf in layers]
        return [sum(found[1:], found[0])] if learned else found

    goals = [w for w, p in zip(jax.tree.leaves(wanted), chosen, strict=True) if p]
    goals = [sum(goals[1:], goals[0])] if learned else goals

    def excess(s: Any) -> jax.Array:
        pairs = zip(expected(s), goals, strict=True)
        return jnp.stack([found / goal - 1 for found, goal in pairs])

    def half(s: Any) -> tuple[jax.Array, jax.Array]:
        over = excess(s)
        return jnp.sum(over**2) / 2, jnp.max(jnp.abs(over))

    gradient, worst = jax.grad(half, has_aux=True)(logits)
    norm = jnp.maximum(optax.tree.norm(gradient), jnp.finfo(worst.dtype).tiny)
    return jax.tree.map(lambda g: g * jnp.minimum(worst / TAPER, 1.0) / norm, gradient)


def concrete(
    apply: ApplyFn, config: TicketConfig, gain: str, prunable: Prunable | None = None
) -> Solver:
    """Adam on the logits of a relaxed mask; weights stay at their initial values.

    `state.ticket` has the exact mask of the highest logits after every step.

    Args:
        apply: the dense network's function.
        config: steps, step size of the scores, temperature, the objective, the allocation.
        gain: a name in `masks.GAINS`; that of the drawn mask is used in every step.
        prunable: see `masks.prunable_leaves`.
    """
    optimizer = optax.adam(step_size(config.score_learning_rate, config))
    select = Selection(config.learn_allocation, prunable)

    def init(params: Params, ticket: Ticket, key: Key) -> SolverState:
        logits = jax.tree.map(jnp.zeros_like, params)
        memory = Memory(
            params, logits, optimizer.init(logits), jnp.zeros(()), jax.random.key_data(key)
        )
        return SolverState(jnp.zeros((), jnp.int32), ticket, memory)

    def update(
        state: SolverState, target: Target, kernel: KernelFn = empirical
    ) -> tuple[SolverState, jax.Array]:
        memory: Memory = state.memory
        counts, before = kept_counts(state.ticket.mask), state.ticket.gain
        key = jax.random.fold_in(jax.random.wrap_key_data(memory.key), state.step)

        def compute(logits: Any) -> Terms:
            mask = relaxed(logits, key, config.temperature, prunable)
            ticket = Ticket(
                memory.weights, mask, regain(gain, memory.weights, mask, before, prunable)
            )
            return terms(apply, ticket, target, config, kernel=kernel)

        value, gradient, balance = objective_gradient(
            compute, memory.logits, memory.balance, config
        )
        sizes = jax.tree.map(jnp.size, memory.logits)
        wanted = wanted_counts(counts, sizes, state.step, config.ticket_steps)
        norm = optax.tree.norm(gradient)
        towards = pull(memory.logits, wanted, learned=config.learn_allocation, prunable=prunable)
        gradient = jax.tree.map(lambda g, p: g + norm * p, gradient, towards)
        updates, optimizer_state = optimizer.update(gradient, memory.optimizer)
        logits: Any = optax.apply_updates(memory.logits, updates)
        mask: Mask = select(logits, counts)
        kept = jax.tree.map(lambda w, m: w * m, memory.weights, mask)
        ticket = Ticket(kept, mask, regain(gain, memory.weights, mask, before, prunable))
        memory = memory._replace(logits=logits, optimizer=optimizer_state, balance=balance)
        return SolverState(state.step + 1, ticket, memory), value

    return Solver(init, update)
