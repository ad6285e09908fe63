"""L5: an SVM that knows the signal is strong-robust where the plain one is not.

Classes N(±μ, I), δ < ‖μ‖ < ε, the signal along μ. By L3 every linear classifier has an ordinary
robust error of ½ or more, and the least strong one is Φ(δ − ‖μ‖). Here "strong-robust" means a
strong robust error below ½, that of a constant answer. What an SVM gets is decided by its angle θ:
with t = ‖μ‖c − δc − √(ε² − δ²)s and a bias b its error is ½[Φ(−t − b) + Φ(−t + b)], which is ½ at
t = 0 and falls with t, whatever b is. So it is strong-robust if and only if
tan θ < (‖μ‖ − δ)/√(ε² − δ²) (where εc ≤ δ, so that r = ε > ‖μ‖c, both sides fail), and the angle of
the plain SVM is predicted by L4.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
from scipy.special import ndtr
from threadpoolctl import threadpool_limits

from ntk_awt.theory import linear
from proofs_check.core import (
    FORMULA,
    Case,
    Context,
    Line,
    Outcome,
    Panel,
    Recorder,
    Statement,
    below,
    close,
)
from proofs_check.instances.linear import Array, Rows, exact_errors, no_sine, strong_reach

STATEMENT = Statement(
    number="L5",
    title="human knowledge makes SVMs strong-robust",
    claim="For δ < ‖μ‖ < ε no SVM is robust in the ordinary sense and the plain one is not strong-"
    "robust; the SVMs that know the signal are.",
    formula="strong-robust (error < ½) if and only if tan θ < (‖μ‖ − δ)/√(ε² − δ²)",
    hypotheses={
        "round classes": "N(±μ, I)",
        "knowledge": "the known direction is that of μ",
        "radii": "δ < ‖μ‖ < ε",
    },
    instances="plain, signal, penalised and robust SVM, d = 100, n/d from ½ to 8, 8 seeds "
    "(d = 200, n/d from ¼ to 16, 16 seeds with --full); errors exact at the learned w",
    rule="Student's 99.9 % interval of every mean strong robust error is below ½ with knowledge "
    "and above ½ without; every ordinary robust error is ½ or more",
    tolerance="intervals over seeds; the angle as in L4; float64 rounding, multiplied by 1/s "
    "where 1 − c² cancels, elsewhere",
    source="theory L5; Shi and Ding 2019",
)

MEAN, EPSILON, DELTA, C = 2.0, 3.0, 0.6, 1.0
KNOWING = ("signal", "penalised", "robust")


def _select(rows: Rows, method: str, key: str) -> Array:
    """Values of one method, [ratios, seeds]."""
    chosen = [row for row in rows if row["method"] == method]
    sizes = sorted({row["n"] for row in chosen})
    return np.array([[row[key] for row in chosen if row["n"] == n] for n in sizes])


def _tangents(rows: Rows) -> Array:
    """tan θ of each row, ∞ where w points away from the signal."""
    c = np.array([row["cosine"] for row in rows])
    sine = np.sqrt(np.maximum(1 - c**2, 0))
    return np.where(c > 0, sine / np.where(c > 0, c, 1.0), np.inf)


def _reach(errors: Array) -> Array:
    """Half of Student's 99.9 % interval of each mean over seeds."""
    factor = scipy.stats.t.ppf(0.9995, errors.shape[-1] - 1)
    return factor * scipy.stats.sem(errors, axis=-1)


def _robust(name: str, errors: Array) -> Case:
    """The interval of every mean error is below ½."""
    high = errors.mean(-1) + _reach(errors)
    case = below(f"{name} is strong-robust", high, np.full(high.shape, 0.5))
    means = ", ".join(f"{mean:.3f}" for mean in np.ravel(errors.mean(-1)))
    return case._replace(measured=f"mean errors {means}; upper ends {case.measured}")


def _restated(rows: Rows, strong: Callable[..., Any]) -> Array:
    """Clean, ordinary and strong robust error from angle and bias, [rows, 3]."""
    found = exact_errors(rows, strong)
    ordinary = exact_errors(rows, lambda epsilon, delta, c, s: epsilon)
    return np.stack([found[:, 0], ordinary[:, 2], found[:, 2]], axis=-1)


