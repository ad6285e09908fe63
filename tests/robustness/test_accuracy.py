"""Accuracies against a NumPy loop, intervals against their definition, batches that don't show."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ntk_awt.attacks import PGD
from ntk_awt.errors import InputError
from ntk_awt.network import Network
from ntk_awt.robustness.accuracy import measure, proportion
from ntk_awt.threats import L2, THREATS, Linf
from ntk_awt.types import Split
from tests.counting import Counting
from tests.threat_models import make

SLOW = ("test_the_batch_size_does_not_show *l2",)

N, D, CLASSES = 23, 8, 3
STEPS, EPSILON = 4, 0.1
RNG = np.random.default_rng(0)
X = np.clip(RNG.uniform(-0.3, 1.3, (N, D)), 0, 1).astype(np.float32)
W = RNG.normal(size=(D, CLASSES)).astype(np.float32)
Y = np.where(RNG.uniform(size=N) < 0.8, (X @ W).argmax(1), RNG.integers(0, CLASSES, N))


def apply(params: Any, x: Any) -> Any:
    return x @ params


FIXED = PGD(steps=STEPS, random_start=False)


def run(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "apply": apply,
        "params": jnp.asarray(W),
        "x": X,
        "y": Y,
        "threat": Linf(EPSILON),
        "attack": PGD(steps=STEPS),
        "key": jax.random.key(0),
        "batch_size": 8,
    } | changes
    network = Network(arguments.pop("apply"), arguments.pop("params"))
    return measure(network, Split(arguments.pop("x"), arguments.pop("y")), **arguments)


# ---------------------------------------------------------------- accuracies


def loop(x: np.ndarray, y: np.ndarray) -> tuple[list[bool], list[bool], np.ndarray]:
    """PGD on softmax regression, one image at a time, in float64."""
    w = W.astype(np.float64)
    natural, robust, attacked = [], [], []
    for image, label in zip(x.astype(np.float64), y, strict=True):
        z, points = image, []
        for _ in range(STEPS + 1):
            logits = z @ w
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            points.append((-np.log(p[label]), z))
            gradient = w @ (p - np.eye(CLASSES)[label])
            z = z + 2.5 * EPSILON / STEPS * np.sign(gradient)
            z = np.clip(np.clip(z, image - EPSILON, image + EPSILON), 0, 1)
        best = max(points, key=lambda point: point[0])[1]
        attacked.append(best)
        natural.append(bool((image @ w).argmax() == label))
        robust.append(natural[-1] and bool((best @ w).argmax() == label))
    return natural, robust, np.array(attacked)


def check_against_loop(result: Any) -> None:
    natural, robust, attacked = loop(X, Y)
    np.testing.assert_array_equal(result.natural_correct, natural)
    np.testing.assert_array_equal(result.robust_correct, robust)
    np.testing.assert_allclose(result.images, attacked, atol=2e-6, rtol=0)  # a few roundings a step
    assert result.natural.value == np.mean(natural)
    assert result.robust.value == np.mean(robust)
    assert result.natural.n == result.robust.n == N
    assert np.mean(robust) < np.mean(natural) < 1  # the data tell the two apart


def test_against_a_loop():
    check_against_loop(run(attack=FIXED))


def test_wrong_evaluations_are_rejected():
    result = run(attack=FIXED)
    for wrong in (
        result._replace(robust_correct=result.natural_correct),
        run(attack=FIXED, y=np.roll(Y, 1)),
        run(attack=FIXED, threat=Linf(0.0)),
        run(attack=FIXED, params=jnp.asarray(-W)),
    ):
        with pytest.raises(AssertionError):
            check_against_loop(wrong)


@pytest.mark.parametrize("name", sorted(THREATS))
def test_the_batch_size_does_not_show(name: str):
    """Whole, padded and single batches give each image the same attack and the same verdict."""
    results = [run(threat=make(name, EPSILON, D), batch_size=b) for b in (8, 1, 500)]
    for other in results[1:]:
        np.testing.assert_array_equal(other.natural_correct, results[0].natural_correct)
        np.testing.assert_array_equal(other.robust_correct, results[0].robust_correct)
        # Another batch size is another program: sums of D products in another order, (D + 4)u of
        # the gradient, over a few steps. Another random start is away by a good part of ε.
        np.testing.assert_allclose(other.images, results[0].images, atol=1e-5, rtol=0)
        assert other.natural == results[0].natural
        assert other.robust == results[0].robust
    for n in (1, 8, 9):  # less than a batch, a whole one, one image more
        some = run(threat=make(name, EPSILON, D), x=X[:n], y=Y[:n])
        assert some.images.shape == (n, D)
        assert some.robust.n == n
        np.testing.assert_allclose(some.images, results[0].images[:n], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(THREATS))
def test_robust_is_never_above_natural(name: str):
    for epsilon in (0.01, 0.1, 0.5):
        result = run(threat=make(name, epsilon, D))
        assert np.all(result.robust_correct <= result.natural_correct)
        assert result.robust.value <= result.natural.value
    zero = run(threat=make(name, 0.0, D))
    np.testing.assert_array_equal(zero.robust_correct, zero.natural_correct)
    np.testing.assert_array_equal(zero.images, X)
    assert zero.robust == zero.natural


@dataclass(frozen=True)
class Grey:
    """An attack that returns a grey image, wherever it lies."""

    def run(self, loss: Any, x: Any, threat: Any, keys: Any) -> Any:
        z = jnp.full_like(x, 0.5)
        return z, loss(z)


def test_a_wrong_image_is_not_robust_even_if_the_attack_corrects_it():
    result = run(attack=Grey(), y=np.full(N, W.sum(0).argmax()))
    assert not result.natural_correct.all()
    np.testing.assert_array_equal(result.robust_correct, result.natural_correct)


def test_one_trace_for_all_batches_and_radii():
    attack, done = Counting(FIXED), []
    run(attack=attack, on_batch=done.append)
    assert done == [8, 16, 23]
    run(attack=attack, threat=Linf(0.2), key=jax.random.key(1), params=jnp.asarray(2 * W))
    assert len(attack.traces) == 1


def test_progress_of_one_batch():
    done = []
    run(batch_size=500, on_batch=done.append)
    assert done == [N]


def test_key_decides():
    first, same, other = (run(threat=L2(0.3), key=jax.random.key(k)).images for k in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.any(first != other)


# ---------------------------------------------------------------- intervals


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    """By quantiles of the beta distribution."""
    low = 0.0 if k == 0 else scipy.stats.beta.ppf(0.025, k, n - k + 1)
    high = 1.0 if k == n else scipy.stats.beta.ppf(0.975, k + 1, n - k)
    return float(low), float(high)


def ours(k: int, n: int) -> tuple[float, float]:
    p = proportion(np.arange(n) < k)
    assert p.value == k / n
    assert p.n == n
    return p.low, p.high


def wald(k: int, n: int) -> tuple[float, float]:
    half = 1.96 * np.sqrt(k / n * (1 - k / n) / n)
    return k / n - half, k / n + half


def check_coverage(interval: Any, n: int) -> None:
    """Exact coverage, summed over all outcomes, is 95 % or more for every true share."""
    ends = np.array([interval(k, n) for k in range(n + 1)])
    for share in np.linspace(0.001, 0.999, 333):
        weights = scipy.stats.binom.pmf(np.arange(n + 1), n, share)
        assert weights[(ends[:, 0] <= share) & (share <= ends[:, 1])].sum() >= 0.95


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 10), (950, 1000)])
def test_interval_by_beta_quantiles(k: int, n: int):
    # SciPy finds it by a root search to about 1e-12.
    np.testing.assert_allclose(ours(k, n), clopper_pearson(k, n), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 7, 30])
def test_coverage(n: int):
    check_coverage(ours, n)
    with pytest.raises(AssertionError):
        check_coverage(wald, n)


def test_coverage_in_a_simulation():
    """Of 2000 draws at least 95 % are covered, less four standard deviations."""
    n, share, draws = 50, 0.9, 2000
    counts = np.random.default_rng(0).binomial(n, share, draws)
    ends = np.array([ours(k, n) for k in range(n + 1)])[counts]
    covered = np.mean((ends[:, 0] <= share) & (share <= ends[:, 1]))
    assert covered >= 0.95 - 4 * np.sqrt(0.95 * 0.05 / draws)


# ---------------------------------------------------------------- bad input


def logits_with(value: float) -> Any:
    return lambda params, x: apply(params, x).at[-1, 0].set(value)


def breaks_at_grey(params: Any, x: Any) -> Any:
    return jnp.where((x == 0.5).all(-1, keepdims=True), jnp.nan, apply(params, x))


BAD = {
    "NaN image": ({"x": np.where(np.arange(D) == 3, np.nan, X)}, "images: expected finite values"),
    "too bright": ({"x": X + 1}, r"images: expected values in \[0, 1\]"),
    "outside the threat's box": (
        {"threat": Linf(0.1, (0.25, 0.75))},
        r"images: expected values in \[0.25, 0.75\]",
    ),
    "integer images": ({"x": X.astype(int)}, "images: expected floating-point images"),
    "float labels": ({"y": Y.astype(float)}, "labels: expected integer labels"),
    "too few labels": ({"y": Y[1:]}, r"labels: expected shape \(23,\)"),
    "label too large": ({"y": Y + CLASSES}, "labels: expected labels in"),
    "no images": ({"x": X[:0], "y": Y[:0]}, "images: expected at least one"),
    "no batch": ({"batch_size": 0}, "batch_size: expected a number"),
    "other logits": ({"apply": lambda params, x: x[:, 0]}, "logits: expected shape"),
    "negative label": ({"y": -Y - 1}, "labels: expected labels in"),
    "infinite logits": ({"apply": logits_with(np.inf)}, "logits of the evaluation"),
    "NaN logits": ({"apply": logits_with(np.nan)}, "logits of the evaluation"),
    "NaN logits under attack": (
        {"apply": breaks_at_grey, "attack": Grey()},
        "logits of the evaluation: expected finite values, got 8 of 8",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str):
    change, match = BAD[bad]
    with pytest.raises(InputError, match=match):
        run(**({"attack": FIXED} | change))
