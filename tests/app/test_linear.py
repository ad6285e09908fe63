"""`ntk-awt linear`: files, numbers against formulas, errors; runs under the strong threat."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from ntk_awt import threats
from ntk_awt.app import config as configs
from ntk_awt.app import linear as linear_study
from ntk_awt.app.cli import commands as cli
from ntk_awt.app.config import ThreatConfig
from ntk_awt.app.run import stages
from ntk_awt.app.run.folder import Paths
from ntk_awt.app.run.problem import Problem
from ntk_awt.errors import InputError
from ntk_awt.theory import linear
from ntk_awt.theory.linear.studies import in_parallel
from tests.app.run.test_stages import CONFIG

NAMES = ["rates", "phase", "svm", "knowledge"]
SMALL: dict[str, dict[str, Any]] = {
    "rates": {"d": 8, "points": 3, "samples": 4000, "delta": (0.2, 0.5)},
    "phase": {"cells": 4, "d": 3},
    "svm": {"n": (20, 40), "d": (10,), "mean_norm": (2.0,), "c": (1.0,), "seeds": 2,
            "samples": 2000},
    "knowledge": {"d": 20, "ratios": (1.0, 4.0), "seeds": 2},
}  # fmt: skip
STUDIES = {cls.__name__.lower(): cls for cls in linear_study.STUDIES}


def study(name: str, **changes: Any) -> linear_study.Found:
    """Without the command line, and without drawing its figure."""
    return linear_study.run(STUDIES[name](**SMALL[name] | changes), cli.Bars().bar)


def flags(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    """Every command's JSON record, folder and arrays."""
    folder, found = tmp_path_factory.mktemp("linear"), {}
    for name in NAMES:
        out, file = folder / name, folder / f"{name}.json"
        arguments = [*flags(SMALL[name]), "--out", str(out), "--json", str(file)]
        assert cli.main(["linear", name, *arguments]) == 0
        with np.load(out / f"{name}.npz") as arrays:
            found[name] = (json.loads(file.read_text()), out, dict(arrays))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_files(made, name: str):
    record, folder, arrays = made[name]
    assert record["study"] == name
    assert record["rows"]
    assert "out" not in record["settings"]
    for end in (".svg", ".png", ".npz"):
        assert (folder / f"{name}{end}").stat().st_size > 1000
    assert all(np.isfinite(a).all() for a in arrays.values() if a.dtype.kind == "f")


