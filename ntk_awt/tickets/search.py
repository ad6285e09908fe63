"""The search loop around a solver: jitted chunks of steps, records on a held-out batch."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import kernels
from ntk_awt.app.config import TicketConfig, VariantConfig
from ntk_awt.attacks import Attack
from ntk_awt.errors import InputError, check_finite, choose
from ntk_awt.kernels import Plan, empirical
from ntk_awt.masks import Ticket, effective
from ntk_awt.network import Network, Prunable, check_network
from ntk_awt.threats import Threat
from ntk_awt.tickets.objective import (
    Distances,
    KernelFn,
    Target,
    distances,
    objective,
    target_of,
    terms,
)
from ntk_awt.tickets.solver import Solver, SolverState
from ntk_awt.tickets.solvers.awt import awt
from ntk_awt.tickets.solvers.concrete import concrete
from ntk_awt.tickets.solvers.saliency import saliency
from ntk_awt.tickets.solvers.scores import awt_joint, awt_scores
from ntk_awt.types import ApplyFn, Images, Key, Labels, Params

SOLVERS: dict[str, Callable[..., Solver]] = {
    "awt": awt,
    "awt-scores": awt_scores,
    "awt-joint": awt_joint,
    "concrete": concrete,
    "saliency": saliency,
}
"""Solvers by name: `(apply, config, gain, prunable) -> Solver`, the gain one in `masks.GAINS`."""

PRESETS: dict[str, VariantConfig] = {
    "ntt": VariantConfig(
        method="awt",
        mask={"gain": "none"},
        ticket={
            "start": "magnitude",
            "inputs": "natural",
            "jacobian": "full",
            "distance": "absolute",
            "pairs": "halves",
            "kernel_weight": 1e-4,
            "l2": 1e-3,
            "ticket_schedule": "constant",
            "reselect": "magnitude",
            "reselect_every": 100,
        },
    ),
}
"""Published searches as settings of ours, by name.

ntt: Neural Tangent Transfer (Liu & Zenke, 2020): natural inputs, the Jacobian of all weights, the
kernel between the halves of a batch, re-selection by magnitude with pruned weights at their initial
values. Its published code minimises 1e-3 · mean ΔΘ² + mean Δf² + 1e-4/p · ‖w‖², with means over all
entries; times the 10 classes that is β² + 1e-4 α² + 1e-3/p · ‖w‖².
"""


class SearchRecord(NamedTuple):
    """What one chunk of a search reports, on a held-out batch and on its own batches.

    Attributes:
        step: updates done.
        distances: on the fixed held-out batch, after that many updates; NumPy scalars.
        objective: mean over the steps since the last record, each on its own batch and before its
            update; NaN in the first record.
        held_out: the objective on the held-out batch.
    """

    step: int
    distances: Distances
    objective: float
    held_out: float


class SearchState(NamedTuple):
    """A search between two records; a pytree of arrays.

    Attributes:
        solver: the solver's state.
        best: the network with the lowest held-out objective so far, the start's included. Only
            networks with as few kept weights as the start count: one solver prunes on the way.
        lowest: that objective; infinite before the first record.
        first: the start's; infinite before the first record.
        waited: such records since the best one, int32.
    """

    solver: SolverState
    best: Ticket
    lowest: jax.Array
    first: jax.Array
    waited: jax.Array


class Problem(NamedTuple):
    """What a search works on; arrays and pytrees only, so that jit sees them as arguments.

    Attributes:
        params: the dense network at initialisation.
        x, y: training images [n, *shape] and labels [n].
        threat: the threat model; None if nothing is attacked.
        key: random key of batches and attacks.
    """

    params: Params
    x: Images
    y: Labels
    threat: Threat | None
    key: Key


def _target(
    problem: Problem,
    state: SolverState,
    apply: ApplyFn,
    attack: Attack | None,
    config: TicketConfig,
) -> Target:
    """The batch of the state's step, attacked."""
    params, x, y, threat, key = problem
    batch_key, attack_key = jax.random.split(jax.random.fold_in(key, state.step))
    rows = jax.random.randint(batch_key, (config.ticket_batch_size,), 0, x.shape[0])
    return target_of(
        apply,
        params,
        x[rows],
        y[rows],
        threat=threat,
        attack=attack,
        key=attack_key,
        config=config,
        ticket=state.ticket,
    )


class _Static(NamedTuple):
    """Everything of a search that jit compiles in, whichever the mask."""

    apply: ApplyFn
    attack: Attack | None
    config: TicketConfig
    gain: str
    prunable: Prunable | None

    def solver(self) -> Solver:
        return SOLVERS[self.config.solver](self.apply, self.config, self.gain, self.prunable)


