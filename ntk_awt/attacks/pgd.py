"""Projected gradient descent on any threat model, as one scan.

Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018); here
the iterate with the highest loss is kept instead of the last one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ntk_awt.attacks.base import LossFn, run_keys, select
from ntk_awt.errors import check_count, check_number
from ntk_awt.threats import Threat
from ntk_awt.types import Images, Key, PerExample


@dataclass(frozen=True)
class PGD:
    """z ← P_B(x)(z + η·ascent(∇ℓ(z))) with η = step_ratio·ε/steps, best iterate kept.

    One run costs `steps` forward-backward passes and one forward pass, times `restarts`.

    Attributes:
        steps: gradient steps; 0 gives the start.
        step_ratio: how far all steps together could go, in radii.
        restarts: independent runs; the highest loss of all is kept for each image.
        random_start: start at a random point of the set rather than at x.

    Raises:
        InputError: steps that are no whole number ≥ 0, restarts that are none ≥ 1, or a step ratio
            that is not positive.
    """

    steps: int = 40
    step_ratio: float = 2.5
    restarts: int = 1
    random_start: bool = True

    def __post_init__(self):
        check_count("PGD steps", self.steps, low=0)
        check_count("PGD restarts", self.restarts, low=1)
        check_number("PGD step ratio", self.step_ratio, low=0, low_open=True)

    def run(self, loss: LossFn, x: Images, threat: Threat, keys: Key) -> tuple[Images, PerExample]:
        """See `Attack.run`."""
        step_size = self.step_ratio * threat.epsilon / max(self.steps, 1)
        value_and_grad = jax.value_and_grad(
            lambda z: (lambda values: (values.sum(), values))(loss(z)), has_aux=True
        )

        def keep_best(best: tuple, z: Images, values: PerExample) -> tuple:
            images, highest = best
            better = values > highest
            return select(better, z, images), jnp.where(better, values, highest)

        def step(carry: tuple, _: None) -> tuple:
            z, best = carry
            (_, values), gradient = value_and_grad(z)
            best = keep_best(best, z, values)
            return (threat.project(z + step_size * threat.ascent(gradient), x), best), None

        def restart(best: tuple, index: jax.Array) -> tuple:
            z = threat.random_start(run_keys(keys, index), x) if self.random_start else x
            (z, best), _ = jax.lax.scan(step, (z, best), length=self.steps)
            return keep_best(best, z, loss(z)), None

        # An image whose losses are all NaN comes back as it was.
        nothing = (x, jnp.full(x.shape[:1], -jnp.inf, x.dtype))
        best, _ = jax.lax.scan(restart, nothing, jnp.arange(self.restarts))
        return best
