"""Threat sets, attacks and rules beside closed forms of linear networks.

A linear network x ↦ xW is robust at (x, y) where the margin to every other class exceeds
max ⟨w_k − w_y, v⟩ over the set, which is known (`tests.threat_models.reach`; with a pixel box, for
L∞, it is a sum over the pixels).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import threats
from ntk_awt.app.config import ThreatConfig
from ntk_awt.attacks import APGD, FAB, PGD, NetworkLoss, Square, perturb
from ntk_awt.data import Dataset
from ntk_awt.network import Network
from ntk_awt.robustness import hygiene
from ntk_awt.robustness.accuracy import measure
from ntk_awt.robustness.certified import intervals
from ntk_awt.threats import L2, Linf, StrongL2
from ntk_awt.tickets.objective import attacked_inputs
from ntk_awt.types import Split
from tests import threat_models
from tests.modes import MODES
from tests.situations import Outcome, near, refused, same, situation, warned

INFINITE = (-np.inf, np.inf)


class Problem(NamedTuple):
    """A linear network [16, 3], images [n, 16], and the labels that it gives them, all float64."""

    w: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """w_k − w_y [n, 2, 16] and logit_y − logit_k [n, 2] of the other classes k."""
        others = np.stack([np.delete(np.arange(3), y) for y in self.y])
        away = self.w.T[others] - self.w.T[self.y][:, None]
        return away, -np.einsum("nkd,nd->nk", away, self.x)


@cache
def problem(n: int = 60) -> Problem:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 3)).astype(np.float32)
    x = rng.uniform(0, 1, (n, 16)).astype(np.float32)
    return Problem(w.astype(float), x.astype(float), (x.astype(float) @ w).argmax(1))


def linear(params: Any, x: Any) -> Any:
    return x.reshape(len(x), -1) @ params


def robust(threat: Any, attack: Any, given: Problem, apply: Any = linear, **changes: Any) -> float:
    """The share that an evaluation calls robust."""
    arguments: Any = {
        "params": given.w.astype(np.float32),
        "x": given.x.astype(np.float32),
    } | changes
    network, split = Network(apply, arguments["params"]), Split(arguments["x"], given.y)
    found = measure(network, split, threat, attack, key=jax.random.key(0))
    return found.robust.value


def share(given: Problem, reach: Callable[[np.ndarray], np.ndarray]) -> float:
    """The share that is robust; no margin is so near the reach that rounding decides."""
    away, margins = given.gaps()
    left = margins - np.stack([reach(away[:, k]) for k in range(2)], axis=1)
    assert abs(left).min() > 1e-5
    return float((left > 0).all(1).mean())


def in_ball(name: str, epsilon: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda g: threat_models.reach(name, g, epsilon)


# ---------------------------------------------------------------- boxes that never bind


def strong_targets(steps: int = 20) -> APGD:
    return APGD("targeted-margin", steps=steps)


def _no_box(name: str, bounds: Any, attack: Callable[[], Any], epsilon: float = 0.3) -> Outcome:
    given = problem()
    came = robust(threat_models.make(name, epsilon, 16, bounds), attack(), given)
    return near(came, share(given, in_ball(name, epsilon)))


for _name, _bounds, _attack in [
    ("L2 without a box", INFINITE, strong_targets),
    ("L2 in a box of ±1e6", (-1e6, 1e6), strong_targets),
    ("L2, FAB without a box", INFINITE, lambda: FAB(steps=20)),
    ("L2, FAB in a box of ±1e6", (-1e6, 1e6), lambda: FAB(steps=20)),
]:
    situation(f"threats: {_name}")(partial(_no_box, "l2", _bounds, _attack))
for _name, _attack in (("APGD", strong_targets), ("FAB", lambda: FAB(steps=40))):
    situation(f"threats: strong L2, {_name} without a box")(
        partial(_no_box, "strong-l2", INFINITE, _attack, 0.6)
    )


@situation("threats: L2 far from 0")
def far_from_zero() -> Outcome:
    """The nearest point of the ball to x + v, ‖v‖ = 2ε: half way, but for a spacing a pixel."""
    rng = np.random.default_rng(1)
    x = rng.uniform(1000, 2000, (4, 16)).astype(np.float32)
    z = (x + rng.normal(size=x.shape)).astype(np.float32)
    v = z.astype(float) - x
    threat = L2(0.5, INFINITE)
    wanted = x + 0.5 * v / np.linalg.norm(v, axis=1, keepdims=True)
    came = threat.project(jnp.asarray(z), jnp.asarray(x))
    return near(came, wanted, absolute=float(np.spacing(x.max())))


@situation("threats: pixels that float32 cannot move")
def pixels_too_large() -> Outcome:
    given = problem(4)
    x = given.x.astype(np.float32) + np.float32(1e8)
    return warned(
        lambda: robust(L2(0.3, INFINITE), PGD(steps=1), given, x=x, params=np.eye(16, 3)),
        "epsilon 0.3: 100% of the pixels",
        "scale the images down",
    )


@situation("threats: a signal's limit below the rounding of the images")
def limit_below_rounding() -> Outcome:
    given, basis = problem(4), np.eye(16)[:, :1]
    return warned(
        lambda: robust(StrongL2(0.3, 1e-9, basis), PGD(steps=1), given),
        "delta 1e-09 is below the rounding of the images",
    )


@situation("rules: a large radius in an open box")
def large_radius_of_an_open_box() -> Outcome:
    """Every image allows all others, of other classes: none is robust."""
    given = problem()
    x = given.x.astype(np.float32)
    subject = hygiene.Subject(
        Network(linear, given.w.astype(np.float32)), x, given.y, L2(0.1, (-np.inf, 1.0))
    )
    found = hygiene.large_radius(strong_targets(), subject, jax.random.key(0))
    assert found is not None
    return near(found.value, -np.bincount(given.y).max() / len(given.y))


@situation("rules: a large radius for images of one class")
def large_radius_of_one_class() -> Outcome:
    given = problem()
    one = given.y == given.y[0]
    x, y, w = given.x[one].astype(np.float32), given.y[one], given.w.astype(np.float32)
    subject = hygiene.Subject(Network(linear, w), x, y, Linf(0.1))
    return warned(
        lambda: hygiene.large_radius(PGD(steps=1), subject, jax.random.key(0)),
        "large radius is left out",
        "two classes",
    )


# ---------------------------------------------------------------- radii larger than the box


def _evaluated(threat: Any) -> Callable[[], Any]:
    return lambda: robust(threat, PGD(steps=1), problem(4))


@situation("threats: L∞(8) on images in [0, 1]")
def grey_levels() -> Outcome:
    words = "epsilon 8 is larger than the pixel box", "from 1 on", "8/255", "0.0314"
    return warned(_evaluated(Linf(8)), *words)


@situation("threats: an attack with L∞(8) on images in [0, 1]")
def attack_in_grey_levels() -> Outcome:
    given = problem(4)
    x, y, w = map(jnp.asarray, (given.x.astype(np.float32), given.y, given.w))
    return warned(
        lambda: perturb(PGD(steps=1), Network(linear, w), x, y, Linf(8), jax.random.key(0)), "8/255"
    )


@situation("threats: L∞(8) from settings")
def settings_in_grey_levels() -> Outcome:
    return warned(lambda: threats.build(ThreatConfig(epsilon=8), (0.0, 1.0)), "from 1 on", "8/255")


@situation("threats: L2 beyond the diagonal of the box")
def beyond_the_diagonal() -> Outcome:
    return warned(_evaluated(L2(4.01)), "epsilon 4.01 is larger than the pixel box", "from 4 on")


@situation("threats: strong L2 beyond the diagonal of the box")
def strong_beyond_the_diagonal() -> Outcome:
    threat = StrongL2(4.01, 0.5, np.eye(16)[:, :1])
    return warned(_evaluated(threat), "epsilon 4.01 is larger than the pixel box", "from 4 on")


@situation("threats: all rules of L∞(8) warn once")
def rules_in_grey_levels() -> Outcome:
    given = problem()
    x, w = given.x.astype(np.float32), given.w.astype(np.float32)
    return warned(
        lambda: hygiene.check(
            Network(linear, w), Split(x, given.y), Linf(8), PGD(steps=2), key=jax.random.key(0)
        ),
        "epsilon 8",
    )


# ---------------------------------------------------------------- z-scores and channels


def z_scored() -> tuple[np.ndarray, tuple[float, float]]:
    """Images (pixel − 0.3)/0.35 made in float32, black and white among them, and exact bounds."""
    rng = np.random.default_rng(2)
    pixels = np.clip(rng.uniform(-0.5, 1.5, (40, 16)), 0, 1).astype(np.float32)
    z = (pixels - np.float32(0.3)) / np.float32(0.35)
    return z, ((0 - 0.3) / 0.35, (1 - 0.3) / 0.35)


@situation("threats: z-scored images with their exact bounds")
def z_scores_are_accepted() -> Outcome:
    """What leaves the bounds by a rounding stays where it is, and every rule agrees."""
    x, bounds = z_scored()
    assert x.min() < bounds[0]
    given = problem()
    w = given.w.astype(np.float32)
    y = (x @ w).argmax(1)
    unmoved = [
        bool((make(0.1, bounds).project(jnp.asarray(x), jnp.asarray(x)) == x).all())
        for make in (Linf, L2)
    ]
    found = measure(
        Network(linear, w), Split(x, y), Linf(0.1, bounds), PGD(steps=5), key=jax.random.key(0)
    )
    box = hygiene.box(found.images, x, Linf(0.1, bounds))
    return same((unmoved, box.status, float(box.value)), ([True, True], "pass", 0.0))


@situation("threats: bounds that differ from the images in the seventh digit")
def digits_that_differ() -> Outcome:
    x, _ = z_scored()
    return refused(
        lambda: measure(
            Network(linear, problem().w.astype(np.float32)), Split(x, np.zeros(40, int)),
            Linf(0.1, (-0.857141, 2.0)), PGD(steps=1), key=jax.random.key(0),
        ),
        "expected values in [-0.857141, 2]", "got [-0.8571429, 2]",
    )  # fmt: skip


CHANNELS = (np.array([0.0, 0.2, -1.0, 0.4]), np.array([1.0, 0.9, np.inf, 1.5]))
"""Ends of the box of four channels."""


def in_channels() -> tuple[Problem, tuple[np.ndarray, np.ndarray]]:
    """Images [2, 2, 4] as rows of 16, channels last, half of their pixels at the ends."""
    given = problem()
    low, high = (np.tile(end, 4) for end in CHANNELS)
    x = np.clip(2.4 * given.x - 0.7, low, np.minimum(high, 1.5)).astype(np.float32).astype(float)
    return Problem(given.w, x, (x @ given.w).argmax(1)), (low, high)


def _by_channel(attack: Callable[[], Any], channels_last: bool) -> Outcome:
    """L∞ in a box: each pixel goes as far as its channel lets it, by the sign of w_k − w_y."""
    given, (low, high) = in_channels()
    epsilon = 0.15

    def reach(away: np.ndarray) -> np.ndarray:
        ends = np.clip(given.x + epsilon * np.sign(away), low, high)
        return (away * (ends - given.x)).sum(1)

    x = given.x.astype(np.float32).reshape(-1, 2, 2, 4)
    bounds: Any = CHANNELS
    if not channels_last:
        x, bounds = np.moveaxis(x, -1, 1), [end[:, None, None] for end in CHANNELS]

    def apply(params: Any, z: Any) -> Any:
        return linear(params, z if channels_last else jnp.moveaxis(z, 1, -1))

    came = robust(Linf(epsilon, bounds), attack(), given, apply, x=x)
    return near(came, share(given, reach))


for _name, _attack, _last in [
    ("L∞, APGD", strong_targets, True),
    ("L∞, APGD, channels first", strong_targets, False),
    ("L∞, FAB", lambda: FAB(steps=40), True),
    ("L∞, Square", lambda: Square(400, channels=-1), True),
]:
    situation(f"threats: {_name} in a box by channel")(partial(_by_channel, _attack, _last))


def _inside_by_channel(name: str) -> Outcome:
    """Attacked images stay in their channel's box and in the ball, by the rules in float64."""
    given, bounds = in_channels()
    threat = threat_models.make(name, 0.3, 16, bounds)
    x = given.x.astype(np.float32)
    network = Network(linear, given.w.astype(np.float32))
    found = measure(network, Split(x, given.y), threat, strong_targets(5), key=jax.random.key(0))
    z = found.images.astype(float)
    low, high = bounds
    outside = np.maximum(low - z, z - high).max()
    rules = (
        hygiene.box(found.images, x, threat).status,
        hygiene.ball(found.images, x, threat).status,
    )
    return same((bool(outside <= 0), rules), (True, ("pass", "pass")))


