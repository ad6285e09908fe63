"""Trainings of dense and sparse networks for the statements on the gap between them (P1–P3).

Full-batch gradient descent by the package's own loop, in the precision of the check. Networks and
parameters are kept for the process, so that statements share them; kernels are made anew, since
they take more memory than time.
"""

import os
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_awt import data, masks, models, tickets, training
from ntk_awt.app.config import DataConfig, ModelConfig, TicketConfig, TrainConfig
from ntk_awt.attacks import PGD, example_keys
from ntk_awt.errors import InputError
from ntk_awt.masks import Ticket
from ntk_awt.network import Network
from ntk_awt.theory.dynamics import preservation
from ntk_awt.theory.dynamics.preservation import Trajectory
from ntk_awt.threats import L2, Linf, Threat
from ntk_awt.training import Batch
from ntk_awt.types import ApplyFn, Images, Key, Labels, Params
from proofs_check.core import Context, Size

ATTACK = PGD(steps=4, random_start=False)
"""Without random starts the points of each step follow from the parameters."""

DENSITY = 0.2

QUICKLY: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options of programs that take longer to compile than to run."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and how: network, criterion, threat model, step η."""

    network: str
    criterion: str
    threat: str
    step: float

    @property
    def label(self) -> str:
        """In a few words."""
        return f"{self.network}, {self.criterion}, {self.threat}"


@dataclass(frozen=True)
class Pair:
    """Two networks in one setting; `shared`: the sparse one trains on the dense one's points."""

    setting: Setting
    sparse: str
    dense: str = "dense"
    shared: bool = False

    @property
    def label(self) -> str:
        """In a few words."""
        attack = "shared" if self.shared else "own"
        return f"{self.setting.label}, {self.dense} and {self.sparse}, {attack} attack"


MLP_CE = Setting("mlp", "cross-entropy", "linf", 0.4)
MLP_SQUARED = Setting("mlp", "squared", "l2", 0.1)
CNN_CE = Setting("cnn", "cross-entropy", "l2", 0.1)
CNN_SQUARED = Setting("cnn", "squared", "linf", 0.02)
MNIST_CE = Setting("mnist", "cross-entropy", "linf", 0.4)

SAME_START = Pair(MLP_CE, "random", dense="filled")
"""A dense network that starts at the masked weights: D_0 = 0, and only the kernels differ."""

REDUCED = (Pair(MLP_CE, "random"), Pair(MLP_CE, "magnitude", shared=True), SAME_START)

IDENTITY = (
    Pair(MLP_CE, "ticket"),
    Pair(MLP_CE, "random"),
    Pair(MLP_CE, "magnitude", shared=True),
    SAME_START,
    Pair(CNN_SQUARED, "random"),
    Pair(CNN_SQUARED, "magnitude"),
)

ALL = (
    *IDENTITY,
    Pair(MLP_SQUARED, "ticket"),
    Pair(MLP_SQUARED, "magnitude"),
    Pair(CNN_CE, "random", shared=True),
    Pair(CNN_CE, "magnitude"),
    Pair(MNIST_CE, "random"),
)


class Problem(NamedTuple):
    """A network, and the n images and labels that it is trained on."""

    network: Network
    x: np.ndarray
    y: np.ndarray


class Run(NamedTuple):
    """One training: the parameters it went through, and the points of each step."""

    path: Ticket
    x: jax.Array


def unmasked(path: Ticket) -> Ticket:
    """The same outputs from the effective weights: the Jacobian sees pruned weights, no gain."""
    weights = jax.vmap(lambda params: masks.effective(params, path.mask, path.gain))(path.params)
    return Ticket(weights, *(jax.tree.map(jnp.ones_like, t) for t in (path.mask, path.gain)))


def make_threat(name: str) -> Threat:
    """Radii that change the loss much and leave the images recognisable (pixels in [0, 1])."""
    return {"linf": Linf(0.05), "l2": L2(0.5)}[name]


def data_folder() -> Path:
    """Where the real data sets are."""
    default = Path(__file__).parents[3] / "shared" / "data"
    return Path(os.environ.get("NTK_AWT_DATA") or default).expanduser()


def gradient_of(
    apply: ApplyFn, ticket: Ticket, batch: Batch, threat: Threat, config: TrainConfig
) -> Params:
    """The gradient that the training loop follows, by the package's own losses."""

    def loss(params: Params) -> jax.Array:
        weights = masks.effective(params, ticket.mask, ticket.gain)
        return training.LOSSES[config.loss](apply, weights, batch, ATTACK, threat, config)[0]

    return jax.grad(loss)(ticket.params)


def stepped(params: Params, gradient: Params, step: Any) -> Params:
    """θ − ηg."""
    return jax.tree.map(lambda w, g: w - step * g, params, gradient)


