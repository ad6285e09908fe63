"""Kernels and masks without jit, without rank promotion, with strict dtypes: the same numbers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels, masks
from ntk_awt.app.config import ModelConfig
from ntk_awt.kernels import analytic, probes
from tests.modes import mode  # noqa: F401  a fixture


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def convolutional(params: Any, x: jax.Array) -> jax.Array:
    order = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "VALID", None, None, order)
    y = jax.nn.relu(y + params["bias"].reshape(1, 1, 1, -1))
    return y.reshape(len(x), -1) @ params["dense"]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"] + params["bias"].reshape(1, -1)) @ params["last"]


def mlp_params() -> Any:
    return {"first": normal(0, 4, 5), "bias": normal(1, 5), "last": normal(2, 5, 3)}


def cnn_params() -> Any:
    return {"conv": normal(0, 2, 2, 1, 2), "bias": normal(1, 2), "dense": normal(2, 8, 2)}


def ticket() -> tuple[Any, Any, Any]:
    params = mlp_params()
    mask = masks.make(masks.random_scores(jax.random.key(0), params), 0.5, "erk")
    return params, mask, masks.energy_gain(params, mask)


def forms(form: str) -> jax.Array:
    params, mask, gain = ticket()
    x = normal(5, 3, 4)
    names: dict[str, str] = dict.fromkeys(("first", "last"), form)
    memory = 400 if form == "jacobian" else 2**30  # in chunks
    plan = kernels.plan(mlp, params, x, mask=mask, forms=names, memory=memory)
    return kernels.empirical(mlp, params, x, mask=mask, gain=gain, plan=plan)


def convolution(engine: str) -> jax.Array:
    """Of images in tiles of two, the last one not full."""
    x1, x2 = normal(3, 3, 3, 3, 1), normal(4, 2, 3, 3, 1)
    given: Any = {"engine": engine, "batch": 2, "outputs": "diagonal"}
    return kernels.empirical(convolutional, cnn_params(), x1, x2, **given)


def with_numbers() -> jax.Array:
    params, _, gain = ticket()
    mask = jax.tree.map(lambda w: normal(8, *w.shape), params)
    return kernels.empirical(mlp, params, normal(5, 3, 4), mask=mask, gain=gain, outputs="trace")


def half() -> jax.Array:
    params = jax.tree.map(lambda w: w.astype(jnp.float16), mlp_params())
    return kernels.empirical(mlp, params, normal(5, 3, 4).astype(jnp.float16))


def estimates(params: Any, mask: Any, gain: Any) -> list[Any]:
    x, key = normal(5, 3, 4), jax.random.key(1)
    dense = probes.kernel_product(mlp, params, x, batch=2)
    sparse = probes.kernel_product(mlp, params, x, mask=mask, gain=gain)
    found = probes.relative_squared_distance(dense, sparse, key, sketch=1, probes=2)
    return [found.value, found.interval(), probes.top_eigenvalues(dense, 1, key, iterations=1)]


def measures() -> list[Any]:
    first, second = normal(0, 4, 4, 3, 3), normal(1, 4, 4, 3, 3)
    targets = jnp.eye(4)[:, :3]
    values = kernels.spectrum(first)
    return [
        kernels.kernel_distance(first, second),
        kernels.kernel_distance(first[..., 0, 0], second[..., 0, 0], classes=3),
        kernels.relative_kernel_distance(first, second),
        kernels.target_distance(targets, targets + 1.0),
        kernels.cosine_kernel_distance(first, second),
        kernels.kernel_velocity(jnp.stack([first, second]), jnp.array([0, 2])),
        kernels.polar(jnp.stack([first, second]), first),
        kernels.centred_alignment(first, second),
        kernels.label_alignment(first, targets),
        kernels.label_alignment(first[..., 0, 0], targets),
        kernels.specialisation(first, targets),
        values,
        kernels.effective_rank(values),
        kernels.participation_ratio(values),
        kernels.spectrum_mass(values, 2),
        kernels.condition_number(values),
        kernels.eigenvectors(first, 2)[0],
        kernels.eigenpictures(normal(2, 2, 4), normal(3, 4, 2, 2, 1)),
    ]


def of_masks() -> list[Any]:
    params, mask, gain = ticket()
    kept = masks.sparse(params, mask, "energy")
    scores = masks.magnitude_scores(params)
    table = [(row.kept, row.gain) for row in masks.statistics(mask, gain)]
    made = [masks.make(scores, 0.4, method) for method in ("uniform", "global")]
    logits = masks.masked(mlp, mask, gain)(params, normal(5, 3, 4))
    return [kept.params, kept.gain, masks.effective(*kept), table, made, logits]


def infinite(activation: str) -> Any:
    config = ModelConfig(parametrization="ntk", widths=(4, 4), activation=activation)
    network = analytic.network(config, (3,), 1, density=0.5, kind="magnitude")
    return network.kernel_fn(normal(0, 2, 3), normal(1, 3, 3))


CASES: dict[str, Callable[[], Any]] = {
    **{
        f"form {name}": lambda name=name: forms(name)
        for name in ("packed", "soft", "jacobian", "kept")
    },
    **{
        name: lambda name=name: convolution(name)
        for name in ("layerwise", "contraction", "products")
    },
    "mask of numbers": with_numbers,
    "float16": half,
    "estimates": lambda: jax.jit(estimates)(*ticket()),  # much less to compile than one by one
    "measures": lambda: jax.jit(measures)(),
    "masks": of_masks,
    "infinite width": lambda: infinite("relu"),
}


@cache
def usual(name: str) -> Any:
    return jax.tree.map(np.asarray, CASES[name]())


@pytest.fixture
def expected(request: pytest.FixtureRequest) -> Any:
    """What comes with JAX's usual settings; made before `mode` changes them."""
    return usual(request.getfixturevalue("name"))


@pytest.mark.parametrize("name", CASES)
def test_strict_modes_change_nothing(expected: Any, mode: str, name: str):  # noqa: F811
    found = jax.tree.leaves(CASES[name]())
    assert len(found) == len(jax.tree.leaves(expected))
    for one, right in zip(found, jax.tree.leaves(expected), strict=True):
        # Sums of some 100 rounded terms, in another order: 100 units of rounding of the largest.
        allowed = 100 * 2.0**-24 * np.max(np.abs(right))
        assert np.all(np.abs(np.asarray(one, np.float64) - right) <= allowed)
