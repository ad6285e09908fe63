"""P1: how the gap between two networks moves in one step of gradient descent."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import masks
from ntk_awt.app.config import TrainConfig
from ntk_awt.attacks import example_keys
from ntk_awt.masks import Ticket
from ntk_awt.theory.dynamics.preservation import Trajectory, identity_defect
from ntk_awt.threats import Threat
from ntk_awt.training import Batch
from ntk_awt.types import ApplyFn, Labels
from proofs_check.core import (
    FORMULA,
    Case,
    Context,
    Line,
    Outcome,
    Panel,
    Recorder,
    Statement,
    close,
    slope,
)
from proofs_check.instances import trainings
from proofs_check.instances.trainings import (
    DENSITY,
    MLP_CE,
    MLP_SQUARED,
    Pair,
    Run,
    Setting,
    Trainings,
)

STATEMENT = Statement(
    number="P1",
    title="identity of the gap",
    claim=(
        "One step of gradient descent changes the gap between any two networks by what their mixed "
        "tangent kernels and loss gradients say, up to a remainder of second order in the step."
    ),
    formula="D_{k+1} = D_k − (η/N)(K^d_k g^d_k − K^s_k g^s_k) + ρ_k,   Σ_k‖ρ_k‖ = O(η) at fixed T",
    hypotheses={
        "gradient descent": "on the mean loss, with a constant step η",
        "own points": "the loss gradients are taken at each network's points X̃_k",
        "masked Jacobian": "K is the kernel of the masked network, gain included",
        "smooth": "smooth activations, for the order of the remainder",
    },
    instances=(
        "full-batch adversarial trainings by training.fit: MLPs on digits and a small CNN; dense "
        "against ticket, random and magnitude masks; cross-entropy and squared loss; L∞ and L2; "
        "own and shared attack"
    ),
    rule=(
        "at every step the change of the gap is accounted for to 1e-9 (relative), and the 95 % "
        "interval of the slope of Σ‖ρ_k‖ in η lies in [0.85, 1.15]"
    ),
    tolerance=(
        "both sides are sums of about 1e3 products of float64 numbers whose size is at most 1e3 "
        "times the change: 1e3 · 1e3 · 1e-16 = 1e-10. The slope is 1 as η → 0; third-order terms "
        "bend it by a few per cent at the largest steps."
    ),
    source="theory P1; after Shi et al. 2022",
)

TOLERANCE = 1e-9


class Account(NamedTuple):
    """Both sides of the identity, step by step.

    Attributes:
        change: D_{k+1} − D_k, [T, m, c].
        wanted: −(η/N)(K^d_k g^d_k − K^s_k g^s_k) + ρ^d_k − ρ^s_k, [T, m, c].
        library: the same by the library, [T, m, c].
    """

    change: np.ndarray
    wanted: np.ndarray
    library: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Part of each step's change that is left over, [T]."""
        over = np.linalg.norm(self.change - self.wanted, axis=(1, 2))
        return over / np.linalg.norm(self.wanted, axis=(1, 2))


def moved(network: Trajectory, step: float) -> np.ndarray:
    """−(η/N) Σ_j K_k(z, x̃_j) g_j + ρ_k(z), block by block, [T, m, c]."""
    kernels, gradients, rest = (
        np.asarray(a, np.float64) for a in (network.kernels, network.gradients, network.remainders)
    )
    total = rest.copy()
    for k in range(len(total)):
        for j in range(gradients.shape[1]):
            total[k] -= step / gradients.shape[1] * kernels[k, :, j] @ gradients[k, j]
    return total


def account(dense: Trajectory, sparse: Trajectory, step: float) -> Account:
    """Both sides of the identity for two networks."""
    outputs = (np.asarray(network.outputs, np.float64) for network in (dense, sparse))
    change = np.diff(np.subtract(*outputs), axis=0)
    defect = np.asarray(identity_defect(dense, sparse, step), np.float64)
    return Account(change, moved(dense, step) - moved(sparse, step), change - defect)


def identity(name: str, found: Account) -> Case:
    """The rule, on the worst of all steps."""
    worst = int(np.argmax(found.errors))
    name = f"{name}: D_k, worst of {len(found.wanted)} steps"
    return close(name, found.change[worst], found.wanted[worst], tolerance=TOLERANCE)


