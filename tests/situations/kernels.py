"""Kernels: half precision, overflow, empty inputs, forms that are compared, several devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ntk_awt import kernels, masks
from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError
from ntk_awt.kernels import analytic, probes
from tests.situations import Outcome, near, refused, same, situation

HALF = 2.0**-11
"""Relative rounding of float16."""


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _network(params: Any, x: Any) -> jax.Array:
    return jax.nn.relu(x @ params["first"]) @ params["last"]


def _half(dtype: Any = jnp.float16) -> tuple[Any, jax.Array]:
    """Weights and images whose kernel has entries above 65,504, the largest number of float16."""
    params = {"first": 4 * _normal(0, 32, 64), "last": 8 * _normal(1, 64, 3)}
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params), jnp.asarray(
        _normal(2, 4, 32), dtype
    )


def _double(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _brute(params: Any, x: Any) -> np.ndarray:
    """Θ of `_network` in float64, with the Jacobian written out."""
    w, v, x = (_double(a) for a in (params["first"], params["last"], x))
    hidden = x @ w
    active = hidden > 0
    outer = np.einsum("nh,hc,nd->ncdh", active, v, x)
    last = np.einsum("nh,cb->nchb", hidden * active, np.eye(v.shape[1]))
    j = np.concatenate([a.reshape(*a.shape[:2], -1) for a in (outer, last)], axis=2)
    return np.einsum("iap,jbp->ijab", j, j)


def _of_engine(engine: str, dtype: Any) -> Outcome:
    params, x = _half(dtype)
    # √P·2⁻²⁴ of P = 2240 products, in float32: 3e-6.
    return near(
        kernels.empirical(_network, params, x, engine=engine), _brute(params, x), relative=1e-5
    )


for _engine in ("layerwise", "contraction", "products"):
    for _dtype in (jnp.float16, jnp.bfloat16):
        situation(f"kernels: {jnp.dtype(_dtype).name}, {_engine}")(
            partial(_of_engine, _engine, _dtype)
        )


@situation("kernels: a network that computes in float16")
def _inner() -> Outcome:
    params, x = _half()

    def inner(params: Any, x: Any) -> jax.Array:
        return _network(*jax.tree.map(lambda a: a.astype(jnp.float16), (params, x)))

    given = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    found = kernels.empirical(inner, *given, engine="products")
    # Products in float16 of 32 and 64 terms, back and forth: errors of some 4·HALF·√64 at most.
    return near(found, _brute(params, x), relative=32 * HALF)


@situation("kernels: float16, product with a vector")
def _product() -> Outcome:
    params, x = _half()
    v = jnp.asarray(_normal(3, 4, 3), jnp.float32)
    right = np.einsum("ijab,jb->ia", _brute(params, x), _double(v))
    return near(probes.kernel_product(_network, params, x)(v), right, relative=1e-5)


@situation("kernels: float16, distance of two kernels")
def _distance() -> Outcome:
    first, second = (jnp.asarray(300 * _normal(seed, 8, 8, 2, 2), jnp.float16) for seed in (0, 1))
    right = np.linalg.norm(np.ravel(_double(first) - _double(second))) / 8
    return near(kernels.kernel_distance(first, second), right, relative=1e-6)


@situation("kernels: float16, distance of logits")
def _targets() -> Outcome:
    first, second = (jnp.asarray(300 * _normal(seed, 64, 3), jnp.float16) for seed in (0, 1))
    right = np.linalg.norm(_double(first) - _double(second)) / 8
    return near(kernels.target_distance(first, second), right, relative=1e-6)


@situation("kernels: float16, energy-preserving gain")
def _gain() -> Outcome:
    weights = jnp.asarray(10 * _normal(0, 64, 64), jnp.float16)
    mask = jnp.asarray(_normal(1, 64, 64) > 0.5)
    right = np.linalg.norm(_double(weights)) / np.linalg.norm(_double(weights) * np.asarray(mask))
    return near(masks.energy_gain(weights, mask), right, relative=HALF)


# ---------------------------------------------------------------- one normalisation


@situation("kernels: distance of means over outputs")
def _means() -> Outcome:
    """At infinite width Θ = k ⊗ I, and every form has to give the distance of Θ."""
    k = np.float32(_normal(0, 5, 5))
    full = jnp.einsum("ij,ab->ijab", k, jnp.eye(10))
    diagonal = jnp.einsum("ijaa->ija", full)
    found = [
        kernels.kernel_distance(full, 0 * full),
        kernels.kernel_distance(diagonal, 0 * diagonal),
        kernels.kernel_distance(jnp.asarray(k), 0 * jnp.asarray(k), classes=10),
    ]
    return near(found, [10**0.5 * np.linalg.norm(k) / 5] * 3, relative=1e-6)


@situation("kernels: distance of matrices without the number of outputs")
def _unsaid() -> Outcome:
    return refused(lambda: kernels.kernel_distance(jnp.ones((2, 2)), jnp.eye(2)), "classes")


# ---------------------------------------------------------------- infinite width


def _deep(activation: str) -> tuple[Callable[..., Any], jax.Array]:
    """16 layers with σ_w = 16 and images whose largest kernel value is about 1e37."""
    images = jnp.asarray(5 * _normal(0, 6, 4), jnp.float32)
    settings: Any = {"widths": (8,) * 15, "weight_std": 16.0, "activation": activation}
    return _analytic(**settings), images


@situation("kernels: analytic ReLU near the largest float32")
def _large() -> Outcome:
    kernel_fn, images = _deep("relu")
    with jax.enable_x64(True):
        right = np.asarray(kernel_fn(jnp.asarray(_double(images))).ntk)
    # Each of 16 layers takes √(q² − k²) of two rounded numbers: some 16·√(2·2⁻²⁴) near q = k.
    return near(_double(kernel_fn(images).ntk), right, relative=16 * 2.0**-11.5)


for _activation in ("erf", "gelu"):

    @situation(f"kernels: analytic {_activation} with squares of variances beyond float32")
    def _beyond(activation: str = _activation) -> Outcome:
        """How XLA multiplies decides whether it can be had: the value then, else one line."""
        kernel_fn, images = _deep(activation)
        try:
            found = _double(kernel_fn(images).ntk)
        except InputError:
            return refused(lambda: kernel_fn(images).ntk, "analytic kernel", "float64")
        with jax.enable_x64(True):
            right = np.asarray(kernel_fn(jnp.asarray(_double(images))).ntk)
        return near(found, right, relative=16 * 2.0**-11.5)  # as of ReLU


# ---------------------------------------------------------------- no images


def _analytic(**settings: Any) -> Callable[..., Any]:
    config = ModelConfig(**{"parametrization": "ntk", "widths": (8, 8), **settings})
    return analytic.network(config, (4,), 1).kernel_fn


_EMPTY: dict[str, Callable[[jax.Array], Any]] = {
    "product": lambda x: probes.kernel_product(jnp.matmul, jnp.ones((4, 2)), x),
    "distance": lambda x: kernels.kernel_distance(x[:, :0, None], x[:, :0, None]),
    "spectrum": lambda x: kernels.spectrum(x[:, :0]),
    "analytic": lambda x: _analytic()(x),
    "mixture": lambda x: analytic.mixture(
        ModelConfig(parametrization="ntk"), (4,), density=0.5, samples=16
    )(jax.random.key(0), x),
}
for _name, _compute in _EMPTY.items():

    @situation(f"kernels: no image, {_name}")
    def _none(compute: Any = _compute) -> Outcome:
        return refused(lambda: compute(jnp.zeros((0, 4))), "image")


# ---------------------------------------------------------------- several devices


for _name, _settings in {
    "tiles": {"batch": 1, "engine": "layerwise"},
    "contraction": {"engine": "contraction"},
    "products": {"engine": "products"},
}.items():

    @situation(f"kernels: inside shard_map, {_name}")
    def _inside(settings: Any = _settings) -> Outcome:
        params, x = _half(jnp.float32)
        rows, same = PartitionSpec("rows"), PartitionSpec()
        mapped = jax.shard_map(
            lambda w, x: kernels.empirical(_network, w, x, **settings),
            mesh=Mesh(jax.devices()[:1], ("rows",)),
            in_specs=(same, rows),
            out_specs=rows,
        )
        return near(jax.jit(mapped)(params, x), _brute(params, x), relative=1e-5)


# ---------------------------------------------------------------- weights seen through


@situation("kernels: weights cast to bfloat16 inside the network")
def _cast() -> Outcome:
    def apply(params: Any, x: Any) -> jax.Array:
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
        return _network(*half).astype(jnp.float32)

    found = kernels.plan(apply, *_half(jnp.float32))
    return same((found.engine, found.others), ("layerwise", ()))


def _sentences(params: Any, ids: Any) -> jax.Array:
    return params["table"][ids].mean(1) @ params["last"]


def _table(rows: int) -> tuple[Any, jax.Array]:
    ids = np.random.default_rng(0).integers(0, rows, (32, 16))
    last = jnp.asarray(_normal(0, 64, 10), jnp.float32)
    table = jnp.asarray(_normal(1, rows, 64), jnp.float32)
    return {"table": table, "last": last}, jnp.asarray(ids, jnp.int32)


@situation("kernels: a table of 20,000 rows, 32 sentences of 16")
def _embedding() -> Outcome:
    """Θ = 1/16² · (number of equal pairs)·⟨v_q, v_r⟩ + ⟨mean row, mean row⟩·1[q = r]."""
    params, ids = _table(20_000)
    w, v = _double(params["table"]), _double(params["last"])
    equal = (np.asarray(ids)[:, None, :, None] == np.asarray(ids)[None, :, None, :]).sum((2, 3))
    means = w[np.asarray(ids)].mean(1)
    right = np.einsum("nm,qr->nmqr", equal / 256, v.T @ v)
    right += np.einsum("nm,qr->nmqr", means @ means.T, np.eye(10))
    return near(kernels.empirical(_sentences, params, ids), right, relative=1e-5)


@situation("kernels: memory of a table of 20,000 rows within the budget")
def _memory() -> Outcome:
    params, ids = _table(20_000)
    plan = kernels.plan(_sentences, params, ids)
    kernel = jax.jit(lambda w, x: kernels.empirical(_sentences, w, x, plan=plan))
    taken = _temporary(kernel, params, ids)
    return same((taken <= plan.bytes[1], plan.bytes[1] <= 2**24), (True, True))


def _temporary(kernel: Any, *arguments: Any) -> int:
    return kernel.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@situation("kernels: a plan's time")
def _time() -> Outcome:
    params, ids = _table(64)
    plan = kernels.plan(_sentences, params, ids)
    return same([word in str(plan) for word in (" s at ", "GFLOP/s")], [True, True])
