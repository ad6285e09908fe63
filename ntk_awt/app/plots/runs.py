"""Figures of runs and sweeps, from rows of `metrics.jsonl`, `results.json` or saved arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntk_awt.app.plots.style import (
    Rows,
    colors,
    legend_beside,
    line_styles,
    markers,
    networks_of,
    new_figure,
)

__all__ = [
    "accuracies",
    "compare",
    "dynamics",
    "examples",
    "layer_densities",
    "panels",
    "relations",
    "robustness",
    "search",
    "sweep_accuracy",
    "sweep_steps",
    "training_curves",
]


def _lines(ax: Axes, rows: Rows, key: str, *, marked: bool = True, **style: Any) -> None:
    for network, own in line_styles(networks_of(rows), size=3).items():
        points = [(row["step"], row[key]) for row in rows if row["network"] == network]
        look = own if marked else {"color": own["color"]}
        ax.plot(*zip(*points, strict=True), label=network, **look, **style)


def training_curves(rows: Rows) -> Figure:
    """Training loss, and natural and robust validation accuracy, against the step.

    Args:
        rows: of stage "train", with loss [nats] and accuracies in [0, 1].
    """
    figure, (loss, accuracy) = new_figure(2)
    _lines(loss, rows, "loss", marked=False)
    loss.set(xlabel="step", ylabel="training loss [nats]", yscale="log")
    _lines(accuracy, rows, "validation_natural", marked=False, linestyle="--")
    _lines(accuracy, rows, "validation_robust", marked=False)
    accuracy.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1))
    accuracy.set_title("dashed: natural, solid: robust", fontsize=9)
    legend_beside(figure, loss)
    return figure


def dynamics(rows: Rows) -> Figure:
    """Dynamics gap, kernel distance to the dense network, and kernel drift, against the step.

    Args:
        rows: of stage "dynamics".
    """
    figure, (gap, distance, drift) = new_figure(3)
    sparse = [row for row in rows if row["network"] != "dense"]
    if sparse:
        _lines(gap, sparse, "dynamics_gap")
        _lines(distance, sparse, "relative_kernel_distance")
        distance.set_yscale("log")
    _lines(drift, rows, "kernel_drift")
    gap.set(xlabel="step", ylabel="dynamics gap  ‖$f^d_t - f^s_t$‖ / √N  [logits]")
    distance.set(xlabel="step", ylabel="‖$Θ^d_t - Θ^s_t$‖² / ‖$Θ^d_t$‖²")
    drift.set(xlabel="step", ylabel="own drift  ‖$Θ_t - Θ_0$‖² / ‖$Θ_0$‖²")
    legend_beside(figure, drift)
    return figure


def search(rows: Rows) -> Figure:
    """Relative kernel and target distance on the held-out batch, against the search step.

    Args:
        rows: of stage "ticket", of the networks that were searched for.
    """
    figure, axes = new_figure(2)
    names = dict.fromkeys(row["network"] for row in rows)
    for ax, (key, label) in zip(
        axes,
        (
            ("relative_kernel_distance", "kernel: ‖$Θ^d - Θ^s$‖² / ‖$Θ^d$‖²"),
            ("relative_target_distance", "target: ‖$f^d - f^s$‖² / ‖$f^d$‖²"),
        ),
        strict=True,
    ):
        for name in names:
            own = [row for row in rows if row["network"] == name]
            ax.plot([row["step"] for row in own], [row[key] for row in own], marker=".", label=name)
        ax.set(xlabel="search step", ylabel=f"{label} (held out)", yscale="log")
    legend_beside(figure, axes[0])
    return figure


def sweep_accuracy(table: Rows) -> Figure:
    """Natural and robust test accuracy against density, with standard deviations over seeds.

    Args:
        table: of `sweep.json`: network, density, natural_accuracy and robust_accuracy with mean
            and sd.
    """
    figure, axes = new_figure(2)
    styles = line_styles(networks_of(table), size=4)
    for ax, part in zip(axes, ("natural", "robust"), strict=True):
        for network, style in styles.items():
            own = sorted(
                (row for row in table if row["network"] == network), key=lambda r: r["density"]
            )
            x = [row["density"] for row in own]
            y, sd = (np.array([row[f"{part}_accuracy"][k] for row in own]) for k in ("mean", "sd"))
            if network == "dense":
                ax.axhspan(y[0] - np.nan_to_num(sd[0]), y[0] + np.nan_to_num(sd[0]), alpha=0.15)
                ax.axhline(y[0], color=style["color"], label=network)
            else:
                bars = np.nan_to_num(sd)
                ax.errorbar(x, y, bars, capsize=2, label=network, **style)
        ax.set(xlabel="density", ylabel=f"{part} accuracy", xscale="log")
    legend_beside(figure, axes[1])
    return figure


def sweep_steps(rows: Rows, key: str) -> Figure:
    """A quantity of the dynamics against the step, mean over seeds, one plot a density.

    Args:
        rows: of stage "dynamics", each with its density and seed.
        key: dynamics_gap or relative_kernel_distance.
    """
    densities = list(dict.fromkeys(row["density"] for row in rows))
    figure, axes = new_figure(len(densities), height=3.8)
    styles = line_styles(networks_of(rows), size=4)
    labels = {
        "dynamics_gap": "‖$f^d_t - f^s_t$‖ / √N  [logits]",
        "relative_kernel_distance": "‖$Θ^d_t - Θ^s_t$‖² / ‖$Θ^d_t$‖²",
    }
    for ax, density in zip(axes, densities, strict=True):
        for network, style in styles.items():
            values: dict[int, list[float]] = {}
            for row in rows:
                if (row["network"], row["density"]) == (network, density) and network != "dense":
                    values.setdefault(row["step"], []).append(row[key])
            if values:
                means = [np.mean(values[step]) for step in values]
                ax.plot(list(values), means, label=network, **style)
        ax.set_title(f"density {density:g}", fontsize=10)
        ax.set(xlabel="step", ylabel=labels[key], yscale="log")
    legend_beside(figure, axes[0])
    return figure


def relations(rows: Rows, pairs: Sequence[tuple[str, str]]) -> Figure:
    """Pairs of measures of all masks and seeds against each other.

    Args:
        rows: one a mask and seed, with network, target_density and the measures.
        pairs: names of the measures to plot against each other.
    """
    figure, axes = new_figure(len(pairs), height=3.6)
    sparse = [row for row in rows if row["network"] != "dense"]
    palette, shapes = colors(networks_of(sparse)), markers(networks_of(sparse))
    densities = list(dict.fromkeys(row["target_density"] for row in sparse))
    for ax, (first, second) in zip(axes, pairs, strict=True):
        for network, color in palette.items():
            own = [row for row in sparse if row["network"] == network]
            ax.scatter(
                [row[first] for row in own],
                [row[second] for row in own],
                s=[14 * (1 + densities.index(row["target_density"])) for row in own],
                color=color,
                marker=shapes[network],
                label=network,
            )
        ax.set(xlabel=first.replace("_", " "), ylabel=second.replace("_", " "), xscale="log")
        if second == "dynamics_gap":
            ax.set_yscale("log")
    if len(densities) > 1:
        sizes = ", ".join(f"{density:g}" for density in densities)
        figure.suptitle(f"small to large: density {sizes}", fontsize=9)
    legend_beside(figure, axes[0])
    return figure


def panels(rows: Rows) -> Figure:
    """Plots side by side, each with its own lines: measured, bound (dashed) or reference (dotted).

    Args:
        rows: one a plot, with title, xlabel, ylabel, xscale, yscale and lines; a line has label, x,
            y and kind.
    """
    figure, axes = new_figure(len(rows), height=3.6)
    styles: dict[str, dict[str, Any]] = {
        "measured": {"marker": ".", "linestyle": "-"},
        "bound": {"linestyle": "--"},
        "reference": {"linestyle": ":"},
    }
    for ax, row in zip(axes, rows, strict=True):
        for line in row["lines"]:
            ax.plot(line["x"], line["y"], label=line["label"], **styles[line["kind"]])
        ax.set_title(row["title"], fontsize=10)
        ax.set(
            xlabel=row["xlabel"], ylabel=row["ylabel"], xscale=row["xscale"], yscale=row["yscale"]
        )
        ax.legend(frameon=False, fontsize=8)
    return figure


def layer_densities(networks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Density of each layer of each sparse network.

    Args:
        networks: `results["networks"]`.
    """
    figure, (ax,) = new_figure(1)
    sparse = {name: values for name, values in networks.items() if values["density"] < 1}
    palette = colors(list(sparse))
    width = 0.8 / max(len(sparse), 1)
    for i, (name, values) in enumerate(sparse.items()):
        layers = values["layers"]
        at = np.arange(len(layers)) + (i - (len(sparse) - 1) / 2) * width
        ax.bar(at, [row["density"] for row in layers], width, color=palette[name], label=name)
        ax.set_xticks(range(len(layers)), [row["name"].split("/")[0] for row in layers])
    ax.set(ylabel="density (kept / all weights)", yscale="log")
    if sparse:
        figure.set_figwidth(max(5.2, 1.5 + 0.6 * len(sparse)))
        legend_beside(figure, ax)
    return figure


