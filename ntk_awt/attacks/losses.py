"""Losses of logits that attacks maximise: criteria of training, and differences of logits, scaled.

Unlike the cross-entropy the differences don't saturate, and DLR does not change with the scale of
the logits. Gradients flow through the denominators.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ntk_awt.types import Labels, Logits, PerExample

Criterion: TypeAlias = Callable[[Logits, Labels], PerExample]
"""`(logits[n, c], labels[n]) -> loss[n]`; the loss of an image depends on its logits alone."""

_TINY = 1e-12


def cross_entropy(logits: Logits, y: Labels) -> PerExample:
    """−log softmax(f)_y, in nats.

    Args:
        logits: f, [n, c].
        y: labels [n], integers.

    Returns:
        [n], in the dtype of the logits.

    Example:
        >>> print(cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([0])).round(3))
        [0.693]
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def squared(logits: Logits, y: Labels) -> PerExample:
    """½‖f − onehot(y)‖².

    Args:
        logits: f, [n, c].
        y: labels [n], integers.

    Returns:
        [n], in the dtype of the logits.

    Example:
        >>> print(squared(jnp.array([[3.0, 1.0]]), jnp.array([0])))
        [2.5]
    """
    difference = logits - jax.nn.one_hot(y, logits.shape[1], dtype=logits.dtype)
    return jnp.sum(difference**2, -1) / 2


CRITERIA: dict[str, Criterion] = {"cross-entropy": cross_entropy, "squared": squared}
"""Criteria by name."""


def _entry(logits: Logits, classes: Labels) -> PerExample:
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def margin(logits: Logits, y: Labels) -> PerExample:
    """max_{i≠y} z_i − z_y, in logits: positive where the label y is not the largest.

    Example:
        >>> print(margin(jnp.array([[3.0, 1.0, 0.0]]), jnp.array([0])))
        [-2.]
    """
    others = jnp.where(jax.nn.one_hot(y, logits.shape[1], dtype=bool), -jnp.inf, logits)
    # By index: the gradient of a maximum looks for entries that equal it, and XLA may compute the
    # logits anew for that, rounded otherwise (jax-ml/jax#40564).
    return targeted_margin(logits, y, others.argmax(axis=1))


def dlr(logits: Logits, y: Labels) -> PerExample:
    """−(z_y − max_{i≠y} z_i) / (z_π1 − z_π3 + 1e-12), with z_π1 ≥ z_π2 ≥ … the sorted logits.

    Args:
        logits: [n, c], c ≥ 3.
        y: labels [n].

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness" (2020), equation 6.

    Example:
        >>> print(dlr(jnp.array([[3.0, 1.0, -1.0]]), jnp.array([0])))
        [-0.5]
    """
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_margin(logits: Logits, y: Labels, target: Labels) -> PerExample:
    """z_t − z_y, in logits."""
    return _entry(logits, target) - _entry(logits, y)


def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> PerExample:
    """−(z_y − z_t) / (z_π1 − ½(z_π3 + z_π4) + 1e-12), with z_π1 ≥ z_π2 ≥ … the sorted logits.

    Args:
        logits: [n, c], c ≥ 4.
        y: labels [n].
        target: the class t [n] that is to win.

    Source: Croce and Hein (2020), equation 7.

    Example:
        >>> logits = jnp.array([[3.0, 1.0, 0.0, -2.0]])
        >>> print(targeted_dlr(logits, jnp.array([0]), jnp.array([2])))
        [-0.75]
    """
    top = jax.lax.top_k(logits, 4)[0]
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY
    return targeted_margin(logits, y, target) / scale


class Objective(NamedTuple):
    """What an attack on logits maximises.

    Attributes:
        value: `(logits[n, c], labels[n], targets[n]) -> loss[n]`.
        targeted: whether it depends on the targets.
        classes: how many it needs at least.
        instead: name of what takes its place where there are fewer.
    """

    value: Callable[[Logits, Labels, Labels], PerExample]
    targeted: bool = False
    classes: int = 2
    instead: str = ""


OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": Objective(lambda z, y, _: cross_entropy(z, y)),
    "dlr": Objective(lambda z, y, _: dlr(z, y), classes=3, instead="cross-entropy"),
    "targeted-margin": Objective(targeted_margin, targeted=True),
    "targeted-dlr": Objective(targeted_dlr, targeted=True, classes=4, instead="targeted-margin"),
}
"""Objectives by name."""