# ---------------------------------------------------------------- the order of the remainder


@partial(jax.jit, static_argnames=("apply", "config"), compiler_options=trainings.QUICKLY)
def _sums(
    pair: Ticket,
    x: jax.Array,
    y: Labels,
    z: jax.Array,
    threat: Threat,
    step: Any,
    count: Any,
    apply: ApplyFn,
    config: TrainConfig,
) -> tuple[jax.Array, jax.Array]:
    """Σ‖ρ_k‖ and Σ‖D_{k+1} − D_k‖ over `count` steps of both networks (axis 0 of the pair)."""
    keys = example_keys(jax.random.key(0), jnp.arange(len(y)))

    def network(ticket: Ticket) -> tuple[Any, jax.Array, jax.Array]:
        """The parameters after a step, ρ and the change of the outputs."""
        f = masks.masked(apply, ticket.mask, ticket.gain)
        gradient = trainings.gradient_of(apply, ticket, Batch(x, y, keys), threat, config)
        after = trainings.stepped(ticket.params, gradient, step)
        move = jax.tree.map(jnp.subtract, after, ticket.params)
        outputs, first = jax.jvp(lambda p: f(p, z), (ticket.params,), (move,))
        change = f(after, z) - outputs
        return after, change - first, change

    def update(_: Any, carry: tuple) -> tuple:
        params, *sums = carry
        params, *parts = jax.vmap(network)(pair._replace(params=params))
        sums = [total + jnp.linalg.norm(p[0] - p[1]) for total, p in zip(sums, parts, strict=True)]
        return params, *sums

    zero = jnp.zeros((), z.dtype)
    return jax.lax.fori_loop(0, count, update, (pair.params, zero, zero))[1:]


def drawn_pairs(shapes: Any, rng: np.random.Generator, count: int) -> Ticket:
    """Random initial values and masks: `count` pairs of a dense and a sparse network."""

    def stacked(dense: Any, sparse: Any) -> np.ndarray:
        return np.stack(np.broadcast_arrays(dense, sparse), 1)

    def leaf(values: np.ndarray) -> Ticket:
        kept = rng.uniform(size=values.shape) < (DENSITY if values[0].ndim > 1 else 1)
        axes = tuple(range(1, values.ndim))
        norms = [np.sqrt(np.sum(v**2, axes)) for v in (values, values * kept)]
        return Ticket(
            stacked(values, values * kept),
            stacked(np.ones_like(kept), kept),
            stacked(np.ones_like(norms[0]), norms[0] / norms[1]),
        )

    leaves, structure = jax.tree.flatten(trainings.normal(shapes, rng, count))
    drawn = [leaf(values) for values in leaves]
    return Ticket(*(structure.unflatten(part) for part in zip(*drawn, strict=True)))


