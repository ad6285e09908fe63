"""The search loop around a solver: jitted chunks of steps, records on a held-out batch."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import masks
from ntk_awt.attacks import Attack
from ntk_awt.config import MaskConfig, TicketConfig
from ntk_awt.errors import InputError, check_finite, choose
from ntk_awt.masks import Ticket
from ntk_awt.threats import Threat
from ntk_awt.tickets.awt import awt
from ntk_awt.tickets.objective import Distances, Target, distances, target_of
from ntk_awt.tickets.solver import Solver, SolverState
from ntk_awt.types import ApplyFn, Images, Key, Labels, Params

SOLVERS: dict[str, Callable[[ApplyFn, TicketConfig], Solver]] = {"awt": awt}
"""Solvers by name: `(apply, config) -> Solver`."""


BASELINES: dict[str, Callable[[Key, Params], masks.Scores]] = {
    "random": masks.random_scores,
    "magnitude": lambda key, params: masks.magnitude_scores(params),
}
"""Masks that need no search, by name: `(key, params) -> scores`."""


def baseline(name: str, params: Params, config: MaskConfig, key: Key) -> Ticket:
    """A ticket without search: scores, allocation, selection, gain; pruned weights at zero.

    Args:
        name: in `BASELINES`.
        params: the dense network's weights at initialisation.
        config: density, allocation, gain.
        key: random key of the scores.

    Returns:
        A ticket of exactly that density.

    Raises:
        InputError: unknown name, or what `masks.make` and `masks.energy_gain` raise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((8, 5)), "bias": jnp.zeros(5)}
        >>> ticket = baseline("random", params, MaskConfig(density=0.1), jax.random.key(0))
        >>> int(ticket.mask["kernel"].sum()), round(float(ticket.gain["kernel"]), 3)
        (4, 3.162)
    """
    choose("baseline", name, BASELINES)
    mask = masks.make(BASELINES[name](key, params), config.density, config.allocation)
    energy = config.gain == "energy"
    gain = masks.energy_gain(params, mask) if energy else masks.unit_gain(params)
    return Ticket(jax.tree.map(lambda w, m: w * m, params, mask), mask, gain)


class SearchRecord(NamedTuple):
    """What one chunk of a search reports, on a held-out batch and on its own batches.

    Attributes:
        step: updates done.
        distances: on the fixed held-out batch, after that many updates; NumPy scalars.
        objective: of each step's own batch since the last record, [steps].
    """

    step: int
    distances: Distances
    objective: np.ndarray


class Problem(NamedTuple):
    """What a search works on; arrays and pytrees only, so that jit sees them as arguments.

    Attributes:
        params: the dense network at initialisation.
        x, y: training images [n, *shape] and labels [n].
        threat: the threat model (ε = 0 for natural inputs).
        key: random key of batches and attacks.
    """

    params: Params
    x: Images
    y: Labels
    threat: Threat
    key: Key


@partial(jax.jit, static_argnames=("apply", "attack", "config", "steps"), donate_argnames="state")
def _chunk(
    state: SolverState,
    problem: Problem,
    *,
    apply: ApplyFn,
    attack: Attack,
    config: TicketConfig,
    steps: int,
) -> tuple[SolverState, jax.Array]:
    solver = SOLVERS[config.solver](apply, config)
    params, x, y, threat, key = problem

    def step(state: SolverState, _: None) -> tuple[SolverState, jax.Array]:
        batch_key, attack_key = jax.random.split(jax.random.fold_in(key, state.step))
        rows = jax.random.randint(batch_key, (config.ticket_batch_size,), 0, x.shape[0])
        target = target_of(
            apply, params, x[rows], y[rows], threat=threat, attack=attack, key=attack_key
        )
        state, values = solver.update(state, target)
        return state, values[0]

    return jax.lax.scan(step, state, length=steps)


@partial(jax.jit, static_argnames=("apply", "attack"))
def held_out_target(apply: ApplyFn, attack: Attack, problem: Problem) -> Target:
    """The dense network's logits and kernel at the attacked images of `problem` (all of them)."""
    params, x, y, threat, key = problem
    return target_of(apply, params, x, y, threat=threat, attack=attack, key=key)


_distances = jax.jit(distances, static_argnames=("apply", "jacobian"))


def start(apply: ApplyFn, config: TicketConfig, ticket: Ticket) -> SolverState:
    """The solver's state before the first step.

    Raises:
        InputError: unknown solver.
    """
    choose("solver", config.solver, SOLVERS)
    copy = jax.tree.map(jnp.array, ticket)  # the search donates its state
    return SOLVERS[config.solver](apply, config).init(copy)


def record_steps(config: TicketConfig) -> list[int]:
    """Step counts at which the distances are recorded: 0, then evenly up to the last step.

    There are `config.ticket_records` after the 0, or one a step if the search is shorter.
    """
    points = np.linspace(0, config.ticket_steps, config.ticket_records + 1)
    return sorted({round(point) for point in points})


def search(
    apply: ApplyFn,
    problem: Problem,
    state: SolverState,
    held_out: Target,
    *,
    attack: Attack,
    config: TicketConfig,
    on_record: Callable[[SolverState, SearchRecord], None],
) -> SolverState:
    """Run the solver to its last step, recording both distances on a held-out batch.

    A search continues from any state: batches and attacks depend on the key and the step only, so
    an interrupted search resumed from a saved state gives the numbers of an uninterrupted one.

    Args:
        apply: the dense network's function.
        problem: dense parameters, images, labels, threat model, key.
        state: from `start`, or a saved state.
        held_out: the dense network on images that the search does not see.
        attack: on the dense network.
        config: solver and its settings.
        on_record: called with the state and the record, at each of `record_steps` that is later
            than the state's step, and at step 0.

    Returns:
        The final state; `state.ticket` is the result.

    Raises:
        InputError: fewer images than a batch, or an objective that is no longer finite.
    """
    if problem.x.shape[0] < config.ticket_batch_size:
        raise InputError(
            "ticket_batch_size",
            expected=f"at most the number of images, {problem.x.shape[0]}",
            got=str(config.ticket_batch_size),
        )

    def record(objective: np.ndarray) -> None:
        values = _distances(apply, state.ticket, held_out, config.jacobian)
        on_record(state, SearchRecord(int(state.step), jax.device_get(values), objective))

    if int(state.step) == 0:
        record(np.zeros(0))
    for end in record_steps(config):
        if (steps := end - int(state.step)) <= 0:
            continue
        state, objective = _chunk(
            state, problem, apply=apply, attack=attack, config=config, steps=steps
        )
        check_finite(f"objective of the search before step {end}", objective)
        record(np.asarray(objective))
    return state