for _name in ("l2", "strong-l2"):
    situation(f"threats: {_name} in a box by channel")(partial(_inside_by_channel, _name))


@situation("threats: an image outside its channel's box")
def outside_a_channel() -> Outcome:
    given, bounds = in_channels()
    x = given.x.astype(np.float32)
    x[3, 1] = 0.95
    return refused(
        lambda: robust(Linf(0.1, bounds), PGD(steps=1), given, x=x),
        "values in [0.2, 0.9] at (1,) of an image", "got [0.2, 0.95]",
    )  # fmt: skip


@situation("threats: bounds of channels that are no axis of the images")
def bounds_that_do_not_fit() -> Outcome:
    given, _ = in_channels()
    x = np.moveaxis(given.x.astype(np.float32).reshape(-1, 2, 2, 4), -1, 1)
    words = "bounds of images", "shape (4, 2, 2)", "got shape (4,)", "(c, 1, 1)"
    return refused(lambda: robust(Linf(0.1, CHANNELS), PGD(steps=1), given, x=x), *words)


@situation("threats: bounds the wrong way round")
def bounds_in_no_order() -> Outcome:
    return refused(lambda: Linf(0.1, (1.0, 0.0)), "bounds: expected (low, high) with low ≤ high")


@situation("threats: interval bounds in a box by channel")
def intervals_by_channel() -> Outcome:
    """Of a linear network they are exact: each pixel at the end that its weight asks for."""
    given, (low, high) = in_channels()
    ends = np.clip(given.x - 0.15, low, high), np.clip(given.x + 0.15, low, high)
    wanted = np.stack(
        [
            np.minimum(*(end[..., None] * given.w for end in ends)).sum(1),
            np.maximum(*(end[..., None] * given.w for end in ends)).sum(1),
        ]
    )
    x, w = given.x.astype(np.float32).reshape(-1, 2, 2, 4), given.w.astype(np.float32)
    came = intervals.output_bounds(linear, w, x, Linf(0.15, CHANNELS))
    return near(np.stack(came), wanted, relative=1e-5)


