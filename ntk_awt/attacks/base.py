"""What every attack is, and the checked entry that users call.

An attack only maximises: given a loss for each image and a threat model it returns the best point
that it visited. Input checks, the choice of the loss and the report of success are here, once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.attacks.losses import Criterion, cross_entropy
from ntk_awt.errors import InputError, check_finite, check_images, check_labels
from ntk_awt.network import Network, check_network
from ntk_awt.threats import Threat, check_kind, check_threat
from ntk_awt.types import Images, Key, Labels, Logits, PerExample

LossFn: TypeAlias = Callable[[Images], PerExample]
"""`images[n, *shape] -> loss[n]`; the loss of an image depends on that image alone."""


def check_classes(shape: tuple[int, ...]) -> None:
    """Raise unless logits of this shape tell two classes or more apart."""
    if shape[-1] < 2:
        raise InputError(
            "logits",
            expected="those of two classes or more",
            got=f"shape {shape}",
            fix="for one output f give the logits (−f/2, f/2): their softmax is the sigmoid of f",
        )


@dataclass(frozen=True)
class NetworkLoss:
    """The loss z ↦ ℓ(f(z), y) for each image, and what it is made of.

    Attributes:
        network: f, folded: its weights γ⊙m⊙θ are computed here, not in every step of an attack.
        labels: y, [n].
        value: ℓ, a criterion such as `cross_entropy` or `squared`.

    Example:
        >>> from ntk_awt.attacks import squared
        >>> network = Network(lambda w, z: z @ w, jnp.eye(2))
        >>> print(NetworkLoss(network, jnp.array([0]), squared)(jnp.array([[3.0, 1.0]])))
        [2.5]
    """

    network: Network
    labels: Labels
    value: Criterion = cross_entropy

    def __post_init__(self):
        object.__setattr__(self, "network", self.network.folded())

    def logits(self, z: Images) -> Logits:
        """f(z), [n, c], in the dtype of z: attacks add and compare in that of the images."""
        if jnp.finfo(z.dtype).bits < 32:
            raise InputError(
                "attacked images",
                expected="float32 or float64, in which small steps are not lost",
                got=f"{z.dtype}",
                fix="images.astype('float32'); the weights may stay as they are",
            )
        logits = self.network(z)
        check_classes(logits.shape)
        return logits.astype(z.dtype)

    def of(self, logits: Logits) -> PerExample:
        """ℓ of logits that are known already."""
        return self.value(logits, self.labels)

    def __call__(self, z: Images) -> PerExample:
        return self.of(self.logits(z))


class Attack(Protocol):
    """A maximiser of losses over a threat set; hashable, so that jit can take it as static."""

    def run(
        self, loss: NetworkLoss, x: Images, threat: Threat, keys: Key
    ) -> tuple[Images, PerExample]:
        """The best point found for each image, and its loss.

        Pure and traceable: called inside jit by training, evaluation and the ticket search.

        Args:
            loss: to be maximised, for each image separately; attacks that want misclassified points
                rather than a high loss take the logits and labels from it.
            x: clean images [n, *shape], float32 or float64, inside `threat.bounds`; everything that
                an attack keeps has their dtype.
            threat: the allowed set.
            keys: one random key an image, [n]; an image's result depends on its own key only.

        Returns:
            Images [n, *shape] inside the threat set, and their losses [n].
        """
        ...


class Attacked(NamedTuple):
    """Outcome of an attack on n images.

    Attributes:
        images: [n, *shape], inside the threat set.
        loss: [n], cross-entropy in nats at `images`.
        success: [n], whether `images` are classified differently from their labels.
    """

    images: Images
    loss: PerExample
    success: jax.Array


def wide(values: jax.Array, like: Images) -> jax.Array:
    """One value an image, [n], shaped to broadcast against images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def select(mask: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """`yes` for the images in the mask [n], and `no` for the others."""
    return jnp.where(wide(mask, yes), yes, no)


def example_keys(key: Key, indices: jax.Array) -> Key:
    """One key an image, from its index in the data set: results don't depend on the batching."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def run_keys(keys: Key, index: jax.Array) -> Key:
    """The keys [n] of one restart or step, from the attack's key of each image."""
    return jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)


