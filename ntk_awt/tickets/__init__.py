"""Tickets: sparse networks at initialisation, found by a search or drawn by a baseline."""

from ntk_awt.tickets.objective import Distances, Target, distances, objective, target_of
from ntk_awt.tickets.search import (
    BASELINES,
    SOLVERS,
    Problem,
    SearchRecord,
    baseline,
    held_out_target,
    record_steps,
    search,
    start,
)
from ntk_awt.tickets.solver import Solver, SolverState

__all__ = [
    "BASELINES",
    "SOLVERS",
    "Distances",
    "Problem",
    "SearchRecord",
    "Solver",
    "SolverState",
    "Target",
    "baseline",
    "distances",
    "held_out_target",
    "objective",
    "record_steps",
    "search",
    "start",
    "target_of",
]
