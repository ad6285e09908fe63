"""Input checks: what was expected, what was got, what to change. Imports nothing of ours.

JAX loads on the first check of an array, so that the command line can complain without it.
"""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import numpy as np


class InputError(ValueError):
    """Bad input from the user: one line, `expected …, got …`, and what to change.

    The command line prints it without a traceback and exits with code 2.

    Args:
        what: the thing that is wrong, named as the user knows it.
        expected: what would have been right.
        got: what was there.
        fix: what to change, if it is not obvious.
    """

    def __init__(self, what: str, *, expected: str, got: str, fix: str = ""):
        super().__init__(f"{what}: expected {expected}, got {got}" + (f"; {fix}" if fix else ""))


def leaf_name(path: Any) -> str:
    """Name of a pytree leaf as people write it: `dense1/kernel`."""
    import jax

    return jax.tree_util.keystr(path, simple=True, separator="/")


def choose(what: str, name: str, known: Iterable[str]) -> None:
    """Raise unless `name` is one of `known`; the error lists them and the closest spelling."""
    known = sorted(known)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else ""
        raise InputError(what, expected=f"one of {', '.join(known)}", got=repr(name), fix=fix)


LARGEST = 1e30
"""No larger setting: float32 ends at 3.4e38, and settings are multiplied."""


def check_number(
    what: str, value: float, *, low: float, high: float = np.inf, low_open: bool = False
) -> None:
    """Raise unless `value` is a finite number in [low, high], or (low, high] with `low_open`."""
    if LARGEST < value < math.inf:
        high = min(high, LARGEST)
    inside = low < value <= high if low_open else low <= value <= high
    if not (inside and value < math.inf):
        top = "∞)" if np.isinf(high) else f"{high:g}]"
        interval = f"a number in {'(' if low_open else '['}{low:g}, {top}"
        raise InputError(what, expected=interval, got=f"{value}")


NAME = re.compile(r"\w[\w .,+=()-]*")


def check_name(what: str, name: str) -> None:
    """Raise unless `name` can be that of a file in a folder: it leads nowhere else.

    Raises:
        InputError: a separator of paths, a dot in front, markup, or more than 100 bytes.

    Example:
        >>> check_name("variant", "awt-10 (l2)")
        >>> check_name("variant", "../evil")
        Traceback (most recent call last):
        ntk_awt.errors.InputError: variant: expected a name of letters, digits and .,+=()-_ with \
no dot in front, got '../evil'; rename it
    """
    if not NAME.fullmatch(name) or len(name.encode(errors="replace")) > 100:
        short = name if len(name) <= 100 else f"{name[:50]}… of {len(name)} characters"
        raise InputError(
            what,
            expected="a name of letters, digits and .,+=()-_ with no dot in front",
            got=repr(short),
            fix="rename it",
        )


_KINDS: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number"}


def check_structure(what: str, value: Any, pattern: Any) -> None:
    """Raise unless plain values, as JSON has them, are built as a pattern says.

    Args:
        what: the value's name; that of an entry is added to it.
        value: to check.
        pattern: a type or a union of types (True is no number); [pattern], a list of such; a tuple
            of patterns, a list of just these; {key: pattern}, a table with at least these keys,
            where the key `str` stands for every one.

    Raises:
        InputError: the first part that is missing or of another kind.

    Example:
        >>> check_structure("row", {"step": 3, "loss": 0.5}, {"step": int, "loss": float})
        >>> check_structure("row", {"layers": [{"kept": 1}, {}]}, {"layers": [{"kept": int}]})
        Traceback (most recent call last):
        ntk_awt.errors.InputError: row.layers[1]: expected the entry kept, got none
    """

    def fail(expected: str) -> None:
        text = repr(value)
        short = text if len(text) <= 60 else f"{text[:60]}…"
        raise InputError(what, expected=expected, got=short)

    if isinstance(pattern, dict):
        if not isinstance(value, dict):
            return fail("a table")
        for key, inner in pattern.items():
            if key is str:
                for name, entry in value.items():
                    check_structure(f"{what}.{name}", entry, inner)
            elif key not in value:
                raise InputError(what, expected=f"the entry {key}", got="none")
            else:
                check_structure(f"{what}.{key}", value[key], inner)
    elif isinstance(pattern, list | tuple):
        fixed = isinstance(pattern, tuple)
        if not isinstance(value, list) or (fixed and len(value) != len(pattern)):
            return fail(f"a list of {len(pattern)}" if fixed else "a list")
        for i, entry in enumerate(value):
            check_structure(f"{what}[{i}]", entry, pattern[i if fixed else 0])
    elif not isinstance(value, pattern) or (isinstance(value, bool) and pattern is not bool):
        fail(_KINDS.get(pattern, "a number"))
    return None


