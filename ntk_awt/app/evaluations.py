"""Robust accuracy of networks from wherever they come: attacked, judged, in a table and a figure.

Sources are those of `inspection`: a run folder, a saved network, a checkpoint, or code.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ntk_awt import threats
from ntk_awt.app import plots
from ntk_awt.app.config import AttackConfig, EvaluationConfig, ThreatConfig
from ntk_awt.app.names import ordered
from ntk_awt.app.run.stages import Paths, Reporter, open_run
from ntk_awt.app.sources import Source, load_images, open_source
from ntk_awt.attacks import ATTACKS
from ntk_awt.errors import InputError, check_number, choose
from ntk_awt.robustness.suite import Assessment, assess, identity, make_suites
from ntk_awt.types import Split


class Request(NamedTuple):
    """What the user asks for; None is the run's setting, or the default where there is no run.

    Attributes:
        attacks: names in `ATTACKS`, or auto.
        threat: linf or l2; strong-l2 where a run says which.
        epsilon: radius, in pixel units.
        steps, restarts: of each attack.
        images: FILE.npz with images x [n, *shape] and labels y [n], in place of the run's test set.
    """

    attacks: tuple[str, ...] = ()
    threat: str | None = None
    epsilon: float | None = None
    steps: int | None = None
    restarts: int | None = None
    images: Path | None = None


class Found(NamedTuple):
    """The assessment of one network.

    Attributes:
        network: its name.
        label: the name, with the seed where the network belongs to a run.
        threat: the threat model's settings.
        settings: of the evaluation.
        assessment: the numbers.
    """

    network: str
    label: str
    threat: ThreatConfig
    settings: EvaluationConfig
    assessment: Assessment

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        outcome = self.assessment.outcome
        return {
            "network": self.network,
            "threat": self.threat.name,
            "epsilon": self.threat.epsilon,
            "steps": self.settings.evaluation_steps,
            "restarts": self.settings.evaluation_restarts,
            "natural": outcome.natural._asdict(),
            "robust": outcome.robust._asdict(),
            "attacks": self.assessment.table(),
            "hygiene": self.assessment.hygiene.record(),
        }


def _changed(config: Any, **changes: Any) -> Any:
    """A config with the changes that are not None or empty."""
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v not in (None, ())})


def _settings(
    request: Request, evaluation: EvaluationConfig, threat: ThreatConfig
) -> tuple[EvaluationConfig, ThreatConfig]:
    for name in request.attacks:
        choose("attack", name, (*ATTACKS, "auto"))
    choose("threat model", request.threat or threat.name, threats.THREATS)
    if request.epsilon is not None:
        check_number("epsilon", request.epsilon, low=0)
    settings = _changed(
        evaluation,
        attacks=request.attacks,
        evaluation_steps=request.steps,
        evaluation_restarts=request.restarts,
    )
    if request.attacks:
        settings = dataclasses.replace(settings, full_evaluation=False)
    return settings, _changed(threat, name=request.threat, epsilon=request.epsilon)


def evaluate_run(
    root: Path, request: Request, networks: tuple[str, ...], reporter: Reporter
) -> list[Found]:
    """Trained networks of a run, on its test images.

    Args:
        root: the run folder.
        request: what differs from the run's settings.
        networks: only these; all if empty.
        reporter: shows progress.

    Raises:
        InputError: an unknown network or attack, or images, which belong to other sources.
    """
    run = open_run(root, reporter)
    known = ordered(run.config.networks)
    for name in networks:
        choose("network", name, known)
    if request.images is not None:
        raise InputError("--images", expected="none: a run has its test images", got="a file")
    settings, threat = _settings(request, run.config.evaluation, run.config.threat)
    return [
        Found(
            name,
            f"{name}, seed {run.config.seed}",
            threat,
            settings,
            run.assess(name, settings, threat),
        )
        for name in networks or known
    ]


def evaluate_source(name: str, request: Request, folder: Path, reporter: Reporter) -> Found:
    """A saved network, a checkpoint or the user's own code.

    Args:
        name: the source.
        request: attacks, threat model and images; those of the source's run if it has one.
        folder: where each attack's outcome is kept.
        reporter: shows progress.

    Raises:
        InputError: no such source, or no images with labels for one without a run.
    """
    source = open_source(name, reporter=reporter)
    run, threat = source.run, ThreatConfig()
    evaluation, bounds, chosen_on = EvaluationConfig(), (0.0, 1.0), None
    attack, key = AttackConfig(), jax.random.key(0)
    if run is not None:
        evaluation, threat, bounds = run.config.evaluation, run.config.threat, run.dataset.bounds
        attack, key, chosen_on = run.config.attack, run.key("evaluation"), run.dataset.x_validation
    settings, threat = _settings(request, evaluation, threat)
    x, y = _images(source, request.images)
    built = threats.build(threat, bounds) if run is None else run.make_threat(threat)
    network = source.network.replace(mask=source.mask, gain=source.gain)
    suites = make_suites(settings, threat.epsilon, attack.attack_step_ratio)
    found = assess(
        network,
        Split(x, y),
        threat=built,
        suites=suites,
        key=key,
        bar=reporter.bar,
        label=source.name,
        folder=folder / identity(threat, suites, _fingerprint(network, x, y)),
        chosen_on=chosen_on,
    )
    label = source.name if run is None else f"{source.name}, seed {run.config.seed}"
    return Found(source.name, label, threat, settings, found)


def _fingerprint(*trees: Any) -> str:
    """Changes with any entry of the network or the images."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _images(source: Source, path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if path is None:
        if source.run is None:
            raise InputError(
                "--images",
                expected="FILE.npz with images x and labels y, since this source has no run",
                got="none",
            )
        return source.run.dataset.x_test, source.run.dataset.y_test
    x, y = load_images(path)
    if y is None:
        raise InputError(f"images {path}", expected="labels y in it", got="none")
    return x, y


def is_run(source: str) -> bool:
    """Whether the source is a run folder."""
    return Paths(Path(source)).config.exists()


def draw(found: list[Found], folder: Path, name: str) -> Path:
    """Save the figure of robust accuracy against radius and steps; the path of its picture."""
    plots.save(
        plots.robustness({one.network: one.assessment.hygiene.record() for one in found}),
        folder,
        name,
    )
    return folder / f"{name}.svg"
