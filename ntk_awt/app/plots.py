"""Figures from saved records only: nothing here computes a network.

Each function takes rows of `metrics.jsonl`, `results.json` or saved arrays and returns a Matplotlib
`Figure`; `save` writes it as SVG and PNG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, ListedColormap, to_hex
from matplotlib.figure import Figure

from ntk_awt.errors import InputError
from ntk_awt.files import replace

Rows = Sequence[Mapping[str, Any]]

_FIXED = {"dense": "#222222", "ticket": "#c8442e", "random": "#2f6fb0", "magnitude": "#5a9e4b"}
_OTHERS = ("#8a5fb0", "#c79a2b", "#3aa6a0", "#a0527a", "#777777")
_MARKERS = "osD^vP*X"
_GRID = "#dddddd"
_KERNEL_UNIT = "[logits² / parameter²]"


def colors(networks: Sequence[str]) -> dict[str, str]:
    """One colour a network, the same in every figure."""
    others = [name for name in networks if name not in _FIXED]
    extra = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return {name: to_hex(_FIXED.get(name) or extra[name]) for name in networks}


def markers(networks: Sequence[str]) -> dict[str, str]:
    """One marker a network: those of the same colour have different ones."""
    palette, found = colors(networks), dict[str, str]()
    for name, color in palette.items():
        same = sum(color == palette[other] for other in found)
        found[name] = _MARKERS[same % len(_MARKERS)]
    return found


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `name.svg` and `name.png` (144 dots an inch)."""
    # No date and no random identifiers: the same records give the same file, byte by byte.
    with matplotlib.rc_context({"svg.hashsalt": "ntk-awt"}):
        replace(folder / f"{name}.svg", lambda path: figure.savefig(path, metadata={"Date": None}))
    replace(folder / f"{name}.png", lambda path: figure.savefig(path, dpi=144))


def _figure(columns: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.2 + 4.0 * columns, height), layout="constrained")
    axes = list(np.ravel(figure.subplots(1, columns, squeeze=False)))
    for ax in axes:
        ax.grid(color=_GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styles(networks: Sequence[str], size: float) -> dict[str, dict[str, Any]]:
    """How to draw each network's line, its marker of that size."""
    palette, shapes = colors(networks), markers(networks)
    return {
        name: {"color": palette[name], "marker": shapes[name], "markersize": size}
        for name in networks
    }


def _legend_beside(figure: Figure, labelled: Axes) -> None:
    """A legend that no number of networks lays over the points."""
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)


def _networks(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in rows))


def _lines(ax: Axes, rows: Rows, key: str, *, marked: bool = True, **style: Any) -> None:
    for network, own in _styles(_networks(rows), size=3).items():
        points = [(row["step"], row[key]) for row in rows if row["network"] == network]
        look = own if marked else {"color": own["color"]}
        ax.plot(*zip(*points, strict=True), label=network, **look, **style)


def training_curves(rows: Rows) -> Figure:
    """Training loss, and natural and robust validation accuracy, against the step.

    Args:
        rows: of stage "train", with loss [nats] and accuracies in [0, 1].
    """
    figure, (loss, accuracy) = _figure(2)
    _lines(loss, rows, "loss", marked=False)
    loss.set(xlabel="step", ylabel="training loss [nats]", yscale="log")
    _lines(accuracy, rows, "validation_natural", marked=False, linestyle="--")
    _lines(accuracy, rows, "validation_robust", marked=False)
    accuracy.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1))
    accuracy.set_title("dashed: natural, solid: robust", fontsize=9)
    _legend_beside(figure, loss)
    return figure


def dynamics(rows: Rows) -> Figure:
    """Dynamics gap, kernel distance to the dense network, and kernel drift, against the step.

    Args:
        rows: of stage "dynamics".
    """
    figure, (gap, distance, drift) = _figure(3)
    sparse = [row for row in rows if row["network"] != "dense"]
    if sparse:
        _lines(gap, sparse, "dynamics_gap")
        _lines(distance, sparse, "relative_kernel_distance")
        distance.set_yscale("log")
    _lines(drift, rows, "kernel_drift")
    gap.set(xlabel="step", ylabel="dynamics gap  ‖$f^d_t - f^s_t$‖ / √N  [logits]")
    distance.set(xlabel="step", ylabel="‖$Θ^d_t - Θ^s_t$‖² / ‖$Θ^d_t$‖²")
    drift.set(xlabel="step", ylabel="own drift  ‖$Θ_t - Θ_0$‖² / ‖$Θ_0$‖²")
    _legend_beside(figure, drift)
    return figure


