"""What the README promises: its Python runs, its files exist, its commands parse."""

import re
from pathlib import Path

import pytest

from ntk_awt.app.cli import commands as cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_quick_start_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.strip().splitlines()
    distances = [float(line.split()[1]) for line in lines[:-1]]
    assert distances[-1] < distances[0]
    assert lines[-1].count("Proportion(value=") == 2


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_and_flags_exist(capsys):
    commands = re.findall(r"^ntk-awt (\w+) (.*)$", TEXT, re.MULTILINE)
    assert commands
    for name, arguments in commands:
        with pytest.raises(SystemExit):
            cli.main([name, "--help-all"])
        known = capsys.readouterr().out
        for flag in re.findall(r"--[\w-]+", arguments):
            assert f"{flag} " in known, f"ntk-awt {name} {flag}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", TEXT)):
        assert f"\n{target}:" in makefile, target
