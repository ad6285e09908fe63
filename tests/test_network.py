"""The check of a network where it enters, and modules with state that is not trained.

What it refuses is in `tests/situations/networks.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from ntk_awt import kernels, masks
from ntk_awt.errors import InputError, leaf_name
from ntk_awt.network import Network, check_network, check_params, density, in_one_line


def params_of(fill: float = 1.0) -> dict[str, jax.Array]:
    return {"kernel": jnp.full((3, 2), fill)}


class Counting:
    """A linear network that counts how often it is traced; without weak references."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self, params: Any, x: Any) -> Any:
        self.calls += 1
        return x @ params["kernel"]


def test_a_function_is_traced_once_for_each_shape():
    calls = []

    def apply(params: Any, x: Any) -> Any:
        calls.append(x.shape)
        return x @ params["kernel"]

    for n in (4, 4, 5, 4):
        assert check_network(Network(apply, params_of(float(n))), jnp.ones((n, 3))) == 2
    assert calls == [(4, 3), (5, 3)]


def test_known_shapes_and_traced_values_are_enough():
    counting = Counting()
    x = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)}
    assert check_network(Network(counting, shapes), x) == 2
    assert counting.calls == 1

    @jax.jit
    def inside(params: Any, x: Any) -> Any:
        assert check_network(Network(counting, params), x) == 2
        with pytest.raises(InputError, match="params: step: expected an array of floats"):
            check_network(Network(counting, {**params, "step": jnp.zeros((), int)}), x)
        return params["kernel"]

    assert np.isnan(inside(params_of(np.nan), jnp.ones((4, 3)))).all()  # values nobody knows


def test_every_array_is_looked_at():
    """Arrays found finite are not looked at again; no other array passes in their place."""
    good = params_of()
    check_params(good)
    for _ in range(20):  # a new array may lie where one was that is gone
        check_params({"kernel": jnp.ones((3, 2))})
        with pytest.raises(InputError, match=r"params of it: kernel: .*6 of 6 NaN"):
            check_params({"kernel": jnp.full((3, 2), jnp.nan)}, "it")
    host = np.ones((3, 2))
    check_params({"kernel": host})
    host[0, 0] = np.inf  # NumPy's arrays change
    with pytest.raises(InputError, match="1 of 6 NaN or infinite"):
        check_params({"kernel": host})


def test_an_error_says_where():
    def inner() -> None:
        raise ValueError("first line\nsecond line")

    with pytest.raises(ValueError, match="first") as caught:
        inner()
    line = caught.traceback[-1].lineno + 1
    assert in_one_line(caught.value) == f"ValueError: first line (test_network.py, line {line})"


# ---------------------------------------------------------------- modules


class Shifted(nnx.Module):
    """A layer and a number that is not trained."""

    def __init__(self, shift: float, rate: float = 0.0):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(1))
        self.shift = nnx.Variable(jnp.float32(shift))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(jnp.tanh(self.layer(x) + self.shift[...]))


def test_modules_alike_share_a_function_and_those_with_state_do_not():
    x = jnp.ones((4, 3))
    plain = [Network.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(seed))) for seed in (0, 1)]
    assert plain[0].apply is plain[1].apply
    networks = [Network.from_nnx(Shifted(shift)) for shift in (0.0, 1.0)]
    found = [np.asarray(kernels.empirical(net, net.params, x)) for net in networks]
    logits = [np.asarray(jax.jit(net.apply)(net.params, x)) for net in networks]
    np.testing.assert_allclose(np.arctanh(logits[1]) - np.arctanh(logits[0]), 1, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_a_module_is_neither_changed_nor_looked_at_again():
    module, x = Shifted(0.5, rate=0.5), jnp.ones((4, 3))
    with pytest.raises(InputError, match="module: dropout: expected evaluation mode"):
        Network.from_nnx(module)
    assert module.dropout.deterministic is False
    module.eval()
    network = Network.from_nnx(module)
    before = network.apply(network.params, x)
    np.testing.assert_allclose(before, module(x), rtol=1e-6)
    module.shift[...] = jnp.float32(3.0)
    module.train()
    np.testing.assert_array_equal(network.apply(network.params, x), before)


class Linen:
    """What `from_linen` asks of a module."""

    def apply(self, variables: Any, x: Any, *, factor: float) -> Any:
        return factor * variables["fixed"]["shift"] + x @ variables["params"]["kernel"]


def test_variables_of_linen():
    shift = np.ones(2, np.float32)
    variables = FrozenDict({"params": params_of(), "fixed": {"shift": shift}})
    network = Network.from_linen(Linen(), variables, factor=3.0)
    np.testing.assert_array_equal(network.apply(network.params, jnp.ones((1, 3))), [[6, 6]])
    assert density(masks.ones(network.params)) == 1
    for bad, got in ((params_of(), "kernel"), ([1], "list"), ({"fixed": {}}, "fixed")):
        with pytest.raises(InputError, match=f"variables: expected a dict .* got {got}"):
            Network.from_linen(Linen(), bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="params of the module: kernel: expected an array"):
        Network.from_linen(Linen(), {"params": {"kernel": 1.0}})


def test_one_compilation_serves_dense_and_ticket():
    traces = 0

    def apply(params, x):
        nonlocal traces
        traces += 1
        return x @ params

    dense = Network(apply, jnp.ones((3, 2)))
    mask = jnp.array([[True, False], [False, True], [True, True]])
    ticket = dense.replace(mask=mask, gain=jnp.float32(2.0))
    logits = jax.jit(lambda network, x: network(x))
    found = logits(dense.with_mask(), jnp.ones((4, 3))), logits(ticket, jnp.ones((4, 3)))
    assert traces == 1
    np.testing.assert_allclose(found[0], 3 * np.ones((4, 2)))
    np.testing.assert_allclose(found[1], [[4.0, 4.0]] * 4)
    np.testing.assert_array_equal(ticket.folded()(jnp.ones((4, 3))), found[1])
    assert ticket.density == 4 / 6
    assert hash(jax.tree.structure(dense)) == hash(jax.tree.structure(dense.replace(params=2.0)))


def test_equinox_models_are_partitioned_for_the_user():
    import equinox as eqx

    class Model(eqx.Module):
        first: eqx.nn.Linear
        table: jax.Array
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout

        def __init__(self, key):
            self.first = eqx.nn.Linear(3, 4, key=key)
            self.table = jnp.array([1, 0, 3, 2])
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
            self.dropout = eqx.nn.Dropout(0.5)

        def __call__(self, x, state):
            h, state = self.norm(self.first(x)[self.table], state)
            return self.dropout(jax.nn.relu(h)), state

    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    with pytest.raises(InputError, match="inference mode"):
        Network.from_equinox(model, state)
    still = eqx.nn.inference_mode(model)
    network = Network.from_equinox(still, state)
    x = jax.random.normal(jax.random.key(1), (5, 3))
    expected = jnp.stack([still(row, state)[0] for row in x])
    np.testing.assert_allclose(network(x), expected, rtol=1e-6, atol=1e-6)
    names = {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(network.params)}
    trained = eqx.filter(still, eqx.is_inexact_array)
    assert len(names) == len(jax.tree.leaves(trained)) == 4
    assert jax.tree.structure(network.params) == jax.tree.structure(trained)
    assert not any("table" in name for name in names)