def search(rows: Rows) -> Figure:
    """Relative kernel and target distance on the held-out batch, against the search step.

    Args:
        rows: of stage "ticket", of the networks that were searched for.
    """
    figure, axes = _figure(2)
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
    _legend_beside(figure, axes[0])
    return figure


def sweep_accuracy(table: Rows) -> Figure:
    """Natural and robust test accuracy against density, with standard deviations over seeds.

    Args:
        table: of `sweep.json`: network, density, natural_accuracy and robust_accuracy with mean
            and sd.
    """
    figure, axes = _figure(2)
    styles = _styles(_networks(table), size=4)
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
    _legend_beside(figure, axes[1])
    return figure


def sweep_steps(rows: Rows, key: str) -> Figure:
    """A quantity of the dynamics against the step, mean over seeds, one plot a density.

    Args:
        rows: of stage "dynamics", each with its density and seed.
        key: dynamics_gap or relative_kernel_distance.
    """
    densities = list(dict.fromkeys(row["density"] for row in rows))
    figure, axes = _figure(len(densities), height=3.8)
    styles = _styles(_networks(rows), size=4)
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
    _legend_beside(figure, axes[0])
    return figure


def relations(rows: Rows, pairs: Sequence[tuple[str, str]]) -> Figure:
    """Pairs of measures of all masks and seeds against each other.

    Args:
        rows: one a mask and seed, with network, target_density and the measures.
        pairs: names of the measures to plot against each other.
    """
    figure, axes = _figure(len(pairs), height=3.6)
    sparse = [row for row in rows if row["network"] != "dense"]
    palette, shapes = colors(_networks(sparse)), markers(_networks(sparse))
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
    _legend_beside(figure, axes[0])
    return figure


def panels(rows: Rows) -> Figure:
    """Plots side by side, each with its own lines: measured, bound (dashed) or reference (dotted).

    Args:
        rows: one a plot, with title, xlabel, ylabel, xscale, yscale and lines; a line has label, x,
            y and kind.
    """
    figure, axes = _figure(len(rows), height=3.6)
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
    figure, (ax,) = _figure(1)
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
        _legend_beside(figure, ax)
    return figure


