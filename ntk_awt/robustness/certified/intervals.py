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
    check_images,
    check_labels,
    check_number,
    check_same_tree,
    choose,
)
from ntk_awt.kernels.engine.program import Step, evaluate
from ntk_awt.network import Network, check_network, check_params
from ntk_awt.theory.dynamics.flow import floats
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

    Truth values are bounded as False < True.

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
    return evaluate(Step(eqn, tuple(range(len(values))), ()), values)


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
    if first is second or first.lower.dtype == jnp.bool_:
        return _Pair(first, second)
    return _Pair(first, second, rule([pair.difference() for pair in pairs]))


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
    wide = jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)
    if not wide or jnp.finfo(new).bits < 32:
        raise _unsupported(f"convert_element_type from {old} to {new}")
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


def _inverse(pair: _Pair) -> _Pair:
    """1/v; NaN where v may be 0. The gap is −D/(v·v')."""

    def rule(boxes: list[_Box]) -> _Box:
        (box,) = boxes
        zero = (box.lower <= 0) & (box.upper >= 0)
        found = _Box(
            jnp.where(zero, jnp.nan, 1 / box.upper), jnp.where(zero, jnp.nan, 1 / box.lower)
        )
        return _outward(found, 1, found.size)

    def gap() -> _Box:
        both = _product(jnp.multiply, 1, first, second)
        return _product(jnp.multiply, 1, _negative(pair.difference()), both)

    first, second = _each([pair], rule)
    return _with_gap(first, second, gap)


