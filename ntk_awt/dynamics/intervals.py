"""Rigorous bounds of a network, and of the gap between two, over a threat set (theory P4).

Interval propagation through the traced network, of a pair of weights at once: each value carries
its interval in the first network, in the second, and that of the difference D. A product with
weights W, W' bounds D by W·D_in + (W − W')·h', an activation φ by φ'(ξ)·D_in with ξ between the two
inputs (mean value theorem); both are intersected with the difference of the intervals.

The intervals are moved outwards by more than the rounding errors can be: n terms summed in any
order err by at most n·ε/2/(1 − n·ε/2) of the sum of their sizes (Higham, "Accuracy and Stability of
Numerical Algorithms", 2002, §3.1), a single operation by ε/2 of its result, ε the machine epsilon
of the images' dtype. So the bounds hold for the network in real arithmetic, under- and overflow
apart; what depends on the weights alone counts as computed.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk_awt.errors import (
    InputError,
    check_finite,
    check_images,
    check_labels,
    check_number,
    check_same_tree,
    choose,
)
from ntk_awt.kernels.program import Step, evaluate
from ntk_awt.network import check_network, check_params
from ntk_awt.threats import L2, Linf, StrongL2, Threat, ends
from ntk_awt.types import ApplyFn, Images, Labels, Params, PerExample

LIPSCHITZ = {"cross_entropy": 2.0**0.5, "logistic": 1.0}
"""L_ℓ: how much a loss changes at most with the 2-norm of its logits.

