"""The tables of the command line; none splits a number or a word.

A terminal that is too narrow for a table gets fewer columns, and one line that says which are
missing. A pipe or a file has no width: a table there is as wide as it needs to be.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ntk_awt.app.verdicts import NOT_JUDGED, Verdict

__all__ = [
    "STYLES",
    "Column",
    "show",
    "show_attacks",
    "show_flags",
    "show_layers",
    "show_metrics",
    "show_networks",
    "show_plain",
    "show_statements",
]

STYLES = {"passed": "", "warned": "yellow", "failed": "red", NOT_JUDGED: "yellow"}
SIGNS = {"passed": "", "warned": " !", "failed": " ✗"}

Cell = str | Text


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        header: its name, and its unit in square brackets.
        rank: 0 stays for as long as it can; the greatest rank is left out first.
        prose: cells may go on in the next line, between words.
    """

    header: str
    rank: int = 1
    prose: bool = False


def _words(cells: Sequence[Cell], *, split: bool) -> list[str]:
    texts = [str(cell) for cell in cells]
    return [word for text in texts for word in text.split()] if split else texts


def _widest(texts: Sequence[str]) -> int:
    return max((cell_len(text) for text in texts), default=0)


def _fitting(columns: Sequence[Column], widths: Sequence[int], room: int) -> list[int]:
    """The columns that there is room for; each has two blanks and a line beside it."""
    kept = list(range(len(columns)))
    for at in sorted(kept[1:], key=lambda i: (-columns[i].rank, -i)):
        if sum(widths[i] + 3 for i in kept) + 1 <= room:
            break
        kept.remove(at)
    return kept


def show(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    *,
    title: str = "",
    caption: str = "",
    sections: Sequence[int] = (),
) -> None:
    """Print a table; square brackets in it are no markup.

    Args:
        console: where.
        columns: the first one always stays.
        rows: one cell a column.
        title: above the table.
        caption: below it.
        sections: rows after which there is a line.
    """
    cells = [[row[i] for row in rows] for i in range(len(columns))]
    least, full = [], []
    for column, own in zip(columns, cells, strict=True):
        words = _words(own, split=column.prose)
        least.append(_widest([*column.header.split(), *words]))
        full.append(_widest([column.header, *map(str, own)]))
    out = console
    if not console.is_terminal:
        needed = max(sum(full) + 3 * len(full) + 1, cell_len(title), cell_len(caption))
        out = type(console)(file=console.file, width=needed)
    kept = _fitting(columns, least, out.width)
    spare = max(0, out.width - 1 - sum(least[i] + 3 for i in kept))
    table = Table(title=title and Text(title), caption=caption and Text(caption))
    for i in kept:
        more = min(spare, full[i] - least[i])
        spare -= more
        table.add_column(Text(columns[i].header), width=least[i] + more)
    for at, row in enumerate(rows):
        shown = [Text(cell) if isinstance(cell, str) else cell for cell in (row[i] for i in kept)]
        table.add_row(*shown, end_section=at in sections)
    out.print(table)
    if missing := [column.header for i, column in enumerate(columns) if i not in kept]:
        text = f"too narrow a terminal for: {', '.join(missing)}"
        out.print(text, markup=False, highlight=False)


# ---------------------------------------------------------------- cells


def _percent(value: float, low: float, high: float, n: int = 0) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _number(value: float) -> str:
    return {"inf": "∞", "nan": "undefined"}.get(str(value), f"{value:.4g}")


# ---------------------------------------------------------------- the commands' tables


def show_networks(
    console: Console, results: Mapping[str, Any], verdicts: Mapping[str, Verdict]
) -> None:
    """What came of a run: one row a network."""
    columns = (
        Column("network", 0),
        Column("density [0–1]", 2),
        Column("natural [%]", 1),
        Column("robust [%]", 0),
        Column("gap [logits]", 3),
        Column("Θ dist. [rel.²]", 4),
    )
    rows = []
    for name, values in results["networks"].items():
        status = verdicts[name].status
        rows.append(
            (
                Text(name + SIGNS[status], STYLES[status]),
                f"{values['density']:.4g}",
                _percent(values["natural_accuracy"], *values["natural_interval"]),
                _percent(values["robust_accuracy"], *values["robust_interval"]),
                f"{values['dynamics_gap']:.3g}",
                f"{values['relative_kernel_distance']:.3g}",
            )
        )
    raised = any(one.status != "passed" for one in verdicts.values())
    show(
        console,
        columns,
        rows,
        title="test accuracy with 95 % interval, mean dynamics gap, kernel distance at start",
        caption="✗: a check fails, !: a check warns; see the verdicts" if raised else "",
    )


