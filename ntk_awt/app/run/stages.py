"""The stages composed into a resumable run; every artifact's path and record is defined here.

A run folder holds everything that a report or a later stage reads:

    config.toml                    settings
    metrics.jsonl                  one JSON object a line: stage, network, step, values
    results.json                   the numbers of the run
    tickets/NAME.safetensors       each network at initialisation: weights, mask, gain
    trained/NAME.safetensors       the same after training
    dynamics/NAME/epoch-0001.npz   outputs and kernels on the probe set
    evaluation/NAME.npz            each test image: right when clean, right under attack; examples
    evaluation/NAME/ID/            the outcome of each attack, by an identity of its settings
    checkpoints/                   Orbax states, to resume from
    figures/, report.html          pictures of the above

A stage whose artifact exists is skipped; a stage that was interrupted continues from its newest
checkpoint and ends with the numbers of an uninterrupted run.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import data, files, masks, models, threats, tickets, training
from ntk_awt.app import config as configs
from ntk_awt.app import names as methods
from ntk_awt.app.config import EvaluationConfig, RunConfig, ThreatConfig, TicketConfig
from ntk_awt.app.names import Method, Trained, network_label, ordered
from ntk_awt.app.report import page as report
from ntk_awt.app.verdicts import NOT_JUDGED, Verdict, verdict
from ntk_awt.attacks import ATTACKS, CRITERIA, PGD, perturb
from ntk_awt.checkpoints import Checkpoints
from ntk_awt.errors import InputError, choose
from ntk_awt.kernels import (
    empirical,
    kernel_distance,
    relative_kernel_distance,
    relative_target_distance,
    target_distance,
)
from ntk_awt.masks import Ticket
from ntk_awt.network import Network, density
from ntk_awt.robustness import hygiene
from ntk_awt.robustness.accuracy import measure
from ntk_awt.robustness.suite import Assessment, assess, identity, make_suites
from ntk_awt.threats import Threat
from ntk_awt.types import ApplyFn, Images, Key, Split

VALIDATION_IMAGES = 1000
"""At most that many validation images are attacked after each epoch."""

EXAMPLES = 8
"""Test images whose attacked versions are kept for the report."""


class Reporter(Protocol):
    """Where a run shows its progress."""

    def bar(
        self, label: str, total: int, unit: str
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar over `total` units; what it gives is called with the units done."""
        ...


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """See `Reporter.bar`."""
        yield lambda done: None


# ---------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Paths:
    """Where everything of a run lies; a name or a link that leads out of it is an `InputError`."""

    root: Path

    config = property(lambda self: files.inside(self.root, "config.toml"))
    metrics = property(lambda self: files.inside(self.root, "metrics.jsonl"))
    results = property(lambda self: files.inside(self.root, "results.json"))
    figures = property(lambda self: files.inside(self.root, "figures"))
    report = property(lambda self: files.inside(self.root, "report.html"))

    def ticket(self, name: str) -> Path:
        """The network at initialisation."""
        return files.inside(self.root, "tickets", f"{name}.safetensors")

    def trained(self, name: str) -> Path:
        """The network after training."""
        return files.inside(self.root, "trained", f"{name}.safetensors")

    def checkpoints(self, stage: str, name: str) -> Path:
        """Orbax's folder of a stage's state."""
        return files.inside(self.root, "checkpoints", f"{stage}-{name}")

    def dynamics(self, name: str, epoch: int) -> Path:
        """Observations of one epoch on the probe set."""
        return files.inside(self.root, "dynamics", name, f"epoch-{epoch:04d}.npz")

    def evaluation(self, name: str) -> Path:
        """Outcome on each test image."""
        return files.inside(self.root, "evaluation", f"{name}.npz")

    def attacks(self, name: str, identity: str) -> Path:
        """Folder of each attack's outcome."""
        return files.inside(self.root, "evaluation", name, identity)


