"""Sweeps: the grid file, one dense network a seed, what is gathered."""

import contextlib
import io
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from ntk_awt.app import sweep
from ntk_awt.app.cli import commands as cli
from ntk_awt.app.run import stages as experiment
from ntk_awt.app.run.stages import Paths, Silent
from ntk_awt.app.verdicts import count
from ntk_awt.errors import InputError

SLOW = ("test_finished_runs_are_not_run_again",)

TEXT = """
networks = ["dense", "random", "rewind", "mine"]
data = {train_size = 200, test_size = 60}
model = {widths = [16]}
attack = {attack_steps = 2}
train = {epochs = 2}
record = {probe_size = 4}
evaluation = {attacks = ["apgd-ce"], evaluation_steps = 3}

[ticket]
ticket_steps = 4
ticket_batch_size = 4
ticket_records = 2
rounds = 2

[variants.mine]
method = "awt-scores"
ticket = {learn_allocation = true}

[sweep]
densities = [0.1, 0.3]
seeds = [0, 1]

[sweep.quick]
seeds = [0]
train = {epochs = 1}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "small.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_ctrl_c_says_the_whole_command(file, tmp_path, monkeypatch, capsys):
    def interrupt(config, root, reporter):
        assert config.seeds == (7,)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupt)
    root = str(tmp_path / "a folder")
    assert cli.main(["sweep", str(file), "--seeds", "7", "--run-dir", root]) == 130
    command = shlex.split(capsys.readouterr().err.rpartition("to resume: ")[2])
    assert command == ["ntk-awt", "sweep", str(file), "--seeds", "7", "--run-dir", root]


EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_files_name_what_there_is(path, quick):
    config = sweep.load(path, quick=quick)
    for density in config.densities:
        experiment.check_names(config.run(density, config.seeds[0]))
    assert {"dense", *config.base.variants} <= {*config.base.networks} or quick


@pytest.fixture(scope="module")
def printed(file):
    """Folder of the quick version through the command line, and what it printed."""
    root = file.parent / "run"
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert cli.main(["sweep", str(file), "--quick", "--run-dir", str(root)]) == 0
    return root, printed.getvalue()


@pytest.fixture(scope="module")
def finished(printed):
    return printed[0]


def test_bars_name_the_cell(printed):
    for cell in ("[1/2 density 0.1 seed 0]", "[2/2 density 0.3 seed 0]"):
        assert f"{cell} random: train" in printed[1]


def test_quick_changes_the_grid_and_the_settings(file):
    full, quick = sweep.load(file), sweep.load(file, quick=True)
    assert (full.densities, full.seeds, full.base.train.epochs) == ((0.1, 0.3), (0, 1), 2)
    assert (quick.densities, quick.seeds, quick.base.train.epochs) == ((0.1, 0.3), (0,), 1)
    assert quick.base.train.batch_size == full.base.train.batch_size
    run = full.run(0.3, 1)
    assert (run.mask.density, run.seed, run.model) == (0.3, 1, full.base.model)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("densities = [0.1, 0.3]", "densities = []", "one or more"),
        ("densities = [0.1, 0.3]", "densities = [0.1, 3]", "densities"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "each once"),
        ("seeds = [0, 1]", "seeds = 3", "a value of type list, got 3"),
        ("seeds = [0, 1]", "seeds = [0]\nseed = 1", "setting in small.toml, sweep"),
        ("[sweep.quick]", "[sweep.quik]", "setting in small.toml, sweep"),
        ("[variants.mine]", "[variants.my]", "network"),
        ('method = "awt-scores"', "", "the setting method"),
    ],
)
def test_bad_files(tmp_path, capsys, old, new, message):
    path = tmp_path / "small.toml"
    path.write_text(TEXT.replace(old, new), encoding="utf-8")
    assert cli.main(["sweep", str(path), "--run-dir", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_quick_needs_its_table(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(TEXT.split("[sweep.quick]")[0], encoding="utf-8")
    assert cli.main(["sweep", str(path), "--quick"]) == 2
    assert "[sweep.quick]" in capsys.readouterr().err


def test_a_run_s_config_is_not_a_sweep(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("seed = 3\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"nothing\.toml: expected a TOML file"):
        sweep.load(tmp_path / "nothing.toml")
    assert cli.main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        f"expected a table [sweep], got none; a single run is: ntk-awt run --config {path}\n"
    )


@pytest.mark.parametrize("command", ["run", "ticket"])
def test_a_sweep_is_not_a_run_s_config(command, file, capsys):
    assert cli.main([command, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith(f"use: ntk-awt sweep {file}\n")


def results(root: Path, density: float):
    return json.loads((sweep.folder(root, density, 0) / "results.json").read_text())


def test_the_dense_network_is_trained_once(finished):
    low, high = (results(finished, density) for density in (0.1, 0.3))
    assert low["networks"]["dense"] == high["networks"]["dense"]
    assert low["seconds"]["train.dense"] == high["seconds"]["train.dense"]
    files = [np.load(Paths(sweep.folder(finished, d, 0)).dynamics("dense", 1)) for d in (0.1, 0.3)]
    np.testing.assert_array_equal(files[0]["kernel"], files[1]["kernel"])
    assert low["networks"]["random"] != high["networks"]["random"]
    for found, density in ((low, 0.1), (high, 0.3)):
        for name in ("random", "rewind", "mine"):
            assert found["networks"][name]["density"] == pytest.approx(density, rel=0.01)


def test_the_table_is_that_of_the_runs(finished, file):
    found = json.loads((finished / "sweep.json").read_text())
    rows = {(row["density"], row["network"]): row for row in found["table"]}
    assert len(rows) == 8
    one, random = (results(finished, 0.3)["networks"][n] for n in ("mine", "random"))
    row = rows[0.3, "mine"]
    assert row["robust_accuracy"]["mean"] == one["robust_accuracy"]
    assert row["robust_accuracy"]["n"] == 1
    assert row["robust_accuracy"]["sd"] is None
    difference = one["robust_accuracy"] - random["robust_accuracy"]
    assert row["robust_against_random"]["mean"] == pytest.approx(difference)
    assert rows[0.3, "dense"]["robust_against_random"] is None
    judged = sweep.judge(sweep.load(file, quick=True), finished)
    assert len(judged) == 7  # the dense network once
    assert {one.name for one in judged} >= {"dense, seed 0", "mine, density 0.3, seed 0"}
    for (density, name), cell in rows.items():
        label = "dense, seed 0" if name == "dense" else f"{name}, density {density:g}, seed 0"
        (verdict,) = (one for one in judged if one.name == label)
        assert cell["failed_checks"] == (verdict.status == "failed")
    assert (
        rows[0.3, "random"]["search_epochs"]["mean"] < rows[0.3, "rewind"]["search_epochs"]["mean"]
    )
    assert rows[0.3, "rewind"]["search_epochs"]["mean"] >= 1  # the dense network's one epoch
    text = (finished / "sweep.md").read_text()
    assert text.count("| mine |") == 2
    assert "nan" not in text
    for name in ("accuracy", "gap", "kernel", "relations"):
        assert (finished / "figures" / f"{name}.png").exists()
    page = (finished / "sweep.html").read_text()
    assert f"Checks: {count(judged)}" in page
    assert all(f'<li class="{one.status}">{one.name}' in page for one in judged)
    assert 'src="data:image/svg' in page
    assert "http" not in page.replace("http://www.w3", "")


def test_a_failed_check_of_a_sweep_is_seen(finished, file, tmp_path, monkeypatch, capsys):
    """Exit code 1 with --strict, and one verdict a network, density and seed."""
    monkeypatch.setattr(experiment.report, "write", lambda root: None)  # the runs' pages stay
    root = tmp_path / "sweep"
    shutil.copytree(finished, root)
    path = Paths(sweep.folder(root, 0.3, 0)).metrics
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for flag in row.get("hygiene", {}).get("flags", ()):
            wrong = (row["network"], flag["name"]) == ("mine", "black box")
            flag |= {"value": 0.0125 if wrong else 0.0, "status": "fail" if wrong else "pass"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["sweep", str(file), "--quick", "--run-dir", str(root)]
    assert cli.main([*arguments, "--strict"]) == 1
    shown = capsys.readouterr().err.splitlines()
    lines = [line for line in shown if line.startswith("verdict of ")]
    assert len(lines) == 7
    (line,) = {line for line in lines if line.startswith("verdict of mine, density 0.3, seed 0")}
    assert "failed; black box 0.0125, limit" in line
    found = json.loads((root / "sweep.json").read_text())["table"]
    cells = {(row["density"], row["network"]): row["failed_checks"] for row in found}
    assert cells[0.3, "mine"] == 1
    assert cells[0.3, "random"] == 0
    assert "1 of 1" in (root / "sweep.md").read_text()


def test_finished_runs_are_not_run_again(finished, file, monkeypatch):
    config = sweep.load(file, quick=True)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("trained/*")}

    def fail(*arguments, **settings):
        raise AssertionError("trained again")

    monkeypatch.setattr("ntk_awt.training.fit", fail)
    sweep.run(config, finished, Silent())
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("trained/*")} == before


def test_paired_differences_over_seeds():
    rows = [
        {"target_density": 0.1, "network": n, "seed": s, "robust_accuracy": v}
        for n, values in {"random": (0.5, 0.7, 0.6), "mine": (0.6, 0.75, 0.75)}.items()
        for s, v in enumerate(values)
    ]
    found = sweep._paired(rows, 0.1, "mine", "robust_accuracy")
    differences = [0.1, 0.05, 0.15]
    assert found is not None
    assert found["mean"] == pytest.approx(np.mean(differences))
    assert found["standard_error"] == pytest.approx(scipy.stats.sem(differences))


def test_rank_correlations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    found = sweep.rank_correlation(x, y)
    assert found["value"] == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert found["low"] < found["value"] < found["high"] < 1
    assert sweep.rank_correlation(np.exp(x), y) == found  # of ranks alone
    assert math.isnan(sweep.rank_correlation([1, 2], [1, 2])["value"])
    assert math.isnan(sweep.rank_correlation([1, 1, 1], [1, 2, 3])["value"])


def test_load_names_what_is_wrong(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[sweep]\nseeds = [0]\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"sweep\.densities"):
        sweep.load(path)
