"""Weights that are rounded, or whose rows are looked up, before the data meet them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels
from ntk_awt.kernels import program

HALF = jnp.bfloat16
ROUNDING = 2.0**-8
"""Relative, of one number in bfloat16."""


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def names(apply: Any, params: Any, x: Any) -> list[str]:
    return [layer.name for layer in kernels.plan(apply, params, x, engine="layerwise").layers]


# ---------------------------------------------------------------- rounded weights


def rounded(params: Any, x: jax.Array) -> jax.Array:
    """Products in bfloat16; the first bias is added in float32, the last one rounded as well."""
    y = (x.astype(HALF) @ params["first"].astype(HALF)).astype(jnp.float32)
    h = jnp.tanh(0.5 * y + params["bias"]).astype(HALF)
    return (h @ (2 * params["last"].astype(HALF)) + params["end"].astype(HALF)).astype(jnp.float32)


def plain(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(0.5 * (x @ params["first"]) + params["bias"])
    return h @ (2 * params["last"]) + params["end"]


def rounded_params() -> Any:
    """Of 300 units: a bias of so many is found by numbers that bfloat16 does not have."""
    params = {"first": normal(0, 8, 300) / 3, "bias": normal(1, 300)}
    return {**params, "last": normal(2, 300, 2) / 17, "end": normal(3, 2)}


@pytest.mark.parametrize("sparse", [False, True])
def test_rounded_weights_are_seen_through(sparse: bool):
    params, x = rounded_params(), normal(4, 5, 8)
    mask = jax.tree.map(lambda w: normal(w.size, *w.shape) > 0, params) if sparse else None
    assert names(rounded, params, x) == ["first +bias", "last +bias"]
    assert kernels.plan(rounded, params, x, mask=mask).engine == "layerwise"
    found = kernels.empirical(rounded, params, x, mask=mask, engine="layerwise")
    other = kernels.empirical(rounded, params, x, mask=mask, engine="contraction")
    exact = kernels.empirical(plain, params, x, mask=mask, engine="contraction")
    size = jnp.abs(exact).max()
    assert found.dtype == jnp.float32
    # The other engine rounds every entry of the Jacobian once more: in a sum of products of two
    # such entries no more than twice that of the sum of sizes, which is that of the diagonal.
    assert jnp.abs(found - other).max() <= 2 * ROUNDING * size
    # Weights, images, hidden units and their cotangents are rounded, on each side of the kernel.
    assert jnp.abs(found - exact).max() <= 8 * ROUNDING * size
    assert jnp.abs(found - 0.9 * exact).max() > 8 * ROUNDING * size


def test_a_cast_to_integers_is_not_seen_through():
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.round(params).astype(jnp.int32).astype(x.dtype)

    assert program.trace(apply, normal(0, 3, 2), normal(1, 1, 3)).sites == ()
    assert not kernels.empirical(apply, normal(0, 3, 2), normal(1, 2, 3)).any()
