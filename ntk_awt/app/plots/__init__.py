"""Figures from saved records only: nothing here computes a network.

Each function takes rows of `metrics.jsonl`, `results.json` or saved arrays and returns a Matplotlib
`Figure`; `save` writes it as SVG and PNG. Matplotlib loads with the first figure.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_awt.app.plots.kernels import (
        eigenvectors,
        kernel,
        polar,
        specialisation,
        spectrum,
        velocity,
    )
    from ntk_awt.app.plots.linear import (
        adversarial_rates,
        knowledge,
        learned_classifiers,
        phase_diagram,
    )
    from ntk_awt.app.plots.runs import (
        accuracies,
        compare,
        dynamics,
        examples,
        layer_densities,
        panels,
        relations,
        robustness,
        search,
        sweep_accuracy,
        sweep_steps,
        training_curves,
    )
    from ntk_awt.app.plots.style import colors, markers, save

_HOMES = {
    "style": ("colors", "markers", "save"),
    "runs": (
        "accuracies",
        "compare",
        "dynamics",
        "examples",
        "layer_densities",
        "panels",
        "relations",
        "robustness",
        "search",
        "sweep_accuracy",
        "sweep_steps",
        "training_curves",
    ),
    "kernels": ("eigenvectors", "kernel", "polar", "specialisation", "spectrum", "velocity"),
    "linear": ("adversarial_rates", "knowledge", "learned_classifiers", "phase_diagram"),
}

__all__ = [
    "accuracies",
    "adversarial_rates",
    "colors",
    "compare",
    "dynamics",
    "eigenvectors",
    "examples",
    "kernel",
    "knowledge",
    "layer_densities",
    "learned_classifiers",
    "markers",
    "panels",
    "phase_diagram",
    "polar",
    "relations",
    "robustness",
    "save",
    "search",
    "specialisation",
    "spectrum",
    "sweep_accuracy",
    "sweep_steps",
    "training_curves",
    "velocity",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"ntk_awt.app.plots.{home}"), name)
    raise AttributeError(f"module 'ntk_awt.app.plots' has no attribute {name!r}")