cross_entropy: ‖∇ℓ‖² = ‖softmax(f) − e_y‖² ≤ 2(1 − p_y)² ≤ 2. logistic, log(1 + e^{−yf}) of one
logit f: |ℓ'| = 1/(1 + e^{yf}) ≤ 1.
"""


class Bounds(NamedTuple):
    """lower ≤ value ≤ upper, entry by entry, for every image of a threat set."""

    lower: Array
    upper: Array


# ---------------------------------------------------------------- values


class _Box(NamedTuple):
    """A value of one network: lower ≤ v ≤ upper; one and the same array where v is known.

    Attributes:
        ball: (c, ρ) where also ‖v − c‖₂ ≤ ρ is known.
    """

    lower: Any
    upper: Any
    ball: tuple[Any, Any] | None = None

    @property
    def known(self) -> bool:
        return self.lower is self.upper

    @property
    def size(self) -> Array:
        return jnp.maximum(jnp.abs(self.lower), jnp.abs(self.upper))


class _Pair(NamedTuple):
    """A value of both networks; one and the same box where both have the same value.

    Attributes:
        gap: of first − second; None where that is zero, or follows from two known values.
    """

    first: _Box
    second: _Box
    gap: _Box | None = None

    @property
    def shared(self) -> bool:
        return self.first is self.second

    @property
    def known(self) -> bool:
        return self.first.known and self.second.known

    def difference(self) -> _Box:
        """The box of first − second."""
        if self.gap is not None:
            return self.gap
        if self.shared:
            zero = jnp.zeros_like(self.first.lower)
            return _Box(zero, zero)
        value = self.first.lower - self.second.lower
        return _Box(value, value)


def _known(first: Any, second: Any) -> _Pair:
    box = _Box(first, first)
    return _Pair(box, box if second is first else _Box(second, second))


def _outward(box: _Box, errors: float, size: Any) -> _Box:
    """Both ends moved out by that many machine epsilons of a size."""
    margin = errors * jnp.finfo(box.lower.dtype).eps * size
    return _Box(box.lower - margin, box.upper + margin)


def _meet(one: _Box, other: _Box) -> _Box:
    return _Box(jnp.maximum(one.lower, other.lower), jnp.minimum(one.upper, other.upper))


def _minus(one: _Box, other: _Box) -> _Box:
    """The plain difference of two intervals."""
    found = _Box(one.lower - other.upper, one.upper - other.lower)
    return _outward(found, 2, found.size)


def _negative(box: _Box) -> _Box:
    return _Box(-box.upper, -box.lower)


def _sum(one: _Box, other: _Box) -> _Box:
    found = _Box(one.lower + other.lower, one.upper + other.upper)
    return _outward(found, 2, found.size)


def _each(pairs: Sequence[_Pair], rule: Callable[[list[_Box]], _Box]) -> tuple[_Box, _Box]:
    """A rule for one network, applied to both, or once where their values are the same."""
    first = rule([pair.first for pair in pairs])
    if all(pair.shared for pair in pairs):
        return first, first
    return first, rule([pair.second for pair in pairs])


def _with_gap(first: _Box, second: _Box, gap: Callable[[], _Box]) -> _Pair:
    """The pair, with its gap inside the plain difference too."""
    if first is second:
        return _Pair(first, second)
    return _Pair(first, second, _meet(gap(), _minus(first, second)))


# ---------------------------------------------------------------- rules


def _evaluate(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return evaluate(Step(eqn, (), ()), values)


def _apply(eqn: Any, values: Sequence[Any], output: int = 0) -> Any:
    return _evaluate(eqn, values)[output]


def _ends(eqn: Any, boxes: Sequence[_Box], output: int = 0) -> _Box:
    """An operation that grows with each operand, at both ends."""
    lower, upper = [b.lower for b in boxes], [b.upper for b in boxes]
    return _Box(_apply(eqn, lower, output), _apply(eqn, upper, output))


def _terms(eqn: Any) -> int:
    """How many terms an entry of the result sums."""
    name, shapes = eqn.primitive.name, [atom.aval.shape for atom in eqn.invars]
    if name == "dot_general":
        return int(np.prod([shapes[0][axis] for axis in eqn.params["dimension_numbers"][0][0]]))
    if name == "conv_general_dilated":
        return int(np.prod(shapes[1])) // shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
    if name == "reduce_window_sum":
        return int(np.prod(eqn.params["window_dimensions"]))
    if name == "reduce_sum":
        return int(np.prod([shapes[0][axis] for axis in eqn.params["axes"]]))
    return len(shapes)


def _linear(pairs: Sequence[_Pair], rule: Callable[[list[_Box]], _Box]) -> _Pair:
    """A rule that holds for the gap as for a value."""
    first, second = _each(pairs, rule)
    gap = None if first is second else rule([pair.difference() for pair in pairs])
    return _Pair(first, second, gap)


def _moved(eqn: Any, pairs: Sequence[_Pair], output: int = 0) -> _Pair:
    """Entries moved or copied: the ends move alike. A ball survives if no entry is copied."""

    def rule(boxes: list[_Box]) -> _Box:
        found = _ends(eqn, boxes, output)
        ball = boxes[0].ball
        if len(boxes) > 1 or ball is None or found.lower.size > boxes[0].lower.size:
            return found
        return found._replace(ball=(_apply(eqn, [ball[0]], output), ball[1]))

    return _linear(pairs, rule)


def _converted(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """Another float type; the network in real arithmetic knows none."""
    old, new = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    if not jnp.issubdtype(new, jnp.floating):
        raise _unsupported(f"convert_element_type to {new}")
    if jnp.finfo(new).eps <= jnp.finfo(old).eps:
        return _moved(eqn, pairs)
    return _linear(pairs, lambda boxes: _outward(box := _ends(eqn, boxes), 1, box.size))


def _summed(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """A sum of entries or of operands: the ends add up."""

    def rule(boxes: list[_Box]) -> _Box:
        return _outward(_ends(eqn, boxes), _terms(eqn) + 2, _apply(eqn, [b.size for b in boxes]))

    return _linear(pairs, rule)


def _centred(box: _Box) -> tuple[Any, Any]:
    """Middle c and radius r, with [lower, upper] in [c − r, c + r] up to rounding."""
    if box.known:
        return box.lower, jnp.zeros_like(box.lower)
    centre = box.lower / 2 + box.upper / 2
    return centre, jnp.maximum(box.upper - centre, centre - box.lower)


def _product(times: Callable[[Any, Any], Any], terms: int, left: _Box, right: _Box) -> _Box:
    """A bilinear map of two boxes: its centre ± |c|·r' + r·(|c'| + r').

    Of a ball of radius ρ around x a known w makes w·x ± ρ‖w‖₂. The radii of the operands are
    widened by κ = (terms + 16)ε of their sizes, twice what the roundings of the centre, of this
    radius, and of one more operation in each operand can do: κ ≥ 2·(terms + 7)·ε/2.
    """
    (c1, r1), (c2, r2) = _centred(left), _centred(right)
    centre = times(c1, c2)
    kappa = (terms + 16) * jnp.finfo(centre.dtype).eps
    m1, m2 = jnp.abs(c1) + r1, jnp.abs(c2) + r2
    if right.known:
        radius = times(r1 + kappa * m1, jnp.abs(c2))
    else:
        radius = times(jnp.abs(c1), r2 + kappa * m2)
        if not left.known:
            radius = radius + times(r1, (1 + kappa) * m2)
    box = _Box(centre - radius, centre + radius)
    for ball, known, order in ((right.ball, left.known, 1), (left.ball, right.known, -1)):
        if ball is not None and known:
            (x, rho), w = ball, (c1, c2)[order < 0]
            lengths = jnp.sqrt(times(*(w**2, jnp.ones_like(x))[::order]))
            middle = times(*(w, x)[::order])
            reach = rho * lengths * (1 + kappa) + kappa * times(*(jnp.abs(w), jnp.abs(x))[::order])
            box = _meet(box, _Box(middle - reach, middle + reach))
    return box


def _bilinear(times: Callable[[Any, Any], Any], terms: int, x: _Pair, y: _Pair) -> _Pair:
    """Both networks' products, and their gap as x·D_y + D_x·y' and as x'·D_y + D_x·y."""
    first, second = _each([x, y], lambda boxes: _product(times, terms, *boxes))

    def form(x_box: _Box, y_box: _Box) -> _Box:
        parts = []
        if not y.shared:
            parts.append(_product(times, terms, x_box, y.difference()))
        if not x.shared:
            parts.append(_product(times, terms, x.difference(), y_box))
        return parts[0] if len(parts) == 1 else _sum(*parts)

    def gap() -> _Box:
        found = form(x.first, y.second)
        if x.shared or y.shared:  # the other form is the same
            return found
        return _meet(found, form(x.second, y.first))

    return _with_gap(first, second, gap)