def remainders(
    t: Trainings,
    setting: Setting,
    rng: np.random.Generator,
    seeds: int,
    time: float,
    counts: list[int],
    apply: ApplyFn | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """η for each number of steps within that time, and both sums, [seeds, steps].

    `apply` is the setting's network if None.
    """
    network, x, y = t.problem(setting.network)
    half = t.n // 2
    noise = rng.uniform(-0.05, 0.05, x[half:].shape)
    z = jnp.asarray(np.concatenate([x[:half], np.clip(x[half:] + noise, 0, 1)]))
    config = TrainConfig(loss="adversarial", criterion=setting.criterion)
    arguments = (jnp.asarray(x), jnp.asarray(y), z, trainings.make_threat(setting.threat))
    pairs = drawn_pairs(network.params, rng, seeds)
    steps = time / np.array(counts)
    sums = np.zeros((seeds, len(counts), 2))
    for i in range(seeds):
        pair = jax.tree.map(lambda leaf, i=i: leaf[i], pairs)
        for k, (step, count) in enumerate(zip(steps, counts, strict=True)):
            sums[i, k] = _sums(pair, *arguments, step, count, apply or network.apply, config)
    return steps, sums[..., 0], sums[..., 1]


def order(name: str, steps: np.ndarray, sums: np.ndarray) -> Case:
    """The rule: a sum over a fixed time falls linearly in η."""
    return slope(name, steps, sums, low=0.85, high=1.15)


# ---------------------------------------------------------------- the check


def broken(check: Recorder, t: Trainings, pair: Pair, dense: Trajectory) -> None:
    """The identity with a wrong kernel, factor, attack or optimiser."""
    setting = pair.setting
    (_, run), x = t.runs(pair), t.problem(setting.network).x
    clean = jnp.broadcast_to(jnp.asarray(x, run.x.dtype), run.x.shape)
    momentum = t.run_on(setting, pair.sparse, run.x, momentum=0.5)
    right = t.follow(setting, run, dense.z)

    def control(name: str, other: Trajectory, breaks: str, step: float = setting.step) -> None:
        check.control(name, identity(name, account(dense, other, step)), breaks=breaks)

    for name, other, breaks in (
        ("kernel of the unmasked Jacobian", Run(trainings.unmasked(run.path), run.x),
         "masked Jacobian"),
        ("attack left out of the sparse network", Run(run.path, clean), "own points"),
        ("momentum in place of gradient descent", momentum, "gradient descent"),
    ):  # fmt: skip
        control(name, t.follow(setting, other, dense.z), breaks)
    halved = right._replace(kernels=right.kernels / 2)
    control("kernel of the sparse network halved", halved, FORMULA)
    control("1/N missing", right, FORMULA, setting.step * t.n)


def jumps(params: Any, x: Any) -> jax.Array:
    """A network of one hidden layer in NTK parametrisation whose activation u + sign(u) jumps."""
    first, last = params["dense1"], params["dense2"]
    h = x.reshape(len(x), -1)
    h = h @ first["kernel"] / np.sqrt(h.shape[1]) + first["bias"]
    h += jnp.sign(h)
    return h @ last["kernel"] / np.sqrt(h.shape[1]) + last["bias"]


def check(context: Context) -> Outcome:
    """The identity on recorded trainings, and the order of its remainder."""
    t = trainings.of(context)
    wanted = context.pick(trainings.REDUCED, trainings.IDENTITY, trainings.ALL)
    check = Recorder(STATEMENT)
    pairs, skipped = t.available(wanted)
    check.skip(*skipped)
    lines: list[Line] = []
    for i, pair in enumerate(pairs):
        dense, sparse = t.trajectories(pair)
        found = account(dense, sparse, pair.setting.step)
        check.case(identity(pair.label, found))
        check.close(f"{pair.label}: library", found.library, found.wanted, tolerance=TOLERANCE)
        lines.append(Line(pair.label, np.arange(1, t.steps + 1), found.errors))
        if i == 0:
            broken(check, t, pair, dense)
        context.progress(0.7 * (i + 1) / len(pairs))
    lines.append(Line("allowed", [1, t.steps], [TOLERANCE] * 2, "bound"))

    seeds, first, sizes = context.pick((5, 8, 4), (5, 20, 4), (10, 20, 5))
    counts = [first * 2**i for i in range(sizes)]
    sums: list[Line] = []
    for i, setting in enumerate(context.pick([MLP_CE], [MLP_CE], [MLP_CE, MLP_SQUARED])):
        time = setting.step * first / 2
        steps, rest, whole = remainders(t, setting, context.rng(i), seeds, time, counts)
        name = f"{setting.label}: Σ‖ρ_k‖ within t = {time:g}"
        check.case(order(name, steps, rest))
        case = order("Σ‖D_{k+1} − D_k‖", steps, whole)
        check.control("ρ without its first-order term", case, breaks=FORMULA)
        if i == 0:
            small = t if t.size == "reduced" else trainings.Trainings("reduced", t.seed, 8, 6)
            arguments = (small, setting, context.rng(i), seeds, time, counts)
            case = order("Σ‖ρ_k‖", *remainders(*arguments, jumps)[:2])
            check.control("an activation that jumps", case, breaks="smooth")
        mean = rest.mean(0)
        sums += [
            Line(setting.label, steps, mean),
            Line(f"slope 1 ({setting.label})", steps, mean[0] * steps / steps[0], "reference"),
        ]
    labels = ("step size η", "Σ‖ρ_k‖ at fixed time, logits")
    check.panel(
        Panel("Identity of the gap", "step k", "part of the change left over", lines),
        Panel("Order of the remainder", *labels, sums, xscale="log"),
    )
    return check.outcome()