@partial(jax.jit, static_argnames=("static", "plan"), donate_argnames="state")
def _chunk(
    state: SolverState,
    problem: Problem,
    selection: Any,
    end: jax.Array,
    static: _Static,
    plan: Plan | None,
) -> tuple[SolverState, jax.Array]:
    """Steps up to `end`; the sum of their objectives, infinite if one is not finite.

    With a plan, where the mask is fixed and known, `selection` is of that mask.
    """
    solver = static.solver()
    kernel: KernelFn = empirical
    if plan is not None:
        kernel = partial(empirical, plan=plan, selection=selection)

    def step(carry: tuple[SolverState, jax.Array]) -> tuple[SolverState, jax.Array]:
        state, total = carry
        target = _target(problem, state, static.apply, static.attack, static.config)
        state, value = solver.update(state, target, kernel)
        return state, total + jnp.where(jnp.isfinite(value), value, jnp.inf)

    start = (state, jnp.zeros(()))
    return jax.lax.while_loop(lambda carry: carry[0].step < end, step, start)


@partial(jax.jit, static_argnames="static", donate_argnames="state")
def _refresh(state: SolverState, problem: Problem, static: _Static) -> SolverState:
    refresh = static.solver().refresh
    assert refresh is not None
    return refresh(state, _target(problem, state, static.apply, static.attack, static.config))


@partial(jax.jit, static_argnames=("apply", "attack", "config"))
def held_out_target(
    apply: ApplyFn, attack: Attack | None, problem: Problem, config: TicketConfig
) -> Target:
    """The dense network's logits and kernel at the images of `problem`, all of them.

    Where the search attacks the sparse network as well, these images are still attacked against
    the dense one, so that all records are about the same inputs.
    """
    params, x, y, threat, key = problem
    inputs = "natural" if config.inputs == "natural" else "dense"
    fixed = dataclasses.replace(config, inputs=inputs)
    return target_of(apply, params, x, y, threat=threat, attack=attack, key=key, config=fixed)


@partial(jax.jit, static_argnames=("apply", "config"))
def _measure(
    apply: ApplyFn, ticket: Ticket, target: Target, config: TicketConfig
) -> tuple[Distances, jax.Array]:
    values = objective(terms(apply, ticket, target, config), config)
    return distances(apply, ticket, target, config), values


def start(
    apply: ApplyFn,
    config: TicketConfig,
    params: Params,
    ticket: Ticket,
    key: Key,
    gain: str = "energy",
    prunable: Prunable | None = None,
) -> SearchState:
    """The state before the first step.

    Args:
        apply, params: the dense network.
        config: which solver.
        ticket: the sparse network to start from; its number of kept weights is that of the result.
        key: random key of the solver's own draws.
        gain: a name in `masks.GAINS`.
        prunable: see `masks.prunable_leaves`.

    Raises:
        InputError: unknown solver.
    """
    choose("solver", config.solver, SOLVERS)
    # Copies: the search donates its state, and the caller keeps what it gave.
    params, first, best = (jax.tree.map(jnp.array, tree) for tree in (params, ticket, ticket))
    solver = SOLVERS[config.solver](apply, config, gain, prunable)
    state = jax.tree.map(jnp.array, solver.init(params, first, key))
    return SearchState(
        state, best, jnp.array(jnp.inf), jnp.array(jnp.inf), jnp.zeros((), jnp.int32)
    )


def record_steps(config: TicketConfig) -> list[int]:
    """Step counts at which the distances are recorded: 0, then evenly up to the last step.

    There are `config.ticket_records` after the 0, or one a step if the search is shorter.
    """
    points = np.linspace(0, config.ticket_steps, config.ticket_records + 1)
    return sorted({round(point) for point in points})


def _refresh_steps(config: TicketConfig, solver: Solver) -> list[int]:
    """Step counts after which the mask is selected anew; not after the last step."""
    if solver.refresh is None or config.reselect_every == 0:
        return []
    return list(range(config.reselect_every, config.ticket_steps, config.reselect_every))


