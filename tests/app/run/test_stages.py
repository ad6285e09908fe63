"""A whole run on a few digits: artifacts, records, resuming after a kill or Ctrl-C, bad folders."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ntk_awt import masks
from ntk_awt.app import config as configs
from ntk_awt.app import verdicts
from ntk_awt.app.cli import commands as cli
from ntk_awt.app.config import (
    AttackConfig,
    DataConfig,
    EvaluationConfig,
    MaskConfig,
    ModelConfig,
    RecordConfig,
    RunConfig,
    ThreatConfig,
    TicketConfig,
    TrainConfig,
)
from ntk_awt.app.report import page as report
from ntk_awt.app.run import stages as experiment
from ntk_awt.attacks import AUTO
from ntk_awt.errors import InputError
from ntk_awt.robustness import suite as assessment

SLOW = (
    "test_full_disk_keeps_finished_work",
    "test_a_network_can_join_and_a_saved_ticket_can_be_used",
    "test_redrawing_gives_the_same_pictures",
)

CONFIG = RunConfig(
    data=DataConfig(train_size=200, test_size=60),
    model=ModelConfig(widths=(16,)),
    mask=MaskConfig(density=0.3),
    attack=AttackConfig(attack_steps=2),
    ticket=TicketConfig(ticket_steps=6, ticket_batch_size=4, ticket_records=3),
    train=TrainConfig(epochs=3, batch_size=32),
    record=RecordConfig(probe_size=4, records_per_epoch=2),
    evaluation=EvaluationConfig(attacks=("apgd-ce", "apgd-t"), evaluation_steps=3),
)
NAMES = ["dense", "ticket", "random"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> experiment.Run:
    """One uninterrupted run; tests must leave its folder as it is."""
    run = experiment.Run(CONFIG, tmp_path_factory.mktemp("runs") / "whole")
    run.run()
    return run


def numbers(root: Path) -> dict:
    """`results.json` without what may differ between two runs of the same settings."""
    results = report.read_results(root)
    return {key: value for key, value in results.items() if key != "seconds"}


def records(root: Path) -> list[dict]:
    """`metrics.jsonl` without the times."""
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def same_arrays(one: Path, two: Path) -> None:
    """Every saved array is equal, bit by bit."""
    files = sorted(p.relative_to(one) for p in one.rglob("*.npz"))
    assert files
    for file in files:
        with np.load(one / file) as a, np.load(two / file) as b:
            assert a.files == b.files
            for name in a.files:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{file} {name}")


# ---------------------------------------------------------------- what a run leaves


def test_results_have_the_promised_fields(finished):
    results = report.read_results(finished.paths.root)
    assert list(results["networks"]) == NAMES
    promised = {
        "density",
        "natural_accuracy",
        "robust_accuracy",
        "kernel_distance",
        "target_distance",
        "dynamics_gap",
    }
    for values in results["networks"].values():
        assert promised <= set(values)
        low, high = values["robust_interval"]
        assert 0 <= low <= values["robust_accuracy"] <= high <= 1
        assert values["robust_accuracy"] <= values["natural_accuracy"]
    assert results["networks"]["dense"]["density"] == 1
    assert results["networks"]["dense"]["dynamics_gap"] == 0
    for name in ("ticket", "random"):
        assert results["networks"][name]["density"] == pytest.approx(0.3, abs=1e-3)
        assert results["networks"][name]["dynamics_gap"] > 0
    assert results["config"] == configs.to_dict(CONFIG)
    assert results["seed"] == 0
    assert {"jax", "flax", "python", "device"} <= set(results["versions"])
    assert set(results["seconds"]) == {
        "ticket.ticket",
        "ticket.random",
        *(f"{stage}.{name}" for stage in ("train", "evaluate") for name in NAMES),
    }


def test_numbers_in_results_are_those_of_the_records(finished):
    """Recompute accuracies, gap and kernel distance from the raw arrays with NumPy."""
    root, results = finished.paths.root, report.read_results(finished.paths.root)

    def dynamics(name):
        epochs = [np.load(finished.paths.dynamics(name, e)) for e in (1, 2, 3)]
        return [np.concatenate([e[key] for e in epochs]) for key in ("step", "outputs", "kernel")]

    steps, dense_outputs, dense_kernels = dynamics("dense")
    assert steps.tolist() == [0, 3, 6, 9, 12, 15, 18]
    for name in NAMES:
        values = results["networks"][name]
        with np.load(root / "evaluation" / f"{name}.npz") as flags:
            assert values["natural_accuracy"] == flags["natural_correct"].mean()
            assert values["robust_accuracy"] == flags["robust_correct"].mean()
        _, outputs, kernels = dynamics(name)
        assert outputs.shape == (7, 8, 10)
        assert kernels.shape == (7, 8, 4, 10, 10)
        gaps = np.sqrt(((outputs - dense_outputs).astype(float) ** 2).sum((1, 2)) / 8)
        assert values["dynamics_gap"] == pytest.approx(gaps.mean(), rel=1e-4)
        assert values["target_distance"] == pytest.approx(gaps[0], rel=1e-4)
        distance = np.linalg.norm((kernels - dense_kernels)[0].astype(float)) / np.sqrt(8 * 4)
        assert values["kernel_distance"] == pytest.approx(distance, rel=1e-4)


def test_networks_share_density_of_each_layer_and_pruned_weights_stay_zero(finished):
    tickets = {name: finished.load_trained(name) for name in ("ticket", "random")}
    layers = {
        name: [row.kept for row in masks.statistics(t.mask, t.gain)] for name, t in tickets.items()
    }
    assert layers["ticket"] == layers["random"]
    for name, ticket in tickets.items():
        start = finished.load_ticket(name)
        for w, m, w0 in zip(
            *map(jax.tree.leaves, (ticket.params, ticket.mask, start.params)), strict=True
        ):
            assert np.abs(np.asarray(w)[~np.asarray(m)]).sum() == 0
            assert (np.asarray(w) != np.asarray(w0))[np.asarray(m)].any()


def test_probe_is_fixed_perturbed_and_in_the_threat_set(finished):
    clean, perturbed = finished.probe
    distance = np.abs(np.asarray(perturbed, float) - np.asarray(clean, float))
    assert 0.05 < distance.max() <= 0.1


def test_report_and_figures(finished):
    figures = {p.stem for p in finished.paths.figures.glob("*.svg")}
    drawn = {"dynamics", "training", "accuracy", "robustness", "density", "examples", "search"}
    assert figures == drawn
    assert figures == {p.stem for p in finished.paths.figures.glob("*.png")}
    text = finished.paths.report.read_text()
    assert text.count("data:image/svg+xml;base64,") == len(figures)
    assert 'src="http' not in text
    assert "<link" not in text
    for name in NAMES:
        assert f"<td>{name}</td>" in text


def test_metrics_are_one_object_a_line_and_complete(finished):
    rows = [json.loads(line) for line in finished.paths.metrics.read_text().splitlines()]
    assert all({"stage", "network", "step"} <= set(row) for row in rows)

    def steps(stage, name):
        return [r["step"] for r in rows if (r["stage"], r["network"]) == (stage, name)]

    assert steps("ticket", "ticket") == [0, 2, 4, 6]
    for name in NAMES:
        assert steps("train", name) == [6, 12, 18]
        assert steps("dynamics", name) == [0, 3, 6, 9, 12, 15, 18]


def test_redrawing_gives_the_same_pictures(finished):
    def content():
        drawn = finished.paths.figures.glob("*.svg")
        return {p.name: p.read_bytes() for p in (finished.paths.report, *drawn)}

    before = content()
    report.write(finished.paths.root)
    assert content() == before


# ---------------------------------------------------------------- resuming

KILLED = """
import os, signal, sys
from pathlib import Path
from ntk_awt import checkpoints
from ntk_awt.app import config
from ntk_awt.app.run import stages as experiment