def check_count(what: str, value: int, *, low: int) -> None:
    """Raise unless `value` is a whole number (an int) from `low` on."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise InputError(what, expected=f"a whole number ≥ {low}", got=repr(value))


def check_finite(what: str, tree: Any) -> None:
    """Raise if any leaf of `tree` holds NaN or infinity; the error names the leaf and how many."""
    import jax
    import jax.numpy as jnp

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.asarray(leaf)
        if jnp.issubdtype(values.dtype, np.inexact) and not (ok := np.isfinite(values)).all():
            raise InputError(
                f"{what} {leaf_name(path)}".rstrip(),
                expected="finite values",
                got=f"{values.size - int(ok.sum())} of {values.size} NaN or infinite",
            )


def check_images(what: str, images: Any, bounds: tuple[Any, Any] = (0.0, 1.0)) -> None:
    """Raise unless `images` is a floating array [n, *shape], finite and inside `bounds`.

    Values that were scaled as (x − mean)/std in float32, or in the dtype of the images where that
    is coarser, lie outside exact bounds by 4u(|low| + |high|) at most, u its unit roundoff: u
    (high − low) of the rounded mean and std, 2u of the division, u of the bounds. So much is
    allowed.

    Args:
        what: name of the images.
        images: [n, *shape].
        bounds: (low, high), numbers or arrays that broadcast to one image.
    """
    import jax.numpy as jnp

    values = np.asarray(images)
    if not jnp.issubdtype(values.dtype, np.floating):
        raise InputError(
            what,
            expected="floating-point images",
            got=f"dtype {values.dtype}",
            fix="convert first, e.g. images.astype('float32') / 255",
        )
    if values.ndim < 2:
        raise InputError(what, expected="an array [n, *shape]", got=f"shape {values.shape}")
    check_finite(what, values)
    low, high = (np.asarray(bound, np.float64) for bound in bounds)
    shape = values.shape[1:]
    for bound in (low, high):
        # Broadcasting as NumPy does it: no axis more than an image, each of size 1 or the image's.
        pairs = zip(bound.shape[::-1], shape[::-1], strict=False)
        if bound.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in pairs):
            raise InputError(
                f"bounds of {what}",
                expected=f"numbers, or arrays that broadcast to an image of shape {shape}",
                got=f"shape {bound.shape}",
                fix="give those of c channels shape (c,) for [h, w, c], (c, 1, 1) for [c, h, w]",
            )
    if values.size == 0:
        return
    u = max(float(jnp.finfo(values.dtype).eps), 2.0**-23) / 2
    slack = 4 * u * sum(np.where(np.isfinite(bound), abs(bound), 0.0) for bound in (low, high))
    lowest, highest = (end.astype(np.float64) for end in (values.min(0), values.max(0)))
    excess = np.maximum(low - lowest, highest - high) - slack
    if np.any(excess > 0):
        where = ""
        if low.ndim or high.ndim:  # the bounds of the pixel that is furthest outside
            at = np.unravel_index(excess.argmax(), shape)
            where = f" at {tuple(map(int, at))} of an image"
            low, high = (np.broadcast_to(bound, shape)[at] for bound in (low, high))
            lowest, highest = lowest[at], highest[at]
        # As short as tells these floats from all others of their dtype.
        got = (str(values.dtype.type(v)).removesuffix(".0") for v in (lowest.min(), highest.max()))
        raise InputError(
            what,
            expected=f"values in [{low:.9g}, {high:.9g}]{where}",
            got=f"[{', '.join(got)}]",
            fix="rescale the images, or set the data set's bounds",
        )


def check_labels(what: str, labels: Any, n: int, num_classes: int) -> None:
    """Raise unless `labels` is an integer array [n] with values in 0 … num_classes − 1."""
    values = np.asarray(labels)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(what, expected="integer labels", got=f"dtype {values.dtype}")
    if values.shape != (n,):
        raise InputError(what, expected=f"shape ({n},)", got=f"shape {values.shape}")
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        raise InputError(
            what,
            expected=f"labels in 0…{num_classes - 1}",
            got=f"{values.min()}…{values.max()}",
        )


def check_same_tree(what: str, tree: Any, reference: Any, *, scalars: bool = False) -> None:
    """Raise unless `tree` has the leaves of `reference`, with the same shapes (or scalars).

    The error names the first leaf that is missing, unknown or of another shape.
    """
    import jax

    def leaves(t: Any) -> dict[str, tuple[int, ...]]:
        flat = jax.tree_util.tree_leaves_with_path(t)
        return {leaf_name(path): np.shape(leaf) for path, leaf in flat}

    found, wanted = leaves(tree), leaves(reference)
    for name, shape in wanted.items():
        shape = () if scalars else shape
        if name not in found:
            raise InputError(f"{what} {name}", expected=f"a leaf of shape {shape}", got="no leaf")
        if found[name] != shape:
            raise InputError(
                f"{what} {name}", expected=f"shape {shape}", got=f"shape {found[name]}"
            )
    if extra := sorted(set(found) - set(wanted)):
        raise InputError(
            f"{what} {extra[0]}", expected=f"only the leaves {', '.join(wanted)}", got="one more"
        )
