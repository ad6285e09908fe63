"""What `ntk-awt linear` computes: rates, phase diagram, trained SVMs, knowledge of the signal.

Each study is a dataclass of settings, and a function from it to tables, arrays and a figure.
Lengths are in units of the noise σ, which is 1; radii of the strong threat are given in units of
‖μ‖, half of the distance between the class means.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from tyro.conf import arg, subcommand

from ntk_awt import data, files, threats
from ntk_awt.app import plots
from ntk_awt.app.config import DataConfig
from ntk_awt.errors import InputError, check_count, check_number, choose
from ntk_awt.theory import linear
from ntk_awt.theory.linear.studies import in_parallel

Bar: TypeAlias = Callable[[str, int, str], AbstractContextManager[Callable[[float], None]]]
"""A progress bar from its label, total and unit; it gives what is called with the units done."""

KINDS = ("clean", "adversarial", "robust")

BASES: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "class-means": threats.class_mean_basis,
    "discriminants": linear.discriminant_basis,
}
"""The signal of real images by name."""


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Files:
    """Where the results go."""

    out: Path | None = None
    """Folder of the figure and the arrays; runs/linear-NAME if not given."""
    json_file: Annotated[Path | None, arg(name="json")] = None
    """Write the numbers there as well."""


@dataclass(frozen=True)
class Drawn(Files):
    """Where the results go, and how they are drawn."""

    seed: int = 0
    """Seed of all random draws."""
    jobs: int = 1
    """Processes; -1 for all cores."""

    def __post_init__(self):
        check_count("seed", self.seed, low=0)
        if self.jobs < 1 and self.jobs != -1:
            raise InputError("jobs", expected="1 or more, or -1", got=str(self.jobs))


@dataclass(frozen=True)
class Rates(Drawn):
    """Rates of adversarial examples of one classifier against the radii, and simulated points."""

    d: int = 100
    """Dimension."""
    mean_norm: float = 2.0
    """‖μ‖ of the classes N(yμ, I), in units of σ."""
    cosine: float = 0.9
    """cos θ between the classifier's w and μ; its other entries are drawn, its bias is 0."""
    svm_points: int | None = None
    """Train an SVM on so many points and take its w and bias, in place of --cosine."""
    c: float = 1.0
    """C of that SVM."""
    prior: float = 0.5
    """Probability of class +1, in (0, 1)."""
    p: float = 2.0
    """Order of the ordinary threat's ball, from 1 to inf."""
    reach: float = 2.0
    """Largest radius that is drawn, as reach ε‖w‖_q at ‖w‖ = 1; in units of ‖μ‖."""
    delta: tuple[float, ...] = (0.1, 0.3, 0.6)
    """Limits on the signal, each a curve; in units of ‖μ‖."""
    points: int = 5
    """Simulated radii on each curve."""
    samples: int = 100_000
    """Fresh points for each."""

    def __post_init__(self):
        super().__post_init__()
        check_count("dimension", self.d, low=2)
        check_number("mean norm", self.mean_norm, low=0, low_open=True)
        check_number("cosine", self.cosine, low=-1, high=1)
        if self.svm_points is not None:
            check_count("svm points", self.svm_points, low=2)
        check_number("prior", self.prior, low=1e-6, high=1 - 1e-6)
        check_number("reach", self.reach, low=0, low_open=True)
        _check_some(delta=self.delta)
        for delta in self.delta:
            check_number("delta", delta, low=0)
        check_count("points", self.points, low=1)
        check_count("samples", self.samples, low=1)


@dataclass(frozen=True)
class Phase(Files):
    """Phase diagram: where robust linear classifiers exist, each cell a numerical optimum."""

    d: int = 5
    """Dimension."""
    mean_norm: float = 2.0
    """‖μ‖, in units of σ."""
    condition: float = 1.0
    """Largest variance / smallest variance of the noise; with 1 there is a closed form."""
    limit: float = 2.0
    """Largest ε and δ, in units of ‖μ‖."""
    cells: int = 20
    """Cells on each side."""

    def __post_init__(self):
        check_count("dimension", self.d, low=2)
        check_number("mean norm", self.mean_norm, low=0, low_open=True)
        check_number("condition", self.condition, low=1, high=1e6)
        check_number("limit", self.limit, low=0, low_open=True)
        check_count("cells", self.cells, low=2)


