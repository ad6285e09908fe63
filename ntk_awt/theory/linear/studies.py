"""L4, L5: trained SVMs against the formulas, on Gaussian classes and on real data."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import joblib
import numpy as np

from ntk_awt.errors import InputError, check_count, check_number, choose
from ntk_awt.theory.linear.angles import LOSSES, svm_cosine
from ntk_awt.theory.linear.margins import binomial_interval, rates, simulate
from ntk_awt.theory.linear.sets import (
    Array,
    Ball,
    Strong,
    classes,
    classifier_of,
    parts,
    reach,
    rows_of,
    single,
    strong_of,
    symmetric,
)
from ntk_awt.theory.linear.svm import METHODS, knowing_svms, train_svm


@dataclass(frozen=True)
class SvmCase:
    """One setting of the SVM experiment, for classes N(yμ, I).

    Attributes:
        n: training points, even, half of them of each class.
        d: dimension.
        mean_norm: ‖μ‖.
        epsilon, delta: of the ordinary L2 and of the strong threat, whose signal is μ.
        c: `C`.
        loss: hinge or squared_hinge.
    """

    n: int
    d: int
    mean_norm: float
    epsilon: float
    delta: float
    c: float = 1.0
    loss: str = "hinge"

    def __post_init__(self):
        check_count("training points", self.n, low=2)
        if self.n % 2:
            raise InputError("training points", expected="an even number", got=f"{self.n}")
        check_count("dimension", self.d, low=2)
        check_number("mean norm", self.mean_norm, low=0, low_open=True)
        check_number("epsilon", self.epsilon, low=0)
        check_number("delta", self.delta, low=0)
        check_number("C", self.c, low=0, low_open=True)
        choose("loss", self.loss, LOSSES)


def _draw(n: int, d: int, mean_norm: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """n points of N(yμ, I), μ along the first axis, half of each class."""
    y = np.repeat([-1.0, 1.0], n // 2)
    x = rng.standard_normal((n, d))
    x[:, 0] += mean_norm * y
    return x, y


def _cosine(w: Array) -> float:
    return float(w[0] / np.linalg.norm(w))


def _svm_row(case: SvmCase, seed: int, samples: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, case.n, case.d])
    x, y = _draw(case.n, case.d, case.mean_norm, rng)
    model = classifier_of(train_svm(x, y, c=case.c, loss=case.loss, seed=seed))
    signal = np.eye(case.d)[0]
    problem = symmetric(case.mean_norm * signal)
    row = asdict(case) | {
        "seed": seed,
        "cosine": _cosine(model.w),
        "bias": model.b / float(np.linalg.norm(model.w)),
        "predicted_cosine": svm_cosine(case.n, case.d, case.mean_norm, c=case.c, loss=case.loss),
        "train_error": float(np.mean(model.margins(x, y) <= 0)),
    }
    threats = {
        "ordinary": Ball(case.epsilon),
        "strong": Strong(case.epsilon, case.delta, signal),
    }
    for name, threat in threats.items():
        formula = rates(model, problem, threat)
        counts = simulate(model, problem, threat, samples, rng)
        for kind in ("clean", "adversarial", "robust"):
            probability = float(getattr(formula, kind))
            low, high = binomial_interval(probability, samples)
            row[f"{name}_{kind}"] = probability
            row[f"{name}_{kind}_count"] = getattr(counts, kind)
            row[f"{name}_{kind}_interval"] = [int(low), int(high)]
    row["samples"] = samples
    return row


def _tasks(cases: Iterable[SvmCase], seeds: Iterable[int]) -> list[tuple[SvmCase, int]]:
    """Each case with each seed; raise if one is something else."""
    tasks = list(itertools.product(cases, seeds))
    for case, seed in tasks:
        if not isinstance(case, SvmCase):
            raise InputError("cases", expected="linear.SvmCase", got=type(case).__name__)
        check_count("seeds", seed, low=0)
    return tasks


def svm_experiment(
    cases: Iterable[SvmCase],
    seeds: Iterable[int],
    *,
    samples: int = 100_000,
    n_jobs: int = 1,
    on_row: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Train an SVM in each case with each seed; compare its rates with fresh points.

    Args:
        cases: settings.
        seeds: one training set and one test set each.
        samples: fresh points a row and threat.
        n_jobs: processes (joblib); −1 for all cores.
        on_row: called with the number of rows done.

    Returns:
        Rows with the case, `seed`, `cosine` and `predicted_cosine` (`svm_cosine`), `bias` b/‖w‖,
        `train_error`, and for both threats (ordinary_, strong_) each of the rates clean,
        adversarial, robust by formula at the learned w, its `_count` among `samples`, and the
        99.9 % `_interval` of it.

    Source: theory L4.

    Example:
        >>> case = SvmCase(n=40, d=20, mean_norm=2.0, epsilon=3.0, delta=0.5)
        >>> (row,) = svm_experiment([case], [0], samples=10_000)
        >>> low, high = row["strong_robust_interval"]
        >>> low <= row["strong_robust_count"] <= high
        True
    """
    check_count("samples", samples, low=1)
    tasks = _tasks(cases, seeds)
    return in_parallel(_svm_row, [(*task, samples) for task in tasks], n_jobs, on_row)


