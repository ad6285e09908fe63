"""The import direction, what `import ntk_awt` loads, and the examples in the docstrings."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ntk_awt

ROOT = Path(ntk_awt.__file__).parents[1]
BASE = {"errors", "types", "config", "files", "network", "precision", "_version"}

MAY_IMPORT: dict[str, set[str]] = {
    "ntk_awt": {"_version"},
    "_version": set(),
    "errors": set(),
    "types": set(),
    "files": {"errors"},
    "network": {"errors"},
    "precision": set(),
    "interrupts": set(),
    "config": {"errors", "files", "types"},
    "checkpoints": {"errors"},
    "plots": {"errors", "files"},
    "report": {"errors", "files", "plots"},
    "data": BASE,
    "convolution": set(),
    "schedules": set(),
    "models": BASE | {"convolution"},
    "masks": BASE,
    "threats": BASE,
    "attacks": BASE | {"threats"},
    "linear": BASE | {"threats"},
    "kernels": BASE | {"masks"},
    "dynamics": BASE | {"masks", "attacks", "kernels"},
    "tickets": BASE | {"masks", "attacks", "kernels", "schedules"},
    "training": BASE | {"masks", "attacks", "checkpoints", "schedules"},
    "methods": BASE | {"masks", "attacks", "tickets", "training"},
    "evaluation": BASE | {"attacks"},
    "hygiene": BASE | {"attacks", "evaluation", "masks"},
    "assessment": BASE | {"attacks", "evaluation", "hygiene"},
}
"""Part of the package → the parts it may import, and whatever those may import (architecture.md).

A folder is one part, whose files may import each other. `plots` and `report` may import nothing
that computes; `experiment` may import every part above it, and only `inspection`, `sweep` and `cli`
may import `experiment`.
"""
MAY_IMPORT["experiment"] = set(MAY_IMPORT) - {"ntk_awt"}
MAY_IMPORT["inspection"] = {"experiment"}
MAY_IMPORT["robustness"] = {"inspection", "experiment"}
MAY_IMPORT["linear_study"] = {"linear", "plots", "data"}
MAY_IMPORT["sweep"] = {"experiment"}
MAY_IMPORT["cli"] = {
    "experiment",
    "inspection",
    "interrupts",
    "linear_study",
    "robustness",
    "sweep",
}
MAY_IMPORT["__main__"] = {"cli", "interrupts"}

INTERNALS = (
    "jax._src",
    "jax.core",
    "jax.extend",
    "jax.interpreters",
    "jax.lib",
    "jax.util",
    "jaxlib",
)
"""Parts of JAX that it may move at any time."""

COMPUTES = ("jax", "flax", "optax", "neural_tangents", "sklearn")
"""What `plots` and `report` may not import: they draw saved records."""


def _closure(part: str) -> set[str]:
    """The parts that `part` may import, directly or through another one."""
    direct = MAY_IMPORT[part]
    return direct.union(*(_closure(other) for other in direct))


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that `source` imports, at any depth of the file.

    `from a import b` counts as `a.b`, since `b` may be a module; so does the expression
    `jax.core.b`, which needs no import statement of its own.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                origin = ".".join(parents + ([origin] if origin else []))
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and _inside(name := ast.unparse(node), INTERNALS):
            yield node.lineno, name


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What the module `module`, with the text `source`, imports against the architecture."""
    part = module.split(".")[1] if "." in module else module
    if part not in MAY_IMPORT:
        return [f"{module}: no row in the table of imports"]
    found = []
    for line, name in imports(source, module, is_package=is_package):
        where = f"{module}:{line}: {name}"
        if _inside(name, ("ntk_awt",)):
            other = [*name.split("."), ""][1]
            if other != part and other not in _closure(part):
                found.append(f"{where}: {part} may not import it")
        elif module != "ntk_awt.kernels.compat" and _inside(name, (*INTERNALS, "neural_tangents")):
            found.append(f"{where}: only kernels/compat.py may")
        elif part in ("plots", "report") and _inside(name, COMPUTES):
            found.append(f"{where}: {part} may import nothing that computes")
    return found