@dataclass(frozen=True)
class Svm(Drawn):
    """Trained SVMs over a grid: rates against the formulas, angles against their prediction."""

    n: tuple[int, ...] = (40, 100, 200, 400)
    """Training points, even numbers."""
    d: tuple[int, ...] = (40, 100)
    """Dimensions."""
    mean_norm: tuple[float, ...] = (1.0, 2.0)
    """‖μ‖, in units of σ."""
    c: tuple[float, ...] = (0.001, 1.0)
    """C of the SVM."""
    loss: str = "hinge"
    """hinge or squared_hinge."""
    epsilon: float = 0.75
    """Radius of both threats, in units of ‖μ‖."""
    delta: float = 0.3
    """The strong threat's limit on the signal, in units of ‖μ‖."""
    seeds: int = 3
    """Training sets of each setting."""
    samples: int = 50_000
    """Fresh points for each classifier and threat."""

    def __post_init__(self):
        super().__post_init__()
        _check_some(n=self.n, d=self.d, mean_norm=self.mean_norm, c=self.c)
        _check_radii(self.epsilon, self.delta)
        check_count("seeds", self.seeds, low=1)
        check_count("samples", self.samples, low=1)


@dataclass(frozen=True)
class Knowledge(Drawn):
    """SVMs with and without knowledge of the signal, on Gaussian classes and on real images."""

    d: int = 100
    """Dimension of the Gaussian classes."""
    mean_norm: float = 2.0
    """Their ‖μ‖, in units of σ."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Training points per dimension, n/d."""
    epsilon: float = 1.5
    """Radius, in units of ‖μ‖ (of images: of half of the distance between their class means)."""
    delta: float = 0.3
    """Limit on the signal, in the same units."""
    c: float = 1.0
    """C of the SVMs."""
    penalty: float = 100.0
    """How much more the penalised SVM pays for weights off the signal."""
    methods: tuple[str, ...] = linear.METHODS
    """plain, signal, penalised, robust."""
    seeds: int = 5
    """Training sets of each n."""
    data: str = "digits"
    """Real images: digits, mnist, fashion_mnist, cifar10, a FILE.npz, or none."""
    data_dir: Path | None = None
    """Folder of the data files; else the environment variable NTK_AWT_DATA (or its sub-folder)."""
    classes: tuple[int, int] = (3, 7)
    """The two classes of images."""
    basis: str = "class-means"
    """The images' signal: class-means or discriminants."""
    train_size: int = 2000
    """At most that many training images of the two classes."""

    def __post_init__(self):
        super().__post_init__()
        _check_some(ratios=self.ratios, methods=self.methods)
        _check_radii(self.epsilon, self.delta)
        for ratio in self.ratios:
            check_number("ratios", ratio, low=0, low_open=True)
        for method in self.methods:
            choose("method", method, linear.METHODS)
        check_count("seeds", self.seeds, low=1)
        choose("basis", self.basis, BASES)
        check_count("train_size", self.train_size, low=2)
        if self.classes[0] == self.classes[1]:
            raise InputError(
                "classes", expected="two different ones", got=f"{self.classes[0]} twice"
            )