@pytest.mark.parametrize("name", NAMES)
def test_help_lists_every_setting(name: str, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["linear", name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"ntk-awt linear {name}" in text
    for field in dataclasses.fields(STUDIES[name]):
        flag = "json" if field.name == "json_file" else field.name
        assert f"--{flag.replace('_', '-')} " in text, field.name


# ---------------------------------------------------------------- rates


def phi_rates(record: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """Clean error, adversarial rate and robust error of a unit w without bias, in L2."""
    settings, c = record["settings"], record["summary"]["cosine"]
    s, mean = np.sqrt(1 - c**2), settings["mean_norm"]
    epsilon, delta = row["epsilon"], row["delta"]
    r = epsilon
    if delta is not None and epsilon * c > delta:
        r = delta * c + np.sqrt(epsilon**2 - delta**2) * s
    clean, robust = norm.cdf([-mean * c, r - mean * c])
    return [clean, robust - clean, robust]


def test_rates_are_those_of_the_formula(made):
    record, _, arrays = made["rates"]
    assert len(record["rows"]) == 3 * (1 + 2)
    assert record["summary"]["cosine"] == pytest.approx(0.9)
    for row in record["rows"]:
        found = [row[kind]["rate"] for kind in linear_study.KINDS]
        assert found == pytest.approx(phi_rates(record, row), rel=1e-9)
        for kind in linear_study.KINDS:
            low, high = row[kind]["interval"]
            assert row[kind]["inside"] == (low <= row[kind]["count"] <= high)
            assert 0 < high - low < 0.12 * row["samples"]
    assert record["summary"]["rates"] == 27
    assert record["summary"]["inside"] >= 26
    # The curves, and the map of which they are rows.
    at = [(arrays["epsilon"] == row["epsilon"]).argmax() for row in record["rows"][3:]]
    curves = [arrays["strong_robust"][i // 3, j] for i, j in enumerate(at)]
    assert curves == [row["robust"]["rate"] for row in record["rows"][3:]]
    assert np.all(np.diff(arrays["map_robust"], axis=0) >= 0)
    free = arrays["epsilon"] * 0.9 <= arrays["map_delta"][-1]  # δ does not limit there
    np.testing.assert_allclose(arrays["map_robust"][-1][free], arrays["ordinary_robust"][free])


def test_a_wrong_simulation_is_outside(monkeypatch):
    def half(*arguments: Any) -> Any:
        return linear.Counts(arguments[3], *([arguments[3] // 2] * 3))

    monkeypatch.setattr(linear_study.linear, "simulate", half)
    assert study("rates").summary["inside"] < 5


def test_rates_of_a_trained_svm_under_another_ball():
    found = study("rates", svm_points=60, p=np.inf, prior=0.3)
    w, bias = found.arrays["w"], found.summary["bias"]
    assert np.linalg.norm(w) == pytest.approx(1)
    assert bias != 0
    m = np.array([2.0 * w[0] + y * bias for y in (-1, 1)])
    reach = found.arrays["ordinary_epsilon"] * np.abs(w).sum()
    wanted = norm.cdf(reach[:, None] - m) @ [0.7, 0.3]
    np.testing.assert_allclose(found.arrays["ordinary_robust"], wanted, rtol=1e-9)
    assert reach[-1] == pytest.approx(4.0)
    assert study("rates", svm_points=2, prior=0.01).summary["clean"] < 0.5


def test_seed_and_processes(monkeypatch):
    one, other = (study("rates", seed=seed) for seed in (0, 1))
    assert other.rows != one.rows
    asked = []

    def record(f: Any, tasks: Any, n_jobs: int, on_done: Any) -> Any:
        asked.append(n_jobs)
        return in_parallel(f, tasks, 1, on_done)

    monkeypatch.setattr(linear_study, "in_parallel", record)
    assert study("rates", jobs=2).rows == one.rows
    assert asked == [2]


@pytest.mark.slow
def test_two_processes_give_the_same_rows():
    assert study("rates", jobs=2).rows == study("rates").rows


# ---------------------------------------------------------------- phase diagram


def test_phases_are_those_of_the_closed_form(made):
    record, _, arrays = made["phase"]
    assert record["summary"]["largest_gap"] < 1e-9
    np.testing.assert_allclose(arrays["epsilon"], [0.25, 0.75, 1.25, 1.75])
    wanted = [[2, 2, 1, 1], [2, 2, 1, 1], [2, 2, 0, 0], [2, 2, 0, 0]]
    np.testing.assert_array_equal(arrays["phase"], wanted)
    assert [row["cells"] for row in record["rows"]] == [4, 4, 8]
    least = norm.cdf(2 * 0.25 - 2)
    assert arrays["strong"][0, 3] == pytest.approx(least)
    assert record["rows"][1]["strong"][0] == pytest.approx(least)


def test_phases_without_a_closed_form():
    found = study("phase", condition=16.0)
    arrays = found.arrays
    assert found.summary == {}
    assert "closed_strong" not in arrays
    spectrum = np.geomspace(1, 16, 3)
    mean = np.full(3, 2 / np.sqrt(3))
    problem = linear.symmetric(mean, np.diag(spectrum / spectrum.mean()))
    best = linear.best_classifier(problem, linear.Ball(0.5)).robust_error
    assert arrays["ordinary"][0, 0] == pytest.approx(best)
    assert best < linear.best_isotropic_error(2.0, 0.5)  # a quiet axis helps


# ---------------------------------------------------------------- SVMs and knowledge


def test_svm_rows(made):
    record, _, arrays = made["svm"]
    assert [(row["n"], row["seed"]) for row in record["rows"]] == [
        (20, 0),
        (20, 1),
        (40, 0),
        (40, 1),
    ]
    case = linear.SvmCase(40, 10, 2.0, 1.5, 0.6, 1.0)
    assert linear.svm_experiment([case], [1], samples=2000) == record["rows"][3:]
    np.testing.assert_array_equal(arrays["cosine"], [row["cosine"] for row in record["rows"]])
    assert arrays["line_cosine"].shape == (1, 25)
    n = round(arrays["line_ratio"][7] * 10)
    assert arrays["line_cosine"][0, 7] == linear.svm_cosine(n, 10, 2.0, c=1.0)
    assert record["summary"]["rates"] == 24
    assert record["summary"]["inside"] >= 23


def test_knowledge_on_classes_and_digits(made):
    record, _, arrays = made["knowledge"]
    rows, real = record["rows"], record["summary"]["images"]
    assert {row["n"] for row in rows} == {20, 80}
    least = record["summary"]["least_error"]
    assert least == pytest.approx({"ordinary": 0.5, "strong": norm.cdf(0.6 - 2.0)})
    for row in rows:
        assert row["ordinary_robust"] >= 0.5
        assert row["strong_robust"] >= least["strong"] - 1e-12
    for method in linear.METHODS[1:]:
        assert errors(rows, method) < 0.4 < errors(rows, "plain")
    assert [row["method"] for row in real] == list(linear.METHODS)
    accuracy = {row["method"]: row["strong_accuracy"] for row in real}
    assert accuracy["plain"] < 0.2 < 0.85 < min(accuracy["signal"], accuracy["robust"])
    assert len(arrays["strong_robust"]) == len(rows)


def errors(rows: list[dict[str, Any]], method: str) -> float:
    return float(np.mean([row["strong_robust"] for row in rows if row["method"] == method]))


def test_knowledge_without_images_and_some_methods():
    found = study("knowledge", data="none", methods=("signal", "plain"))
    assert found.summary["images"] == []
    assert [row["method"] for row in found.rows[:2]] == ["signal", "plain"]
    assert len(found.tables) == 1


def test_knowledge_on_mnist(real_data):
    settings = {"data": "mnist", "data_dir": real_data, "methods": ("plain", "signal"),
                "train_size": 400, "ratios": (1.0,), "seeds": 1}  # fmt: skip
    plain, signal = study("knowledge", **settings).summary["images"]
    assert plain["natural_accuracy"] > 0.95
    assert plain["strong_accuracy"] < 0.1
    assert signal["natural_accuracy"] > 0.9
    assert signal["strong_accuracy"] > 0.8


def test_knowledge_of_another_basis():
    means, discriminants = (
        study("knowledge", methods=("signal",), seeds=1, basis=basis).summary["images"]
        for basis in linear_study.BASES
    )
    assert means != discriminants


def test_default_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["linear", "phase", "--cells", "3", "--d", "2"]) == 0
    shown = capsys.readouterr()
    assert "phase: runs/linear-phase/phase.svg" in shown.out
    assert (tmp_path / "runs" / "linear-phase" / "phase.npz").exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_unit(name: str):
    """Every header but those of words ends in a unit in brackets."""
    found = study(name)
    for table in found.tables:
        without = [h for h in table.headers if not re.search(r"\[.+\]$", h)]
        assert without in ([], ["threat"], ["phase"], ["SVM"])
        assert all(len(row) == len(table.headers) for row in table.rows)


# ---------------------------------------------------------------- bad input

BAD = {
    "odd n": ("svm --n 41", "training points: expected an even number, got 41"),
    "no n": ("svm --n", "n: expected one value or more"),
    "δ > ε": ("svm --epsilon 1 --delta 2", "delta: expected at most epsilon, 1, got 2"),
    "negative δ": ("knowledge --delta -1", "delta: expected a number in"),
    "loss": ("svm --loss log", "loss: expected one of hinge"),
    "method": ("knowledge --methods kernel", "method: expected one of"),
    "basis": ("knowledge --basis pixels", "basis: expected one of class-means"),
    "data": ("knowledge --data cat", "data: expected one of"),
    "missing files": (
        "knowledge --data mnist --data-dir nowhere",
        "data mnist: expected train-images-idx3-ubyte[.gz] in nowhere/mnist or nowhere",
    ),
    "class": ("knowledge --classes 3 10", "classes: expected classes in 0…9, got 10"),
    "one class": ("knowledge --classes 3 3", "classes: expected two different ones"),
    "p": ("rates --p 0.5", "p: expected a number in [1, ∞]"),
    "cosine": ("rates --cosine 2", "cosine: expected a number in [-1, 1]"),
    "prior": ("rates --prior 1", "prior: expected a number in"),
    "jobs": ("rates --jobs 0", "jobs: expected 1 or more, or -1"),
    "samples": ("rates --samples 0", "samples: expected a whole number"),
    "condition": ("phase --condition 0.5", "condition: expected a number in [1"),
    "cells": ("phase --cells 1", "cells: expected a whole number ≥ 2"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line(bad: str, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[bad]
    assert cli.main(["linear", *arguments.split()]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ")
    assert message in text
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the strong threat in a run


STRONG = dataclasses.replace(
    CONFIG,
    networks=("dense",),
    threat=ThreatConfig(name="strong-l2", epsilon=0.6, delta=0.2),
)


def inside(threat: Any, moved: np.ndarray, run: Problem) -> bool:
    signal = threats.class_mean_basis(run.dataset.x_train, run.dataset.y_train)
    assert isinstance(threat, threats.StrongL2)
    lengths = np.linalg.norm(moved, axis=1), np.linalg.norm(moved @ signal, axis=1)
    assert lengths[0].min() > 0.2
    return bool(np.all(lengths[0] <= 0.6) and np.all(lengths[1] <= 0.2))


def test_evaluate_under_the_strong_threat(monkeypatch, tmp_path):
    """The run's signal, the radius of the command line."""
    run = Problem(STRONG)
    configs.save(STRONG, tmp_path / "config.toml")
    seen = []

    def stop(problem: Any, paths: Any, name: str, settings: Any, threat: Any, **rest: Any) -> None:
        seen.append(problem.make_threat(threat))
        raise InputError("stop", expected="here", got="here")

    monkeypatch.setattr(stages, "assess", stop)
    assert cli.main(["evaluate", str(tmp_path), "--epsilon", "2"]) == 2
    (threat,) = seen
    assert isinstance(threat, threats.StrongL2)
    assert (float(threat.epsilon), float(threat.delta)) == (2.0, pytest.approx(0.2))
    assert isinstance(run.threat, threats.StrongL2)
    np.testing.assert_array_equal(threat.basis, run.threat.basis)


@pytest.mark.slow
def test_run_under_the_strong_threat(tmp_path):
    settings = dataclasses.replace(STRONG, networks=("dense", "ticket"))
    configs.save(settings, tmp_path / "config.toml")
    folder = tmp_path / "run"
    arguments = ["--config", str(tmp_path / "config.toml"), "--run-dir", str(folder)]
    assert cli.main(["run", *arguments]) == 0
    assert (folder / "report.html").stat().st_size > 10_000
    results = json.loads((folder / "results.json").read_text())
    assert set(results["networks"]) == {"dense", "ticket"}
    run = Problem(settings)
    clean, attacked = (np.asarray(part, np.float64).reshape(4, -1) for part in run.probe)
    assert inside(run.threat, attacked - clean, run)
    with np.load(Paths(folder).evaluation("ticket")) as file:
        shown = file["examples"].astype(np.float64) - file["clean"]
    assert inside(run.threat, shown.reshape(len(shown), -1), run)

    file = tmp_path / "numbers.json"
    assert cli.main(["evaluate", str(folder), "--epsilon", "2", "--json", str(file)]) in (0, 1)
    for row in json.loads(file.read_text()):
        assert (row["threat"], row["epsilon"]) == ("strong-l2", 2.0)
        assert row["robust"]["value"] <= results["networks"][row["network"]]["robust_accuracy"]
