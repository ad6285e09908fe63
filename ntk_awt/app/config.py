"""Typed settings of a run: one frozen dataclass a stage, TOML in and out, a hash to name the run.

The dataclasses are the only place where a setting is declared: the command line, `config.toml` and
the run folder's name are all made from them. Names that select an implementation (data set, model,
threat model, solver, optimiser) are checked by the registry that holds it, whose error lists them.
"""

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from tyro.conf import Suppress, arg

from ntk_awt import files
from ntk_awt.errors import InputError, check_number, choose


def _check_whole(what: str, value: float, *, low: int) -> None:
    """Raise unless `value` is a whole number that JAX can count to."""
    check_number(what, value, low=low)
    if value != int(value) or value > 2**31 - 1:
        raise InputError(what, expected=f"a whole number in [{low}, 2³¹)", got=f"{value}")


def _later(default: Any) -> Any:
    """A setting that came later: it enters the run's hash where it is not at its default."""
    return field(default=default, metadata={"hash": "unless default"})


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are split."""

    name: Annotated[str, arg(name="data")] = "digits"
    """digits, mnist, fashion_mnist, cifar10, a FILE.npz, or hub:NAME (needs `datasets`)."""
    data_dir: Path | None = field(default=None, metadata={"hash": False})
    """Folder of the data files; else the environment variable NTK_AWT_DATA (or its sub-folder)."""
    train_size: int | None = None
    """Use only that many training images, drawn with the seed; all of them if not set."""
    test_size: int | None = None
    """Use only that many test images, drawn with the seed; all of them if not set."""
    validation_fraction: float = 0.1
    """Part of the training images set aside for validation, in (0, 1)."""

    def __post_init__(self):
        for name in ("train_size", "test_size"):
            if (size := getattr(self, name)) is not None:
                _check_whole(name, size, low=1)
        check_number(
            "validation_fraction", self.validation_fraction, low=0, high=0.9, low_open=True
        )


@dataclass(frozen=True)
class ModelConfig:
    """The dense network."""

    name: Annotated[str, arg(name="model")] = "mlp"
    """mlp, lenet5 or conv4."""
    widths: tuple[int, ...] = (300, 100)
    """Hidden widths of the MLP, in units; the convolutional models have their published ones."""
    activation: str = "relu"
    """relu, gelu, erf or tanh."""
    pooling: str = "max"
    """max or average: 2×2 pooling of the convolutional models (analytic kernels need average)."""
    parametrization: str = "standard"
    """standard (the scale is in the weights) or ntk (the scale is in the forward pass)."""
    weight_std: float = 2.0**0.5
    """σ_w: pre-activations have variance σ_w²·(mean square input) at initialisation."""
    bias_std: float = 0.1
    """σ_b: standard deviation of the bias term at initialisation."""
    fan: str = _later("in")
    """A weight's variance is σ_w² over the fan-in, or over the average of fan-in and fan-out."""
    distribution: str = _later("normal")
    """Of the initial weights: normal, or truncated (at two standard deviations, as in JAX's own
    initialisers; the variance stays)."""
    input_mean: float = _later(0.0)
    """The network sees (x − input_mean)/input_std; images and threat models stay in [0, 1]."""
    input_std: float = _later(1.0)
    """See input_mean."""

    def __post_init__(self):
        for width in self.widths:
            _check_whole("widths", width, low=1)
        check_number("weight_std", self.weight_std, low=0, low_open=True)
        check_number("bias_std", self.bias_std, low=0)
        check_number("input_mean", self.input_mean, low=0, high=1)
        check_number("input_std", self.input_std, low=0, low_open=True)
        choose("pooling", self.pooling, ("max", "average"))
        choose("parametrization", self.parametrization, ("standard", "ntk"))
        choose("fan", self.fan, ("in", "average"))
        choose("distribution", self.distribution, ("normal", "truncated"))


@dataclass(frozen=True)
class MaskConfig:
    """How many weights are kept, and where."""

    density: float = 0.05
    """Kept share of all prunable weights, in (0, 1]; biases are always kept."""
    allocation: str = "erk"
    """Density of each layer: uniform, erk or global."""
    gain: str = "energy"
    """energy (the norm of each layer's weights is preserved) or none."""

    def __post_init__(self):
        check_number("density", self.density, low=0, high=1, low_open=True)
        choose("gain", self.gain, ("energy", "none"))


