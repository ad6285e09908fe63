"""The contract of a ticket solver, in the manner of Optax: `init` and `update`, both pure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ntk_awt.masks import Ticket
from ntk_awt.tickets.objective import Distances, Target


class SolverState(NamedTuple):
    """State of a search; a pytree of arrays.

    Attributes:
        step: updates done, int32.
        ticket: the current sparse network.
        optimizer: whatever the solver carries along.
    """

    step: jax.Array
    ticket: Ticket
    optimizer: Any


class Solver(NamedTuple):
    """A ticket solver.

    Attributes:
        init: `(ticket) -> state`, from the sparse network to start from.
        update: `(state, target) -> (state, (objective, distances))`, traceable; keeps the number
            of kept entries of every leaf and pruned weights at zero. The values are those before
            the update.
    """

    init: Callable[[Ticket], SolverState]
    update: Callable[[SolverState, Target], tuple[SolverState, tuple[jax.Array, Distances]]]
