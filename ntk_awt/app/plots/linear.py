"""Figures of the theory of linear classifiers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ntk_awt.app.plots.style import FIXED, OTHERS, Rows, legend_above, new_figure

__all__ = ["adversarial_rates", "knowledge", "learned_classifiers", "phase_diagram"]

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
    figure, (ordinary, strong, chart) = new_figure(3, height=4.0)
    blue, red = FIXED["random"], FIXED["ticket"]
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
        color, chosen = OTHERS[i % len(OTHERS)], [r for r in rows if r["delta"] == delta]
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
    figure, (chart, cuts) = new_figure(2, height=4.2)
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
        color = FIXED["random" if name == "ordinary" else "ticket"]
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
    figure, (angle, rate, deviation) = new_figure(3, height=4.0)
    groups = list(dict.fromkeys((line["mean_norm"], line["c"]) for line in lines))
    sizes = sorted({line["d"] for line in lines})
    for line in lines:
        group, size = (line["mean_norm"], line["c"]), sizes.index(line["d"])
        style: dict[str, Any] = {"color": OTHERS[groups.index(group) % len(OTHERS)]}
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
    for threat, color in (("ordinary", FIXED["random"]), ("strong", FIXED["ticket"])):
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
    figure, axes = new_figure(3 if real else 2, height=4.4)
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
    legend_above(figure, axes[1])
    if real:
        _accuracy_bars(axes[2], real, title)
    return figure


def _accuracy_bars(ax: Axes, rows: Rows, title: str) -> None:
    kinds = ("natural", "ordinary", "strong")
    for i, kind in enumerate(kinds):
        at = np.arange(len(rows)) + 0.26 * (i - 1)
        color = ("#bbbbbb", FIXED["random"], FIXED["ticket"])[i]
        values = [row[f"{kind}_accuracy"] for row in rows]
        bars = ax.bar(at, values, 0.24, color=color, label=kind if i == 0 else f"{kind} robust")
        ax.bar_label(bars, [f"{100 * value:.0f}" for value in values], fontsize=7)
    ax.set_xticks(range(len(rows)), [row["method"] for row in rows])
    ax.set(ylim=(0, 1.22), ylabel="test accuracy  [share of images]")
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=3, columnspacing=1.0)
