"""Tickets: sparse networks at initialisation, found by a search or drawn by a baseline."""

from ntk_awt.tickets.baselines import BASELINES, baseline
from ntk_awt.tickets.objective import (
    Distances,
    Target,
    Terms,
    distances,
    objective,
    target_of,
    terms,
)
from ntk_awt.tickets.search import (
    PRESETS,
    SOLVERS,
    Problem,
    SearchRecord,
    SearchState,
    held_out_target,
    record_steps,
    search,
    solve,
    start,
)
from ntk_awt.tickets.solver import Solver, SolverState

__all__ = [
    "BASELINES",
    "PRESETS",
    "SOLVERS",
    "Distances",
    "Problem",
    "SearchRecord",
    "SearchState",
    "Solver",
    "SolverState",
    "Target",
    "Terms",
    "baseline",
    "distances",
    "held_out_target",
    "objective",
    "record_steps",
    "search",
    "solve",
    "start",
    "target_of",
    "terms",
]
