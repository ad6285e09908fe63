"""The three storeys: who may import whom, which libraries each may use, and what is public."""

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

GROUND = {"errors", "files", "types", "network", "masks"}

MAY_IMPORT: dict[str, set[str]] = {
    # ground
    "types": set(),
    "errors": set(),
    "files": {"", "errors"},
    "network": {"errors", "types"},
    "masks": {"errors", "files", "types", "network"},
    "checkpoints": {"errors"},
    # library
    "data": GROUND,
    "models": GROUND,
    "threats": GROUND,
    "attacks": GROUND | {"threats"},
    "kernels": GROUND,
    "tickets": GROUND | {"attacks", "threats", "kernels"},
    "training": GROUND | {"attacks", "threats", "checkpoints"},
    "theory": GROUND | {"attacks", "threats", "kernels"},
    "robustness": GROUND | {"attacks", "threats", "theory"},
    "pipelines": GROUND | {"attacks", "threats", "tickets", "training"},
    "": set(),  # ntk_awt/__init__.py names the modules, and loads them on first use
    # app
    "app.interrupts": set(),
    "app.config": {"errors", "files"},
    "app.verdicts": set(),
    "app.plots": {"errors", "files"},
    "app.report": {"errors", "files", "app.plots", "app.verdicts"},
}
"""Part of the package → the parts it may import, and whatever those may import.

A part is a module or folder of `ntk_awt`, and one of `ntk_awt.app` there.
"""
LIBRARY = {part for part in MAY_IMPORT if part and not part.startswith("app.")}
MAY_IMPORT |= {
    "app.names": LIBRARY | {"app.config"},
    "app.run": LIBRARY | {"", "app.config", "app.names", "app.report", "app.verdicts"},
    "app.sources": {"app.run"},
    "app.evaluations": {"app.sources", "app.plots"},
    "app.linear": {"theory", "data", "app.config", "app.plots"},
    "app.sweep": {"app.run", "app.plots"},
    "app.cli": {"app.sources", "app.evaluations", "app.linear", "app.sweep", "app.interrupts"}
    | {""},
    "app": set(),
    "__main__": {"", "app.cli", "app.interrupts"},
    "proofs_check": LIBRARY | {"app.report"},
    "benchmarks": LIBRARY | {"proofs_check"},
}

DEBTS: dict[str, set[str]] = {
    "data": {"app.config"},
    "models": {"app.config"},
    "threats": {"app.config"},
    "kernels": {"app.config"},
    "tickets": {"app.config", "schedules"},
    "training": {"app.config", "schedules"},
    "robustness": {"app.config", "kernels"},
    "schedules": set(),
    "app.cli": {"proofs_check", "benchmarks"},
    "proofs_check": {"app.config", "app.cli"},
    "benchmarks": {"app.config", "app.names"},
}
"""Imports against the table that are still to go; one that nothing uses has to be deleted here."""

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

SHELL = ("tyro", "rich", "matplotlib", "jinja2", "tomllib", "tomli_w")
"""What only the app may import."""

COMPUTES = ("jax", "flax", "optax", "neural_tangents", "sklearn")
"""What `app.plots` and `app.report` may not import: they draw saved records."""


def _closure(part: str) -> set[str]:
    """The parts that `part` may import, directly or through another one."""
    direct = MAY_IMPORT[part]
    return direct.union(*(_closure(other) - {""} for other in direct))


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


def part_of(name: str) -> str:
    """The part that a module, or a name inside one, belongs to."""
    first, *rest = name.split(".")
    if first != "ntk_awt":
        return first
    if rest[:1] == ["app"] and len(rest) > 1:
        return ".".join(rest[:2])
    return rest[0] if rest and f"ntk_awt.{rest[0]}" in PACKAGE_PARTS else ""


