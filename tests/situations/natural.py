"""Work that attacks nothing, without a threat model and an attack; and work that needs them."""

from typing import Any

import jax
import numpy as np

from ntk_awt import masks, tickets, training
from ntk_awt.app.config import MaskConfig, TicketConfig, TrainConfig
from ntk_awt.attacks import PGD
from ntk_awt.threats import Linf
from tests.situations import Outcome, near, refused, same, situation

RNG = np.random.default_rng(0)
W = {"kernel": RNG.normal(size=(6, 3)).astype(np.float32)}
X, Y = RNG.uniform(0, 1, (12, 6)).astype(np.float32), np.arange(12) % 3
GIVEN: dict[str, Any] = {"threat": Linf(0.1), "attack": PGD(steps=2)}


def apply(w: Any, x: Any) -> Any:
    return x @ w["kernel"]


def trained(loss: str, x: Any = X, **given: Any) -> np.ndarray:
    config = TrainConfig(loss=loss, epochs=1, batch_size=4)
    ticket = masks.dense(W)
    found = training.fit(apply, ticket, x, Y, config=config, key=jax.random.key(0), **given)
    return np.asarray(found.params["kernel"])


def problem(threat: Any) -> tickets.Problem:
    x: Any = X
    y: Any = Y
    return tickets.Problem(W, x, y, threat, jax.random.key(0))


def searched(inputs: str, threat: Any, attack: Any) -> np.ndarray:
    config = TicketConfig(ticket_steps=2, ticket_batch_size=4, ticket_records=1, inputs=inputs)
    given = problem(threat)
    first = tickets.baseline("random", apply, given, None, MaskConfig(density=0.5))
    found = tickets.search(
        apply,
        given,
        tickets.start(apply, config, W, first, jax.random.key(1)),
        tickets.held_out_target(apply, attack, given, config),
        attack=attack,
        config=config,
        on_record=lambda state, record: None,
    )
    return np.asarray(found.params["kernel"])


@situation("natural: training without an attack")
def _() -> Outcome:
    return near(trained("natural"), trained("natural", **GIVEN))


@situation("natural: training on images of any range")
def _() -> Outcome:
    return same(bool(np.isfinite(trained("natural", 30 * X - 5)).all()), True)


@situation("natural: adversarial training without an attack")
def _() -> Outcome:
    return refused(lambda: trained("adversarial"), "loss adversarial", "an attack", "neither")


@situation("natural: TRADES with an attack and no threat model")
def _() -> Outcome:
    return refused(lambda: trained("trades", attack=PGD(steps=2)), "loss trades", "one of them")


@situation("natural: a search on natural inputs without an attack")
def _() -> Outcome:
    return near(searched("natural", None, None), searched("natural", *GIVEN.values()))


@situation("natural: a search on attacked inputs without an attack")
def _() -> Outcome:
    return refused(lambda: searched("dense", Linf(0.1), None), "inputs dense", "one of them")


@situation("natural: SNIP of the attacked loss without an attack")
def _() -> Outcome:
    config = MaskConfig(density=0.5)
    return refused(
        lambda: tickets.baseline("snip-robust", apply, problem(None), None, config),
        "inputs dense",
        "neither",
    )
