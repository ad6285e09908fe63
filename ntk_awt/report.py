"""The HTML report, from the records of one or several run folders; nothing is computed again."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from ntk_awt import plots, verdicts
from ntk_awt.errors import InputError


def read_results(root: Path) -> dict[str, Any]:
    """`results.json` of a finished run.

    Raises:
        InputError: the folder holds no finished run.
    """
    path = root / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"run folder {root}",
            expected="a finished run with results.json",
            got=str(error),
            fix=f"finish it: ntk-awt run --config {root / 'config.toml'} --run-dir {root}",
        ) from None


def read_rows(root: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of one stage in a run's `metrics.jsonl`."""
    lines = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def draw(root: Path) -> dict[str, str]:
    """Draw every figure of a run from its records; returns the caption of each file name."""
    results = read_results(root)
    networks = results["networks"]
    arrays = {name: np.load(root / "evaluation" / f"{name}.npz") for name in networks}
    figures = {
        "dynamics": (
            plots.dynamics(read_rows(root, "dynamics")),
            "Distance to the dense network, and drift of the own kernel, on the fixed probe set "
            "of clean images and their fixed perturbed versions.",
        ),
        "training": (
            plots.training_curves(read_rows(root, "train")),
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
    searched = [row for row in read_rows(root, "ticket") if "relative_kernel_distance" in row]
    if search := [row for row in searched if row["network"] in networks]:
        figures["search"] = (
            plots.search(search),
            "The ticket search: both distances to the dense network on a held-out batch; kept is "
            "the network of the lowest objective.",
        )
    for name, (figure, _) in figures.items():
        plots.save(figure, root / "figures", name)
    return {name: caption for name, (_, caption) in figures.items()}


def embedded(path: Path) -> str:
    """An SVG file as the address of an image, so that the page needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def render(template: str, **values: Any) -> str:
    """A page from one of the package's templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ntk_awt"),
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
    path.write_text(text, encoding="utf-8")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(plots.compare(runs), path.parent, path.stem)
    picture = embedded(path.parent / f"{path.stem}.svg")
    text = render("compare.html", runs=runs, differing=differing, picture=picture)
    path.write_text(text, encoding="utf-8")
    return path


def write_sweep(
    root: Path,
    figures: Mapping[str, tuple[Figure, str]],
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
    path.write_text(text, encoding="utf-8")
    return path


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    tables = {key: value for key, value in config.items() if isinstance(value, dict)}
    flat = {key: value for key, value in config.items() if key not in tables}
    return flat | {f"{t}.{key}": v for t, table in tables.items() for key, v in table.items()}
