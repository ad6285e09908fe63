"""P4: a small gap between two networks over the threat sets keeps their adversarial risks close.

Let z maximise ℓ(f_d) over B(x). Then ℓ(f_d(z)) ≤ ℓ(f_s(z)) + L‖D(z)‖ ≤ max ℓ(f_s) + L sup‖D‖, and
the same with both networks exchanged, so for each image the two maxima differ by at most
sup_z |ℓ(f_d(z)) − ℓ(f_s(z))| ≤ L sup_z ‖D(z)‖. The constant of the cross-entropy is that of its
gradient, ‖softmax(f) − e_y‖² = (1 − p_y)² + Σ_{c≠y} p_c² ≤ 2(1 − p_y)², attained in the limit
p_c → 1 of one wrong class; that of the logistic loss is sup |σ| = 1.

What an attack can say: it bounds each R_adv from below, and the difference of two such bounds is no
bound of the difference, so that |R̲_d − R̲_s| is an estimate. Rigorous from below are
max(R̲_d − R̄_s, R̲_s − R̄_d, 0), with R̄ certified by intervals, and the middle quantity
mean sup |ℓ(f_d(z)) − ℓ(f_s(z))| ≥ |R_d − R_s|, by an attack on that difference. All are reported.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
from flax import nnx
from numpy.typing import NDArray

from ntk_awt import data, masks, models, tickets, training
from ntk_awt.app.config import DataConfig, ModelConfig, TicketConfig, TrainConfig
from ntk_awt.attacks import PGD, example_keys
from ntk_awt.network import Network
from ntk_awt.robustness.certified import intervals
from ntk_awt.threats import L2, Linf, Threat
from ntk_awt.types import ApplyFn, Images, Key, Labels, Params
from proofs_check.core import (
    FORMULA,
    Case,
    Context,
    Line,
    Outcome,
    Panel,
    Recorder,
    Statement,
    below,
    close,
)
from proofs_check.instances.networks import untrained
from proofs_check.instances.trainings import QUICKLY

STATEMENT = Statement(
    number="P4",
    title="robustness is preserved",
    claim=(
        "Two networks whose outputs stay close over the threat sets have adversarial risks that "
        "stay close."
    ),
    formula=(
        "|R_adv(f^d) − R_adv(f^s)| ≤ L_ℓ · mean_i sup_{z∈B(x_i)} ‖D(z)‖₂, D = f^d − f^s, "
        "L_ℓ = √2 (cross-entropy), 1 (binary logistic)"
    ),
    hypotheses={
        "Lipschitz loss": "the loss is L_ℓ-Lipschitz in the 2-norm of the logits",
        "threat set": "the supremum is over the threat set of the risks, not the clean images",
        "outer bound": "the sup is bounded from above: intervals of a set that contains B(x)",
    },
    instances=(
        "random logistic and softmax models in closed form (L∞, L2), networks of two inputs with "
        "both sides rigorous, adversarially trained MLP and CNN on digits, dense against random, "
        "magnitude and NTK-close masks, with 100,000 samples of the largest threat sets"
    ),
    rule="no violation; every visited point of a threat set lies inside the intervals",
    tolerance=(
        "1e-9 relative for float64 rounding of both sides (the intervals themselves are rounded "
        "outwards); 1e-12 where the library meets a closed form, 1e-10 where it meets NumPy's "
        "intervals, which its outward rounding widens by some 1e-14 of each layer's sums"
    ),
    source="theory P4; Shi et al. (2022) for the idea; Gowal et al. (2018) for the intervals",
)

Array = NDArray[np.float64]

ROOT2 = np.sqrt(2.0)
EVERYWHERE = (-np.inf, np.inf)
"""The pixel box of the closed forms: none."""


def _contained(name: str, values: Array, bounds: intervals.Bounds, size: float) -> Case:
    """values [n, points, c] inside the bounds: the distance from their middle is half the width.

    The values are computed from numbers of that size, so that they are off by some 1e-16 of it
    (D of two saturated units is nothing else): 1e-14 of it is taken off the distance. Constants,
    such as units that are never active, are left out where their bounds are exact.
    """
    lower, upper = map(np.asarray, bounds)
    distance, half = np.abs(values - (lower + upper)[:, None] / 2).max(1), (upper - lower) / 2
    distance = np.maximum(distance - 1e-14 * size, 0)
    varied = (distance > 0) | (half > 0)
    return below(name, distance[varied], half[varied])


def _untight(case: Case) -> Case:
    """A comparison that says nothing of how tight the statement's bound is."""
    return case._replace(tightness=None)


# ---------------------------------------------------------------- linear models, in closed form