def _multiplied(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    return _bilinear(lambda a, b: _apply(eqn, [a, b]), _terms(eqn), *pairs)


def _divided(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    numerator, denominator = pairs
    if not denominator.known:
        raise _unsupported("div by a value that depends on the image")

    def inverse(boxes: list[_Box]) -> _Box:
        value = 1 / boxes[0].lower
        return _outward(_Box(value, value), 1, jnp.abs(value))

    first, second = _each([denominator], inverse)
    inverses = _Pair(first, second, None if denominator.shared else _minus(first, second))
    return _bilinear(jnp.multiply, 1, numerator, inverses)


def _largest(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """The larger (or smaller) of two values: D is between their D's, or is that of the winner."""
    x, y = pairs
    first, second = _each(pairs, partial(_ends, eqn))

    def above(one: _Pair, other: _Pair) -> Array:
        surely = one.first.lower >= other.first.upper
        return surely & (one.second.lower >= other.second.upper)

    def gap() -> _Box:
        dx, dy = x.difference(), y.difference()
        x_wins, y_wins = above(x, y), above(y, x)
        if eqn.primitive.name == "min":
            x_wins, y_wins = y_wins, x_wins
        lower, upper = jnp.minimum(dx.lower, dy.lower), jnp.maximum(dx.upper, dy.upper)
        return _Box(
            jnp.where(x_wins, dx.lower, jnp.where(y_wins, dy.lower, lower)),
            jnp.where(x_wins, dx.upper, jnp.where(y_wins, dy.upper, upper)),
        )

    return _with_gap(first, second, gap)


def _pooled(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """The largest (smallest) entry of a window: D is between the least and the largest D in it."""
    first, second = _each(pairs, partial(_ends, eqn))

    def gap() -> _Box:
        d = pairs[0].difference()
        if eqn.primitive.name.endswith("max"):
            return _Box(-_apply(eqn, [-d.lower]), _apply(eqn, [d.upper]))
        return _Box(_apply(eqn, [d.lower]), -_apply(eqn, [-d.upper]))

    return _with_gap(first, second, gap)


class _Unary(NamedTuple):
    """A function of one number.

    Attributes:
        value, slope: φ and φ'.
        turns: where φ' changes its sign.
        bends: where φ'' does.
    """

    value: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    turns: tuple[float, ...] = ()
    bends: tuple[float, ...] = ()


_ROOT2 = math.sqrt(2.0)


def _bell(x: Any) -> Any:
    return 2 / math.sqrt(math.pi) * jnp.exp(-(x**2))


def _normal_cdf(x: Any) -> Any:
    return jax.scipy.special.erfc(-x / _ROOT2) / 2


_UNARY = {
    "tanh": _Unary(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2, bends=(0.0,)),
    "erf": _Unary(jax.scipy.special.erf, _bell, bends=(0.0,)),
    "erfc": _Unary(jax.scipy.special.erfc, lambda x: -_bell(x), bends=(0.0,)),
    "logistic": _Unary(
        jax.nn.sigmoid, lambda x: jax.nn.sigmoid(x) * jax.nn.sigmoid(-x), bends=(0.0,)
    ),
    "exp": _Unary(jnp.exp, jnp.exp),
}

_GELU = _Unary(
    lambda x: x * _normal_cdf(x),
    lambda x: _normal_cdf(x) + x * _bell(x / _ROOT2) / (2 * _ROOT2),
    turns=(-0.7517915246935645,),
    bends=(-_ROOT2, _ROOT2),
)
"""xΦ(x): its least value is at Φ(x) = −xφ(x), its slope is extreme at ±√2."""

_FUNCTION_ERRORS = 16
"""Machine epsilons of 1 + |φ(x)| that a computed φ or φ' may be off; measured: 5 at most."""


def _range(value: Callable[[Any], Any], inner: Sequence[float], box: _Box) -> _Box:
    """All values on an interval, from its ends and those of the inner extremes that lie in it."""
    points = [box.lower, box.upper, *(jnp.clip(t, box.lower, box.upper) for t in inner)]
    values = value(jnp.stack(points))  # at once: the compiler writes an erfc out each time
    found = _Box(values.min(0), values.max(0))
    return _outward(found, _FUNCTION_ERRORS, 1 + found.size)


def _mapped(function: _Unary, pair: _Pair) -> _Pair:
    """φ of both values; the gap is φ'(ξ)·D with ξ between them."""
    first, second = _each([pair], lambda b: _range(function.value, function.turns, *b))

    def gap() -> _Box:
        x, y, d = pair.first, pair.second, pair.difference()
        hull = _Box(jnp.minimum(x.lower, y.lower), jnp.maximum(x.upper, y.upper))
        slope = _range(function.slope, function.bends, hull)
        corners = jnp.stack([a * b for a in (slope.lower, slope.upper) for b in (d.lower, d.upper)])
        found = _Box(corners.min(0), corners.max(0))
        return _outward(found, 2, found.size)

    return _with_gap(first, second, gap)


def _scaled(factor: float, pair: _Pair) -> _Pair:
    number = jnp.asarray(factor, pair.first.lower.dtype)
    return _bilinear(jnp.multiply, 1, _known(number, number), pair)


_MOVES = (
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "copy"),
    *("slice", "rev", "pad", "concatenate", "stack"),
)

_SPLITS = ("split", "unstack")
"""Moves with several results."""

_RULES: dict[str, Callable[[Any, Sequence[_Pair]], _Pair]] = {
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(("add", "add_any", "reduce_sum", "reduce_window_sum"), _summed),
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated"), _multiplied),
    **dict.fromkeys(("max", "min"), _largest),
    **{f"reduce_{kind}": _pooled for kind in ("max", "min", "window_max", "window_min")},
    **dict.fromkeys(_UNARY, lambda eqn, pairs: _mapped(_UNARY[eqn.primitive.name], *pairs)),
    "convert_element_type": _converted,
    "div": _divided,
    "neg": lambda eqn, pairs: _linear(pairs, lambda boxes: _negative(*boxes)),
    "sub": lambda eqn, pairs: _linear(pairs, lambda boxes: _minus(*boxes)),
}


def _unsupported(name: str) -> InputError:
    return InputError(
        "network",
        expected=f"of the image only {', '.join(sorted((*_RULES, *_SPLITS)))} and calls of such",
        got=f"the operation {name}",
        fix="write the layer with these operations",
    )


# ---------------------------------------------------------------- propagation

_CALLS = ("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")


def _multiple(atom: Any, made: dict[Any, Any]) -> tuple[Any, float]:
    """What an atom is a constant multiple of, and the factor."""
    factor = 1.0
    while not hasattr(atom, "val") and (eqn := made.get(atom)) is not None:
        name, numbers = eqn.primitive.name, [a.val for a in eqn.invars if hasattr(a, "val")]
        others = [a for a in eqn.invars if not hasattr(a, "val")]
        if len(others) != 1 or name not in ("mul", "neg", "copy") or any(map(np.ndim, numbers)):
            break
        factor *= float(np.prod(numbers)) * (-1 if name == "neg" else 1)
        (atom,) = others
    return atom, factor


def _gelu(eqn: Any, made: dict[Any, Any]) -> tuple[Any, float, float] | None:
    """(x, s, t) of a product s·x·erfc(t·x), as exact GELU is traced; None if it is another one."""
    if eqn.primitive.name != "mul":
        return None
    for one, other in (eqn.invars, eqn.invars[::-1]):
        inner = None if hasattr(other, "val") else made.get(other)
        if inner is not None and inner.primitive.name == "erfc":
            (x, s), (base, t) = _multiple(one, made), _multiple(inner.invars[0], made)
            if x is base and t != 0:
                return x, s, t
    return None


def _run(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[_Pair]) -> list[_Pair]:
    """A jaxpr on pairs, as in JAX's guide "Writing custom Jaxpr interpreters in JAX"."""
    values: dict[Any, _Pair] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update((v, _known(c, c)) for v, c in zip(jaxpr.constvars, constants, strict=True))
    made: dict[Any, Any] = {}

    def read(atom: Any) -> _Pair:
        if not hasattr(atom, "val"):
            return values[atom]
        number = jnp.asarray(atom.val)
        return _known(number, number)

    for eqn in jaxpr.eqns:
        pairs, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
        if name in _CALLS:
            body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = getattr(body, "jaxpr", body)  # closed, or open without constants
            outputs = _run(inner, getattr(body, "consts", ()), pairs)
        elif all(pair.known for pair in pairs):
            first = _evaluate(eqn, [pair.first.lower for pair in pairs])
            second = first
            if not all(pair.shared for pair in pairs):
                second = _evaluate(eqn, [pair.second.lower for pair in pairs])
            outputs = [_known(*both) for both in zip(first, second, strict=True)]
        elif (found := _gelu(eqn, made)) is not None:
            x, s, t = found  # with u = −√2·t·x the product is −(√2·s/t)·uΦ(u)
            u = _scaled(-_ROOT2 * t, read(x))
            outputs = [_scaled(-_ROOT2 * s / t, _mapped(_GELU, u))]
        elif name in _SPLITS:
            outputs = [_moved(eqn, pairs, i) for i in range(len(eqn.outvars))]
        elif name in _RULES:
            outputs = [_RULES[name](eqn, pairs)]
        else:
            raise _unsupported(name)
        values.update(zip(eqn.outvars, outputs, strict=True))
        made.update((variable, eqn) for variable in eqn.outvars)
    return [read(atom) for atom in jaxpr.outvars]


def _start(x: Array, threat: Any) -> _Box:
    """One image's threat set: the box around it in the pixel box, and the ball if it is one."""
    epsilon = jnp.asarray(threat.epsilon, x.dtype)
    low, high = ends(threat.bounds, x)
    box = _Box(jnp.clip(x - epsilon, low, high), jnp.clip(x + epsilon, low, high))
    ball = None if isinstance(threat, Linf) else (x, epsilon)
    return _outward(box, 2, box.size)._replace(ball=ball)


@partial(jax.jit, static_argnames="apply")
def _propagated(
    apply: ApplyFn, first: Params, second: Params | None, x: Images, threat: Threat
) -> tuple[Bounds, Bounds]:
    """Bounds [n, c] of the first network's logits, and of its gap to the second (0 without one)."""
    with jax.default_matmul_precision("highest"):
        closed = jax.make_jaxpr(apply)(first, x[:1])
    leaves = jax.tree.leaves(first)
    others = leaves if second is None else jax.tree.leaves(second)
    weights = list(map(_known, leaves, others))

    def one(image: Array) -> tuple[Bounds, Bounds]:
        box = _start(image[None], threat)
        (out,) = _run(closed.jaxpr, closed.consts, [*weights, _Pair(box, box)])
        gap = out.difference()
        return (
            Bounds(out.first.lower[0], out.first.upper[0]),
            Bounds(gap.lower[0], gap.upper[0]),
        )

    return jax.vmap(one)(x)


def _checked(
    apply: ApplyFn, first: Params, second: Params | None, x: Any, threat: Threat
) -> tuple[Bounds, Bounds]:
    """`_propagated`, with checks of what goes in and comes out."""
    if not isinstance(threat, Linf | L2 | StrongL2):
        raise InputError(
            "threat",
            expected="Linf, L2 or StrongL2",
            got=type(threat).__name__,
            fix="use the Linf or L2 threat that contains it",
        )
    check_number("epsilon", float(threat.epsilon), low=0)
    check_images("images", x, threat.bounds)
    if len(x) == 0:
        raise InputError("images", expected="at least one", got="none")
    check_network(apply, first, x)
    if second is not None:
        check_same_tree("second network", second, first)
        check_params(second, "the second network")
    found = _propagated(apply, first, second, jnp.asarray(x), threat)
    check_finite("bounds", found)
    return found


@jax.jit
def _lengths(gap: Bounds) -> PerExample:
    """An upper bound of ‖D‖₂, [n]."""
    size = _Box(*gap).size
    return jnp.linalg.norm(size, axis=1) * (1 + (size.shape[1] + 4) * jnp.finfo(size.dtype).eps)


@jax.jit
def _losses(logits: Bounds, y: Labels) -> Bounds:
    """Bounds [n] of the cross-entropy: it grows with each logit but that of the label."""
    classes = logits.lower.shape[1]
    own = jnp.arange(classes) == y[:, None]

    def loss(own_logits: Array, others: Array) -> Array:
        values = jnp.where(own, own_logits, others)
        label = jnp.sum(jnp.where(own, values, 0), axis=1)
        return jax.nn.logsumexp(values, axis=1) - label

    found = _Box(loss(logits.upper, logits.lower), loss(logits.lower, logits.upper))
    size = 1 + found.size + _Box(*logits).size.max(1)
    found = _outward(found, _FUNCTION_ERRORS + classes, size)
    return Bounds(found.lower, found.upper)


# ---------------------------------------------------------------- what users call


def output_bounds(apply: ApplyFn, params: Params, x: Images | np.ndarray, threat: Threat) -> Bounds:
    """lower ≤ f(z) ≤ upper for every z in B(x), rigorously.

    By interval propagation, so any network of products, sums, moves, pooling and activations
    relu, tanh, erf, logistic, exp and (exact) gelu will do; exact for a linear network.

    Args:
        apply: `(params, z[n, *shape]) -> logits[n, c]`, image by image.
        params: the weights; of a sparse network the effective ones, `masks.effective`.
        x: clean images [n, *shape], inside `threat.bounds`. Their dtype decides the precision:
            the bounds are rigorous in float32 too, but wider.
        threat: `Linf`; `L2`, whose first product uses |w·(z − x)| ≤ ε‖w‖₂; `StrongL2` is bounded
            by its L2 ball.

    Returns:
        `Bounds(lower, upper)`, each [n, c].

    Raises:
        InputError: an operation without a rule (it is named), another threat model, images out of
            range, weights or bounds that are not finite.

    Source: theory P4; interval propagation of networks as in Gowal et al. (2018).

    Example:
        >>> from ntk_awt.threats import Linf
        >>> relu = lambda w, x: jax.nn.relu(x @ w)
        >>> w, x = jnp.array([[2.0], [-1.0]]), jnp.full((1, 2), 0.5)
        >>> bounds = output_bounds(relu, w, x, Linf(0.25))
        >>> print(bounds.lower.round(3), bounds.upper.round(3))
        [[0.]] [[1.25]]
    """
    return _checked(apply, params, None, x, threat)[0]


def gap_bounds(
    apply: ApplyFn, params_a: Params, params_b: Params, x: Images | np.ndarray, threat: Threat
) -> Bounds:
    """lower ≤ D(z) ≤ upper for every z in B(x), D(z) = f(z; θ_a) − f(z; θ_b), rigorously.

    Never wider than the difference of both networks' bounds, and exact for two linear networks.

    Args:
        apply: the function of both networks, as in `output_bounds`.
        params_a, params_b: their (effective) weights, of the same structure.
        x, threat: as in `output_bounds`.

    Returns:
        `Bounds(lower, upper)`, each [n, c].

    Raises:
        InputError: as `output_bounds`, or weights of another structure.

    Source: theory P4.

    Example:
        >>> from ntk_awt.threats import Linf
        >>> apply = lambda w, x: jnp.tanh(x @ w)
        >>> w = jnp.array([[2.0], [-1.0]])
        >>> found = gap_bounds(apply, w, w, jnp.full((1, 2), 0.5), Linf(0.25))
        >>> print(found.lower, found.upper)
        [[0.]] [[0.]]
    """
    return _checked(apply, params_a, params_b, x, threat)[1]


def sup_gap(
    apply: ApplyFn, params_a: Params, params_b: Params, x: Images | np.ndarray, threat: Threat
) -> PerExample:
    """An upper bound of sup_{z ∈ B(x)} ‖D(z)‖₂ for each image, in logits.

    Args:
        apply, params_a, params_b, x, threat: as in `gap_bounds`.

    Returns:
        [n]; exact for linear networks with one logit.

    Raises:
        InputError: as `gap_bounds`.

    Source: theory P4.

    Example:
        >>> from ntk_awt.threats import L2
        >>> apply = lambda w, x: x @ w
        >>> w, v = jnp.array([[3.0], [4.0]]), jnp.zeros((2, 1))
        >>> print(sup_gap(apply, w, v, jnp.full((1, 2), 0.5), L2(0.1)).round(3))  # 3.5 + 0.1·5
        [4.]
    """
    return _lengths(gap_bounds(apply, params_a, params_b, x, threat))


def loss_bounds(
    apply: ApplyFn, params: Params, x: Images | np.ndarray, y: Labels | np.ndarray, threat: Threat
) -> Bounds:
    """lower ≤ ℓ(f(z), y) ≤ upper for every z in B(x), ℓ the cross-entropy in nats.

    The upper one certifies the adversarial risk from above, where an attack bounds it from below.

    Args:
        apply, params, x, threat: as in `output_bounds`.
        y: labels [n], integers.

    Returns:
        `Bounds(lower, upper)`, each [n].

    Raises:
        InputError: as `output_bounds`, or labels out of range.

    Source: theory P4.

    Example:
        >>> from ntk_awt.threats import Linf
        >>> apply, x = (lambda w, x: x @ w), jnp.array([[0.5, 0.5]])
        >>> found = loss_bounds(apply, jnp.eye(2), x, jnp.array([0]), Linf(0.1))
        >>> round(float(found.upper[0]), 3)  # log(1 + e^{0.6 − 0.4})
        0.798
    """
    logits = output_bounds(apply, params, x, threat)
    check_labels("labels", y, len(x), logits.lower.shape[1])
    return _losses(logits, jnp.asarray(y))


def robustness_gap_bound(
    apply: ApplyFn,
    params_a: Params,
    params_b: Params,
    x: Images | np.ndarray,
    threat: Threat,
    *,
    loss: str = "cross_entropy",
) -> Float[Array, ""]:
    """An upper bound of |R_adv(f_a) − R_adv(f_b)|: L_ℓ·(1/n) Σ_i sup_{z ∈ B(x_i)} ‖D(z)‖₂.

    At a maximiser z of ℓ(f_a) in B(x): ℓ(f_a(z)) ≤ ℓ(f_b(z)) + L‖D(z)‖ ≤ max ℓ(f_b) + L sup‖D‖,
    whatever the label, and the same with a and b exchanged. The same bound holds for the mean of
    sup_z |ℓ(f_a(z)) − ℓ(f_b(z))|, which is the larger quantity.

    Args:
        apply, params_a, params_b, x, threat: as in `gap_bounds`.
        loss: in `LIPSCHITZ`: "cross_entropy" of c logits, or "logistic", log(1 + e^{−yf}) with
            y = ±1, of one.

    Returns:
        A number, in nats.

    Raises:
        InputError: as `gap_bounds`, an unknown loss, or the logistic loss with several logits.

    Source: theory P4.

    Example:
        >>> from ntk_awt.threats import Linf
        >>> apply, x = (lambda w, x: x @ w), jnp.array([[0.5, 0.5]])
        >>> w, v = jnp.array([[1.0], [-1.0]]), jnp.zeros((2, 1))
        >>> bound = robustness_gap_bound(apply, w, v, x, Linf(0.1), loss="logistic")
        >>> round(float(bound), 3)
        0.2
    """
    choose("loss", loss, LIPSCHITZ)
    classes = jax.eval_shape(apply, params_a, x).shape[-1]
    if loss == "logistic" and classes != 1:
        raise InputError("logits", expected="one for the logistic loss", got=f"{classes}")
    lengths = sup_gap(apply, params_a, params_b, x, threat)
    rounding = 1 + (len(lengths) + 4) * jnp.finfo(lengths.dtype).eps
    return LIPSCHITZ[loss] * jnp.mean(lengths) * rounding