@partial(jax.jit, static_argnames=("apply", "criterion"), compiler_options=QUICKLY)
def descend(
    ticket: Ticket,
    x: jax.Array,
    y: Labels,
    step: Any,
    momentum: Any,
    apply: ApplyFn,
    criterion: str,
) -> Params:
    """T + 1 values of the parameters: gradient descent on given points x [T, n, *shape]."""
    config = TrainConfig(loss="natural", criterion=criterion)
    keys = example_keys(jax.random.key(0), jnp.arange(len(y)))

    def update(carry: tuple[Params, Params], points: Images) -> tuple[tuple, Params]:
        params, velocity = carry
        now, batch = ticket._replace(params=params), Batch(points, y, keys)
        gradient = gradient_of(apply, now, batch, Linf(0.0), config)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
        return (stepped(params, velocity, step), velocity), params

    start = (ticket.params, jax.tree.map(jnp.zeros_like, ticket.params))
    (last, _), before = jax.lax.scan(update, start, x)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), before, last)


_top_k = jax.jit(masks.top_k)  # once a network; leaf by leaf it would compile each of its parts


def normal(shapes: Any, rng: np.random.Generator, *batch: int) -> Any:
    """Initial values of a network in NTK parametrisation, drawn in NumPy: nothing to compile."""
    return jax.tree.map(
        lambda w: rng.normal(size=(*batch, *w.shape)).astype(jnp.zeros(()).dtype), shapes
    )


def _network(name: str, size: Size, shape: tuple[int, ...], classes: int) -> Network:
    """The network of that name; its initial values do not matter."""
    config, key = ModelConfig(parametrization="ntk"), jax.random.key(0)
    if name == "cnn":
        config = replace(config, activation="tanh", pooling="average")
        rngs = nnx.Rngs(params=key)
        return Network.from_nnx(
            models.Classifier(shape, classes, config, blocks=((8,),), hidden=(), rngs=rngs)
        )
    if name == "mnist":
        return models.build(replace(config, widths=(32,)), shape, classes, key)
    widths = (16,) if size == "reduced" else (48, 32)
    return models.build(replace(config, widths=widths, activation="gelu"), shape, classes, key)