RADII = (0.0, 0.05, 0.3, 1.0)
BALLS: dict[str, Callable[..., Any]] = {"L∞": Linf, "L2": L2}
DUAL = {"L∞": 1, "L2": 2}
"""q of the dual norm: max over the ball of ⟨w, v⟩ is ε‖w‖_q."""


class Linear(NamedTuple):
    """Pairs of affine models on the same points: f = xᵀw + b.

    Attributes:
        x: [n, d], points.
        labels: [pairs, n], classes 0 … c − 1 (c logits), or signs (one logit).
        w, b: [2, pairs, d, c] and [2, pairs, c], of both networks.
    """

    x: Array
    labels: NDArray[np.int64]
    w: Array
    b: Array

    def logits(self) -> Array:
        """[2, pairs, n, c], at the points."""
        return np.einsum("nd,kpdc->kpnc", self.x, self.w) + self.b[:, :, None]


def _affine(weights: Params, x: Images) -> Any:
    return x @ weights["w"] + weights["b"]


def _pairs(rng: np.random.Generator, x: Array, classes: int, pairs: int) -> Linear:
    """Independent and close pairs in equal parts; of each, some with equal logits on point 0."""
    shape = (2, pairs, x.shape[1], classes)
    w, b = rng.standard_normal(shape), rng.standard_normal((2, pairs, classes))
    half, quarter = pairs // 2, pairs // 4
    w[1, :half] = w[0, :half] + 0.1 * w[1, :half]
    b[1, :half] = b[0, :half] + 0.1 * b[1, :half]
    equal = np.r_[:quarter, half : half + quarter]
    b[1, equal] = b[0, equal] + np.einsum("d,pdc->pc", x[0], (w[0] - w[1])[equal])
    labels = rng.integers(0, max(classes, 2), (pairs, len(x)))
    return Linear(x, labels if classes > 1 else 2 * labels - 1, w, b)


def _library_gaps(models: Sequence[Linear], ball: str, epsilon: float) -> list[tuple[Array, Array]]:
    """Centre and radius of D's bounds, [pairs, n, c] of each; all are one network's logits."""
    first, second = (
        {
            "w": np.concatenate([np.hstack(list(model.w[k])) for model in models], axis=1),
            "b": np.concatenate([model.b[k].ravel() for model in models]),
        }
        for k in (0, 1)
    )
    x = models[0].x
    threat = BALLS[ball](np.asarray(epsilon), EVERYWHERE)
    lower, upper = map(np.asarray, intervals.gap_bounds(_affine, first, second, x, threat))
    found, start = [], 0
    for model in models:
        columns = slice(start, start := start + model.b[0].size)
        shape = (len(x), *model.b[0].shape)
        low, high = (np.moveaxis(a[:, columns].reshape(shape), 1, 0) for a in (lower, upper))
        found.append(((low + high) / 2, (high - low) / 2))
    return found


def _logistic_sides(model: Linear, ball: str, epsilon: float) -> tuple[Array, Array]:
    """|R_adv(f_d) − R_adv(f_s)| and mean sup |D|, [pairs], of logistic models."""
    logits, lengths = model.logits()[..., 0], np.linalg.norm(model.w[..., 0], DUAL[ball], axis=-1)
    losses = np.logaddexp(0.0, epsilon * lengths[:, :, None] - model.labels * logits)
    slope = np.linalg.norm(model.w[0, ..., 0] - model.w[1, ..., 0], DUAL[ball], axis=-1)
    sup = np.abs(logits[0] - logits[1]) + epsilon * slope[:, None]
    risks = losses.mean(-1)
    return np.abs(risks[0] - risks[1]), sup.mean(-1)


def _vertex_sides(model: Linear, epsilon: float) -> tuple[Array, Array]:
    """The same of softmax models in L∞ balls, [pairs] and sup ‖D‖ [pairs, n].

    ℓ(f(z)) and ‖D(z)‖ are convex in z, so their maxima over a cube are at its vertices.
    """
    d = model.x.shape[1]
    signs = 2.0 * (np.arange(2**d)[:, None] >> np.arange(d) & 1) - 1
    moves = np.einsum("vd,kpdc->kpvc", epsilon * signs, model.w)
    logits = model.logits()[:, :, :, None] + moves[:, :, None]  # [2, pairs, n, vertices, c]
    index = model.labels[None, :, :, None, None]
    own = np.take_along_axis(logits, np.broadcast_to(index, (*logits.shape[:-1], 1)), -1)[..., 0]
    risks = (np.logaddexp.reduce(logits, axis=-1) - own).max(-1).mean(-1)
    sup = np.linalg.norm(logits[0] - logits[1], axis=-1).max(-1)
    return np.abs(risks[0] - risks[1]), sup


