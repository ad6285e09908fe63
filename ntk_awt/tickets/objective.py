"""The ticket objective: how far a sparse network is from the dense one at initialisation.

    J(m, θ_s) = β² + λ α²,   β = ‖f^d − f^s‖/√N,   α = ‖Θ^d − Θ^s‖_F/N,

on adversarial inputs (theory §0). On natural inputs, with the full Jacobian and in absolute units,
it is the loss of Neural Tangent Transfer (Liu & Zenke, 2020).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntk_awt.attacks import Attack, cross_entropy, example_keys
from ntk_awt.config import TicketConfig
from ntk_awt.kernels import (
    empirical,
    kernel_distance,
    relative_kernel_distance,
    relative_target_distance,
    target_distance,
)
from ntk_awt.masks import Ticket, effective
from ntk_awt.threats import Threat
from ntk_awt.types import ApplyFn, Images, Key, Labels, Params


class Target(NamedTuple):
    """What the sparse network has to match on one batch of n inputs.

    Attributes:
        x: the inputs [n, *shape], adversarial for the dense network (natural if ε = 0).
        logits: of the dense network at x, [n, c].
        kernel: of the dense network at x, [n, n, c, c].
    """

    x: Images
    logits: jax.Array
    kernel: jax.Array


class Distances(NamedTuple):
    """Distances between the dense and the sparse network on one batch.

    Attributes:
        kernel: α, in squared logits per squared parameter.
        relative_kernel: ‖Θ^d − Θ^s‖_F²/‖Θ^d‖_F².
        target: β, in logits.
        relative_target: ‖f^d − f^s‖²/‖f^d‖².
    """

    kernel: jax.Array
    relative_kernel: jax.Array
    target: jax.Array
    relative_target: jax.Array


def target_of(
    apply: ApplyFn,
    params: Params,
    x: Images,
    y: Labels,
    *,
    threat: Threat,
    attack: Attack,
    key: Key,
) -> Target:
    """Attack the dense network at x and take its logits and kernel there.

    Args:
        apply, params: the dense network at initialisation.
        x, y: clean images [n, *shape] and labels [n].
        threat, attack: the threat model and the attack on the dense network's cross-entropy.
        key: random key of the attack.

    Returns:
        `Target`, traceable.
    """
    keys = example_keys(key, jnp.arange(x.shape[0]))
    x, _ = attack.run(cross_entropy(apply, params, y), x, threat, keys)
    return Target(x, apply(params, x), empirical(apply, params, x))


def distances(
    apply: ApplyFn, ticket: Ticket, target: Target, jacobian: str, at: Params | None = None
) -> Distances:
    """All four distances of a sparse network to the dense one on the target's inputs.

    `at`: effective weights to take in place of γ⊙m⊙θ, to see what pruned ones would change.
    """
    params, mask, gain = ticket
    at = effective(params, mask, gain) if at is None else at
    logits = apply(at, target.x)
    kernel = empirical(apply, params, target.x, mask=mask, gain=gain, jacobian=jacobian, at=at)
    return Distances(
        kernel=kernel_distance(target.kernel, kernel),
        relative_kernel=relative_kernel_distance(target.kernel, kernel),
        target=target_distance(target.logits, logits),
        relative_target=relative_target_distance(target.logits, logits),
    )


def objective(values: Distances, config: TicketConfig) -> jax.Array:
    """J = β² + λα², or the same of the relative distances (`config.distance`)."""
    if config.distance == "relative":
        return values.relative_target + config.kernel_weight * values.relative_kernel
    return values.target**2 + config.kernel_weight * values.kernel**2