def accuracies(networks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Natural and robust test accuracy of each network, with 95 % intervals.

    Args:
        networks: `results["networks"]`.
    """
    figure, (ax,) = _figure(1)
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
    figure, (radius, steps) = _figure(2)
    styles = _styles(list(records), size=3)
    for name, record in records.items():
        for ax, key in ((radius, "radii"), (steps, "steps")):
            if record[key]:
                ax.plot(*zip(*record[key], strict=True), label=name, **styles[name])
    counts = sorted({record["images"] for record in records.values()})
    radius.set(xlabel="ε [pixel units]", ylabel="accuracy under attack", ylim=(0, 1))
    steps.set(xlabel="steps of the attack", xscale="log", ylim=(0, 1))
    radius.set_title(f"{' or '.join(map(str, counts))} test images", fontsize=9)
    _legend_beside(figure, radius)
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


def _legend_above(figure: Figure, ax: Axes) -> None:
    """The names of the axes' lines, above all axes, where they cover no data."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def kernel(matrix: np.ndarray, title: str) -> Figure:
    """A kernel as a picture of its mean over outputs, and its spectrum if square.

    Args:
        matrix: the kernel [n1, n2, c, c], its diagonal blocks [n1, n2, c], or one matrix [n1, n2]
            (of one output, or a mean already), in squared logits per squared parameter.
        title: of the figure; "mean over outputs" is added where the mean is taken here.

    Raises:
        InputError: another number of axes.
    """
    if matrix.ndim not in (2, 3, 4):
        raise InputError(
            "kernel",
            expected="axes [n1, n2], [n1, n2, c] or [n1, n2, c, c]",
            got=f"shape {matrix.shape}",
        )
    diagonal = np.diagonal(matrix, axis1=2, axis2=3) if matrix.ndim == 4 else matrix
    mean = diagonal.mean(2) if diagonal.ndim == 3 else diagonal
    square = mean.shape[0] == mean.shape[1]
    figure, axes = _figure(2 if square else 1, height=3.6)
    image = axes[0].imshow(mean, cmap="magma", interpolation="nearest")
    axes[0].grid(False)
    axes[0].set(xlabel="column image", ylabel="row image")
    title = title if matrix.ndim == 2 else f"{title}: mean over outputs"
    figure.suptitle(title, fontsize=11, parse_math=False)  # it has names of files
    figure.colorbar(image, ax=axes[0], label=f"Θ  {_KERNEL_UNIT}")
    if square:
        values = np.linalg.svd(mean, compute_uv=False)
        axes[1].semilogy(np.arange(1, len(values) + 1), values, marker=".")
        axes[1].set(xlabel="index", ylabel=f"singular value  {_KERNEL_UNIT}")
    return figure


def spectrum(values: Mapping[str, np.ndarray]) -> Figure:
    """Eigenvalues (or singular values) by rank, and the share of the trace in the first ones.

    Sizes |λ| are drawn, largest first. Those that are zero up to rounding (|λ| ≤ m·u·max|λ|, u the
    spacing of floats at 1) are left out of the first picture: a logarithmic axis would show noise.

    Args:
        values: the m eigenvalues of each network's kernel, in squared logits per squared parameter.
    """
    figure, (sizes, mass) = _figure(2, height=3.6)
    for name, color in colors(list(values)).items():
        found = np.sort(np.abs(values[name]))[::-1]
        rank = np.arange(1, len(found) + 1)
        shown = found > len(found) * np.finfo(found.dtype).eps * found[0]
        sizes.loglog(rank[shown], found[shown], ".-", color=color, label=name)
        mass.semilogx(rank, np.cumsum(found) / found.sum(), color=color)
    sizes.set(xlabel="rank k", ylabel=f"eigenvalue $|λ_k|$  {_KERNEL_UNIT}")
    mass.set(xlabel="rank k", ylabel="share of the trace in ranks 1…k", ylim=(0, 1.02))
    _legend_above(figure, sizes)
    return figure


def eigenvectors(pictures: np.ndarray, values: np.ndarray) -> Figure:
    """Eigenvectors of a kernel as pictures Σ_i u_i x_i, each scaled to its own largest pixel.

    Args:
        pictures: [k, height, width, channels], or flat features [k, d], drawn as one row; signed.
        values: their k eigenvalues, in squared logits per squared parameter.

    Raises:
        InputError: not one eigenvalue for each picture.
    """
    if len(pictures) != len(values):
        raise InputError(
            "values", expected=f"{len(pictures)}, one for each picture", got=f"{len(values)}"
        )
    columns = min(len(pictures), 6)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.4 * columns + 1.4, 1.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    flat = list(grid.ravel())
    for ax in flat:
        ax.set_axis_off()
    image = None
    for i, (ax, picture) in enumerate(zip(flat, pictures, strict=False)):
        pixels = picture / (np.abs(picture).max() or 1.0)
        if pixels.ndim == 1:
            image = ax.imshow(pixels[None], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        elif pixels.shape[-1] == 3:
            ax.imshow((pixels + 1) / 2, interpolation="nearest")
        else:
            image = ax.imshow(pixels[..., 0], cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(f"$λ_{{{i + 1}}}$ = {values[i]:.3g}", fontsize=9)
    figure.suptitle(f"$Σ_i u_i x_i$ (gray or white: 0), λ in {_KERNEL_UNIT[1:-1]}", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=grid, label="pixel / largest pixel", ticks=(-1, 0, 1))
    return figure


def polar(radius: Mapping[str, np.ndarray], angle: Mapping[str, np.ndarray]) -> Figure:
    """Paths of kernels from their start: radius ‖Θ_t‖/‖Θ_0‖, angle between Θ_t and Θ_0.

    The cross is Θ_0, a large dot the last record. The sector opens as far as the paths need.

    Args:
        radius: along the training of each network, without unit.
        angle: of the same networks and times, in radians from 0 to π.

    Raises:
        InputError: other networks or times in one than in the other.
    """
    lengths = [{name: len(path) for name, path in paths.items()} for paths in (radius, angle)]
    if lengths[0] != lengths[1]:
        raise InputError("angle", expected=f"as many as radii, {lengths[0]}", got=f"{lengths[1]}")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.add_subplot(projection="polar")
    for name, color in colors(list(radius)).items():
        label = f"{name}, last {np.degrees(angle[name][-1]):.3g}°"
        ax.plot(angle[name], radius[name], ".-", color=color, label=label, linewidth=1)
        ax.plot(angle[name][-1], radius[name][-1], "o", color=color)
    ax.plot(0, 1, "kx", label="start", clip_on=False, zorder=3)
    widest = np.degrees(max(path.max() for path in angle.values()))
    opening = next(a for a in (30, 60, 90, 180) if widest <= a or a == 180)
    ax.set(thetamin=0, thetamax=opening, rmin=0)
    ax.set_xticks(np.radians(np.arange(0, opening + 1, opening // 6)))
    ax.grid(color=_GRID, linewidth=0.6)
    ax.set_xlabel("radius: ‖$Θ_t$‖ / ‖$Θ_0$‖")
    ax.set_title("angle between $Θ_t$ and $Θ_0$", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def specialisation(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """How the alignment with each class' labels is shared among the outputs' kernels: a heat map.

    White is 1/c, no specialisation; red is more, blue less; undefined shares (NaN) are left blank.
    The shares are written into the cells of up to 20 classes.

    Args:
        matrix: [c, c], row = class, column = output, rows sum to 1.
        classes: the c names.

    Raises:
        InputError: a matrix that is not square, or not one name for each row.
    """
    count = len(classes)
    if matrix.shape != (count, count):
        raise InputError("matrix", expected=f"shape {(count, count)}", got=f"shape {matrix.shape}")
    size = 2.0 + 0.38 * min(count, 20)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    ax = figure.subplots()
    known = matrix[np.isfinite(matrix)]
    norm = CenteredNorm(1 / count, np.abs(known - 1 / count).max(initial=0.2 / count))
    image = ax.imshow(matrix, cmap="RdBu_r", norm=norm, interpolation="nearest")
    for i, j in np.argwhere(np.isfinite(matrix)) if count <= 20 else ():
        color = "white" if abs(norm(matrix[i, j]) - 0.5) > 0.35 else "black"
        ax.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(count), classes)
    ax.set(xlabel="kernel of output", ylabel="labels of class")
    figure.colorbar(image, ax=ax, label=f"share of alignment (1/c = {1 / count:.2g})")
    return figure


def velocity(times: np.ndarray, values: Mapping[str, np.ndarray]) -> Figure:
    """Kernel velocity in each interval between two records.

    Args:
        times: of the t records, in steps.
        values: t − 1 velocities of each network, cosine distance per step.

    Raises:
        InputError: not one velocity for each interval.
    """
    figure, (ax,) = _figure(1, height=3.6)
    for name, color in colors(list(values)).items():
        if len(values[name]) != len(times) - 1:
            raise InputError(
                f"velocities of {name}", expected=f"{len(times) - 1}", got=f"{len(values[name])}"
            )
        ax.stairs(values[name], times, baseline=None, color=color, label=name, linewidth=1.4)
    ax.set(xlabel="step", ylabel="kernel velocity  [cosine distance / step]", yscale="log")
    _legend_above(figure, ax)
    return figure


def compare(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Robust accuracy against density, one series a kind of network, over several runs.

    Args:
        runs: `results.json` of each run, by name.
    """
    figure, (accuracy, gap) = _figure(2)
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


# ---------------------------------------------------------------- linear classification

_METHODS = {"plain": "#222222", "signal": "#c8442e", "penalised": "#c79a2b", "robust": "#2f6fb0"}
_PHASES = ("#b9b9b9", "#f2c9a1", "#9cc7a0")


def _simulated(ax: Axes, rows: Rows, x: str, kind: str, **style: Any) -> None:
    """Simulated shares of the points with their intervals, which are drawn around the rate."""
    for row in rows:
        found = row[kind]
        rate, (low, high) = found["rate"], found["interval"]
        bars = [[rate - low / row["samples"]], [high / row["samples"] - rate]]
        ax.errorbar(row[x], rate, bars, fmt="none", capsize=3, **style)
        ax.plot(row[x], found["count"] / row["samples"], ".", markersize=4, **style)


def adversarial_rates(arrays: Mapping[str, np.ndarray], rows: Rows) -> Figure:
    """Rates of a linear classifier against the radius: curves by formula, simulated points on them.

    Args:
        arrays: `ordinary_epsilon`, `ordinary_adversarial`, `ordinary_robust` [m] of a ball;
            `epsilon` [m], `delta` [k] and `strong_adversarial`, `strong_robust` [k, m] of the
            strong threat; `map_delta` [h] and `map_robust` [h, m], drawn as a map; `clean`. Radii
            in units of the noise σ, rates in [0, 1].
        rows: simulated points, with threat (ordinary or strong), epsilon, delta, samples, and for
            adversarial and robust the rate, the count and its 99.9 % interval.
    """
    figure, (ordinary, strong, chart) = _figure(3, height=4.0)
    blue, red = _FIXED["random"], _FIXED["ticket"]
    ordinary.axhline(float(arrays["clean"]), color="#222222", linestyle=":", label="clean error")
    ball = [row for row in rows if row["threat"] == "ordinary"]
    for kind, label, color in (
        ("adversarial", "adversarial examples", blue),
        ("robust", "robust error", red),
    ):
        curve = arrays[f"ordinary_{kind}"]
        ordinary.plot(arrays["ordinary_epsilon"], curve, color=color, label=label)
        _simulated(ordinary, ball, "epsilon", kind, color=color)
    ordinary.set(xlabel="radius ε  [σ]", ylabel="rate  [probability]", ylim=(0, 1.02))
    ordinary.set_title("ordinary threat; dots: simulated, bars: 99.9 %", fontsize=10)
    for i, delta in enumerate(arrays["delta"]):
        color, chosen = _OTHERS[i % len(_OTHERS)], [r for r in rows if r["delta"] == delta]
        strong.plot(
            arrays["epsilon"], arrays["strong_robust"][i], color=color, label=f"δ = {delta:.3g} σ"
        )
        strong.plot(arrays["epsilon"], arrays["strong_adversarial"][i], color=color, linestyle="--")
        for kind in ("robust", "adversarial"):
            _simulated(strong, chosen, "epsilon", kind, color=color)
    strong.set(xlabel="radius ε  [σ]", ylabel="rate  [probability]", ylim=(0, 1.02))
    strong.set_title("strong threat: robust; dashed: adversarial", fontsize=10)
    image = chart.pcolormesh(
        arrays["epsilon"], arrays["map_delta"], arrays["map_robust"], vmin=0, vmax=1, cmap="magma"
    )
    if arrays["map_robust"].min() < 0.5 < arrays["map_robust"].max():
        grid = (arrays["epsilon"], arrays["map_delta"], arrays["map_robust"])
        chart.clabel(chart.contour(*grid, levels=[0.5], colors="white"), fmt="½")
    chart.set(xlabel="radius ε  [σ]", ylabel="limit δ on the signal  [σ]")
    chart.set_title("strong threat", fontsize=10)
    figure.colorbar(image, ax=chart, label="robust error  [probability]")
    for ax in (ordinary, strong):
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def phase_diagram(arrays: Mapping[str, np.ndarray]) -> Figure:
    """Where robust linear classifiers exist, and the least robust errors along two cuts.

    Args:
        arrays: `epsilon` [m] and `delta` [k] in units of ‖μ‖, `phase`, `ordinary`, `strong` [k, m],
            and where there is a closed form `closed_ordinary`, `closed_strong` of the same shape.
    """
    figure, (chart, cuts) = _figure(2, height=4.2)
    epsilon, delta, phase = arrays["epsilon"], arrays["delta"], arrays["phase"]
    chart.grid(False)
    chart.pcolormesh(
        epsilon, delta, phase, cmap=ListedColormap(_PHASES), vmin=-0.5, vmax=2.5, shading="nearest"
    )
    for value, text in enumerate(("no robust classifier", "strong only", "ordinary\nand strong")):
        rows, columns = np.nonzero(phase == value)
        if len(rows):
            chart.text(epsilon[columns].mean(), delta[rows].mean(), text, ha="center", va="center")
    top, right = delta[-1] + delta[0], epsilon[-1] + epsilon[0]
    closed = "closed_strong" in arrays
    if closed:
        chart.plot([1, 1, right], [top, 1, 1], color="black", linewidth=1.4)
        chart.plot([1, 1], [0, 1], color="black", linewidth=1.4, label="closed form")
        chart.legend(frameon=False, loc="upper right", fontsize=8)
    chart.set(xlabel="ε / ‖μ‖", ylabel="δ / ‖μ‖", xlim=(0, right), ylim=(0, top))
    chart.set_title("phases, each cell a numerical optimum", fontsize=10)
    for name, x, at, label, mark, line in (
        ("ordinary", epsilon, (0, slice(None)), "ordinary, against ε", "s", "-"),
        ("strong", delta, (slice(None), -1), "strong, against δ", "x", ":"),
    ):
        color = _FIXED["random" if name == "ordinary" else "ticket"]
        if closed:
            label_of_line = f"{name}, closed form"
            cuts.plot(x, arrays[f"closed_{name}"][at], line, color=color, label=label_of_line)
        style = {"marker": mark, "linestyle": "", "markerfacecolor": "none", "markersize": 8}
        cuts.plot(x, arrays[name][at], color=color, label=label, **style)
    cuts.set(
        xlabel="ε / ‖μ‖ or δ / ‖μ‖", ylabel="least robust error  [probability]", ylim=(0, None)
    )
    cuts.set_title(f"least robust error; strong at ε = {epsilon[-1]:.3g} ‖μ‖", fontsize=10)
    cuts.legend(frameon=False, fontsize=8)
    return figure


def learned_classifiers(rows: Rows, lines: Rows) -> Figure:
    """Trained classifiers: angles against their prediction, rates against the formula.

    Args:
        rows: of `linear.svm_experiment`.
        lines: predicted cosines, each with `mean_norm`, `c`, `d`, `ratio` and `cosine` [m].
    """
    figure, (angle, rate, deviation) = _figure(3, height=4.0)
    groups = list(dict.fromkeys((line["mean_norm"], line["c"]) for line in lines))
    sizes = sorted({line["d"] for line in lines})
    for line in lines:
        group, size = (line["mean_norm"], line["c"]), sizes.index(line["d"])
        style: dict[str, Any] = {"color": _OTHERS[groups.index(group) % len(_OTHERS)]}
        label = f"‖μ‖ = {group[0]:g} σ, C = {group[1]:g}" if size == 0 else None
        dashes = ("--", "-", ":", "-.")[size % 4]
        angle.plot(line["ratio"], line["cosine"], dashes, linewidth=1, label=label, **style)
        chosen = [row for row in rows if (row["mean_norm"], row["c"]) == group]
        for n in sorted({row["n"] for row in chosen}):
            found = [row["cosine"] for row in chosen if (row["n"], row["d"]) == (n, line["d"])]
            bar = _standard_error(found)
            style |= {"marker": "osD^"[size % 4], "markersize": 4, "capsize": 2}
            angle.errorbar(n / line["d"], np.mean(found), bar, **style)
    for size, d in enumerate(sizes):
        style = {"marker": "osD^"[size % 4], "linestyle": ("--", "-", ":", "-.")[size % 4]}
        angle.plot([], [], label=f"d = {d}", color="#777777", markersize=4, **style)
    angle.set(xlabel="training points per dimension  n/d", ylabel="cos θ")
    _ratio_axis(angle, [row["n"] / row["d"] for row in rows])
    angle.set_title("angle to μ; lines: predicted without training", fontsize=10)
    angle.legend(frameon=False, fontsize=7)
    for threat, color in (("ordinary", _FIXED["random"]), ("strong", _FIXED["ticket"])):
        formula, share, parts = (np.array(values) for values in _rate_points(rows, threat))
        rate.plot(formula, share, ".", color=color, markersize=4, label=threat)
        deviation.plot(formula, parts, ".", color=color, markersize=4, label=threat)
    rate.axline((0, 0), slope=1, color="#222222", linewidth=0.8, linestyle=":")
    rate.set(xlabel="rate by formula  [probability]", ylabel="simulated share", xlim=(0, 1))
    rate.set(ylim=(0, 1))
    rate.legend(frameon=False, fontsize=8)
    for y in (-1, 1):
        deviation.axhline(y, color="#222222", linewidth=0.8, linestyle="--")
    deviation.set(xlabel="rate by formula  [probability]", ylim=(-1.6, 1.6), xlim=(0, 1))
    deviation.set_ylabel("deviation / half of the 99.9 % interval")
    return figure


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 of a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _ratio_axis(ax: Axes, ratios: Sequence[float] | np.ndarray) -> None:
    """A logarithmic axis with plain numbers at the values that occur, or some of them."""
    ticks = sorted({float(ratio) for ratio in ratios})
    ticks = ticks[:: -(-len(ticks) // 8)]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.minorticks_off()


def _rate_points(rows: Rows, threat: str) -> tuple[list[float], list[float], list[float]]:
    """Formula, simulated share, and deviation in parts of the interval, of all rates."""
    formula, share, parts = [], [], []
    for row in rows:
        for kind in ("clean", "adversarial", "robust"):
            p, count = row[f"{threat}_{kind}"], row[f"{threat}_{kind}_count"]
            low, high = row[f"{threat}_{kind}_interval"]
            gap = count - p * row["samples"]
            reach = high - p * row["samples"] if gap >= 0 else p * row["samples"] - low
            formula.append(p)
            share.append(count / row["samples"])
            parts.append(gap / max(reach, 1e-12))
    return formula, share, parts


def knowledge(rows: Rows, limits: Mapping[str, Any], real: Rows, title: str) -> Figure:
    """Errors of SVMs with and without knowledge of the signal, and accuracies on real images.

    Args:
        rows: of `linear.knowledge_experiment`, for one dimension and several n.
        limits: the least possible robust error by threat, `ordinary` and `strong`, and the
            `predicted_ratio` [m] and `predicted` [m] strong robust error of the plain SVM.
        real: of `linear.knowledge_case`; none if there are no images.
        title: of the images' plot.
    """
    figure, axes = _figure(3 if real else 2, height=4.4)
    methods = [name for name in _METHODS if any(row["method"] == name for row in rows)]
    for ax, threat in zip(axes, ("ordinary", "strong"), strict=False):
        for method, marker, size in zip(methods, "osDo", (4, 6, 4, 4), strict=False):
            chosen = [row for row in rows if row["method"] == method]
            sizes = sorted({row["n"] for row in chosen})
            groups = [[r[f"{threat}_robust"] for r in chosen if r["n"] == n] for n in sizes]
            bars = [_standard_error(group) for group in groups]
            ratio = np.array(sizes) / chosen[0]["d"]
            style = {"marker": marker, "markersize": size, "capsize": 2, "label": f"{method} SVM"}
            ax.errorbar(ratio, np.mean(groups, axis=1), bars, color=_METHODS[method], **style)
            _ratio_axis(ax, ratio)
        ax.axhline(0.5, color="#777777", linestyle=":", label="constant answer")
        ax.axhline(limits[threat], color="#5a9e4b", linestyle="--", label="least of any classifier")
        ax.set(xlabel="training points per dimension  n/d", ylim=(0, 1.02))
        ax.set_ylabel(f"{threat} robust error  [probability]")
    if "plain" in methods:
        axes[1].plot(limits["predicted_ratio"], limits["predicted"], color="#222222",
                     linestyle=":", linewidth=1, label="plain, predicted")  # fmt: skip
    first = rows[0]
    axes[0].set_title(
        f"ordinary threat: ‖μ‖ = {first['mean_norm']:g} σ, ε = {first['epsilon']:g} σ", fontsize=10
    )
    axes[1].set_title(f"strong threat: the same, δ = {first['delta']:g} σ", fontsize=10)
    _legend_above(figure, axes[1])
    if real:
        _accuracy_bars(axes[2], real, title)
    return figure


def _accuracy_bars(ax: Axes, rows: Rows, title: str) -> None:
    kinds = ("natural", "ordinary", "strong")
    for i, kind in enumerate(kinds):
        at = np.arange(len(rows)) + 0.26 * (i - 1)
        color = ("#bbbbbb", _FIXED["random"], _FIXED["ticket"])[i]
        values = [row[f"{kind}_accuracy"] for row in rows]
        bars = ax.bar(at, values, 0.24, color=color, label=kind if i == 0 else f"{kind} robust")
        ax.bar_label(bars, [f"{100 * value:.0f}" for value in values], fontsize=7)
    ax.set_xticks(range(len(rows)), [row["method"] for row in rows])
    ax.set(ylim=(0, 1.22), ylabel="test accuracy  [share of images]")
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=3, columnspacing=1.0)