def _two_class_risks(model: Linear, ball: str, epsilon: float) -> Array:
    """|R_adv(f_d) − R_adv(f_s)| of two-class softmax models: logistic in f_y − f_other."""
    w = (model.w[..., 1] - model.w[..., 0])[..., None]
    b = (model.b[..., 1] - model.b[..., 0])[..., None]
    return _logistic_sides(Linear(model.x, 2 * model.labels - 1, w, b), ball, epsilon)[0]


def _attaining(classes: int) -> Linear:
    """Confidently wrong models whose gap has the sign of the wrong class: bound/actual → 1."""
    x, w, b = np.zeros((1, 2)), np.array([1.0, -2.0]), 60.0
    sides = np.array([1.0]) if classes == 1 else np.array([1.0, -1.0])
    pair = np.stack([w, 1.5 * w])
    labels = np.array([[-1 if classes == 1 else 1]])
    return Linear(
        x,
        labels,
        pair[:, None, :, None] * sides,
        np.array([b, 1.25 * b])[:, None, None] * sides,
    )


def _norms(gap: tuple[Array, Array]) -> Array:
    """The largest ‖D‖ in a box of that centre and radius, [...]."""
    centre, radius = gap
    return np.linalg.norm(np.abs(centre) + radius, axis=-1)


def _linear(check: Recorder, context: Context) -> None:
    pairs, rng = context.pick(200, 400, 4000), context.rng(1)
    x = rng.uniform(-1, 1, (4, 6))
    logistic, softmax, two = (_pairs(rng, x, classes, pairs) for classes in (1, 3, 2))
    library = {
        ball: [_library_gaps((logistic, softmax, two), ball, e) for e in RADII] for ball in BALLS
    }
    values = logistic.logits()[..., 0]
    gap, turn = values[0] - values[1], logistic.w[0, ..., 0] - logistic.w[1, ..., 0]
    lefts, rights, reaches = [], [], []
    for ball in BALLS:
        sides = [_logistic_sides(logistic, ball, e) for e in RADII]
        left, right = (np.array(side) for side in zip(*sides, strict=True))
        lefts.append(left)
        rights.append(right)
        lengths = np.linalg.norm(turn, DUAL[ball], axis=-1)[:, None]
        reach = np.array([e * lengths + 0 * gap for e in RADII])
        found = [np.stack(bounds[0])[..., 0] for bounds in library[ball]]
        reaches.append((reach[-1], found[-2][1]))
        check.below(f"logistic models, {ball}: exact on both sides", left, right)
        name, expected = f"library bounds of D on linear models, {ball}", [[gap, r] for r in reach]
        check.close(name, found, expected, tolerance=1e-12)
        check.below(
            f"two-class softmax models, {ball}: exact left side, library bound",
            [_two_class_risks(two, ball, e) for e in RADII],
            [ROOT2 * _norms(bounds[2]).mean(-1) for bounds in library[ball]],
        )
    exact = [_vertex_sides(softmax, e) for e in RADII]
    left, sup = (np.array(side) for side in zip(*exact, strict=True))
    wrong, confident = _attaining(1), _attaining(2)
    attained = [_logistic_sides(wrong, ball, 0.3) for ball in BALLS]
    attained_two, sup_two = _vertex_sides(confident, 0.3)
    check.below("softmax models, L∞: exact on both sides", left, ROOT2 * sup.mean(-1))
    widest = [_norms(bounds[1]) for bounds in library["L∞"]]
    check.below("softmax models, L∞: exact sup ‖D‖ below the library's", sup, widest)
    check.close(
        "the constants are the least possible: an instance attains the bound",
        [*(a for a, _ in attained), attained_two],
        [*(b for _, b in attained), ROOT2 * sup_two.mean(-1)],
        tolerance=1e-9,
    )
    check.case(_bound_case(logistic))
    name, case = "Lipschitz constant 1 in place of √2, cross-entropy", "attaining instance"
    check.control(name, below(case, attained_two, sup_two.mean(-1)), breaks="Lipschitz loss")
    name, (actual, bound) = "Lipschitz constant 1/√2 in place of 1, logistic loss", attained[0]
    check.control(name, below(case, actual, bound / ROOT2), breaks="Lipschitz loss")
    broken = below("logistic models", lefts, np.abs(gap).mean(-1))
    name = "gap at the clean images in place of its supremum"
    check.control(name, broken, breaks="threat set")
    broken = below("linear models", *zip(*reaches, strict=True))
    name = "threat set larger than the propagated one (ε 1 and 0.3)"
    check.control(name, broken, breaks="outer bound")
    check.control(
        "an operation without a rule",
        lambda: intervals.output_bounds(
            lambda w, z: jnp.sin(z @ w), np.ones((1, 1)), np.zeros((1, 1)), Linf(0.1)
        ),
        breaks="outer bound",
    )
    share = np.linspace(0, 1, 41)[1:-1]
    ratios = [
        right[1:] / np.maximum(left[1:], 1e-300) for left, right in zip(lefts, rights, strict=True)
    ]
    check.panel(
        Panel(
            "Logistic models, exact: how loose the bound is",
            "share of the instances",
            "bound / actual difference of the adversarial risks",
            [
                *(
                    Line(b, share, np.quantile(r, share))
                    for b, r in zip(BALLS, ratios, strict=True)
                ),
                Line("attained", [0, 1], [1, 1], "reference"),
            ],
        )
    )


