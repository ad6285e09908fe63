"""Fixtures that several test files share."""

import os
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import compiled

# Equal programs of a process's tests, and of the processes that they start, compile once. Workers
# inherit the variables of the process that starts them, but never its folder.
_CACHE = tempfile.TemporaryDirectory(prefix="ntk-awt-compiled-")
os.environ[compiled.VARIABLE] = tempfile.mkdtemp(dir=_CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# How long an example takes says something of the machine and of what else it does.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Mark as slow what a module's `SLOW` names, as patterns of "test" or "test case".

    They are further cases of what other tests of the default suite show. A pattern that names
    nothing is an error, unless single tests were asked for.
    """
    used: dict[tuple[str, str], bool] = {}
    for item in items:
        name = item.name.replace("[", " ", 1).removesuffix("]")
        for pattern in getattr(item.module, "SLOW", ()):
            hit = fnmatchcase(name, pattern)
            known = (item.path.name, pattern)
            used[known] = used.get(known, False) or hit
            if hit:
                item.add_marker(pytest.mark.slow)
    idle = [f"{module}: {pattern}" for (module, pattern), found in used.items() if not found]
    if idle and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"SLOW names no test: {', '.join(idle)}")


@pytest.fixture(scope="module", autouse=True)
def _settings_stay():
    """A module leaves JAX's settings as it found them: later ones compile as their processes do."""
    import jax  # after the variables above, which it reads when it is imported

    before = dict(jax.config.values)
    yield
    after = dict(jax.config.values)
    assert after == before, "a test changed jax.config for the modules after it"
    # A worker would keep the programs of all modules: gigabytes, and tens of thousands of mappings.
    jax.clear_caches()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets, each in a sub-folder; skips where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("NTK_AWT_DATA") or default).expanduser()
    if not folder.is_dir():
        pytest.skip(f"no real data: NTK_AWT_DATA is not set to a folder, and {folder} is not there")
    return folder
