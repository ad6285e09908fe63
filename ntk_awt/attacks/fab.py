"""FAB: the closest misclassified point, by projections onto the linearised boundary.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
attack" (2020), algorithm 1, in the targeted form of their "Reliable evaluation of adversarial
robustness" (2020).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntk_awt.attacks.base import NetworkLoss, run_keys, select, wide
from ntk_awt.attacks.found import Found, better_of, nothing, seen, targets_of
from ntk_awt.attacks.losses import targeted_margin
from ntk_awt.errors import check_count
from ntk_awt.threats import Threat, ends
from ntk_awt.types import Images, Key, Labels, Logits, PerExample

_BACK_TO_IMAGE = 0.1
"""α_max: the largest weight of the projection of the clean image beside that of the iterate."""

_OVERSHOOT = 1.05
"""η: how far beyond the linearised boundary a projection goes, in its own length."""

_BACKWARD = 0.9
"""β: from a misclassified point the search goes on at that part of the way from the image."""

_NEWTON_STEPS = 12
"""Each one is exact, or passes at least one pixel that has reached the box; 3 to 6 are usual."""


def to_boundary(threat: Threat, z: Images, gradient: Images, gap: PerExample) -> Images:
    """The step from z to the plane ⟨gradient, v⟩ = gap, along the steepest ascent, in the box.

    v = clip(t·a, low − z, high − z) with a = ±ascent(gradient) and the smallest t ≥ 0 that reaches
    the plane; in the balls of L∞ and L2 this is the shortest such step. Where the box keeps the
    plane out of reach, all pixels go to their ends. Newton's method on t: ⟨gradient, v(t)⟩ is
    piecewise linear and concave there, so it comes from below and ends after finitely many steps.

    Args:
        threat: gives the norm (by its steepest ascent) and the box.
        z: images [n, *shape] in the box.
        gradient: [n, *shape].
        gap: [n], of any sign.

    Returns:
        v, [n, *shape].

    Example:
        >>> from ntk_awt.threats import Linf
        >>> z, g = jnp.array([[0.75, 0.5]]), jnp.array([[1.0, 2.0]])
        >>> print(to_boundary(Linf(0.1), z, g, jnp.array([1.0])))  # the first pixel ends at 1
        [[0.25  0.375]]
    """
    low, high = ends(threat.bounds, z)
    axes = tuple(range(1, z.ndim))
    ascent = threat.ascent(gradient)
    direction = ascent * wide(jnp.where(gap < 0, -1.0, 1.0).astype(z.dtype), z)
    room = jnp.where(direction > 0, high - z, z - low)
    longest = jnp.where(direction == 0, 0.0, room / jnp.where(direction == 0, 1.0, abs(direction)))
    gains = gradient * ascent

    def newton(_: int, t: PerExample) -> PerExample:
        free = longest > wide(t, z)
        reached = jnp.sum(gains * jnp.minimum(wide(t, z), longest), axes)
        slope = jnp.sum(jnp.where(free, gains, 0.0), axes)
        further = (abs(gap) - reached) / jnp.where(slope > 0, slope, 1.0)
        return t + jnp.where(slope > 0, jnp.maximum(further, 0.0), longest.max(axes))

    t = jax.lax.fori_loop(0, _NEWTON_STEPS, newton, jnp.zeros(z.shape[:1], z.dtype))
    return jnp.sign(direction) * jnp.minimum(wide(t, z) * abs(direction), room)


class _State(NamedTuple):
    """One run in progress.

    Attributes:
        z: the iterate.
        closest: the closest misclassified point.
        size: its distance from the image, in radii of the threat set; ∞ before there is one.
        found: the best point inside the threat set.
    """

    z: Images
    closest: Images
    size: PerExample
    found: Found


@dataclass(frozen=True)
class FAB:
    """Look for the closest misclassified point, whatever the radius, one target class at a time.

    With v_z and v_x the steps of iterate and image to the plane where the target's and the label's
    linearised logits are equal, z ← (1 − α)(z + η v_z) + α(x + η v_x), with
    α = min(|v_z| / (|v_z| + |v_x|), 0.1) and η = 1.05, in the box. At a misclassified z the search
    goes on at x + 0.9 (z − x). The first run starts at the image, further ones half way to the
    sphere. Lengths are those of the threat set's gauge.

    One run costs `steps` forward-backward passes and `steps` + 1 forward passes, times `restarts`
    and targets.

    Attributes:
        steps: projections.
        restarts: independent runs.
        targets: how many classes, by rank at the clean image, are tried.

    Returns (of `run`): the closest misclassified point where it lies inside the threat set, and
    else the point of the highest loss among those that were seen inside.

    Raises:
        InputError: numbers that are not whole or too small.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9

    def __post_init__(self):
        check_count("FAB steps", self.steps, low=0)
        check_count("FAB restarts", self.restarts, low=1)
        check_count("FAB targets", self.targets, low=1)

    def run(
        self, loss: NetworkLoss, x: Images, threat: Threat, keys: Key
    ) -> tuple[Images, PerExample]:
        """See `Attack.run`."""
        targets = targets_of(loss, x, self.targets)

        def one(found: Found, run: tuple[jax.Array, Labels]) -> tuple[Found, None]:
            index, target = run
            middle = x + (threat.sphere_start(run_keys(keys, index), x) - x) / 2
            start = jnp.where(index < len(targets), x, middle)
            return better_of(self._one_run(loss, target, x, start, threat), found), None

        each = jnp.arange(self.restarts * len(targets)), jnp.tile(targets, (self.restarts, 1))
        first = better_of(seen(loss, x, loss.logits(x)), nothing(x))
        found, _ = jax.lax.scan(one, first, each)
        return found.images, found.loss

    def _one_run(
        self, loss: NetworkLoss, target: Labels, x: Images, start: Images, threat: Threat
    ) -> Found:
        def values(z: Images) -> tuple[jax.Array, tuple[PerExample, Logits]]:
            logits = loss.logits(z)
            ahead = targeted_margin(logits, loss.labels, target)
            return ahead.sum(), (ahead, logits)

        def look(state: _State, logits: Logits) -> _State:
            """Take up what the logits at the iterate show."""
            now = seen(loss, state.z, logits)
            size = threat.gauge(state.z, x)
            closer = now.fooled & (size < state.size)
            inside = (threat.project(state.z, x) == state.z).reshape(len(x), -1).all(1)
            return state._replace(
                z=select(now.fooled, x + _BACKWARD * (state.z - x), state.z),
                closest=select(closer, state.z, state.closest),
                size=jnp.where(closer, size, state.size),
                found=_inside(now, inside, state.found),
            )

        def step(state: _State, _: None) -> tuple[_State, None]:
            z = state.z
            (_, (ahead, _)), gradient = jax.value_and_grad(values, has_aux=True)(z)
            slope = (gradient * (z - x)).reshape(len(x), -1).sum(1)
            from_z = to_boundary(threat, z, gradient, -ahead)
            from_x = to_boundary(threat, x, gradient, slope - ahead)
            a, b = threat.gauge(z + from_z, z), threat.gauge(x + from_x, x)
            alpha = wide(jnp.minimum(a / jnp.where(a + b > 0, a + b, 1.0), _BACK_TO_IMAGE), x)
            moved = (1 - alpha) * (z + _OVERSHOOT * from_z) + alpha * (x + _OVERSHOOT * from_x)
            moved = jnp.clip(moved, *ends(threat.bounds, x)).astype(x.dtype)
            # Where a gradient is not finite there is nowhere to go.
            ok = jnp.isfinite(moved).reshape(len(x), -1).all(1)
            state = state._replace(z=select(ok, moved, z))
            return look(state, loss.logits(state.z)), None

        far = jnp.full(x.shape[:1], jnp.inf, x.dtype)
        state, _ = jax.lax.scan(step, _State(start, x, far, nothing(x)), length=self.steps)
        # The closest point may lie outside by less than a projection moves.
        last = threat.project(state.closest, x)
        return better_of(seen(loss, last, loss.logits(last)), state.found)


def _inside(new: Found, inside: jax.Array, old: Found) -> Found:
    return better_of(
        new._replace(fooled=new.fooled & inside, loss=jnp.where(inside, new.loss, -jnp.inf)), old
    )
