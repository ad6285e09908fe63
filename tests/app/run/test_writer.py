"""The one writer of a run folder: its lock, and what becomes of a second one."""

import errno
import fcntl
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ntk_awt.app import config as configs
from ntk_awt.app.cli import commands as cli
from ntk_awt.app.run.folder import Paths
from ntk_awt.app.run.records import Made
from ntk_awt.app.run.writer import Writer, lock
from ntk_awt.errors import InputError
from tests.app.run.test_folder import SMALL, lines, whole  # noqa: F401  a fixture
from tests.app.run.test_stages import CONFIG, numbers, run

HOLDS = """
import os, signal, sys
from pathlib import Path
from ntk_awt.app.run.writer import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_second_run_is_refused_in_one_line_and_the_first_goes_on(
    whole,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    """At three moments of the first run, by every command that would write."""
    root, file = tmp_path / "run", tmp_path / "config.toml"
    configs.save(SMALL, file)
    new = f"--config {shlex.quote(str(file))} --run-dir {shlex.quote(str(root))}"
    commands = [f"run {new}", f"ticket {new}", f"train {shlex.quote(str(root))}"]
    add, said = Writer.add, []

    def disturbed(self, rows):
        if len(said) < len(commands):
            before = sorted(root.rglob("*"))
            assert cli.main(shlex.split(commands[len(said)])) == 2
            said.append(capsys.readouterr().err)
            assert sorted(root.rglob("*")) == before
        add(self, rows)

    monkeypatch.setattr(Writer, "add", disturbed)
    run(SMALL, root)
    assert len(said) == len(commands)
    for error in said:
        assert error.startswith(f"error: run folder {root}: expected no other writer, got ")
        assert f"process {os.getpid()} on host {socket.gethostname()}, since 2" in error
        assert error.count("\n") == 1
    assert lines(root) == lines(whole)
    assert numbers(root) == numbers(whole)


def test_a_killed_process_frees_its_lock(tmp_path):
    """Another process holds it, and is named; a kill leaves the file, but not the lock."""
    path = tmp_path / "run" / "writer.lock"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {child.pid} on host"), lock(path):
        pass
    child.communicate("\n", timeout=60)
    assert json.loads(path.read_text())["pid"] == child.pid
    with Writer(CONFIG, path.parent) as writer:
        assert json.loads(path.read_text())["pid"] == os.getpid()
        writer.add([Made("random", 0, 1.0)])
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.toml", "metrics.jsonl"]


def left_by(path: Path, pid: int, host: str) -> None:
    path.write_text(json.dumps({"pid": pid, "host": host, "since": "2026-01-01"}))


def ended() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_lock_of_another_host_is_taken_with_a_warning(tmp_path):
    path = tmp_path / "writer.lock"
    left_by(path, 7, "elsewhere")
    with pytest.warns(UserWarning, match="process 7 on elsewhere left its lock"), lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """The file alone decides: of a live process, or one that cannot be seen, it is respected."""

    def none(*arguments):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", none)
    path, here = tmp_path / "writer.lock", socket.gethostname()
    with ExitStack() as held:
        with pytest.warns(UserWarning, match="has no locks"):
            held.enter_context(lock(path))
        with pytest.raises(InputError, match=f"process {os.getpid()} on host {here}"), lock(path):
            pass
        assert path.exists()
    assert not path.exists()
    left_by(path, ended(), here)
    with pytest.warns(UserWarning, match="has no locks"), lock(path):
        pass
    left_by(path, 7, "elsewhere")
    with pytest.raises(InputError, match=r"process 7 on host elsewhere.*delete"), lock(path):
        pass


def test_leftovers_of_a_kill_are_removed_where_only_the_writer_writes(tmp_path):
    root = tmp_path / "run"
    kept = root / "evaluation" / "dense.0a.partial.npz"  # another process may be writing it
    gone = [root / "tickets" / "a.0a.partial.safetensors", root / "metrics.0a.partial.jsonl"]
    with Writer(CONFIG, root):
        pass
    for path in (kept, *gone):
        path.parent.mkdir(exist_ok=True)
        path.write_text("a pa")
    with Writer(CONFIG, root):
        pass
    assert [path.exists() for path in (kept, *gone)] == [True, False, False]


def test_a_failed_append_is_cut_back(tmp_path, monkeypatch):
    """What a full disk left of a line does not stay before the next one."""
    root = tmp_path / "run"
    with Writer(CONFIG, root) as writer:
        writer.add([Made("a", 0, 1.0)])
        with monkeypatch.context() as patched:

            def full(descriptor: int) -> None:
                with Paths(root).metrics.open("r+") as file:
                    file.truncate(os.fstat(descriptor).st_size - 9)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                writer.add([Made("b", 0, 1.0)])
        writer.add([Made("b", 0, 2.0)])
    rows = [json.loads(line) for line in Paths(root).metrics.read_text().splitlines()]
    assert [(row["network"], row["seconds"]) for row in rows] == [("a", 1.0), ("b", 2.0)]


def test_other_settings_are_refused_without_a_lock_file(tmp_path):
    shutil.copytree(tmp_path, tmp_path / "run")
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="something else"), Writer(CONFIG, tmp_path / "run"):
        pass
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]
