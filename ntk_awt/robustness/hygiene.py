"""Checks that a robust accuracy can be trusted: each one is a flag with a value and a limit.

Sources: Carlini et al., "On evaluating adversarial robustness" (2019); Athalye, Carlini and Wagner,
"Obfuscated gradients give a false sense of security" (2018); Tramèr et al., "On adaptive attacks to
adversarial example defenses" (2020).
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.attacks import PGD, Attack, NetworkLoss, Square, check_examples, cross_entropy
from ntk_awt.attacks.losses import Criterion, dlr
from ntk_awt.network import Network
from ntk_awt.robustness.accuracy import Evaluation, measure
from ntk_awt.threats import Linf, StrongL2, Threat, corners, diameter, length_of
from ntk_awt.types import Images, Key, Labels, Logits, Split

IMAGES = 500
"""The checks that attack take at most that many images: one of them is 0.2 points."""

QUERIES = 500
"""Of the black-box check."""

RADII = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
"""Where the accuracy is measured against the radius, in radii of the threat model."""

STEPS = (1, 10, 100)
"""Where the accuracy is measured against the steps of the attack."""

PASSES = 5
"""How often the same images are passed through the network, to see whether it is deterministic."""


class Flag(NamedTuple):
    """Outcome of one check.

    Attributes:
        name: of the check.
        value: what was measured.
        limit: the largest value that passes.
        unit: of both.
        status: pass, warn or fail.
        meaning: what the value is.
    """

    name: str
    value: float
    limit: float
    unit: str
    status: str
    meaning: str


class Hygiene(NamedTuple):
    """All checks of one network.

    Attributes:
        flags: in the order in which they were made.
        radii: {radius in pixel units: accuracy under attack}.
        steps: {steps: accuracy under attack}.
        union: robust accuracy on the checked images under all attacks together, those of other
            networks and the black-box attack included.
        images: number of images of these accuracies.
    """

    flags: tuple[Flag, ...]
    radii: Mapping[float, float]
    steps: Mapping[int, float]
    union: float
    images: int

    @property
    def failed(self) -> tuple[Flag, ...]:
        """The flags that say fail."""
        return tuple(flag for flag in self.flags if flag.status == "fail")

    def record(self) -> dict[str, Any]:
        """As plain values for JSON; null is a number that was not measured."""
        return {
            "flags": [flag._asdict() for flag in self.flags],
            "radii": [[radius, accuracy] for radius, accuracy in self.radii.items()],
            "steps": [[count, accuracy] for count, accuracy in self.steps.items()],
            "union": None if np.isnan(self.union) else self.union,
            "images": self.images,
        }


def flag(
    name: str, value: float, limit: float, unit: str, meaning: str, *, otherwise: str = "fail"
) -> Flag:
    """A flag that passes where the value is at most the limit; NaN never passes.

    Example:
        >>> flag("box", 0.0, 0.0, "pixel units", "largest excess").status
        'pass'
    """
    status = "pass" if value <= limit else otherwise
    return Flag(name, float(value), float(limit), unit, status, meaning)


def slack(n: int) -> float:
    """How far accuracies of n images may be off in the wrong direction: 0.5 points or one image."""
    return max(0.005, 1 / n) + 1e-9


# ---------------------------------------------------------------- the attacked images


def _excess(z: np.ndarray, x: np.ndarray, threat: Threat) -> np.ndarray:
    """By how much each image leaves the ball, in float64."""
    v = (z.astype(np.float64) - x.astype(np.float64)).reshape(len(x), -1)
    order = np.inf if isinstance(threat, Linf) else 2
    excess = np.linalg.norm(v, ord=order, axis=1) - float(threat.epsilon)
    if isinstance(threat, StrongL2):
        signal = np.linalg.norm(v @ np.asarray(threat.basis, np.float64), axis=1)
        excess = np.maximum(excess, signal - float(threat.delta))
    return excess


def ball(z: np.ndarray, x: np.ndarray, threat: Threat) -> Flag:
    """The largest ‖z − x‖ − ε (and ‖Uᵀ(z − x)‖ − δ), computed in float64, is at most 1e-6."""
    value = _excess(z, x, threat).max()
    return flag("ball", value, 1e-6, "pixel units", "largest ‖z − x‖ − ε in float64")


def box(z: np.ndarray, x: np.ndarray, threat: Threat) -> Flag:
    """No pixel leaves the box, in float64; the clean image's own values count as inside."""
    low, high = corners(threat.bounds, x.shape[1:])
    excess = np.maximum(np.minimum(low, x) - z, z - np.maximum(high, x))
    return flag("box", max(excess.max(), 0), 0, "pixel units", "largest excess")


