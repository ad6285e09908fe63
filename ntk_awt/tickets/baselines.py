"""Masks that need no search: one score a weight, from its value or from a few gradients.

Each baseline gives scores (higher is kept first); allocation and selection are those of `masks`, so
that any baseline can have the layer densities of any other.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntk_awt import masks
from ntk_awt.app.config import MaskConfig
from ntk_awt.attacks import Attack, cross_entropy
from ntk_awt.errors import choose
from ntk_awt.masks import Scores, Ticket
from ntk_awt.network import Network, Prunable, check_network
from ntk_awt.tickets.objective import attacked_inputs
from ntk_awt.tickets.search import Problem
from ntk_awt.types import ApplyFn, Images, Mask, Params

IMAGES = 1000
"""Training images, at most, whose loss the gradient-based scores look at."""

ROUNDS = 100
"""Rounds of SynFlow, as published."""


def _loss(apply: ApplyFn, problem: Problem, x: Images) -> Callable[[Params], jax.Array]:
    return lambda w: jnp.mean(cross_entropy(apply(w, x), problem.y))


@partial(jax.jit, static_argnames="apply")
def snip_scores(apply: ApplyFn, problem: Problem, x: Images) -> Scores:
    """|θ ⊙ ∇L|: by how much the loss changes when a weight is removed, to first order.

    Args:
        apply: the dense network's function.
        problem: the dense network and the labels [n].
        x: images [n, *shape], clean or attacked.

    Source: Lee, Ajanthan & Torr, "SNIP: single-shot network pruning based on connection
    sensitivity" (2019).
    """
    gradient = jax.grad(_loss(apply, problem, x))(problem.params)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), problem.params, gradient)


@partial(jax.jit, static_argnames="apply")
def grasp_scores(apply: ApplyFn, problem: Problem, x: Images) -> Scores:
    """θ ⊙ (H∇L): half of what removing a weight takes from ‖∇L‖², to first order.

    The weights whose removal weakens the gradient most are kept.

    Args:
        apply, problem, x: see `snip_scores`.

    Source: Wang, Zhang & Grosse, "Picking winning tickets before training by preserving gradient
    flow" (2020); their temperature is left out.
    """
    gradient = jax.grad(_loss(apply, problem, x))
    slope = gradient(problem.params)
    product = jax.jvp(gradient, (problem.params,), (slope,))[1]
    return jax.tree.map(jnp.multiply, problem.params, product)


@partial(jax.jit, static_argnames="apply")
def synflow_scores(apply: ApplyFn, problem: Problem, mask: Mask) -> Scores:
    """|θ| ⊙ ∂R/∂|θ| with R = Σ f(1; m⊙|θ|): the sum of all paths through a weight.

    Args:
        apply: the dense network's function; of ReLU networks the sum is exact.
        problem: the dense network; of the images only the shape is looked at.
        mask: what earlier rounds have left.

    Source: Tanaka, Kunin, Yamins & Ganguli, "Pruning neural networks without any data by
    iteratively conserving synaptic flow" (2020).
    """
    ones = jnp.ones_like(problem.x[:1])
    weights = jax.tree.map(lambda w, m: jnp.abs(w) * m, problem.params, mask)
    flow = jax.grad(lambda w: jnp.sum(apply(w, ones)))(weights)
    return jax.tree.map(jnp.multiply, weights, flow)


class Making(NamedTuple):
    """How scores become a mask, and where they look.

    Attributes:
        attack: for those that look at attacked images.
        config: density and allocation.
        prunable: see `masks.prunable_leaves`.
    """

    attack: Attack | None
    config: MaskConfig
    prunable: Prunable | None

    def __call__(self, scores: Scores, density: float | None = None) -> Mask:
        """The mask of the highest scores, of the config's density if none is given."""
        density = self.config.density if density is None else density
        return masks.make(scores, density, self.config.allocation, self.prunable)


def _random(apply: ApplyFn, problem: Problem, make: Making) -> Mask:
    return make(masks.random_scores(problem.key, problem.params))


def _magnitude(apply: ApplyFn, problem: Problem, make: Making) -> Mask:
    return make(masks.magnitude_scores(problem.params))


def _by_gradient(
    scores: Callable[[ApplyFn, Problem, Images], Scores], inputs: str
) -> Callable[..., Mask]:
    def mask(apply: ApplyFn, problem: Problem, make: Making) -> Mask:
        few = problem._replace(x=problem.x[:IMAGES], y=problem.y[:IMAGES])
        x = _inputs(apply, few, make.attack, inputs)
        return make(scores(apply, few, x))

    return mask


@partial(jax.jit, static_argnames=("apply", "attack", "inputs"))
def _inputs(apply: ApplyFn, problem: Problem, attack: Attack | None, inputs: str) -> Images:
    params, x, y, threat, key = problem
    return attacked_inputs(
        apply, params, None, x, y, threat=threat, attack=attack, inputs=inputs, key=key
    )


def _synflow(apply: ApplyFn, problem: Problem, make: Making) -> Mask:
    mask = masks.ones(problem.params)
    for done in range(1, ROUNDS + 1):
        scores = synflow_scores(apply, problem, mask)
        # Pruned weights stay pruned: their score is 0, and where others' are too, they come last.
        scores = jax.tree.map(lambda s, m: jnp.where(m, s, -1.0), scores, mask)
        mask = make(scores, make.config.density ** (done / ROUNDS))
    return mask


BASELINES: dict[str, Callable[[ApplyFn, Problem, Making], Mask]] = {
    "random": _random,
    "magnitude": _magnitude,
    "snip": _by_gradient(snip_scores, "natural"),
    "snip-robust": _by_gradient(snip_scores, "dense"),
    "grasp": _by_gradient(grasp_scores, "natural"),
    "synflow": _synflow,
}
"""Masks that need no search, by name: `(apply, problem, make) -> mask`.

random, magnitude; snip, grasp, synflow as published; snip-robust is SNIP of the loss under attack.
"""


def baseline(
    name: str,
    apply: ApplyFn,
    problem: Problem,
    attack: Attack | None,
    config: MaskConfig,
    prunable: Prunable | None = None,
) -> Ticket:
    """A ticket without search: scores, allocation, selection, gain; pruned weights at zero.

    Args:
        name: in `BASELINES`.
        apply: the dense network's function.
        problem: the dense network at initialisation, training images and labels, threat model, key.
        attack: for those that look at attacked images; None for the others.
        config: density, allocation, gain.
        prunable: see `masks.prunable_leaves`.

    Returns:
        A ticket of exactly that density.

    Raises:
        InputError: unknown name, a network that is none, or what `masks.make` and
            `masks.energy_gain` raise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ntk_awt.attacks import PGD
        >>> from ntk_awt.threats import Linf
        >>> params = {"kernel": jnp.ones((8, 5)), "bias": jnp.zeros(5)}
        >>> apply = lambda w, x: x @ w["kernel"] + w["bias"]
        >>> x, y = jnp.zeros((3, 8)), jnp.zeros(3, int)
        >>> problem = Problem(params, x, y, Linf(0.1), jax.random.key(0))
        >>> ticket = baseline("random", apply, problem, PGD(steps=2), MaskConfig(density=0.1))
        >>> int(ticket.mask["kernel"].sum()), round(float(ticket.gain["kernel"]), 3)
        (4, 3.162)
    """
    choose("baseline", name, BASELINES)
    check_network(Network(apply, problem.params), problem.x)
    mask = BASELINES[name](apply, problem, Making(attack, config, prunable))
    return masks.sparse(problem.params, mask, config.gain, prunable)
