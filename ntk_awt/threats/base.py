"""Threat models: the set B(x) of allowed images around x, and the moves an attack needs in it.

A threat model is a pytree whose radii are leaves, so an attack compiled once serves every radius.
Each set is a ball around x intersected with the pixel box, which counts x itself as inside. The
strong threat model also limits the part of the perturbation that lies in a signal subspace. The
constraints hold in real arithmetic, not up to rounding: radii and the box are rounded inwards by
the bounds given below, and x + v towards x, so a float64 check finds ‖x̃ − x‖ ≤ ε and x̃ in the box
without any slack, however large the pixels are.
"""

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.app.config import ThreatConfig
from ntk_awt.errors import InputError, check_finite, check_number, choose
from ntk_awt.types import Box, Images, Key, PerExample

_UNIT_ROUNDOFF = 2.0**-24  # of float32


class Threat(Protocol):
    """What every threat model offers; images are [n, *shape], float32.

    Attributes:
        epsilon: radius, in pixel units; a traced scalar inside jit.
        bounds: the pixel box (low, high), see `types.Box`.
    """

    @property
    def epsilon(self) -> Any: ...

    @property
    def bounds(self) -> Box: ...

    def project(self, z: Images, x: Images) -> Images:
        """A point of B(x) near z; z itself if it lies in B(x) (rounded inwards)."""
        ...

    def random_start(self, keys: Key, x: Images) -> Images:
        """A random point of B(x) for each image, from one key an image."""
        ...

    def sphere_start(self, keys: Key, x: Images) -> Images:
        """A random direction for each image, of length ε, projected to B(x)."""
        ...

    def ascent(self, gradient: Images) -> Images:
        """The step v/ε to the maximiser v of ⟨gradient, v⟩ in the set without the box.

        So it has unit norm in a ball, and 0 for a zero gradient.
        """
        ...

    def distance(self, z: Images, x: Images) -> PerExample:
        """‖z − x‖ in the norm of the ball, for each image."""
        ...

    def gauge(self, z: Images, x: Images) -> PerExample:
        """The smallest r for which z is in the set (without the box) of r times all radii."""
        ...


Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Make a threat model a pytree: the bounds and the type are static, other fields are leaves.

    Not `jax.tree_util.register_dataclass`: with it, JAX 0.10 finds the structures of two classes
    with equal static fields equal, and jit may run the program of the other class.
    """
    leaves = [field.name for field in fields(cls) if field.name != "bounds"]

    def flatten(threat: Any) -> tuple[tuple[Any, ...], tuple[type, Box]]:
        return tuple(getattr(threat, name) for name in leaves), (cls, threat.bounds)

    def unflatten(static: tuple[type, Box], values: Any) -> Any:
        # Not through __init__: its checks are for users, and JAX also puts placeholders here.
        threat = object.__new__(cls)
        for name, value in zip([*leaves, "bounds"], [*values, static[1]], strict=True):
            object.__setattr__(threat, name, value)
        return threat

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


def _round_down(epsilon: Any) -> Any:
    """A Python number as the largest float32 not above it; arrays and tracers as they are."""
    if not isinstance(epsilon, int | float):
        return epsilon
    rounded = np.float32(epsilon)
    return rounded if float(rounded) <= epsilon else np.nextafter(rounded, np.float32(0))


def _as_box(bounds: Any) -> Box:
    """Bounds as floats, or nested tuples of them for arrays, which jit can compile in.

    Raises:
        InputError: not two of them, or a lowest value that is not at most the highest one.
    """

    def frozen(values: Any) -> Any:
        return tuple(map(frozen, values)) if isinstance(values, list) else values

    try:
        low, high = (np.asarray(bound, np.float64) for bound in bounds)
        if np.all(low <= high) and np.all(low < np.inf) and np.all(high > -np.inf):
            return frozen(low.tolist()), frozen(high.tolist())
    except (TypeError, ValueError):  # of another length, no numbers, shapes that don't broadcast
        pass
    raise InputError(
        "bounds",
        expected="(low, high) with low ≤ high, numbers or arrays that broadcast to an image",
        got=f"{bounds}".replace("\n", ""),
    )


def ends(bounds: Box, x: Images) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest value that each pixel of B(x) may have, in the dtype of x.

    They are those of the box, rounded inwards, or x itself where it lies beyond: images that were
    scaled in float32 may be outside by a rounding (`errors.check_images` allows no more), and
    must not move. So always low ≤ x ≤ high.

    Args:
        bounds: the pixel box.
        x: clean images [n, *shape].

    Returns:
        Two arrays [n, *shape].

    Example:
        >>> low, high = ends((0.0, [0.5, 1.0]), jnp.array([[0.25, 0.25], [-1e-9, 0.25]]))
        >>> print(low, high)
        [[ 0.e+00  0.e+00]
         [-1.e-09  0.e+00]] [[0.5 1. ]
         [0.5 1. ]]
    """

    def inwards(bound: Any, towards: float) -> jax.Array:
        exact = np.asarray(bound, np.float64)
        with np.errstate(over="ignore"):
            near = exact.astype(x.dtype)
        beyond = near.astype(np.float64) < exact if towards > 0 else near > exact
        rounded = np.where(beyond, np.nextafter(near, near.dtype.type(towards)), near)
        return jnp.asarray(rounded.reshape((1,) * (x.ndim - exact.ndim) + exact.shape))

    low, high = bounds
    return jnp.minimum(inwards(low, np.inf), x), jnp.maximum(inwards(high, -np.inf), x)


