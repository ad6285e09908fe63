"""The HTML report, from the records of one or several run folders; nothing is computed again.

Who only reads records loads neither Matplotlib nor Jinja2.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_awt import files
from ntk_awt.app import plots, verdicts
from ntk_awt.errors import InputError, check_name, check_structure, choose

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EVALUATE = "delete it and run again: the network is evaluated anew"
_REMOVE = "remove the line, or take the file from a copy"

_NUMBER = int | float
_LAYER = {"name": str, "shape": [int], "kept": int, "density": _NUMBER, "gain": _NUMBER}
_LAYER |= {"dead_inputs": int, "dead_outputs": int}
_ATTACK = {"suite": str, "attack": str, "attacked": int, "survived": int}
_ATTACK |= {"robust_accuracy": _NUMBER, "robust_interval": (_NUMBER, _NUMBER)}
_FLAG = dict.fromkeys(("name", "unit", "status", "meaning"), str)
_FLAG |= {"value": _NUMBER, "limit": _NUMBER}
_HYGIENE = {"flags": [_FLAG], "images": int}
_HYGIENE |= {key: [(_NUMBER, _NUMBER)] for key in ("radii", "steps")}
_OUTCOME = {
    "natural_accuracy": _NUMBER,
    "natural_interval": (_NUMBER, _NUMBER),
    "robust_accuracy": _NUMBER,
    "robust_interval": (_NUMBER, _NUMBER),
    "attacks": [_ATTACK],
    "hygiene": _HYGIENE,
}
_DISTANCES = ("kernel_distance", "relative_kernel_distance", "dynamics_gap")

ROW = {"stage": str, "network": str, "step": int}
"""What every row of `metrics.jsonl` has (`errors.check_structure`)."""

STAGES: dict[str, dict[str, Any]] = {
    "ticket": {"seconds": _NUMBER},
    "train": dict.fromkeys(
        ("epoch", "loss", "accuracy", "validation_natural", "validation_robust", "seconds"), _NUMBER
    ),
    "dynamics": dict.fromkeys((*_DISTANCES, "relative_gap", "kernel_drift"), _NUMBER),
    "evaluate": _OUTCOME | {"seconds": _NUMBER},
}
"""What the rows of each stage have beside that."""

RESULTS = {
    "networks": {
        str: _OUTCOME
        | {"density": _NUMBER, "layers": [_LAYER]}
        | dict.fromkeys((*_DISTANCES, "target_distance", "relative_target_distance"), _NUMBER)
    },
    "config": {
        "model": {"name": str},
        "data": {"name": str},
        "threat": {"name": str, "epsilon": _NUMBER},
        "train": {"loss": str, "epochs": int},
    },
    "seed": int,
    "data_digest": str,
    "versions": {str: str, "device": str, "jax": str},
    "seconds": {str: _NUMBER},
}
"""What `results.json` has."""


def read_results(root: Path) -> dict[str, Any]:
    """`results.json` of a finished run.

    Raises:
        InputError: the folder holds no finished run.
    """
    fix = f"finish it: ntk-awt run --config {root / 'config.toml'} --run-dir {root}"
    files.check_tree(root)
    path = root / "results.json"
    found = files.read_json(f"run folder {root}, results.json", path, fix=fix)
    check_structure("results.json", found, RESULTS)
    if not found["networks"]:
        raise InputError("results.json", expected="one network or more", got="none", fix=fix)
    for name, values in found["networks"].items():
        check_name("network in results.json", name)
        for part in ("natural", "robust"):
            value, (low, high) = values[f"{part}_accuracy"], values[f"{part}_interval"]
            if not 0 <= low <= value <= high <= 1:
                raise InputError(
                    f"results.json.networks.{name}",
                    expected=f"{part}_accuracy inside {part}_interval, inside [0, 1]",
                    got=f"{value} and [{low}, {high}]",
                    fix=fix,
                )
    return found


def read_rows(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, or those of one stage.

    A last line without an end was cut by a kill and is left out; what it said is said again on
    resuming.

    Raises:
        InputError: a line that is no row.
    """
    rows, lines = [], path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        what = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputError(what, expected="JSON", got=str(error), fix=_REMOVE) from None
        check_structure(what, row, ROW)
        choose(f"{what}: stage", row["stage"], STAGES)
        check_structure(what, row, STAGES[row["stage"]])
        rows.append(row)
    return [row for row in rows if stage in (None, row["stage"])]


def draw(root: Path) -> dict[str, str]:
    """Draw every figure of a run from its records; returns the caption of each file name."""
    results = read_results(root)
    networks = results["networks"]
    arrays = {name: _evaluation(root, name) for name in networks}
    records = root / "metrics.jsonl"
    if not records.is_file():
        raise InputError(f"run folder {root}", expected="its records metrics.jsonl", got="none")
    figures = {
        "dynamics": (
            plots.dynamics(read_rows(records, "dynamics")),
            "Distance to the dense network, and drift of the own kernel, on the fixed probe set "
            "of clean images and their fixed perturbed versions.",
        ),
        "training": (
            plots.training_curves(read_rows(records, "train")),
            "Training loss (under attack, if the loss attacks) and validation accuracy.",
        ),
        "accuracy": (
            plots.accuracies(networks),
            "Test accuracy with 95 % Clopper–Pearson intervals over the test images.",
        ),
        "robustness": (
            plots.robustness({name: values["hygiene"] for name, values in networks.items()}),
            "Accuracy under the run's first attack, against its radius (at the steps of the "
            "evaluation) and against its steps (at the threat model's radius).",
        ),
        "density": (plots.layer_densities(networks), "Density of each layer."),
        "examples": (
            plots.examples(arrays),
            "First test images, and the attacked version for each network.",
        ),
    }
    searched = [row for row in read_rows(records, "ticket") if "relative_kernel_distance" in row]
    if search := [row for row in searched if row["network"] in networks]:
        check_structure("searches", search, [{"relative_target_distance": _NUMBER}])
        figures["search"] = (
            plots.search(search),
            "The ticket search: both distances to the dense network on a held-out batch; kept is "
            "the network of the lowest objective.",
        )
    for name, (figure, _) in figures.items():
        plots.save(figure, root / "figures", name)
    return {name: caption for name, (_, caption) in figures.items()}


