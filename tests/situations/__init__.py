"""Situations in which a wrong answer would be silent: what came, what is right, side by side.

`python -m tests.situations [WORD …]` prints them all, or those whose name has one of the words, and
exits with 1 where one differs. `tests/test_situations.py` runs each as a test.

A situation is a function that returns an `Outcome`: what the package gave, and what is right by a
formula or by brute force in float64. `near`, `same`, `refused` and `warned` make outcomes.
"""

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ntk_awt.errors import InputError


class Outcome(NamedTuple):
    """What came beside what is right, as text, and whether they agree."""

    came: str
    right: str
    agrees: bool


class Situation(NamedTuple):
    """A named situation; nothing is computed before `outcome` is called."""

    name: str
    outcome: Callable[[], Outcome]


_FOUND: list[Situation] = []


def situation(name: str) -> Callable[[Callable[[], Outcome]], Callable[[], Outcome]]:
    """Register a function as the situation `name`."""

    def keep(function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        _FOUND.append(Situation(name, function))
        return function

    return keep


def collect() -> list[Situation]:
    """All situations of the modules of this package, by name."""
    for module in pkgutil.iter_modules(__path__):
        if module.name != "__main__":
            importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_FOUND, key=lambda one: one.name)


def _short(value: Any) -> str:
    array = np.asarray(value)
    if array.ndim == 0 and array.dtype.kind in "fc":
        return f"{array.item():.6g}"
    if array.size > 6:
        return f"{array.dtype.name}{list(array.shape)}, norm {np.linalg.norm(array):.6g}"
    return np.array2string(array, precision=6, separator=", ").replace("\n", "")


def near(came: Any, right: Any, *, relative: float = 0.0, absolute: float = 0.0) -> Outcome:
    """Numbers that agree up to a stated error; NaN never agrees.

    Args:
        came, right: arrays of one shape.
        relative: of the largest |right|.
        absolute: in the unit of the numbers.
    """
    a, b = np.asarray(came, np.float64), np.asarray(right, np.float64)
    allowed = absolute + relative * np.max(np.abs(b), initial=0.0)
    agrees = a.shape == b.shape and bool(np.all(np.abs(a - b) <= allowed))
    return Outcome(_short(came), f"{_short(right)} (± {allowed:.2g})", agrees)


def same(came: Any, right: Any) -> Outcome:
    """Values that have to be equal."""
    return Outcome(str(came), str(right), came == right)


def refused(call: Callable[[], Any], *words: str) -> Outcome:
    """A call that has to be refused by an `InputError` of one line with all of these words."""
    right = f"refused in one line with: {', '.join(words)}"
    try:
        came = f"accepted: {_short(call())}"
    except InputError as error:
        text = str(error)
        agrees = "\n" not in text and all(word in text for word in words)
        return Outcome(text, right, agrees)
    except Exception as error:
        came = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return Outcome(came, right, False)


def warned(call: Callable[[], Any], *words: str) -> Outcome:
    """A call that has to warn once, in one line with all of these words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    texts = [str(one.message) for one in caught]
    agrees = len(texts) == 1 and "\n" not in texts[0] and all(word in texts[0] for word in words)
    return Outcome(" | ".join(texts) or "no word", f"one line with: {', '.join(words)}", agrees)