@dataclass(frozen=True)
class ThreatConfig:
    """What the adversary may do to an image."""

    name: Annotated[str, arg(name="threat")] = "linf"
    """linf, l2 or strong-l2 (an L2 ball whose part in a signal subspace is limited further)."""
    epsilon: float = 0.1
    """Radius of the ball, in units of the pixel range [0, 1]."""
    delta: float = 0.05
    """strong-l2: limit on the part of the perturbation in the signal subspace, as for epsilon."""
    basis: str = "class-means"
    """strong-l2: class-means (the span of their differences), or a FILE.npy or FILE.npz [d, k]."""

    def __post_init__(self):
        check_number("epsilon", self.epsilon, low=0)
        check_number("delta", self.delta, low=0)


@dataclass(frozen=True)
class AttackConfig:
    """PGD inside training and inside the ticket search."""

    attack_steps: int = 10
    """Gradient steps of PGD while training."""
    attack_step_ratio: float = 2.5
    """Step size of PGD = ratio · ε / steps (for training and evaluation)."""

    def __post_init__(self):
        _check_whole("attack_steps", self.attack_steps, low=0)
        check_number("attack_step_ratio", self.attack_step_ratio, low=0, low_open=True)


@dataclass(frozen=True)
class TicketConfig:
    """The search for the ticket at initialisation."""

    solver: str = "awt"
    """awt (kept weights), awt-scores (mask), awt-joint (both), concrete (relaxed mask) or saliency
    (weights removed in rounds)."""
    start: str = _later("random")
    """The mask to start from: the name of a baseline (random, magnitude, snip, …)."""
    ticket_steps: int = 600
    """Optimiser steps of the search."""
    ticket_learning_rate: float = 1e-3
    """Adam's step size for the weights."""
    score_learning_rate: float = _later(0.05)
    """Adam's step size for scores of the mask."""
    ticket_schedule: str = _later("cosine")
    """Of both step sizes: cosine down to zero, or constant."""
    ticket_batch_size: int = 32
    """Images a step; the kernel of a step is [batch, batch, classes, classes]."""
    matching: str = _later("distances")
    """distances (target and kernel distance) or kl (KL of the sparse to the dense prediction)."""
    kernel_weight: float = 1.0
    """λ: weight of the kernel distance; 0 leaves it out."""
    target_weight: float = _later(1.0)
    """Weight of the target distance; 0 leaves it out."""
    balance: bool = _later(False)
    """Scale λ so that the gradients of both distances have the same norm (a running mean)."""
    distance: str = "relative"
    """relative (each squared distance over its dense norm) or absolute (β² + λα²)."""
    jacobian: str = "masked"
    """masked (pruned weights never move) or full (Neural Tangent Transfer's convention)."""
    pairs: str = _later("all")
    """all (the kernel of a batch with itself) or halves (of its first with its second half)."""
    estimator: str = _later("exact")
    """exact, or probes: estimated kernel distances, for kernels that do not fit into memory."""
    inputs: str = "natural"
    """Images in the objective: natural, or adversarial for the dense network, for the sparse one,
    or for both (half of the batch each)."""
    attack_labels: str = "random"
    """Labels of the attack in the objective: random (drawn anew, so that the attacked images say
    nothing of their classes) or true (the sparse network then learns to avoid the right class)."""
    learn_allocation: bool = _later(False)
    """Let scores of all layers compete, so that the search decides each layer's density."""
    reselect: str = _later("regrow")
    """regrow (drop the kept weights that change the outputs least, grow where the gradient is
    largest), regrow-units (the same for each unit, which keeps its number of incoming weights) or
    magnitude (keep the largest of all, pruned ones at their initial values)."""
    reselect_every: int = 20
    """awt: re-select the mask every that many steps; 0 keeps it."""
    reselect_fraction: float = 0.3
    """regrow: share of each layer's kept weights that one re-selection may replace, in (0, 1]."""
    temperature: float = _later(0.67)
    """concrete: temperature of the relaxed Bernoulli mask."""
    rounds: int = _later(10)
    """saliency: rounds of removal, at densities that fall geometrically; 1 is one-shot."""
    ticket_records: int = 10
    """How often both distances are recorded on the held-out batch, evenly spaced; the search keeps
    the best of these networks, or its start where none is better."""
    l2: float = _later(0.0)
    """awt: adds l2/density · ‖w‖² of the kept weights, without biases, to what is minimised."""
    patience: int = _later(0)
    """Stop after that many records without a better objective on the held-out batch; 0 goes on to
    the last step. The best record's network is kept either way."""

    def __post_init__(self):
        _check_whole("ticket_steps", self.ticket_steps, low=1)
        check_number("ticket_learning_rate", self.ticket_learning_rate, low=0, low_open=True)
        check_number("score_learning_rate", self.score_learning_rate, low=0, low_open=True)
        _check_whole("ticket_batch_size", self.ticket_batch_size, low=1)
        check_number("kernel_weight", self.kernel_weight, low=0)
        check_number("target_weight", self.target_weight, low=0)
        _check_whole("reselect_every", self.reselect_every, low=0)
        check_number("reselect_fraction", self.reselect_fraction, low=0, high=1, low_open=True)
        check_number("temperature", self.temperature, low=0, low_open=True)
        _check_whole("rounds", self.rounds, low=1)
        if self.solver == "saliency":
            check_number("rounds", self.rounds, low=1, high=self.ticket_steps)
        _check_whole("ticket_records", self.ticket_records, low=1)
        check_number("l2", self.l2, low=0)
        _check_whole("patience", self.patience, low=0)
        choose("matching", self.matching, ("distances", "kl"))
        choose("distance", self.distance, ("relative", "absolute"))
        choose("jacobian", self.jacobian, ("masked", "full"))
        choose("pairs", self.pairs, ("all", "halves"))
        choose("estimator", self.estimator, ("exact", "probes"))
        choose("inputs", self.inputs, ("dense", "sparse", "both", "natural"))
        choose("attack_labels", self.attack_labels, ("random", "true"))
        choose("ticket_schedule", self.ticket_schedule, ("cosine", "constant"))
        choose("reselect", self.reselect, ("regrow", "regrow-units", "magnitude"))
        if self.kernel_weight == self.target_weight == 0:
            raise InputError("kernel_weight and target_weight", expected="one above 0", got="0")
        if self.pairs == "halves" and self.ticket_batch_size < 2:
            raise InputError("ticket_batch_size", expected="at least 2 for pairs halves", got="1")
        if self.solver == "saliency" and (
            self.matching == "kl" or self.estimator == "probes" or self.balance
        ):
            raise InputError(
                "solver saliency",
                expected="matching distances, estimator exact, no balance (it needs residuals)",
                got=f"{self.matching}, {self.estimator}, balance {self.balance}",
            )
        if self.balance and (
            self.matching == "kl" or 0 in (self.kernel_weight, self.target_weight)
        ):
            raise InputError(
                "balance",
                expected="two distances to balance",
                got=f"matching {self.matching}, weights {self.target_weight:g} (target) and "
                f"{self.kernel_weight:g} (kernel)",
            )


