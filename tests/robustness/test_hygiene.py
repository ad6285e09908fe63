"""Hygiene rules: a sound network passes all of them, and each fault raises its own flag."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.app.verdicts import REMEDIES
from ntk_awt.attacks import APGD, PGD, cross_entropy
from ntk_awt.attacks.losses import dlr
from ntk_awt.network import Network
from ntk_awt.robustness import hygiene
from ntk_awt.robustness.hygiene import (
    Flag,
    Hygiene,
    Subject,
    batches,
    check,
    deterministic,
    flag,
    gain,
    large_radius,
    mask_kept,
    monotone,
    scaled,
    selection,
    single_step,
    slack,
    zero_gradients,
    zero_radius,
)
from ntk_awt.threats import L2, Linf
from ntk_awt.types import Split
from tests import threat_models
from tests.keys import key_of

SLOW = ("test_sound_under_other_threats_and_attacks strong-l2",)

N, D, CLASSES = 60, 6, 3
RNG = np.random.default_rng(0)
# At this scale the softmax is near its maximum, so that the cross-entropy finds the closest class.
W = (10 * RNG.normal(size=(D, CLASSES))).astype(np.float32)
X = RNG.uniform(0, 1, (N, D)).astype(np.float32)
Y = np.asarray(X @ W).argmax(1)
EPSILON = 0.05
THREAT = Linf(EPSILON)


def apply(params: Any, x: Any) -> Any:
    return x @ params


ATTACK = PGD(steps=20)
QUICK = (1, 20)
"""Steps at which `check` measures here: programs that the other rules compile as well."""


def subject(apply: Any = apply, params: Any = W, threat: Any = THREAT) -> Subject:
    return Subject(Network(apply, params), X, Y, threat)


def judge(**changes: Any) -> Hygiene:
    default: dict[str, Any] = {
        "apply": apply,
        "params": W,
        "x": X,
        "y": Y,
        "threat": THREAT,
        "attack": ATTACK,
        "key": key_of(0),
    } | changes
    network = Network(default.pop("apply"), default.pop("params"), default.pop("mask", None))
    return check(network, Split(default.pop("x"), default.pop("y")), **default)


def raised(found: Hygiene) -> dict[str, str]:
    return {flag.name: flag.status for flag in found.flags if flag.status != "pass"}


MASK = np.arange(D * CLASSES).reshape(D, CLASSES) % 4 > 0
ELSEWHERE = np.random.default_rng(1).uniform(0, 1, (20, D)).astype(np.float32)


@pytest.fixture(autouse=True)
def quick_steps(monkeypatch):
    monkeypatch.setattr(hygiene, "STEPS", QUICK)


def test_a_sound_network_passes_every_rule():
    y = np.asarray(X @ (MASK * W)).argmax(1)
    shares: list[float] = []
    found = judge(
        params=MASK * W,
        y=y,
        transferred=X,
        mask=MASK,
        ticket=Network(apply, W, MASK),
        chosen_on=ELSEWHERE,
        on_share=shares.append,
    )
    assert raised(found) == {}
    assert [f.name for f in found.flags] == [
        "finite",
        "ball",
        "box",
        "zero radius",
        "deterministic",
        "logits",
        "zero gradient, cross-entropy",
        "zero gradient, dlr",
        "batch",
        "radius",
        "steps",
        "large radius",
        "single step",
        "black box",
        "transfer",
        "mask",
        "selection",
    ]
    assert {f.name for f in found.flags} == set(REMEDIES)
    assert found.images == N
    assert list(found.steps) == list(QUICK)
    assert found.radii[0.0] == 1  # the labels are the network's own
    here = found.radii[float(THREAT.epsilon)]
    assert 0 < here < 1
    assert found.union <= here
    assert found.failed == ()
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("name", ["l2", "strong-l2"])
def test_sound_under_other_threats_and_attacks(name: str):
    attack = APGD("cross-entropy", steps=20)
    assert raised(judge(threat=threat_models.make(name, 0.1, D), attack=attack)) == {}


def test_the_radius_zero_is_judged_too():
    found = judge(threat=Linf(0.0))
    assert raised(found) == {}
    assert found.radii == {0.0: 1.0}


# ---------------------------------------------------------------- broken networks


def large_scale(params: Any, x: Any) -> Any:
    """Softmax saturates: the cross-entropy of float32 has no gradient left."""
    return 1e3 * apply(params, x)


def quantise(x: Any) -> Any:
    return jnp.round(x * 20) / 20


def quantised(params: Any, x: Any) -> Any:
    return apply(params, quantise(x))


def stochastic(params: Any, x: Any) -> Any:
    rng = np.random.default_rng()

    def noise(like: Any) -> Any:
        return rng.normal(size=like.shape).astype(np.float32)

    logits = apply(params, x)
    return logits + jax.pure_callback(
        noise, jax.ShapeDtypeStruct(logits.shape, logits.dtype), jax.lax.stop_gradient(logits)
    )


def probabilities(params: Any, x: Any) -> Any:
    return jax.nn.softmax(apply(params, x))


def lost_to_random_search(network: Subject) -> Flag:
    ours = network.under(ATTACK, network.threat, key_of(0)).robust_correct
    return gain("black box", ours, ours & hygiene.black_box(network, key_of(0)), "")


def test_a_sound_network_by_single_rules():
    assert zero_gradients(subject(), cross_entropy).value == 0
    assert zero_gradients(subject(), dlr).value == 0
    assert lost_to_random_search(subject()).status == "pass"
    assert deterministic(subject()).value == 0
    assert hygiene.probabilities(subject()).value == 0


def test_large_logits_are_seen():
    network = subject(large_scale)
    assert zero_gradients(network, cross_entropy).status == "warn"
    assert zero_gradients(network, dlr).status == "pass"  # does not change with the scale
    assert lost_to_random_search(network).status == "fail"


def test_a_quantised_input_is_seen():
    network = subject(quantised)
    assert zero_gradients(network, cross_entropy).value == 1
    assert zero_gradients(network, cross_entropy).status == "warn"
    assert zero_gradients(network, dlr).status == "warn"
    assert zero_gradients(network, dlr).value == 1
    assert lost_to_random_search(network).status == "fail"


def test_a_gradient_that_is_zero_by_its_formula_is_no_fault():
    """Where the label's logit is third of three, the ratio of logits is 1 whatever the image."""
    third = (X @ W).argmin(1)
    network = subject()._replace(y=np.where(np.arange(N) < 30, third, Y))
    flat = (np.asarray(hygiene._gradients(Network(apply, W), X, network.y, dlr)) == 0).all(1)
    assert flat[:30].sum() > 10  # of the others, the division leaves a rounding
    assert not flat[30:].any()
    assert zero_gradients(network, dlr).value == 0
    none_right = subject()._replace(y=third)
    assert zero_gradients(none_right, dlr).value == 0
    half = subject(
        lambda w, x: apply(w, jnp.where(jnp.arange(len(x))[:, None] < 15, quantise(x), x))
    )
    assert 0 < zero_gradients(half, dlr).value < 1
    assert zero_gradients(half, dlr).status == "warn"


