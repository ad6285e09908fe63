"""ntk-awt: adversarial winning tickets at initialisation, and their theory by numbers.

Sub-modules load on first use: `import ntk_awt` is quick and needs neither Flax nor neural-tangents.
"""

import importlib
from typing import Any

from ntk_awt._version import __version__

_MODULES = (
    "assessment",
    "attacks",
    "config",
    "convolution",
    "data",
    "dynamics",
    "errors",
    "evaluation",
    "experiment",
    "files",
    "hygiene",
    "inspection",
    "kernels",
    "linear",
    "linear_study",
    "masks",
    "methods",
    "models",
    "plots",
    "precision",
    "report",
    "robustness",
    "schedules",
    "sweep",
    "threats",
    "tickets",
    "training",
    "types",
)

__all__ = ["__version__", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ntk_awt.{name}")
    raise AttributeError(f"module 'ntk_awt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