def corners(bounds: Box, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The darkest and the brightest image of a box, [*shape], float64; infinite where it is open.

    Example:
        >>> corners(([0.0, -1.0], 2.0), (1, 2))
        (array([[ 0., -1.]]), array([[2., 2.]]))
    """
    low, high = (np.broadcast_to(np.asarray(bound, np.float64), shape) for bound in bounds)
    return low, high


def length_of(threat: Threat, v: Any) -> float:
    """‖v‖ of one perturbation [*shape], in the norm of the ball.

    Example:
        >>> length_of(L2(0.1), np.array([3.0, 4.0]))
        5.0
    """
    v = jnp.asarray(v)[None]
    return float(threat.distance(v, jnp.zeros_like(v))[0])


def diameter(threat: Threat, shape: tuple[int, ...]) -> float:
    """The longest way in the box: a larger ε allows no more. ∞ where the box is open.

    Args:
        threat: gives the norm and the box.
        shape: of an image.

    Example:
        >>> diameter(Linf(0.1), (2, 2)), diameter(L2(0.1), (2, 2))
        (1.0, 2.0)
    """
    low, high = corners(threat.bounds, shape)
    return length_of(threat, high - low)


def _warn_of_large_radius(threat: Threat, shape: tuple[int, ...], stacklevel: int) -> None:
    epsilon, longest = float(threat.epsilon), diameter(threat, shape)
    if epsilon > longest * (1 + 1e-6):  # beside the rounding of the diameter
        warnings.warn(
            f"epsilon {epsilon:g} is larger than the pixel box, where every image is allowed from "
            f"{longest:g} on: give it in the unit of the pixels, {epsilon:g}/255 of a range [0, 1] "
            f"is {epsilon / 255:.3g}",
            stacklevel=stacklevel + 1,
        )


def check_kind(threat: Any) -> None:
    """Raise unless it is a threat model, with a radius, a box and a projection.

    Raises:
        InputError: something else, e.g. one of `ntk_awt.theory.linear`, which has no box.
    """
    if not all(hasattr(threat, name) for name in ("epsilon", "bounds", "project")):
        raise InputError(
            "threat", expected="threats.Linf, L2 or StrongL2", got=type(threat).__name__
        )


def check_threat(threat: Threat, x: np.ndarray) -> None:
    """Refuse a radius that is none; warn, in one line, of one that does not fit the images.

    Warned of: an ε larger than the box, where every image is allowed, and radii that are lost in
    the rounding of the images, which then stay as they are and seem to be robust. Float32 cannot
    change a pixel by less than its spacing there; a perturbation that is even over d pixels changes
    each one by ε in L∞ and by ε/√d in L2.

    Args:
        threat: the threat model.
        x: clean images [n, *shape], n ≥ 1, in the dtype in which they are attacked.

    Raises:
        InputError: a negative radius, or one that is not finite.
    """
    check_number("epsilon", float(threat.epsilon), low=0)
    if float(threat.epsilon) == 0:
        return
    _warn_of_large_radius(threat, x.shape[1:], stacklevel=2)
    even = float(threat.epsilon) / length_of(threat, np.ones(x.shape[1:]))
    largest = max(abs(x.min()), abs(x.max()))
    if np.spacing(largest) > even:
        stuck = float(np.mean(np.spacing(np.abs(x)) > even))
        if stuck > 0.5:
            warnings.warn(
                f"epsilon {float(threat.epsilon):g}: {stuck:.0%} of the pixels are so large, up to "
                f"{largest:.3g}, that {x.dtype} cannot change them by {even:.2g}, and stay as they "
                "are: scale the images down",
                stacklevel=2,
            )
    if isinstance(threat, StrongL2):
        norms = np.linalg.norm(x.reshape(len(x), -1), axis=1)
        brightest = jnp.asarray(x[[norms.argmax()]])
        if float(threat._widths(brightest)[1].min()) == 0:
            warnings.warn(
                f"delta {float(threat.delta):g} is below the rounding of the images, which may "
                "stay as they are: scale them down, or use a larger delta",
                stacklevel=2,
            )


def _rows(x: Images) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _norms(v: Images) -> jax.Array:
    """L2 norm of each image, shaped to broadcast against the images."""
    return jnp.linalg.norm(_rows(v), axis=1).reshape(-1, *[1] * (v.ndim - 1))


def _over(a: Any, b: jax.Array) -> jax.Array:
    """a/b, and a itself where b = 0."""
    return a / jnp.where(b > 0, b, 1.0)


def _parts(length: jax.Array, radius: Any) -> jax.Array:
    """length/radius; 0 where the length is 0, and ∞ beyond a radius of 0."""
    return jnp.where(length > 0, length / radius, 0.0)


def _down_to(limit: jax.Array, length: jax.Array) -> jax.Array:
    """The factor that brings a length down to a limit, 1 below it."""
    return jnp.where(length > limit, _over(limit, length), 1.0)


def _largest_is_one(v: Images) -> Images:
    """Each image over its largest |entry|: the square of a small number would underflow."""
    largest = jnp.max(jnp.abs(_rows(v)), axis=1).reshape(-1, *[1] * (v.ndim - 1))
    return _over(v, largest)


def _unit(v: Images) -> Images:
    """v/‖v‖₂ for each image, or 0 where v is 0."""
    scaled = _largest_is_one(v)
    return _over(scaled, _norms(scaled))


def _on_unit_sphere(keys: Key, x: Images) -> Images:
    """For each image a random direction, uniform on the L2 sphere of radius 1."""

    def draw(key: Key) -> jax.Array:
        return jax.random.normal(jax.random.split(key)[0], x.shape[1:], x.dtype)

    return _unit(jax.vmap(draw)(keys))


def _uniform_in_unit_ball(keys: Key, x: Images) -> Images:
    """For each image a random direction times u^(1/d): uniform in the L2 ball of radius 1."""
    size = math.prod(x.shape[1:])

    def radius(key: Key) -> jax.Array:
        return jax.random.uniform(jax.random.split(key)[1], (), x.dtype) ** (1.0 / size)

    return jax.vmap(radius)(keys).reshape(-1, *[1] * (x.ndim - 1)) * _on_unit_sphere(keys, x)


def _in_dtype(radius: Any, x: Images) -> jax.Array:
    return jnp.asarray(radius).astype(x.dtype)


def _inner_radius(epsilon: Any, x: Images) -> jax.Array:
    """ε less the rounding errors of a length: what measures no more is no longer than ε; 0 below.

    The sum of d squares errs by at most about √d units of roundoff (pairwise summation errs less),
    the differences z − x, the root, the scaling and the sum x + v by one each. Squares below 2⁻¹²⁶,
    the smallest normal float32, may be lost: of d of them, √d·2⁻⁶³ of the length at most. The size
    of x does not enter, see `_towards`.
    """
    root = math.sqrt(math.prod(x.shape[1:]))
    relative = 4 * (root + 4) * _UNIT_ROUNDOFF
    return jnp.maximum(_in_dtype(epsilon, x) * (1 - relative) - root * 2.0**-63, 0.0)


def _towards(x: Images, v: Images) -> Images:
    """x + v, each entry rounded towards x: none is further from x than v, but for a relative u.

    The nearest float to x + v may lie beyond it, by half the spacing of floats there, whatever the
    length of v; its neighbour on the side of x does not.
    """
    z = x + v
    return jnp.where(jnp.abs(z - x) > jnp.abs(v), jnp.nextafter(z, x), z)


@dataclass(frozen=True)
class _Ball:
    """Radius and pixel box of a threat model."""

    epsilon: Any
    bounds: Box = (0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, "epsilon", _round_down(self.epsilon))
        object.__setattr__(self, "bounds", _as_box(self.bounds))

    def distance(self, z: Images, x: Images) -> PerExample:
        """‖z − x‖₂."""
        return jnp.linalg.norm(_rows(z) - _rows(x), axis=1)

    def gauge(self, z: Images, x: Images) -> PerExample:
        """‖z − x‖/ε."""
        return _parts(self.distance(z, x), _in_dtype(self.epsilon, x))


@register
@dataclass(frozen=True)
class Linf(_Ball):
    """B(x) = {z in the box: max_i |z_i − x_i| ≤ ε}."""

    def project(self, z: Images, x: Images) -> Images:
        """Clip to [x − ε, x + ε] and the box: the Euclidean and the L∞ projection at once.

        Each end is moved one float towards x, since x ± ε is rounded to the nearest float.
        """
        epsilon, infinity = _in_dtype(self.epsilon, x), jnp.asarray(jnp.inf, x.dtype)
        low = jnp.minimum(jnp.nextafter(x - epsilon, infinity), x)
        high = jnp.maximum(jnp.nextafter(x + epsilon, -infinity), x)
        return jnp.clip(jnp.clip(z, low, high), *ends(self.bounds, x))

    def random_start(self, keys: Key, x: Images) -> Images:
        """Uniform in the ball, then projected."""
        return self.project(x + _in_dtype(self.epsilon, x) * self._in_unit_ball(keys, x), x)

    def sphere_start(self, keys: Key, x: Images) -> Images:
        """Uniform in the ball, scaled to its surface, then projected."""
        noise = _largest_is_one(self._in_unit_ball(keys, x))
        return self.project(x + _in_dtype(self.epsilon, x) * noise, x)

    @staticmethod
    def _in_unit_ball(keys: Key, x: Images) -> Images:
        return jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1.0, 1.0))(keys)

    def ascent(self, gradient: Images) -> Images:
        """sign(gradient)."""
        return jnp.sign(gradient)

    def distance(self, z: Images, x: Images) -> PerExample:
        """max_i |z_i − x_i|."""
        return jnp.max(jnp.abs(_rows(z) - _rows(x)), axis=1)


@register
@dataclass(frozen=True)
class L2(_Ball):
    """B(x) = {z in the box: ‖z − x‖₂ ≤ ε}."""

    def project(self, z: Images, x: Images) -> Images:
        """Scale z − x into the ball, then clip to the box; idempotent up to that rounding.

        Clipping moves every coordinate towards x, which is in the box, so it keeps the ball.
        """
        v = z - x
        norms, radius = _norms(v), _inner_radius(self.epsilon, x)
        scale = _down_to(radius, norms)
        moved = jnp.where(scale < 1, _towards(x, v * scale), z)
        # Where the squares of the norm underflow only x is left.
        return jnp.clip(jnp.where(radius > 0, moved, x), *ends(self.bounds, x))

    def random_start(self, keys: Key, x: Images) -> Images:
        """Uniform in the ball, then projected."""
        step = _in_dtype(self.epsilon, x) * _uniform_in_unit_ball(keys, x)
        return self.project(x + step, x)

    def sphere_start(self, keys: Key, x: Images) -> Images:
        """Uniform on the sphere, then projected."""
        return self.project(x + _in_dtype(self.epsilon, x) * _on_unit_sphere(keys, x), x)

    def ascent(self, gradient: Images) -> Images:
        """gradient / ‖gradient‖₂, or 0 where the gradient is 0."""
        return _unit(gradient)


# ---------------------------------------------------------------- the strong threat model

_ROUNDS = 20
"""Rounds of Dykstra's algorithm in `StrongL2.project`; see there."""

_REACH = 2.0
"""What is more radii away from the set is first drawn nearer: Dykstra's algorithm is slow there."""


def orthonormal(basis: Any) -> np.ndarray:
    """An orthonormal basis of the same span, by a QR decomposition in float64.

    Args:
        basis: [d, k], linearly independent columns, k ≤ d.

    Returns:
        [d, k] with UᵀU = I, float64.

    Raises:
        InputError: another shape, NaN or infinity, or dependent columns.

    Example:
        >>> orthonormal([[3.0], [4.0]]).round(3)
        array([[0.6],
               [0.8]])
    """
    values = np.asarray(basis, np.float64)
    if values.ndim != 2 or not 1 <= values.shape[1] <= values.shape[0]:
        raise InputError(
            "basis",
            expected="directions as columns of an array [d, k], 1 ≤ k ≤ d",
            got=f"shape {values.shape}",
        )
    check_finite("basis", values)
    lengths = np.linalg.norm(values, axis=0)
    u, r = np.linalg.qr(values / np.where(lengths > 0, lengths, 1))
    if np.linalg.matrix_rank(r) < values.shape[1]:
        raise InputError(
            "basis",
            expected=f"{values.shape[1]} linearly independent columns",
            got=f"rank {np.linalg.matrix_rank(r)}",
            fix="leave out directions that follow from the others",
        )
    return u * np.where(np.diag(r) < 0, -1, 1)  # each column keeps the sense of its direction


def class_mean_basis(images: Any, labels: Any) -> np.ndarray:
    """The signal subspace of a data set: the span of the differences of its class means.

    U spans m_c − m_1, c = 2 … C, with m_c the mean image of class c.

    Args:
        images: [n, *shape], with d pixels each.
        labels: [n], integers of C ≥ 2 classes.

    Returns:
        U [d, C − 1], orthonormal, float64.

    Raises:
        InputError: fewer than two classes, or class means that span less.

    Source: theory L6.

    Example:
        >>> class_mean_basis(np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]]), [0, 0, 1]).round(3)
        array([[-0.447],
               [ 0.894]])
    """
    x, y = np.asarray(images, np.float64).reshape(len(images), -1), np.asarray(labels)
    means = np.stack([x[y == label].mean(0) for label in np.unique(y)])
    if len(means) < 2:
        raise InputError("labels", expected="two classes or more", got=f"{len(means)}")
    return orthonormal((means[1:] - means[0]).T)


def _as_leaf(basis: Any) -> Any:
    """An orthonormal basis of the same span as float32; inside jit it was made outside."""
    try:
        return jnp.asarray(orthonormal(basis), jnp.float32)
    except jax.errors.TracerArrayConversionError:
        return basis


def _coordinates(v: jax.Array, basis: jax.Array) -> jax.Array:
    """The rows of v times the basis; in full float32 also where a GPU would round the factors."""
    return jnp.matmul(v, basis.astype(v.dtype), precision=jax.lax.Precision.HIGHEST)


def _split(v: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's parts inside and across the span of the basis: UUᵀv and v − UUᵀv."""
    inside = _coordinates(_coordinates(v, basis), basis.T)
    return inside, v - inside


def _nearest_without_box(
    v: jax.Array, basis: jax.Array, radius: jax.Array, width: jax.Array
) -> jax.Array:
    """The Euclidean projection of each row onto {‖v‖ ≤ radius, ‖Uᵀv‖ ≤ width}.

    By symmetry it scales the parts a = ‖UUᵀv‖ and b = ‖v − UUᵀv‖ alone: to the ball, and where that
    leaves a above the width, to (width, b) or to the corner (width, √(radius² − width²)).
    """
    inside, across = _split(v, basis)
    a, b = _norms(inside), _norms(across)
    to_ball = _down_to(radius, jnp.hypot(a, b))
    too_wide = a * to_ball > width
    corner = jnp.sqrt(jnp.maximum((radius - width) * (radius + width), 0.0))
    scale_a = jnp.where(too_wide, _over(width, a), to_ball)
    scale_b = jnp.where(too_wide, _down_to(corner, b), to_ball)
    return inside * scale_a + across * scale_b


@jax.jit
def _nearest(
    v: jax.Array,
    low: jax.Array,
    high: jax.Array,
    basis: jax.Array,
    radius: jax.Array,
    width: jax.Array,
) -> jax.Array:
    """Dykstra's algorithm for each row: near the projection onto that set and low ≤ v ≤ high."""
    inner = _nearest_without_box(v, basis, radius, width)
    outward = v - inner  # every point of this ray has the same projection, as long as no pixel ends
    v = inner + outward * _down_to(_REACH * radius, _norms(outward))

    def turn(carry: tuple, _: None) -> tuple:
        w, from_set, from_box = carry
        inner = _nearest_without_box(w + from_set, basis, radius, width)
        boxed = jnp.clip(inner + from_box, low, high)
        return (boxed, w + from_set - inner, inner + from_box - boxed), None

    zero = jnp.zeros_like(v)
    return jax.lax.scan(turn, (v, zero, zero), length=_ROUNDS)[0][0]


@register
@dataclass(frozen=True, eq=False)
class StrongL2:
    """B(x) = {z in the box: ‖z − x‖₂ ≤ ε and ‖Uᵀ(z − x)‖₂ ≤ δ}: the signal changes by δ at most.

    Attributes:
        epsilon: ε, in pixel units.
        delta: δ, in pixel units; from ε on it does not limit. Below some 2ε√(dk)·1e-7 it is lost in
            rounding, and B(x) = {x}; so it may be below 2‖x‖·1e-7, by the rounding of x + v.
        basis: U, [d, k] for images of d pixels in all; made orthonormal. Only its span matters.
        bounds: the pixel box.

    Raises:
        InputError: a basis that is no array [d, k] of independent columns, or does not fit the
            images.

    Source: Shi and Ding 2019; theory L2, L6.

    Example:
        >>> threat = StrongL2(1.0, 0.5, [[1.0], [0.0]], bounds=(-9.0, 9.0))
        >>> x = jnp.zeros((1, 2))
        >>> print(np.asarray(threat.project(x + 2.0, x), float).round(3))
        [[0.5   0.866]]
    """

    epsilon: Any
    delta: Any
    basis: Any
    bounds: Box = (0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, "epsilon", _round_down(self.epsilon))
        object.__setattr__(self, "bounds", _as_box(self.bounds))
        object.__setattr__(self, "delta", _round_down(self.delta))
        object.__setattr__(self, "basis", _as_leaf(self.basis))

    def _check(self, x: Images) -> None:
        if self.basis.shape[0] != (size := math.prod(x.shape[1:])):
            raise InputError(
                "basis",
                expected=f"{size} rows for images of shape {x.shape[1:]}",
                got=f"shape {self.basis.shape}",
            )

    def _widths(self, x: Images) -> tuple[jax.Array, jax.Array]:
        """δ less rounding errors: of a signal that is measured [], and of one to scale to [n, 1].

        A coordinate u·v errs by about √d units of roundoff of ‖v‖ ≤ ε, and the rounded basis turns
        v by √k at most. To scale, x + v is rounded: each entry by less than the spacing there, two
        units of roundoff of |x| + |v|, which in all moves the signal by 2u(‖x‖ + ε) at most.
        """
        d, k = self.basis.shape
        epsilon = _in_dtype(self.epsilon, x)
        turned = 4 * math.sqrt(k) * (math.sqrt(d) + 4) * _UNIT_ROUNDOFF * epsilon
        measured = jnp.maximum(_inner_radius(self.delta, x) - turned, 0.0)
        added = 2 * _UNIT_ROUNDOFF * (_norms(_rows(x)) + epsilon)
        return measured, jnp.maximum(measured - added, 0.0)

    def project(self, z: Images, x: Images) -> Images:
        """The nearest point of B(x) to z, nearly; exactly inside B(x).

        Alternating projections (Boyle and Dykstra 1986) onto the ball with the limit on the signal
        and onto the box, then a clip to the box and a scaling of z − x, which keeps the box, into
        the other two. To scale after one clip alone would be inside as well, but far from z where
        many pixels are at the ends of the box: the clip turns the perturbation into the signal.
        Where no pixel reaches an end the first projection is the answer.
        """
        self._check(x)
        flat_x, flat_z = _rows(x), _rows(z)
        low, high = map(_rows, ends(self.bounds, x))
        radius, (measured, width) = _inner_radius(self.epsilon, x), self._widths(x)

        def lengths(v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _norms(v), _norms(_coordinates(v, self.basis))

        v = flat_z - flat_x
        norm, signal = lengths(v)
        in_box = jnp.all((flat_z >= low) & (flat_z <= high), axis=1, keepdims=True)
        fits = in_box & (norm <= radius) & (signal <= measured)
        v = _nearest(v, low - flat_x, high - flat_x, self.basis, radius, width)
        moved = jnp.clip(flat_x + v, low, high)
        norm, signal = lengths(moved - flat_x)
        scale = jnp.minimum(_down_to(radius, norm), _down_to(width, signal))
        scaled = jnp.clip(_towards(flat_x, (moved - flat_x) * scale), low, high)
        nearest = jnp.where((norm <= radius) & (signal <= measured), moved, scaled)
        result = jnp.where(fits, flat_z, nearest)
        # Below the roundings of the lengths only x is left.
        return jnp.where((radius > 0) & (measured > 0), result, flat_x).reshape(x.shape)

    def random_start(self, keys: Key, x: Images) -> Images:
        """Uniform in the ball, then projected."""
        step = _in_dtype(self.epsilon, x) * _uniform_in_unit_ball(keys, x)
        return self.project(x + step, x)

    def sphere_start(self, keys: Key, x: Images) -> Images:
        """Uniform on the sphere, then projected."""
        return self.project(x + _in_dtype(self.epsilon, x) * _on_unit_sphere(keys, x), x)

    def ascent(self, gradient: Images) -> Images:
        """v/ε with v = argmax ⟨g, v⟩ over ‖v‖ ≤ ε, ‖Uᵀv‖ ≤ δ, g the gradient; 0 where g is 0.

        With a = ‖UUᵀg‖, b = ‖g − UUᵀg‖ and ρ = min(δ/ε, 1) it is g/‖g‖ where a ≤ ρ‖g‖, and else
        ρ·UUᵀg/a + √(1 − ρ²)·(g − UUᵀg)/b, where a b of rounding errors alone gives no direction.
        """
        self._check(gradient)
        g = _largest_is_one(_rows(gradient))
        inside, across = _split(g, self.basis)
        a, b, norm = _norms(inside), _norms(across), _norms(g)
        epsilon, delta = _in_dtype(self.epsilon, g), _in_dtype(self.delta, g)
        ratio = jnp.where(delta < epsilon, _over(delta, epsilon), 1.0)
        noise = 8 * (math.sqrt(g.shape[1]) + 4) * _UNIT_ROUNDOFF * norm
        sideways = jnp.where(b > noise, _over(across, b), 0.0)
        limited = ratio * _over(inside, a) + jnp.sqrt(1 - ratio**2) * sideways
        return jnp.where(a <= ratio * norm, _over(g, norm), limited).reshape(gradient.shape)

    def distance(self, z: Images, x: Images) -> PerExample:
        """‖z − x‖₂."""
        return jnp.linalg.norm(_rows(z) - _rows(x), axis=1)

    def gauge(self, z: Images, x: Images) -> PerExample:
        """max(‖z − x‖₂/ε, ‖Uᵀ(z − x)‖₂/δ)."""
        signal = jnp.linalg.norm(_coordinates(_rows(z) - _rows(x), self.basis), axis=1)
        epsilon, delta = _in_dtype(self.epsilon, x), _in_dtype(self.delta, x)
        return jnp.maximum(_parts(self.distance(z, x), epsilon), _parts(signal, delta))


THREATS: dict[str, type[Linf] | type[L2] | type[StrongL2]] = {
    "linf": Linf,
    "l2": L2,
    "strong-l2": StrongL2,
}
"""Threat models by name: `(epsilon, …, bounds) -> threat model`."""


def build(config: ThreatConfig, bounds: Box, basis: Any = None) -> Threat:
    """The threat model that `config` describes, on a data set with these pixel bounds.

    Args:
        config: name, ε and δ.
        bounds: the pixel box.
        basis: the signal's directions [d, k], for strong-l2 only.

    Raises:
        InputError: unknown name, ε < 0, or for strong-l2 no basis, or a δ lost in rounding whatever
            the images.

    Example:
        >>> build(ThreatConfig(name="l2", epsilon=0.5), (0.0, 1.0)).bounds
        (0.0, 1.0)
    """
    choose("threat model", config.name, THREATS)
    check_number("epsilon", config.epsilon, low=0)
    if config.name == "linf":
        threat = Linf(config.epsilon, bounds)
        # What the L2 balls of the box reach depends on the number of pixels: see `check_threat`.
        _warn_of_large_radius(threat, np.broadcast_shapes(*map(np.shape, bounds)), stacklevel=2)
        return threat
    if config.name == "l2":
        return L2(config.epsilon, bounds)
    check_number("delta", config.delta, low=0)
    if basis is None:
        raise InputError("basis", expected="the signal's directions [d, k]", got="none")
    threat = StrongL2(config.epsilon, config.delta, basis, bounds)
    black_image = jnp.zeros((1, threat.basis.shape[0]))
    if config.epsilon > 0 and threat._widths(black_image)[1] == 0:
        raise InputError(
            "delta",
            expected="a limit that float32 images can meet",
            got=f"{config.delta:g}",
            fix="use 1e-3 or more",
        )
    return threat
