"""Many runs as one experiment: networks × densities × seeds, resumable, gathered in one page.

A sweep is a run's config file with one more table:

    [sweep]
    densities = [0.03, 0.1]
    seeds = [0, 1, 2]
    [sweep.quick]            # what `--quick` changes: densities, seeds, settings of the run
    seeds = [0]
    train = {epochs = 2}

Its folder holds a run folder for each density and seed, and what is gathered from them:

    density-0.03/seed-0/     a run, see `experiment.py`
    sweep.json               mean and standard deviation over seeds of every network and density
    sweep.md                 the same as a table
    figures/, sweep.html     pictures of the above

The dense network does not depend on the density: it is trained once a seed.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from ntk_awt import files
from ntk_awt.app import config as configs
from ntk_awt.app import names as methods
from ntk_awt.app import plots, verdicts
from ntk_awt.app.config import RunConfig
from ntk_awt.app.report import page as report
from ntk_awt.app.run import stages as experiment
from ntk_awt.app.run.stages import Paths, Reporter, Run
from ntk_awt.app.verdicts import Verdict
from ntk_awt.errors import InputError, check_number, choose

BASELINE = "random"
"""Other networks are compared with this one of the same density and seed."""

RESAMPLES = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class SweepConfig:
    """Densities, seeds, and the settings that all runs share."""

    densities: tuple[float, ...]
    seeds: tuple[int, ...]
    base: RunConfig

    def __post_init__(self):
        for name in ("densities", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise InputError(
                    f"sweep.{name}", expected="one or more, each once", got=repr(list(values))
                )
        for density in self.densities:
            check_number("sweep.densities", density, low=0, high=1, low_open=True)
        for seed in self.seeds:
            check_number("sweep.seeds", seed, low=0, high=2**32 - 1)
        places = [folder(Path(), density, 0) for density in self.densities]
        if len(set(places)) != len(places):
            raise InputError(
                "sweep.densities", expected="six digits at most", got=repr(list(self.densities))
            )

    def run(self, density: float, seed: int) -> RunConfig:
        """The settings of one run."""
        return replace(self.base, seed=seed, mask=replace(self.base.mask, density=density))


def load(path: Path, *, quick: bool = False) -> SweepConfig:
    """Read a sweep's config file.

    Args:
        path: TOML.
        quick: apply the table `sweep.quick`.

    Raises:
        InputError: unknown or ill-typed settings, no densities or seeds, no table `sweep.quick`.
    """
    values = configs.read(path)
    if "sweep" not in values:
        fix = f"a single run is: ntk-awt run --config {path}"
        raise InputError(f"config file {path}", expected="a table [sweep]", got="none", fix=fix)
    grid = configs.convert(values.pop("sweep"), dict[str, Any], f"{path.name}.sweep")
    changes = grid.pop("quick", None)
    if quick:
        if changes is None:
            raise InputError(
                f"{path.name} with --quick", expected="a table [sweep.quick]", got="none"
            )
        changes = configs.convert(changes, dict[str, Any], f"{path.name}.sweep.quick")
        grid |= {name: changes[name] for name in ("densities", "seeds") if name in changes}
        rest = {name: v for name, v in changes.items() if name not in ("densities", "seeds")}
        for name, change in rest.items():
            before = values.get(name)
            tables = isinstance(change, dict) and isinstance(before, dict)
            values[name] = dict(before or {}) | change if tables else change
    for name in grid:
        choose(f"setting in {path.name}, sweep", name, ("densities", "seeds"))
    kinds = {"densities": tuple[float, ...], "seeds": tuple[int, ...]}
    lists = {}
    for name, kind in kinds.items():
        if name not in grid:
            raise InputError(f"{path.name}.sweep.{name}", expected="a list", got="none")
        lists[name] = configs.convert(grid[name], kind, f"{path.name}.sweep.{name}")
    return SweepConfig(**lists, base=configs.from_dict(values, where=path.name))


# ---------------------------------------------------------------- running


def folder(root: Path, density: float, seed: int) -> Path:
    """Of one run."""
    return root / f"density-{density:g}" / f"seed-{seed}"


@dataclass(frozen=True)
class _Cell:
    """A reporter whose bars name the cell of the sweep."""

    reporter: Reporter
    name: str

    def bar(
        self, label: str, total: int, unit: str
    ) -> AbstractContextManager[Callable[[int], None]]:
        """See `Reporter.bar`."""
        return self.reporter.bar(f"{self.name} {label}", total, unit)


def run(config: SweepConfig, root: Path, reporter: Reporter) -> dict[str, Any]:
    """Run whatever is not done yet, then gather; returns the content of `sweep.json`.

    Args:
        config: the grid.
        root: the sweep's folder.
        reporter: shows progress.

    Raises:
        InputError: unknown names in the config, or what a run raises.
    """
    for density in config.densities:
        experiment.check_names(config.run(density, config.seeds[0]))
    files.check_folder("sweep folder", root)
    files.check_tree(root)
    cells = [(density, seed) for seed in config.seeds for density in config.densities]
    with reporter.bar("sweep", len(cells), "runs") as show:
        for done, (density, seed) in enumerate(cells):
            show(done)
            at = folder(root, density, seed)
            cell = f"[{done + 1}/{len(cells)} density {density:g} seed {seed}]"
            current = Run(config.run(density, seed), at, _Cell(reporter, cell))
            for other in config.densities:
                adopt_dense(current, Paths(folder(root, other, seed)))
            current.run()
        show(len(cells))
    return gather(config, root)


def adopt_dense(current: Run, other: Paths) -> None:
    """Take the trained dense network of a finished run that differs in density alone.

    Does nothing if the other run has none, or if this one has its own.
    """
    names = ("ticket", "trained", "evaluation")
    here, there = ([getattr(paths, n)("dense") for n in names] for paths in (current.paths, other))
    if any(path.exists() for path in here) or not all(path.exists() for path in there):
        return
    rows = experiment.Log(other.metrics).rows
    current.log.add([row for row in rows if row["network"] == "dense"])
    first = other.dynamics("dense", 1).parent
    shutil.copytree(first, current.paths.dynamics("dense", 1).parent, dirs_exist_ok=True)
    for source, target in zip(there, here, strict=True):  # the files that say "done" come last
        files.replace(target, lambda path, source=source: shutil.copy2(source, path))


# ---------------------------------------------------------------- gathering


class Summary(NamedTuple):
    """Mean and standard deviation over seeds.

    Attributes:
        mean: over n seeds.
        sd: sample standard deviation; NaN for one seed.
        n: number of seeds.
    """

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        spread = "" if np.isnan(self.sd) else f" ± {self.sd:.3g}"
        return f"{self.mean:.4g}{spread}"


def summary(values: Sequence[float]) -> Summary:
    """Mean ± standard deviation of some seeds' values.

    Example:
        >>> print(summary([1.0, 2.0, 3.0]))
        2 ± 1
    """
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return Summary(float(np.mean(values)), sd, len(values))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])


def rank_correlation(a: ArrayLike, b: ArrayLike) -> dict[str, float]:
    """Spearman's rank correlation with a bootstrap interval (percentiles, 95 %).

    Args:
        a, b: one value a network, of the same length.

    Returns:
        value, low, high, n; NaN where there are fewer than three networks or no spread.

    Example:
        >>> rank_correlation([1, 2, 3, 4], [2, 4, 6, 8])["value"]
        1.0
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    nothing = {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": len(x)}
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return nothing
    rng = np.random.default_rng(0)
    found = []
    for rows in rng.integers(0, len(x), (RESAMPLES, len(x))):
        if np.ptp(x[rows]) > 0 and np.ptp(y[rows]) > 0:
            found.append(_spearman(x[rows], y[rows]))
    low, high = np.quantile(found, (0.025, 0.975)) if found else (np.nan, np.nan)
    return {"value": _spearman(x, y), "low": float(low), "high": float(high), "n": len(x)}


MEASURES = (
    "natural_accuracy",
    "robust_accuracy",
    "dynamics_gap",
    "relative_kernel_distance",
    "relative_target_distance",
    "search_seconds",
    "search_epochs",
)
"""What is summarised over seeds; search_epochs: the search's time in epochs of dense training."""


def search_cost(results: Mapping[str, Any], config: RunConfig, name: str) -> dict[str, float]:
    """Seconds that finding a network took, compilation included, and dense-epoch equivalents.

    A pipeline's cost has the training of the dense network that it starts from.

    Args:
        results: of the run.
        config: of the run.
        name: of the network in the config.
    """
    label = methods.network_label(name)
    seconds = results["seconds"].get(f"ticket.{label}", 0.0)
    if "train.dense" not in results["seconds"]:
        raise InputError("seconds in results.json", expected="the entry train.dense", got="none")
    epoch = results["seconds"]["train.dense"] / config.train.epochs
    dense = config.train.epochs if methods.resolve(config, name).kind == "pipeline" else 0
    return {"search_seconds": seconds + dense * epoch, "search_epochs": seconds / epoch + dense}


def collect(config: SweepConfig, root: Path) -> list[dict[str, Any]]:
    """One row for each network of each finished run: density, seed, network and its numbers."""
    rows = []
    names = {methods.network_label(name): name for name in config.base.networks}
    for density in config.densities:
        for seed in config.seeds:
            results = report.read_results(folder(root, density, seed))
            settings = config.run(density, seed)
            for name, values in results["networks"].items():
                choose(f"network in results.json of {folder(root, density, seed)}", name, names)
                cost = search_cost(results, settings, names[name])
                row = {"network": name, "target_density": density, "seed": seed}
                rows.append(row | values | cost)
    return rows


def judge(config: SweepConfig, root: Path) -> list[Verdict]:
    """The verdict of every network, density and seed; of the dense network, which has no density,
    one a seed.

    Args:
        config: the grid.
        root: the finished sweep's folder.
    """
    found: dict[str, Verdict] = {}
    for density in config.densities:
        for seed in config.seeds:
            results = report.read_results(folder(root, density, seed))
            dense = verdicts.of_run(results)["dense"]
            others = verdicts.of_run(results, f"density {density:g}, ")
            for one in (dense, *(others[name] for name in others if name != "dense")):
                found[one.name] = one
    return list(found.values())


def gather(config: SweepConfig, root: Path) -> dict[str, Any]:
    """Write `sweep.json`, `sweep.md`, the figures and `sweep.html` of a finished sweep.

    Args:
        config: the grid.
        root: the sweep's folder.

    Returns:
        The content of `sweep.json`.

    Raises:
        InputError: a run that is not finished.
    """
    rows = collect(config, root)
    networks = list(dict.fromkeys(row["network"] for row in rows))
    table = []
    for density in config.densities:
        for name in networks:
            own = _of(rows, density, name)
            table.append(
                {
                    "network": name,
                    "density": density,
                    "failed_checks": sum(
                        verdicts.verdict(name, row["hygiene"]["flags"]).status == "failed"
                        for row in own
                    ),
                    **{m: summary([row[m] for row in own])._asdict() for m in MEASURES},
                    "robust_against_random": _paired(rows, density, name, "robust_accuracy"),
                    "gap_against_random": _paired(rows, density, name, "dynamics_gap"),
                }
            )
    found = {
        "table": table,
        "correlations": {
            f"{density:g}": _correlations(rows, density) for density in config.densities
        },
        "seeds": list(config.seeds),
        "config": configs.to_dict(config.base),
        "versions": files.versions(),
    }
    files.write_json(root / "sweep.json", _strict(found))
    files.write_text(root / "sweep.md", markdown(found))
    _draw(config, root, rows, found)
    return found


def _strict(value: Any) -> Any:
    """What is not finite as null: JSON has no NaN, and one seed has no standard deviation."""
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _of(rows: list[dict[str, Any]], density: float, name: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["target_density"], row["network"]) == (density, name)]