def files() -> dict[str, Path]:
    """Every Python file of the package by the name of its module."""
    names = {}
    for path in sorted(Path(ntk_awt.__file__).parent.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


FILES = files()


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_architecture(module: str):
    path = FILES[module]
    source = path.read_text(encoding="utf-8")
    assert violations(source, module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ntk_awt.masks", "import ntk_awt.models"),
        ("ntk_awt.masks", "from ntk_awt import attacks"),
        ("ntk_awt.masks", "from ntk_awt.attacks import PGD"),
        ("ntk_awt.masks", "def f():\n    from ntk_awt.training import train"),
        ("ntk_awt.masks", "from .models import build"),
        ("ntk_awt.kernels.metrics", "from ..models import build"),
        ("ntk_awt.kernels.metrics", "from ntk_awt import tickets"),
        ("ntk_awt.config", "from ntk_awt._version import __version__"),
        ("ntk_awt.errors", "from ntk_awt.types import Params"),
        ("ntk_awt.report", "from ntk_awt.kernels import empirical"),
        ("ntk_awt.report", "from ntk_awt.config import RunConfig"),
        ("ntk_awt.plots", "import jax.numpy as jnp"),
        ("ntk_awt.report", "if True:\n    from jax import numpy"),
        ("ntk_awt.training", "from ntk_awt.experiment import Run"),
        ("ntk_awt.experiment", "from ntk_awt.cli import main"),
        ("ntk_awt.training", "import ntk_awt"),
        ("ntk_awt.models", "from jax._src import core"),
        ("ntk_awt.models", "from jax import core"),
        ("ntk_awt.models", "import jax\njax.core.Jaxpr"),
        ("ntk_awt.models", "from jax.interpreters.ad import JVPTracer"),
        ("ntk_awt.kernels.empirical", "import neural_tangents as nt"),
        ("ntk_awt.novelty", "import math"),
    ],
)
def test_planted_violation_is_caught(module: str, source: str):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("ntk_awt.masks", "import math\nimport jax\nfrom ntk_awt.errors import choose", False),
        ("ntk_awt.tickets.awt", "from ntk_awt.tickets.solver import Solver", False),
        ("ntk_awt.tickets", "from .solver import Solver", True),
        ("ntk_awt.kernels.compat", "from jax.extend import core\nimport neural_tangents", False),
        ("ntk_awt.cli", "def f():\n    from ntk_awt import masks, report", False),
    ],
)
def test_allowed_imports_pass(module: str, source: str, is_package: bool):
    assert violations(source, module, is_package=is_package) == []


def test_parts_and_files_form_no_circle():
    TopologicalSorter(MAY_IMPORT).prepare()
    graph: dict[str, set[str]] = {}
    for module, path in FILES.items():
        is_package = path.name == "__init__.py"
        found = imports(path.read_text(encoding="utf-8"), module, is_package=is_package)
        names = {name if name in FILES else name.rpartition(".")[0] for _, name in found}
        graph[module] = names & set(FILES)
    TopologicalSorter(graph).prepare()


def test_import_of_the_package_is_light():
    heavy = ["tensorflow", "flax", "neural_tangents", "sklearn", "matplotlib"]
    code = f"import sys, ntk_awt; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]", shown.stdout


@pytest.mark.parametrize("name", ntk_awt._MODULES)
def test_lazy_module_is_listed_and_loads(name: str):
    assert name in dir(ntk_awt)
    # Through the hook itself: another test may already have set the attribute by importing it.
    module = ntk_awt.__getattr__(name)
    assert module is importlib.import_module(f"ntk_awt.{name}")
    assert getattr(ntk_awt, name) is module


def test_every_public_module_is_lazily_exposed():
    public = {m.name for m in pkgutil.iter_modules(ntk_awt.__path__) if not m.name.startswith("_")}
    assert set(ntk_awt._MODULES) <= public
    assert public - set(ntk_awt._MODULES) <= {
        "cli",
        "interrupts",
        "checkpoints",
    }  # entry point; internal


def test_version_and_unknown_attribute():
    assert ntk_awt.__version__
    assert "__version__" in dir(ntk_awt)
    with pytest.raises(AttributeError, match="'ntk_awt' has no attribute 'masc'"):
        _ = ntk_awt.masc
    assert not hasattr(ntk_awt, "numpy")


@pytest.mark.parametrize("module", FILES)
def test_docstring_examples(module: str):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    found = [
        example
        for module in FILES
        for test in finder.find(importlib.import_module(module))
        for example in test.examples
    ]
    assert len(found) > 20
