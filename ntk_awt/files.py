"""Files: written whole or not at all, read without running anything, never outside their folder."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ntk_awt import __version__
from ntk_awt.errors import InputError

# ---------------------------------------------------------------- writing


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write through a temporary file beside it; its folder is made if there is none.

    A kill, or a full disk, leaves the old file or the new one, never a part. A link, a device or a
    pipe is written through, since it cannot be replaced.

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
    if path.is_symlink() or (path.exists() and not path.is_file()):
        write(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk it would take the place of others
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; see `replace`."""
    replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON; see `replace`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz file with these arrays; see `replace`."""
    replace(path, lambda partial: np.savez(partial, **arrays))


def check_output(flag: str, path: Path | None, suffix: str) -> None:
    """Raise unless a file can be written there; nothing is left behind.

    Called before the work whose result goes there.

    Args:
        flag: that gave the path.
        path: of the file; None is none.
        suffix: that the name has to have, so that no other file is overwritten by mistake; a
            device or a pipe needs none.

    Raises:
        InputError: another suffix, a folder, or no permission.
    """
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return
    if path.suffix != suffix:
        raise InputError(flag, expected=f"a file that ends in {suffix}", got=str(path))
    if path.is_dir():
        raise InputError(flag, expected="a file", got=f"the folder {path}")
    check_folder(flag, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(
            flag, expected="a file that can be written", got=f"no permission for {path}"
        )


def check_folder(flag: str, folder: Path) -> None:
    """Raise unless files can be written into a folder, or it can be made; nothing is left behind.

    Args:
        flag: that gave the folder.
        folder: need not be there yet.

    Raises:
        InputError: a file in its place, or no permission.
    """
    whole = folder.absolute()
    nearest = next(place for place in (whole, *whole.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(
            flag,
            expected="a folder that can be written",
            got=f"{error.strerror or error}: {nearest}",
            fix="choose another one",
        ) from None


# ---------------------------------------------------------------- reading


def read_json(what: str, path: Path, *, fix: str = "") -> Any:
    """The value in a JSON file.

    Args:
        what: the file, as the user knows it.
        path: of it.
        fix: what to change where it cannot be read.

    Raises:
        InputError: no such file, or no JSON in it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(what, expected="a JSON file", got=str(error), fix=fix) from None


def load_arrays(
    path: Path, wanted: Mapping[str, tuple[str, tuple[int | str | None, ...]]], *, fix: str
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, as they have to be.

    Args:
        path: of the file.
        wanted: by name, the kinds of dtype that are right (NumPy's letters, e.g. "iu") and the
            shape, with None where any length is right, and "*" at its end for any further axes.
        fix: what to change where the file is another one.

    Raises:
        InputError: no such file, a damaged one, or other arrays in it.
    """
    what, found = f"file {path}", dict[str, np.ndarray]()
    try:
        # Opened here, because np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            found = {name: np.asarray(archive[name]) for name in wanted if name in archive}
    except Exception as error:  # a bad archive raises one of many kinds
        got = f"{type(error).__name__}: {error}"
        raise InputError(what, expected="an archive by numpy.savez", got=got, fix=fix) from None
    for name, (kinds, shape) in wanted.items():
        sizes = ", ".join("n" if k is None else str(k) for k in shape)
        expected = f"an array {name} [{sizes}]"
        array = found.get(name)
        if array is None:
            raise InputError(what, expected=expected, got="none", fix=fix)
        fixed = [k for k in shape if k != "*"]
        fits = array.ndim == len(fixed) or (array.ndim > len(fixed) and "*" in shape)
        fits &= all(k in (None, size) for k, size in zip(fixed, array.shape, strict=False))
        if not fits or array.dtype.kind not in kinds:
            got = f"shape {array.shape}, dtype {array.dtype}"
            raise InputError(what, expected=expected, got=got, fix=fix)
    return found


# ---------------------------------------------------------------- staying inside


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike `resolve`, it bears links in a circle


def inside(root: Path, *parts: str) -> Path:
    """root/part/…/part, if that lies in `root` when all links are followed.

    Raises:
        InputError: it lies elsewhere.

    Example:
        >>> print(inside(Path("run"), "tickets", "a.npz"))
        run/tickets/a.npz
        >>> inside(Path("run"), "../a.npz")
        Traceback (most recent call last):
        ntk_awt.errors.InputError: path run/../a.npz: expected a place in run, got one outside
    """
    path = root.joinpath(*parts)
    if not _real(path).is_relative_to(_real(root)):
        raise InputError(f"path {path}", expected=f"a place in {root}", got="one outside")
    return path


def check_tree(root: Path) -> None:
    """Raise unless everything in a folder is a file or a folder, or a link to one inside.

    Whatever is read from or written to a folder that passes stays in it.

    Args:
        root: the folder; it may itself be a link, and need not be there.

    Raises:
        InputError: a link that leads outside, a device or a pipe.
    """
    top = _real(root)
    for folder, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink():
                inner = _real(path).is_relative_to(top)
            else:
                inner = path.is_dir() or path.is_file()
            if not inner:
                raise InputError(
                    f"folder {root}",
                    expected="files and folders, and no links that lead outside",
                    got=str(path.relative_to(top)),
                    fix="remove it, or put what it leads to in its place",
                )


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the device."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "neural-tangents", "numpy")
    return {
        "ntk-awt": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
    }