@dataclass(frozen=True)
class VariantConfig:
    """A method with other settings, under a name of its own that `networks` may list."""

    method: str
    """Name of the method: a solver, a preset, a baseline or a pipeline."""
    mask: dict[str, Any] = field(default_factory=dict)
    """Settings of `mask` that differ."""
    ticket: dict[str, Any] = field(default_factory=dict)
    """Settings of `ticket` that differ."""


@dataclass(frozen=True)
class TrainConfig:
    """Training of every network of the run, all with the same settings and batches."""

    loss: str = "adversarial"
    """adversarial, natural or trades."""
    criterion: str = _later("cross-entropy")
    """cross-entropy, or squared (half the squared distance to the one-hot label)."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step; the last incomplete batch of an epoch is dropped."""
    optimizer: str = "adam"
    """sgd, momentum, adam or adamw (from Optax)."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """constant, or cosine down to zero."""
    weight_decay: float = 0.0
    """Coefficient of weight decay: decoupled in adamw, an L2 penalty in the others."""
    trades_beta: float = 6.0
    """Weight of the robust term of TRADES."""

    def __post_init__(self):
        _check_whole("epochs", self.epochs, low=1)
        _check_whole("batch_size", self.batch_size, low=1)
        check_number("learning_rate", self.learning_rate, low=0, low_open=True)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("trades_beta", self.trades_beta, low=0)


@dataclass(frozen=True)
class RecordConfig:
    """What is recorded of the dynamics."""

    probe_size: int = 16
    """Validation images of the fixed probe set; each enters clean and with a fixed perturbation."""
    records_per_epoch: int = 1
    """How often an epoch outputs and kernels on the probe set are recorded."""

    def __post_init__(self):
        _check_whole("probe_size", self.probe_size, low=1)
        _check_whole("records_per_epoch", self.records_per_epoch, low=1)


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation on the test images."""

    attacks: tuple[str, ...] = ("apgd-ce", "apgd-t", "square")
    """pgd, apgd-ce, apgd-dlr, apgd-t, fab-t, square, or auto (apgd-ce, apgd-t, fab-t and square);
    each is tried on what those before it left, so that the worst case counts, image by image."""
    full_evaluation: bool = False
    """Attack with auto, whatever `attacks` says."""
    evaluation_steps: int = 100
    """Gradient steps of each attack; Square makes 50 queries for each of them."""
    evaluation_restarts: int = 1
    """Random restarts of each attack."""

    def __post_init__(self):
        if not self.attacks or len(set(self.attacks)) != len(self.attacks):
            raise InputError(
                "attacks", expected="one or more, each once", got=", ".join(self.attacks) or "none"
            )
        _check_whole("evaluation_steps", self.evaluation_steps, low=0)
        _check_whole("evaluation_restarts", self.evaluation_restarts, low=1)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    networks: tuple[str, ...] = field(
        default=("dense", "ticket", "random"), metadata={"hash": False}
    )
    """What to train and compare: dense; ticket (found by `ticket.solver`) or a solver's name; ntt;
    a baseline (random, magnitude, snip, snip-robust, grasp, synflow); a pipeline that trains the
    dense network first (rewind, prune, hydra); a variant; or a saved ticket's FILE."""
    variants: Annotated[dict[str, VariantConfig], Suppress] = field(
        default_factory=dict, metadata={"hash": False}
    )
    """Methods with settings of their own, by name (in a config file)."""
    seed: int = 0
    """Seed of every random draw of the run."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    threat: ThreatConfig = field(default_factory=ThreatConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    ticket: TicketConfig = field(default_factory=TicketConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        check_number("seed", self.seed, low=0, high=2**32 - 1)
        if "dense" not in self.networks:
            raise InputError(
                "networks",
                expected="dense among them",
                got=", ".join(self.networks) or "nothing",
                fix="every other network is compared with the dense one",
            )
        if len(set(self.networks)) != len(self.networks):
            raise InputError("networks", expected="each once", got=", ".join(self.networks))


PRESETS: dict[str, RunConfig] = {
    "digits": RunConfig(),
    "mnist": RunConfig(
        data=DataConfig("mnist"),
        model=ModelConfig(input_mean=0.1307, input_std=0.3081),
        mask=MaskConfig(density=0.1),
        ticket=TicketConfig(target_weight=0.0, reselect="regrow-units"),
        train=TrainConfig(epochs=8, batch_size=128, learning_rate=3e-3),
    ),
    "cifar10": RunConfig(
        data=DataConfig("cifar10"),
        model=ModelConfig("conv4", input_mean=0.4734, input_std=0.2516),
        threat=ThreatConfig(epsilon=8 / 255),
        ticket=TicketConfig(
            target_weight=0.0, reselect="regrow-units", estimator="probes", ticket_batch_size=128
        ),
        train=TrainConfig(epochs=30, batch_size=128),
    ),
}
"""Settings by data set: those of the demo, of experiments/mnist_standardised.toml at its best
density, and of experiments/cifar10_conv4.toml. Where units have enough weights (not on digits) the
search is what measured best: standardised inputs, the kernel distance alone, and each unit keeps
its number of weights."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain TOML/JSON values; settings that are not set are left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(item) for name, item in items if item is not None}
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