@situation("threats: a data set with a box by channel")
def data_by_channel() -> Outcome:
    given, _ = in_channels()
    x, y = given.x.astype(np.float32).reshape(-1, 2, 2, 4), given.y.astype(np.int32)
    data = Dataset("channels", x, y, x, y, x, y, num_classes=3, bounds=CHANNELS)
    built = threats.build(ThreatConfig(name="l2", epsilon=0.3), data.bounds)
    return same(built.bounds, tuple(tuple(end.tolist()) for end in CHANNELS))


# ---------------------------------------------------------------- one logit


def one_logit(params: Any, x: Any) -> Any:
    return linear(params, x)[:, :1]


def _of_one_logit(use: Callable[[Any, Any, Any], Any]) -> Outcome:
    given = problem(4)
    x, y, w = given.x.astype(np.float32), np.zeros(4, int), given.w.astype(np.float32)
    return refused(lambda: use(w, x, y), "two classes or more", "(−f/2, f/2)", "sigmoid")


def _searched(w: Any, x: Any, y: Any) -> Any:
    return attacked_inputs(
        one_logit, w, None, x, y, threat=Linf(0.1), attack=PGD(steps=1),
        inputs="dense", key=jax.random.key(0),
    )  # fmt: skip


for _name, _use in {
    "APGD": lambda w, x, y: perturb(
        APGD(), Network(one_logit, w), x, y, Linf(0.1), jax.random.key(0)
    ),
    "Square": lambda w, x, y: perturb(
        Square(), Network(one_logit, w), x, y, Linf(0.1), jax.random.key(0)
    ),
    "an evaluation": lambda w, x, y: measure(
        Network(one_logit, w), Split(x, y), Linf(0.1), PGD(steps=1), key=jax.random.key(0)
    ),
    "the rules": lambda w, x, y: hygiene.check(
        Network(one_logit, w), Split(x, y), Linf(0.1), PGD(steps=1), key=jax.random.key(0)
    ),
    "a search": _searched,
}.items():
    situation(f"threats: one logit, {_name}")(partial(_of_one_logit, _use))


