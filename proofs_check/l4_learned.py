"""L4: trained linear classifiers: their rates at the learned w, and their angle without training.

The rates need no new theory: L1 and L2 hold for every w and b, so for learned ones. For classes
N(±μ, I) and a unit w they depend on cos θ = wᵀμ₀ and b alone, and are stated again so.

The predicted angles are limits, d → ∞ with n/d fixed. How far off is a finite d? For the mean
difference cos θ = u/√(u² + v²), u ~ N(‖μ‖, σ²/n), v² ~ (σ²/n)χ²_{d−1}; to second order in these
fluctuations (c, s cosine and sine of the limit)

    E cos θ = c + c·s²(½ − ¾s²)/d,

at most 0.2/d away. The other learners' overlaps fluctuate by 1/√d as well, with other constants;
2/d allows them ten times as much.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
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
)
from proofs_check.instances.linear import (
    Array,
    Rows,
    deviation_panel,
    exact_errors,
    no_sine,
    strong_reach,
    within,
)

STATEMENT = Statement(
    number="L4",
    title="learned linear classifiers",
    claim="Trained SVMs have the rates of adversarial and strong adversarial examples that L1 and "
    "L2 give at their w, and learned classifiers of five kinds the angle that the limit predicts.",
    formula="mean difference: cos²θ → ‖μ‖²/(‖μ‖² + σ²d/n); ridge: Marchenko–Pastur; SVM: Gaussian "
    "min-max theorem",
    hypotheses={
        "round classes": "N(±μ, σ²I), as many points of each",
        "high dimension": "d → ∞ with n/d fixed (angles)",
    },
    instances="SVMs with hinge and squared hinge over n, d, ‖μ‖, C: 16 settings of 3 seeds, 1e5 "
    "fresh points each (5 seeds, 4e5 with --full); 7 learners at n/d = 2 and ½, d = 200 and 400 "
    "(400 and 800), 16 seeds (32)",
    rule="all simulated rates inside binomial intervals that are simultaneous at 99.9 %; mean "
    "cosines within three standard errors and 2/d of the prediction",
    tolerance="intervals as in L1; 2/d is ten times the finite-size term of the mean difference, "
    "c·s²(½ − ¾s²)/d, which is checked itself, up to 1/d²",
    source="theory L4; Mignacco et al. 2020; Deng, Kammoun and Thrampoulidis 2021; Montanari "
    "et al. 2019",
)


KINDS = ("clean", "adversarial", "robust")


# ---------------------------------------------------------------- rates at the learned w


def _ordinary(epsilon: Array, delta: Array, c: Array, s: Array) -> Array:
    return epsilon


def _cases(context: Context) -> list[linear.SvmCase]:
    sizes = context.pick([(40, 20), (60, 60)], [(60, 20), (200, 20), (60, 100), (200, 100)],
                         [(60, 20), (400, 20), (60, 200), (400, 200)])  # fmt: skip
    return [
        linear.SvmCase(n, d, norm, 1.5, 0.5, c, loss)
        for n, d in sizes
        for norm, c, loss in [
            (1.0, 1e-3, "hinge"),
            (1.0, 1.0, "squared_hinge"),
            (2.5, 1.0, "hinge"),
            (2.5, 1e-2, "squared_hinge"),
        ]
    ]


class Grid(NamedTuple):
    """The library's rows; counts and rates by its formulas, and by ours, [2, rows, 3] each."""

    rows: Rows
    found: Array
    library: Array
    restated: Array
    samples: int


def _grid(context: Context) -> Grid:
    cases, seeds = _cases(context), range(context.pick(1, 3, 5))
    samples = context.pick(20_000, 100_000, 400_000)
    total = len(cases) * len(seeds)
    rows = linear.svm_experiment(
        cases, seeds, samples=samples, on_row=lambda done: context.progress(0.5 * done / total)
    )
    found, library = (
        np.array([[[row[f"{threat}_{kind}{end}"] for kind in KINDS] for row in rows]
                  for threat in ("ordinary", "strong")], float)
        for end in ("_count", "")
    )  # fmt: skip
    restated = np.stack([exact_errors(rows, reach) for reach in (_ordinary, strong_reach)])
    return Grid(rows, found, library, restated, samples)


# ---------------------------------------------------------------- angles


