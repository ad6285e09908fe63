"""Every way to a network, by name: solvers, presets, baselines, pipelines, variants, files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import masks, tickets, training
from ntk_awt.app import config as configs
from ntk_awt.app.config import MaskConfig, RunConfig, TicketConfig, TrainConfig, VariantConfig
from ntk_awt.attacks import Attack
from ntk_awt.errors import InputError, check_name, choose
from ntk_awt.masks import Scores, Ticket
from ntk_awt.network import Prunable
from ntk_awt.threats import Threat
from ntk_awt.tickets.solvers.scores import straight_through
from ntk_awt.types import ApplyFn, Gain, Key, Mask, Params


class Method(NamedTuple):
    """How a network at initialisation is made.

    Attributes:
        kind: dense, search, baseline, pipeline or file.
        name: of the solver, baseline or pipeline; the path of a file.
        mask, ticket: the settings that it uses.
    """

    kind: str
    name: str
    mask: MaskConfig
    ticket: TicketConfig


# ---------------------------------------------------------------- after dense training


class Trained(NamedTuple):
    """What a pipeline starts from.

    Attributes:
        apply: the dense network's function.
        initial: its weights at initialisation.
        params: its weights after adversarial training.
        x, y: training images [n, *shape] and labels [n].
        threat, attack: as in training.
        key: of batches and attacks.
        mask, train: settings of the run.
        callbacks, checkpoints: as of `training.fit`, for pipelines that train once more.
        prunable: see `masks.prunable_leaves`.
    """

    apply: ApplyFn
    initial: Params
    params: Params
    x: np.ndarray
    y: np.ndarray
    threat: Threat
    attack: Attack
    key: Key
    mask: MaskConfig
    train: TrainConfig
    callbacks: tuple[training.Callback, ...] = ()
    checkpoints: Path | None = None
    prunable: Prunable | None = None


def _largest(start: Trained) -> Mask:
    scores = masks.magnitude_scores(start.params)
    return masks.make(scores, start.mask.density, start.mask.allocation, start.prunable)


def rewind(start: Trained) -> Ticket:
    """Lottery ticket: the largest weights of the trained network, at their initial values.

    Source: Frankle & Carbin, "The lottery ticket hypothesis" (2019), one round of pruning.
    """
    return masks.sparse(start.initial, _largest(start), start.mask.gain, start.prunable)


def prune(start: Trained) -> Ticket:
    """Three stages: the largest weights of the trained network, at their trained values.

    They keep gain 1: they are the weights that were trained. Training goes on from there.

    Source: Sehwag et al., "Towards compact and robust deep neural networks" (2019).
    """
    return masks.sparse(start.params, _largest(start), "none")


def _relative(w: jax.Array) -> jax.Array:
    """θ/max|θ|; zero where all of them are."""
    return w / jnp.max(jnp.abs(w), initial=jnp.finfo(w.dtype).tiny)


def hydra(start: Trained) -> Ticket:
    """Three stages: scores that learn under attack which trained weights to keep (HYDRA).

    Scores start at θ/max|θ| of each layer; the largest absolute ones are kept, the gradient goes
    straight through to all of them, the weights stay. It trains as long as the run's training.

    Source: Sehwag et al., "HYDRA: pruning adversarially robust neural networks" (2020).
    """
    first = jax.tree.map(_relative, start.params)
    absolute = masks.magnitude_scores
    counts = masks.allocate(
        absolute(first), start.mask.density, start.mask.allocation, start.prunable
    )

    def weights(scores: Scores, mask: Mask, gain: Gain) -> Params:
        hard = masks.top_k(absolute(jax.lax.stop_gradient(scores)), counts)
        soft = straight_through(hard, absolute(scores), start.prunable)
        return jax.tree.map(jnp.multiply, start.params, soft)

    found = training.fit(
        start.apply,
        masks.dense(first),
        start.x,
        start.y,
        config=start.train,
        threat=start.threat,
        attack=start.attack,
        key=start.key,
        weights=weights,
        callbacks=start.callbacks,
        checkpoints=start.checkpoints,
    )
    mask = masks.top_k(absolute(found.params), counts)
    return masks.sparse(start.params, mask, "none")


PIPELINES: dict[str, Callable[[Trained], Ticket]] = {
    "rewind": rewind,
    "prune": prune,
    "hydra": hydra,
}
"""Sparse networks that need the trained dense one, by name."""


# ---------------------------------------------------------------- names


def is_file(name: str) -> bool:
    """Whether the name of a network is that of a saved one."""
    return name.endswith(".safetensors")


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
        return Method("file", name, config.mask, config.ticket)
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
        return Method("search", solver, mask, dataclasses.replace(ticket, solver=solver))
    kind = "baseline" if method in tickets.BASELINES else "pipeline"
    return Method("dense" if method == "dense" else kind, method, mask, ticket)


def _changed(settings: Any, changes: dict[str, Any], where: str) -> Any:
    merged = configs.to_dict(settings) | changes
    return configs.from_dict(merged, type(settings), where)


def network_label(name: str) -> str:
    """Short name of a network: that of a ticket file is the file's stem."""
    return Path(name).stem if is_file(name) else name


def ordered(networks: tuple[str, ...]) -> list[str]:
    """Short names with the dense network first: the others are compared with it while training."""
    labels = [network_label(name) for name in networks]
    return ["dense", *(label for label in labels if label != "dense")]


def check(config: RunConfig) -> None:
    """Raise unless every network of a run, and what its settings name, is known."""
    for name in config.variants:
        check_name("variant", name)
        if name in _built_in() or is_file(name):
            raise InputError("variant", expected="a name of its own", got=name, fix="rename it")
    for name in (*config.networks, *config.variants):
        found = resolve(config, name)
        choose("allocation", found.mask.allocation, masks.ALLOCATIONS)
        choose("solver", found.ticket.solver, tickets.SOLVERS)
        choose("start of the search", found.ticket.start, tickets.BASELINES)
        if found.kind == "file" and network_label(name) in (*_built_in(), *config.variants):
            raise InputError(
                "network file", expected="a name of its own", got=name, fix="rename it"
            )
    labels = [network_label(name) for name in config.networks]
    for label in labels:
        check_name("network file", label)
    if len(set(labels)) != len(labels):
        raise InputError("network files", expected="different file names", got=", ".join(labels))
