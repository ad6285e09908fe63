"""Checkpoints of a loop's state, through Orbax: the newest one survives a kill at any moment."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np

from ntk_awt.errors import InputError, check_same_tree

__all__ = ["Checkpoints", "newest"]

State = TypeVar("State")

SPARE = 2**19
"""Bytes that a checkpoint takes beside its arrays, at most."""


class Checkpoints:
    """The newest state of a loop, in a folder; with no folder, nothing is saved or found.

    Used as a context manager. Orbax writes to a temporary folder and renames it, so a write that
    is interrupted leaves the one before.

    Args:
        folder: where to keep the state; made when needed.
        reads_only: write nothing there; then the folder has to be there.
    """

    def __init__(self, folder: Path | None, *, reads_only: bool = False):
        self._folder = None if folder is None else folder.absolute()
        self._reads_only = reads_only

    def __enter__(self) -> "Checkpoints":
        self._manager = None
        if self._folder is not None:
            import orbax.checkpoint as ocp  # it costs a second: only when something is saved

            # Orbax's own option read_only logs a warning per setting that it changes.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if self._reads_only else 1,
                create=not self._reads_only,
                enable_async_checkpointing=False,
            )
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._manager is not None:
            self._manager.close()

    def save(self, step: int, state: Any) -> None:
        """Keep `state` (a pytree of arrays) as the newest one.

        Raises:
            OSError: no space or no permission.
        """
        if self._manager is not None and self._folder is not None:
            import orbax.checkpoint as ocp

            # On a full disk TensorStore's callbacks meet event loops that Orbax has closed.
            size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
            folder = next(p for p in (self._folder, *self._folder.parents) if p.exists())
            if shutil.disk_usage(folder).free < 2 * size + SPARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
            try:
                self._manager.save(step, args=ocp.args.StandardSave(state))
            except ValueError as error:  # TensorStore's, on a full disk
                if "writing" not in str(error):
                    raise
                text = str(error).strip().partition("\n")[0]
                raise OSError(errno.EIO, text, str(self._folder)) from error

    def latest(self, like: State) -> State:
        """The newest state, or `like` itself if there is none.

        Args:
            like: a state with the structure, shapes and dtypes to expect.

        Raises:
            InputError: the folder holds a state of another structure.
        """
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return like
        import orbax.checkpoint as ocp

        with self._readable():
            found: Any = self._manager.item_metadata(step)
            tree = found.tree
        check_same_tree(f"checkpoint in {self._folder}:", tree, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with self._readable():
            restored: Any = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return restored

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a damaged folder raises one of many kinds
            text = str(error).strip().partition("\n")[0]
            raise InputError(
                f"checkpoint in {self._folder}",
                expected="a state that can be read",
                got=f"{type(error).__name__}: {text}",
                fix="delete that folder: its stage starts anew",
            ) from error


def newest(folder: Path, like: State) -> tuple[int, State] | None:
    """The newest state in a folder, and its step, for a reader; nothing is written.

    A process that saves there may replace the state while it is read; then the next one is read.

    Args:
        folder: that `Checkpoints` saves in.
        like: a state with the structure, shapes and dtypes to expect.

    Returns:
        None where there is no state.

    Raises:
        InputError: the folder holds a state of another structure, or a damaged one.
    """
    while True:
        step = _newest_step(folder)
        if step is None:
            return None
        try:
            with Checkpoints(folder, reads_only=True) as saved:
                found = saved.latest(like)
        except InputError:
            if _newest_step(folder) == step:
                raise
        else:
            if _newest_step(folder) == step:
                return step, found


def _newest_step(folder: Path) -> int | None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)
