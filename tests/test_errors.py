"""Every input check passes on good input, and says what was expected and got on bad input."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.errors import (
    InputError,
    check_finite,
    check_images,
    check_labels,
    check_number,
    check_same_tree,
    choose,
    leaf_name,
)

IMAGES = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 3, 2)
TREE = {"dense": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}}


def test_message_has_every_part():
    error = InputError("density", expected="a number", got="'x'", fix="use digits")
    assert str(error) == "density: expected a number, got 'x'; use digits"
    assert str(InputError("a", expected="b", got="c")) == "a: expected b, got c"
    assert isinstance(error, ValueError)


def test_leaf_name():
    tree = {"dense1": {"kernel": 1.0}, "list": [2.0, (3.0,)]}
    paths = jax.tree_util.tree_leaves_with_path(tree)
    assert [leaf_name(path) for path, _ in paths] == ["dense1/kernel", "list/0", "list/1/0"]


@pytest.mark.parametrize(
    "check",
    [
        partial(choose, "model", "mlp", ("mlp", "conv4")),
        partial(choose, "model", "b", {"a": 1, "b": 2}),
        partial(check_number, "n", 0, low=0),
        partial(check_number, "n", 1e-300, low=0, low_open=True),
        partial(check_number, "n", 1, low=0, high=1, low_open=True),
        partial(check_number, "n", 10**15, low=1),
        partial(check_number, "n", np.float64(0.5), low=0, high=1),
        partial(check_finite, "params", TREE),
        partial(check_finite, "params", {"a": np.array([1, 2]), "b": np.array([True])}),
        partial(check_finite, "params", {}),
        lambda: check_finite("params", jnp.ones(3, jnp.bfloat16)),
        partial(check_images, "images", IMAGES),
        lambda: check_images("images", jnp.asarray(IMAGES)),
        partial(check_images, "images", 2 * IMAGES - 1, (-1.0, 1.0)),
        partial(check_images, "images", np.zeros((3, 4), np.float16)),
        partial(check_labels, "labels", np.array([0, 9, 3]), 3, 10),
        lambda: check_labels("labels", jnp.array([0, 1], jnp.uint8), 2, 2),
        partial(check_same_tree, "mask", TREE, TREE),
        lambda: check_same_tree("mask", TREE, jax.eval_shape(lambda: TREE)),
        partial(
            check_same_tree, "gain", {"dense": {"kernel": 1.0, "bias": 2.0}}, TREE, scalars=True
        ),
    ],
)
def test_good_input_passes(check: Callable[[], None]):
    check()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            partial(choose, "model", "conv5", ("mlp", "conv4")),
            "model: expected one of conv4, mlp, got 'conv5'; did you mean 'conv4'?",
        ),
        (partial(choose, "model", "zzz", ("mlp",)), "model: expected one of mlp, got 'zzz'"),
        (
            partial(check_number, "n", -1, low=0),
            "n: expected a number in [0, ∞), got -1",
        ),
        (
            partial(check_number, "density", 0, low=0, high=1, low_open=True),
            "density: expected a number in (0, 1], got 0",
        ),
        (
            partial(check_number, "density", 1.5, low=0, high=1),
            "density: expected a number in [0, 1], got 1.5",
        ),
        (
            partial(check_number, "n", float("nan"), low=0),
            "n: expected a number in [0, ∞), got nan",
        ),
        (
            partial(check_number, "n", float("inf"), low=0),
            "n: expected a number in [0, ∞), got inf",
        ),
        (
            partial(check_number, "n", -float("inf"), low=0, high=1),
            "n: expected a number in [0, 1], got -inf",
        ),
        (
            partial(check_finite, "params", {"a": {"b": np.array([1.0, np.nan, np.inf])}}),
            "params a/b: expected finite values, got 2 of 3 NaN or infinite",
        ),
        (
            lambda: check_finite("images", jnp.array(-jnp.inf)),
            "images: expected finite values, got 1 of 1 NaN or infinite",
        ),
        (
            partial(check_images, "images", np.zeros((2, 3), np.uint8)),
            "images: expected floating-point images, got dtype uint8; "
            "convert first, e.g. images.astype('float32') / 255",
        ),
        (
            partial(check_images, "images", np.zeros(3)),
            "images: expected an array [n, *shape], got shape (3,)",
        ),
        (
            partial(check_images, "images", np.array([[0.5, np.nan]])),
            "images: expected finite values, got 1 of 2 NaN or infinite",
        ),
        (
            partial(check_images, "images", 255 * IMAGES),
            "images: expected values in [0, 1], got [0, 255]; "
            "rescale the images, or set the data set's bounds",
        ),
        (
            partial(check_images, "images", IMAGES - 0.25),
            "images: expected values in [0, 1], got [-0.25, 0.75]; "
            "rescale the images, or set the data set's bounds",
        ),
        (
            partial(check_labels, "labels", np.array([0.0, 1.0]), 2, 2),
            "labels: expected integer labels, got dtype float64",
        ),
        (
            partial(check_labels, "labels", np.array([True, False]), 2, 2),
            "labels: expected integer labels, got dtype bool",
        ),
        (
            partial(check_labels, "labels", np.array([0, 1, 1]), 2, 2),
            "labels: expected shape (2,), got shape (3,)",
        ),
        (
            partial(check_labels, "labels", np.eye(2, dtype=int), 2, 2),
            "labels: expected shape (2,), got shape (2, 2)",
        ),
        (
            partial(check_labels, "labels", np.array([0, 2]), 2, 2),
            "labels: expected labels in 0…1, got 0…2",
        ),
        (
            partial(check_labels, "labels", np.array([-1, 1]), 2, 2),
            "labels: expected labels in 0…1, got -1…1",
        ),
        (
            partial(check_same_tree, "mask", {"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(3)}),
            "mask b: expected a leaf of shape (3,), got no leaf",
        ),
        (
            partial(check_same_tree, "mask", {"a": np.ones(2), "c": 1.0}, {"a": np.ones(2)}),
            "mask c: expected only the leaves a, got one more",
        ),
        (
            partial(check_same_tree, "mask", {"a": np.ones((3, 2))}, {"a": np.ones((2, 3))}),
            "mask a: expected shape (2, 3), got shape (3, 2)",
        ),
        (
            partial(check_same_tree, "gain", TREE, TREE, scalars=True),
            "gain dense/bias: expected shape (), got shape (3,)",
        ),
    ],
)
def test_bad_input_is_explained(check: Callable[[], None], message: str):
    with pytest.raises(InputError) as caught:
        check()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "check",
    [
        partial(check_number, "seed", 10**30, low=0, high=2**32 - 1),
        lambda: check_finite("params", jnp.array([jnp.nan], jnp.bfloat16)),
    ],
    ids=["huge integer", "bfloat16 NaN"],
)
def test_unusual_numbers_are_rejected(check: Callable[[], None]):
    with pytest.raises(InputError):
        check()
