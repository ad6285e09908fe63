"""The stages of a run, as functions of its problem and its writer.

A stage whose artifact exists is skipped; a stage that was interrupted continues from its newest
checkpoint and ends with the numbers of an uninterrupted run.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ntk_awt import files, masks, training
from ntk_awt.app import config as configs
from ntk_awt.app.config import EvaluationConfig, RunConfig, ThreatConfig
from ntk_awt.app.report import page as report
from ntk_awt.app.run.folder import Paths, RunFolder, is_file, network_label, ordered
from ntk_awt.app.run.methods import check_names, resolve
from ntk_awt.app.run.problem import Problem
from ntk_awt.app.run.records import Dynamics, Evaluated, Record, TrainedEpoch
from ntk_awt.app.run.writer import Clock, Reporter, Writer, check_folder
from ntk_awt.errors import InputError
from ntk_awt.kernels import (
    kernel_distance,
    relative_kernel_distance,
    relative_target_distance,
    target_distance,
)
from ntk_awt.network import density
from ntk_awt.robustness import hygiene
from ntk_awt.robustness.accuracy import measure
from ntk_awt.robustness.suite import Assessment, Bar, identity, make_suites
from ntk_awt.robustness.suite import assess as assess_network
from ntk_awt.types import Split

__all__ = ["assess", "evaluate", "make_tickets", "opened", "run", "summarise", "train"]

VALIDATION_IMAGES = 1000
"""At most that many validation images are attacked after each epoch."""

EXAMPLES = 8
"""Test images whose attacked versions are kept for the report."""


@contextmanager
def opened(
    config: RunConfig, root: Path, reporter: Reporter | None = None
) -> Iterator[tuple[Problem, Writer]]:
    """What the stages take; the folder is this process's to write until the context ends.

    Args:
        config: all settings.
        root: the run folder; made if it does not exist.
        reporter: shows progress.

    Raises:
        InputError: unknown names in the config, a data set that does not fit, or a folder that
            another process writes or that holds something else; nothing is written then.
        OSError: a folder that cannot be written.
    """
    check_names(config)
    check_folder(config, Paths(root))
    problem = Problem(config)
    problem.threat  # noqa: B018  bad data is reported before anything is written
    with Writer(config, root, reporter) as writer:
        yield problem, writer


def run(problem: Problem, writer: Writer) -> dict[str, Any]:
    """All stages; returns the content of `results.json`."""
    make_tickets(problem, writer)
    train(problem, writer)
    evaluate(problem, writer)
    return summarise(problem, writer)


# ---------------------------------------------------------------- networks at initialisation


def make_tickets(problem: Problem, writer: Writer) -> None:
    """Write every network at initialisation: dense, drawn, searched for, or from a file.

    Those that need the trained dense network train it first.
    """
    # Those from files first: a bad file should not be found after minutes of work.
    for name in sorted(problem.config.networks, key=is_file, reverse=True):
        _make_ticket(problem, writer, name)


def _make_ticket(problem: Problem, writer: Writer, name: str) -> None:
    label, method = network_label(name), resolve(problem.config, name)
    path = writer.paths.ticket(label)
    if path.exists():
        return
    for other in method.trained_first:
        _make_ticket(problem, writer, other)
        _train(problem, writer, other)
    masks.save_ticket(method.make(problem, writer, label), path, problem.describe(label))


# ---------------------------------------------------------------- training


def train(problem: Problem, writer: Writer, only: Sequence[str] = ()) -> None:
    """Train every network (or the dense one and `only` those), and record its dynamics."""
    for name in writer.folder.networks:
        if not only or name == "dense" or name in only:
            _train(problem, writer, name)


def _train(problem: Problem, writer: Writer, name: str) -> None:
    path = writer.paths.trained(name)
    if path.exists():
        return
    d, config = problem.dataset, problem.config
    x, y = (a[:VALIDATION_IMAGES] for a in (d.x_validation, d.y_validation))
    clock = Clock()
    with writer.reporter.bar(f"{name}: train", config.train.epochs, "epochs") as show:

        def on_epoch(record: training.EpochRecord) -> None:
            if not np.all(np.isfinite(record.loss)):
                raise InputError(
                    f"training of {name}, epoch {record.epoch}",
                    expected="a finite loss",
                    got="NaN or infinity",
                    fix="lower learning_rate, in another --run-dir",
                )
            observed = jax.device_get(record.observations)
            arrays = {"step": record.steps, **observed._asdict()}
            files.save_arrays(writer.paths.dynamics(name, record.epoch), arrays)
            validation = measure(
                problem.network(record.ticket),
                Split(x, y),
                problem.threat,
                problem.attack,
                key=problem.key("validation"),
            )
            row = TrainedEpoch(
                name,
                int(record.steps[-1]),
                epoch=record.epoch,
                loss=float(record.loss.mean()),
                accuracy=float(record.accuracy.mean()),
                validation_natural=validation.natural.value,
                validation_robust=validation.robust.value,
                seconds=clock.lap(),
            )
            classes = d.num_classes
            writer.add([row, *_dynamics(writer.folder, name, record.epoch, arrays, classes)])
            show(record.epoch)

        ticket = training.fit(
            problem.dense.apply,
            problem.load(writer.paths.ticket(name)),
            d.x_train,
            d.y_train,
            config=config.train,
            threat=problem.threat,
            attack=problem.attack,
            key=problem.key("train"),
            observe=problem.observe,
            records=config.record.records_per_epoch,
            callbacks=[on_epoch],
            checkpoints=writer.paths.checkpoints("train", name),
        )
    masks.save_ticket(ticket, path, problem.describe(name))


def _dynamics(
    folder: RunFolder, name: str, epoch: int, own: dict[str, Any], classes: int
) -> list[Record]:
    """Distances to the dense network, and to the own initial kernel, at each observation."""
    dense = own if name == "dense" else folder.observed("dense", epoch, classes, len(own["step"]))
    first = own if epoch == 1 else folder.observed(name, 1, classes)
    initial_kernel = first["kernel"][0]
    triples = zip(
        own["step"],
        zip(own["outputs"], dense["outputs"], strict=True),
        zip(own["kernel"], dense["kernel"], strict=True),
        strict=True,
    )
    return [
        Dynamics(
            name,
            int(step),
            dynamics_gap=float(target_distance(f_dense, f)),
            relative_gap=float(relative_target_distance(f_dense, f)),
            kernel_distance=float(kernel_distance(k_dense, k)),
            relative_kernel_distance=float(relative_kernel_distance(k_dense, k)),
            kernel_drift=float(relative_kernel_distance(initial_kernel, k)),
        )
        for step, (f, f_dense), (k, k_dense) in triples
    ]


# ---------------------------------------------------------------- evaluation


def evaluate(problem: Problem, writer: Writer) -> None:
    """Natural and robust accuracy of every trained network on the test images."""
    for name in writer.folder.networks:
        path = writer.paths.evaluation(name)
        if path.exists():
            continue
        clock = Clock()
        found = assess(problem, writer.paths, name, bar=writer.reporter.bar)
        outcome, d = found.outcome, problem.dataset
        row = Evaluated(
            name,
            0,
            seconds=clock.lap(),
            natural_accuracy=outcome.natural.value,
            natural_interval=[outcome.natural.low, outcome.natural.high],
            robust_accuracy=outcome.robust.value,
            robust_interval=[outcome.robust.low, outcome.robust.high],
            attacks=found.table(),
            hygiene=found.hygiene.record(),
        )
        writer.add([row])
        arrays = {
            "natural_correct": outcome.natural_correct,
            "robust_correct": outcome.robust_correct,
            "examples": outcome.images[:EXAMPLES],
            "attacked": outcome.images[: hygiene.IMAGES],
            "clean": d.x_test[:EXAMPLES],
            "labels": d.y_test[:EXAMPLES],
        }
        files.save_arrays(path, arrays)


def assess(
    problem: Problem,
    paths: Paths,
    name: str,
    settings: EvaluationConfig | None = None,
    threat_config: ThreatConfig | None = None,
    *,
    bar: Bar,
) -> Assessment:
    """One trained network on the test images; outcomes of attacks made before are kept.

    Each outcome is a file of its own, written whole: it needs no lock, and a live run is not
    disturbed.

    Args:
        problem: of the run.
        paths: of its folder.
        name: of the network.
        settings: attacks, steps and restarts; the run's if not given.
        threat_config: the threat model; the run's if not given.
        bar: shows progress.
    """
    config = problem.config
    settings, threat_config = settings or config.evaluation, threat_config or config.threat
    suites = make_suites(settings, threat_config.epsilon, config.attack.attack_step_ratio)
    d = problem.dataset
    dense, transferred = paths.evaluation("dense"), None
    if name != "dense" and threat_config == config.threat and dense.exists():
        shape = (min(len(d.x_test), hygiene.IMAGES), *d.image_shape)
        wanted = {"attacked": ("f", shape)}
        fix = "delete it: the network is evaluated anew"
        transferred = files.load_arrays(dense, wanted, fix=fix)["attacked"]
    return assess_network(
        problem.network(problem.load(paths.trained(name))),
        Split(d.x_test, d.y_test),
        threat=problem.make_threat(threat_config),
        suites=suites,
        key=problem.key("evaluation"),
        bar=bar,
        label=name,
        folder=paths.attacks(name, identity(threat_config, suites)),
        transferred=transferred,
        ticket=problem.network(problem.load(paths.ticket(name))),
        chosen_on=d.x_validation,
    )


# ---------------------------------------------------------------- the numbers of the run


def summarise(problem: Problem, writer: Writer) -> dict[str, Any]:
    """Gather `results.json` from the records, draw the figures, write the report."""
    config = problem.config
    results = {
        "networks": {name: _summary(problem, writer, name) for name in ordered(config.networks)},
        "config": configs.to_dict(config),
        "seed": config.seed,
        "data_digest": problem.dataset.digest,
        "versions": files.versions(),
        "seconds": _seconds(writer.records),
    }
    files.write_json(writer.paths.results, results)
    report.write(writer.paths.root)
    return json.loads(json.dumps(results))


def _summary(problem: Problem, writer: Writer, name: str) -> dict[str, Any]:
    rows = [row for row in writer.records if row.network == name]
    dynamics = [row for row in rows if isinstance(row, Dynamics)]
    evaluations = [row for row in rows if isinstance(row, Evaluated)]
    for kind, found, file in (
        (Dynamics, dynamics, writer.paths.trained(name)),
        (Evaluated, evaluations, writer.paths.evaluation(name)),
    ):
        if not found:
            raise InputError(
                f"records {writer.paths.metrics}",
                expected=f"rows of stage {kind.stage} of the network {name}",
                got="none",
                fix=f"delete {file} and run again: they are made anew",
            )
    accuracy, first = evaluations[-1], dynamics[0]
    gaps = [row.dynamics_gap for row in dynamics]
    ticket = problem.load(writer.paths.ticket(name))
    return {
        "density": density(ticket.mask),
        "natural_accuracy": accuracy.natural_accuracy,
        "natural_interval": accuracy.natural_interval,
        "robust_accuracy": accuracy.robust_accuracy,
        "robust_interval": accuracy.robust_interval,
        "attacks": accuracy.attacks,
        "hygiene": accuracy.hygiene,
        "kernel_distance": first.kernel_distance,
        "relative_kernel_distance": first.relative_kernel_distance,
        "target_distance": first.dynamics_gap,
        "relative_target_distance": first.relative_gap,
        "dynamics_gap": float(np.mean(gaps)),
        "final_dynamics_gap": gaps[-1],
        "layers": [row._asdict() for row in masks.statistics(ticket.mask, ticket.gain)],
    }


def _seconds(rows: Sequence[Record]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in rows:
        seconds = getattr(row, "seconds", None)
        if seconds is not None:
            stage = f"{row.stage}.{row.network}"
            totals[stage] = round(totals.get(stage, 0.0) + seconds, 3)
    return totals
