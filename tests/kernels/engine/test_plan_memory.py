"""What a plan says of memory, against what XLA sets aside for temporary arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels
from ntk_awt.kernels.engine import planning


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["first"]) @ params["last"]


def cnn(params: Any, x: jax.Array) -> jax.Array:
    order = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", None, None, order)
    return jax.nn.relu(y).mean((1, 2)) @ params["last"]


def tied(params: Any, x: jax.Array) -> jax.Array:
    """Both weights twice, so by explicit Jacobian."""
    return jnp.tanh(jnp.tanh(x @ params["first"]) @ params["first"].T) @ params["first"]


NETWORKS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "mlp": (mlp, {"first": (40, 64), "last": (64, 5)}, (40,)),
    "cnn": (cnn, {"conv": (3, 3, 1, 8), "last": (8, 5)}, (10, 10, 1)),
    "tied": (tied, {"first": (40, 20)}, (40,)),
}

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("mlp", 40, {"engine": "contraction"}),
    ("mlp", 40, {"engine": "products", "outputs": "trace"}),
    ("mlp", 40, {"forms": {"first": "jacobian"}}),
    ("mlp", 80, {"engine": "contraction", "memory": 2**21}),
    ("mlp", 40, {"sparse": True}),
    ("mlp", 40, {"sparse": True, "forms": {"first": "kept"}}),
    ("cnn", 20, {"outputs": "trace"}),
    ("cnn", 20, {"engine": "products"}),
    ("tied", 24, {"engine": "layerwise"}),
]


def planned(name: str, n: int, given: dict[str, Any]) -> tuple[Any, ...]:
    apply, shapes, image = NETWORKS[name]
    params = {key: normal(k, *shape) for k, (key, shape) in enumerate(shapes.items())}
    settings = dict(given)
    mask = None
    if settings.pop("sparse", False):
        mask = jax.tree.map(lambda w: np.asarray(normal(w.size, *w.shape)) > 1, params)
    x = normal(9, n, *image)
    return apply, params, x, mask, kernels.plan(apply, params, x, mask=mask, **settings)


@pytest.mark.parametrize(("name", "n", "given"), CASES, ids=str)
def test_a_plan_asks_for_no_less_than_is_taken(name: str, n: int, given: dict[str, Any]):
    apply, params, x, mask, plan = planned(name, n, given)
    kernel = jax.jit(lambda w, x: kernels.empirical(apply, w, x, mask=mask, plan=plan))
    compiled: Any = kernel.lower(params, x).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    # The estimate is not far off either: at most the copies that XLA may do without.
    assert taken <= plan.bytes[1] <= 8 * taken
    assert plan.bytes[1] <= given.get("memory", planning.BUDGET)


def test_a_budget_that_one_image_exceeds_is_said():
    *_, plan = planned("mlp", 4, {"engine": "contraction", "memory": 1000})
    assert plan.bytes[1] > 1000
    assert "above the 1e+03 B asked for" in str(plan)
    assert "above" not in str(planned("mlp", 4, {})[-1])


def test_time_follows_the_engine_and_the_rate(monkeypatch):
    monkeypatch.setattr(planning, "rate", lambda: 1e9)
    for engine in ("contraction", "products"):
        *_, plan = planned("mlp", 4, {"engine": engine})
        assert plan.seconds == pytest.approx(dict(plan.costs)[engine] / 1e9)
        assert f"about {plan.seconds:.2g} s at 2 GFLOP/s" in str(plan)
