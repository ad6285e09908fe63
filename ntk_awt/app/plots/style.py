"""What all figures share: colours, markers, axes, legends, and how a figure is saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ntk_awt.files import replace

__all__ = [
    "FIXED",
    "GRID",
    "OTHERS",
    "Rows",
    "colors",
    "legend_above",
    "legend_beside",
    "line_styles",
    "markers",
    "networks_of",
    "new_figure",
    "save",
]

Rows = Sequence[Mapping[str, Any]]

FIXED = {"dense": "#222222", "ticket": "#c8442e", "random": "#2f6fb0", "magnitude": "#5a9e4b"}
OTHERS = ("#8a5fb0", "#c79a2b", "#3aa6a0", "#a0527a", "#777777")
_MARKERS = "osD^vP*X"
GRID = "#dddddd"


def colors(networks: Sequence[str]) -> dict[str, str]:
    """One colour a network, the same in every figure."""
    others = [name for name in networks if name not in FIXED]
    extra = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    return {name: to_hex(FIXED.get(name) or extra[name]) for name in networks}


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


def new_figure(columns: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Plots side by side, each with a grid behind what is drawn; heights in inches."""
    figure = Figure(figsize=(1.2 + 4.0 * columns, height), layout="constrained")
    axes = list(np.ravel(figure.subplots(1, columns, squeeze=False)))
    for ax in axes:
        ax.grid(color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def line_styles(networks: Sequence[str], size: float) -> dict[str, dict[str, Any]]:
    """How to draw each network's line, its marker of that size."""
    palette, shapes = colors(networks), markers(networks)
    return {
        name: {"color": palette[name], "marker": shapes[name], "markersize": size}
        for name in networks
    }


def legend_beside(figure: Figure, labelled: Axes) -> None:
    """A legend that no number of networks lays over the points."""
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)


def networks_of(rows: Rows) -> list[str]:
    """The networks of some rows, in the order in which they come."""
    return list(dict.fromkeys(row["network"] for row in rows))


def legend_above(figure: Figure, ax: Axes) -> None:
    """The names of the axes' lines, above all axes, where they cover no data."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