def from_dict(values: dict[str, Any], cls: type = RunConfig, where: str = "config") -> Any:
    """A config from plain values; what is missing takes its default.

    Raises:
        InputError: an unknown name (the error lists the known ones) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise InputError(where, expected="a table of settings", got=repr(values))
    fields = typing.get_type_hints(cls)
    for name in values:
        choose(f"setting in {where}", name, fields)
    for f in dataclasses.fields(cls):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and f.name not in values:
            raise InputError(where, expected=f"the setting {f.name}", got="none")
    return cls(**{name: convert(v, fields[name], f"{where}.{name}") for name, v in values.items()})


def convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as a `kind`: a dataclass, str, int, float, Path, tuple[T, ...] or T | None.

    Raises:
        InputError: it is of another type.
    """
    if dataclasses.is_dataclass(kind):
        return from_dict(value, typing.cast(type, kind), where)
    if isinstance(kind, types.UnionType):  # T | None; TOML has no null, so a value is a T
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(convert(v, item, where) for v in value)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        item = typing.get_args(kind)[1]
        if item is Any:
            return value
        return {name: convert(v, item, f"{where}.{name}") for name, v in value.items()}
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(kind, type) or type(value) is not kind:
        is_list = typing.get_origin(kind) is tuple  # a list in TOML
        name = "list" if is_list else getattr(kind, "__name__", str(kind))
        raise InputError(where, expected=f"a value of type {name}", got=repr(value))
    return value