def _bound_case(model: Linear) -> Case:
    """The library's bound of one pair at a time."""
    threat, found = L2(np.asarray(0.3), EVERYWHERE), []
    for i in range(8):
        first, second = ({"w": model.w[k, i], "b": model.b[k, i]} for k in (0, 1))
        bound = intervals.robustness_gap_bound(
            _affine, first, second, model.x, threat, loss="logistic"
        )
        found.append(float(bound))
    expected = _logistic_sides(model, "L2", 0.3)[1][:8]
    name = "library bound of the risks' difference, logistic models, L2"
    return close(name, found, expected, tolerance=1e-12)


# ---------------------------------------------------------------- one unit of each activation

ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "tanh": (jnp.tanh, np.tanh),
    "erf": (jax.scipy.special.erf, scipy.special.erf),
    "logistic": (jax.nn.sigmoid, scipy.special.expit),
    "gelu": (partial(jax.nn.gelu, approximate=False), lambda x: x * scipy.special.ndtr(x)),
}
"""In JAX for the library, and in NumPy."""


def _units(weights: Params, x: Images) -> Any:
    h = _affine(weights, x)
    return jnp.concatenate([function(h) for function, _ in ACTIVATIONS.values()], axis=1)


def _activations(check: Recorder, context: Context) -> None:
    """Units of one input: there the bounds of an activation can be seen without those of sums.

    In a third of the units only the biases differ, so that D is a constant before the activation;
    in another third the second unit is near the first.
    """
    rng, units = context.rng(7), context.pick(300, 1000, 10_000)
    w, b = 3 * rng.standard_normal((2, 1, units)), rng.standard_normal((2, units))
    third = units // 3
    w[1, :, :third] = w[0, :, :third]
    w[1, :, third : 2 * third] = 1.1 * w[0, :, third : 2 * third]
    b[1, : 2 * third] = b[0, : 2 * third] + 0.1 * b[1, : 2 * third]
    x, epsilon = np.array([[0.25], [0.5]]), 0.25
    pair = [{"w": w[k], "b": b[k]} for k in (0, 1)]
    points = x[:, :, None] + epsilon * np.linspace(-1, 1, 401)[:, None]  # [n, points, 1]
    hidden = [points @ weights["w"] + weights["b"] for weights in pair]
    values = [np.concatenate([f(h) for _, f in ACTIVATIONS.values()], -1) for h in hidden]
    threat = Linf(np.asarray(epsilon))
    gap = intervals.gap_bounds(_units, pair[0], pair[1], x, threat)
    logits = intervals.output_bounds(_units, pair[0], x, threat)
    half = Linf(np.asarray(epsilon / 2))
    smaller = intervals.gap_bounds(_units, pair[0], pair[1], x, half)
    names, size = ", ".join(ACTIVATIONS), float(np.abs(values).max())
    difference = values[0] - values[1]
    check.case(
        _contained(f"units of {names}: D inside its bounds", difference, gap, size),
        _contained(f"units of {names}: values inside theirs", values[0], logits, size),
    )
    case = _contained("D", difference, smaller, size)
    check.control("units: intervals of half the radius", case, breaks="outer bound")


# ---------------------------------------------------------------- two inputs, subdivided


CHUNK = 2048
"""Squares that are bounded at once: one shape, one compilation."""


def _tanh_mlp(weights: Params, x: Any) -> Any:
    *hidden, last = weights
    for layer in hidden:
        x = jnp.tanh(_affine(layer, x))
    return _affine(last, x)


_tanh_logits = jax.jit(_tanh_mlp)


def _certified(weights: Params, threat: Threat, z: Array, y: Any) -> Any:
    return intervals.loss_bounds(_tanh_mlp, weights, z, y, threat).upper


def _gap(first: Params, second: Params, threat: Threat, z: Array) -> Any:
    return intervals.sup_gap(_tanh_mlp, first, second, z, threat)