class Log:
    """`metrics.jsonl`: append-only while all goes well, cut back when a stage is resumed.

    Raises:
        InputError: a line that is no row.
    """

    def __init__(self, path: Path):
        self._path = path
        self.rows = report.read_rows(path) if path.exists() else []
        self._torn = path.exists() and not path.read_bytes().endswith(b"\n")

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self._torn = rows, False
        files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; rows of the same stage and network from that step on are dropped first."""

        def repeated(old: dict[str, Any]) -> bool:
            return any(
                (old["stage"], old["network"]) == (row["stage"], row["network"])
                and old["step"] >= row["step"]
                for row in rows
            )

        if self._torn or any(map(repeated, self.rows)):
            self._rewrite([row for row in self.rows if not repeated(row)])
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self.rows += rows


# ---------------------------------------------------------------- a run


class Observation(NamedTuple):
    """What is seen of a network on the probe set Z = (X, X̃), p clean and p perturbed images.

    Attributes:
        outputs: f(Z), [2p, classes], in logits.
        kernel: Θ(Z, X̃), [2p, p, classes, classes]: what moves all of Z when X̃ is trained on.
    """

    outputs: jax.Array
    kernel: jax.Array


@dataclass(frozen=True)
class _Observe:
    """Outputs and kernel of a network on a probe set; equal for equal networks, as jit asks."""

    apply: ApplyFn

    def __call__(self, points: Images, perturbed: Images, ticket: Ticket) -> Observation:
        params, mask, gain = ticket
        outputs = self.apply(masks.effective(params, mask, gain), points)
        kernel = empirical(self.apply, params, points, perturbed, mask=mask, gain=gain)
        return Observation(outputs, kernel)


class Run:
    """One configuration in one folder; its methods are the stages.

    Args:
        config: all settings.
        root: the run folder; made if it does not exist.
        reporter: shows progress.

    Raises:
        InputError: unknown names in the config, a folder that holds a run of other settings, a
            data set that does not fit.
        OSError: a folder that cannot be written.
    """

    def __init__(self, config: RunConfig, root: Path, reporter: Reporter | None = None):
        check_names(config)
        self.config = config
        self.paths = Paths(root)
        self.reporter = reporter or Silent()
        _check_folder(config, self.paths)
        self.threat  # noqa: B018  bad data is reported before anything is written
        if not self.paths.config.exists() or configs.load(self.paths.config) != config:
            configs.save(config, self.paths.config)
        self.log = Log(self.paths.metrics)

    # ------------------------------------------------------------ what all stages share

    def key(self, stream: str) -> Key:
        """The random key of one named purpose; streams don't depend on one another."""
        return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(stream.encode()))

    @cached_property
    def dataset(self) -> data.Dataset:
        """The images."""
        dataset = data.load(self.config.data, self.config.seed)
        needed = max(self.config.record.probe_size, self.config.ticket.ticket_batch_size)
        if len(dataset.x_validation) < needed:
            raise InputError(
                "validation images",
                expected=f"at least {needed} (probe_size and ticket_batch_size)",
                got=str(len(dataset.x_validation)),
                fix="raise validation_fraction, or lower those two",
            )
        training.steps_per_epoch(
            len(dataset.x_train), self.config.train, self.config.record.records_per_epoch
        )
        return dataset

    @cached_property
    def network(self) -> Network:
        """The dense network at initialisation."""
        shape, classes = self.dataset.image_shape, self.dataset.num_classes
        return models.build(self.config.model, shape, classes, self.key("model"))

    @cached_property
    def threat(self) -> Threat:
        """The threat model."""
        return self.make_threat(self.config.threat)

    def make_threat(self, settings: ThreatConfig) -> Threat:
        """A threat model on this run's images; its signal comes from the training images."""
        basis = None
        if settings.name == "strong-l2":
            d = self.dataset
            basis = signal_basis(settings.basis, d.x_train, d.y_train)
        return threats.build(settings, self.dataset.bounds, basis)

    def attack(self, steps: int, restarts: int = 1) -> PGD:
        """PGD with that many steps; none where ε = 0, since the set is one point."""
        steps = steps if self.config.threat.epsilon > 0 else 0
        return PGD(steps, self.config.attack.attack_step_ratio, restarts)

    @cached_property
    def training_attack(self) -> PGD:
        """The attack inside training, search and probe set."""
        return self.attack(self.config.attack.attack_steps)

    @cached_property
    def probe(self) -> tuple[jax.Array, jax.Array]:
        """Fixed clean and perturbed images (X, X̃), [p, *shape] each.

        X̃ attacks the dense network at initialisation and stays the same for every network.
        """
        p = self.config.record.probe_size
        x, y = (jnp.asarray(a[:p]) for a in (self.dataset.x_validation, self.dataset.y_validation))
        found = perturb(self.training_attack, self.network, x, y, self.threat, self.key("probe"))
        return x, found.images

    @cached_property
    def observe(self) -> Callable[[Ticket], Observation]:
        """Outputs and kernel of a network on the probe set, as a pure function."""
        clean, perturbed = self.probe
        points = jnp.concatenate([clean, perturbed])
        return jax.tree_util.Partial(_Observe(self.network.apply), points, perturbed)

    def _with(self, ticket: Ticket) -> Network:
        return Network(self.network.apply, *ticket)

    def load_ticket(self, name: str) -> Ticket:
        """A network at initialisation, from its file."""
        return masks.load_ticket(self.paths.ticket(name), self.network.params)

    def load_trained(self, name: str) -> Ticket:
        """A network after training, from its file."""
        return masks.load_ticket(self.paths.trained(name), self.network.params)

    def load_checkpoint(self, stage: str, name: str) -> tuple[Ticket, int]:
        """A network as of the newest checkpoint of a stage, and the updates done by then.

        Args:
            stage: search or train.
            name: of the network.

        Raises:
            InputError: an unknown stage or network, or no checkpoint.
        """
        choose("stage of a checkpoint", stage, ("search", "train"))
        choose("network", name, ordered(self.config.networks))
        params, folder = self.network.params, self.paths.checkpoints(stage, name)
        if stage == "search":
            method = methods.resolve(self.config, name)
            if method.kind != "search":
                raise InputError("network", expected="one that is searched for", got=name)
            dense = masks.dense(params)
            like: Any = self._search_start(dense, method.ticket, method.mask.gain)
        else:
            optimizer = training.make_optimizer(self.config.train, 1).init(params)
            like = training.TrainState(jnp.zeros((), jnp.int32), params, optimizer)
        found: Any = None
        if folder.is_dir():  # Orbax would make it
            with Checkpoints(folder) as saved:
                found = saved.latest(like)
        if found is None or found is like:
            raise InputError(f"checkpoint {folder}", expected="a saved state", got="none")
        if stage == "search":
            return found.solver.ticket, int(found.solver.step)
        return self.load_ticket(name)._replace(params=found.params), int(found.step)

    def describe(self, name: str) -> dict[str, str]:
        """What the file of a network says of it, so that it can be used without its run."""
        return {
            "network": name,
            "seed": str(self.config.seed),
            "model": json.dumps(configs.to_dict(self.config.model)),
            "input_shape": json.dumps(self.dataset.image_shape),
            "num_classes": json.dumps(self.dataset.num_classes),
        }

    # ------------------------------------------------------------ stages

    def make_tickets(self) -> None:
        """Write every network at initialisation: dense, drawn, searched for, or from a file.

        Those that need the trained dense network train it first.
        """
        # Those from files first: a bad file should not be found after minutes of work.
        for name in sorted(self.config.networks, key=methods.is_file, reverse=True):
            label = network_label(name)
            path = self.paths.ticket(label)
            if not path.exists():
                ticket = self._make(label, methods.resolve(self.config, name))
                masks.save_ticket(ticket, path, self.describe(label))

    def _make(self, label: str, method: Method) -> Ticket:
        params, clock = self.network.params, Clock()
        if method.kind == "dense":
            return masks.dense(params)
        if method.kind == "file":
            return masks.load_ticket(Path(method.name), params)
        if method.kind == "search":
            return self._search(label, method)
        if method.kind == "baseline":
            ticket = self._baseline(method.name, method)
        else:
            if not self.paths.ticket("dense").exists():
                masks.save_ticket(
                    masks.dense(params), self.paths.ticket("dense"), self.describe("dense")
                )
            self.train(("dense",))
            clock.lap()
            ticket = self._from_trained(label, method)
        self.log.add([{"stage": "ticket", "network": label, "step": 0, "seconds": clock.lap()}])
        return ticket

    def problem(self, stream: str) -> tickets.Problem:
        """The dense network at initialisation and the training images, for searches."""
        d = self.dataset
        x, y = jnp.asarray(d.x_train), jnp.asarray(d.y_train)
        return tickets.Problem(self.network.params, x, y, self.threat, self.key(stream))

    def _baseline(self, name: str, method: Method) -> Ticket:
        apply, problem = self.network.apply, self.problem(name)
        return tickets.baseline(name, apply, problem, self.training_attack, method.mask)

    def _from_trained(self, label: str, method: Method) -> Ticket:
        d, epochs = self.dataset, self.config.train.epochs
        with self.reporter.bar(f"{label}: scores", epochs, "epochs") as show:
            start = Trained(
                self.network.apply,
                self.network.params,
                self.load_trained("dense").params,
                d.x_train,
                d.y_train,
                self.threat,
                self.training_attack,
                self.key("train"),
                method.mask,
                self.config.train,
                (lambda record: show(record.epoch),),
                self.paths.checkpoints("scores", label),
            )
            ticket = methods.PIPELINES[method.name](start)
            show(epochs)
        return ticket

    def _search(self, label: str, method: Method) -> Ticket:
        settings, gain = method.ticket, method.mask.gain
        attack, apply = self.training_attack, self.network.apply
        first = self._baseline(settings.start, method)
        rows, d = slice(settings.ticket_batch_size), self.dataset
        problem = self.problem("search")
        held_out = tickets.held_out_target(
            apply,
            attack,
            problem._replace(
                x=jnp.asarray(d.x_validation[rows]),
                y=jnp.asarray(d.y_validation[rows]),
                key=self.key("held-out"),
            ),
            settings,
        )
        folder = self.paths.checkpoints("search", label)
        bar = self.reporter.bar(f"{label}: search", settings.ticket_steps, "steps")
        clock = Clock()
        with bar as show, Checkpoints(folder) as saved:
            state = saved.latest(self._search_start(first, settings, gain))

            def on_record(state: tickets.SearchState, record: tickets.SearchRecord) -> None:
                row: dict[str, Any] = {"stage": "ticket", "network": label, "step": record.step}
                row |= {
                    f"{name}_distance": float(v) for name, v in record.distances._asdict().items()
                }
                row["held_out_objective"] = record.held_out
                if record.step:
                    row["objective"] = record.objective
                self.log.add([row | {"seconds": clock.lap()}])
                saved.save(record.step, state)
                show(record.step)

            return tickets.search(
                apply,
                problem,
                state,
                held_out,
                attack=attack,
                config=settings,
                on_record=on_record,
                gain=gain,
            )

    def _search_start(
        self, first: Ticket, settings: TicketConfig, gain: str
    ) -> tickets.SearchState:
        network, key = self.network, self.key("solver")
        return tickets.start(network.apply, settings, network.params, first, key, gain)

    def train(self, only: tuple[str, ...] = ()) -> None:
        """Train every network (or the dense one and `only` those), and record its dynamics."""
        for name in ordered(self.config.networks):
            wanted = not only or name == "dense" or name in only
            if wanted and not self.paths.trained(name).exists():
                self._train(name)

    def _train(self, name: str) -> None:
        d, settings = self.dataset, self.config.train
        x, y = (a[:VALIDATION_IMAGES] for a in (d.x_validation, d.y_validation))
        clock = Clock()
        with self.reporter.bar(f"{name}: train", settings.epochs, "epochs") as show:

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
                files.save_arrays(self.paths.dynamics(name, record.epoch), arrays)
                validation = measure(
                    self._with(record.ticket),
                    Split(x, y),
                    self.threat,
                    self.training_attack,
                    key=self.key("validation"),
                )
                self.log.add(
                    [
                        {
                            "stage": "train",
                            "network": name,
                            "step": int(record.steps[-1]),
                            "epoch": record.epoch,
                            "loss": float(record.loss.mean()),
                            "accuracy": float(record.accuracy.mean()),
                            "validation_natural": validation.natural.value,
                            "validation_robust": validation.robust.value,
                            "seconds": clock.lap(),
                        },
                        *self._gaps(name, record.epoch, arrays),
                    ]
                )
                show(record.epoch)

            ticket = training.fit(
                self.network.apply,
                self.load_ticket(name),
                d.x_train,
                d.y_train,
                config=settings,
                threat=self.threat,
                attack=self.training_attack,
                key=self.key("train"),
                observe=self.observe,
                records=self.config.record.records_per_epoch,
                callbacks=[on_epoch],
                checkpoints=self.paths.checkpoints("train", name),
            )
        masks.save_ticket(ticket, self.paths.trained(name), self.describe(name))

    def _gaps(self, name: str, epoch: int, observed: dict[str, Any]) -> list[dict[str, Any]]:
        """Distances to the dense network, and to the own initial kernel, at each observation."""
        dense = observed if name == "dense" else self._observed("dense", epoch, observed)
        first = observed if epoch == 1 else self._observed(name, 1, None)
        initial_kernel = first["kernel"][0]
        triples = zip(
            observed["step"],
            zip(observed["outputs"], dense["outputs"], strict=True),
            zip(observed["kernel"], dense["kernel"], strict=True),
            strict=True,
        )
        return [
            {
                "stage": "dynamics",
                "network": name,
                "step": int(step),
                "dynamics_gap": float(target_distance(f_dense, f)),
                "relative_gap": float(relative_target_distance(f_dense, f)),
                "kernel_distance": float(kernel_distance(k_dense, k)),
                "relative_kernel_distance": float(relative_kernel_distance(k_dense, k)),
                "kernel_drift": float(relative_kernel_distance(initial_kernel, k)),
            }
            for step, (f, f_dense), (k, k_dense) in triples
        ]

    def _observed(
        self, name: str, epoch: int, like: dict[str, Any] | None
    ) -> dict[str, np.ndarray]:
        """The saved observations of an epoch; as many as `like` has, if it is given."""
        records = None if like is None else len(like["step"])
        p, c = self.config.record.probe_size, self.dataset.num_classes
        wanted = {
            "step": ("iu", (records,)),
            "outputs": ("f", (records, 2 * p, c)),
            "kernel": ("f", (records, 2 * p, p, c, c)),
        }
        fix = f"take it from a copy, or run again without {self.paths.trained(name)} and the "
        fix += f"folder {self.paths.checkpoints('train', name)}: the network is trained anew"
        return files.load_arrays(self.paths.dynamics(name, epoch), wanted, fix=fix)

    def evaluate(self) -> None:
        """Natural and robust accuracy of every trained network on the test images."""
        for name in ordered(self.config.networks):
            if self.paths.evaluation(name).exists():
                continue
            clock = Clock()
            found = self.assess(name)
            outcome = found.outcome
            arrays = {
                "natural_correct": outcome.natural_correct,
                "robust_correct": outcome.robust_correct,
                "examples": outcome.images[:EXAMPLES],
                "attacked": outcome.images[: hygiene.IMAGES],
                "clean": self.dataset.x_test[:EXAMPLES],
                "labels": self.dataset.y_test[:EXAMPLES],
            }
            row = {"stage": "evaluate", "network": name, "step": 0, "seconds": clock.lap()}
            for part, share in (("natural", outcome.natural), ("robust", outcome.robust)):
                row |= {
                    f"{part}_accuracy": share.value,
                    f"{part}_interval": [share.low, share.high],
                }
            row |= {"attacks": found.table(), "hygiene": found.hygiene.record()}
            self.log.add([row])
            files.save_arrays(self.paths.evaluation(name), arrays)

    def assess(
        self,
        name: str,
        settings: EvaluationConfig | None = None,
        threat_config: ThreatConfig | None = None,
    ) -> Assessment:
        """One trained network on the test images; outcomes of attacks made before are kept.

        Args:
            name: of the network.
            settings: attacks, steps and restarts; the run's if not given.
            threat_config: the threat model; the run's if not given.
        """
        settings, ours = settings or self.config.evaluation, self.config.threat
        threat_config = threat_config or ours
        ratio = self.config.attack.attack_step_ratio
        suites = make_suites(settings, threat_config.epsilon, ratio)
        trained, d = self.load_trained(name), self.dataset
        dense, transferred = self.paths.evaluation("dense"), None
        if name != "dense" and threat_config == ours and dense.exists():
            shape = (min(len(d.x_test), hygiene.IMAGES), *d.image_shape)
            wanted = {"attacked": ("f", shape)}
            fix = "delete it: the network is evaluated anew"
            transferred = files.load_arrays(dense, wanted, fix=fix)["attacked"]
        return assess(
            self._with(trained),
            Split(d.x_test, d.y_test),
            threat=self.make_threat(threat_config),
            suites=suites,
            key=self.key("evaluation"),
            bar=self.reporter.bar,
            label=name,
            folder=self.paths.attacks(name, identity(threat_config, suites)),
            transferred=transferred,
            ticket=self._with(self.load_ticket(name)),
            chosen_on=d.x_validation,
        )

    def verdicts(self) -> list[Verdict]:
        """What the hygiene rules said of every trained network, as far as it is evaluated."""
        flags = {
            row["network"]: row["hygiene"]["flags"]
            for row in self.log.rows
            if row["stage"] == "evaluate"
        }
        found = []
        for name in ordered(self.config.networks):
            label = f"{name}, seed {self.config.seed}"
            if name in flags:
                found.append(verdict(label, flags[name]))
            elif self.paths.trained(name).exists():
                found.append(Verdict(label, NOT_JUDGED, ()))
        return found

    def summarise(self) -> dict[str, Any]:
        """Gather `results.json` from the records, draw the figures, write the report."""
        results = {
            "networks": {name: self._summary(name) for name in ordered(self.config.networks)},
            "config": configs.to_dict(self.config),
            "seed": self.config.seed,
            "data_digest": self.dataset.digest,
            "versions": files.versions(),
            "seconds": self._seconds(),
        }
        files.write_json(self.paths.results, results)
        report.write(self.paths.root)
        return json.loads(json.dumps(results))

    def _summary(self, name: str) -> dict[str, Any]:
        rows = [row for row in self.log.rows if row["network"] == name]
        dynamics = [row for row in rows if row["stage"] == "dynamics"]
        evaluations = [row for row in rows if row["stage"] == "evaluate"]
        for stage, found, file in (
            ("dynamics", dynamics, self.paths.trained(name)),
            ("evaluate", evaluations, self.paths.evaluation(name)),
        ):
            if not found:
                raise InputError(
                    f"records {self.paths.metrics}",
                    expected=f"rows of stage {stage} of the network {name}",
                    got="none",
                    fix=f"delete {file} and run again: they are made anew",
                )
        accuracy = evaluations[-1]
        ticket = self.load_ticket(name)
        first, gaps = dynamics[0], [row["dynamics_gap"] for row in dynamics]
        return {
            "density": density(ticket.mask),
            "natural_accuracy": accuracy["natural_accuracy"],
            "natural_interval": accuracy["natural_interval"],
            "robust_accuracy": accuracy["robust_accuracy"],
            "robust_interval": accuracy["robust_interval"],
            "attacks": accuracy["attacks"],
            "hygiene": accuracy["hygiene"],
            "kernel_distance": first["kernel_distance"],
            "relative_kernel_distance": first["relative_kernel_distance"],
            "target_distance": first["dynamics_gap"],
            "relative_target_distance": first["relative_gap"],
            "dynamics_gap": float(np.mean(gaps)),
            "final_dynamics_gap": gaps[-1],
            "layers": [row._asdict() for row in masks.statistics(ticket.mask, ticket.gain)],
        }

    def _seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for row in self.log.rows:
            if "seconds" in row:
                stage = f"{row['stage']}.{row['network']}"
                totals[stage] = round(totals.get(stage, 0.0) + row["seconds"], 3)
        return totals

    def run(self) -> dict[str, Any]:
        """All stages; returns the content of `results.json`."""
        self.make_tickets()
        self.train()
        self.evaluate()
        return self.summarise()


