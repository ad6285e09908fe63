"""What the suite promises of itself: nothing is computed on import, no cache is half an entry."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from tests import compiled

ROOT = Path(__file__).parents[1]

COLLECT = """
import importlib, pkgutil, sys
import pytest
code = pytest.main(
    ["--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider", *sys.argv[1:]]
)
import benchmarks, ntk_awt, proofs_check
for package in (benchmarks, ntk_awt, proofs_check):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
print("all imported")
"""

PLANTED = {
    "key": "KEY = jax.random.key(0)",
    "array": "X = jnp.ones(3)",
    "program": "F = jax.jit(lambda x: x + 1)(2.0)",
    "parameter": """
        @pytest.mark.parametrize("x", [jnp.zeros(2)])
        def test_parametrised(x):
            pass
        """,
}


def test_nothing_is_computed_on_import_or_in_parametrisation(tmp_path):
    """Where JAX has no device, whatever computes raises: planted modules alone do."""
    for name, text in PLANTED.items():
        lines = f"import jax, jax.numpy as jnp, pytest\n{textwrap.dedent(text)}"
        (tmp_path / f"test_{name}.py").write_text(lines)
    ours = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(ROOT / "tests"), str(tmp_path)],
        cwd=ROOT,
        env=ours | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "all imported" in done.stdout, done.stderr[-3000:]
    failed = re.findall(r"^ERROR .*?(\w+)\.py", done.stdout, re.MULTILINE)
    assert sorted(failed) == sorted(f"test_{name}" for name in PLANTED), done.stdout[-3000:]
    assert "nowhere" in done.stdout
    assert f"{Path(__file__).name}: " in done.stdout


PROGRAM = "import jax; print(jax.jit(lambda x: x * 3 + 1)(2.0))"


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code where warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def cut(folder: Path) -> None:
    """Entries as a kill leaves them while they are written."""
    entries = list(folder.iterdir())
    assert entries
    for entry in entries:
        whole = entry.read_bytes()
        entry.unlink()
        entry.write_bytes(whole[: len(whole) // 2])


def test_half_an_entry_of_a_branch_is_read_by_nobody_else(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv(compiled.VARIABLE, str(own))
    branch = compiled.branch()
    assert python(PROGRAM, branch).stdout == "7.0\n"
    assert not list(own.iterdir())
    cut(Path(branch[compiled.VARIABLE]))
    assert python(PROGRAM, dict(os.environ)).stdout == "7.0\n"
    later = Path(compiled.branch()[compiled.VARIABLE])
    assert {p.name for p in later.iterdir()} == {p.name for p in own.iterdir()} != set()
    cut(own)
    assert "Error reading persistent compilation cache" in python(PROGRAM, dict(os.environ)).stderr
    assert python(PROGRAM, os.environ | {compiled.VARIABLE: str(later)}).stdout == "7.0\n"


def test_every_process_that_tests_has_a_folder_of_its_own():
    code = f"import os, tests.conftest; print(os.environ[{compiled.VARIABLE!r}])"
    found = {python(code, dict(os.environ)).stdout.strip() for _ in range(2)}
    assert len(found - {"", os.environ[compiled.VARIABLE]}) == 2