saves, limit = 0, int(sys.argv[3])
save = checkpoints.Checkpoints.save
def counted(self, step, state):
    global saves
    if saves == limit:      # after the callbacks, before the state is safe
        os.kill(os.getpid(), signal.SIGKILL)
    saves += 1
    save(self, step, state)
checkpoints.Checkpoints.save = counted
experiment.Run(config.load(Path(sys.argv[1])), Path(sys.argv[2])).run()
"""


def test_kill_during_search_and_training_changes_no_number(finished, tmp_path):
    """SIGKILL in the search, then in the dense training, then resume in this process."""
    file, root = tmp_path / "config.toml", tmp_path / "killed"
    configs.save(CONFIG, file)
    for saves in (2, 4):  # search has records at 0, 2, 4, 6; then epochs
        command = [sys.executable, "-c", KILLED, str(file), str(root), str(saves)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert records(root)[-1]["network"] == "dense"  # the second kill hit the dense training
    experiment.Run(CONFIG, root).run()
    assert numbers(root) == numbers(finished.paths.root)
    same_arrays(finished.paths.root, root)
    assert records(root) == records(finished.paths.root)


def test_ctrl_c_says_how_to_resume_and_that_command_finishes(
    finished, tmp_path, monkeypatch, capsys
):
    file, root = tmp_path / "config.toml", tmp_path / "interrupted"
    configs.save(CONFIG, file)
    add, calls = experiment.Log.add, []

    def interrupting(self, rows):
        add(self, rows)
        calls.append(rows)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Log, "add", interrupting)
    assert cli.main(["run", "--config", str(file), "--run-dir", str(root)]) == 130
    monkeypatch.undo()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    kept, _, command = message.partition("; to resume: ntk-awt ")
    assert kept == f"interrupted; finished work is in {root}"
    assert cli.main(command.split()) == 0
    assert numbers(root) == numbers(finished.paths.root)


def test_a_line_cut_by_a_kill_is_dropped(finished, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = finished.paths.metrics.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    log = experiment.Log(path)
    assert [json.dumps(row) + "\n" for row in log.rows] == lines[:5]
    log.add([json.loads(lines[5])])
    assert path.read_text() == "".join(lines[:6])


def test_a_step_said_again_replaces_what_came_after_it(tmp_path):
    log = experiment.Log(tmp_path / "metrics.jsonl")
    row = {"stage": "ticket", "network": "a"}
    log.add([row | {"step": step, "seconds": 0} for step in (1, 2, 3)])
    log.add([row | {"network": "b", "step": 1, "seconds": 0}])
    log.add([row | {"step": 2, "seconds": 1}])
    kept = [
        (r["network"], r["step"], r["seconds"])
        for r in experiment.Log(tmp_path / "metrics.jsonl").rows
    ]
    assert kept == [("a", 1, 0), ("b", 1, 0), ("a", 2, 1)]


def test_finished_stages_are_skipped(finished, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("computed again")

    for name in ("_search", "_train", "assess"):
        monkeypatch.setattr(experiment.Run, name, fail)
    before = numbers(finished.paths.root)
    experiment.Run(CONFIG, finished.paths.root).run()
    assert numbers(finished.paths.root) == before


def test_a_network_can_join_and_a_saved_ticket_can_be_used(finished, tmp_path):
    """A ticket file as a network gives the numbers of the network that it came from."""
    root = tmp_path / "joined"
    short = dataclasses.replace(CONFIG, networks=("dense",))
    experiment.Run(short, root).run()
    file = tmp_path / "mine.safetensors"
    file.write_bytes(finished.paths.ticket("random").read_bytes())
    joined = dataclasses.replace(CONFIG, networks=("dense", str(file)))
    results = experiment.Run(joined, root).run()
    assert list(results["networks"]) == ["dense", "mine"]
    wanted = numbers(finished.paths.root)["networks"]
    assert results["networks"]["mine"] == wanted["random"]
    assert results["networks"]["dense"] == wanted["dense"]


# ---------------------------------------------------------------- bad input


def test_folder_of_another_run_is_refused(finished):
    other = dataclasses.replace(CONFIG, mask=MaskConfig(density=0.2))
    with pytest.raises(InputError, match=r"setting mask.density: expected 0.3 .* got 0.2"):
        experiment.Run(other, finished.paths.root)


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="something else"):
        experiment.Run(CONFIG, tmp_path)
    with pytest.raises(InputError, match="something else"):
        experiment.Run(CONFIG, tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": ("dense", "tickt")}, "did you mean 'ticket'"),
        ({"networks": ("ticket",)}, "dense among them"),
        ({"networks": ("dense", "dense")}, "each once"),
        ({"networks": ("dense", "a/m.safetensors", "b/m.safetensors")}, "different file names"),
        ({"networks": ("dense", "a/random.safetensors")}, "rename it"),
        ({"data": DataConfig(name="mnits")}, "did you mean 'mnist'"),
        ({"model": ModelConfig(name="mpl")}, "one of conv4, lenet5, mlp"),
        ({"model": ModelConfig(activation="rely")}, "did you mean 'relu'"),
        ({"mask": MaskConfig(allocation="er")}, "one of erk, global, uniform"),
        ({"threat": configs.ThreatConfig(name="l1")}, "threat model: expected one of l2, linf"),
        ({"ticket": TicketConfig(solver="ntt")}, "solver: expected one of awt"),
        ({"train": TrainConfig(loss="madry")}, "one of adversarial, natural, trades"),
        ({"train": TrainConfig(optimizer="lion")}, "one of adam, adamw, momentum, sgd"),
        ({"train": TrainConfig(batch_size=5000)}, "batch_size: expected at most"),
        ({"record": RecordConfig(probe_size=500)}, "validation images: expected at least 500"),
        ({"data": DataConfig(name="none.npz")}, "none.npz"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(tmp_path, changes, message):
    root = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        experiment.Run(dataclasses.replace(CONFIG, **changes), root)
    assert not root.exists()


def test_full_disk_keeps_finished_work(finished, tmp_path, monkeypatch, capsys):
    """The disk fills while the second network's dynamics are written; then there is room again."""
    file, root = tmp_path / "config.toml", tmp_path / "full"
    configs.save(CONFIG, file)
    savez, calls = np.savez, []

    def filling(path, **arrays):
        calls.append(path)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        savez(path, **arrays)

    monkeypatch.setattr(np, "savez", filling)
    arguments = ["run", "--config", str(file), "--run-dir", str(root)]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in error
    assert "run again" in error
    monkeypatch.undo()
    assert (root / "trained" / "dense.safetensors").exists()
    assert cli.main(arguments) == 0
    assert numbers(root) == numbers(finished.paths.root)