class Setting(NamedTuple):
    n: int
    d: int
    mean_norm: float
    sigma: float


class Learner(NamedTuple):
    """How w is learned from x [n, d], y = ±1, and the predicted cos θ."""

    train: Callable[[Array, Array], Any]
    predict: Callable[[Setting], float]


def _ridge(penalty: float) -> Callable[[Array, Array], Any]:
    def train(x: Array, y: Array) -> Any:
        if len(x) <= x.shape[1]:
            return x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
        return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)

    return train


def _svm(c: float, loss: str) -> Callable[[Array, Array], Array]:
    return lambda x, y: linear.classifier_of(linear.train_svm(x, y, c=c, loss=loss)).w


LEARNERS = {
    "mean difference": Learner(lambda x, y: y @ x, lambda s: linear.mean_difference_cosine(*s)),
    "least squares": Learner(_ridge(1e-9), lambda s: linear.ridge_cosine(*s)),
    "ridge": Learner(_ridge(300.0), lambda s: linear.ridge_cosine(*s, penalty=300.0)),
    "soft margin, C = 0.001": Learner(_svm(1e-3, "hinge"), lambda s: linear.svm_cosine(*s, c=1e-3)),
    "soft margin, C = 0.02": Learner(_svm(0.02, "hinge"), lambda s: linear.svm_cosine(*s, c=0.02)),
    "squared hinge": Learner(
        _svm(3e-3, "squared_hinge"), lambda s: linear.svm_cosine(*s, c=3e-3, loss="squared_hinge")
    ),
    "hard margin": Learner(_svm(1e3, "hinge"), lambda s: linear.hard_margin_cosine(*s)),
}

WRONG: dict[str, tuple[str, Callable[[Setting], float]]] = {
    "n and d swapped": (
        "mean difference",
        lambda s: linear.mean_difference_cosine(s.d, s.n, s.mean_norm, s.sigma),
    ),
    "σ forgotten": (
        "mean difference",
        lambda s: linear.mean_difference_cosine(s.n, s.d, s.mean_norm),
    ),
    "the mean difference for least squares": ("least squares", LEARNERS["mean difference"].predict),
    "another penalty": ("ridge", lambda s: linear.ridge_cosine(*s, penalty=3.0)),
    "least squares for an SVM": ("soft margin, C = 0.001", LEARNERS["least squares"].predict),
    "C not in units of 1/n": (
        "soft margin, C = 0.001",
        lambda s: linear.svm_cosine(*s, c=1e-3 * s.n),
    ),
    "least squares for the hard margin": ("hard margin", LEARNERS["least squares"].predict),
}


class Angles(NamedTuple):
    """Cosines by learner, [settings, seeds]."""

    settings: Sequence[Setting]
    found: dict[str, Array]

    def case(self, learner: str, predict: Callable[[Setting], float]) -> Case:
        """Each setting's mean, within three standard errors and the finite-size term."""
        found = self.found[learner]
        predicted = np.array([predict(s) for s in self.settings])
        error = scipy.stats.sem(found, axis=1)
        allowed = 3 * error + 2 / np.array([s.d for s in self.settings])
        case = below(f"cos θ of {learner}", np.abs(found.mean(1) - predicted), allowed)
        means = ", ".join(
            f"{mean:.4f} ± {e:.4f} for {p:.4f}"
            for mean, e, p in zip(found.mean(1), error, predicted, strict=True)
        )
        return case._replace(tightness=None, measured=f"{means}; {case.measured}")