def accuracies(networks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Natural and robust test accuracy of each network, with 95 % intervals.

    Args:
        networks: `results["networks"]`.
    """
    figure, (ax,) = new_figure(1)
    palette = colors(list(networks))
    for i, (name, values) in enumerate(networks.items()):
        for part, marker, shift in (("natural", "o", -0.1), ("robust", "s", 0.1)):
            value, (low, high) = values[f"{part}_accuracy"], values[f"{part}_interval"]
            ax.errorbar(
                i + shift,
                value,
                [[value - low], [high - value]],
                color=palette[name],
                marker=marker,
                markerfacecolor="white" if part == "natural" else None,
                capsize=3,
            )
    many: dict[str, Any] = {"rotation": 45, "ha": "right"} if len(networks) > 4 else {}
    ax.set_xticks(range(len(networks)), list(networks), **many)
    figure.set_figwidth(max(5.2, 1.5 + 0.4 * len(networks)))
    ax.set(ylabel="test accuracy", ylim=(0, 1))
    ax.set_title("circle: natural, square: robust", fontsize=9)
    return figure


def robustness(records: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy under attack against the radius, and against the steps of the attack.

    Args:
        records: for each network the record of its hygiene checks (`hygiene.Hygiene.record`).
    """
    figure, (radius, steps) = new_figure(2)
    styles = line_styles(list(records), size=3)
    for name, record in records.items():
        for ax, key in ((radius, "radii"), (steps, "steps")):
            if record[key]:
                ax.plot(*zip(*record[key], strict=True), label=name, **styles[name])
    counts = sorted({record["images"] for record in records.values()})
    radius.set(xlabel="ε [pixel units]", ylabel="accuracy under attack", ylim=(0, 1))
    steps.set(xlabel="steps of the attack", xscale="log", ylim=(0, 1))
    radius.set_title(f"{' or '.join(map(str, counts))} test images", fontsize=9)
    legend_beside(figure, radius)
    return figure


def examples(arrays: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Test images, and what the attack makes of them for each network.

    Args:
        arrays: for each network `clean`, `examples` [n, height, width, channels] in [0, 1] and
            `robust_correct`, `natural_correct` [≥ n]. Flat features are drawn as one row.
    """
    first = next(iter(arrays.values()))
    columns = len(first["clean"])
    figure = Figure(figsize=(1.2 * columns + 1, 1.3 * (len(arrays) + 1)), layout="constrained")
    grid = figure.subplots(len(arrays) + 1, columns, squeeze=False)

    def show(ax: Axes, image: np.ndarray, title: str) -> None:
        pixels = np.atleast_3d(image) if image.ndim > 1 else image[None, :, None]
        gray = pixels.shape[-1] != 3
        ax.imshow(pixels[..., 0] if gray else pixels, cmap="gray" if gray else None, vmin=0, vmax=1)
        ax.set_title(title, fontsize=8)
        ax.set(xticks=[], yticks=[])

    for j in range(columns):
        show(grid[0, j], first["clean"][j], f"label {first['labels'][j]}")
    for i, (_, values) in enumerate(arrays.items(), start=1):
        for j in range(columns):
            state = "robust" if values["robust_correct"][j] else "fooled"
            state = state if values["natural_correct"][j] else "wrong when clean"
            show(grid[i, j], values["examples"][j], state)
    for ax, name in zip(grid[:, 0], ("clean", *arrays), strict=True):
        ax.set_ylabel(name, fontsize=9)
    return figure


def compare(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Robust accuracy against density, one series a kind of network, over several runs.

    Args:
        runs: `results.json` of each run, by name.
    """
    figure, (accuracy, gap) = new_figure(2)
    names = list(dict.fromkeys(n for results in runs.values() for n in results["networks"]))
    for name, color in colors(names).items():
        found = [r["networks"][name] for r in runs.values() if name in r["networks"]]
        found.sort(key=lambda values: values["density"])
        density = [values["density"] for values in found]
        robust = np.array([values["robust_accuracy"] for values in found])
        low, high = np.transpose([values["robust_interval"] for values in found])
        bars = [robust - low, high - robust]
        accuracy.errorbar(density, robust, bars, marker="o", color=color, label=name, capsize=3)
        if name != "dense":
            gap.plot(density, [v["dynamics_gap"] for v in found], marker="o", color=color)
    accuracy.set(xlabel="density", ylabel="robust test accuracy", xscale="log")
    gap.set(xlabel="density", ylabel="dynamics gap, mean over steps [logits]", xscale="log")
    accuracy.legend(frameon=False)
    return figure
