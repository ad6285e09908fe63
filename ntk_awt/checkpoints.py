"""Checkpoints of a loop's state, through Orbax: the newest one survives a kill at any moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax

from ntk_awt.errors import InputError, check_same_tree

State = TypeVar("State")


class Checkpoints:
    """The newest state of a loop, in a folder; with no folder, nothing is saved or found.

    Used as a context manager. Orbax writes to a temporary folder and renames it, so a write that
    is interrupted leaves the one before.

    Args:
        folder: where to keep the state; made when needed.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def __enter__(self) -> "Checkpoints":
        self._manager = None
        if self._folder is not None:
            import orbax.checkpoint as ocp  # it costs a second: only when something is saved

            options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(
                self._folder.absolute(),
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
        """Keep `state` (a pytree of arrays) as the newest one."""
        if self._manager is not None:
            import orbax.checkpoint as ocp

            self._manager.save(step, args=ocp.args.StandardSave(state))

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