def _angles(context: Context) -> Angles:
    sizes = context.pick([(160, 80), (80, 160)], [(400, 200), (200, 400)], [(800, 400), (400, 800)])
    settings = [Setting(*sizes[0], 3.0, 2.0), Setting(*sizes[1], 2.0, 1.0)]
    seeds = context.pick(8, 16, 32)
    found = {name: np.empty((len(settings), seeds)) for name in LEARNERS}
    for i, s in enumerate(settings):
        for seed in range(seeds):
            rng = context.rng(2, i, seed)
            y = np.repeat([-1.0, 1.0], s.n // 2)
            x = s.sigma * rng.standard_normal((s.n, s.d))
            x[:, 0] += s.mean_norm * y
            for name, learner in LEARNERS.items():
                w = learner.train(x, y)
                found[name][i, seed] = w[0] / np.linalg.norm(w)
            context.progress(0.5 + 0.5 * (i * seeds + seed + 1) / len(settings) / seeds)
    return Angles(settings, found)


def _finite_size(context: Context) -> tuple[Case, Case]:
    """E cos θ of the mean difference, at small d, against the limit with its first correction.

    The second case, a control, is without the correction.
    """
    actual, limit, allowed, rng = [], [], [], context.rng(3)
    draws = context.pick(100_000, 1_000_000, 10_000_000)
    for d in (20, 40, 80):
        for ratio, mean in ((0.5, 1.0), (2.0, 0.7), (4.0, 1.5)):
            n = int(ratio * d)
            u = mean + rng.standard_normal(draws) / np.sqrt(n)
            v2 = rng.chisquare(d - 1, draws) / n
            cosine = u / np.sqrt(u**2 + v2)
            c = linear.mean_difference_cosine(n, d, mean)
            s2 = 1 - c**2
            term = c * s2 * (0.5 - 0.75 * s2) / d
            actual.append(abs(cosine.mean() - c - term))
            limit.append(abs(cosine.mean() - c))
            allowed.append(4 * scipy.stats.sem(cosine) + 1 / d**2)
    case = below("finite-size term of the mean difference", actual, allowed)
    return case._replace(tightness=None), below("limit at d of 20 to 80", limit, allowed)


def _stretched(context: Context) -> Case:
    """The mean difference's angle, of classes with one direction forty times as wide."""
    s, rng = Setting(80, 40, 2.0, 1.0), context.rng(4)
    y = np.repeat([-1.0, 1.0], s.n // 2)
    cosines = []
    for _ in range(16):
        x = rng.standard_normal((s.n, s.d))
        x[:, 1] *= 40.0
        x[:, 0] += s.mean_norm * y
        w = LEARNERS["mean difference"].train(x, y)
        cosines.append(w[0] / np.linalg.norm(w))
    angles = Angles([s], {"mean difference": np.array([cosines])})
    return angles.case("mean difference", LEARNERS["mean difference"].predict)


@threadpool_limits.wrap(limits=1)  # the matrices are small: more threads only wait
def check(context: Context) -> Outcome:
    grid, angles = _grid(context), _angles(context)
    name = f"simulated rates of {len(grid.rows)} SVMs, {grid.samples:,} points each"
    check = Recorder(STATEMENT)
    check.case(within(name, grid.found, grid.library, grid.samples))
    check.close("library's rates", grid.library, grid.restated, tolerance=1e-9)
    check.case(*(angles.case(name, learner.predict) for name, learner in LEARNERS.items()))
    term, limit = _finite_size(context)
    check.case(term)
    aligned = [row | {"cosine": 1.0} for row in grid.rows]
    wrong = {
        "sin θ left out": exact_errors(grid.rows, no_sine),
        "δ and ε swapped": exact_errors(
            grid.rows, lambda epsilon, delta, c, s: strong_reach(delta, epsilon, c, s)
        ),
        "the best classifier's angle in place of the learned one": exact_errors(
            aligned, strong_reach
        ),
        "signal of another direction: cos and sin exchanged": exact_errors(
            grid.rows, lambda epsilon, delta, c, s: strong_reach(epsilon, delta, s, c)
        ),
    }
    for name, rates in wrong.items():
        case = within("strong rates", grid.found[1], rates, grid.samples)
        check.control(name, case, breaks=FORMULA)
    for name, (learner, predict) in WRONG.items():
        check.control(name, angles.case(learner, predict), breaks=FORMULA)
    check.control("small d without the finite-size term", limit, breaks="high dimension")
    check.control("classes that are not round", _stretched(context), breaks="round classes")
    predicted = [
        np.array([learner.predict(s) for s in angles.settings]) for learner in LEARNERS.values()
    ]
    lines = [
        Line(label, p, angles.found[label].mean(1))
        for label, p in zip(LEARNERS, predicted, strict=True)
    ]
    ends = [np.min(predicted), np.max(predicted)]
    panel = Panel(
        "angle to the signal",
        "cos θ predicted without training",
        "cos θ of trained classifiers, mean over seeds",
        [*lines, Line("equal", ends, ends, "reference")],
        yscale="linear",
    )
    check.panel(deviation_panel(grid.found, grid.library, grid.samples), panel)
    return check.outcome()
