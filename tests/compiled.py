"""JAX's cache of compiled programs, shared only by processes that cannot meet half an entry.

JAX writes an entry in place: who reads it meanwhile, or after a kill, gets half of it. So each
process that runs tests has a folder of its own, made by `conftest.py`. Processes that a test starts
inherit it while the test waits for them; one that runs beside others, or that may be killed at any
moment, gets a branch.
"""

import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def branch() -> dict[str, str]:
    """The environment for a process of its own: all entries so far, and a place for its new ones.

    Entries are links to the same files, which nobody writes again.
    """
    here = Path(os.environ[VARIABLE])
    there = Path(tempfile.mkdtemp(dir=here.parent))
    shutil.copytree(here, there, copy_function=os.link, dirs_exist_ok=True)
    return os.environ | {VARIABLE: str(there)}
