"""ntk-awt: adversarial winning tickets at initialisation, and their theory by numbers.

Sub-modules load on first use: `import ntk_awt` is quick and needs neither Flax nor neural-tangents.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "app",
    "attacks",
    "checkpoints",
    "data",
    "errors",
    "files",
    "kernels",
    "masks",
    "models",
    "network",
    "robustness",
    "schedules",
    "theory",
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
