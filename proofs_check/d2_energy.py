"""D2: along the flow of adversarial training the adversarial risk falls by its squared gradient.

Where the inner maximum is unique, Danskin's theorem makes the gradient at the maximisers the
gradient of the adversarial risk, so dR_adv/dt = −‖∇_θ R_adv‖². Where it is not unique, R_adv has a
kink and the identity may fail on one side of it: in an L∞ ball with w_i = 0 both ends of pixel i
are maximisers, and whichever way w_i then moves, ε|w_i| adds to the risk. One such instance is
among the controls. Of the squared loss with labels ±1 the maximiser is x + ε·sign(f − y)·sign w,
which is x − ε·y·sign w only where y·f ≤ 1; the latter for all points is another control. (Of the
monotone network the farther end of the interval cannot be told from f(x), so there the squared
loss is left out.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.threats import L2, Linf, StrongL2, Threat
from proofs_check.core import Case, Context, Line, Outcome, Panel, Recorder, Statement, close

STATEMENT = Statement(
    number="D2",
    title="Energy of adversarial training",
    claim="along gradient flow the adversarial risk falls by the square of its gradient, taken at "
    "the maximisers",
    formula="dR_adv/dt = −‖∇_θ R_adv‖²",
    hypotheses={
        "exact attack": "the attack finds the maximum",
        "unique": "the maximiser is unique for every point (in an L∞ ball: no w_i is 0)",
        "smooth loss": "the loss is differentiable in the parameters",
    },
    instances="linear models with logistic, squared-hinge and squared loss in L∞, L2 and strong L2 "
    "balls, and with the first two losses a monotone two-layer network on the line, at the "
    "instants of a training",
    rule="central and forward differences of the risk along −∇, the inner maximum solved anew in "
    "closed form, over −‖∇R_adv‖² are 1; of other networks nothing is claimed",
    tolerance="1e-6: a hundred times the error of the differences (see DIFFERENCE)",
    source="Shi et al. 2022 (AISTATS); Danskin 1966",
)

MARGIN_LOSSES = ("logistic", "squared hinge")  # fall with y·f
LOSSES = (*MARGIN_LOSSES, "squared")
HINGE = 3  # max(1 − y·f, 0), which is not differentiable: for a control
EPSILON, DELTA = 0.25, 0.0625  # floats of any precision, so every side has the same radius
BOX = (-100.0, 100.0)  # far away: the closed forms are for balls
POINTS, FEATURES, UNITS = 20, 6, 4
RATE = 0.05  # of the steps between the instants at which the identity is checked
DIFFERENCE = 1e-4
"""Step of the differences, in parts of ‖θ‖/‖∇R‖: they err by about its square, 1e-8, or, with an
error of 1e-16 of the risk, by 1e-12 in parts of the risk; the tolerance is a hundred times that."""
TOLERANCE = 1e-6


class _Flow(NamedTuple):
    """Instants of gradient descent [instances, instants, parameters], ∇ taken at the attack."""

    theta: np.ndarray
    gradient: np.ndarray


def _line_network(theta: Any, x: Any, lib: Any = np) -> Any:
    """Σ_j e^{α_j} tanh(e^{ω_j} x + b_j) + c of points [n]: increasing in x for every θ."""
    alpha, omega, bias = (theta[..., None, k * UNITS : (k + 1) * UNITS] for k in range(3))
    units = lib.tanh(lib.exp(omega) * x[..., None] + bias)
    return (lib.exp(alpha) * units).sum(-1) + theta[..., -1:]


def _wavy_network(theta: Any, x: Any, lib: Any = np) -> Any:
    """Σ_j ± e^{α_j} tanh(8 e^{ω_j} x + b_j) + c: up and down, and no exact attack is known."""
    signs = np.where(np.arange(UNITS) % 2 == 0, 3.0, -3.0)
    alpha, omega, bias = (theta[..., None, k * UNITS : (k + 1) * UNITS] for k in range(3))
    units = lib.tanh(8 * lib.exp(omega) * x[..., None] + bias)
    return (signs * lib.exp(alpha) * units).sum(-1) + theta[..., -1:]


def _linear(theta: Any, x: Any) -> Any:
    """wᵀx + b of points [n, d]."""
    return theta[..., :-1] @ x.T + theta[..., -1:]


_TRACED: dict[str, Callable[[Any, Any], Any]] = {
    "linear": _linear,
    "line": partial(_line_network, lib=jnp),
    "wavy": partial(_wavy_network, lib=jnp),
}


# ---------------------------------------------------------------- the flow, with an attack


@partial(
    jax.jit,
    static_argnames=("function", "instants"),
    compiler_options={"xla_backend_optimization_level": 0},  # it compiles longer than it runs
)
def _descend(
    function: Callable[[Any, Any], Any],
    threat: Threat,
    instants: int,
    theta: jax.Array,
    x: jax.Array,
    y: jax.Array,
    loss: jax.Array,
    share: jax.Array,
    by_margin: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradient descent with the attack x + share·ε·ascent; exact for share 1, if not by_margin."""

    def one(theta: jax.Array, x: jax.Array, y: jax.Array, loss: jax.Array) -> Any:
        def attacked(theta: jax.Array) -> jax.Array:
            logits, slope = jax.vjp(lambda z: function(theta, z), x)
            upwards = jnp.where((loss < 2) | by_margin, -y, jnp.sign(logits - y))
            return x + share * threat.epsilon * threat.ascent(slope(upwards)[0])

        def risk(theta: jax.Array, z: jax.Array) -> jax.Array:
            f = function(theta, z)
            values = [
                jax.nn.softplus(-y * f),
                jax.nn.relu(1 - y * f) ** 2 / 2,
                (f - y) ** 2 / 2,
            ]
            return jnp.mean(jnp.select([loss == k for k in range(3)], values))

        def step(theta: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            gradient = jax.grad(risk)(theta, attacked(theta))
            return theta - RATE * gradient, (theta, gradient)

        return jax.lax.scan(step, theta, length=instants)[1]

    return jax.vmap(one)(theta, x, y, loss)


# ---------------------------------------------------------------- the risk, in closed form


def _losses(loss: int, low: np.ndarray, high: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The largest loss where f takes the values from low to high: all three are convex in f."""
    worst = np.where(y > 0, low, high)
    if loss == 0:
        return np.logaddexp(0, -y * worst)
    if loss == 1:
        return np.maximum(1 - y * worst, 0) ** 2 / 2
    if loss == HINGE:
        return np.maximum(1 - y * worst, 0)
    return np.maximum((low - y) ** 2, (high - y) ** 2) / 2


def _reach(w: np.ndarray, threat: str) -> np.ndarray:
    """max ⟨w, v⟩ over the set; the strong one has the first coordinate as its signal."""
    if threat == "L∞":
        return EPSILON * np.abs(w).sum(-1)
    norm, signal = np.linalg.norm(w, axis=-1), np.abs(w[..., 0])
    if threat == "L2":
        return EPSILON * norm
    across = np.linalg.norm(w[..., 1:], axis=-1)
    limited = DELTA * signal + np.sqrt(EPSILON**2 - DELTA**2) * across
    return np.where(EPSILON * signal <= DELTA * norm, EPSILON * norm, limited)


def _range(model: str, theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest output over each point's set: [..., n], θ [..., parameters]."""
    if model == "line":
        return _line_network(theta, x - EPSILON), _line_network(theta, x + EPSILON)
    if model == "wavy":
        grid = np.linspace(-EPSILON, EPSILON, 101)
        outputs = _wavy_network(theta, (x[:, None] + grid).ravel())
        outputs = outputs.reshape(*theta.shape[:-1], len(x), len(grid))
        return outputs.min(-1), outputs.max(-1)
    middle, reach = _linear(theta, x), _reach(theta[..., :-1], model)[..., None]
    return middle - reach, middle + reach


def _risk(model: str, loss: int, theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """R_adv, its inner maximum solved anew at each θ."""
    return _losses(loss, *_range(model, theta, x), y).mean(-1)


def _pieces(model: str, theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signs that change where the risk has a kink or a jump in its curvature."""
    low, high = _range(model, theta, x)
    signs = [np.sign(low + high - 2 * y), np.sign(1 - y * np.where(y > 0, low, high))]
    if model == "L∞":
        signs.append(np.sign(theta[..., :-1]))
    if model == "strong":
        w = theta[..., :-1]
        limit = EPSILON * np.abs(w[..., 0]) - DELTA * np.linalg.norm(w, axis=-1)
        signs += [np.sign(limit)[..., None], np.sign(w[..., :1])]
    return np.concatenate(signs, axis=-1)


def _ratios(
    model: str, loss: int, flow: _Flow, x: np.ndarray, y: np.ndarray, *, retreat: bool = True
) -> np.ndarray:
    """−(dR_adv/dt)/‖∇R_adv‖² along −∇, from both sides and forwards: [instants, 2], all 1.

    The difference step is shortened (`retreat`) where the risk is not smooth between its ends; up
    to six times, which leaves 1e-8, 1e8 times the rounding of the risk.
    """
    theta, v = flow
    square = (v**2).sum(-1)
    h = DIFFERENCE * np.linalg.norm(theta, axis=-1) / np.sqrt(square)

    def at(part: float, function: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
        return function(model, *arguments, theta - (part * h)[:, None] * v, x, y)

    here = at(0.0, _pieces) if retreat else None
    for _ in range(6 if retreat else 0):
        rough = [(at(part, _pieces) != here).any(-1) for part in (-1.0, 1.0)]
        h = np.where(rough[0] | rough[1], h / 4, h)
    back, now, half, ahead = (at(part, _risk, loss) for part in (-1.0, 0.0, 0.5, 1.0))
    central = (back - ahead) / (2 * h)
    forward = 2 * (now - half) / (h / 2) - (now - ahead) / h  # Richardson: without its h
    return np.stack([central, forward], -1) / square[:, None]


# ---------------------------------------------------------------- the check


class _Instances(NamedTuple):
    """Random problems, one row a loss and a seed: θ at the start, points, labels ±1, the loss."""

    theta: np.ndarray
    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray


_NETWORKS = {"L∞": "linear", "L2": "linear", "strong": "linear", "line": "line", "wavy": "wavy"}
"""Network of each instance's risk."""

_EXACT = {
    "L∞": "linear model, L∞",
    "L2": "linear model, L2",
    "strong": "linear model, strong L2",
    "line": "monotone network on the line",
}


def _threat(model: str) -> Threat:
    """Threat model of an instance's risk."""
    if model == "strong":
        return StrongL2(EPSILON, DELTA, np.eye(FEATURES)[:, :1], BOX)
    return L2(EPSILON, BOX) if model == "L2" else Linf(EPSILON, BOX)


def _draw(rng: np.random.Generator, model: str, seeds: int) -> _Instances:
    rows = len(LOSSES) * seeds
    y = rng.choice([-1.0, 1.0], (rows, POINTS))
    if model in ("line", "wavy"):
        theta = rng.normal(0, 0.5, (rows, 3 * UNITS + 1))
        x = 0.5 * y + rng.normal(0, 1, (rows, POINTS))
    else:
        size = rng.uniform(0.3, 1, (rows, FEATURES + 1))
        theta = size * rng.choice([-1.0, 1.0], size.shape)
        x = 0.5 * y[..., None] + rng.normal(0, 1, (rows, POINTS, FEATURES))
    return _Instances(theta, x, y, np.repeat(np.arange(len(LOSSES)), seeds))


def _flows(
    model: str,
    drawn: _Instances,
    instants: int,
    *,
    share: float = 1.0,
    by_margin: bool = False,
    threat: Threat | None = None,
) -> _Flow:
    arrays = _descend(
        _TRACED[_NETWORKS[model]],
        _threat(model) if threat is None else threat,
        instants,
        drawn.theta,
        drawn.x,
        drawn.y,
        drawn.loss,
        share,
        by_margin,
    )
    return _Flow(*(np.asarray(array, float) for array in arrays))


def _judge(model: str, name: str, loss: int, drawn: _Instances, flow: _Flow) -> Case:
    """The statement's rule for one loss, on all its seeds and instants."""
    ratios = [
        _ratios(
            model,
            loss,
            _Flow(flow.theta[row], flow.gradient[row]),
            drawn.x[row],
            drawn.y[row],
            retreat=model in _EXACT,
        )
        for row in np.flatnonzero(drawn.loss == loss)
    ]
    worst = np.array([np.abs(ratio - 1).max() for ratio in ratios])
    return close(name, 1 + worst, np.ones_like(worst), tolerance=TOLERANCE)


def _tie(drawn: _Instances, instants: int) -> Case:
    """Linear models with w_1 = 0 in an L∞ ball: two maximisers for each point."""
    theta = drawn.theta.copy()
    theta[:, 0] = 0.0
    flow = _flows("L∞", drawn._replace(theta=theta), instants)
    first = _Flow(flow.theta[0, :1], flow.gradient[0, :1])
    ratios = _ratios("L∞", 0, first, drawn.x[0], drawn.y[0], retreat=False)
    return close("forward difference", ratios[:, 1], np.ones(1), tolerance=TOLERANCE)


def _kink(drawn: _Instances) -> Case:
    """The hinge loss with one point exactly where it bends, in an L∞ ball.

    The other point, of the other class, pulls θ to the side on which that hinge rises; its gradient
    where it bends is taken to be 0.
    """
    theta, x = drawn.theta[0].copy(), np.repeat(drawn.x[0, :1], 2, axis=0)
    y, w = np.array([1.0, -1.0]), theta[:-1]
    theta[-1] = -1 - _reach(w, "L∞") - w @ x[0]  # the second point's margin is 1 at worst
    pull = -np.append(x[0] - EPSILON * np.sign(w), 1.0) / 2
    flow = _Flow(theta[None], pull[None])
    ratios = _ratios("L∞", HINGE, flow, x, y, retreat=False)
    return close("forward difference", ratios[:, 1], np.ones(1), tolerance=TOLERANCE)


def check(context: Context) -> Outcome:
    """Differences of the exact adversarial risk along −∇ against −‖∇R_adv‖²."""
    check = Recorder(STATEMENT)
    seeds, instants = context.pick(3, 6, 20), context.pick(6, 12, 30)
    drawn = {model: _draw(context.rng(k), model, seeds) for k, model in enumerate(_NETWORKS)}
    for done, (model, name) in enumerate(_EXACT.items()):
        flow = _flows(model, drawn[model], instants)
        for loss, what in enumerate(LOSSES if _NETWORKS[model] == "linear" else MARGIN_LOSSES):
            check.case(_judge(model, f"{name}, {what}", loss, drawn[model], flow))
        context.progress((done + 1) / (len(_EXACT) + 1))
    linear = drawn["L∞"]
    wrong = {
        "half the radius": {"share": 0.5},
        "clean points": {"share": 0.0},
        "the L2 attack in an L∞ ball": {"threat": _threat("L2")},
    }
    for what, options in wrong.items():
        flow = _flows("L∞", linear, instants, **options)
        for loss, name in enumerate(LOSSES):
            case = _judge("L∞", name, loss, linear, flow)
            check.control(f"{what}, {name}", case, breaks="exact attack")
    flow = _flows("L∞", linear, instants, by_margin=True)
    case = _judge("L∞", "squared", 2, linear, flow)
    check.control("the margin's attack, with some y·f > 1", case, breaks="exact attack")
    flow = _flows("wavy", drawn["wavy"], instants)
    case = _judge("wavy", "logistic", 0, drawn["wavy"], flow)
    name = "a network that is not monotone: one step is not exact"
    check.control(name, case, breaks="exact attack")
    name = "two maximisers: w_1 = 0 in an L∞ ball"
    check.control(name, _tie(linear, instants), breaks="unique")
    check.control("hinge loss, one point where it bends", _kink(linear), breaks="smooth loss")
    check.panel(_panel(linear, instants))
    return check.outcome()


def _panel(drawn: _Instances, instants: int) -> Panel:
    """Both sides along the flow of one instance, and with half the radius."""
    times = RATE * np.arange(instants)
    lines = []
    for what, share in (("exact attack", 1.0), ("half the radius", 0.5)):
        flow = _flows("L∞", drawn, instants, share=share)
        first = _Flow(flow.theta[0], flow.gradient[0])
        square = (first.gradient**2).sum(-1)
        fall = _ratios("L∞", 0, first, drawn.x[0], drawn.y[0])[:, 0] * square
        lines.append(Line(f"−dR/dt, {what}", times, fall))
        lines.append(Line(f"‖∇R‖², {what}", times, square, "reference"))
    return Panel("Logistic loss, L∞", "time", "fall of the adversarial risk [nats/time]", lines)