def _wrong_signal(context: Context, d: int, n: int, seeds: int) -> Array:
    """Strong robust errors of SVMs that take another direction for the signal, [2, seeds]."""
    truth, other = np.eye(d)[:2]
    threat, errors = linear.Strong(EPSILON, DELTA, truth), []
    for seed in range(seeds):
        y = np.repeat([-1.0, 1.0], n // 2)
        x = context.rng(3, seed).standard_normal((n, d))
        x[:, 0] += MEAN * y
        models = linear.knowing_svms(
            x, y, linear.Strong(EPSILON, DELTA, other), c=C, methods=("signal", "penalised")
        )
        problem = linear.symmetric(MEAN * truth)
        errors.append([float(linear.rates(m, problem, threat).robust) for m in models.values()])
    return np.transpose(errors)


def _stretched(context: Context, d: int) -> Case:
    """Errors by angle and bias, of a random w and classes that are wider along one direction."""
    w = context.rng(4).standard_normal(d) / np.sqrt(d) + np.eye(d)[0]
    w /= np.linalg.norm(w)
    mean, covariance = MEAN * np.eye(d)[0], np.diag(np.r_[4.0, np.ones(d - 1)])
    classes = linear.Gaussians(
        np.stack([-mean, mean]), np.stack([covariance] * 2), np.array([0.5, 0.5])
    )
    threat = linear.Strong(EPSILON, DELTA, np.eye(d)[0])
    rates = linear.rates(linear.LinearClassifier(w), classes, threat)
    row = {"mean_norm": MEAN, "cosine": w[0], "bias": 0.0, "epsilon": EPSILON, "delta": DELTA}
    expected = exact_errors([row], strong_reach)[0]
    return close("errors", [rates.clean, rates.adversarial, rates.robust], expected, tolerance=1e-9)


@threadpool_limits.wrap(limits=1)  # the matrices are small: more threads only wait
def check(context: Context) -> Outcome:
    d = context.pick(40, 100, 200)
    ratios = context.pick((0.5, 2), (0.5, 1, 2, 4, 8), (0.25, 0.5, 1, 2, 4, 8, 16))
    seeds = context.pick(10, 8, 16)

    def experiment(
        cases: list[linear.SvmCase],
        seeds: int,
        share: float,
        before: float,
        methods: tuple[str, ...] = linear.METHODS,
    ) -> Rows:
        total = len(cases) * seeds
        return linear.knowledge_experiment(
            cases,
            range(context.seed, context.seed + seeds),
            methods=methods,
            on_case=lambda done: context.progress(before + share * done / total),
        )

    def setting(n: int, epsilon: float = EPSILON, delta: float = DELTA) -> linear.SvmCase:
        return linear.SvmCase(n, d, MEAN, epsilon, delta, C)

    sizes = [int(ratio * d) for ratio in ratios]
    rows = experiment([setting(n) for n in sizes], seeds, 0.8, 0.0)
    found = np.array([[row[k] for k in ("clean", "ordinary_robust", "strong_robust")]
                      for row in rows])  # fmt: skip
    errors = {method: _select(rows, method, "strong_robust") for method in linear.METHODS}
    cosines = {method: _select(rows, method, "cosine") for method in linear.METHODS}
    least = ndtr(DELTA - MEAN)
    predicted = np.array([linear.svm_cosine(n, d, MEAN, c=C) for n in sizes])
    inside, across = MEAN * predicted, np.sqrt(1 - predicted**2)
    expected = ndtr(strong_reach(EPSILON, DELTA, predicted, across) - inside)
    turn = (MEAN - DELTA) / np.sqrt(EPSILON**2 - DELTA**2)  # tan θ at an error of ½

    plain, low = errors["plain"], errors["plain"].mean(1) - _reach(errors["plain"])
    gap = np.abs(cosines["plain"].mean(1) - predicted)
    allowed = 3 * scipy.stats.sem(cosines["plain"], axis=1) + 2 / d
    check = Recorder(STATEMENT)
    check.close("library's errors", found, _restated(rows, strong_reach), tolerance=1e-9)
    halves, bound = np.full(len(rows), 0.5), np.full(len(rows), least)
    name = "no method is robust in the ordinary sense: errors of ½ or more"
    check.below(name, halves, found[:, 1])
    check.below("no method is below the least strong error", bound, found[:, 2])
    name = "the plain SVM is not strong-robust: errors above ½"
    check.below(name, np.full(low.shape, 0.5), low)
    name = "its predicted tan θ is too large"
    check.below(name, np.full(low.shape, turn), across / predicted)
    check.case(
        below("its angle is the predicted one", gap, allowed)._replace(tightness=None),
        *(_robust(f"the SVM with knowledge ({method})", errors[method]) for method in KNOWING),
    )
    name, small = f"strong-robust if and only if tan θ < {turn:.4f}", _tangents(rows) < turn
    check.close(name, found[:, 2] < 0.5, small, tolerance=1e-9)
    name = "the signal's SVM uses the signal alone"
    check.close(name, cosines["signal"], np.ones(plain.shape), tolerance=1e-12)

    few = max(4, seeds // 2)
    wide = experiment([setting(2 * d, 2 * MEAN, 1.2 * MEAN)], few, 0.1, 0.8, ("signal",))
    near = experiment([setting(2 * d, 0.8 * MEAN, 0.3 * MEAN)], few, 0.1, 0.9, ("signal",))
    check.control("no knowledge", _robust("plain SVM", plain), breaks="knowledge")
    case = _robust("SVM", _wrong_signal(context, d, 2 * d, few))
    check.control("a wrong signal", case, breaks="knowledge")
    case = _robust("signal SVM", _select(wide, "signal", "strong_robust"))
    check.control("δ > ‖μ‖", case, breaks="radii")
    ordinary = [row["ordinary_robust"] for row in near]
    case = below("no method is robust in the ordinary sense", np.full(few, 0.5), ordinary)
    check.control("ε < ‖μ‖", case, breaks="radii")
    case = close("library's errors", found, _restated(rows, no_sine), tolerance=1e-9)
    check.control("sin θ left out", case, breaks=FORMULA)
    check.control("another covariance", _stretched(context, d), breaks="round classes")
    lines = [Line(method, ratios, values.mean(1)) for method, values in errors.items()]
    lines.append(Line("plain, predicted", ratios, expected, "reference"))
    lines.append(Line("least possible", ratios, np.full(len(ratios), least), "bound"))
    panel = Panel(
        f"d = {d}, ‖μ‖ = {MEAN:g} σ, ε = {EPSILON:g} σ, δ = {DELTA:g} σ",
        "training points per dimension n/d",
        "strong robust error [probability]",
        lines,
        xscale="log",
        yscale="linear",
    )
    check.panel(panel)
    return check.outcome()