def test_a_stochastic_layer_is_seen():
    assert deterministic(subject(stochastic)).status == "fail"


def test_probabilities_are_seen():
    assert hygiene.probabilities(subject(probabilities)).status == "fail"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_seen(value: float):
    """Nothing else is judged then."""
    found = judge(params=jnp.asarray(W).at[0, 0].set(value))
    assert [f.name for f in found.flags] == ["finite"]
    assert raised(found) == {"finite": "fail"}
    assert found.flags[0].value >= N
    assert found.record()["union"] is None


def test_a_gradient_that_is_not_finite_is_seen():
    def root(params: Any, x: Any) -> Any:
        return apply(params, x) + jnp.sqrt(jnp.maximum(x[:, :1] - x[:, :1], 0))

    assert raised(judge(apply=root)) == {"finite": "fail"}


# ---------------------------------------------------------------- broken attacks


@dataclass(frozen=True)
class Broken:
    """PGD with one fault."""

    fault: str
    steps: int = 20

    def run(self, loss: Any, x: Any, threat: Any, keys: Any) -> Any:
        z, _ = PGD(steps=self.steps).run(loss, x, threat, keys)
        far = threat.epsilon > 1.2 * EPSILON
        z = {
            "ball": lambda: jnp.clip(x + 1.1 * (z - x) + 0.01, 0, 1),
            "box": lambda: jnp.where(x > 0.99, x + threat.epsilon / 2, z),
            "idle": lambda: x,
            "gives up when far": lambda: jnp.where(far, x, z),
            "gives up with steps": lambda: x if self.steps > 20 else z,
            "looks at others": lambda: jnp.where(len(x) < N, x, z),
            "moves at zero": lambda: jnp.where(threat.epsilon == 0, x + 1e-6, z),
        }[self.fault]()
        return z, loss(z)