def _evaluation(root: Path, name: str) -> dict[str, np.ndarray]:
    path = root / "evaluation" / f"{name}.npz"
    wanted: dict[str, Any] = dict.fromkeys(("natural_correct", "robust_correct"), ("b", (None,)))
    wanted |= dict.fromkeys(("clean", "examples"), ("f", (None, None, "*")))
    wanted["labels"] = ("iu", (None,))
    found = files.load_arrays(path, wanted, fix=_EVALUATE)
    n, shape = len(found["labels"]), found["clean"].shape
    if shape != found["examples"].shape or len(shape) > 4 or not 0 < n == len(found["clean"]):
        raise InputError(
            f"file {path}",
            expected="examples [n, *shape] like clean, of labels [n]",
            got=f"shapes {found['examples'].shape}, {shape} and {(n,)}",
            fix=_EVALUATE,
        )
    if min(len(found["natural_correct"]), len(found["robust_correct"])) < n:
        raise InputError(f"file {path}", expected=f"flags of {n} images", got="fewer")
    return found


def embedded(path: Path) -> str:
    """An SVG file as the address of an image, so that the page needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def render(template: str, **values: Any) -> str:
    """A page from one of the package's templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ntk_awt.app.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write(root: Path) -> Path:
    """Draw a run's figures and write its self-contained `report.html`.

    Args:
        root: a finished run's folder.

    Returns:
        The report's path.

    Raises:
        InputError: the run is not finished.
    """
    figures = [
        (name, caption, embedded(root / "figures" / f"{name}.svg"))
        for name, caption in draw(root).items()
    ]
    path, results = root / "report.html", read_results(root)
    text = render(
        "report.html",
        name=root.absolute().name,
        results=results,
        verdicts=verdicts.of_run(results).values(),
        checks=_checks(results["networks"]),
        figures=figures,
    )
    files.write_text(path, text)
    return path


def _checks(networks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The hygiene checks, each with the flags of all networks (None where it was not made)."""
    tables = [
        {flag["name"]: flag for flag in values["hygiene"]["flags"]} for values in networks.values()
    ]
    known = {name: flag for table in tables for name, flag in table.items()}
    return [
        {key: flag[key] for key in ("name", "unit", "meaning")}
        | {"flags": [table.get(name) for table in tables]}
        for name, flag in known.items()
    ]


def compare(roots: list[Path], path: Path) -> Path:
    """Write one page that compares several finished runs.

    Args:
        roots: run folders.
        path: of the page.

    Returns:
        `path`.

    Raises:
        InputError: a run that is not finished, or two folders of the same name.
    """
    runs: Mapping[str, Any] = {root.absolute().name: read_results(root) for root in roots}
    if len(runs) != len(roots):
        raise InputError("run folders", expected="different names", got=", ".join(map(str, roots)))
    flat = {name: _flat(results["config"]) for name, results in runs.items()}
    settings = dict.fromkeys(key for values in flat.values() for key in values)
    differing = {
        key: [values.get(key, "") for values in flat.values()]
        for key in settings
        if len({str(values.get(key, "")) for values in flat.values()}) > 1
    }
    plots.save(plots.compare(runs), path.parent, path.stem)
    picture = embedded(path.parent / f"{path.stem}.svg")
    text = render("compare.html", runs=runs, differing=differing, picture=picture)
    files.write_text(path, text)
    return path


def write_sweep(
    root: Path,
    figures: Mapping[str, tuple["Figure", str]],
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    found: Mapping[str, Any],
    judged: Sequence[verdicts.Verdict],
) -> Path:
    """Save a sweep's figures and write its self-contained `sweep.html`.

    Args:
        root: the sweep's folder.
        figures: figure and caption by file name.
        headers, rows: of the table, as text.
        found: the content of `sweep.json`.
        judged: the verdict of every network, density and seed.

    Returns:
        The page's path.
    """
    pictures = []
    for name, (figure, caption) in figures.items():
        plots.save(figure, root / "figures", name)
        pictures.append((name, caption, embedded(root / "figures" / f"{name}.svg")))
    path = root / "sweep.html"
    text = render(
        "sweep.html",
        name=root.absolute().name,
        headers=headers,
        rows=rows,
        found=found,
        judged=verdicts.count(judged),
        verdicts=judged,
        settings=_flat(found["config"]),
        figures=pictures,
    )
    files.write_text(path, text)
    return path


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    tables = {key: value for key, value in config.items() if isinstance(value, dict)}
    flat = {key: value for key, value in config.items() if key not in tables}
    return flat | {f"{t}.{key}": v for t, table in tables.items() for key, v in table.items()}
