"""Threat models: the set B(x) of allowed images around x, and the moves an attack needs in it.

A threat model is a pytree whose radius is a leaf, so an attack compiled once serves every radius.
Each set is a ball around x intersected with the pixel box; x itself must lie in the box. The
constraints hold in real arithmetic, not up to rounding: radii are rounded inwards by the bounds
given below, so a float64 check finds ‖x̃ − x‖ ≤ ε and x̃ in the box without any slack.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.config import ThreatConfig
from ntk_awt.errors import check_number, choose
from ntk_awt.types import Images, Key, PerExample

_UNIT_ROUNDOFF = 2.0**-24  # of float32


class Threat(Protocol):
    """What every threat model offers; images are [n, *shape], float32.

    Attributes:
        epsilon: radius, in pixel units; a traced scalar inside jit.
        bounds: the pixel box (low, high).
    """

    @property
    def epsilon(self) -> Any: ...

    @property
    def bounds(self) -> tuple[float, float]: ...

    def project(self, z: Images, x: Images) -> Images:
        """A point of B(x) near z; z itself if it lies in B(x) (rounded inwards)."""
        ...

    def random_start(self, keys: Key, x: Images) -> Images:
        """A random point of B(x) for each image, from one key an image."""
        ...

    def ascent(self, gradient: Images) -> Images:
        """The direction of unit norm along which the linearised loss grows most."""
        ...

    def distance(self, z: Images, x: Images) -> PerExample:
        """‖z − x‖ in the norm of the ball, for each image."""
        ...


Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Make a threat model a pytree: the radius is a leaf, the type and the bounds are static.

    Not `jax.tree_util.register_dataclass`: with it, JAX 0.10 finds the structures of two classes
    with equal static fields equal, and jit may run the program of the other class.
    """

    def flatten(threat: Any) -> tuple[tuple[Any], tuple[type, tuple[float, float]]]:
        return (threat.epsilon,), (cls, threat.bounds)

    def unflatten(static: tuple[type, tuple[float, float]], leaves: Any) -> Any:
        return cls(*leaves, static[1])

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


def _round_down(epsilon: Any) -> Any:
    """A Python number as the largest float32 not above it; arrays and tracers as they are."""
    if not isinstance(epsilon, int | float):
        return epsilon
    rounded = np.float32(epsilon)
    return rounded if float(rounded) <= epsilon else np.nextafter(rounded, np.float32(0))


def _rows(x: Images) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _norms(v: Images) -> jax.Array:
    """L2 norm of each image, shaped to broadcast against the images."""
    return jnp.linalg.norm(_rows(v), axis=1).reshape(-1, *[1] * (v.ndim - 1))


@dataclass(frozen=True)
class _Ball:
    """Radius and pixel box of a threat model."""

    epsilon: Any
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, "epsilon", _round_down(self.epsilon))


@register
@dataclass(frozen=True)
class Linf(_Ball):
    """B(x) = {z in the box: max_i |z_i − x_i| ≤ ε}."""

    def project(self, z: Images, x: Images) -> Images:
        """Clip to [x − ε, x + ε] and the box: the Euclidean and the L∞ projection at once.

        Each end is moved one float towards x, since x ± ε is rounded to the nearest float.
        """
        low = jnp.minimum(jnp.nextafter(x - self.epsilon, jnp.inf), x)
        high = jnp.maximum(jnp.nextafter(x + self.epsilon, -jnp.inf), x)
        return jnp.clip(jnp.clip(z, low, high), *self.bounds)

    def random_start(self, keys: Key, x: Images) -> Images:
        """Uniform in the ball, then projected."""
        noise = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1.0, 1.0))(keys)
        return self.project(x + self.epsilon * noise, x)

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

    def _radius(self, x: Images) -> jax.Array:
        """ε less the rounding errors of the norm, the scaling and the sum x + v; 0 below those.

        The sum of d squares errs by at most about √d units of roundoff (pairwise summation errs
        less), each of the other operations by one; x + v errs by one unit of roundoff of a value of
        size at most max|bounds| in each of d coordinates.
        """
        root = math.sqrt(math.prod(x.shape[1:]))
        largest = max(abs(bound) for bound in self.bounds)
        relative, absolute = 4 * (root + 4) * _UNIT_ROUNDOFF, 2 * root * largest * _UNIT_ROUNDOFF
        return jnp.maximum(self.epsilon * (1 - relative) - absolute, 0.0)

    def project(self, z: Images, x: Images) -> Images:
        """Scale z − x into the ball, then clip to the box; idempotent up to that rounding.

        Clipping moves every coordinate towards x, which is in the box, so it keeps the ball.
        """
        v = z - x
        norms, radius = _norms(v), self._radius(x)
        scale = jnp.where(norms > radius, radius / jnp.where(norms > 0, norms, 1.0), 1.0)
        moved = jnp.where(scale < 1, x + v * scale, z)
        # Below the roundings of the norm, and where its squares underflow, only x is left.
        return jnp.clip(jnp.where(radius > 0, moved, x), *self.bounds)

    def random_start(self, keys: Key, x: Images) -> Images:
        """Uniform in the ball (a random direction, radius ε·u^(1/d)), then projected."""
        size = math.prod(x.shape[1:])

        def draw(key: Key) -> jax.Array:
            direction, length = jax.random.split(key)
            v = jax.random.normal(direction, x.shape[1:], x.dtype)
            radius = jax.random.uniform(length, (), x.dtype) ** (1.0 / size)
            return radius * self.ascent(v[None])[0]

        return self.project(x + self.epsilon * jax.vmap(draw)(keys), x)

    def ascent(self, gradient: Images) -> Images:
        """gradient / ‖gradient‖₂, or 0 where the gradient is 0."""
        # Scaled first: the square of a small gradient would underflow.
        largest = jnp.max(jnp.abs(_rows(gradient)), axis=1).reshape(-1, *[1] * (gradient.ndim - 1))
        scaled = gradient / jnp.where(largest > 0, largest, 1.0)
        norms = _norms(scaled)
        return scaled / jnp.where(norms > 0, norms, 1.0)

    def distance(self, z: Images, x: Images) -> PerExample:
        """‖z − x‖₂."""
        return jnp.linalg.norm(_rows(z) - _rows(x), axis=1)


THREATS: dict[str, type[Linf] | type[L2]] = {"linf": Linf, "l2": L2}
"""Threat models by name: `(epsilon, bounds) -> threat model`."""


def build(config: ThreatConfig, bounds: tuple[float, float]) -> Threat:
    """The threat model that `config` describes, on a data set with these pixel bounds.

    Raises:
        InputError: unknown name, or ε < 0.

    Example:
        >>> build(ThreatConfig(name="l2", epsilon=0.5), (0.0, 1.0)).bounds
        (0.0, 1.0)
    """
    choose("threat model", config.name, THREATS)
    check_number("epsilon", config.epsilon, low=0)
    return THREATS[config.name](config.epsilon, bounds)
