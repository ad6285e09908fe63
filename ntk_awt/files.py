"""Files that a kill leaves whole: the old ones or the new ones, never a part."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write through a temporary file beside it; its folder is made if there is none.

    Args:
        path: of the file.
        write: called with the path to write to, which has the same suffix.

    Raises:
        OSError: a folder or file that cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "note.txt"
        >>> replace(path, lambda partial: partial.write_text("done"))
        >>> [p.name for p in path.parent.iterdir()], path.read_text()
        (['note.txt'], 'done')
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    write(partial)
    os.replace(partial, path)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz file with these arrays."""
    replace(path, lambda partial: np.savez(partial, **arrays))
