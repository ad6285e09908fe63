"""The contract of a ticket solver, in the manner of Optax: `init` and `update`, both pure."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ntk_awt.app.config import TicketConfig
from ntk_awt.kernels import empirical
from ntk_awt.masks import GAINS, Ticket, top_k
from ntk_awt.network import Prunable, prunable_leaves
from ntk_awt.schedules import SCHEDULES
from ntk_awt.tickets.objective import KernelFn, Target
from ntk_awt.types import Gain, Key, Mask, Params


class SolverState(NamedTuple):
    """State of a search; a pytree of arrays.

    Attributes:
        step: updates done, int32.
        ticket: the current sparse network, pruned weights at zero.
        memory: whatever the solver carries along.
    """

    step: jax.Array
    ticket: Ticket
    memory: Any


class Update(Protocol):
    """One step of a solver."""

    def __call__(
        self, state: SolverState, target: Target, kernel: KernelFn = empirical
    ) -> tuple[SolverState, jax.Array]:
        """The next state, and the objective before the update.

        Args:
            state: the state.
            target: what to match in this step.
            kernel: computes the kernel of `state.ticket`.
        """
        ...


@dataclass(frozen=True)
class Solver:
    """A ticket solver; all its functions are traceable.

    Attributes:
        init: `(params, ticket, key) -> state`, from the dense network's weights, the sparse network
            to start from and a random key.
        update: see `Update`. The last of the steps that the config sets leaves a network with as
            many kept weights as that one had.
        refresh: `(state, target) -> state`, which selects another mask with the same number of kept
            weights in each layer; called every `reselect_every` steps. None if the solver has none.
        fixed_mask: whether `update` leaves the mask as it is: kernels may then rely on its zeros.
        fixed_units: whether `refresh` keeps the number of weights of each unit too.
    """

    init: Callable[[Params, Ticket, Key], SolverState]
    update: Update
    refresh: Callable[[SolverState, Target], SolverState] | None = None
    fixed_mask: bool = False
    fixed_units: bool = False


@dataclass(frozen=True)
class Selection:
    """How scores become a mask.

    Attributes:
        learned: whether the scores of all layers compete for the weights that are kept; else each
            layer keeps its number.
        prunable: see `masks.prunable_leaves`.
    """

    learned: bool
    prunable: Prunable | None = None

    def __call__(self, scores: Any, counts: Any) -> Mask:
        """The mask of the highest scores, exact in number; every layer keeps at least one weight.

        Args:
            scores: the structure and shapes of the parameters.
            counts: kept entries of each leaf (traced integers); only their sum matters if learned.
        """
        if not self.learned:
            return top_k(scores, counts)
        leaves, structure = jax.tree.flatten(scores)
        prunable = jax.tree.leaves(prunable_leaves(scores, self.prunable))
        flat = [
            # The highest score of each layer always wins: an empty layer cuts the network.
            jnp.ravel(s).at[jnp.argmax(s)].set(jnp.inf)
            for s, p in zip(leaves, prunable, strict=True)
            if p
        ]
        total = sum(c for c, p in zip(jax.tree.leaves(counts), prunable, strict=True) if p)
        chosen = top_k(jnp.concatenate(flat), total)
        edges = list(itertools.accumulate(part.size for part in flat))
        parts = iter(jnp.split(chosen, edges[:-1]))
        found = [
            next(parts).reshape(s.shape) if p else jnp.ones(s.shape, bool)
            for s, p in zip(leaves, prunable, strict=True)
        ]
        return structure.unflatten(found)


def step_size(peak: float, config: TicketConfig) -> Any:
    """The step size of a search, or its schedule, from the highest value."""
    return SCHEDULES[config.ticket_schedule](peak, config.ticket_steps)


def kept_counts(mask: Mask) -> Any:
    """Kept entries of each leaf, int32."""
    return jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), mask)


def regain(
    gain: str, weights: Params, mask: Mask, before: Gain, prunable: Prunable | None = None
) -> Gain:
    """The gain of another mask of the same weights, held fixed in gradients.

    Args:
        gain: a name in `masks.GAINS`.
        weights, mask: the weights and the new mask.
        before: what the gain was; only its dtypes matter.
        prunable: see `masks.prunable_leaves`.
    """
    found = jax.lax.stop_gradient(GAINS[gain](weights, mask, prunable))
    return jax.tree.map(lambda g, b: g.astype(b.dtype), found, before)