# ---------------------------------------------------------------- dtypes and modes


def _in_dtype(attack: Callable[[], Any], dtype: Any, epsilon: float = 0.05) -> Outcome:
    """Weights and logits of another dtype, on float32 images: as the same weights in float64.

    Only images whose margins differ by 0.1 or more from the reach: the sum of 16 products of size 1
    errs by (16 + 2)u of their absolute sum at most, which in float16 is 0.07.
    """
    given = problem()
    w = np.asarray(given.w, dtype)
    given = given._replace(w=w.astype(float), y=(given.x @ w.astype(float)).argmax(1))
    away, margins = given.gaps()
    left = margins - np.stack([in_ball("linf", epsilon)(away[:, k]) for k in range(2)], 1)
    clear = abs(left).min(1) > 0.1
    given = given._replace(x=given.x[clear], y=given.y[clear])

    def apply(params: Any, x: Any) -> Any:
        return linear(params, x.astype(dtype))

    came = robust(Linf(epsilon, INFINITE), attack(), given, apply, params=w)
    return near(came, share(given, in_ball("linf", epsilon)))


@situation("threats: APGD on a float16 network")
def narrower_network() -> Outcome:
    return _in_dtype(strong_targets, jnp.float16)


@situation("threats: APGD on a float64 network, float32 images")
def wider_network() -> Outcome:
    with jax.enable_x64(True):
        return _in_dtype(strong_targets, jnp.float64)