def by_radius(attack: Any) -> Flag:
    network = subject()
    found = [
        network.under(attack, scaled(network.threat, f), key_of(0)).robust.value for f in (1, 2)
    ]
    return monotone("radius", found, N, "ε")


def by_steps(attack: Any) -> Flag:
    found = [
        subject().under(replace(attack, steps=s), THREAT, key_of(0)).robust.value for s in (20, 21)
    ]
    return monotone("steps", found, N, "steps")


def verdicts(attack: Any) -> np.ndarray:
    return subject().under(attack, THREAT, key_of(0)).robust_correct


def images(attack: Any) -> np.ndarray:
    return subject().under(attack, THREAT, key_of(0)).images


RULES: dict[str, Callable[[Any], Flag]] = {
    "ball": lambda attack: hygiene.ball(images(attack), X, THREAT),
    "box": lambda attack: hygiene.box(images(attack), X, THREAT),
    "moves at zero": lambda attack: zero_radius(
        subject().under(attack, scaled(THREAT, 0.0), key_of(0)).images, X
    ),
    "gives up when far": by_radius,
    "gives up with steps": by_steps,
    "looks at others": lambda attack: batches(attack, subject(), key_of(0), verdicts(attack)),
    "idle": lambda attack: single_step(subject(), key_of(0), float(verdicts(attack).mean())),
}


@pytest.mark.parametrize("fault", RULES)
def test_faults_of_attacks_are_seen(fault: str):
    assert RULES[fault](ATTACK).status == "pass"
    assert RULES[fault](Broken(fault)).status == "fail"


def test_an_attack_that_leaves_everything_right_at_a_large_radius_is_seen():
    def status(attack: Any, threat: Any = THREAT) -> str:
        found = large_radius(attack, subject(threat=threat), key_of(0))
        assert found is not None
        return found.status

    assert status(ATTACK) == "pass"
    assert status(Broken("idle")) == "fail"
    assert status(ATTACK, Linf(0.0)) == "pass"
    assert status(ATTACK, Linf(0.1, (-np.inf, np.inf))) == "pass"
    assert status(Broken("idle"), Linf(0.1, (-np.inf, np.inf))) == "fail"


def test_attacked_images_from_elsewhere_are_judged_as_they_are():
    """Those that ignore the ball, and those of another network that break more."""
    assert raised(judge(attacked=np.clip(X + 2 * EPSILON, 0, 1)))["ball"] == "fail"
    weak = PGD(steps=1, step_ratio=0.01, random_start=False)
    found = judge(attack=weak, transferred=images(ATTACK))
    assert raised(found)["transfer"] == "fail"
    assert found.union <= verdicts(ATTACK).mean()


