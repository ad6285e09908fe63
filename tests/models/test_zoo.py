"""Networks against NumPy written from their definition, in float64."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from flax import nnx

from ntk_awt import masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError
from ntk_awt.models import build
from ntk_awt.network import Network, density
from tests.quick import quick

SLOW = (
    "test_forward_pass conv4*",
    "test_the_network_scales_its_inputs conv4",
    "test_output_variance_follows_the_recursion",
    "test_parametrisations_draw_the_same_function conv4",
    "test_logits_depend_on_one_image conv4",
    "test_parametrisations_draw_the_same_function lenet5",
)

Shape = tuple[int, ...]

STD = 1.3
BIAS = 0.4
SHAPES: dict[str, Shape] = {"mlp": (5, 4, 2), "lenet5": (17, 16, 2), "conv4": (9, 6, 2)}
"""One input of each model; sides are uneven, so that axes cannot be exchanged."""

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "gelu": lambda x: x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2,
    "erf": scipy.special.erf,
    "tanh": np.tanh,
}


def config_of(name: str, parametrization: str = "standard", **changes: Any) -> ModelConfig:
    config = ModelConfig(
        name=name,
        widths=(7, 6),
        parametrization=parametrization,
        weight_std=STD,
        bias_std=BIAS,
    )
    return dataclasses.replace(config, **changes)


@cache
def small(name: str, parametrization: str = "standard", **changes: Any) -> Network:
    config = config_of(name, parametrization, **changes)
    return build(config, SHAPES[name], 3, jax.random.key(11))


def images(name: str, n: int = 2) -> np.ndarray:
    return np.random.default_rng(12).normal(size=(n, *SHAPES[name]))


# ---------------------------------------------------------------- the function


def convolve(x: np.ndarray, kernel: np.ndarray, padding: str) -> np.ndarray:
    """Cross-correlation with [window, window, in, out], one image at a time."""
    window = kernel.shape[0]
    if padding == "SAME":
        x = np.pad(x, [(0, 0), *[((window - 1) // 2, window // 2)] * 2, (0, 0)])
    height, width = x.shape[1] - window + 1, x.shape[2] - window + 1
    y = np.zeros((len(x), height, width, kernel.shape[3]))
    for row in range(window):
        for column in range(window):
            y += x[:, row : row + height, column : column + width] @ kernel[row, column]
    return y


def pool(x: np.ndarray, pooling: str) -> np.ndarray:
    """The largest, or the mean, of each 2×2 square."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    squares = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return {"max": np.max, "average": np.mean}[pooling](squares, axis=0)