def _paired(
    rows: list[dict[str, Any]], density: float, name: str, measure: str
) -> dict[str, float] | None:
    """Mean difference to the random mask of the same seed, and its standard error."""
    if name in (BASELINE, "dense"):
        return None
    pairs = [
        row[measure] - other[measure]
        for row in _of(rows, density, name)
        for other in _of(rows, density, BASELINE)
        if row["seed"] == other["seed"]
    ]
    if not pairs:
        return None
    found = summary(pairs)
    return {"mean": found.mean, "standard_error": found.sd / found.n**0.5, "n": found.n}


PAIRS = (
    ("relative_kernel_distance", "dynamics_gap"),
    ("relative_kernel_distance", "robust_accuracy"),
    ("relative_target_distance", "dynamics_gap"),
    ("relative_target_distance", "robust_accuracy"),
    ("dynamics_gap", "robust_accuracy"),
)
"""What is related to what, over all masks of one density."""


def _correlations(rows: list[dict[str, Any]], density: float) -> dict[str, dict[str, float]]:
    own = [r for r in rows if r["target_density"] == density and r["network"] != "dense"]
    return {
        f"{a} ~ {b}": rank_correlation([r[a] for r in own], [r[b] for r in own]) for a, b in PAIRS
    }


HEADERS = (
    "density",
    "network",
    "natural [%]",
    "robust [%]",
    "failed checks [seeds]",
    "robust − random [points ± s.e.]",
    "gap [logits]",
    "gap − random [± s.e.]",
    "kernel distance [rel.²]",
    "target distance [rel.²]",
    "search [s]",
    "search [dense epochs]",
)