def search(
    apply: ApplyFn,
    problem: Problem,
    state: SearchState,
    held_out: Target,
    *,
    attack: Attack | None = None,
    config: TicketConfig,
    on_record: Callable[[SearchState, SearchRecord], None],
    gain: str = "energy",
    prunable: Prunable | None = None,
) -> Ticket:
    """Run the solver to its last step, recording both distances on a held-out batch; keep the best.

    A search continues from any state: batches and attacks depend on the key and the step only, so
    an interrupted search resumed from a saved state gives the numbers of an uninterrupted one.

    Args:
        apply: the dense network's function.
        problem: dense parameters, images, labels, threat model, key.
        state: from `start`, or a saved state.
        held_out: the dense network on images that the search does not see.
        attack: on the network that `config.inputs` names; natural inputs need none.
        config: solver and its settings.
        on_record: called with the state and the record, at each of `record_steps` that is later
            than the state's step, and at step 0.
        gain: a name in `masks.GAINS`, the one that `start` had.
        prunable: see `masks.prunable_leaves`; the one that `start` had.

    Returns:
        The sparse network with the lowest objective on the held-out batch, of those at the records
        and the one that the search started from. A warning says so if that is the start.

    Raises:
        InputError: a network that is none (`network.check_network`), fewer images than a batch, or
            an objective that is no longer finite.
    """
    check_network(Network(apply, problem.params), problem.x)
    if problem.x.shape[0] < config.ticket_batch_size:
        raise InputError(
            "ticket_batch_size",
            expected=f"at most the number of images, {problem.x.shape[0]}",
            got=str(config.ticket_batch_size),
        )
    solver = SOLVERS[config.solver](apply, config, gain, prunable)
    static, plan = _Static(apply, attack, config, gain, prunable), None
    if solver.fixed_mask and config.jacobian == "masked" and config.estimator == "exact":
        plan = _plan(apply, problem, state.solver.ticket, config)
    records, refreshes = record_steps(config), _refresh_steps(config, solver)
    padded = bool(refreshes) and not solver.fixed_units
    best, inner, waited = state.best, state.solver, int(state.waited)
    lowest, first, few = float(state.lowest), float(state.first), _kept(state.best)

    def measure(ticket: Ticket) -> tuple[Distances, float]:
        values, value = jax.device_get(_measure(apply, ticket, held_out, config))
        return values, float(value)

    def record(objective: float) -> None:
        nonlocal best, lowest, waited
        values, value = measure(inner.ticket)
        if inner.step > 0 and _kept(inner.ticket) <= few:
            waited += 1
            if value < lowest:
                best, lowest, waited = jax.tree.map(jnp.array, inner.ticket), value, 0
        numbers = jnp.array(lowest), jnp.array(first), jnp.array(waited, jnp.int32)
        saved = SearchState(inner, best, *numbers)
        on_record(saved, SearchRecord(int(inner.step), values, objective, value))

    def select() -> Any:
        if plan is None:
            return []
        weights, ticket = effective(*inner.ticket), inner.ticket
        return kernels.selection(plan, apply, weights, problem.x[:1], ticket.mask, padded=padded)

    if int(inner.step) == 0:
        _, first = measure(best)
        lowest = first = first if np.isfinite(first) else float("inf")
        record(float("nan"))
    selection, total, steps = select(), 0.0, 0
    for end in sorted({*records, *refreshes}):
        if (ahead := end - int(inner.step)) <= 0:
            continue
        if config.patience and waited >= config.patience:
            break
        inner, value = _chunk(inner, problem, selection, jnp.array(end), static, plan)
        check_finite(f"objective of the search before step {end}", value)
        total, steps = total + float(value), steps + ahead
        if end in refreshes:
            inner = _refresh(inner, problem, static)
            selection = select()
        if end in records:
            record(total / steps)
            total, steps = 0.0, 0
    if lowest >= first:
        _, last = measure(inner.ticket)
        warnings.warn(
            f"the search with {config.solver} came no closer to the dense network than its start, "
            f"which is kept: objective on the held-out batch {first:.4g} there, {last:.4g} after "
            f"{int(inner.step)} steps; {_advice(config)}",
            stacklevel=2,
        )
    return best


def _advice(config: TicketConfig) -> str:
    """What to change where a search finds nothing."""
    rates = {"awt-scores": "score_learning_rate", "concrete": "score_learning_rate"}
    changes = ["raise ticket_steps or ticket_batch_size"]
    if config.solver != "saliency":
        changes.append(f"lower {rates.get(config.solver, 'ticket_learning_rate')}")
    if config.solver == "awt" and config.reselect_every:
        changes.append("re-select the mask less often (reselect_every)")
    return ", or ".join(changes)


def _kept(ticket: Ticket) -> int:
    return sum(int(m.sum()) for m in jax.tree.leaves(ticket.mask))


def _plan(apply: ApplyFn, problem: Problem, ticket: Ticket, config: TicketConfig) -> Plan:
    """How the kernel of a fixed mask is computed, chosen once for the whole search."""
    n = config.ticket_batch_size
    images = jax.eval_shape(lambda x: x[:n], problem.x)
    half = jax.eval_shape(lambda x: x[: n // 2], problem.x)
    sides = (images, None) if config.pairs == "all" else (half, half)
    return kernels.plan(apply, effective(*ticket), *sides, mask=ticket.mask)


@partial(jax.jit, static_argnames=("apply", "config", "gain", "prunable"))
def solve(
    apply: ApplyFn,
    params: Params,
    ticket: Ticket,
    target: Target,
    key: Key,
    config: TicketConfig,
    gain: str = "energy",
    prunable: Prunable | None = None,
) -> Ticket:
    """All steps of a solver on one fixed target, without records: for small problems.

    Args:
        apply, params: the dense network.
        ticket: the sparse network to start from.
        target: what to match.
        key: random key of the solver's own draws.
        config, gain, prunable: see `search`; masks are not refreshed.

    Returns:
        The sparse network after `config.ticket_steps` steps; traceable.
    """
    check_network(Network(apply, params), target.x)
    solver = SOLVERS[config.solver](apply, config, gain, prunable)

    def step(state: SolverState, _: None) -> tuple[SolverState, None]:
        return solver.update(state, target)[0], None

    state = solver.init(params, ticket, key)
    return jax.lax.scan(step, state, length=config.ticket_steps)[0].ticket
