"""Situations of judged evaluations and of searches that lead away."""

import warnings
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import tickets
from ntk_awt.app.config import EvaluationConfig, TicketConfig
from ntk_awt.attacks import PGD
from ntk_awt.masks import Ticket, energy_gain
from ntk_awt.threats import Linf
from tests.situations import Outcome, near, same, situation, warned

CONFIG = TicketConfig(
    ticket_steps=4,
    ticket_records=2,
    ticket_batch_size=4,
    ticket_learning_rate=3.0,
    reselect_every=0,
)


@situation("verdicts: a rule that fails, beside one that passes")
def _() -> Outcome:
    from ntk_awt.app.verdicts import verdict
    from ntk_awt.robustness.hygiene import gain

    ours, other = np.ones(400, bool), np.arange(400) >= 5  # 5 of 400 images are 1.25 points
    flags = [gain("transfer", ours, ours, ""), gain("black box", ours, other, "")]
    line = str(verdict("dense, seed 0", [flag._asdict() for flag in flags]))
    wanted = "dense, seed 0: failed; black box 0.0125, limit 0.0025 [share of images]"
    return same(line.partition(" (")[0], wanted)


@situation("verdicts: the attacks of a run that says nothing of them")
def _() -> Outcome:
    return same(EvaluationConfig().attacks, ("apgd-ce", "apgd-t", "square"))


def _apply(params: Any, x: Any) -> Any:
    return jnp.tanh(x.reshape(len(x), -1) @ params["v"]) @ params["w"]


@cache
def _problem() -> tuple[tickets.Problem, Ticket, tickets.Target]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"v": draw(9, 8) / 3, "w": draw(8, 3) / 3}
    x = jnp.asarray(rng.uniform(size=(12, 9)), jnp.float32)
    problem = tickets.Problem(params, x, jnp.arange(12) % 3, Linf(0.1), jax.random.key(0))
    mask = {name: jnp.asarray(rng.uniform(size=w.shape) < 0.5) for name, w in params.items()}
    kept = jax.tree.map(jnp.multiply, params, mask)
    start = Ticket(kept, mask, energy_gain(params, mask))
    held_out = tickets.held_out_target(_apply, PGD(0), problem._replace(x=x[:4]), CONFIG)
    return problem, start, held_out


def _search() -> Ticket:
    problem, first, held_out = _problem()
    return tickets.search(
        _apply, problem, tickets.start(_apply, CONFIG, problem.params, first, problem.key),
        held_out, attack=PGD(0), config=CONFIG, on_record=lambda state, record: None,
    )  # fmt: skip


@situation("verdicts: a search whose steps lead away, its words")
def _() -> Outcome:
    return warned(_search, "came no closer", "lower ticket_learning_rate", "after 4 steps")


@situation("verdicts: a search whose steps lead away, its distance")
def _() -> Outcome:
    _, first, held_out = _problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _search()
    distances = [tickets.distances(_apply, t, held_out, CONFIG) for t in (found, first)]
    came, start = (float(d.relative_kernel + d.relative_target) for d in distances)
    return near(came, start, relative=1e-5)
