"""Natural and robust accuracy under one attack, with exact binomial intervals."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.attacks import Attack, NetworkLoss, check_examples, example_keys
from ntk_awt.errors import check_finite, check_number
from ntk_awt.network import Network
from ntk_awt.threats import Threat
from ntk_awt.types import Images, Key, Labels, Split


class Proportion(NamedTuple):
    """A share of n test images with its 95 % interval.

    Attributes:
        value: successes / n, in [0, 1].
        low, high: Clopper–Pearson interval: it covers the true share with probability ≥ 0.95.
        n: number of images.
    """

    value: float
    low: float
    high: float
    n: int


def proportion(successes: np.ndarray) -> Proportion:
    """The share of true entries, with its Clopper–Pearson 95 % interval.

    Args:
        successes: booleans [n].

    Source: Clopper & Pearson, "The use of confidence or fiducial limits" (1934), through SciPy.

    Example:
        >>> import numpy as np
        >>> p = proportion(np.array([True] * 9 + [False]))
        >>> p.value, round(p.low, 3), round(p.high, 3)
        (0.9, 0.555, 0.997)
    """
    from scipy.stats import binomtest

    count, n = int(np.sum(successes)), len(successes)
    interval = binomtest(count, n).proportion_ci(0.95, method="exact")
    return Proportion(count / n, float(interval.low), float(interval.high), n)


class Evaluation(NamedTuple):
    """Outcome of an evaluation on n images.

    Attributes:
        natural: accuracy on the clean images.
        robust: share of images that are right when clean and under attack.
        natural_correct, robust_correct: the same for each image, booleans [n].
        images: the attacked images [n, *shape].
    """

    natural: Proportion
    robust: Proportion
    natural_correct: np.ndarray
    robust_correct: np.ndarray
    images: np.ndarray


def combine(outcomes: Sequence[Evaluation]) -> Evaluation:
    """The worst case, image by image, of several evaluations of the same network and images.

    Its attacked images are those of the first evaluation that broke them, else of the last one.
    """
    right = np.stack([outcome.robust_correct for outcome in outcomes])
    first = np.where(right.all(0), len(outcomes) - 1, (~right).argmax(0))
    images = np.stack([outcome.images for outcome in outcomes])[first, np.arange(len(first))]
    robust = np.asarray(right.all(0))
    return outcomes[0]._replace(robust=proportion(robust), robust_correct=robust, images=images)


@partial(jax.jit, static_argnames="attack")
def _batch(
    network: Network, attack: Attack, x: Images, y: Labels, threat: Threat, keys: Key
) -> tuple[jax.Array, jax.Array, jax.Array, Images]:
    clean = network(x)
    images, _ = attack.run(NetworkLoss(network, y), x, threat, keys)
    attacked = network(images)
    finite = jnp.isfinite(clean).all(-1) & jnp.isfinite(attacked).all(-1)
    natural = jnp.argmax(clean, -1) == y
    return natural, natural & (jnp.argmax(attacked, -1) == y), finite, images


def measure(
    network: Network,
    split: Split,
    threat: Threat,
    attack: Attack,
    *,
    key: Key,
    batch_size: int = 500,
    before: Evaluation | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Accuracy of a network on clean and on attacked images.

    Args:
        network: f, dense or sparse.
        split: clean images [n, *shape], floating, inside `threat.bounds` (pixel units), and labels.
        threat: the threat model.
        attack: its attack on the cross-entropy.
        key: random key; each image's attack depends on the key and its index, not on the batch.
        batch_size: images at once; the last batch is padded so that nothing recompiles.
        before: the same under another attack; only the images that it left are attacked now, and
            the result is the worst case of both. The compiled program is that for all images.
        on_batch: called with the number of images done, for a progress bar.

    Returns:
        `Evaluation`.

    Raises:
        InputError: bad or no images, bad labels, or logits that are not finite.
    """
    check_number("batch_size", batch_size, low=1)
    x, y = check_examples(network, *split, threat)
    folded = network.folded()
    n, size = len(x), min(batch_size, len(x))
    chosen = np.arange(n) if before is None else np.flatnonzero(before.robust_correct)
    natural = np.zeros(n, bool) if before is None else before.natural_correct.copy()
    robust, images = np.zeros(n, bool), np.array(x)
    for begin in range(0, len(chosen), size):
        rows = np.resize(chosen[begin : begin + size], size)  # padding repeats the batch's images
        keys = example_keys(key, jnp.asarray(rows))
        batch = jnp.asarray(x[rows]), jnp.asarray(y[rows])
        natural[rows], robust[rows], finite, images[rows] = jax.device_get(
            _batch(folded, attack, *batch, threat, keys)
        )
        check_finite("logits of the evaluation", np.where(finite, 0.0, np.nan))
        on_batch(min(begin + size, len(chosen)))
    found = Evaluation(proportion(natural), proportion(robust), natural, robust, images)
    return found if before is None else combine([before, found])