def zero_radius(z: np.ndarray, x: np.ndarray) -> Flag:
    """Images attacked with radius 0 are the clean ones."""
    value = abs(z.astype(np.float64) - x).max()
    return flag("zero radius", value, 0, "pixel units", "largest change of a pixel at ε = 0")


# ---------------------------------------------------------------- the network


class Subject(NamedTuple):
    """What is checked.

    Attributes:
        network: f, folded.
        x, y: clean images [n, *shape] and labels [n].
        threat: the threat model.
    """

    network: Network
    x: np.ndarray
    y: np.ndarray
    threat: Threat

    def under(
        self, attack: Attack, threat: Threat, key: Key, rows: Any = slice(None)
    ) -> Evaluation:
        """The evaluation of these rows under an attack.

        Radii beyond the box, which allow no more than one that reaches its ends, are cut there.
        """
        longest = diameter(threat, self.x.shape[1:])
        if float(threat.epsilon) > longest:
            threat = dataclasses.replace(threat, epsilon=longest)  # pyright: ignore[reportArgumentType]
        return measure(self.network, Split(self.x, self.y)[rows], threat, attack, key=key)

    def logits(self, x: Images | np.ndarray) -> np.ndarray:
        """[n, classes]."""
        return np.asarray(_logits(self.network, jnp.asarray(x)))

    def gradients(self, criterion: Criterion, x: np.ndarray) -> np.ndarray:
        """∇_z ℓ(f(z), y) at z = x, [n, *shape]."""
        return np.asarray(_gradients(self.network, x, self.y, criterion))


@jax.jit
def _logits(network: Network, x: Images) -> Logits:
    return network(x)


@partial(jax.jit, static_argnames="criterion")
def _gradients(network: Network, x: Images, y: Labels, criterion: Criterion) -> Images:
    loss = NetworkLoss(network, y, criterion)
    return jax.grad(lambda z: loss(z).sum())(x)


def finite(subject: Subject, *points: np.ndarray) -> Flag:
    """Images, logits and input gradients of the cross-entropy, entry by entry (a reduction over NaN
    may lose it)."""
    count = 0
    for z in (subject.x, *points):
        for values in (z, subject.logits(z), subject.gradients(cross_entropy, z)):
            count += int((~np.isfinite(values)).sum())
    return flag("finite", count, 0, "entries", "images, logits and gradients that are not finite")


def deterministic(subject: Subject) -> Flag:
    """The same images give the same logits, five times over."""
    passes = np.stack([subject.logits(subject.x) for _ in range(PASSES)])
    value = np.ptp(passes, axis=0).max()
    return flag("deterministic", value, 0, "logits", f"largest change over {PASSES} passes")


def probabilities(subject: Subject) -> Flag:
    """Outputs that are probabilities are no logits: a softmax of a softmax hides gradients."""
    outputs = subject.logits(subject.x)
    like = (outputs >= 0).all(1) & (abs(outputs.sum(1) - 1) < 1e-3)
    return flag(
        "logits", like.mean(), 0.5, "share of images", "outputs ≥ 0 that sum to 1: probabilities"
    )


def zero_gradients(subject: Subject, criterion: Criterion) -> Flag:
    """Images whose gradient is exactly 0: their loss is flat there, and an attack is blind.

    Of the images that are classified right, since the others need no attack. (With the label's
    logit in third place, the ratio of logits is (z_π1 − z_π3)/(z_π1 − z_π3) = 1, and flat.)
    """
    right = subject.logits(subject.x).argmax(1) == subject.y
    flat = (subject.gradients(criterion, subject.x).reshape(len(subject.x), -1) == 0).all(1)
    name = criterion.__name__.replace("_", "-")
    return flag(
        f"zero gradient, {name}",
        (flat & right).sum() / max(right.sum(), 1),
        0.0 if criterion is dlr else 0.01,
        "share of right images",
        "input gradients that are exactly 0",
        otherwise="warn",
    )


