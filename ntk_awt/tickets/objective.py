"""The ticket objective: how far a sparse network is from the dense one at initialisation.

    J(m, θ_s) = w β² + λ α²,   β = ‖f^d − f^s‖/√N,   α = ‖Θ^d − Θ^s‖_F/N,

on adversarial inputs, w = 1 (theory §0), or the same of the relative distances. On natural inputs,
with the full Jacobian, the kernel between the halves of a batch and in absolute units, it is the
loss of Neural Tangent Transfer (Liu & Zenke, 2020) up to a factor. In place of both distances it
may be the reverse divergence KL(softmax f^s ‖ softmax f^d), as in Concrete Ticket Search (Arora &
Teuscher, 2025).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ntk_awt.app.config import TicketConfig
from ntk_awt.attacks import Attack, NetworkLoss, check_given, example_keys
from ntk_awt.kernels import (
    empirical,
    kernel_distance,
    probes,
    relative_kernel_distance,
    relative_target_distance,
    target_distance,
)
from ntk_awt.masks import Ticket, effective
from ntk_awt.network import Network
from ntk_awt.threats import Threat
from ntk_awt.types import ApplyFn, Images, Key, Labels, Logits, Params, widened

KernelFn: TypeAlias = Callable[..., jax.Array]
"""`kernels.empirical`, or the same with a plan and a selection filled in."""


class Target(NamedTuple):
    """What the sparse network has to match on one batch of n inputs.

    Attributes:
        x: the inputs [n, *shape].
        logits: of the dense network at x, [n, c], in float32 at least.
        kernel: of the dense network, [n, n, c, c], or [n // 2, n // 2, c, c] between the halves;
            None where distances are estimated.
        params: of the dense network.
        key: of whatever is random in comparing the sparse network with it.
    """

    x: Images
    logits: jax.Array
    kernel: jax.Array | None
    params: Params
    key: Key


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


class Terms(NamedTuple):
    """The two terms of the objective, without their weights: target and kernel."""

    target: jax.Array
    kernel: jax.Array


def attacked_inputs(
    apply: ApplyFn,
    params: Params,
    ticket: Ticket | None,
    x: Images,
    y: Labels,
    *,
    threat: Threat | None,
    attack: Attack | None,
    inputs: str,
    key: Key,
) -> Images:
    """The inputs at which the networks are compared (`TicketConfig.inputs`).

    Args:
        apply, params: the dense network.
        ticket: the sparse network; not needed for natural inputs and those of the dense network.
        x, y: clean images [n, *shape] and labels [n].
        threat, attack: the threat model and the attack on the cross-entropy; natural inputs need
            neither.
        inputs: natural, dense, sparse, or both (the first half of the batch against the dense
            network, the second half against the sparse one).
        key: random key of the attack.

    Raises:
        InputError: other inputs without a threat model or an attack.
    """
    if inputs == "natural":
        return x
    threat, attack = check_given(f"inputs {inputs}", threat, attack)
    networks = []
    if inputs != "sparse":
        networks.append(params)
    if inputs != "dense":
        assert ticket is not None
        networks.append(jax.lax.stop_gradient(effective(*ticket)))
    first = jnp.arange(x.shape[0]) < x.shape[0] // 2

    def logits(networks: list[Params], z: Images) -> Logits:
        values = [apply(one, z) for one in networks]
        return values[0] if len(values) == 1 else jnp.where(first[:, None], *values)

    loss = NetworkLoss(Network(logits, networks), y)
    return attack.run(loss, x, threat, example_keys(key, jnp.arange(x.shape[0])))[0]


def _pairs(x: Images, config: TicketConfig) -> tuple[Images, ...]:
    """The two sides of the kernel; one if they are the same."""
    half = x.shape[0] // 2
    return (x,) if config.pairs == "all" else (x[:half], x[half : 2 * half])


def target_of(
    apply: ApplyFn,
    params: Params,
    x: Images,
    y: Labels,
    *,
    threat: Threat | None,
    attack: Attack | None,
    key: Key,
    config: TicketConfig,
    ticket: Ticket | None = None,
) -> Target:
    """Attack a network at x and take the dense network's logits and kernel there.

    Args:
        apply, params: the dense network at initialisation.
        x, y, threat, attack, ticket: see `attacked_inputs`.
        key: random key of the attack and of estimates.
        config: which inputs, which labels, which pairs, exact or estimated.

    Returns:
        `Target`, traceable.

    Against their true labels, the attacked images have low dense logits at their own classes. The
    sparse network cannot copy the dense one's sensitivities, but it can tell the classes apart: to
    match those logits it learns to answer anything but the right class. Labels drawn at random are
    as adversarial, and there is nothing to learn from them.
    """
    attack_key, rest = jax.random.split(key)
    if config.attack_labels == "random":
        classes = jax.eval_shape(apply, params, x).shape[1]
        y = jax.random.randint(jax.random.fold_in(key, 2), y.shape, 0, classes, y.dtype)
    x = attacked_inputs(
        apply, params, ticket, x, y,
        threat=threat, attack=attack, inputs=config.inputs, key=attack_key,
    )  # fmt: skip
    exact = config.estimator == "exact"
    kernel = empirical(apply, params, *_pairs(x, config)) if exact else None
    return Target(x, widened(apply(params, x)), kernel, params, rest)


def _kernel_terms(
    apply: ApplyFn,
    ticket: Ticket,
    target: Target,
    config: TicketConfig,
    at: Params,
    kernel: KernelFn,
) -> tuple[jax.Array, jax.Array]:
    """Absolute squared and relative squared kernel distance, exact or estimated."""
    params, mask, gain = ticket
    sides = _pairs(target.x, config)
    if target.kernel is not None:
        sparse = kernel(
            apply, params, *sides, mask=mask, gain=gain, jacobian=config.jacobian, at=at
        )
        absolute = kernel_distance(target.kernel, sparse)
        return absolute**2, relative_kernel_distance(target.kernel, sparse)
    dense = probes.kernel_product(apply, target.params, *sides)
    if config.jacobian == "full":
        product = probes.kernel_product(apply, at, *sides)
    else:
        product = probes.kernel_product(apply, params, *sides, mask=mask, gain=gain)
    relative = probes.relative_squared_distance(dense, product, target.key).value
    absolute = probes.squared_distance(dense, product, target.key).value
    return absolute / (sides[0].shape[0] * sides[-1].shape[0]), relative


def distances(
    apply: ApplyFn,
    ticket: Ticket,
    target: Target,
    config: TicketConfig,
    kernel: KernelFn = empirical,
) -> Distances:
    """All four distances of a sparse network to the dense one on the target's inputs.

    Args:
        apply: the dense network's function.
        ticket: the sparse network; its mask may hold real numbers.
        target: what to match.
        config: which Jacobian, which pairs.
        kernel: computes the sparse network's kernel.
    """
    at = effective(*ticket)
    logits = apply(at, target.x)
    absolute, relative = _kernel_terms(apply, ticket, target, config, at, kernel)
    return Distances(
        kernel=jnp.sqrt(jnp.maximum(absolute, 0)),  # an estimate may be negative
        relative_kernel=relative,
        target=target_distance(target.logits, logits),
        relative_target=relative_target_distance(target.logits, logits),
    )


def divergence(dense: jax.Array, sparse: jax.Array) -> jax.Array:
    """Mean over images of KL(softmax(sparse) ‖ softmax(dense)), in nats; logits [n, c].

    Source: the reverse divergence of Arora & Teuscher, "Winning the lottery by preserving network
    training dynamics with concrete ticket search" (2025).
    """
    dense, sparse = widened((dense, sparse))
    return optax.kl_divergence(jax.nn.log_softmax(dense), jax.nn.softmax(sparse)).mean()


def terms(
    apply: ApplyFn,
    ticket: Ticket,
    target: Target,
    config: TicketConfig,
    *,
    at: Params | None = None,
    kernel: KernelFn = empirical,
) -> Terms:
    """Both terms of the objective; one whose weight is 0 is not computed.

    Args:
        apply, ticket, target, config, kernel: see `distances`.
        at: effective weights to take in place of γ⊙m⊙θ, to see what pruned ones would change.
    """
    at = effective(*ticket) if at is None else at
    zero = jnp.zeros((), target.logits.dtype)
    if config.matching == "kl":
        return Terms(divergence(target.logits, apply(at, target.x)), zero)
    relative = config.distance == "relative"
    of_target = of_kernel = zero
    if config.target_weight:
        logits = apply(at, target.x)
        if relative:
            of_target = relative_target_distance(target.logits, logits)
        else:
            of_target = target_distance(target.logits, logits) ** 2
    if config.kernel_weight:
        of_kernel = _kernel_terms(apply, ticket, target, config, at, kernel)[relative]
    return Terms(of_target, of_kernel)


def residuals(
    apply: ApplyFn,
    ticket: Ticket,
    target: Target,
    config: TicketConfig,
    *,
    kernel: KernelFn = empirical,
) -> Terms:
    """Weighted differences whose squares sum to the objective of exact distances: (r_f, r_Θ).

    Args:
        apply, ticket, target, config, kernel: see `terms`.

    Returns:
        √w (f^d − f^s) [n, c] and √λ (Θ^d − Θ^s), each over its dense norm, or over √n and n.
    """
    params, mask, gain = ticket
    at, sides = effective(*ticket), _pairs(target.x, config)
    of_target = target.logits - widened(apply(at, target.x))
    sparse = kernel(apply, params, *sides, mask=mask, gain=gain, jacobian=config.jacobian, at=at)
    assert target.kernel is not None
    of_kernel = target.kernel - sparse
    if config.distance == "relative":
        scales = jnp.linalg.norm(target.logits), jnp.linalg.norm(target.kernel.ravel())
    else:
        n = target.x.shape[0]
        scales = n**0.5, sides[0].shape[0]
    return Terms(
        config.target_weight**0.5 * of_target / scales[0],
        config.kernel_weight**0.5 * of_kernel / scales[1],
    )


def objective(values: Terms, config: TicketConfig, balance: jax.Array | float = 1.0) -> jax.Array:
    """J = w·target + λ·balance·kernel (`config.target_weight`, `config.kernel_weight`)."""
    if config.matching == "kl":
        return values.target
    return config.target_weight * values.target + config.kernel_weight * balance * values.kernel


def objective_gradient(
    compute: Callable[[Any], Terms], at: Any, balance: jax.Array, config: TicketConfig
) -> tuple[jax.Array, Any, jax.Array]:
    """The objective and its gradient, with λ scaled so that both terms pull equally if asked.

    With `config.balance` the kernel's weight has the factor ‖∇target‖/‖∇kernel‖, a running mean
    with memory 0.9 that starts at the first step's value.

    Args:
        compute: terms of the variables.
        at: the variables, a pytree.
        balance: the factor so far, 0 before the first step.
        config: weights, and whether they are balanced.

    Returns:
        J, its gradient with the structure of `at`, and the new factor.
    """
    if not config.balance:
        value, gradient = jax.value_and_grad(lambda v: objective(compute(v), config))(at)
        return value, gradient, balance
    values, pull = jax.vjp(compute, at)
    zero, one = jnp.zeros_like(values.target), jnp.ones_like(values.target)
    (of_target,), (of_kernel,) = pull(Terms(one, zero)), pull(Terms(zero, one))
    norms = [optax.tree.norm(widened(g)) for g in (of_target, of_kernel)]
    ratio = norms[0] / jnp.maximum(norms[1], jnp.finfo(norms[1].dtype).tiny)
    balance = jnp.where(balance == 0, ratio, 0.9 * balance + 0.1 * ratio)
    weights = config.target_weight, config.kernel_weight * balance
    gradient = jax.tree.map(lambda t, k: weights[0] * t + weights[1] * k, of_target, of_kernel)
    return objective(values, config, balance), gradient, balance
