"""Ctrl-C and SIGTERM of the command line: one line that says how to resume, then out, at once.

Python's own handler raises KeyboardInterrupt between two bytecodes of the main thread. While XLA
compiles that is minutes too late; inside a callback of XLA, MLIR or Orbax's event loop it is in the
wrong place, and may end in a segmentation fault. So no exception is raised here. The handler in C
writes the signal's number into a pipe (`signal.set_wakeup_fd`), whatever the main thread does; a
thread at the other end writes the line and ends the process, so that no destructor runs beside
XLA's threads. Nothing is lost by that, as by a kill: every file is written whole
(`files.replace`), and what the end cuts off is made again on resuming.

Only the process of a command installs this; a program that imports the package keeps its own
handlers.
"""

import functools
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""What is handled, in words."""

PATIENCE = 5.0
"""Seconds that the orderly end may take, e.g. to write into a pipe that nobody reads."""

kept: list[Path] = []
"""Folders in which an interrupted command leaves work; the same command goes on from there."""

at_end: list[Callable[[], object]] = []
"""What else ends with the command: processes that it started."""


def line(word: str, arguments: Sequence[str], folder: Path | None) -> str:
    """What an interrupted command says.

    Args:
        word: what happened.
        arguments: of the command.
        folder: where it leaves work; None if it leaves none.

    Example:
        >>> line("interrupted", ["verify", "P3"], None)
        'interrupted; to start again: ntk-awt verify P3'
    """
    command = shlex.join(["ntk-awt", *arguments])
    if folder is not None:
        return f"{word}; finished work is in {folder}; to resume: {command}"
    return f"{word}; to start again: {command}"


def _say_and_leave(number: int) -> None:
    text = line(WORDS[signal.Signals(number)], sys.argv[1:], kept[-1] if kept else None)
    with suppress(OSError):  # a closed stream
        # A progress bar leaves the cursor hidden, at the end of its last line.
        before = "\n\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{before}{text}\n".encode(errors="backslashreplace"))
    leave(128 + number)


def leave(code: int) -> NoReturn:
    """End the process without its destructors, which print what they meet half built."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    for end in at_end:
        with suppress(Exception):  # what is half built may not know how to end
            end()
    os._exit(code)


def _watch(pipe: int) -> None:
    number = 0
    while number not in WORDS:
        (number,) = os.read(pipe, 1)
    threading.Thread(target=_say_and_leave, args=(number,), daemon=True).start()
    select.select([pipe], [], [], PATIENCE)  # a second signal does not wait for the orderly end
    os._exit(128 + number)


@functools.cache
def install() -> None:
    """Handle the signals in this process, from its main thread; those that are ignored stay so."""
    handled = [number for number in WORDS if signal.getsignal(number) != signal.SIG_IGN]
    if not handled:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in handled:
        signal.signal(number, lambda number, frame: None)
    # Processes that are started from here take this over: Ctrl-C reaches them, but only this
    # process says so and ends them. The thread above still lets the signal in.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