def _in_mode(mode: str) -> Outcome:
    """The same images as without the mode, from an attack with momentum and one without gradient.

    Compiled as one program a sum is rounded otherwise, by a few units of roundoff a step.
    """
    given = problem(4)
    x, y, w = (jnp.asarray(part) for part in (given.x.astype(np.float32), given.y, given.w))
    x = x.reshape(4, 4, 2, 2)

    def found() -> np.ndarray:
        return np.stack(
            [
                perturb(attack, Network(linear, w), x, y, Linf(0.1), jax.random.key(0)).images
                for attack in (APGD(steps=2), Square(1))
            ]
        )

    wanted = found()
    with MODES[mode]():
        return near(found(), wanted, absolute=1e-6)


for _name in MODES:
    situation(f"threats: attacks with {_name}")(partial(_in_mode, _name))


@situation("threats: images of float16 inside an attack")
def narrow_images() -> Outcome:
    given = problem(4)
    x, w = jnp.asarray(given.x, jnp.float16), jnp.asarray(given.w)
    loss = NetworkLoss(Network(linear, w), jnp.asarray(given.y))
    keys = jax.random.split(jax.random.key(0), 4)
    return refused(lambda: PGD(steps=2).run(loss, x, Linf(0.1), keys), "attacked images", "float32")


# ---------------------------------------------------------------- channels of Square


def _channels_first(name: str, epsilon: float) -> Outcome:
    """Square gives pictures [c, h, w] the moves of the same pictures as [h, w, c].

    An L2 norm sums its squares in another order: √72 units of roundoff a query, relative.
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(0.3, 0.7, (4, 6, 6, 2)).astype(np.float32)
    w = rng.normal(size=(72, 3)).astype(np.float32)
    y = linear(w, x).argmax(1)
    threat = threat_models.make(name, epsilon, 72)

    def last(params: Any, z: Any) -> Any:  # never wrong, so that all queries are made
        return linear(params, z) + 100 * jax.nn.one_hot(y, 3)

    def first(params: Any, z: Any) -> Any:
        return last(params, jnp.moveaxis(z, 1, -1))

    key, attack = jax.random.key(0), Square(30)
    wanted = perturb(attack, Network(last, w), jnp.asarray(x), y, threat, key).images
    came = perturb(
        attack, Network(first, w), jnp.asarray(np.moveaxis(x, -1, 1)), y, threat, key
    ).images
    rounding = {"linf": 0, "l2": 30 * 9 * 2.0**-24}[name]
    return near(jnp.moveaxis(came, 1, -1), wanted, absolute=rounding)


for _name, _epsilon in (("linf", 0.125), ("l2", 0.5)):
    situation(f"threats: Square on NCHW images, {_name}")(partial(_channels_first, _name, _epsilon))