def _divided(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    return _bilinear(jnp.multiply, 1, pairs[0], _inverse(pairs[1]))


def _largest(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    return _extreme(eqn.primitive.name, *pairs)


def _clamped(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    low, x, high = pairs
    return _extreme("min", _extreme("max", x, low), high)


def _extreme(name: str, x: _Pair, y: _Pair) -> _Pair:
    """The larger (or smaller) of two values: D is between their D's, or is that of the winner."""
    best = {"max": jnp.maximum, "min": jnp.minimum}[name]
    first, second = _each(
        [x, y], lambda b: _Box(best(b[0].lower, b[1].lower), best(b[0].upper, b[1].upper))
    )

    def above(one: _Pair, other: _Pair) -> Array:
        surely = one.first.lower >= other.first.upper
        return surely & (one.second.lower >= other.second.upper)

    def gap() -> _Box:
        dx, dy = x.difference(), y.difference()
        x_wins, y_wins = above(x, y), above(y, x)
        if name == "min":
            x_wins, y_wins = y_wins, x_wins
        lower, upper = jnp.minimum(dx.lower, dy.lower), jnp.maximum(dx.upper, dy.upper)
        return _Box(
            jnp.where(x_wins, dx.lower, jnp.where(y_wins, dy.lower, lower)),
            jnp.where(x_wins, dx.upper, jnp.where(y_wins, dy.upper, upper)),
        )

    return _with_gap(first, second, gap)


# ---------------------------------------------------------------- cases


def _compared(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """x < y and the like, surely or possibly, by the ends; x ≠ x is how a NaN is asked for."""
    name = eqn.primitive.name
    if eqn.invars[0] is eqn.invars[1]:
        answer = jnp.full(eqn.outvars[0].aval.shape, name in ("eq", "le", "ge"))
        return _known(answer, answer)

    def rule(boxes: list[_Box]) -> _Box:
        x, y = boxes
        if name in ("eq", "ne"):
            apart = (x.lower > y.upper) | (x.upper < y.lower)
            never = jnp.zeros_like(apart)
            return _Box(never, ~apart) if name == "eq" else _Box(apart, ~never)
        small, large = (x, y) if name in ("lt", "le") else (y, x)
        less = jnp.less if name in ("lt", "gt") else jnp.less_equal
        return _Box(less(small.upper, large.lower), less(small.lower, large.upper))

    return _Pair(*_each(pairs, rule))


def _logical(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """and, or, not of truth values."""
    name = eqn.primitive.name
    if eqn.outvars[0].aval.dtype != jnp.bool_:
        raise _unsupported(f"{name} of integers")
    if name == "not":
        return _Pair(*_each(pairs, lambda boxes: _Box(~boxes[0].upper, ~boxes[0].lower)))
    return _Pair(*_each(pairs, partial(_ends, eqn)))


def _finite(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """A value in real arithmetic is finite."""
    answer = jnp.ones(eqn.outvars[0].aval.shape, bool)
    return _known(answer, answer)


def _selected(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """One of two cases: the one that it surely is, or both together."""
    which, *cases = pairs
    if len(cases) != 2 or eqn.invars[0].aval.dtype != jnp.bool_:
        raise _unsupported("select_n by an integer")

    def either(surely: Any, possibly: Any, boxes: Sequence[_Box]) -> _Box:
        no, yes = boxes
        return _Box(
            jnp.where(surely, yes.lower,
                      jnp.where(possibly, jnp.minimum(no.lower, yes.lower), no.lower)),
            jnp.where(surely, yes.upper,
                      jnp.where(possibly, jnp.maximum(no.upper, yes.upper), no.upper)),
        )  # fmt: skip

    def gap() -> _Box:
        one, other = which.first, which.second
        surely, possibly = one.lower & other.lower, one.upper | other.upper
        found = either(surely, possibly, [case.difference() for case in cases])
        if which.shared:  # the same case in both networks
            return found
        mixed = possibly & ~surely
        return _Box(jnp.where(mixed, -jnp.inf, found.lower), jnp.where(mixed, jnp.inf, found.upper))

    first, second = _each(pairs, lambda b: either(b[0].lower, b[0].upper, b[1:]))
    if first.lower.dtype == jnp.bool_:
        return _Pair(first, second)
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
        value, slope: φ and φ', anything between both slopes where φ has a kink; no slope if φ
            jumps.
        turns: where φ' changes its sign.
        bends: where φ'' does, and kinks.
        image: an interval that holds all values.
        errors, least: a computed φ or φ' is off by at most `errors` machine epsilons of
            `least` + |φ|; measured, for the defaults: 5 at most.
    """

    value: Callable[[Any], Any]
    slope: Callable[[Any], Any] | None
    turns: tuple[float, ...] = ()
    bends: tuple[float, ...] = ()
    image: tuple[float, float] = (-math.inf, math.inf)
    errors: float = 16
    least: float = 1


_ROOT2 = math.sqrt(2.0)


def _bell(x: Any) -> Any:
    return 2 / math.sqrt(math.pi) * jnp.exp(-(x**2))


def _normal_cdf(x: Any) -> Any:
    return jax.scipy.special.erfc(-x / _ROOT2) / 2


_sigmoid = jax.nn.sigmoid


def _power(exponent: int) -> _Unary:
    """x^y for a whole number y ≥ 1."""
    even = exponent % 2 == 0
    return _Unary(
        lambda x: x**exponent,
        lambda x: exponent * x ** (exponent - 1),
        turns=(0.0,) if even else (),
        bends=() if even else (0.0,),
        image=(0.0 if even else -math.inf, math.inf),
        errors=2 * exponent,
        least=0,
    )


def _root(exponent: float) -> _Unary:
    """x^c for x ≥ 0 and any c; NaN below 0."""
    return _Unary(
        lambda x: x**exponent,
        lambda x: exponent * x ** (exponent - 1),
        image=(0.0, math.inf),
        errors=64,
        least=0,
    )


_UNARY = {
    "tanh": _Unary(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2, bends=(0.0,), image=(-1, 1)),
    "erf": _Unary(jax.scipy.special.erf, _bell, bends=(0.0,), image=(-1, 1)),
    "erfc": _Unary(jax.scipy.special.erfc, lambda x: -_bell(x), bends=(0.0,), image=(0, 2)),
    "logistic": _Unary(_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x), bends=(0.0,), image=(0, 1)),
    "exp": _Unary(jnp.exp, jnp.exp, image=(0, math.inf)),
    "exp2": _Unary(jnp.exp2, lambda x: math.log(2) * jnp.exp2(x), image=(0, math.inf)),
    "expm1": _Unary(jnp.expm1, jnp.exp, image=(-1, math.inf)),
    "log": _Unary(jnp.log, lambda x: 1 / x),
    "log1p": _Unary(jnp.log1p, lambda x: 1 / (1 + x)),
    "abs": _Unary(jnp.abs, jnp.sign, turns=(0.0,), image=(0, math.inf), errors=0),
    "sign": _Unary(jnp.sign, None, image=(-1, 1), errors=0),
    "square": _power(2),
    "sqrt": _root(0.5)._replace(value=jnp.sqrt),
    "rsqrt": _root(-0.5)._replace(value=jax.lax.rsqrt),
}

_GELU = _Unary(
    lambda x: x * _normal_cdf(x),
    lambda x: _normal_cdf(x) + x * _bell(x / _ROOT2) / (2 * _ROOT2),
    turns=(-0.7517915246935645,),
    bends=(-_ROOT2, _ROOT2),
)
"""xΦ(x): its least value is at Φ(x) = −xφ(x), its slope is extreme at ±√2."""

_FUNCTION_ERRORS = 16
"""Machine epsilons of 1 + |φ(x)| that a logarithm of a sum may be off."""


_SILU = _Unary(
    lambda x: x * _sigmoid(x),
    lambda x: _sigmoid(x) * (1 + x * _sigmoid(-x)),
    turns=(-1.2784645427610737,),
    bends=(-2.3993572805154675, 2.3993572805154675),
)
"""xσ(x)."""


def _tanh_gelu(c: float, k: float) -> _Unary:
    """x(1 + tanh(c(x + kx³)))/2 = xσ(2c(x + kx³)), at GELU's c and k up to rounding."""

    def inner(x: Any) -> Any:
        return 2 * c * (x + k * x**3)

    def slope(x: Any) -> Any:
        gate = _sigmoid(inner(x))
        return gate * (1 + x * _sigmoid(-inner(x)) * 2 * c * (1 + 3 * k * x**2))

    return _Unary(
        lambda x: x * _sigmoid(inner(x)),
        slope,
        turns=(-0.7524614220710161,),
        bends=(-1.4185040087908283, 1.4185040087908283),
    )


def _leaky(slope: Any = 0.01) -> _Unary:
    return _Unary(
        lambda x: jnp.where(x >= 0, x, slope * x),
        lambda x: jnp.where(x >= 0, 1, slope * jnp.ones_like(x)),
        turns=(0.0,),
        errors=2,
        least=0,
    )


def _elu(scale: Any = 1.0) -> _Unary:
    return _Unary(
        lambda x: jnp.where(x > 0, x, scale * jnp.expm1(jnp.minimum(x, 0))),
        lambda x: jnp.where(x > 0, 1, scale * jnp.exp(jnp.minimum(x, 0))),
        turns=(0.0,),
        bends=(0.0,),
    )


def _softplus() -> _Unary:
    return _Unary(jax.nn.softplus, _sigmoid, image=(0, math.inf))


def _mish() -> _Unary:
    """x·tanh(s) with s = softplus(x); φ' = tanh(s) + xσ(x)/cosh²(s)."""

    def slope(x: Any) -> Any:
        s = jax.nn.softplus(x)
        return jnp.tanh(s) + x * _sigmoid(x) / jnp.cosh(s) ** 2

    return _Unary(
        lambda x: x * jnp.tanh(jax.nn.softplus(x)),
        slope,
        turns=(-1.1924312145154954,),
        bends=(-2.256376396360793, 1.4905711794854284),
    )


def _hard_silu() -> _Unary:
    """x·min(max(x + 3, 0), 6)/6."""
    return _Unary(
        lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
        lambda x: jnp.where(x < -3, 0, jnp.where(x > 3, 1, x / 3 + 0.5)),
        turns=(-1.5,),
        bends=(-3.0, 3.0),
    )


def _hard_tanh() -> _Unary:
    return _Unary(
        lambda x: jnp.clip(x, -1, 1),
        lambda x: jnp.where(jnp.abs(x) <= 1, jnp.ones_like(x), 0),
        bends=(-1.0, 1.0),
        errors=0,
    )


def _soft_sign() -> _Unary:
    return _Unary(
        lambda x: x / (1 + jnp.abs(x)), lambda x: (1 + jnp.abs(x)) ** -2.0, bends=(0.0,),
        image=(-1, 1),
    )  # fmt: skip


_ACTIVATIONS: dict[str, tuple[Callable[..., Any], Callable[..., _Unary]]] = {
    "leaky_relu": (jax.nn.leaky_relu, _leaky),
    "elu": (jax.nn.elu, _elu),
    "softplus": (jax.nn.softplus, _softplus),
    "mish": (jax.nn.mish, _mish),
    "hard_silu": (jax.nn.hard_silu, _hard_silu),
    "hard_tanh": (jax.nn.hard_tanh, _hard_tanh),
    "soft_sign": (jax.nn.soft_sign, _soft_sign),
}
"""JAX's functions that trace to a call of that name, each with itself as a function of x.

Operation by operation they would be bounded too, but not tightly: x enters more than once.
"""


def _range(
    value: Callable[[Any], Any],
    inner: Sequence[float],
    box: _Box,
    errors: float = 16,
    least: float = 1,
) -> _Box:
    """All values on an interval, from its ends and those of the inner extremes that lie in it."""
    points = [box.lower, box.upper, *(jnp.clip(t, box.lower, box.upper) for t in inner)]
    values = value(jnp.stack(points))  # at once: the compiler writes an erfc out each time
    found = _Box(values.min(0), values.max(0))
    return _outward(found, errors, least + found.size) if errors else found


def _clipped(box: _Box, low: float, high: float) -> _Box:
    return _Box(jnp.clip(box.lower, low, high), jnp.clip(box.upper, low, high))


def _mapped(function: _Unary, pair: _Pair) -> _Pair:
    """φ of both values; the gap is φ'(ξ)·D with ξ between them."""
    slope, errors, least = function.slope, function.errors, function.least

    def rule(boxes: list[_Box]) -> _Box:
        found = _range(function.value, function.turns, boxes[0], errors, least)
        return _clipped(found, *function.image)

    first, second = _each([pair], rule)

    def gap() -> _Box:
        x, y, d = pair.first, pair.second, pair.difference()
        hull = _Box(jnp.minimum(x.lower, y.lower), jnp.maximum(x.upper, y.upper))
        if slope is None:
            unknown = jnp.full_like(hull.lower, jnp.inf)
            return _Box(-unknown, unknown)
        slopes = _range(slope, function.bends, hull, errors, least)
        corners = jnp.stack(
            [a * b for a in (slopes.lower, slopes.upper) for b in (d.lower, d.upper)]
        )
        found = _Box(corners.min(0), corners.max(0))
        found = _outward(found, 2, found.size)
        # A slope of ∞, as of a root at 0, says nothing.
        nothing = jnp.isnan(found.lower) | jnp.isnan(found.upper)
        return _Box(
            jnp.where(nothing, -jnp.inf, found.lower), jnp.where(nothing, jnp.inf, found.upper)
        )

    return _with_gap(first, second, gap)


def _to_a_number(eqn: Any, pairs: Sequence[_Pair]) -> _Pair:
    """x^y for a number y."""
    if eqn.primitive.name == "integer_pow":
        exponent = eqn.params["y"]
    elif hasattr(eqn.invars[1], "val") and not np.ndim(eqn.invars[1].val):
        exponent = float(eqn.invars[1].val)
    else:
        raise _unsupported("pow with an exponent that is no number")
    if exponent != int(exponent):
        return _mapped(_root(exponent), pairs[0])
    size = abs(int(exponent))
    found = _mapped(_power(size), pairs[0]) if size else _scaled(0.0, pairs[0])
    if size == 0:
        one = jnp.ones_like(found.first.lower)
        return _known(one, one)
    return _inverse(found) if exponent < 0 else found


# ---------------------------------------------------------------- softmax


def _others(box: _Box, axis: int, *, least: bool) -> Array:
    """For each entry i: log Σ_j exp(f_j − f_i), at its least or largest value over the box."""
    f, rest = (box.upper, box.lower) if least else (box.lower, box.upper)
    f, rest = jnp.moveaxis(f, axis, -1), jnp.moveaxis(rest, axis, -1)
    size = f.shape[-1]
    same = jnp.eye(size, dtype=bool).reshape(*[1] * (f.ndim - 1), size, size)
    gaps = jnp.where(same, 0, rest[..., None, :] - f[..., :, None])
    return jnp.moveaxis(jax.nn.logsumexp(gaps, -1), -1, axis)


def _log_softmax(pair: _Pair, axis: int) -> _Pair:
    """f_i − log Σ_j e^{f_j}: grows with f_i, falls with the others; D is D_i less a mean of D."""

    def rule(boxes: list[_Box]) -> _Box:
        low, high = (-_others(boxes[0], axis, least=least) for least in (False, True))
        found = _Box(low, high)
        size = 1 + found.size + boxes[0].size.max(axis, keepdims=True)
        found = _outward(found, _FUNCTION_ERRORS + found.lower.shape[axis], size)
        return _clipped(found, -math.inf, 0)

    first, second = _each([pair], rule)
    return _with_gap(first, second, lambda: _from_mean(pair, axis))


def _from_mean(pair: _Pair, axis: int) -> _Box:
    """D_i less any weighted mean of all D_j."""
    d = pair.difference()
    mean = _Box(d.lower.min(axis, keepdims=True), d.upper.max(axis, keepdims=True))
    return _minus(d, mean)


def _softmax(pair: _Pair, axis: int) -> _Pair:
    """e^{f_i}/Σ_j e^{f_j}; D = p_i·(D_i − Σ_j p_j D_j), p at some point between."""
    logs = _log_softmax(pair, axis)
    first, second = _each(
        [logs],
        lambda boxes: _clipped(_range(jnp.exp, (), boxes[0]), 0, 1),
    )

    def gap() -> _Box:
        x, y = pair.first, pair.second
        hull = _Box(jnp.minimum(x.lower, y.lower), jnp.maximum(x.upper, y.upper))
        between = _softmax(_Pair(hull, hull), axis).first
        return _product(jnp.multiply, 1, between, _from_mean(pair, axis))

    return _with_gap(first, second, gap)


def _scaled(factor: float, pair: _Pair) -> _Pair:
    number = jnp.asarray(factor, pair.first.lower.dtype)
    return _bilinear(jnp.multiply, 1, _known(number, number), pair)


_MOVES = (
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "copy"),
    *("slice", "rev", "pad", "concatenate", "stack", "tile", "stop_gradient"),
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
    **dict.fromkeys(("integer_pow", "pow"), _to_a_number),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compared),
    **dict.fromkeys(("and", "or", "not"), _logical),
    "clamp": _clamped,
    "convert_element_type": _converted,
    "div": _divided,
    "is_finite": _finite,
    "neg": lambda eqn, pairs: _linear(pairs, lambda boxes: _negative(*boxes)),
    "select_n": _selected,
    "sub": lambda eqn, pairs: _linear(pairs, lambda boxes: _minus(*boxes)),
}


def _unsupported(name: str) -> InputError:
    return InputError(
        "network",
        expected=f"of the image only {', '.join(sorted((*_RULES, *_SPLITS)))} and calls of such",
        got=f"the operation {name}",
        fix="write the layer with these operations, or use attacks, which need no bounds",
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


def _made_by(name: str, atom: Any, made: dict[Any, Any]) -> Any:
    """The operation of that name that an atom comes from, or None."""
    eqn = None if hasattr(atom, "val") else made.get(atom)
    return eqn if eqn is not None and eqn.primitive.name == name else None


def _other(eqn: Any, number: float | None = None) -> tuple[Any, float]:
    """Of a sum or product of a number and a variable both, the variable first; (None, 0) else."""
    numbers = [atom for atom in eqn.invars if hasattr(atom, "val") and not np.ndim(atom.val)]
    others = [atom for atom in eqn.invars if not hasattr(atom, "val")]
    if len(numbers) != 1 or len(others) != 1:
        return None, 0.0
    found = float(numbers[0].val)
    return (others[0], found) if number in (None, found) else (None, 0.0)


def _gated(eqn: Any, made: dict[Any, Any], read: Callable[[Any], _Pair]) -> _Pair | None:
    """s·x·erfc(t·x), s·x·σ(t·x) and tanh-GELU as functions of x; None for another operation."""
    if eqn.primitive.name != "mul":
        return None
    for one, other in (eqn.invars, eqn.invars[::-1]):
        if hasattr(one, "val") or hasattr(other, "val"):
            continue
        (x, s), (gate, factor) = _multiple(one, made), _multiple(other, made)
        s *= factor
        for name in ("erfc", "logistic"):
            if (inner := _made_by(name, gate, made)) is not None:
                base, t = _multiple(inner.invars[0], made)
                if base is not x or t == 0:
                    continue
                if name == "logistic":  # with u = t·x it is (s/t)·uσ(u)
                    return _scaled(s / t, _mapped(_SILU, _scaled(t, read(x))))
                u = _scaled(-_ROOT2 * t, read(x))  # and here −(√2·s/t)·uΦ(u), u = −√2·t·x
                return _scaled(-_ROOT2 * s / t, _mapped(_GELU, u))
        constants = _tanh_gate(gate, x, made)
        if constants is not None:
            return _scaled(2 * s, _mapped(_tanh_gelu(*constants), read(x)))
    return None


def _tanh_gate(gate: Any, x: Any, made: dict[Any, Any]) -> tuple[float, float] | None:
    """(c, k) of 1 + tanh(c(x + kx³)), if they are those of GELU; else None."""
    if (one := _made_by("add", gate, made)) is None:
        return None
    if (tanh := _made_by("tanh", _other(one, 1.0)[0], made)) is None:
        return None
    total, c = _multiple(tanh.invars[0], made)
    if (total := _made_by("add", total, made)) is None:
        return None
    for base, cube in (total.invars, total.invars[::-1]):
        term, k = _multiple(cube, made) if not hasattr(cube, "val") else (None, 0.0)
        power = None if term is None else _made_by("integer_pow", term, made)
        if base is not x or power is None or power.params["y"] != 3 or power.invars[0] is not x:
            continue
        if np.allclose((c, k), (math.sqrt(2 / math.pi), 0.044715), rtol=1e-6, atol=0):
            return c, k
    return None


def _reduced(atom: Any, name: str, made: dict[Any, Any]) -> tuple[Any, int] | None:
    """(terms, axis) of a sum over one axis, or a function `name` of it, that keeps the axis."""
    shape = atom.aval.shape
    for wrapped in ("broadcast_in_dim", "reshape"):
        if (eqn := _made_by(wrapped, atom, made)) is not None:
            atom = eqn.invars[0]
    if name:
        if (eqn := _made_by(name, atom, made)) is None:
            return None
        atom = eqn.invars[0]
        for wrapped in ("broadcast_in_dim", "reshape"):
            if (inner := _made_by(wrapped, atom, made)) is not None:
                atom = inner.invars[0]
    if (total := _made_by("reduce_sum", atom, made)) is None or len(total.params["axes"]) != 1:
        return None
    (terms,), (axis,) = total.invars, total.params["axes"]
    kept = (*terms.aval.shape[:axis], 1, *terms.aval.shape[axis + 1 :])
    return (terms, axis) if shape == kept else None


def _normalised(eqn: Any, made: dict[Any, Any], read: Callable[[Any], _Pair]) -> _Pair | None:
    """softmax as e/Σe and log-softmax as f − log Σ e^f; None for another operation."""
    if eqn.primitive.name not in ("div", "sub") or any(hasattr(a, "val") for a in eqn.invars):
        return None
    top, bottom = eqn.invars
    softmax = eqn.primitive.name == "div"
    if (found := _reduced(bottom, "" if softmax else "log", made)) is None:
        return None
    terms, axis = found
    if (exp := _made_by("exp", terms, made)) is None or top is not (
        terms if softmax else exp.invars[0]
    ):
        return None
    logits = exp.invars[0]
    # What is the same for all entries of the axis, like their maximum, falls out.
    if (shift := _made_by("sub", logits, made)) is not None:
        (base, level), wanted = shift.invars, logits.aval.shape
        size = level.aval.shape
        if base.aval.shape == wanted and (not size or size[axis] == 1):
            logits = base
    return (_softmax if softmax else _log_softmax)(read(logits), axis)


def _activation(eqn: Any, pairs: Sequence[_Pair]) -> _Unary | None:
    """A call of one of `_ACTIVATIONS`, if its program is that of JAX's own function."""
    name, parameters = eqn.params.get("name"), pairs[1:]
    fixed = all(pair.known and pair.shared and not pair.first.lower.ndim for pair in parameters)
    if name not in _ACTIVATIONS or not fixed or pairs[0].known:
        return None
    function, build = _ACTIVATIONS[name]
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in eqn.invars
    ]
    calls = jax.make_jaxpr(function)(*shapes).eqns
    same = len(calls) == 1 and str(calls[0].params.get("jaxpr")) == str(eqn.params.get("jaxpr"))
    dtype = pairs[0].first.lower.dtype
    return build(*(p.first.lower.astype(dtype) for p in parameters)) if same else None


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
        if name in _CALLS and (function := _activation(eqn, pairs)) is not None:
            outputs = [_mapped(function, pairs[0])]
        elif name in _CALLS:
            body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = getattr(body, "jaxpr", body)  # closed, or open without constants
            outputs = _run(inner, getattr(body, "consts", ()), pairs)
        elif all(pair.known for pair in pairs):
            first = _evaluate(eqn, [pair.first.lower for pair in pairs])
            second = first
            if not all(pair.shared for pair in pairs):
                second = _evaluate(eqn, [pair.second.lower for pair in pairs])
            outputs = [_known(*both) for both in zip(first, second, strict=True)]
        elif (found := _gated(eqn, made, read) or _normalised(eqn, made, read)) is not None:
            outputs = [found]
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
    check_network(Network(apply, first), x)
    if second is not None:
        check_same_tree("second network", second, first)
        check_params(second, "the second network")
    (images,) = floats(images=x)
    found = _propagated(apply, first, second, images, threat)
    if not all(bool(jnp.isfinite(end).all()) for end in jax.tree.leaves(found)):
        raise InputError(
            "bounds",
            expected="finite ones",
            got="NaN or infinity",
            fix="a division, root or logarithm may leave its domain, or the values grow too large: "
            "lower the radius",
        )
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
    own = jnp.arange(classes)[None] == y[:, None]

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

    By interval propagation, so any network of products, sums, moves, pooling, powers, divisions,
    comparisons and functions like exp, log, tanh, erf and abs will do; exact for a linear network.
    A function of JAX in which x enters more than once is bounded as a whole: relu, leaky_relu, elu,
    selu, silu, gelu (both), mish, softplus, softmax, log_softmax, soft_sign and the hard ones.
    Other compositions are bounded operation by operation, which may be loose; so is one's own
    `where(x > 0, …)`.

    Args:
        apply: `(params, z[n, *shape]) -> logits[n, c]`, image by image.
        params: the weights; of a sparse network the effective ones, `masks.effective`.
        x: clean images [n, *shape], inside `threat.bounds`. Their dtype decides the precision:
            the bounds are rigorous in float32 too, but wider.
        threat: `Linf`; `L2`, whose first product uses |w·(z − x)| ≤ ε‖w‖₂; `StrongL2` is bounded
            by its L2 ball. Its bounds may be infinite, or one pair for each channel.

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
    gap = gap_bounds(apply, params_a, params_b, x, threat)
    classes = gap.lower.shape[1]
    if loss == "logistic" and classes != 1:
        raise InputError("logits", expected="one for the logistic loss", got=f"{classes}")
    lengths = _lengths(gap)
    rounding = 1 + (len(lengths) + 4) * jnp.finfo(lengths.dtype).eps
    return LIPSCHITZ[loss] * jnp.mean(lengths) * rounding
