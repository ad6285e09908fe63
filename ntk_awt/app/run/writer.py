"""The one process that writes a run folder: its lock, its records, its leftovers after a kill."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ntk_awt import files
from ntk_awt.app import config as configs
from ntk_awt.app.config import RunConfig
from ntk_awt.app.run import records
from ntk_awt.app.run.folder import Paths, RunFolder
from ntk_awt.app.run.records import Record
from ntk_awt.errors import InputError

__all__ = ["Clock", "Reporter", "Silent", "Writer", "check_folder", "lock"]


class Reporter(Protocol):
    """Where a run shows its progress."""

    def bar(
        self, label: str, total: int, unit: str
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar over `total` units; what it gives is called with the units done."""
        ...


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """See `Reporter.bar`."""
        yield lambda done: None


class Clock:
    """Wall-clock seconds between laps."""

    def __init__(self):
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return round(seconds, 3)


# ---------------------------------------------------------------- the lock

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What flock fails with on a file system that has none."""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a folder; the file is there only as long.

    The lock is the operating system's (flock): a kill frees it at once. The file says who holds it.

    Args:
        path: of the lock's file; its folder is made.

    Raises:
        InputError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_own()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for this file sees that it went
        os.close(descriptor)


def _own() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _acquire(path: Path) -> int:
    """An open file that holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(descriptor, path)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it meanwhile


def _take(descriptor: int, path: Path) -> None:
    folder = path.parent
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(folder, _holder(descriptor)) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        holder = _holder(descriptor)
        if holder and (holder["host"] != socket.gethostname() or _lives(holder["pid"])):
            fix = f"if that process has ended, delete {path}"
            raise _taken(folder, holder, fix) from None
        warnings.warn(
            f"run folder {folder}: its file system has no locks (flock); see to it that no "
            "process on another host writes there",
            stacklevel=2,
        )
        return
    holder = _holder(descriptor)
    if holder and holder["host"] != socket.gethostname():
        warnings.warn(
            f"run folder {folder}: process {holder['pid']} on {holder['host']} left its lock; it "
            "counts as ended, since locks reach other hosts on most file systems",
            stacklevel=2,
        )


def _holder(descriptor: int) -> dict[str, Any] | None:
    """What the lock's file says; nothing if it was killed, or asked, before it could say it."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "since": str(found["since"])}
    except (ValueError, KeyError, TypeError):
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _taken(folder: Path, holder: dict[str, Any] | None, fix: str = "") -> InputError:
    got = "another process"
    if holder is not None:
        got = f"process {holder['pid']} on host {holder['host']}, since {holder['since']}"
    fix = fix or "wait until it ends, or choose another --run-dir"
    return InputError(f"run folder {folder}", expected="no other writer", got=got, fix=fix)


# ---------------------------------------------------------------- the writer


class Writer:
    """Writes one run into one folder; a context manager, which holds the folder's lock.

    Nothing is read, made or repaired before the lock is held.

    Args:
        config: all settings of the run.
        root: the run folder; made if it does not exist.
        reporter: shows progress.

    Attributes:
        folder: the run folder, for reading.
        reporter: as given.
        records: the rows of `metrics.jsonl`.

    Raises:
        InputError: a folder that another process writes, that holds a run of other settings or
            other files, or links that lead outside.
        OSError: a folder that cannot be written.
    """

    def __init__(self, config: RunConfig, root: Path, reporter: Reporter | None = None):
        self.folder = RunFolder(root, config)
        self.paths = self.folder.paths
        self.reporter = reporter or Silent()
        self.records: list[Record] = []
        self._torn = False
        self._held = ExitStack()

    def __enter__(self) -> "Writer":
        config, paths = self.folder.config, self.paths
        check_folder(config, paths)
        with ExitStack() as stack:
            stack.enter_context(lock(paths.lock))
            check_folder(config, paths)  # again: its last writer may just have made it
            self._remove_leftovers()
            self.records = records.read(paths.metrics)
            self._torn = paths.metrics.exists() and not paths.metrics.read_bytes().endswith(b"\n")
            if not paths.config.exists() or configs.load(paths.config) != config:
                configs.save(config, paths.config)
            self._held = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def _remove_leftovers(self) -> None:
        """Parts of files that a kill left, where only a writer writes."""
        for place in ("config.*", "metrics.*", "tickets/*", "trained/*", "dynamics/*/*"):
            for path in self.folder.root.glob(place):
                if files.is_partial(path):
                    path.unlink()

    def add(self, new: Sequence[Record]) -> None:
        """Append records; those of the same stage and network from that step on go first.

        Raises:
            OSError: no space or no permission.
        """
        kept = [old for old in self.records if not any(one.replaces(old) for one in new)]
        if self._torn or len(kept) < len(self.records):
            files.write_text(self.paths.metrics, _lines(kept))
            self.records, self._torn = kept, False
        with self.paths.metrics.open("a", encoding="utf-8") as file:
            self._torn = True  # until the whole line is there
            file.write(_lines(new))
            file.flush()
            os.fsync(file.fileno())
        self.records, self._torn = [*self.records, *new], False


def _lines(rows: Sequence[Record]) -> str:
    return "".join(json.dumps(row.to_row()) + "\n" for row in rows)


def check_folder(config: RunConfig, paths: Paths) -> None:
    """Raise unless a run of these settings may be written there; nothing is left behind.

    Args:
        config: of the run.
        paths: of the folder, which need not be there.

    Raises:
        InputError: a run of other settings, other files, links that lead outside, no permission.
    """
    root = paths.root
    files.check_tree(root)

    def foreign(path: Path) -> bool:
        return path != paths.lock and not files.is_partial(path)

    if paths.config.exists():
        found, wanted = configs.identity(configs.load(paths.config)), configs.identity(config)
        for name in wanted:
            if found[name] != wanted[name]:
                raise InputError(
                    f"run folder {root}, setting {name}",
                    expected=f"{found[name]!r} as in its config.toml",
                    got=repr(wanted[name]),
                    fix="choose another --run-dir, or delete that folder",
                )
    elif root.exists() and (not root.is_dir() or any(map(foreign, root.iterdir()))):
        raise InputError(
            f"run folder {root}",
            expected="a run, an empty folder or no folder",
            got="something else",
            fix="choose another --run-dir",
        )
    files.check_folder(f"run folder {root}", root)