def batches(attack: Attack, subject: Subject, key: Key, whole: np.ndarray) -> Flag:
    """Images in another batch get the same verdict from the attack.

    Args:
        attack: keys are one an image, so the batch should not matter.
        subject: network and images.
        key: with which `whole` was found.
        whole: verdicts [n] of the same images in larger batches.
    """
    part = slice(max(len(subject.x) // 2, 1))
    alone = subject.under(attack, subject.threat, key, part).robust_correct
    value = (alone != whole[part]).mean()
    return flag(
        "batch", value, slack(len(alone)), "share of images", "verdicts that change with the batch"
    )


# ---------------------------------------------------------------- the attack's strength


def scaled(threat: Threat, factor: float) -> Threat:
    """The threat model with all its radii times a factor."""
    radii = {"epsilon": threat.epsilon * factor}
    if isinstance(threat, StrongL2):
        radii["delta"] = threat.delta * factor
    return dataclasses.replace(threat, **radii)  # pyright: ignore[reportArgumentType]


def monotone(name: str, accuracies: Sequence[float], n: int, of: str) -> Flag:
    """The accuracy of n images never grows by more than 0.5 points or one image."""
    value = max((b - a for a, b in pairwise(accuracies)), default=0.0)
    meaning = f"largest growth of the first attack's accuracy with {of}"
    return flag(name, value, slack(n), "share of images", meaning)


def large_radius(attack: Attack, subject: Subject, key: Key) -> Flag | None:
    """Where every image is allowed, no more than the most frequent class can stay right.

    In a box with open ends the images themselves set them, so that each one allows all the others.
    Of images of one class the rule cannot say anything: None, with a warning.
    """
    threat, x = subject.threat, subject.x
    top = np.bincount(subject.y).max() / len(subject.y)
    if top == 1:
        warnings.warn(
            "the rule of a large radius is left out: it needs images of two classes or more, got "
            f"only class {subject.y[0]}",
            stacklevel=2,
        )
        return None
    low, high = corners(threat.bounds, x.shape[1:])
    low, high = np.where(np.isinf(low), x.min(0), low), np.where(np.isinf(high), x.max(0), high)
    reach = length_of(threat, high - low)
    radii = {"epsilon": reach} | ({"delta": reach} if isinstance(threat, StrongL2) else {})
    everything = dataclasses.replace(threat, **radii)  # pyright: ignore[reportArgumentType]
    accuracy = subject.under(attack, everything, key).robust.value
    return flag(
        "large radius",
        accuracy - top,
        0.01,
        "share of images",
        "accuracy beyond the most frequent class, where every image is allowed",
    )


def single_step(subject: Subject, key: Key, accuracy: float) -> Flag:
    """The attack is not weaker than one signed (or normalised) gradient step of length ε."""
    fgsm = PGD(steps=1, step_ratio=1.0, random_start=False)
    value = accuracy - subject.under(fgsm, subject.threat, key).robust.value
    return flag(
        "single step", value, slack(len(subject.x)), "share of images", "broken by FGSM beyond ours"
    )


def black_box(subject: Subject, key: Key) -> np.ndarray:
    """Which images random search leaves right, [n]; it needs no gradient."""
    return subject.under(Square(QUERIES), subject.threat, key).robust_correct


def gain(name: str, before: np.ndarray, after: np.ndarray, meaning: str) -> Flag:
    """Another attack breaks at most 0.2 points of what ours left.

    Args:
        name: of the check.
        before: right under our attack, [n].
        after: right under ours and the other one.
        meaning: what the other attack is.
    """
    value = before.mean() - after.mean()
    return flag(name, value, max(0.002, 1 / len(before)) + 1e-9, "share of images", meaning)


# ---------------------------------------------------------------- masks and splits


def mask_kept(network: Network, ticket: Network | None) -> Flag:
    """The mask is that of the ticket, and every pruned weight is zero before the mask is applied.

    Args:
        network: as evaluated, with a mask.
        ticket: the same network at initialisation; None where that is not known.
    """
    before = network.mask if ticket is None else ticket.mask
    changed = jax.tree.map(
        lambda a, b: np.sum(np.asarray(a) != np.asarray(b)), network.mask, before
    )
    alive = jax.tree.map(
        lambda m, w: np.sum((np.asarray(m) == 0) & (np.asarray(w) != 0)),
        network.mask,
        network.params,
    )
    count = sum(map(int, jax.tree.leaves(changed))) + sum(map(int, jax.tree.leaves(alive)))
    return flag("mask", count, 0, "weights", "mask entries changed, and pruned weights not zero")


def selection(chosen_on: np.ndarray, test: np.ndarray) -> Flag:
    """Nothing was chosen by looking at test images.

    Args:
        chosen_on: images by which settings, checkpoints or tickets were chosen, [m, *shape].
        test: test images [n, *shape].
    """
    known = {image.tobytes() for image in np.asarray(test, np.float32)}
    same = [image.tobytes() in known for image in np.asarray(chosen_on, np.float32)]
    return flag(
        "selection",
        float(np.mean(same)),
        0.01,
        "share of images",
        "validation images in the test set",
    )


# ---------------------------------------------------------------- all of them


def check(
    network: Network,
    split: Split,
    threat: Threat,
    attack: Attack,
    *,
    key: Key,
    attacked: np.ndarray | None = None,
    verdicts: np.ndarray | None = None,
    transferred: np.ndarray | None = None,
    ticket: Network | None = None,
    chosen_on: np.ndarray | None = None,
    on_share: Callable[[float], None] = lambda share: None,
) -> Hygiene:
    """Judge a network, an attack and a split by every rule.

    If logits or gradients are not finite only that is reported: nothing else has a meaning then.

    Args:
        network: f, dense or sparse.
        split: clean test images [n, *shape] and labels [n]; the first `IMAGES` are taken.
        threat: the threat model.
        attack: the evaluation's first attack, with a field `steps`. Rules that need it at other
            radii, steps or batches make it again; those that try another attack (single step, black
            box, transfer) compare it with what the whole evaluation left right.
        key: random key with which the evaluation was made.
        attacked: the evaluation's attacked images [n, *shape], the worst case of all its attacks;
            those of `attack` alone, made here, if not given.
        verdicts: which images `attack` alone left right in the evaluation, bool [n]; made here if
            not given.
        transferred: images attacked against another network, e.g. the dense one.
        ticket: what a sparse network was before training; its mask has to be the same.
        chosen_on: images by which anything was chosen.
        on_share: called with the share that is done, in [0, 1].

    Returns:
        `Hygiene`.

    Raises:
        InputError: images, labels or logits of another kind, see `attacks.perturb`.

    Source: rules of the literature above; see each rule.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from ntk_awt.attacks import PGD
        >>> from ntk_awt.threats import Linf
        >>> x = np.random.default_rng(0).uniform(0, 1, (50, 4)).astype(np.float32)
        >>> y = x.argmax(1)
        >>> network = Network(lambda w, z: z @ w, jnp.eye(4))
        >>> found = check(network, Split(x, y), Linf(0.1), PGD(steps=20), key=jax.random.key(0))
        >>> [flag.name for flag in found.flags if flag.status != "pass"]
        []
    """
    # Weights that are not finite are for the first rule, so the network enters by its shapes.
    shapes = jax.eval_shape(lambda: network)
    images, labels = np.asarray(split.x)[:IMAGES], np.asarray(split.y)[:IMAGES]
    x, y = check_examples(shapes, images, labels, threat)
    subject = Subject(network.folded(), x, y, threat)
    sound = finite(subject, *(() if attacked is None else (attacked[:IMAGES],)))
    if sound.status != "pass":
        return Hygiene((sound,), {}, {}, float("nan"), len(x))

    @cache
    def at(factor: float) -> Evaluation:
        return subject.under(attack, scaled(threat, factor), key)

    right = at(1.0).robust_correct if verdicts is None else verdicts[:IMAGES]
    z = at(1.0).images if attacked is None else attacked[:IMAGES]
    survivors = right & (subject.logits(z).argmax(1) == y)
    union = survivors
    flags = [sound]
    radii: dict[float, float] = {}
    steps: dict[int, float] = {}

    def measure_radius(factor: float) -> None:
        value = right.mean() if factor == 1 else at(factor).robust.value
        radii[factor * float(threat.epsilon)] = float(value)

    def measure_steps(count: int) -> None:
        changed = dataclasses.replace(attack, steps=count)  # pyright: ignore[reportArgumentType]
        same = changed == attack
        value = right.mean() if same else subject.under(changed, threat, key).robust.value
        steps[count] = float(value)

    def others(name: str, left: np.ndarray, meaning: str) -> Flag:
        nonlocal union
        union = union & left
        return gain(name, survivors, survivors & left, meaning)

    def random_search() -> Flag:
        return others("black box", black_box(subject, key), f"broken by Square, {QUERIES} queries")

    def transfer(images: np.ndarray) -> Flag:
        left = subject.logits(images).argmax(1) == y
        return others("transfer", left, "broken by attacks on another network")

    rules: list[Callable[[], Flag | None]] = [
        lambda: ball(z, x, threat),
        lambda: box(z, x, threat),
        lambda: zero_radius(at(0.0).images, x),
        lambda: deterministic(subject),
        lambda: probabilities(subject),
        lambda: zero_gradients(subject, cross_entropy),
    ]
    if subject.logits(x[:1]).shape[1] > 2:
        rules.append(lambda: zero_gradients(subject, dlr))
    rules += [
        lambda: batches(attack, subject, key, right),
        *(partial(measure_radius, factor) for factor in RADII),
        lambda: monotone("radius", list(radii.values()), len(x), "ε"),
        *(partial(measure_steps, count) for count in STEPS),
        lambda: monotone("steps", list(steps.values()), len(x), "steps"),
        lambda: large_radius(attack, subject, key),
        lambda: single_step(subject, key, survivors.mean()),
        random_search,
    ]
    if transferred is not None:
        rules.append(lambda: transfer(transferred[:IMAGES]))
    if network.mask is not None:
        rules.append(lambda: mask_kept(network, ticket))
    if chosen_on is not None:
        rules.append(lambda: selection(chosen_on, x))
    for done, rule in enumerate(rules, 1):
        if (found := rule()) is not None:
            flags.append(found)
        on_share(done / len(rules))
    return Hygiene(tuple(flags), radii, steps, float(union.mean()), len(x))
