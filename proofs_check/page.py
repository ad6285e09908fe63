"""The page of a verification: a table, and for each statement its figure, rule and cases."""

import tempfile
from pathlib import Path
from typing import Any

from ntk_awt import files
from ntk_awt.app import plots
from ntk_awt.app.report import page as report
from ntk_awt.files import versions
from proofs_check.core import Outcome
from proofs_check.runner import Result


def complaints(result: Result) -> list[str]:
    """One line for everything that keeps a statement from holding, or that was left out."""
    number, found = result.statement.number, result.outcome
    lines = [f"{number} fails: {c.name}: {c.measured}" for c in found.cases if not c.holds]
    lines += [
        f"{number}: control not rejected: {control.name}: {control.measured}"
        for control in found.controls
        if not control.rejected
    ]
    lines += [f"{number} fails: no control breaks: {name}" for name in result.unbroken]
    if not found.cases or not found.controls:
        lines.append(f"{number} fails: no case or no control")
    return lines + [f"{number}: left out: {reason}" for reason in found.skipped]


def _rows(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        panel._asdict() | {"lines": [line._asdict() for line in panel.lines]}
        for panel in outcome.panels
    ]


def _figure(result: Result, folder: Path) -> str | None:
    if not result.outcome.panels:
        return None
    name = result.statement.number
    plots.save(plots.panels(_rows(result.outcome)), folder, name)
    return report.embedded(folder / f"{name}.svg")


def write(results: list[Result], path: Path) -> Path:
    """Write a self-contained page.

    Args:
        results: from `verification.verify`.
        path: of the page; its folder is made.

    Returns:
        `path`.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures = {r.statement.number: _figure(r, Path(folder)) for r in results}
    text = report.render("proofs.html", results=results, figures=figures, versions=versions())
    files.write_text(path, text)
    return path
