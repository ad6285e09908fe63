"""What all networks of a run share: images, dense network, threat, attack, probe set, keys."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import data, masks, models, threats, tickets, training
from ntk_awt.app import config as configs
from ntk_awt.app.config import RunConfig, ThreatConfig
from ntk_awt.attacks import PGD, perturb
from ntk_awt.errors import InputError, choose
from ntk_awt.kernels import empirical
from ntk_awt.masks import Ticket
from ntk_awt.network import Network
from ntk_awt.threats import Threat
from ntk_awt.types import ApplyFn, Images, Key

__all__ = ["Observation", "Problem", "signal_basis"]


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


@dataclass(frozen=True)
class Problem:
    """What the settings of a run ask for; each part is made when it is first looked at.

    Attributes:
        config: all settings.
    """

    config: RunConfig

    def key(self, stream: str) -> Key:
        """The random key of one named purpose; streams don't depend on one another."""
        return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(stream.encode()))

    @cached_property
    def dataset(self) -> data.Dataset:
        """The images.

        Raises:
            InputError: a data set that is unknown, or too small for the settings.
        """
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
    def dense(self) -> Network:
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

    @cached_property
    def attack(self) -> PGD:
        """The attack inside training, search and probe set; no steps where ε = 0: one point."""
        settings = self.config.attack
        steps = settings.attack_steps if self.config.threat.epsilon > 0 else 0
        return PGD(steps, settings.attack_step_ratio)

    @cached_property
    def probe(self) -> tuple[jax.Array, jax.Array]:
        """Fixed clean and perturbed images (X, X̃), [p, *shape] each.

        X̃ attacks the dense network at initialisation and stays the same for every network.
        """
        p = self.config.record.probe_size
        x, y = (jnp.asarray(a[:p]) for a in (self.dataset.x_validation, self.dataset.y_validation))
        found = perturb(self.attack, self.dense, x, y, self.threat, self.key("probe"))
        return x, found.images

    @cached_property
    def observe(self) -> Callable[[Ticket], Observation]:
        """Outputs and kernel of a network on the probe set, as a pure function."""
        clean, perturbed = self.probe
        points = jnp.concatenate([clean, perturbed])
        return jax.tree_util.Partial(_Observe(self.dense.apply), points, perturbed)

    def search_problem(self, stream: str) -> tickets.Problem:
        """The dense network at initialisation and the training images, for searches."""
        x, y = jnp.asarray(self.dataset.x_train), jnp.asarray(self.dataset.y_train)
        return tickets.Problem(self.dense.params, x, y, self.threat, self.key(stream))

    def load(self, path: Path) -> Ticket:
        """A network of this run's model, from its file."""
        return masks.load_ticket(path, self.dense.params)

    def network(self, ticket: Ticket) -> Network:
        """The function of this run's model with other parameters, mask and gain."""
        return Network(self.dense.apply, *ticket)

    def describe(self, name: str) -> dict[str, str]:
        """What the file of a network says of it, so that it can be used without its run."""
        return {
            "network": name,
            "seed": str(self.config.seed),
            "model": json.dumps(configs.to_dict(self.config.model)),
            "input_shape": json.dumps(self.dataset.image_shape),
            "num_classes": json.dumps(self.dataset.num_classes),
        }


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
