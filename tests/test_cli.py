"""The command line: help, settings from file and flags, each command on a saved run, errors."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from ntk_awt import cli, experiment
from ntk_awt import config as configs
from ntk_awt.config import RunConfig
from ntk_awt.errors import InputError
from tests.test_experiment import CONFIG


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of the dense and the random network, through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    config = dataclasses.replace(CONFIG, networks=("dense", "random"))
    configs.save(config, folder / "config.toml")
    arguments = ["run", "--config", str(folder / "config.toml"), "--run-dir", str(folder / "run")]
    assert cli.main(arguments) == 0
    return folder / "run"


def test_overview_lists_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"ntk-awt {command}" in capsys.readouterr().out


def test_every_setting_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    for name in configs.identity(RunConfig()):
        section, _, field = name.rpartition(".")
        flag = section if field == "name" else field
        assert f"--{flag.replace('_', '-')} " in text, name


def test_flags_override_the_file(tmp_path, monkeypatch):
    file = tmp_path / "settings.toml"
    file.write_text("seed = 3\n[mask]\ndensity = 0.25\n[train]\nepochs = 7\n")
    seen = []
    monkeypatch.setattr(
        experiment, "Run", lambda config, *rest: seen.append(config) or exit_early()
    )

    def exit_early():
        raise InputError("stop", expected="here", got="here")

    assert cli.main(["run", "--config", str(file), "--epochs", "2", "--data", "mnist"]) == 2
    (config,) = seen
    assert (config.seed, config.mask.density, config.train.epochs) == (3, 0.25, 2)
    assert config.data.name == "mnist"


def test_default_folder_is_named_by_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(config, root, *rest):
        seen.append(root)
        raise InputError("stop", expected="here", got="here")

    monkeypatch.setattr(experiment, "Run", stop)
    cli.main(["run", "--seed", "1"])
    cli.main(["run", "--seed", "2"])
    assert seen[0] != seen[1]
    assert str(seen[0]).startswith("runs/digits-mlp-0.05-linf-0.1-")


def test_train_adds_a_network(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    assert cli.main(["train", str(copy), "--networks", "magnitude"]) == 0
    assert (copy / "trained" / "magnitude.safetensors").exists()
    assert configs.load(copy / "config.toml").networks == ("dense", "random", "magnitude")


def test_ticket_makes_tickets_and_prints_the_layers(tmp_path, capsys):
    file = tmp_path / "config.toml"
    configs.save(CONFIG, file)
    root = tmp_path / "tickets"
    assert cli.main(["ticket", "--config", str(file), "--run-dir", str(root)]) == 0
    assert sorted(p.stem for p in (root / "tickets").iterdir()) == ["dense", "random", "ticket"]
    assert not (root / "trained").exists()
    assert "dense1/kernel" in capsys.readouterr().err


def test_evaluate_prints_and_writes_numbers(run_dir, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    arguments = ["evaluate", str(run_dir), "--steps", "2", "--epsilon", "0.05"]
    assert cli.main([*arguments, "--json", str(out)]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--networks", "random"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text())
    assert [row["network"] for row in written] == ["dense", "random"]
    assert printed == written[1:]
    assert printed[0]["epsilon"] == 0.05
    assert printed[0]["robust"]["n"] == 60


@pytest.mark.parametrize("inputs", ["clean", "adversarial", "mixed"])
def test_kernel_is_saved_and_drawn(run_dir, tmp_path, inputs):
    out = tmp_path / "kernel.npz"
    arguments = ["kernel", str(run_dir), "--network", "random", "--inputs", inputs]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    with np.load(out) as saved, np.load(run_dir / "dynamics/random/epoch-0001.npz") as records:
        kernel, recorded = saved["kernel"], records["kernel"][0]
    assert kernel.shape == (4, 4, 10, 10)
    expected = {"mixed": recorded[:4], "adversarial": recorded[4:]}.get(inputs)
    if expected is not None:
        np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert out.with_suffix(".svg").exists()
    assert out.with_suffix(".png").exists()


def test_report_redraws_one_and_compares_two(run_dir, tmp_path):
    assert cli.main(["report", str(run_dir)]) == 0
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    page = tmp_path / "pages" / "both.html"
    assert cli.main(["report", str(run_dir), str(other), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("<td>random</td>") == 2
    assert "data:image/svg+xml" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "--density", "0"], "density: expected a number in (0, 1]"),
        (["run", "--epsilon", "-1"], "epsilon: expected a number in [0, ∞)"),
        (["run", "--config", "no.toml"], "config file no.toml"),
        (["run", "--config"], "a TOML file after it"),
        (["evaluate", "nowhere"], "run folder nowhere"),
        (["kernel", "nowhere"], "run folder nowhere"),
        (["train", "nowhere"], "run folder nowhere"),
        (["report", "nowhere"], "run folder nowhere"),
        (["report"], "run folders: expected one or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--networks", "tickt"], "expected one of dense, random"),
        (["evaluate", "--steps", "-1"], "PGD steps"),
        (["kernel", "--state", "final"], "expected one of initial, trained"),
        (["kernel", "--inputs", "dirty"], "expected one of adversarial, clean, mixed"),
        (["train", "--networks", "tickt"], "did you mean 'ticket'"),
    ],
)
def test_bad_choice_on_a_saved_run(run_dir, arguments, message, capsys):
    assert cli.main([arguments[0], str(run_dir), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