def table_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The table of `sweep.json` as text, one list of cells a row, in the order of `HEADERS`."""

    def paired(value: Mapping[str, float] | None, scale: float) -> str:
        if value is None:
            return "–"
        error = f" ± {scale * value['standard_error']:.2g}" if value["n"] > 1 else ""
        return f"{scale * value['mean']:+.3g}{error}"

    rows = []
    for row in found["table"]:
        percent = [
            Summary(100 * row[m]["mean"], 100 * row[m]["sd"], row[m]["n"])
            for m in ("natural_accuracy", "robust_accuracy")
        ]
        cells = {m: Summary(**row[m]) for m in MEASURES[2:]}
        rows.append(
            [
                f"{row['density']:g}" if row["network"] != "dense" else "1",
                row["network"],
                *map(str, percent),
                f"{row['failed_checks']} of {percent[0].n}",
                paired(row["robust_against_random"], 100),
                str(cells["dynamics_gap"]),
                paired(row["gap_against_random"], 1),
                str(cells["relative_kernel_distance"]),
                str(cells["relative_target_distance"]),
                f"{cells['search_seconds'].mean:.1f}",
                f"{cells['search_epochs'].mean:.2f}",
            ]
        )
    return rows


def markdown(found: Mapping[str, Any]) -> str:
    """The table as Markdown, with what its numbers are."""
    lines = [" | ".join(HEADERS), " | ".join("---" for _ in HEADERS)]
    lines += [" | ".join(row) for row in table_rows(found)]
    seeds = len(found["seeds"])
    note = (
        f"Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}; failed checks: seeds of "
        "which a hygiene rule fails."
    )
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{note}\n"


def _draw(
    config: SweepConfig, root: Path, rows: list[dict[str, Any]], found: Mapping[str, Any]
) -> None:
    steps = [
        row | {"density": density, "seed": seed}
        for density in config.densities
        for seed in config.seeds
        for row in report.read_rows(Paths(folder(root, density, seed)).metrics, "dynamics")
    ]
    figures = {
        "accuracy": (
            plots.sweep_accuracy(found["table"]),
            "Test accuracy against density, mean ± standard deviation over seeds.",
        ),
        "gap": (
            plots.sweep_steps(steps, "dynamics_gap"),
            "Distance to the dense network's outputs on the probe set while training, mean over "
            "seeds.",
        ),
        "kernel": (
            plots.sweep_steps(steps, "relative_kernel_distance"),
            "Distance to the dense network's kernel on the probe set while training, mean over "
            "seeds.",
        ),
        "relations": (
            plots.relations(rows, PAIRS),
            "Distance at initialisation, dynamics gap and robust accuracy of every mask and seed.",
        ),
    }
    report.write_sweep(root, figures, HEADERS, table_rows(found), found, judge(config, root))