def save(config: RunConfig, path: Path) -> None:
    """Write `config` as TOML."""
    files.write_text(path, tomli_w.dumps(to_dict(config)))


def load(path: Path) -> RunConfig:
    """Read a TOML config.

    Raises:
        InputError: the file is missing, is not TOML, or holds unknown or ill-typed settings.
    """
    return from_dict(read(path), where=path.name)


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        InputError: the file is missing, or is not TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path}", expected="a TOML file", got=str(error)) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or nested without end
        raise InputError(f"config file {path}", expected="valid TOML", got=str(error)) from None
    return values


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that decide each network's numbers, flat: `{"train.epochs": 20, …}`.

    Left out are the data folder, and the list of networks: one more can join a finished run.
    """
    return _flat(config, lambda f, value: f.metadata.get("hash", True))


def _flat(config: Any, keep: Callable[[dataclasses.Field, Any], Any]) -> dict[str, Any]:
    """Values by full name, of the settings that are to be kept."""
    flat: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if dataclasses.is_dataclass(item):
                walk(item, f"{prefix}{f.name}.")
            elif keep(f, item):
                flat[prefix + f.name] = list(item) if isinstance(item, tuple) else item

    walk(config, "")
    return flat


def digest(config: RunConfig) -> str:
    """Eight hexadecimal digits that depend on `identity(config)` only, on every machine.

    A setting that came later (`"hash": "unless default"`) counts only where it is not at its
    default, so that earlier runs keep their folders.

    Example:
        >>> digest(RunConfig()) == digest(RunConfig(data=DataConfig(data_dir=Path("elsewhere"))))
        True
        >>> digest(RunConfig()) == digest(RunConfig(seed=1))
        False
    """

    def counts(f: dataclasses.Field, value: Any) -> bool:
        rule = f.metadata.get("hash", True)
        return value != f.default if rule == "unless default" else rule

    plain = from_dict(to_dict(config))  # 1 and 1.0 are the same setting
    text = json.dumps(_flat(plain, counts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(config: RunConfig) -> str:
    """Name of the run's folder: what a reader wants to see first, then the digest."""
    data = Path(config.data.name).name.replace(":", "-")
    threat = f"{config.threat.name}-{config.threat.epsilon:g}"
    return f"{data}-{config.model.name}-{config.mask.density:g}-{threat}-{digest(config)}"
