"""Statements L1 to L6 hold, and do not with a defective library."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ntk_awt.theory import linear
from ntk_awt.theory.linear import (
    Ball,
    Strong,
    margins,
    sets,
    svm,
)
from ntk_awt.theory.linear import (
    separability as existence,
)
from ntk_awt.theory.linear import (
    studies as experiments,
)
from ntk_awt.threats import StrongL2
from proofs_check import l6_networks
from proofs_check.core import Context
from proofs_check.instances.linear import draw_margins, draw_problem, plain_hits, within
from tests.proofs import check, why

SLOW = (
    "test_wrong_projection_is_found swapped",
    "test_statement_holds L6",
)


@pytest.mark.parametrize("name", ["L1", "L2", "L3", "L4", "L5", "L6"])
def test_statement_holds(name: str):
    result = check(name)
    assert result.holds, why(result)
    assert result.outcome.panels
    assert len(result.outcome.controls) >= 5


# ---------------------------------------------------------------- planted defects


def primal_norm(w: Any, threat: Any) -> Any:
    if isinstance(threat, Ball):
        return threat.epsilon * sets.p_norm(np.asarray(w), threat.p)
    return sets.reach(w, threat)


def without_sine(w: Any, threat: Any) -> Any:
    if isinstance(threat, Ball):
        return sets.reach(w, threat)
    length, inside = np.linalg.norm(w), np.linalg.norm(threat.basis.T @ w)
    corner = threat.delta * inside + np.sqrt(max(threat.epsilon**2 - threat.delta**2, 0)) * length
    return np.where(
        threat.epsilon * inside <= threat.delta * length, threat.epsilon * length, corner
    )


def normal_length(w: Any, threat: Any) -> Any:
    return sets.reach(w, threat) / np.linalg.norm(w)


def too_far(w: Any, threat: Any) -> Any:
    return 1.0001 * sets.maximiser(w, threat)


def signal_forgotten(w: Any, threat: Any) -> Any:
    return sets.maximiser(w, Ball(threat.epsilon) if isinstance(threat, Strong) else threat)


def no_constant(mean_norm: Any, epsilon: Any, delta: Any = np.inf, sigma: Any = 1.0) -> Any:
    return scipy.special.ndtr((np.minimum(epsilon, delta) - mean_norm) / sigma)


best_classifier = linear.best_classifier


def natural(problem: Any, threat: Any, **options: Any) -> Any:
    """The best classifier without an adversary, judged under the threat."""
    model = best_classifier(problem, Ball(0.0)).classifier
    return linear.Best(float(linear.rates(model, problem, threat).robust), model)


def half_the_bias(w: Any, problem: Any, threat: Any) -> Any:
    b, _ = best_bias(w, problem, threat)
    return b / 2, float(np.exp(existence._log_error(w, b / 2, problem, threat)[0]))


best_bias = existence._best_bias


def plain_svm(x: Any, y: Any, basis: Any, **options: Any) -> Any:
    return linear.classifier_of(svm.train_svm(x, y, **options))


simulate = linear.simulate


def no_attack(model: Any, problem: Any, threat: Any, n: int, rng: Any) -> Any:
    return simulate(model, problem, Ball(0.5), n, rng)


DEFECTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "L1: the norm in place of its dual": ("L1", margins, "reach", primal_norm),
    "L1: w not normalised": ("L1", margins, "reach", normal_length),
    "L1: v outside the ball": ("L1", margins, "maximiser", too_far),
    "L1: another simulation": ("L1", linear, "simulate", no_attack),
    "L2: no sin θ": ("L2", margins, "reach", without_sine),
    "L2: v of the ball": ("L2", margins, "maximiser", signal_forgotten),
    "L3: no constant answer": ("L3", linear, "best_isotropic_error", no_constant),
    "L3: not the best": ("L3", linear, "best_classifier", natural),
    "L3: half the bias": ("L3", existence, "_best_bias", half_the_bias),
    "L4: least squares for SVMs": (
        "L4",
        linear,
        "svm_cosine",
        lambda *a, **options: linear.ridge_cosine(*a),
    ),
    "L4: another threat simulated": ("L4", experiments, "simulate", no_attack),
    "L5: knowledge that is not used": ("L5", svm, "signal_svm", plain_svm),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_found(defect: str, monkeypatch):
    name, module, attribute, wrong = DEFECTS[defect]
    monkeypatch.setattr(module, attribute, wrong)
    assert not all(case.holds for case in check(name).outcome.cases)


project = StrongL2.project


def clipped(self: Any, z: Any, x: Any) -> Any:
    wide = StrongL2(self.epsilon, self.delta, self.basis, (-9.0, 9.0))
    return jnp.clip(project(wide, z, x), *self.bounds)


def swapped(self: Any, z: Any, x: Any) -> Any:
    return project(StrongL2(self.delta, self.epsilon, self.basis, self.bounds), z, x)


@pytest.mark.parametrize("wrong", [clipped, swapped])
def test_wrong_projection_is_found(wrong: Callable[..., Any], monkeypatch):
    monkeypatch.setattr(StrongL2, "project", wrong)
    monkeypatch.setattr(l6_networks, "_library", jax.jit(lambda t, z, x: t.project(z, x)))
    record = l6_networks.Recorder(l6_networks.STATEMENT)
    l6_networks._projection(record, Context("reduced"))
    assert not all(case.holds for case in record.outcome().cases)


def test_gain_needs_an_interval_above_zero():
    def judge(gains: list[float]) -> bool:
        base = np.full((len(gains), 3), 0.5)
        accuracy = {"L2": base, "strong": base + np.array(gains)[:, None]}
        return l6_networks._better("accuracy", accuracy, 1).holds

    assert judge([0.10, 0.12, 0.11])
    assert not judge([0.10, 0.30, -0.05])  # a mean above zero, by chance
    assert not judge([-0.10, -0.12, -0.11])
    assert not judge([np.nan, 0.1, 0.1])


# ---------------------------------------------------------------- the rule for simulated rates


def test_intervals_are_simultaneous():
    """Correct rates fail together in one of 1000 draws; a wrong one among them is found."""
    rng, n = np.random.default_rng(0), 2000
    rates = rng.uniform(0.01, 0.6, 40)
    draws = rng.binomial(n, rates, (1000, 40))
    fails = sum(not within("rates", draw, rates, n).holds for draw in draws)
    assert fails <= scipy.stats.binom.ppf(0.9999, 1000, 0.001)
    outside = 40 * 1000 - sum(plain_hits(draw, rates, n) for draw in draws)
    assert outside > 10  # of single intervals at 99.9 % some are missed, as they should be
    wrong = rates.copy()
    wrong[7] += 0.08
    assert not within("rates", draws[0], wrong, n).holds


def test_points_have_their_law():
    """Mean and spread of the drawn margins, with all coordinates, in both ways of drawing."""
    for d in (5, 80):
        problem = draw_problem(d, np.random.default_rng(d))
        n = 40_000
        found = draw_margins(problem, n, np.random.default_rng(1), lambda share: None)
        mean, spread = problem.margin_law()
        first = round(n * problem.priors[0])
        for part, m, s in ((found[: first - 900], mean[0], spread[0]),
                           (found[first + 900 :], mean[1], spread[1])):  # fmt: skip
            assert abs(part.mean() - m) < 5 * s / np.sqrt(len(part))
            assert part.std() == pytest.approx(s, rel=0.03)
        by_hand = np.sqrt([problem.w @ c @ problem.w for c in problem.covariances()])
        np.testing.assert_allclose(spread, by_hand, rtol=1e-12)
