"""What an attack that looks for misclassified points has found so far, for each image."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntk_awt.attacks.base import NetworkLoss, select
from ntk_awt.types import Images, Labels, Logits, PerExample


class Found(NamedTuple):
    """What an attack has found for each image so far.

    Attributes:
        images: [n, *shape].
        loss: [n], of the loss that the attack was given.
        fooled: [n], whether the images are misclassified.
    """

    images: Images
    loss: PerExample
    fooled: jax.Array


def nothing(x: Images) -> Found:
    """Before the first evaluation: the images themselves, with loss −∞."""
    return Found(x, jnp.full(x.shape[:1], -jnp.inf, x.dtype), jnp.zeros(x.shape[:1], bool))


def seen(loss: NetworkLoss, z: Images, logits: Logits) -> Found:
    """What an evaluation at z says of it; logits that are not finite fool nobody."""
    wrong = jnp.argmax(logits, axis=1) != loss.labels
    return Found(z, loss.of(logits), wrong & jnp.isfinite(logits).all(axis=1))


def keep(where: jax.Array, new: Found, old: Found) -> Found:
    """`new` for the images in the mask [n], and `old` for the others."""
    return Found(*map(partial(select, where), new, old))


def better_of(new: Found, old: Found) -> Found:
    """The last misclassified point, or where there is none the one of higher loss."""
    return keep(new.fooled | (~old.fooled & (new.loss > old.loss)), new, old)


def targets_of(loss: NetworkLoss, x: Images, count: int) -> Labels:
    """The classes of rank 2, 3, … at the clean images, [min(count, c − 1), n]."""
    logits = loss.logits(x)
    ranked = jax.lax.top_k(logits, min(count + 1, logits.shape[1]))[1]
    return ranked[:, 1:].T