class Trainings:
    """All trainings of one size, seed and precision.

    Attributes:
        size, seed: of the check's context.
        n: training images, and points Z.
        steps: T.
    """

    def __init__(self, size: Size, seed: int, n: int, steps: int):
        self.size: Size = size
        self.seed, self.n, self.steps = seed, n, steps
        self._kept: dict[Any, Any] = {}

    def _once(self, name: Any, make: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def key(self, *labels: int) -> Key:
        """A key of its own for each use."""
        key = jax.random.key(self.seed)
        for label in labels:
            key = jax.random.fold_in(key, label)
        return key

    @cached_property
    def _digits(self) -> data.Dataset:
        return data.load(DataConfig("digits"), self.seed)

    def problem(self, name: str) -> Problem:
        """The network and its images, made once.

        Raises:
            InputError: the images are not there.
        """
        return self._once(("problem", name), lambda: self._problem(name))

    def _problem(self, name: str) -> Problem:
        if name == "mnist":
            config = DataConfig("mnist", data_dir=data_folder(), train_size=self.n)
            dataset = data.load(config, self.seed)
        else:
            dataset = self._digits
        shape, classes = dataset.image_shape, dataset.num_classes
        kept: list[ApplyFn] = []

        def make() -> Params:
            network = _network(name, self.size, shape, classes)
            kept.append(network.apply)
            return network.params

        params = normal(jax.eval_shape(make), np.random.default_rng([self.seed, 0]))
        x = dataset.x_train[: self.n].astype(np.float64)
        return Problem(Network(kept[0], params), x, dataset.y_train[: self.n])

    def start(self, name: str, kind: str) -> Ticket:
        """A network before training: dense, ticket, random, magnitude, or filled.

        `filled` is the dense network whose weights are the masked ones of `random`.
        """
        return self._once(("start", name, kind), lambda: self._start(name, kind))

    def _start(self, name: str, kind: str) -> Ticket:
        params = self.problem(name).network.params
        if kind == "dense":
            return masks.dense(params)
        if kind == "filled":
            dense, sparse = self.start(name, "dense"), self.start(name, "random")
            return dense._replace(params=masks.effective(*sparse))
        if kind == "ticket":
            return self._search(name)
        rng = np.random.default_rng([self.seed, 1])
        scores = jax.tree.map(
            lambda w: rng.uniform(size=w.shape) if kind == "random" else np.abs(w), params
        )
        mask = jax.tree.map(np.asarray, _top_k(scores, masks.allocate(scores, DENSITY, "erk")))
        kept = jax.tree.map(np.multiply, params, mask)
        return Ticket(kept, mask, masks.energy_gain(params, mask))

    def _search(self, name: str) -> Ticket:
        """A short search on one batch."""
        network, x, y = self.problem(name)
        images, labels = (jnp.asarray(values[: self.n // 2]) for values in (x, y))
        threat, key = make_threat("linf"), self.key(2)
        problem = tickets.Problem(network.params, images, labels, threat, key)
        config = TicketConfig(
            ticket_steps=30, ticket_learning_rate=1e-2, inputs="dense", attack_labels="true"
        )

        @partial(jax.jit, compiler_options=QUICKLY)
        def search(start: Ticket, problem: tickets.Problem) -> Ticket:
            target = tickets.held_out_target(network.apply, ATTACK, problem, config)
            return tickets.solve(network.apply, problem.params, start, target, key, config)

        return search(self.start(name, "random"), problem)

    def run(self, setting: Setting, kind: str) -> Run:
        """A training by `training.fit` on the network's own adversarial points."""
        return self._once(("run", setting, kind), lambda: self._run(setting, kind))

    def _run(self, setting: Setting, kind: str) -> Run:
        network, x, y = self.problem(setting.network)
        ticket, threat = self.start(setting.network, kind), make_threat(setting.threat)
        records: list[training.EpochRecord] = []
        training.fit(
            network.apply,
            ticket,
            x,
            y,
            config=TrainConfig(
                criterion=setting.criterion,
                epochs=self.steps,
                batch_size=self.n,
                optimizer="sgd",
                learning_rate=setting.step,
                schedule="constant",
            ),
            threat=threat,
            attack=ATTACK,
            key=self.key(3),
            observe=parameters,
            callbacks=[records.append],
        )
        params = jax.tree.map(
            lambda *parts: jnp.asarray(np.concatenate(parts)), *[r.observations for r in records]
        )
        path = ticket._replace(params=params)
        points = preservation.attacked_path(
            network.apply, path, x, y, threat=threat, attack=ATTACK, loss=setting.criterion
        )
        return Run(path, points)

    def run_on(
        self, setting: Setting, kind: str, points: jax.Array, *, momentum: float = 0.0
    ) -> Run:
        """A training on given points [T, n, *shape]."""
        network, _, y = self.problem(setting.network)
        ticket = self.start(setting.network, kind)
        rates = (setting.step, momentum)
        params = descend(ticket, points, jnp.asarray(y), *rates, network.apply, setting.criterion)
        return Run(ticket._replace(params=params), points)

    def runs(self, pair: Pair) -> tuple[Run, Run]:
        """The trainings of both networks."""
        dense = self.run(pair.setting, pair.dense)
        if pair.shared:
            name = ("shared", pair)
            return dense, self._once(name, lambda: self.run_on(pair.setting, pair.sparse, dense.x))
        return dense, self.run(pair.setting, pair.sparse)

    def follow(self, setting: Setting, run: Run, z: Images) -> Trajectory:
        """What P1–P3 need of a training, at points Z."""
        network, _, y = self.problem(setting.network)
        return preservation.trajectory(network.apply, run.path, run.x, y, z, loss=setting.criterion)

    def points(self, setting: Setting) -> jax.Array:
        """Z: half of the images clean, the other half attacked at the dense network's start."""
        clean = jnp.asarray(self.problem(setting.network).x)
        attacked = self.run(setting, "dense").x[0]
        half = self.n // 2
        return jnp.concatenate([clean[:half].astype(attacked.dtype), attacked[half:]])

    def trajectories(self, pair: Pair) -> tuple[Trajectory, Trajectory]:
        """Both networks at Z."""
        z = self.points(pair.setting)
        dense, sparse = (self.follow(pair.setting, run, z) for run in self.runs(pair))
        return dense, sparse

    def available(self, pairs: tuple[Pair, ...]) -> tuple[list[Pair], list[str]]:
        """The pairs whose images are there, and why others are left out."""
        found, skipped = [], []
        for pair in pairs:
            try:
                self.problem(pair.setting.network)
            except InputError as error:
                skipped.append(f"{pair.label}: {error}")
            else:
                found.append(pair)
        return found, skipped


def parameters(ticket: Ticket) -> Params:
    """What a training records of itself."""
    return ticket.params


@cache
def _trainings(size: Size, seed: int, n: int, steps: int, dtype: Any) -> Trainings:
    return Trainings(size, seed, n, steps)


def of(context: Context, n: int | None = None, steps: int | None = None) -> Trainings:
    """The trainings for a check, those of earlier checks among them."""
    usual = context.pick((8, 6), (32, 40), (40, 80))
    n, steps = (given or default for given, default in zip((n, steps), usual, strict=True))
    return _trainings(context.size, context.seed, n, steps, jnp.zeros(()).dtype)


def gap_norms(dense: Trajectory, sparse: Trajectory) -> np.ndarray:
    """‖D_k‖, [T + 1]."""
    outputs = (np.asarray(network.outputs, np.float64) for network in (dense, sparse))
    return np.sqrt(np.sum(np.subtract(*outputs) ** 2, axis=(1, 2)))


def matrix(kernel: np.ndarray) -> np.ndarray:
    """[m, n, c, c] as [m·c, n·c]."""
    m, n, c, _ = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(m * c, n * c)
