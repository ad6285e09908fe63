"""Weights that are rounded, or whose rows are looked up, before the data meet them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels
from ntk_awt.kernels.engine import program

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


# ---------------------------------------------------------------- rows that are looked up


def table_params(rows: int = 7) -> Any:
    return {"table": normal(0, rows, 4), "place": normal(1, 5, 4), "last": normal(2, 4, 3)}


def sentences(params: Any, ids: jax.Array) -> jax.Array:
    """Rows with a number for each place added; negative ids count from the end."""
    return jnp.tanh(2 * params["table"][ids] + params["place"]).mean(1) @ params["last"]


def filled(params: Any, ids: jax.Array) -> jax.Array:
    """As Flax does it; where there is no such row, its values are missing, and counted as 1."""
    rows = jnp.take(params["table"].astype(HALF).astype(jnp.float32), ids, axis=0)
    return (
        jnp.tanh(jnp.where(jnp.isnan(rows), 1.0, rows) + params["place"]).mean(1) @ params["last"]
    )


def clipped(params: Any, ids: jax.Array) -> jax.Array:
    rows = jnp.take(params["table"], ids, axis=0, mode="clip")
    return jnp.tanh(rows + params["place"]).mean(1) @ params["last"]


def ids(*shape: int, low: int = 0, high: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).integers(low, high, shape), jnp.int32)


LOOKUPS: dict[str, tuple[Any, int, int]] = {
    "sentences": (sentences, -7, 7),
    "filled": (filled, 0, 11),
    "clipped": (clipped, -3, 11),
}


@pytest.mark.parametrize("sparse", ["", "boolean", "real"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_looked_up_rows(name: str, sparse: str):
    apply, low, high = LOOKUPS[name]
    params, x1, x2 = table_params(), ids(4, 5, low=low, high=high), ids(3, 5, low=low, high=high)
    noise = jax.tree.map(lambda w: normal(w.size, *w.shape), params)
    mask = {"": None, "boolean": jax.tree.map(lambda z: z > -0.5, noise), "real": noise}[sparse]
    wanted = kernels.empirical(apply, params, x1, x2, mask=mask, engine="contraction")
    # The other engine rounds entries of the table's Jacobian to the type that it is cast to.
    limit = 2 * ROUNDING if name == "filled" else 1e-5
    for form in ("lookup", "jacobian"):
        for memory in (2**30, 400):  # the second in chunks of units
            plan = kernels.plan(
                apply, params, x1, x2, mask=mask, forms={"table": form}, memory=memory
            )
            assert next(iter(plan.layers)).form == form
            found = kernels.empirical(apply, params, x1, x2, mask=mask, plan=plan)
            assert jnp.abs(found - wanted).max() <= limit * jnp.abs(wanted).max()
            assert jnp.abs(found - 0.9 * wanted).max() > limit * jnp.abs(wanted).max()


@pytest.mark.parametrize("outputs", ["diagonal", "trace", 1])
def test_looked_up_rows_of_other_outputs(outputs: Any):
    params, x = table_params(), ids(4, 5)
    given: Any = {"outputs": outputs}
    wanted = kernels.empirical(sentences, params, x, engine="contraction", **given)
    plan = kernels.plan(sentences, params, x, forms={"table": "lookup"}, batch=2, **given)
    found = kernels.empirical(sentences, params, x, plan=plan)
    assert jnp.abs(found - wanted).max() <= 1e-5 * jnp.abs(wanted).max()


def test_what_is_looked_up_twice_is_not_a_table():
    """A table that also is the last layer: both of its uses are in its Jacobian."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(params[x]).mean(1) @ params.T

    params, x = normal(0, 7, 4), ids(3, 5)
    assert program.trace(apply, params, x).sites == ()
    found = kernels.empirical(apply, params, x, engine="layerwise")
    wanted = kernels.empirical(apply, params, x, engine="products")
    assert jnp.abs(found - wanted).max() <= 1e-5 * jnp.abs(wanted).max()


def test_entries_are_no_rows():
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return params[x[:, 0], x[:, 1]][:, None]

    assert program.trace(apply, normal(0, 7, 7), ids(3, 2)).sites == ()