def reference(name: str, params: Any, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The network as the docstrings and the papers they cite describe it."""
    activation = ACTIVATIONS[config.activation]

    def values(layer: str) -> tuple[np.ndarray, np.ndarray]:
        kernel, bias = (np.asarray(params[layer][k], np.float64) for k in ("kernel", "bias"))
        if config.parametrization == "ntk":
            fan = kernel.size // kernel.shape[-1]
            if config.fan == "average":
                fan = (fan + kernel.size // kernel.shape[-2]) / 2
            return config.weight_std / np.sqrt(fan) * kernel, config.bias_std * bias
        return kernel, bias

    x = (x - config.input_mean) / config.input_std
    blocks = {
        "mlp": [],
        "lenet5": [["conv1"], ["conv2"]],
        "conv4": [["conv1", "conv2"], ["conv3", "conv4"]],
    }[name]
    for block in blocks:
        for layer in block:
            kernel, bias = values(layer)
            padding = "VALID" if name == "lenet5" else "SAME"
            x = activation(convolve(x, kernel, padding) + bias)
        x = pool(x, config.pooling)
    x = x.reshape(len(x), -1)
    last = sum(layer.startswith("dense") for layer in params)
    for i in range(1, last + 1):
        kernel, bias = values(f"dense{i}")
        x = x @ kernel + bias
        x = activation(x) if i < last else x
    return x


def test_reference_convolution_is_scipys():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 7, 6, 2)), rng.normal(size=(3, 3, 2, 4))
    for padding in ("SAME", "VALID"):
        y = convolve(x, kernel, padding)
        for out in range(4):
            planes = [
                scipy.signal.correlate(x[0, :, :, i], kernel[:, :, i, out], padding.lower())
                for i in range(2)
            ]
            np.testing.assert_allclose(y[0, :, :, out], np.sum(planes, axis=0), atol=1e-13)


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
@pytest.mark.parametrize(
    ("name", "activation", "pooling"),
    [
        ("mlp", "relu", "max"),
        ("mlp", "gelu", "max"),
        ("mlp", "erf", "max"),
        ("mlp", "tanh", "max"),
        ("lenet5", "relu", "max"),
        ("lenet5", "erf", "average"),
        ("conv4", "tanh", "max"),
        ("conv4", "relu", "average"),
    ],
)
def test_forward_pass(name: str, activation: str, pooling: str, parametrization: str):
    check_forward_pass(name, parametrization, activation=activation, pooling=pooling)


@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_the_network_scales_its_inputs(name: str):
    check_forward_pass(name, "standard", input_mean=0.3, input_std=0.5)
    x, plain = jnp.asarray(images(name)), small(name)
    scaled = small(name, input_mean=0.3, input_std=0.5)
    assert np.abs(scaled.apply(plain.params, x) - plain.apply(plain.params, x)).max() > 0.1


@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_average_fan_is_glorots(name: str):
    check_forward_pass(name, "ntk", fan="average")
    ntk, standard = (small(name, p, fan="average") for p in ("ntk", "standard"))
    x = jnp.asarray(images(name))
    np.testing.assert_allclose(
        ntk.apply(ntk.params, x), standard.apply(standard.params, x), rtol=1e-4, atol=1e-5
    )
    key, options = jax.random.key(0), {"fan": "average", "weight_std": 1.0}
    init = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
    units, scaled = (small(name, p, **options).params for p in ("ntk", "standard"))
    for layer, values in scaled.items():
        shape = values["kernel"].shape
        scale = init(key, shape) / jax.random.normal(key, shape)
        np.testing.assert_allclose(values["kernel"] / units[layer]["kernel"], scale, rtol=1e-5)


def test_truncated_weights_are_those_of_jaxs_initialiser():
    shape, key = (40, 50), jax.random.key(3)
    expected = jax.nn.initializers.glorot_normal()(key, shape)
    actual = models.DISTRIBUTIONS["truncated"](key, shape) / np.sqrt(np.mean(shape))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    plain, cut = (small("mlp", distribution=d).params for d in ("normal", "truncated"))
    largest = {name: np.abs(values["kernel"]).max() for name, values in cut.items()}
    for name, values in plain.items():
        limit = 2.28 * STD / np.sqrt(len(values["kernel"]))  # 2 / 0.8796
        assert largest[name] < limit
        assert values["kernel"].shape == cut[name]["kernel"].shape
    assert np.abs(plain["dense1"]["kernel"]).max() > 2.28 * STD / np.sqrt(40)


def check_forward_pass(name: str, parametrization: str, **changes: Any):
    config = config_of(name, parametrization, **changes)
    network = small(name, parametrization, **changes)
    x = images(name)
    expected = reference(name, network.params, x, config)
    assert np.abs(expected).max() > 0.1
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), network.params)
        actual = jax.jit(network.apply)(params, jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


POOLED = [(2, 4, 6, 3), (1, 5, 7, 2), (3, 2, 3, 1)]
"""Batches with even and odd sides."""


def values(shape: Shape, *, ties: bool = False) -> np.ndarray:
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    return np.round(x) if ties else x


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", POOLED)
def test_max_pooling_is_flaxs_bit_by_bit(shape: Shape, ties: bool):
    x = values(shape, ties=ties)
    flax = nnx.max_pool(jnp.asarray(x), (2, 2), strides=(2, 2))
    np.testing.assert_array_equal(models.max_pool(jnp.asarray(x)), flax)
    np.testing.assert_array_equal(flax, pool(x, "max"))


@pytest.mark.parametrize("shape", POOLED)
def test_average_pooling(shape: Shape):
    x = values(shape)
    actual = models.average_pool(jnp.asarray(x))
    np.testing.assert_allclose(actual, pool(x, "average"), rtol=1e-6, atol=1e-6)
    assert np.abs(actual - pool(x, "max")).max() > 0.1


def shares(x: np.ndarray, upstream: np.ndarray) -> np.ndarray:
    """Gradient of max pooling: what a square receives, divided among its largest entries."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(upstream.shape):
        n, row, column, channel = index
        at = (n, slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2), channel)
        largest = x[at] == x[at].max()
        gradient[at] = upstream[index] * largest / largest.sum()
    return gradient


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", POOLED)
def test_gradient_of_max_pooling(shape: Shape, ties: bool):
    x = values(shape, ties=ties)
    upstream = values((shape[0], shape[1] // 2, shape[2] // 2, shape[3]))

    def gradient(layer: Callable[[jax.Array], jax.Array]) -> np.ndarray:
        _, pull = jax.vjp(layer, jnp.asarray(x))
        return np.asarray(pull(jnp.asarray(upstream))[0])

    actual, expected = gradient(models.max_pool), shares(x, upstream)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    first_of_ties = gradient(lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2)))
    if ties and shape[0] > 1:
        assert np.abs(first_of_ties - expected).max() > 1e-3
    elif not ties:
        np.testing.assert_array_equal(actual, first_of_ties)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradient_of_max_pooling_where_its_input_is_rounded_twice(activation: str):
    """Compiled like this, XLA computes the pooled values twice, and here they differ.

    The derivative rule of JAX's maximum gives NaN then: it looks for an entry equal to the result.
    """
    network = small("lenet5", "ntk", activation=activation)
    x = jnp.asarray(images("lenet5"), jnp.float32)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(network.apply(network.params, x) ** 2)

    with jax.disable_jit():
        expected = jax.grad(loss)(x)  # operation by operation
    actual = quick(jax.grad(loss))(x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", models.MODELS)
def test_parametrisations_draw_the_same_function(name: str):
    x = jnp.asarray(images(name), jnp.float32)
    standard, ntk = small(name), small(name, "ntk")

    def run(network: Network) -> tuple[Any, Any]:
        """Gradient of a loss, and the logits."""

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            y = network.apply(params, x)
            return jnp.sum(y**2), y

        return jax.jit(jax.grad(loss, has_aux=True))(network.params)

    of_standard, y = run(standard)
    of_ntk, same = run(ntk)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(same, y, rtol=1e-5, atol=1e-5)
    for layer, drawn in ntk.params.items():
        kernel = np.asarray(drawn["kernel"])
        scale = np.float32(STD / np.sqrt(kernel.size / kernel.shape[-1]))
        np.testing.assert_array_equal(standard.params[layer]["kernel"], scale * kernel)
        bias = np.float32(BIAS) * np.asarray(drawn["bias"])
        np.testing.assert_array_equal(standard.params[layer]["bias"], bias)
    # The chain rule through θ' = scale·θ: the gradients differ by the scale of the layer.
    for layer, d in of_standard.items():
        kernel = np.asarray(d["kernel"])
        scale = STD / np.sqrt(kernel.size / kernel.shape[-1])
        atol = 1e-4 * float(np.abs(scale * kernel).max())
        np.testing.assert_allclose(of_ntk[layer]["kernel"], scale * kernel, rtol=1e-3, atol=atol)
        assert np.abs(of_ntk[layer]["kernel"] - kernel).max() > 0.1 * np.abs(kernel).max()
        np.testing.assert_allclose(of_ntk[layer]["bias"], BIAS * d["bias"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_drawn_parameters_are_normal(parametrization: str):
    """Mean and variance inside 5 standard errors, and no two layers share their draws."""
    config = config_of("mlp", parametrization, widths=(60, 60))
    params = build(config, (60,), 60, jax.random.key(0)).params
    weight, bias = (1, 1) if parametrization == "ntk" else (STD / np.sqrt(60), BIAS)
    draws = {}
    for layer, values in params.items():
        for kind, scale in (("kernel", weight), ("bias", bias)):
            z = np.asarray(values[kind], np.float64).ravel() / scale
            assert abs(z.mean()) < 5 / np.sqrt(z.size)
            assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)
            draws[layer, kind] = z
    one, two = draws["dense1", "kernel"], draws["dense2", "kernel"]
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(one.size)


def test_output_variance_follows_the_recursion():
    """E f² = σ_w²·E φ(h)² + σ_b² with E relu(h)² = E h²/2, exact at any width.

    The NTK parametrisation draws the same function, as the test above shows.
    """
    config = config_of("mlp", widths=(12, 9))
    x = np.random.default_rng(1).normal(size=(1, 20)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def outputs(key: jax.Array) -> jax.Array:
        network = build(config, (20,), 1, key)
        return network.apply(network.params, jnp.asarray(x))[0, 0]

    squares = np.asarray(outputs(jax.random.split(jax.random.key(2), 20_000)), np.float64) ** 2
    variance = STD**2 * np.mean(x.astype(np.float64) ** 2) + BIAS**2
    for _ in range(2):
        variance = STD**2 * variance / 2 + BIAS**2
    standard_error = squares.std() / np.sqrt(squares.size)
    assert standard_error < 0.02 * variance
    assert abs(squares.mean() - variance) < 5 * standard_error


@pytest.mark.parametrize("name", models.MODELS)
def test_logits_depend_on_one_image(name: str):
    network = small(name)
    apply = jax.jit(network.apply)
    x = images(name, 4).astype(np.float32)
    others = x[::-1].copy()
    others[1] = x[1]
    y, changed = apply(network.params, x), apply(network.params, others)
    np.testing.assert_allclose(y[1], changed[1], rtol=1e-5, atol=1e-6)
    assert np.all(np.abs(np.asarray(y - changed))[[0, 2, 3]].max(axis=1) > 1e-3)


def test_key_decides_the_draw():
    one, same, other = (
        build(config_of("mlp"), (4,), 2, jax.random.key(seed)).params for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one["dense1"]["kernel"], same["dense1"]["kernel"])
    assert np.all(np.asarray(one["dense1"]["kernel"]) != np.asarray(other["dense1"]["kernel"]))


# ---------------------------------------------------------------- sizes


def shapes_of(name: str, shape: Shape, config: ModelConfig | None = None) -> dict[str, Any]:
    """Shapes of the parameters, without drawing them."""
    config = config or ModelConfig(name=name)
    drawn = jax.eval_shape(lambda: build(config, shape, 10, jax.random.key(0)).params)
    return jax.tree.map(lambda leaf: leaf.shape, drawn)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("mlp", (28, 28, 1), 266_610),
        ("lenet5", (28, 28, 1), 431_080),
        ("conv4", (32, 32, 3), 2_425_930),
    ],
)
def test_number_of_parameters(name: str, shape: Shape, count: int):
    leaves = jax.tree.leaves(shapes_of(name, shape), is_leaf=lambda s: isinstance(s, tuple))
    assert sum(int(np.prod(leaf)) for leaf in leaves) == count


def test_names_and_shapes():
    assert shapes_of("mlp", (8,)) == {
        "dense1": {"kernel": (8, 300), "bias": (300,)},
        "dense2": {"kernel": (300, 100), "bias": (100,)},
        "dense3": {"kernel": (100, 10), "bias": (10,)},
    }
    linear = shapes_of("mlp", (4, 4, 1), ModelConfig(widths=()))
    assert linear == {"dense1": {"kernel": (16, 10), "bias": (10,)}}
    lenet5 = shapes_of("lenet5", (28, 28, 1))
    assert lenet5["conv2"] == {"kernel": (5, 5, 20, 50), "bias": (50,)}
    assert lenet5["dense1"]["kernel"] == (4 * 4 * 50, 500)
    assert lenet5["dense2"]["kernel"] == (500, 10)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ModelConfig(name="mpl"), (4,), "model: expected one of conv4, lenet5, mlp, got 'mpl'"),
        (ModelConfig(activation="rely"), (4,), "activation: expected one of .*mean 'relu'"),
        (
            ModelConfig(name="lenet5"),
            (15, 28, 1),
            r"input of lenet5: expected images of at least 16×16 pixels .*, got shape \(15, 28, 1\)"
            "; choose --model mlp or larger images",
        ),
        (ModelConfig(name="conv4"), (28, 3, 1), "input of conv4: .* at least 4×4 pixels"),
        (ModelConfig(name="conv4"), (28, 28), r"input of conv4: .* got shape \(28, 28\)"),
        (ModelConfig(name="lenet5"), (784,), r"input of lenet5: .* got shape \(784,\)"),
    ],
)
def test_bad_model_is_explained(config: ModelConfig, shape: Shape, message: str):
    with pytest.raises(InputError, match=message):
        build(config, shape, 10, jax.random.key(0))