def check_given(what: str, threat: Threat | None, attack: Attack | None) -> tuple[Threat, Attack]:
    """Both of them; raise unless they are given where `what` needs attacked images."""
    if threat is None or attack is None:
        raise InputError(
            what,
            expected="a threat model and an attack",
            got="neither" if threat is attack else "one of them",
            fix="give both, or choose 'natural'",
        )
    return threat, attack


def check_examples(
    network: Network, x: Any, y: Any, threat: Threat | None
) -> tuple[np.ndarray, np.ndarray]:
    """Raise unless a network can be attacked at these examples.

    Args:
        network: f; only its parameters are looked at, not its mask or gain.
        x: images [n, *shape], floating, inside `threat.bounds`.
        y: labels [n], integers.
        threat: its radius must not be negative; it warns of one that does not fit the images. None
            where nothing is attacked: then there is no box either.

    Returns:
        The images and the labels in host memory: float32 (float64 images stay so where x64 is
        enabled) and int32.

    Raises:
        InputError: what is wrong, see `perturb` and `network.check_network`.
    """
    bounds = (-np.inf, np.inf)
    if threat is not None:
        check_kind(threat)
        bounds = threat.bounds
    check_images("images", x, bounds)
    if len(x) == 0:
        raise InputError("images", expected="at least one", got="none")
    wanted = np.float64 if np.asarray(x).dtype == np.float64 else np.float32
    images = np.asarray(x, jax.dtypes.canonicalize_dtype(wanted))  # float32 unless x64 is enabled
    if threat is not None:
        check_threat(threat, images)
    classes = check_network(network, images, empty=True)
    check_classes((len(x), classes))
    check_labels("labels", y, len(x), classes)
    return images, np.asarray(y, np.int32)


@partial(jax.jit, static_argnames="attack")
def _attacked(
    attack: Attack, network: Network, x: Images, y: Labels, threat: Threat, key: Key
) -> Attacked:
    keys = example_keys(key, jnp.arange(x.shape[0]))
    images, loss = attack.run(NetworkLoss(network, y), x, threat, keys)
    return Attacked(images, loss, jnp.argmax(network(images), -1) != y)


def perturb(
    attack: Attack, network: Network, x: Images, y: Labels, threat: Threat, key: Key
) -> Attacked:
    """Attack the cross-entropy of a network: x̃ ≈ argmax over z in B(x) of ℓ(f(z), y).

    Args:
        attack: e.g. `PGD(steps=40)`.
        network: f, dense or sparse.
        x: clean images [n, *shape], floating, inside `threat.bounds` (pixel units).
        y: labels [n], integers.
        threat: the allowed set.
        key: random key.

    Returns:
        `Attacked(images, loss, success)`.

    Raises:
        InputError: images that are integer, NaN or out of range, labels out of range or of another
            shape, a negative radius, a network that is none (`network.check_network`), logits
            that are not finite or of a single class.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ntk_awt.attacks import PGD
        >>> from ntk_awt.threats import Linf
        >>> network = Network(lambda w, x: x @ w, jnp.eye(2))
        >>> x, y = jnp.array([[0.5, 0.4]]), jnp.array([0])
        >>> result = perturb(PGD(steps=5), network, x, y, Linf(0.1), jax.random.key(0))
        >>> print(result.images.round(3), result.success)
        [[0.4 0.5]] [ True]
    """
    images, labels = map(jnp.asarray, check_examples(network, x, y, threat))
    result = _attacked(attack, network.folded(), images, labels, threat, key)
    check_finite("loss under attack", result.loss)
    return result
