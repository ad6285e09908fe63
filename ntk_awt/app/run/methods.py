"""Every way to make a network at initialisation, as an object with `make`, and its names."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from ntk_awt import masks, models, threats, tickets, training
from ntk_awt.app import config as configs
from ntk_awt.app.config import MaskConfig, RunConfig, TicketConfig, VariantConfig
from ntk_awt.app.names import PIPELINES, Trained
from ntk_awt.app.run.folder import is_file, network_label
from ntk_awt.app.run.problem import Problem
from ntk_awt.app.run.records import Made, Searched
from ntk_awt.app.run.writer import Clock, Writer
from ntk_awt.attacks import ATTACKS, CRITERIA
from ntk_awt.checkpoints import Checkpoints
from ntk_awt.errors import InputError, check_name, choose
from ntk_awt.masks import Ticket

__all__ = ["Baseline", "Dense", "File", "Method", "Pipeline", "Search", "check_names", "resolve"]


@dataclass(frozen=True)
class Method(ABC):
    """A way to make a network at initialisation.

    Attributes:
        name: of the solver, baseline or pipeline; the path of a file.
        mask, ticket: the settings that it uses.
        trained_first: networks whose training it starts from.
    """

    trained_first: ClassVar[tuple[str, ...]] = ()

    name: str
    mask: MaskConfig
    ticket: TicketConfig

    @abstractmethod
    def make(self, problem: Problem, writer: Writer, label: str) -> Ticket:
        """The network, under that short name; what it took is recorded."""


class Dense(Method):
    """All weights."""

    def make(self, problem: Problem, writer: Writer, label: str) -> Ticket:
        """See `Method.make`."""
        return masks.dense(problem.dense.params)


class File(Method):
    """A saved network."""

    def make(self, problem: Problem, writer: Writer, label: str) -> Ticket:
        """See `Method.make`."""
        return problem.load(Path(self.name))


class Baseline(Method):
    """A mask that is drawn, or scored at initialisation."""

    def make(self, problem: Problem, writer: Writer, label: str) -> Ticket:
        """See `Method.make`."""
        clock = Clock()
        ticket = _baseline(self.name, self.mask, problem)
        writer.add([Made(label, 0, clock.lap())])
        return ticket


def _baseline(name: str, settings: MaskConfig, problem: Problem) -> Ticket:
    given = problem.search_problem(name)
    return tickets.baseline(name, problem.dense.apply, given, problem.attack, settings)


class Pipeline(Method):
    """A mask, and perhaps weights, from the trained dense network."""

    trained_first = ("dense",)

    def make(self, problem: Problem, writer: Writer, label: str) -> Ticket:
        """See `Method.make`."""
        clock, epochs = Clock(), problem.config.train.epochs
        with writer.reporter.bar(f"{label}: scores", epochs, "epochs") as show:
            start = Trained(
                problem.dense.apply,
                problem.dense.params,
                problem.load(writer.paths.trained("dense")).params,
                problem.dataset.x_train,
                problem.dataset.y_train,
                problem.threat,
                problem.attack,
                problem.key("train"),
                self.mask,
                problem.config.train,
                (lambda record: show(record.epoch),),
                writer.paths.checkpoints("scores", label),
            )
            ticket = PIPELINES[self.name](start)
            show(epochs)
        writer.add([Made(label, 0, clock.lap())])
        return ticket


class Search(Method):
    """A ticket that a solver searches for."""

    def start(self, problem: Problem, first: Ticket) -> tickets.SearchState:
        """The search before its first step, from a network of that structure."""
        apply, params = problem.dense.apply, problem.dense.params
        return tickets.start(
            apply, self.ticket, params, first, problem.key("solver"), self.mask.gain
        )

    def make(self, problem: Problem, writer: Writer, label: str) -> Ticket:
        """See `Method.make`."""
        settings, d = self.ticket, problem.dataset
        first = _baseline(settings.start, self.mask, problem)
        given, rows = problem.search_problem("search"), slice(settings.ticket_batch_size)
        held_out = tickets.held_out_target(
            problem.dense.apply,
            problem.attack,
            given._replace(
                x=jnp.asarray(d.x_validation[rows]),
                y=jnp.asarray(d.y_validation[rows]),
                key=problem.key("held-out"),
            ),
            settings,
        )
        folder = writer.paths.checkpoints("search", label)
        bar = writer.reporter.bar(f"{label}: search", settings.ticket_steps, "steps")
        clock = Clock()
        with bar as show, Checkpoints(folder) as saved:

            def on_record(state: tickets.SearchState, record: tickets.SearchRecord) -> None:
                distances = record.distances
                row = Searched(
                    label,
                    record.step,
                    kernel_distance=float(distances.kernel),
                    relative_kernel_distance=float(distances.relative_kernel),
                    target_distance=float(distances.target),
                    relative_target_distance=float(distances.relative_target),
                    held_out_objective=record.held_out,
                    objective=record.objective if record.step else None,
                    seconds=clock.lap(),
                )
                writer.add([row])
                saved.save(record.step, state)
                show(record.step)

            return tickets.search(
                problem.dense.apply,
                given,
                saved.latest(self.start(problem, first)),
                held_out,
                attack=problem.attack,
                config=settings,
                on_record=on_record,
                gain=self.mask.gain,
            )


# ---------------------------------------------------------------- names


def _built_in() -> tuple[str, ...]:
    groups: tuple[Any, ...] = (tickets.SOLVERS, tickets.PRESETS, tickets.BASELINES, PIPELINES)
    return ("dense", "ticket", *(name for group in groups for name in group))


def resolve(config: RunConfig, name: str) -> Method:
    """How the network of that name is made in a run.

    Args:
        config: of the run; its variants are names too.
        name: see `RunConfig.networks`.

    Returns:
        The method, with the run's settings and what the preset or variant changes.

    Raises:
        InputError: an unknown name, or settings of a variant that are unknown or don't fit.

    Example:
        >>> resolve(RunConfig(), "ntt").ticket.inputs
        'natural'
    """
    if is_file(name):
        return File(name, config.mask, config.ticket)
    known = _built_in()
    choose("network", name, (*known, *config.variants, "FILE.safetensors"))
    mask, ticket, method = config.mask, config.ticket, name
    where = f"variant {name}"
    for table in (config.variants, tickets.PRESETS):
        if method in table:
            change: VariantConfig = table[method]
            mask = _changed(mask, change.mask, f"{where}.mask")
            ticket = _changed(ticket, change.ticket, f"{where}.ticket")
            method = change.method
    choose(f"method of {where}", method, known)
    if method in ("ticket", *tickets.SOLVERS):
        solver = ticket.solver if method == "ticket" else method
        return Search(solver, mask, dataclasses.replace(ticket, solver=solver))
    if method == "dense":
        return Dense(method, mask, ticket)
    return (Baseline if method in tickets.BASELINES else Pipeline)(method, mask, ticket)


def _changed(settings: Any, changes: dict[str, Any], where: str) -> Any:
    merged = configs.to_dict(settings) | changes
    return configs.from_dict(merged, type(settings), where)


def check_names(config: RunConfig) -> None:
    """Raise unless every name in the config is known, before anything is computed.

    Raises:
        InputError: what is unknown, and what there is.
    """
    _check_networks(config)
    models.check(config.model)
    choose("threat model", config.threat.name, threats.THREATS)
    choose("loss", config.train.loss, training.LOSSES)
    choose("criterion", config.train.criterion, CRITERIA)
    for attack in config.evaluation.attacks:
        choose("attack", attack, (*ATTACKS, "auto"))
    training.make_optimizer(config.train, 1)


def _check_networks(config: RunConfig) -> None:
    for name in config.variants:
        check_name("variant", name)
        if name in _built_in() or is_file(name):
            raise InputError("variant", expected="a name of its own", got=name, fix="rename it")
    for name in (*config.networks, *config.variants):
        found = resolve(config, name)
        choose("allocation", found.mask.allocation, masks.ALLOCATIONS)
        choose("solver", found.ticket.solver, tickets.SOLVERS)
        choose("start of the search", found.ticket.start, tickets.BASELINES)
        if is_file(name) and network_label(name) in (*_built_in(), *config.variants):
            raise InputError(
                "network file", expected="a name of its own", got=name, fix="rename it"
            )
    labels = [network_label(name) for name in config.networks]
    for label in labels:
        check_name("network file", label)
    if len(set(labels)) != len(labels):
        raise InputError("network files", expected="different file names", got=", ".join(labels))
