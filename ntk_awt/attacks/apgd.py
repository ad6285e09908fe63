"""Auto-PGD on any threat model: step sizes that halve themselves, momentum, restarts from the best.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (2020), algorithm 1.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.attacks.base import NetworkLoss, run_keys, select, wide
from ntk_awt.attacks.found import Found, better_of, keep, nothing, seen, targets_of
from ntk_awt.attacks.losses import OBJECTIVES, Objective
from ntk_awt.errors import check_count, choose
from ntk_awt.threats import Threat
from ntk_awt.types import Images, Key, Labels, Logits, PerExample

_MOMENTUM = 0.75
"""a: the share of the new step beside that of the last movement."""

_RISES = 0.75
"""The step size is halved where the loss rose in at most that share of a window's steps."""


def checkpoints(steps: int) -> list[int]:
    """The steps at which the step size may be halved.

    The first gap is max(⌊0.22N⌋, 1), each next one smaller by max(⌊0.03N⌋, 1), but not below
    max(⌊0.06N⌋, 1).

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    # Whole percents: 0.06·50 is 3, and less than that in floating point.
    gap, less, least = (max(percent * steps // 100, 1) for percent in (22, 3, 6))
    found, at = [], gap
    while at <= steps:
        found.append(at)
        gap = max(gap - less, least)
        at += gap
    return found


def objective_for(name: str, num_classes: int) -> Objective:
    """The objective, or what takes its place (with a warning) where there are too few classes."""
    found = OBJECTIVES[name]
    if num_classes < found.classes:
        warnings.warn(
            f"{name} needs {found.classes} classes, the network has {num_classes}: "
            f"{found.instead} takes its place",
            stacklevel=2,
        )
        return OBJECTIVES[found.instead]
    return found


class _State(NamedTuple):
    """One run in progress; everything is per image.

    Attributes:
        z, before: this iterate and the last one.
        step: η.
        found: what will be returned.
        best, best_loss, best_gradient: the iterate of highest objective.
        last_loss: objective at the last iterate.
        rises: increases of the objective since the checkpoint.
        checked_loss: the highest objective as of the last checkpoint.
        halved: whether η was halved there.
    """

    z: Images
    before: Images
    step: PerExample
    found: Found
    best: Images
    best_loss: PerExample
    best_gradient: Images
    last_loss: PerExample
    rises: PerExample
    checked_loss: PerExample
    halved: jax.Array

    def found_with(self, new: Found, value: PerExample) -> Found:
        """What has been found after an evaluation with that objective."""
        better = value > self.best_loss
        return keep(new.fooled | (~self.found.fooled & better), new, self.found)


@dataclass(frozen=True)
class APGD:
    """Projected gradient steps with momentum, and a step size that adapts to each image.

    z = P(x_i + η·ascent), x_{i+1} = P(x_i + a(z − x_i) + (1 − a)(x_i − x_{i−1})), with a = 1 at the
    first step and 0.75 later, from a random point of the sphere with η = 2ε. At a checkpoint η is
    halved and the best iterate taken up where the objective rose in at most 75 % of the steps since
    the last one, or where η was not halved there and the best objective has not changed since.

    One run costs `steps` forward-backward passes and one forward pass, times `restarts`, and times
    the targets if the objective has them.

    Attributes:
        objective: a name in `OBJECTIVES`; where there are too few classes another takes its place.
        steps: gradient steps.
        restarts: independent runs.
        targets: how many classes, by rank at the clean image, a targeted objective tries.

    Returns (of `run`): the last misclassified point, and where there is none the one of the highest
    loss.

    Raises:
        InputError: an unknown objective, or numbers that are not whole or too small.
    """

    objective: str = "cross-entropy"
    steps: int = 100
    restarts: int = 1
    targets: int = 9

    def __post_init__(self):
        choose("APGD objective", self.objective, OBJECTIVES)
        check_count("APGD steps", self.steps, low=0)
        check_count("APGD restarts", self.restarts, low=1)
        check_count("APGD targets", self.targets, low=1)

    def run(
        self, loss: NetworkLoss, x: Images, threat: Threat, keys: Key
    ) -> tuple[Images, PerExample]:
        """See `Attack.run`."""
        num_classes = jax.eval_shape(loss.logits, x).shape[1]
        objective = objective_for(self.objective, num_classes)
        targets = targets_of(loss, x, self.targets) if objective.targeted else loss.labels[None]
        runs = self.restarts * len(targets)

        def one(found: Found, run: tuple[jax.Array, Labels]) -> tuple[Found, None]:
            index, target = run
            new = self._one_run(loss, objective, target, x, threat, run_keys(keys, index))
            return better_of(new, found), None

        each = (jnp.arange(runs), jnp.tile(targets, (self.restarts, 1)))
        found, _ = jax.lax.scan(one, nothing(x), each)
        return found.images, found.loss

    def _one_run(
        self,
        loss: NetworkLoss,
        objective: Objective,
        target: Labels,
        x: Images,
        threat: Threat,
        keys: Key,
    ) -> Found:
        def values(z: Images) -> tuple[jax.Array, tuple[PerExample, Logits]]:
            logits = loss.logits(z)
            value = objective.value(logits, loss.labels, target)
            return value.sum(), (value, logits)

        def step(state: _State, at: tuple[jax.Array, jax.Array]) -> tuple[_State, None]:
            index, window = at
            z = state.z
            (_, (value, logits)), gradient = jax.value_and_grad(values, has_aux=True)(z)
            state = self._note(state, seen(loss, z, logits), value, gradient, index)
            z, gradient, state = self._check(state, gradient, window)
            eta, a = wide(state.step, x), jnp.where(index, _MOMENTUM, 1.0)
            moved = threat.project(z + eta * threat.ascent(gradient), x)
            moved = threat.project(z + a * (moved - z) + (1 - a) * (z - state.before), x)
            return state._replace(z=moved.astype(x.dtype), before=z), None

        start, lowest = threat.sphere_start(keys, x), jnp.full(x.shape[:1], -jnp.inf, x.dtype)
        none, false = jnp.zeros(x.shape[:1], x.dtype), jnp.zeros(x.shape[:1], bool)
        first = _State(
            z=start,
            before=start,
            step=jnp.full(x.shape[:1], 2 * threat.epsilon, x.dtype),
            found=nothing(x),
            best=start,
            best_loss=lowest,
            best_gradient=jnp.zeros_like(x),
            last_loss=lowest,
            rises=none,
            checked_loss=lowest,
            halved=~false,
        )
        windows = np.zeros(self.steps)
        last = 0
        for at in checkpoints(self.steps):
            if at < self.steps:
                windows[at], last = at - last, at
        at_steps = jnp.arange(self.steps), jnp.asarray(windows, x.dtype)
        state, _ = jax.lax.scan(step, first, at_steps)
        (_, (value, logits)) = values(state.z)
        return state.found_with(seen(loss, state.z, logits), value)

    def _note(
        self, state: _State, new: Found, value: PerExample, gradient: Images, index: jax.Array
    ) -> _State:
        """Take up what an evaluation shows."""
        better = value > state.best_loss
        return state._replace(
            found=state.found_with(new, value),
            best=select(better, new.images, state.best),
            best_loss=jnp.where(better, value, state.best_loss),
            best_gradient=select(better, gradient, state.best_gradient),
            last_loss=value,
            rises=state.rises + ((value > state.last_loss) & (index > 0)).astype(value.dtype),
            # Up to the first checkpoint "since the last one" means since the start.
            checked_loss=jnp.where(index == 0, value, state.checked_loss),
        )

    def _check(
        self, state: _State, gradient: Images, window: jax.Array
    ) -> tuple[Images, Images, _State]:
        """At a checkpoint (window > 0) halve steps and restart; the point and gradient to use."""
        few = state.rises <= _RISES * window
        stuck = ~state.halved & (state.checked_loss >= state.best_loss)
        here = window > 0
        halve = here & (few | stuck)
        return (
            select(halve, state.best, state.z),
            select(halve, state.best_gradient, gradient),
            state._replace(
                step=jnp.where(halve, state.step / 2, state.step),
                rises=jnp.where(here, 0, state.rises),
                checked_loss=jnp.where(here, state.best_loss, state.checked_loss),
                halved=jnp.where(here, halve, state.halved),
            ),
        )