def _check_some(**lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if not values:
            raise InputError(name, expected="one value or more", got="none")


def _check_radii(epsilon: float, delta: float) -> None:
    check_number("epsilon", epsilon, low=0)
    check_number("delta", delta, low=0)
    if delta > epsilon:
        raise InputError(
            "delta",
            expected=f"at most epsilon, {epsilon:g}",
            got=f"{delta:g}",
            fix="from there on it limits nothing",
        )


Settings: TypeAlias = (
    Annotated[Rates, subcommand("rates")]
    | Annotated[Phase, subcommand("phase")]
    | Annotated[Svm, subcommand("svm")]
    | Annotated[Knowledge, subcommand("knowledge")]
)
"""What the command line chooses from."""


# ---------------------------------------------------------------- results


class Table(NamedTuple):
    """A table for the terminal; units are in the headers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


class Found(NamedTuple):
    """What a study found.

    Attributes:
        name: of the study.
        rows: records, as JSON values.
        summary: a few numbers, as JSON values.
        arrays: for the .npz file.
        figure: the picture.
        tables: for the terminal.
    """

    name: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    arrays: dict[str, np.ndarray]
    figure: Figure
    tables: list[Table]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


# ---------------------------------------------------------------- rates


def _simulated(
    model: linear.LinearClassifier,
    problem: linear.Gaussians,
    threat: linear.Threat,
    samples: int,
    seed: Sequence[int],
) -> dict[str, Any]:
    """Rates by formula, counts of fresh points and their 99.9 % intervals."""
    formula = linear.rates(model, problem, threat)
    drawn = linear.simulate(model, problem, threat, samples, np.random.default_rng(seed))
    row: dict[str, Any] = {"samples": samples}
    for kind in KINDS:
        rate, count = float(getattr(formula, kind)), getattr(drawn, kind)
        low, high = map(int, linear.binomial_interval(rate, samples))
        row[kind] = {
            "rate": rate,
            "count": count,
            "interval": [low, high],
            "inside": low <= count <= high,
        }
    return row


def _classifier(settings: Rates) -> linear.LinearClassifier:
    """The classifier of unit length: drawn at the angle, or trained."""
    rng = np.random.default_rng([settings.seed, 0])
    if settings.svm_points is None:
        noise = rng.standard_normal(settings.d - 1)
        sine = np.sqrt(1 - settings.cosine**2)
        return linear.LinearClassifier(
            np.append(settings.cosine, sine * noise / np.linalg.norm(noise))
        )
    n = settings.svm_points
    positive = min(max(1, round(n * settings.prior)), n - 1)  # a point of each class at least
    y = np.where(np.arange(n) < positive, 1.0, -1.0)
    x = rng.standard_normal((n, settings.d))
    x[:, 0] += settings.mean_norm * y
    trained = linear.classifier_of(linear.train_svm(x, y, c=settings.c))
    length = np.linalg.norm(trained.w)
    return linear.LinearClassifier(trained.w / length, trained.b / length)


def rates(settings: Rates, bar: Bar) -> Found:
    """Curves over a fine grid of radii, all at once; a few points of each simulated."""
    unit, signal = settings.mean_norm, np.eye(settings.d)[0]
    problem = linear.symmetric(unit * signal, prior=settings.prior)
    model = _classifier(settings)
    epsilon = np.linspace(0, settings.reach * unit, 201)
    ball_epsilon = epsilon / float(linear.reach(model.w, linear.Ball(1.0, settings.p)))
    delta = unit * np.array(settings.delta)
    map_delta = np.linspace(0, unit * max(1.0, *settings.delta), 101)
    ordinary = linear.rates(model, problem, linear.Ball(ball_epsilon, settings.p))
    strong, chart = (
        linear.rates(model, problem, linear.Strong(epsilon, limits[:, None], signal))
        for limits in (delta, map_delta)
    )
    arrays = {
        "w": model.w,
        "clean": np.asarray(ordinary.clean),
        "ordinary_epsilon": ball_epsilon,
        "ordinary_adversarial": ordinary.adversarial,
        "ordinary_robust": ordinary.robust,
        "epsilon": epsilon,
        "delta": delta,
        "strong_adversarial": strong.adversarial,
        "strong_robust": strong.robust,
        "map_delta": map_delta,
        "map_robust": chart.robust,
    }
    at = np.linspace(0, 200, settings.points + 1).round().astype(int)[1:]
    cases: list[tuple[dict[str, Any], linear.Threat]] = []
    for i in at:
        e = float(ball_epsilon[i])
        cases.append(
            ({"threat": "ordinary", "epsilon": e, "delta": None}, linear.Ball(e, settings.p))
        )
    for limit in map(float, delta):
        for e in map(float, epsilon[at]):
            label = {"threat": "strong", "epsilon": e, "delta": limit}
            cases.append((label, linear.Strong(e, limit, signal)))
    tasks = [
        (model, problem, threat, settings.samples, (settings.seed, 1 + index))
        for index, (_, threat) in enumerate(cases)
    ]
    with bar("simulate", len(tasks), "points") as show:
        drawn = in_parallel(_simulated, tasks, settings.jobs, show)
    rows = [label | row for (label, _), row in zip(cases, drawn, strict=True)]
    inside = sum(row[kind]["inside"] for row in rows for kind in KINDS)
    summary = {
        "cosine": float(model.w[0]),
        "bias": model.b,
        "clean": float(ordinary.clean),
        "inside": inside,
        "rates": len(KINDS) * len(rows),
    }
    table = Table(
        f"adversarial examples and robust error, formula and simulation; cos θ = {model.w[0]:.4f}, "
        f"clean error {_percent(float(ordinary.clean))} %; {inside} of {summary['rates']} "
        "simulated rates inside their 99.9 % intervals",
        ["threat", "ε\n[σ]", "δ\n[σ]", "adv.\n[%]", "simul.\n[%]", "robust\n[%]", "simul.\n[%]",
         "inside\n[of 3]"],
        [
            [
                row["threat"],
                f"{row['epsilon']:.4g}",
                "–" if row["delta"] is None else f"{row['delta']:.4g}",
                *(
                    _percent(value)
                    for kind in ("adversarial", "robust")
                    for value in (row[kind]["rate"], row[kind]["count"] / row["samples"])
                ),
                str(sum(row[kind]["inside"] for kind in KINDS)),
            ]
            for row in rows
        ],
    )  # fmt: skip
    figure = plots.adversarial_rates(arrays, rows)
    return Found("rates", rows, summary, arrays, figure, [table])


# ---------------------------------------------------------------- phase diagram


def phase(settings: Phase, bar: Bar) -> Found:
    """Numerical optima over the grid of radii, and the closed form where there is one."""
    d, unit, m = settings.d, settings.mean_norm, settings.cells
    mean = np.full(d, unit / np.sqrt(d))
    spectrum = np.geomspace(1, settings.condition, d)
    problem = linear.symmetric(mean, np.diag(spectrum / spectrum.mean()))
    # The middles of the cells, so that none lies on a border between phases.
    ratio = (np.arange(m) + 0.5) * settings.limit / m
    with bar("optima", m + m * m, "optima") as show:
        found = linear.phase_diagram(problem, ratio, ratio, on_cell=show)
    arrays = found._asdict()
    summary: dict[str, Any] = {}
    if settings.condition == 1:
        closed = linear.best_isotropic_error(unit, unit * ratio, unit * ratio[:, None])
        plain = linear.best_isotropic_error(unit, unit * ratio)
        arrays["closed_strong"] = closed
        arrays["closed_ordinary"] = np.broadcast_to(plain, closed.shape)
        gaps = [np.abs(arrays[name] - arrays[f"closed_{name}"]).max()
                for name in ("ordinary", "strong")]  # fmt: skip
        summary["largest_gap"] = float(max(gaps))
    names = ("no robust classifier", "robust in the strong sense only", "robust in both senses")
    rows = []
    for value, name in enumerate(names):
        chosen = found.phase == value
        rows.append(
            {
                "phase": name,
                "cells": int(chosen.sum()),
                "ordinary": _ends(found.ordinary[chosen]),
                "strong": _ends(found.strong[chosen]),
            }
        )
    gap = f"; largest |numerical − closed form|: {summary['largest_gap']:.1e}" if summary else ""
    table = Table(
        f"‖μ‖ = {unit:g} σ, radii up to {settings.limit:g} ‖μ‖{gap}",
        ["phase", "share of\ncells [%]", "least ordinary\nerror [%]", "least strong\nerror [%]"],
        [
            [
                row["phase"],
                _percent(row["cells"] / m**2),
                *("–" if not row[key] else " to ".join(map(_percent, row[key]))
                  for key in ("ordinary", "strong")),
            ]
            for row in rows
        ],
    )  # fmt: skip
    return Found("phase", rows, summary, arrays, plots.phase_diagram(arrays), [table])


def _ends(values: np.ndarray) -> list[float]:
    return [float(values.min()), float(values.max())] if values.size else []


# ---------------------------------------------------------------- trained SVMs


def svm(settings: Svm, bar: Bar) -> Found:
    """The grid of SVMs, and the predicted angle over n/d."""
    groups = [(norm, c) for norm in settings.mean_norm for c in settings.c]
    cases = [
        linear.SvmCase(n, d, norm, settings.epsilon * norm, settings.delta * norm, c, settings.loss)
        for d in settings.d
        for n in settings.n
        for norm, c in groups
    ]
    seeds = range(settings.seed, settings.seed + settings.seeds)
    with bar("SVMs", len(cases) * len(seeds), "SVMs") as show:
        rows = linear.svm_experiment(
            cases, seeds, samples=settings.samples, n_jobs=settings.jobs, on_row=show
        )
    ratios = [row["n"] / row["d"] for row in rows]
    line = np.geomspace(min(ratios) * 0.9, max(ratios) * 1.1, 25)
    lines = [  # for each d, since a prediction depends on C·n
        {
            "mean_norm": norm,
            "c": c,
            "d": d,
            "ratio": line,
            "cosine": np.array(
                [linear.svm_cosine(round(r * d), d, norm, c=c, loss=settings.loss) for r in line]
            ),
        }
        for norm, c in groups
        for d in settings.d
    ]
    table, inside = _svm_table(rows, len(seeds))
    summary = {"inside": inside, "rates": 6 * len(rows)}
    arrays = {
        key: np.array([row[key] for row in rows])
        for key in rows[0]
        if not isinstance(rows[0][key], str)
    }
    arrays["line_ratio"] = line
    arrays["line_cosine"] = np.array([row["cosine"] for row in lines])
    return Found("svm", rows, summary, arrays, plots.learned_classifiers(rows, lines), [table])


def _svm_table(rows: list[dict[str, Any]], seeds: int) -> tuple[Table, int]:
    """One line a setting, means over seeds; and how many counts lie in their intervals."""
    lines, total = [], 0
    for start in range(0, len(rows), seeds):
        group = rows[start : start + seeds]
        first, cosines = group[0], [row["cosine"] for row in group]
        inside = sum(
            row[f"{threat}_{kind}_interval"][0]
            <= row[f"{threat}_{kind}_count"]
            <= row[f"{threat}_{kind}_interval"][1]
            for row in group
            for threat in ("ordinary", "strong")
            for kind in KINDS
        )
        total += inside
        means = [np.mean([row[key] for row in group])
                 for key in ("ordinary_clean", "ordinary_robust", "strong_robust")]  # fmt: skip
        lines.append(
            [
                str(first["n"]),
                str(first["d"]),
                f"{first['mean_norm']:g}",
                f"{first['c']:g}",
                f"{np.mean(cosines):.3f}",
                f"{first['predicted_cosine']:.3f}",
                *(_percent(float(mean)) for mean in means),
                str(inside),
            ]
        )
    table = Table(
        "cos θ learned and predicted; clean, ordinary robust and strong robust error; means over "
        f"{seeds} training sets; {total} of {6 * len(rows)} simulated rates inside their 99.9 % "
        "intervals",
        ["n\n[pts]", "d\n[dim]", "‖μ‖\n[σ]", "C\n[1/σ²]", "cos θ\n[1]", "pred.\n[1]",
         "clean\n[%]", "ordin.\n[%]", "strong\n[%]", f"inside\n[of {6 * seeds}]"],
        lines,
    )  # fmt: skip
    return table, total


# ---------------------------------------------------------------- knowledge


class _Images(NamedTuple):
    """Images of two classes, the threat on them and what to call them."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    threat: linear.Strong
    title: str


def _images(settings: Knowledge) -> _Images | None:
    """The two classes of the data set, flat, and a threat in units of their distance."""
    if settings.data == "none":
        return None
    found = data.load(DataConfig(settings.data, settings.data_dir), settings.seed)
    for label in settings.classes:
        if not 0 <= label < found.num_classes:
            known = f"classes in 0…{found.num_classes - 1}"
            raise InputError("classes", expected=known, got=str(label))

    def of_classes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.isin(y, settings.classes)
        return x[chosen].reshape(int(chosen.sum()), -1).astype(np.float64), y[chosen]

    x, y = (part[: settings.train_size] for part in of_classes(found.x_train, found.y_train))
    first, second = (x[y == label].mean(0) for label in settings.classes)
    unit = float(np.linalg.norm(second - first)) / 2
    threat = linear.Strong(
        settings.epsilon * unit, settings.delta * unit, BASES[settings.basis](x, y)
    )
    name = Path(settings.data).name
    title = f"{name}, {settings.classes[0]} against {settings.classes[1]}: "
    title += f"ε = {float(threat.epsilon):.2g}, δ = {float(threat.delta):.2g}"
    return _Images(x, y, *of_classes(found.x_test, found.y_test), threat, title)


def knowledge(settings: Knowledge, bar: Bar) -> Found:
    """Errors against n/d on Gaussian classes, and accuracies on images of two classes."""
    d, unit = settings.d, settings.mean_norm
    images = _images(settings)  # first, since a file may be missing
    sizes = [2 * max(1, round(ratio * d / 2)) for ratio in settings.ratios]
    cases = [
        linear.SvmCase(n, d, unit, settings.epsilon * unit, settings.delta * unit, settings.c)
        for n in dict.fromkeys(sizes)
    ]
    seeds = range(settings.seed, settings.seed + settings.seeds)
    with bar("training sets", len(cases) * len(seeds), "sets") as show:
        rows = linear.knowledge_experiment(
            cases,
            seeds,
            penalty=settings.penalty,
            methods=settings.methods,
            n_jobs=settings.jobs,
            on_case=show,
        )
    real: list[dict[str, Any]] = []
    if images is not None:
        with bar("images", len(settings.methods), "SVMs") as show:
            for method in settings.methods:
                real += linear.knowledge_case(
                    *images[:5], c=settings.c, penalty=settings.penalty, methods=(method,)
                )
                show(len(real))
    limits = {
        "ordinary": float(linear.best_isotropic_error(unit, settings.epsilon * unit)),
        "strong": float(
            linear.best_isotropic_error(unit, settings.epsilon * unit, settings.delta * unit)
        ),
    }
    predicted = _predicted_errors(cases)
    ratios = np.array([case.n / d for case in cases])
    drawn: dict[str, Any] = limits | {"predicted_ratio": ratios, "predicted": predicted}
    figure = plots.knowledge(rows, drawn, real, images.title if images else "")
    tables = [_knowledge_table(rows, settings, limits)]
    if images is not None:
        tables.append(_images_table(real, images))
    keys = ("n", "seed", "cosine", "bias", "clean", "ordinary_robust", "strong_robust")
    arrays = {key: np.array([row[key] for row in rows]) for key in keys}
    arrays |= {"method": np.array([row["method"] for row in rows])}
    arrays |= {"predicted_ratio": ratios, "predicted_strong_robust": predicted}
    summary = {"least_error": limits, "images": real}
    return Found("knowledge", rows, summary, arrays, figure, tables)


def _predicted_errors(cases: Sequence[linear.SvmCase]) -> np.ndarray:
    """Strong robust error of the plain SVM, from its predicted angle and without a bias."""
    errors = []
    for case in cases:
        cosine = linear.svm_cosine(case.n, case.d, case.mean_norm, c=case.c, loss=case.loss)
        model = linear.LinearClassifier([cosine, np.sqrt(1 - cosine**2)])
        threat = linear.Strong(case.epsilon, case.delta, [1.0, 0.0])
        problem = linear.symmetric([case.mean_norm, 0.0])
        errors.append(float(linear.rates(model, problem, threat).robust))
    return np.array(errors)


def _knowledge_table(
    rows: list[dict[str, Any]], settings: Knowledge, limits: dict[str, float]
) -> Table:
    lines = []
    for n in dict.fromkeys(row["n"] for row in rows):
        for method in settings.methods:
            group = [row for row in rows if (row["n"], row["method"]) == (n, method)]
            means = [np.mean([row[key] for row in group])
                     for key in ("clean", "ordinary_robust", "strong_robust")]  # fmt: skip
            cosine = float(np.mean([row["cosine"] for row in group]))
            percents = [_percent(float(mean)) for mean in means]
            lines.append([method, f"{n / settings.d:g}", f"{cosine:.3f}", *percents])
    unit = settings.mean_norm
    return Table(
        f"Gaussian classes, d = {settings.d}, ‖μ‖ = {unit:g} σ, ε = {settings.epsilon * unit:g} σ, "
        f"δ = {settings.delta * unit:g} σ: clean, ordinary robust and strong robust error, means "
        f"over {settings.seeds} training sets; least of any classifier: ordinary "
        f"{_percent(limits['ordinary'])} %, strong {_percent(limits['strong'])} %",
        ["SVM", "n/d\n[pts/dim]", "cos θ\n[1]", "clean\n[%]", "ordinary\n[%]",
         "strong\n[%]"],
        lines,
    )  # fmt: skip


def _images_table(real: list[dict[str, Any]], images: _Images) -> Table:
    return Table(
        f"{images.title} pixel units; {len(images.x_train)} training, {len(images.x_test)} test "
        "images; natural, ordinary robust and strong robust accuracy, the robust ones without a "
        "pixel box, so at least that much with one; share of w in the signal",
        ["SVM", "natural\n[%]", "ordinary\n[%]", "strong\n[%]", "share\n[1]"],
        [
            [
                row["method"],
                *(_percent(row[f"{kind}_accuracy"]) for kind in ("natural", "ordinary", "strong")),
                f"{row['signal_share']:.3f}",
            ]
            for row in real
        ],
    )  # fmt: skip


# ---------------------------------------------------------------- run and save

STUDIES: dict[type, Callable[[Any, Bar], Found]] = {
    Rates: rates,
    Phase: phase,
    Svm: svm,
    Knowledge: knowledge,
}
"""What computes a study, by its settings."""


def output_folder(settings: Settings) -> Path:
    """Where `save` writes."""
    return settings.out or Path("runs") / f"linear-{type(settings).__name__.lower()}"


def run(settings: Settings, bar: Bar) -> Found:
    """Compute the study that the settings belong to.

    Raises:
        InputError: bad settings, missing or bad data files, or results that cannot be written.
    """
    files.check_folder("--out", output_folder(settings))
    files.check_output("--json", settings.json_file, ".json")
    return STUDIES[type(settings)](settings, bar)


def record(found: Found, settings: Settings) -> dict[str, Any]:
    """The study as JSON values: name, settings, summary, rows."""
    places = {field.name for field in dataclasses.fields(Files)}
    values = {k: value for k, value in dataclasses.asdict(settings).items() if k not in places}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    return {
        "study": found.name,
        "settings": plain,
        "summary": found.summary,
        "rows": found.rows,
    }


def save(found: Found, settings: Settings) -> list[Path]:
    """Write figure (.svg and .png) and arrays (.npz) into the folder, and the JSON file if asked.

    Returns:
        The paths: .svg, .npz, and .json where there is one.
    """
    folder = output_folder(settings)
    plots.save(found.figure, folder, found.name)
    files.save_arrays(folder / f"{found.name}.npz", found.arrays)
    paths = [folder / f"{found.name}{end}" for end in (".svg", ".npz")]
    if settings.json_file is not None:
        files.write_json(settings.json_file, record(found, settings))
        paths.append(settings.json_file)
    return paths
