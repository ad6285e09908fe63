"""Projected gradient descent on any threat model, as one scan.

Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018); here
the iterate with the highest loss is kept instead of the last one, or the last misclassified one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ntk_awt.attacks.base import LossFn, NetworkLoss, run_keys
from ntk_awt.attacks.found import Found, better_of, nothing, seen
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
        misclassified: prefer a misclassified point to one of higher loss, as evaluations want it;
            training and searches maximise the loss.

    Raises:
        InputError: steps that are no whole number ≥ 0, restarts that are none ≥ 1, or a step ratio
            that is not positive.
    """

    steps: int = 40
    step_ratio: float = 2.5
    restarts: int = 1
    random_start: bool = True
    misclassified: bool = False

    def __post_init__(self):
        check_count("PGD steps", self.steps, low=0)
        check_count("PGD restarts", self.restarts, low=1)
        check_number("PGD step ratio", self.step_ratio, low=0, low_open=True)

    def run(
        self, loss: NetworkLoss | LossFn, x: Images, threat: Threat, keys: Key
    ) -> tuple[Images, PerExample]:
        """See `Attack.run`."""
        step_size = self.step_ratio * threat.epsilon / max(self.steps, 1)

        def look(z: Images) -> Found:
            if not self.misclassified:
                return Found(z, loss(z).astype(x.dtype), jnp.zeros(x.shape[:1], bool))
            assert isinstance(loss, NetworkLoss)
            return seen(loss, z, loss.logits(z))

        def total(z: Images) -> tuple[jax.Array, Found]:
            found = look(z)
            return found.loss.sum(), found

        ascend = jax.grad(total, has_aux=True)

        def step(carry: tuple[Images, Found], _: None) -> tuple[tuple[Images, Found], None]:
            z, best = carry
            gradient, found = ascend(z)
            moved = threat.project(z + step_size * threat.ascent(gradient), x)
            return (moved, better_of(found, best)), None

        def restart(best: Found, index: jax.Array) -> tuple[Found, None]:
            z = threat.random_start(run_keys(keys, index), x) if self.random_start else x
            (z, best), _ = jax.lax.scan(step, (z, best), length=self.steps)
            return better_of(look(z), best), None

        # An image whose losses are all NaN comes back as it was.
        best, _ = jax.lax.scan(restart, nothing(x), jnp.arange(self.restarts))
        return best.images, best.loss
