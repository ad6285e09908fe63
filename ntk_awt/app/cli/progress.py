"""What the terminal shows while a command works: progress bars, spinners, warnings."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Bars", "console", "warnings_in_one_line"]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Left to `commands.main`: Rich would exit with 1."""
        raise BrokenPipeError


console = _Console(stderr=True)
"""Everything for people goes to the error stream; files, figures and numbers to the output."""


class _Rate(ProgressColumn):
    """Units a second, while there is something to wait for."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text()
        return Text(f"{task.speed:.3g} {task.fields['unit']}/s" if task.speed else "compiling")


class _Left(TimeRemainingColumn):
    """Time left, while there is any."""

    def render(self, task: Task) -> Text:
        return Text() if task.finished else Text("left ") + super().render(task)


class Bars:
    """Progress bars with rates and time left."""

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
        """A bar over `total` units; what it gives is called with the units done."""
        columns = (
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _Rate(),
            TimeElapsedColumn(),
            _Left(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(label, total=total, unit=unit)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def status(self, label: str) -> Iterator[None]:
        """What is being done, and since when, on a terminal; for work of unknown length."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        silent = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=silent) as progress:
            progress.add_task(label, total=None)
            yield


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Python's warnings as one line each, above the progress bars; the same text once."""
    said: set[str] = set()

    def show(message: Warning | str, *rest: object) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