def show_layers(console: Console, name: str, layers: Sequence[Any]) -> None:
    """What a mask keeps of each layer (`masks.statistics`)."""
    columns = (
        Column("layer", 0),
        Column("shape [*window, in, out]", 3),
        Column("kept [weights]", 1),
        Column("density [kept / all]", 0),
        Column("gain γ [factor]", 2),
        Column("dead inputs [units]", 4),
        Column("dead outputs [units]", 4),
    )
    rows = [
        (
            row.name,
            "×".join(map(str, row.shape)),
            str(row.kept),
            f"{row.density:.4g}",
            f"{row.gain:.3f}",
            str(row.dead_inputs),
            str(row.dead_outputs),
        )
        for row in layers
    ]
    show(console, columns, rows, title=name)


def show_attacks(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy of each network after each attack."""
    columns = (
        Column("network", 0),
        Column("attack", 0),
        Column("tried on [images]", 3),
        Column("left [images]", 2),
        Column("accuracy [%], 95 % interval", 0),
    )
    rows, ends = [], []
    for record in records:
        rows.append((record["network"], "none", "", "", _percent(**record["natural"])))
        for turn in record["attacks"]:
            suite = f" ({turn['suite']})" if turn["suite"] != turn["attack"] else ""
            accuracy = _percent(turn["robust_accuracy"], *turn["robust_interval"])
            tried, left = str(turn["attacked"]), str(turn["survived"])
            rows.append(("", turn["attack"] + suite, tried, left, accuracy))
        rows.append(("", "all", "", "", _percent(**record["robust"])))
        ends.append(len(rows) - 1)
    title = "after each attack; the worst case of all last"
    show(console, columns, rows, title=title, sections=ends)


def show_flags(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """The checks that did not pass; all of them are in the JSON file and in a run's report."""
    columns = (
        Column("check", 0),
        Column("network", 0),
        Column("status", 1),
        Column("value (limit) [unit]", 2),
        Column("measured", 3, prose=True),
    )
    flags = [(one["network"], flag) for one in records for flag in one["hygiene"]["flags"]]
    raised = [(network, flag) for network, flag in flags if flag["status"] != "pass"]
    rows = [
        (
            flag["name"],
            network,
            Text(flag["status"], {"warn": "yellow", "fail": "red"}[flag["status"]]),
            f"{flag['value']:.3g} ({flag['limit']:.3g}) [{flag['unit']}]",
            flag["meaning"],
        )
        for network, flag in raised
    ]
    title = f"hygiene: {len(flags) - len(raised)} of {len(flags)} checks pass"
    show(console, columns, rows, title=title)


def show_metrics(console: Console, title: str, metrics: Sequence[tuple[str, float, str]]) -> None:
    """Name, value and unit of each metric of a kernel."""
    columns = (Column("metric", 0), Column("value", 0), Column("unit", 1))
    rows = [(name, _number(value), unit) for name, value, unit in metrics]
    show(console, columns, rows, title=title)


def show_statements(console: Console, results: Sequence[Any]) -> None:
    """Whether each statement holds, by how much, and what became of its controls."""
    columns = (
        Column("statement", 0),
        Column("holds", 0),
        Column("margin [parts]", 1),
        Column("bound / actual", 2),
        Column("cases [held]", 3),
        Column("controls [rejected]", 3),
        Column("time [s]", 4),
    )
    rows = []
    for result in results:
        cases, controls = result.outcome.cases, result.outcome.controls
        rows.append(
            (
                f"{result.statement.number} {result.statement.title}",
                "yes" if result.holds else "NO",
                _number(result.margin),
                "–" if result.tightness is None else f"{result.tightness:.3g}",
                f"{sum(case.holds for case in cases)} / {len(cases)}",
                f"{sum(control.rejected for control in controls)} / {len(controls)}",
                f"{result.seconds:.1f}",
            )
        )
    title = "margin: distance from violation, in parts of what is allowed"
    show(console, columns, rows, title=title)


def show_plain(
    console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Any table whose most important columns come first."""
    columns = [Column(header, at) for at, header in enumerate(headers)]
    show(console, columns, rows, title=title)