def files() -> dict[str, Path]:
    """Every Python file of ours by the name of its module."""
    names = {}
    for top in ("ntk_awt", "proofs_check", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


FILES = files()
PACKAGE_PARTS = {".".join(module.split(".")[:2]) for module in FILES if "." in module}


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What the module `module`, with the text `source`, imports against the architecture."""
    part = module if module.startswith("ntk_awt.") else ""
    part = part_of(module) or part.removeprefix("ntk_awt.")
    if part not in MAY_IMPORT and part not in DEBTS:
        return [f"{module}: no row in the table of imports"]
    allowed = _closure(part) if part in MAY_IMPORT else set()
    found = []
    for line, name in imports(source, module, is_package=is_package):
        where = f"{module}:{line}: {name}"
        if _inside(name, ("ntk_awt", "proofs_check", "benchmarks")):
            other = part_of(name)
            if other != part and other not in allowed | DEBTS.get(part, set()):
                found.append(f"{where}: {part} may not import it")
        elif _inside(name, INTERNALS) and module != "ntk_awt.kernels.compat":
            found.append(f"{where}: only kernels/compat.py may")
        elif _inside(name, ("neural_tangents",)) and part != "benchmarks":
            if module != "ntk_awt.kernels.compat":
                found.append(f"{where}: only kernels/compat.py may")
        elif part in ("app.plots", "app.report") and _inside(name, COMPUTES):
            found.append(f"{where}: {part} may import nothing that computes")
        elif part in LIBRARY and _inside(name, SHELL):
            found.append(f"{where}: only the app may")
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_architecture(module: str):
    path = FILES[module]
    source = path.read_text(encoding="utf-8")
    assert violations(source, module, is_package=path.name == "__init__.py") == []


def test_every_debt_is_still_owed():
    owed: dict[str, set[str]] = {}
    for module, path in FILES.items():
        source, is_package = path.read_text(encoding="utf-8"), path.name == "__init__.py"
        for _, name in imports(source, module, is_package=is_package):
            if _inside(name, ("ntk_awt", "proofs_check", "benchmarks")):
                owed.setdefault(part_of(module), set()).add(part_of(name))
    for part, debts in DEBTS.items():
        assert debts <= owed.get(part, set()), f"{part} no longer imports all of {debts}"


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
        ("ntk_awt.app.config", "from ntk_awt import __version__"),
        ("ntk_awt.errors", "from ntk_awt.types import Params"),
        ("ntk_awt.app.report.page", "from ntk_awt.kernels import empirical"),
        ("ntk_awt.app.report.page", "from ntk_awt.app.config import RunConfig"),
        ("ntk_awt.app.plots", "import jax.numpy as jnp"),
        ("ntk_awt.app.report.page", "if True:\n    from jax import numpy"),
        ("ntk_awt.training.loop", "from ntk_awt.app.run.stages import Run"),
        ("ntk_awt.app.run.stages", "from ntk_awt.app.cli.commands import main"),
        ("ntk_awt.training", "import ntk_awt"),
        ("ntk_awt.threats.linf", "from ntk_awt.app import config"),
        ("ntk_awt.masks", "from ntk_awt.app import config"),
        ("ntk_awt.robustness.hygiene", "import rich.progress"),
        ("ntk_awt.theory.linear.svm", "import matplotlib.pyplot as plt"),
        ("ntk_awt.files", "import tomllib"),
        ("ntk_awt.models", "from jax._src import core"),
        ("ntk_awt.models", "from jax import core"),
        ("ntk_awt.models", "import jax\njax.core.Jaxpr"),
        ("ntk_awt.models", "from jax.interpreters.ad import JVPTracer"),
        ("ntk_awt.theory.dynamics.infinite", "import neural_tangents as nt"),
        ("ntk_awt.kernels.empirical", "from proofs_check import core"),
        ("proofs_check.d1_flow", "from ntk_awt.app.run import stages"),
        ("benchmarks.kernels", "from ntk_awt.app import config"),
        ("ntk_awt.novelty", "import math"),
        ("ntk_awt.app.novelty", "import math"),
    ],
)
def test_planted_violation_is_caught(module: str, source: str, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DEBTS", {})
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("ntk_awt.masks", "import math\nimport jax\nfrom ntk_awt.errors import choose", False),
        ("ntk_awt.tickets.solvers.awt", "from ntk_awt.tickets.solver import Solver", False),
        ("ntk_awt.tickets", "from .solver import Solver", True),
        ("ntk_awt.kernels.compat", "from jax.extend import core\nimport neural_tangents", False),
        ("ntk_awt.app.cli.commands", "def f():\n    from ntk_awt import masks, theory", False),
        ("ntk_awt.app.cli.tables", "import rich.table", False),
        ("proofs_check.d1_flow", "from ntk_awt.theory.dynamics import flow", False),
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
    heavy = ["tensorflow", "flax", "neural_tangents", "sklearn", "matplotlib", "rich", "tyro"]
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
    assert set(ntk_awt._MODULES) == public


def test_version_and_unknown_attribute():
    assert ntk_awt.__version__
    assert "__version__" in dir(ntk_awt)
    with pytest.raises(AttributeError, match="'ntk_awt' has no attribute 'masc'"):
        _ = ntk_awt.masc
    assert not hasattr(ntk_awt, "numpy")


PACKAGE = [module for module in FILES if module.startswith("ntk_awt")]


@pytest.mark.parametrize("module", PACKAGE)
def test_docstring_examples(module: str):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    found = [
        example
        for module in PACKAGE
        for test in finder.find(importlib.import_module(module))
        for example in test.examples
    ]
    assert len(found) > 20