@pytest.mark.parametrize(("name", "side"), [("lenet5", 16), ("conv4", 4)])
def test_smallest_images(name: str, side: int):
    assert shapes_of(name, (side, side, 1))["dense1"]["kernel"][0] == {16: 50, 4: 128}[side]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
        lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        lambda: nnx.Sequential(
            nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        ),
    ],
    ids=["statistics", "dropout", "inside"],
)
def test_module_in_training_mode_is_refused(layer: Callable[[], nnx.Module]):
    with pytest.raises(InputError, match=r"expected evaluation mode, got .*; call module.eval"):
        Network.from_nnx(layer())


# ---------------------------------------------------------------- networks of others


class Users(nnx.Module):
    """A module of a user's, with a shared activation and layers in a list."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])
        self.scale = nnx.Param(jnp.full((3,), 2.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * self.layers[1](jnp.tanh(self.layers[0](x)))


def plain(params: Any, x: jax.Array) -> jax.Array:
    """A network as Linen's `module.apply` is: a function of variables and inputs."""
    weights = params["params"]
    hidden = jnp.tanh(x @ weights["Dense_0"]["kernel"] + weights["Dense_0"]["bias"])
    return hidden @ weights["Dense_1"]["kernel"]


def test_module_of_a_user():
    module = Users(rngs=nnx.Rngs(0))
    network = Network.from_nnx(module)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    np.testing.assert_allclose(network.apply(network.params, x), module(x), rtol=1e-6)
    # The parameters are those given, not those of the module when it was split.
    doubled = jax.tree.map(lambda w: w, network.params)
    doubled["scale"] = 2 * doubled["scale"]
    np.testing.assert_allclose(network.apply(doubled, x), 2 * module(x), rtol=1e-6)
    np.testing.assert_allclose(network.apply(network.params, x), module(x), rtol=1e-6)