def _in_chunks(bound: Callable[..., Any], *arrays: Any) -> Array:
    """A bound [rows] of rows, taken `CHUNK` at a time; the last chunk is filled up."""
    rows = len(arrays[0])
    filled = [np.resize(a, (-(-rows // CHUNK) * CHUNK, *a.shape[1:])) for a in arrays]
    parts = [
        np.asarray(bound(*(a[start : start + CHUNK] for a in filled)))
        for start in range(0, rows, CHUNK)
    ]
    return np.concatenate(parts)[:rows]


def _grid(side: int) -> Array:
    """The middles of side² squares that make up [−1, 1]², [side², 2]."""
    steps = (2 * np.arange(side) + 1 - side) / side
    return np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)


def _subdivided(check: Recorder, context: Context) -> None:
    """Both sides rigorous and close to the truth: each threat square is cut into many.

    The risks from below are maxima over points of a grid; those from above, and sup ‖D‖, are maxima
    of the library's bounds over the squares.
    """
    rng, n, epsilon = context.rng(2), 8, 0.15
    networks = context.pick(2, 4, 8)
    sides = context.pick((1, 4, 16), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64))
    x, y = rng.uniform(epsilon, 1 - epsilon, (n, 2)), rng.integers(0, 3, n)

    def draw(scale: float) -> list[dict[str, Array]]:
        return [
            {"w": scale * rng.normal(size=shape), "b": scale * rng.normal(size=shape[1])}
            for shape in ((2, 12), (12, 3))
        ]

    def squares(side: int) -> Array:
        """Their middles, the squares of one image after the other, [n·side², 2]."""
        return (x[:, None] + epsilon * _grid(side)).reshape(-1, 2)

    def risk(losses: Array) -> float:
        """Mean over the images of the largest loss."""
        return float(losses.reshape(n, -1).max(1).mean())

    left, right = np.zeros((2, networks, len(sides)))
    for k in range(networks):
        first = draw(1.5)
        second = jax.tree.map(np.add, first, draw(0.6))
        points = squares(64)
        labels = np.repeat(y, 64**2)
        lows = []
        for weights in (first, second):
            logits = np.asarray(_tanh_logits(weights, points))
            own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
            lows.append(risk(np.logaddexp.reduce(logits, axis=1) - own))
        for j, side in enumerate(sides):
            threat = Linf(np.asarray(epsilon / side * (1 + 1e-9)))
            centres, labels = squares(side), np.repeat(y, side**2)
            highs = [
                risk(_in_chunks(partial(_certified, weights, threat), centres, labels))
                for weights in (first, second)
            ]
            sup = _in_chunks(partial(_gap, first, second, threat), centres)
            left[k, j] = max(lows[0] - highs[1], lows[1] - highs[0], 0.0)
            right[k, j] = ROOT2 * risk(sup)
    check.below("two inputs, subdivided: both sides rigorous", left[:, -1], right[:, -1])
    check.case(
        _untight(below("two inputs: a difference of the risks is proved", 0.01, left[:, -1].max())),
        _untight(
            below("two inputs: cutting the set does not loosen it", right[:, 1:], right[:, :-1])
        ),
    )
    check.panel(
        Panel(
            "Networks of two inputs: both sides rigorous (first pair)",
            "squares a side of the threat set",
            "difference of the adversarial risks / nats",
            [
                Line("from below", sides, np.where(left[0] > 0, left[0], np.nan)),
                Line("bound", sides, right[0], "bound"),
            ],
            xscale="log",
        )
    )


# ---------------------------------------------------------------- trained networks


TRAINED_AT = 0.03
"""ε of the adversarial training."""

NEAR = "NTK-close"


class Trained(NamedTuple):
    """A dense network and sparse ones, after adversarial training; effective weights, float64."""

    network: Network
    dense: Params
    sparse: dict[str, Params]


def _cnn(key: Key) -> Network:
    module = models.Classifier(
        (8, 8, 1), 10, ModelConfig(), blocks=((4,),), hidden=(16,), rngs=nnx.Rngs(params=key)
    )
    return Network.from_nnx(module)


def _drawn(rng: np.random.Generator, make: Callable[[Key], Network]) -> Network:
    """A network in standard parametrisation with weights N(0, 2/fan-in) and no biases."""
    network = untrained(make)

    def leaf(w: Any) -> Any:
        spread = np.sqrt(2 / np.prod(w.shape[:-1])) if w.ndim > 1 else 0.0
        return (spread * rng.standard_normal(w.shape)).astype(np.float32)

    return Network(network.apply, jax.tree.map(leaf, network.params))


def _sparse(name: str, rng: np.random.Generator, params: Params) -> masks.Ticket:
    """A ticket of density ½ by random scores or magnitude, with the energy-preserving gain."""
    scores = jax.tree.map(lambda w: rng.random(w.shape) if name == "random" else np.abs(w), params)
    counts = masks.allocate(scores, 0.5, "uniform")
    mask = jax.tree.map(lambda score, k: score >= np.sort(score.ravel())[-k], scores, counts)
    gain = jax.tree.map(
        lambda w, m: np.float32(np.linalg.norm(w) / np.linalg.norm(w * m) if w.any() else 1),
        params,
        mask,
    )
    return masks.Ticket(jax.tree.map(np.multiply, params, mask), mask, gain)


@partial(jax.jit, static_argnames=("apply", "config"), compiler_options=QUICKLY)
def _near(
    apply: ApplyFn,
    params: Params,
    start: masks.Ticket,
    x: Images,
    y: Labels,
    key: Key,
    config: TicketConfig,
) -> masks.Ticket:
    """A ticket whose kernel and outputs are near the dense network's on one adversarial batch."""
    attack = PGD(steps=2, random_start=False)
    target = tickets.target_of(
        apply, params, x, y, threat=Linf(TRAINED_AT), attack=attack, key=key, config=config
    )
    return tickets.solve(apply, params, start, target, key, config)


def _train(
    context: Context, network: Network, digits: data.Dataset, names: tuple[str, ...]
) -> Trained:
    """Dense and sparse networks, untrained or trained with the same key, so on the same batches."""
    params, keys = network.params, jax.random.split(jax.random.key(context.seed))
    unit = jax.tree.map(lambda w: np.float32(1), params)
    start = {"dense": masks.Ticket(params, jax.tree.map(lambda w: w == w, params), unit)}
    for name in names:
        start[name] = _sparse(name, context.rng(4), params)
        if name == NEAR:
            search = TicketConfig(
                ticket_steps=context.pick(1, 100, 300), inputs="dense", attack_labels="true"
            )
            batch = (digits.x_train[:16], digits.y_train[:16])
            start[name] = _near(network.apply, params, start[name], *batch, keys[0], search)
    epochs = context.pick(0, 6, 20)
    weights = {}
    for name, ticket in start.items():
        found = ticket
        if epochs:
            found = training.fit(
                network.apply,
                ticket,
                digits.x_train,
                digits.y_train,
                config=TrainConfig(epochs=epochs, batch_size=32, learning_rate=5e-3),
                threat=Linf(TRAINED_AT),
                attack=PGD(steps=3, random_start=False),
                key=keys[1],
            )
        host = jax.tree.map(partial(np.asarray, dtype=np.float64), tuple(found))
        weights[name] = masks.effective(*host)
    return Trained(network, weights.pop("dense"), weights)


@partial(jax.jit, static_argnames="apply")
def _features(apply: ApplyFn, first: Params, second: Params, z: Images, y: Any) -> jax.Array:
    """At each image: both losses, ‖D‖, D and the first network's logits, [n, 3 + 2c]."""
    a, b = apply(first, z), apply(second, z)
    losses = [optax.softmax_cross_entropy_with_integer_labels(logits, y) for logits in (a, b)]
    norms = jnp.sqrt(jnp.sum((a - b) ** 2, axis=1) + 1e-300)  # its gradient at 0 is finite
    return jnp.concatenate([jnp.stack([*losses, norms], axis=1), a - b, a], axis=1)


@partial(jax.jit, static_argnames=("apply", "steps"))
def _attacked(
    apply: ApplyFn,
    first: Params,
    second: Params,
    x: Images,
    y: Any,
    threat: Threat,
    key: Key,
    steps: int,
) -> jax.Array:
    """The features [targets, n, 3 + 2c] where PGD ends that maximises each of these targets.

    Both losses, their difference and its negative, ‖D‖, and each D_c and logit and its negative.
    """
    columns = 3 + 2 * jax.eval_shape(apply, first, x).shape[1]
    unit = jnp.eye(columns)
    difference = unit[0] - unit[1]
    targets = jnp.stack([*unit, *-unit[3:], difference, -difference])
    keys = example_keys(key, jnp.arange(x.shape[0]))

    def one(target: jax.Array) -> jax.Array:
        def loss(z: Images) -> jax.Array:
            return _features(apply, first, second, z, y) @ target

        z, _ = PGD(steps=steps, random_start=False).run(loss, x, threat, keys)
        return _features(apply, first, second, z, y)

    return jax.lax.map(one, targets)


def _sampled(rng: np.random.Generator, x: Array, threat: Threat, count: int) -> Array:
    """Points of one image's threat set: inside, on the sphere, and vertices of the cube."""
    shape = (count, x.size)
    epsilon = float(threat.epsilon)
    if isinstance(threat, Linf):
        inside, vertices = rng.uniform(-1, 1, shape), rng.choice([-1.0, 1.0], shape)
        v = epsilon * np.where(rng.random((count, 1)) < 0.5, inside, vertices)
    else:
        v = rng.standard_normal(shape) * (rng.random(shape) < rng.random((count, 1)))
        lengths = np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300)
        v *= epsilon * np.maximum(rng.random((count, 1)), rng.random((count, 1)) < 0.5) / lengths
    return np.clip(x.ravel() + v, *threat.bounds).reshape(count, *x.shape)


class Measured(NamedTuple):
    """One pair of networks at one radius: risks in nats, and per image what was visited.

    Attributes:
        visited: features at all visited points, [n, points, 3 + 2c].
        bound: L_ℓ·mean sup ‖D‖.
        plain: the same of the difference of both networks' intervals.
        sup: bound of sup ‖D‖, [n].
        gap, logits: bounds of D and of the dense network's logits, [n, c].
        certified: R̄ of both networks.
    """

    visited: Array
    bound: float
    plain: float
    sup: Array
    gap: intervals.Bounds
    logits: intervals.Bounds
    certified: tuple[float, float]

    @property
    def reached(self) -> tuple[float, float]:
        """R̲ of both networks: the mean of the highest losses visited."""
        highest = self.visited[:, :, :2].max(1).mean(0)
        return float(highest[0]), float(highest[1])

    @property
    def estimate(self) -> float:
        """|R̲_d − R̲_s|, no bound."""
        first, second = self.reached
        return abs(first - second)

    @property
    def proved(self) -> float:
        """A lower bound of |R_d − R_s|."""
        (low_a, low_b), (high_a, high_b) = self.reached, self.certified
        return max(low_a - high_b, low_b - high_a, 0.0)

    @property
    def middle(self) -> float:
        """A lower bound of mean sup |ℓ(f_d(z)) − ℓ(f_s(z))|."""
        return float(np.abs(self.visited[:, :, 0] - self.visited[:, :, 1]).max(1).mean())


def _measure(
    apply: ApplyFn,
    dense: Params,
    sparse: Params,
    x: Array,
    y: Any,
    threat: Threat,
    context: Context,
    samples: int,
) -> Measured:
    both = (apply, dense, sparse)
    steps = context.pick(8, 15, 40)
    key = jax.random.key(context.seed + 1)
    visited = np.moveaxis(np.asarray(_attacked(*both, x, y, threat, key, steps)), 0, 1)
    if samples:
        rng, each = context.rng(3), samples // len(x)
        found = [
            np.asarray(_features(*both, _sampled(rng, z, threat, each), np.full(each, label)))
            for z, label in zip(x, np.asarray(y), strict=True)
        ]
        visited = np.concatenate([visited, np.stack(found)], axis=1)
    own, others = (intervals.output_bounds(apply, w, x, threat) for w in (dense, sparse))
    certified = [
        float(np.mean(intervals.loss_bounds(apply, w, x, y, threat).upper)) for w in (dense, sparse)
    ]
    plain = np.maximum(np.abs(own.upper - others.lower), np.abs(own.lower - others.upper))
    return Measured(
        visited,
        float(intervals.robustness_gap_bound(*both, x, threat)),
        float(ROOT2 * np.linalg.norm(plain, axis=1).mean()),
        np.asarray(intervals.sup_gap(*both, x, threat)),
        intervals.gap_bounds(*both, x, threat),
        own,
        (certified[0], certified[1]),
    )


def _numpy_bounds(weights: Params, x: Array, epsilon: float, *, split: bool) -> intervals.Bounds:
    """Intervals of a ReLU MLP in the pixel box [0, 1]: lower·W⁺ + upper·W⁻, or wrongly lower·W."""
    flat = x.reshape(len(x), -1)
    lower, upper = np.clip(flat - epsilon, 0, 1), np.clip(flat + epsilon, 0, 1)
    layers = [weights[name] for name in sorted(weights)]
    for number, layer in enumerate(layers):
        w, b = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
        up, down = (np.maximum(w, 0), np.minimum(w, 0)) if split else (w, 0 * w)
        lower, upper = lower @ up + upper @ down + b, upper @ up + lower @ down + b
        if number < len(layers) - 1:
            lower, upper = np.maximum(lower, 0), np.maximum(upper, 0)
    return intervals.Bounds(lower, upper)  # type: ignore[arg-type]


def _network(
    check: Recorder,
    name: str,
    trained: Trained,
    images: tuple[Array, Any],
    ball: str,
    radii: tuple[float, ...],
    context: Context,
) -> None:
    x, y = images
    apply, dense = trained.network.apply, trained.dense
    samples = context.pick(4000, 100_000, 1_000_000) // len(trained.sparse)
    found = {
        kind: [
            _measure(
                apply, dense, sparse, x, y, BALLS[ball](radius), context,
                samples if radius == radii[-1] else 0,
            )
            for radius in radii
        ]
        for kind, sparse in trained.sparse.items()
    }  # fmt: skip
    all_found = [m for row in found.values() for m in row]
    bounds = [m.bound for m in all_found]
    classes = all_found[0].gap.lower.shape[1]
    largest = [row[-1] for row in found.values()]
    where = f"{name}, {ball}"
    for what, lower in {
        "mean sup |ℓ(f_d) − ℓ(f_s)| from below, by attack (rigorous)": "middle",
        "|R_d − R_s| from below, by attack and certificate (rigorous)": "proved",
        "|R_d − R_s| with both risks by attack (an estimate)": "estimate",
    }.items():
        check.below(f"{where}: {what}", [getattr(m, lower) for m in all_found], bounds)
    what = f"{where}: the pair's bound is not above that of two separate intervals"
    check.case(_untight(below(what, bounds, [m.plain for m in all_found])))
    what, sups = f"{where}: the library's bound is √2·mean sup ‖D‖", [m.sup for m in all_found]
    check.close(what, bounds, [ROOT2 * sup.mean() for sup in sups], tolerance=1e-12)
    check.below(
        f"{where}: ‖D‖ at {samples} samples and at attacks, below its bound",
        [m.visited[:, :, 2].max(1) for m in largest],
        [m.sup for m in largest],
    )
    start = 3 + classes
    size = max(float(np.abs(m.visited[..., start:]).max()) for m in largest)
    for m, kind in zip(largest, found, strict=True):
        gaps, values = m.visited[..., 3:start], m.visited[..., start:]
        check.case(
            _contained(f"{where}, {kind}: D inside its bounds", gaps, m.gap, size),
            _contained(f"{where}, {kind}: logits inside theirs", values, m.logits, size),
        )
    first = next(iter(found.values()))
    values = first[-1].visited[..., start:]
    what = f"{where}: intervals of ε {radii[0]:g}, points of ε {radii[-1]:g}"
    case = _contained("logits", values, first[0].logits, size)
    check.control(what, case, breaks="outer bound")
    check.panel(
        Panel(
            f"{where}: dense against sparse",
            "radius ε of the threat set / pixel range",
            "difference of the adversarial risks / nats",
            [
                line
                for kind, row in found.items()
                for line in (
                    Line(f"{kind}: bound", radii, [m.bound for m in row], "bound"),
                    Line(f"{kind}: mean sup |ℓ − ℓ'|", radii, [m.middle for m in row]),
                    Line(f"{kind}: |R − R'| by attack", radii, [m.estimate for m in row]),
                )
            ],
        )
    )
    if name == "MLP" and ball == "L∞":
        epsilon = float(np.float32(radii[-1]))
        expected, wrong = (_numpy_bounds(dense, x, epsilon, split=s) for s in (True, False))
        own = np.stack(first[-1].logits)
        what = "MLP: the library's intervals against NumPy"
        check.close(what, own, np.stack(expected), tolerance=1e-10)
        case = _contained("logits", values, wrong, size)
        check.control("W·[lower, upper] without a split by sign", case, breaks=FORMULA)


def check(context: Context) -> Outcome:
    """Exact on linear models, rigorous on networks of two inputs and on trained ones."""
    check = Recorder(STATEMENT)
    for part in (_linear, _activations, _subdivided):
        part(check, context)
    context.progress(0.2)
    digits = data.load(DataConfig("digits", train_size=512), seed=context.seed)
    count = context.pick(6, 16, 64)
    images = (digits.x_test[:count].astype(np.float64), digits.y_test[:count])
    widths = context.pick((16,), (32, 16), (32, 16))
    kinds = context.pick(("random", "magnitude"), *[("random", "magnitude", NEAR)] * 2)
    radii = context.pick((0.003, 0.03), (0.003, 0.01, 0.03), (0.003, 0.01, 0.02, 0.03, 0.05))
    build = partial(models.build, ModelConfig(widths=widths), (8, 8, 1), 10)
    mlp = _train(context, _drawn(context.rng(5), build), digits, kinds)
    context.progress(0.4)
    _network(check, "MLP", mlp, images, "L∞", radii, context)
    context.progress(0.6)
    if context.size == "reduced":
        check.skip("training, MLP in L2 balls, CNN: left out at this size")
    else:
        larger = tuple(8 * r for r in radii)
        _network(check, "MLP", mlp, images, "L2", larger, context)
        context.progress(0.8)
        cnn = _train(context, _drawn(context.rng(6), _cnn), digits, ("random", "magnitude"))
        _network(check, "CNN", cnn, images, "L∞", radii, context)
    return check.outcome()
