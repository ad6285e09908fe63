"""Attacks, evaluations and rules in each of JAX's strict modes; `tests.modes` has their list."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.attacks import APGD, ATTACKS, PGD, NetworkLoss, example_keys
from ntk_awt.network import Network
from ntk_awt.robustness import hygiene
from ntk_awt.robustness.accuracy import measure
from ntk_awt.threats import THREATS, Linf
from ntk_awt.types import Split
from tests import threat_models
from tests.modes import mode

__all__ = ["mode"]

N, SHAPE, CLASSES = 3, (3, 3, 2), 4
D = int(np.prod(SHAPE))
RNG = np.random.default_rng(0)
X = RNG.uniform(0, 1, (N, *SHAPE)).astype(np.float32)
W = RNG.normal(size=(D, CLASSES)).astype(np.float32)
Y = ((X.reshape(N, D) - 0.5) @ W).argmax(1)


def apply(params: Any, x: Any) -> Any:
    return (x.reshape(len(x), -1) - 0.5) @ params


def run(attack: Any, threat: Any, params: Any, x: Any, y: Any, key: Any) -> Any:
    keys = example_keys(key, jnp.arange(N))
    return attack.run(NetworkLoss(Network(apply, params), y), x, threat, keys)


@pytest.mark.parametrize("name", sorted(THREATS))
@pytest.mark.parametrize("attack", [*ATTACKS, "targets"])
def test_attacks(mode: str, attack: str, name: str):
    made = APGD("targeted-margin", steps=2) if attack == "targets" else ATTACKS[attack](steps=2)
    threat = threat_models.make(name, 0.2, D)
    given: Any = (threat, *map(jnp.asarray, (W, X, Y)), jax.random.key(0))
    # Promotions are judged when a program is traced.
    z, loss = run(made, *given) if mode == "no jit" else jax.eval_shape(partial(run, made), *given)
    assert z.shape == X.shape
    assert z.dtype == loss.dtype == np.float32
    if mode == "no jit":
        assert hygiene.ball(np.asarray(z), X, threat).status == "pass"
        assert np.any(np.asarray(z) != X)


def test_evaluation_and_rules(mode: str, monkeypatch):
    monkeypatch.setattr(hygiene, "STEPS", (1, 2))
    monkeypatch.setattr(hygiene, "QUERIES", 2)
    threat, key, attack = Linf(0.2), jax.random.key(0), PGD(steps=2)
    found = measure(Network(apply, W), Split(X, Y), threat, attack, key=key)
    assert found.natural.value == 1
    judged = hygiene.check(Network(apply, W), Split(X, Y), threat, attack, key=key)
    assert judged.radii[float(threat.epsilon)] == found.robust.value