@pytest.mark.parametrize("kind", ["module", "function"])
def test_networks_of_others_can_be_masked(kind: str):
    if kind == "module":
        network = Network.from_nnx(Users(rngs=nnx.Rngs(0)))
    else:
        keys = jax.random.split(jax.random.key(0), 2)
        dense = {"kernel": jax.random.normal(keys[0], (6, 5)), "bias": jnp.ones(5)}
        last = {"kernel": jax.random.normal(keys[1], (5, 3))}
        network = Network(plain, {"params": {"Dense_0": dense, "Dense_1": last}})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    mask = masks.make(masks.magnitude_scores(network.params), 0.4, "global")
    gain = masks.energy_gain(network.params, mask)
    assert density(mask) == round(0.4 * 45) / 45
    sparse = masks.masked(network.apply, mask, gain)
    product = jax.tree.map(lambda w, m, g: w * m * g, network.params, mask, gain)
    y = sparse(network.params, x)
    np.testing.assert_allclose(y, network.apply(product, x), rtol=1e-6)
    assert np.abs(np.asarray(y - network.apply(network.params, x))).max() > 1e-3
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(sparse(p, x))))(network.params)
    pruned = jax.tree.map(lambda d, m: np.asarray(d)[~np.asarray(m)], gradient, mask)
    assert sum(leaf.size for leaf in jax.tree.leaves(pruned)) == 45 - 18
    assert not any(leaf.any() for leaf in jax.tree.leaves(pruned))