def in_parallel(
    f: Callable[..., Any], tasks: Sequence[tuple], n_jobs: int, on_done: Callable[[int], None]
) -> list[Any]:
    """f(*task) for every task, in order; `on_done` is called with the number of those done."""
    if n_jobs < 1 and n_jobs != -1:
        raise InputError("n_jobs", expected="1 or more, or -1", got=f"{n_jobs}")
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator")
    results = []
    for result in parallel(joblib.delayed(f)(*task) for task in tasks):
        results.append(result)
        on_done(len(results))
    return results


def stop_workers() -> None:
    """End the processes of `in_parallel`, whatever they do, and remove their shared files."""
    from joblib.externals.loky import reusable_executor  # joblib has no public way

    if reusable_executor._executor is not None:
        reusable_executor._executor.terminate(kill_workers=True)


# ---------------------------------------------------------------- L5: human knowledge


def _knowledge_rows(
    case: SvmCase, seed: int, penalty: float, methods: Sequence[str]
) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, case.n, case.d])
    x, y = _draw(case.n, case.d, case.mean_norm, rng)
    signal = np.eye(case.d)[0]
    threat = Strong(case.epsilon, case.delta, signal)
    problem = symmetric(case.mean_norm * signal)
    trained = knowing_svms(x, y, threat, c=case.c, penalty=penalty, loss=case.loss, methods=methods)
    rows = []
    for method, model in trained.items():
        strong = rates(model, problem, threat)
        ordinary = rates(model, problem, Ball(case.epsilon))
        rows.append(
            asdict(case)
            | {
                "seed": seed,
                "method": method,
                "cosine": _cosine(model.w),
                "bias": model.b / float(np.linalg.norm(model.w)),
                "clean": float(strong.clean),
                "ordinary_robust": float(ordinary.robust),
                "strong_robust": float(strong.robust),
            }
        )
    return rows


def knowledge_experiment(
    cases: Iterable[SvmCase],
    seeds: Iterable[int],
    *,
    penalty: float = 100.0,
    methods: Sequence[str] = METHODS,
    n_jobs: int = 1,
    on_case: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Errors of the SVMs of `METHODS` in each case with each seed, e.g. for curves against n/d.

    Args:
        cases: settings; the signal is the direction of μ.
        seeds: one training set each.
        penalty: of the penalised SVM.
        methods: which ones.
        n_jobs: processes (joblib); −1 for all cores.
        on_case: called with the number of training sets done.

    Returns:
        Rows with the case, `seed`, `method`, `cosine`, `bias` b/‖w‖, and the exact errors `clean`,
        `ordinary_robust` and `strong_robust` of the learned classifier (see `rates`).

    Source: theory L5.

    Example:
        >>> case = SvmCase(n=40, d=40, mean_norm=2.0, epsilon=3.0, delta=0.5)
        >>> rows = knowledge_experiment([case], [0])
        >>> errors = {row["method"]: row["strong_robust"] for row in rows}
        >>> errors["signal"] < 0.1 < 0.3 < errors["plain"]
        True
    """
    tasks = [(*task, penalty, methods) for task in _tasks(cases, seeds)]
    found = in_parallel(_knowledge_rows, tasks, n_jobs, on_case)
    return [row for rows in found for row in rows]


def knowledge_case(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    threat: Strong,
    *,
    c: float = 1.0,
    penalty: float = 100.0,
    loss: str = "squared_hinge",
    methods: Sequence[str] = METHODS,
) -> list[dict[str, Any]]:
    """Natural and strong-robust accuracy of the SVMs of `METHODS` on real data of two classes.

    A point counts as robust if its margin exceeds the reach, which is exact for the set without a
    pixel box, and so a lower bound with one.

    Args:
        x_train, x_test: points [n, *shape], d entries each.
        y_train, y_test: the two labels, [n].
        threat: radii and signal, e.g. from `threats.class_mean_basis` or `discriminant_basis`.
        c, penalty, loss, methods: as in `knowing_svms`.

    Returns:
        One row a method: `natural_accuracy`, `ordinary_accuracy` under the L2 ball of radius ε,
        `strong_accuracy`, and `signal_share`, ‖Uᵀw‖/‖w‖.

    Source: theory L5.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(60, 30)), np.arange(60) % 2
        >>> x[:, 0] += 4.0 * (2 * y - 1)
        >>> rows = knowledge_case(x[:40], y[:40], x[40:], y[40:], Strong(5.0, 1.0, np.eye(30)[0]))
        >>> rows[1]["method"], rows[1]["strong_accuracy"] > rows[0]["strong_accuracy"]
        ('signal', True)
    """
    threat = strong_of(single(threat))
    train, test = (rows_of(x) for x in (x_train, x_test))
    (_, known), (tested, others) = classes(y_train, len(train)), classes(y_test, len(test))
    if len(known) != 2 or not len(others) or not np.isin(others, known).all():
        raise InputError("labels", expected="the same two classes", got="others")
    sides = np.where(tested == known[1], 1.0, -1.0)
    trained = knowing_svms(train, y_train, threat, c=c, penalty=penalty, loss=loss, methods=methods)
    rows = []
    for method, model in trained.items():
        margins = model.margins(test, sides)
        inside, _ = parts(model.w, threat.basis)
        rows.append(
            {
                "method": method,
                "natural_accuracy": float(np.mean(margins > 0)),
                "ordinary_accuracy": float(np.mean(margins > reach(model.w, Ball(threat.epsilon)))),
                "strong_accuracy": float(np.mean(margins > reach(model.w, threat))),
                "signal_share": float(np.linalg.norm(inside) / np.linalg.norm(model.w)),
            }
        )
    return rows