class Clock:
    """Wall-clock seconds between laps."""

    def __init__(self):
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return round(seconds, 3)


# ---------------------------------------------------------------- names and checks


def signal_basis(name: str, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The signal's directions [d, k]: from class means, or from a file with one such array.

    Args:
        name: class-means, FILE.npy or FILE.npz.
        images: training images [n, *shape] with d pixels each.
        labels: [n].

    Raises:
        InputError: another name, or a file that does not hold one array [d, k] for these images.
    """
    if name == "class-means":
        return threats.class_mean_basis(images, labels)
    if not name.endswith((".npy", ".npz")):
        choose("basis", name, ("class-means", "FILE.npy", "FILE.npz"))
    size, what = int(np.prod(images.shape[1:])), f"basis file {name}"
    try:
        with open(name, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = [loaded] if name.endswith(".npy") else list(loaded.values())
    except Exception as error:  # a bad file raises one of many kinds
        raise InputError(what, expected="a readable array", got=f"{error}") from None
    if len(arrays) != 1:
        raise InputError(what, expected="one array in it", got=f"{len(arrays)}")
    (basis,) = arrays
    if basis.ndim != 2 or len(basis) != size or basis.dtype.kind not in "iuf":
        raise InputError(
            what, expected=f"numbers [{size}, k]", got=f"shape {basis.shape}, dtype {basis.dtype}"
        )
    return basis


def check_names(config: RunConfig) -> None:
    """Raise unless every name in the config is known, before anything is computed."""
    methods.check(config)
    models.check(config.model)
    choose("threat model", config.threat.name, threats.THREATS)
    choose("loss", config.train.loss, training.LOSSES)
    choose("criterion", config.train.criterion, CRITERIA)
    for attack in config.evaluation.attacks:
        choose("attack", attack, (*ATTACKS, "auto"))
    training.make_optimizer(config.train, 1)


def _check_folder(config: RunConfig, paths: Paths) -> None:
    """Raise if the folder holds a run of other settings, or other files, or leads outside."""
    files.check_tree(paths.root)
    if paths.config.exists():
        found, wanted = configs.identity(configs.load(paths.config)), configs.identity(config)
        for name in wanted:
            if found[name] != wanted[name]:
                raise InputError(
                    f"run folder {paths.root}, setting {name}",
                    expected=f"{found[name]!r} as in its config.toml",
                    got=repr(wanted[name]),
                    fix="choose another --run-dir, or delete that folder",
                )
    elif paths.root.exists() and (not paths.root.is_dir() or any(paths.root.iterdir())):
        raise InputError(
            f"run folder {paths.root}",
            expected="a run, an empty folder or no folder",
            got="something else",
            fix="choose another --run-dir",
        )
    files.check_folder(f"run folder {paths.root}", paths.root)


def open_run(root: Path, reporter: Reporter | None = None) -> Run:
    """The run in an existing folder.

    Raises:
        InputError: no run there.
    """
    if not Paths(root).config.exists():
        raise InputError(f"run folder {root}", expected="a folder with config.toml", got="none")
    return Run(configs.load(Paths(root).config), root, reporter)
