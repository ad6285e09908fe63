"""Ctrl-C and SIGTERM at any moment: one line, the promised exit code, nothing lost."""

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ntk_awt.app import config as configs
from ntk_awt.app.cli import commands as cli
from tests.app.run.test_stages import CONFIG, numbers, records, run

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's background job lacks
from ntk_awt import __main__
from ntk_awt.app import interrupts
interrupts.install()
print("started", flush=True)
sys.exit(__main__.main())
"""

COMPILING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from ntk_awt.app import interrupts
interrupts.install()
import jax, jax.numpy as jnp
def deep(x):
    for i in range(3000):
        x = jnp.sin(x @ x.T) @ x
    return x
lowered = jax.jit(deep).lower(jnp.ones((3, 3)))
print("compiling", flush=True)
lowered.compile()
print("compiled", flush=True)
"""


def start(arguments: Sequence[str], code: str = COMMAND) -> subprocess.Popen:
    """A command in a process of its own, once it handles signals."""
    # A cache that a kill tears would warn the processes after it.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    assert child.stdout.readline() in ("started\n", "compiling\n")
    return child


def check(child: subprocess.Popen, number: int, code: int, word: str) -> str:
    """Send the signal; the process says one line and ends with that code."""
    child.send_signal(number)
    out, error = child.communicate(timeout=120)
    assert child.returncode == code, error
    lines = [line for line in error.splitlines() if " left " not in line]  # bars that were done
    assert len(lines) == 1, error
    assert lines[0].startswith(f"{word}; ")
    assert "Traceback" not in out + error
    return lines[0]


def wait_for(child: subprocess.Popen, there: Callable[[], bool]) -> None:
    while not there():
        assert child.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, and its config file."""
    folder = tmp_path_factory.mktemp("whole")
    config = dataclasses.replace(CONFIG, networks=("dense",))
    configs.save(config, folder / "config.toml")
    run(config, folder / "run")
    return folder


def test_a_run_that_is_interrupted_again_and_again_ends_with_the_same_numbers(whole, tmp_path):
    """While it imports, while XLA compiles, while it trains, and by SIGTERM."""
    root = tmp_path / "run"
    arguments = ["run", "--config", str(whole / "config.toml"), "--run-dir", str(root)]
    resume = f"to resume: {shlex.join(['ntk-awt', *arguments])}"

    child = start(arguments)
    assert "to start again: ntk-awt run" in check(child, signal.SIGINT, 130, "interrupted")

    child = start(arguments)
    wait_for(child, (root / "tickets" / "dense.safetensors").exists)
    time.sleep(0.5)  # in the first of the training's programs
    assert resume in check(child, signal.SIGINT, 130, "interrupted")

    child = start(arguments)
    wait_for(child, (root / "dynamics" / "dense" / "epoch-0002.npz").exists)
    line = check(child, signal.SIGTERM, 143, "terminated")
    assert line.endswith(resume)
    assert f"finished work is in {root}" in line

    command = line.partition("to resume: ntk-awt ")[2]
    assert cli.main(shlex.split(command)) == 0
    assert numbers(root) == numbers(whole / "run")
    assert records(root) == records(whole / "run")


def test_ctrl_c_does_not_wait_for_a_compilation():
    child = start([], COMPILING)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=300)
    assert child.returncode == 130
    assert "compiled" not in out
    assert error == "interrupted; to start again: ntk-awt\n"


def test_a_second_ctrl_c_does_not_wait_for_a_reader():
    """The orderly end hangs, since nobody reads what it still has to write."""
    hanging = COMMAND.replace(
        "sys.exit(__main__.main())",
        "import time\ninterrupts.PATIENCE = 1000.0\n"
        "interrupts.at_end.append(lambda: time.sleep(1000))\ntime.sleep(1000)",
    )
    child = start(["verify"], hanging)
    assert child.stderr is not None
    child.send_signal(signal.SIGINT)
    assert child.stderr.readline() == "interrupted; to start again: ntk-awt verify\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    child.communicate()


def test_a_program_that_imports_the_package_keeps_its_handlers():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert cli.main([]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [("| :", 141, ""), ("> /dev/full", 2, "No space left on device"), (">&-", 0, "")],
)
def test_output_that_cannot_be_written(target, code, words):
    command = f"{sys.executable} -m ntk_awt {target}; exit ${{PIPESTATUS[0]}}"
    if target == "| :":
        command = f"{{ sleep 1; {sys.executable} -m ntk_awt; }} {target}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == (1 if words else 0)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_ctrl_c_at_a_random_moment(whole, tmp_path, moment):
    """Five moments each of `run`, `ticket`, `evaluate` and `verify`, most while XLA compiles."""
    root = tmp_path / "run"
    new = ["--config", str(whole / "config.toml"), "--run-dir", str(root)]
    shutil.copytree(whole / "run", tmp_path / "finished")
    commands = (
        ["run", *new],
        ["ticket", *new, "--networks", "dense", "ticket"],
        ["evaluate", str(tmp_path / "finished"), "--attacks", "auto", "--epsilon", "0.07"],
        ["verify", "--full"],
    )
    child = start(commands[moment % 4])
    time.sleep(np.random.default_rng(moment).uniform(0, 8))
    check(child, signal.SIGINT, 130, "interrupted")
    if moment % 4 == 0:
        assert cli.main(commands[0]) == 0
        assert numbers(root) == numbers(whole / "run")