def test_other_attacks_are_compared_with_the_worst_case():
    """A weak first attack whose evaluation goes on with a strong one fails by itself alone."""
    weak = PGD(steps=2, step_ratio=0.01, random_start=False)
    alone, whole = (
        judge(attack=weak),
        judge(attack=weak, attacked=images(ATTACK), verdicts=verdicts(weak)),
    )
    assert {"single step", "black box"} <= set(raised(alone))
    assert not {"single step", "black box"} & set(raised(whole))
    assert whole.union <= verdicts(ATTACK).mean() < verdicts(weak).mean()


def test_no_attack_is_made_twice(monkeypatch):
    """With the evaluation's outcome the same record comes from fewer attacks, each another one."""
    made: list[Any] = []
    under = Subject.under

    def counting(self, attack, threat, key, rows=slice(None)):
        made.append((attack, float(threat.epsilon), rows.stop))
        return under(self, attack, threat, key, rows)

    monkeypatch.setattr(Subject, "under", counting)
    alone = judge()
    first, made[:] = list(made), []
    given = judge(attacked=images(ATTACK), verdicts=verdicts(ATTACK))
    del made[:2]  # those of the line above
    assert given.record() == alone.record()
    assert len(set(first)) == len(first)
    assert set(first) - set(made) == {(ATTACK, float(THREAT.epsilon), None)}
    wrong = judge(verdicts=~verdicts(ATTACK))
    assert raised(wrong)["batch"] == "fail"


# ---------------------------------------------------------------- rules by themselves


def test_masks():
    weights = MASK * np.asarray(W)
    ticket = Network(apply, W, MASK)
    for initial in (ticket, None):
        assert mask_kept(Network(apply, weights, MASK), initial).status == "pass"
        for changed, value in ((np.where(MASK, weights, 0.1), (~MASK).sum()), (np.asarray(W), 5)):
            assert mask_kept(Network(apply, changed, MASK), initial).value == value
    other = MASK.copy()
    other[0, 0] = True
    assert mask_kept(Network(apply, weights, other), ticket).value == 1
    assert mask_kept(Network(apply, weights, other), ticket).status == "fail"


def test_selection():
    assert selection(X[:10], X).value == 1
    assert selection(X[:10], X).status == "fail"
    assert selection(X[:10] + 1e-6, X).status == "pass"


def test_monotone_and_gain_by_hand():
    assert monotone("steps", [0.9, 0.5, 0.505, 0.4], 1000, "steps").status == "pass"
    assert monotone("steps", [0.9, 0.5, 0.51, 0.4], 1000, "steps").status == "fail"
    assert monotone("steps", [0.9, 0.5, 0.51, 0.4], 90, "steps").status == "pass"  # one image
    assert monotone("steps", [0.9], 10, "steps").value == 0
    right = np.ones(1000, bool)
    two, three = right.copy(), right.copy()
    two[:2], three[:3] = False, False
    assert gain("black box", right, two, "").status == "pass"
    assert gain("black box", right, three, "").status == "fail"
    assert slack(1000) == pytest.approx(0.005)
    assert slack(20) == pytest.approx(0.05)
    assert flag("any", float("nan"), 1, "", "").status == "fail"


def test_the_ball_in_float64():
    """An excess that float32 arithmetic would hide."""
    x = np.full((1, 4), 0.5, np.float32)
    z = x.copy()
    z[0, 0] += np.float32(0.1) + np.float32(2e-6)
    assert hygiene.ball(z, x, Linf(0.1)).status == "fail"
    assert hygiene.ball(x + np.float32(0.05), x, L2(0.1)).status == "pass"
    strong = threat_models.make("strong-l2", 0.1, 4)
    signal = threat_models.basis(4)[:, 0] / np.linalg.norm(threat_models.basis(4)[:, 0])
    z = (x + 0.09 * signal).astype(np.float32)
    assert hygiene.ball(z, x, L2(0.1)).status == "pass"
    assert hygiene.ball(z, x, strong).value == pytest.approx(0.09 - 0.03, abs=1e-6)