def test_unwritable_folder(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["run", "--run-dir", str(blocked / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_evaluation_under_another_threat(finished, tmp_path):
    """ε = 0 gives the natural accuracy, a huge ε gives none; the run's own outcomes stay."""
    root = tmp_path / "run"
    shutil.copytree(finished.paths.root, root)
    run = experiment.Run(CONFIG, root)
    none = run.assess("dense", threat_config=ThreatConfig(epsilon=0.0)).outcome
    assert none.robust == none.natural
    everything = run.assess("dense", threat_config=ThreatConfig(epsilon=1.0)).outcome
    assert everything.robust.value < 0.2
    same_arrays(finished.paths.root, root)


def test_every_network_has_its_attacks_and_flags(finished):
    networks = report.read_results(finished.paths.root)["networks"]
    for name, values in networks.items():
        first, last = values["attacks"]
        assert (first["suite"], first["attack"], first["attacked"]) == ("apgd-ce", "apgd-ce", 60)
        # The second is tried on what the first left, and its row is the worst case of both.
        assert (last["suite"], last["attack"]) == ("apgd-t", "apgd-t")
        assert last["survived"] <= last["attacked"] == first["survived"]
        for row in (first, last):
            assert row["robust_accuracy"] == row["survived"] / 60
        assert last["robust_accuracy"] == values["robust_accuracy"]
        flags = {flag["name"]: flag for flag in values["hygiene"]["flags"]}
        assert ("transfer" in flags) == (name != "dense")
        for rule in ("ball", "box", "zero radius", "finite", "deterministic", "mask", "selection"):
            assert flags[rule]["status"] == "pass", (name, rule)
    page = finished.paths.report.read_text()
    for verdict in verdicts.of_run(report.read_results(finished.paths.root)).values():
        assert f'<li class="{verdict.status}">{verdict.name}: {verdict.status}' in page
    assert "zero gradient, dlr" in page
    assert '<strong class="pass">' in page


def test_the_order_of_attacks_does_not_change_the_worst_case(finished, tmp_path, monkeypatch):
    """Each alone on all images, image by image; in turn, each only on what is left."""
    monkeypatch.setattr(assessment.hygiene, "check", lambda *arguments, **options: None)
    root = tmp_path / "run"
    shutil.copytree(finished.paths.root, root)
    run = experiment.Run(CONFIG, root)

    def robust(*attacks):
        settings = dataclasses.replace(CONFIG.evaluation, attacks=attacks)
        found = run.assess("random", settings)
        tried = [turn.attacked for turns in found.turns.values() for turn in turns]
        return found.outcome.robust_correct, tried

    (one, whole), (other, _) = robust("square"), robust("pgd")
    assert whole == [60]
    for names in (("pgd", "square"), ("square", "pgd")):
        both, tried = robust(*names)
        np.testing.assert_array_equal(both, one & other)
        assert tried == [60, (one if names[0] == "square" else other).sum()]


def test_attacks_that_were_made_are_not_made_again(finished, tmp_path, monkeypatch):
    """The rest of `auto` goes on where a kill left it, with the same numbers."""
    root = tmp_path / "run"
    shutil.copytree(finished.paths.root, root)
    run = experiment.Run(CONFIG, root)
    settings = dataclasses.replace(CONFIG.evaluation, full_evaluation=True, evaluation_steps=2)
    whole = run.assess("dense", settings)
    assert [turn.attack for turn in whole.turns["auto"]] == list(AUTO)
    left = [turn.survived for turn in whole.turns["auto"]]
    assert left == sorted(left, reverse=True)
    assert [t.attacked for t in whole.turns["auto"]] == [60, *left[:-1]]
    assert whole.outcome.robust.value == left[-1] / 60

    (file,) = root.glob("evaluation/dense/*/auto-fab-t.npz")
    file.unlink()
    made = []
    honest = assessment.measure

    def counted(*args, **kwargs):
        made.append(type(args[3]).__name__)
        return honest(*args, **kwargs)

    monkeypatch.setattr(assessment, "measure", counted)
    again = run.assess("dense", settings)
    assert made == ["FAB"]
    assert again.table() == whole.table()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data"), [("lenet5", "mnist"), ("conv4", "cifar10")])
def test_convolutional_networks_on_real_images(real_data, tmp_path, model, data):
    """The whole path on a few real images, with L2 and TRADES."""
    config = dataclasses.replace(
        CONFIG,
        networks=("dense", "ticket", "magnitude"),
        data=DataConfig(
            name=data,
            data_dir=real_data,
            train_size=100,
            test_size=50,
            validation_fraction=0.002,
        ),
        model=ModelConfig(name=model),
        mask=MaskConfig(density=0.1),
        threat=configs.ThreatConfig(name="l2", epsilon=0.5),
        ticket=TicketConfig(ticket_steps=2, ticket_batch_size=2, ticket_records=1),
        train=TrainConfig(epochs=1, batch_size=50, loss="trades"),
        record=RecordConfig(probe_size=2),
    )
    results = experiment.Run(config, tmp_path / "run").run()
    for name in ("ticket", "magnitude"):
        values = results["networks"][name]
        assert values["density"] == pytest.approx(0.1, abs=1e-4)
        assert np.isfinite(values["dynamics_gap"])
    layers = [layer["name"] for layer in results["networks"]["ticket"]["layers"]]
    assert layers[0] == "conv1/kernel"
