"""Analytic kernels against recursions written out in NumPy, and against wide finite networks."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

from ntk_awt import kernels, masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError
from ntk_awt.kernels import analytic
from ntk_awt.kernels.analytic import Kernels, masked_conv, masked_dense, mixture, moment, network
from ntk_awt.kernels.compat import empirical_ntk_fn, stax

SLOW = (
    "test_finite_layers_approach_their_kernel_fn True",
    "test_mixture_tends_to_the_dense_limit",
    "test_wide_masked_models_approach_the_limit *",
    "test_wide_networks_with_a_masked_first_layer_approach_the_mixture",
    "test_mixture_of_a_convolution_against_all_masks",
    "test_convolutions conv4",
    "test_mixture_without_pruning_is_the_dense_network",
)

STD, BIAS = 1.3, 0.4

Masks = list[tuple[float, float]]
"""(p, s) of each layer."""


def config_of(name: str = "mlp", **changes: Any) -> ModelConfig:
    config = ModelConfig(
        name=name,
        widths=(7, 6),
        activation="erf",
        pooling="average",
        parametrization="ntk",
        weight_std=STD,
        bias_std=BIAS,
    )
    return dataclasses.replace(config, **changes)


def inputs(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def in_float64(function: Callable[..., Any], *args: Any) -> Any:
    """`function` of float64 arrays, as NumPy arrays."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, args)
        return jax.tree.map(np.asarray, function(*args))


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> bool:
    scale = np.abs(expected).max()
    return bool(np.abs(np.asarray(actual) - expected).max() <= rtol * scale)


# ---------------------------------------------------------------- the recursion in NumPy


def relu(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arc-cosine kernels: E φ(u)φ(v) and E φ̇(u)φ̇(v) with variances a, b and covariance c."""
    angle = np.arccos(np.clip(c / np.sqrt(a * b), -1, 1))
    products = np.sqrt(a * b) * (np.sin(angle) + (np.pi - angle) * np.cos(angle))
    return products / (2 * np.pi), (np.pi - angle) / (2 * np.pi)


def erf(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arcsine kernels."""
    size = (1 + 2 * a) * (1 + 2 * b)
    return 2 / np.pi * np.arcsin(2 * c / np.sqrt(size)), 4 / np.pi / np.sqrt(size - 4 * c**2)


def by_grid(function: Any, slope: Any) -> Any:
    """Both expectations by the trapezoidal rule in two independent normals."""

    def expectations(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = np.linspace(-8.5, 8.5, 341)
        weights = scipy.stats.norm.pdf(z) * (z[1] - z[0])
        a, b = np.broadcast_to(a, c.shape), np.broadcast_to(b, c.shape)
        found = []
        for va, vb, cov in zip(a.ravel(), b.ravel(), c.ravel(), strict=True):
            u = np.sqrt(va) * z[:, None]
            v = cov / np.sqrt(va) * z[:, None] + np.sqrt(max(vb - cov**2 / va, 0)) * z
            found.append([weights @ (f(u) * f(v)) @ weights for f in (function, slope)])
        products, slopes = np.array(found).T
        return products.reshape(c.shape), slopes.reshape(c.shape)

    return expectations


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return (1 + scipy.special.erf(x / np.sqrt(2))) / 2


EXPECTATIONS = {
    "relu": relu,
    "erf": erf,
    "gelu": by_grid(
        lambda x: x * normal_cdf(x),
        lambda x: normal_cdf(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi),
    ),
    "tanh": by_grid(np.tanh, lambda x: 1 - np.tanh(x) ** 2),
}


def window_mean(k: np.ndarray, window: int, padding: str) -> np.ndarray:
    """Mean of K[i, j, y + d, x + e, y' + d, x' + e] over the offsets (d, e) of a window."""
    if padding == "SAME":
        k = np.pad(k, [(0, 0), (0, 0), *[((window - 1) // 2, window // 2)] * 4])
    height, width = k.shape[2] - window + 1, k.shape[3] - window + 1
    total = 0
    for d, e in np.ndindex(window, window):
        rows, columns = slice(d, d + height), slice(e, e + width)
        total = total + k[:, :, rows, columns, rows, columns]
    return np.asarray(total) / window**2


def pooled(k: np.ndarray) -> np.ndarray:
    """Mean over both 2×2 squares of each pair of squares."""
    height, width = k.shape[2] // 2 * 2, k.shape[3] // 2 * 2
    k = k[:, :, :height, :width, :height, :width]
    starts = itertools.product((0, 1), repeat=4)
    return np.mean([k[:, :, a::2, b::2, c::2, d::2] for a, b, c, d in starts], axis=0)


ARCHITECTURES: dict[str, list[str]] = {
    "lenet5": ["conv", "pool", "conv", "pool", "flatten", "dense", "last"],
    "conv4": [*["conv", "conv", "pool"] * 2, "flatten", "dense", "dense", "last"],
}


class Recursion:
    """Layer by layer: the covariance and the tangent kernel of all pairs of inputs.

    Args:
        config: σ_w, σ_b, activation and layers.
        gain: False forgets the gain, so that a layer keeps the share s of the energy.
        window: of the convolutions, if not the network's own.
    """

    def __init__(self, config: ModelConfig, *, gain: bool = True, window: int | None = None):
        self.config, self.gain = config, gain
        own, self.padding = (5, "VALID") if config.name == "lenet5" else (3, "SAME")
        self.window = window or own
        hidden = [*["dense"] * len(config.widths), "last"]
        self.layers = ARCHITECTURES.get(config.name, ["flatten", *hidden])

    def affine(self, nngp: Any, ntk: Any, p: float, s: float, *, conv: bool) -> Any:
        over_window = partial(window_mean, window=self.window, padding=self.padding)
        mean = over_window if conv else np.asarray
        energy = self.config.weight_std**2 * (1 if self.gain else s)
        weights = energy * mean(nngp)
        bias = self.config.bias_std**2
        return weights + bias, p / s * weights + bias + energy * mean(ntk)

    def activate(self, nngp: np.ndarray, ntk: np.ndarray) -> Any:
        """Variances are the entries of an input (and pixel) with itself."""
        pixels = nngp.shape[2:4]
        n = len(nngp)
        pairs = nngp.transpose(0, 2, 3, 1, 4, 5) if pixels else nngp
        square = pairs.reshape(n * int(np.prod(pixels)), -1)
        variances = np.diag(square)
        products, slopes = EXPECTATIONS[self.config.activation](
            variances[:, None], variances[None, :], square
        )

        def back(k: np.ndarray) -> np.ndarray:
            return k.reshape(n, *pixels, n, *pixels).transpose(0, 3, 1, 2, 4, 5) if pixels else k

        return back(products), back(slopes) * ntk

    def covariance(self, x: np.ndarray) -> np.ndarray:
        """Of the inputs: [n, n], or [n, n, height, width, height, width] before a convolution."""
        if self.layers[0] == "flatten":
            flat = x.reshape(len(x), -1)
            return flat @ flat.T / flat.shape[1]
        return np.einsum("iyxc,jzwc->ijyxzw", x, x) / x.shape[-1]

    def run(self, layers: list[str], nngp: Any, ntk: Any, masks: Masks) -> Kernels:
        rest = iter(masks)
        for layer in layers:
            if layer in ("conv", "dense", "last"):
                nngp, ntk = self.affine(nngp, ntk, *next(rest), conv=layer == "conv")
                if layer != "last":
                    nngp, ntk = self.activate(nngp, ntk)
            elif layer == "pool":
                nngp, ntk = pooled(nngp), pooled(ntk)
            elif nngp.ndim > 2:
                nngp, ntk = (
                    np.einsum("ijyxyx->ij", k) / np.prod(k.shape[2:4]) for k in (nngp, ntk)
                )
        return Kernels(ntk, nngp)

    def __call__(self, x: np.ndarray, masks: Masks) -> Kernels:
        nngp = self.covariance(x)
        return self.run(self.layers, nngp, np.zeros_like(nngp), masks)

    def enumerate(self, x: np.ndarray, masks: Masks) -> Kernels:
        """The mixture: every mask of the first layer, with its probability."""
        p = masks[0][0]
        first = next(i for i, layer in enumerate(self.layers) if layer in ("conv", "dense"))
        shape = (3, 3, x.shape[-1]) if self.layers[first] == "conv" else x.shape[1:]
        total: Any = 0
        for bits in itertools.product((0, 1), repeat=int(np.prod(shape))):
            mask = np.reshape(bits, shape)
            chance = p ** sum(bits) * (1 - p) ** (len(bits) - sum(bits))
            total = total + chance * np.array(self.behind_first(x, mask / np.sqrt(p)))
        return self.run(self.layers[first + 1 :], total[0], total[1], masks[1:])

    def behind_first(self, x: np.ndarray, scale: np.ndarray) -> Any:
        """NNGP and NTK behind the first activation, of units that scale their inputs."""
        if scale.ndim == x.ndim - 1 and self.layers[0] == "flatten":
            seen = (x * scale).reshape(len(x), -1)
        else:
            height, width = x.shape[1:3]
            x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
            offsets = np.ndindex(3, 3)
            shifted = [x[:, d : d + height, e : e + width] * scale[d, e] for d, e in offsets]
            seen = np.concatenate(shifted, axis=-1)
        axes = "iyxc,jzwc->ijyxzw" if seen.ndim > 2 else "ic,jc->ij"
        nngp = STD**2 * np.einsum(axes, seen, seen) / seen.shape[-1] + BIAS**2
        return self.activate(nngp, nngp)


def parts(whole: Kernels, n: int) -> Kernels:
    """The block between the first n inputs and the others."""
    return Kernels(whole.ntk[:n, n:], whole.nngp[:n, n:])


def same(actual: Kernels, expected: Kernels, rtol: float = 1e-9) -> bool:
    return all(close(a, b, rtol) for a, b in zip(actual, expected, strict=True))


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_moment_against_quadrature(p: float):
    """c by root finding and s by integration, both without the closed forms."""
    norm = scipy.stats.norm
    c = scipy.optimize.brentq(lambda c: 2 * norm.sf(c) - p, 0, 10, xtol=1e-14)
    s = 2 * scipy.integrate.quad(lambda w: w * w * norm.pdf(w), c, 40, epsabs=1e-13)[0]
    assert moment(p, "magnitude") == pytest.approx(s, rel=1e-9)
    assert moment(p, "random") == p
    assert (moment(p, "magnitude") == 1.0) == (p == 1)
    if p < 1:
        assert moment(p, "magnitude") != pytest.approx(p, rel=1e-2)


# ---------------------------------------------------------------- E4 against the recursion

DENSITIES = (1.0, 0.3, 0.05, 0.6)
KINDS = ("random", "magnitude", "magnitude", "random")
"""Masks of four layers."""


def shares(densities: Any, kinds: Any) -> Masks:
    return [(p, moment(p, kind)) for p, kind in zip(densities, kinds, strict=True)]


@pytest.mark.parametrize("activation", ["erf", "relu"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_dense_layers(depth: int, activation: str):
    config = config_of(widths=(5,) * (depth - 1), activation=activation)
    density, kind = DENSITIES[:depth], KINDS[:depth]
    x = inputs(depth, 7, 4, 3)
    kernel_fn = network(config, (4, 3), 2, density=density, kind=kind).kernel_fn
    actual = in_float64(kernel_fn, x[:4], x[4:])
    expected = Recursion(config)
    assert actual.ntk.dtype == np.float64
    assert same(actual, parts(expected(x, shares(density, kind)), 4))
    # The diagonal of a relu kernel is the arc cosine of 1: rounding 1e-16 becomes 1e-8.
    assert same(in_float64(kernel_fn, x), expected(x, shares(density, kind)), 1e-7)

    second_moment_p = parts(expected(x, [(p, p) for p in density]), 4)
    assert close(actual.nngp, second_moment_p.nngp)
    assert not close(actual.ntk, second_moment_p.ntk, 0.05)
    no_gain = parts(Recursion(config, gain=False)(x, shares(density, kind)), 4)
    assert not close(actual.nngp, no_gain.nngp, 0.05)
    assert not close(actual.ntk, no_gain.ntk, 0.05)


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_other_activations(activation: str):
    """Variances are below 2 here, where tanh's quadrature has an error of 7e-5 at most."""
    config = config_of(activation=activation)
    density, kind = DENSITIES[:3], KINDS[:3]
    x = inputs(5, 4, 30)
    assert STD**2 * np.mean(x**2, axis=1).max() + BIAS**2 < 2
    kernel_fn = network(config, (30,), 1, density=density, kind=kind).kernel_fn
    expected = Recursion(config)(x, shares(density, kind))
    # The same function in both precisions, in either order.
    assert same(kernel_fn(jnp.asarray(x, jnp.float32)), expected, 1e-4)
    assert same(in_float64(kernel_fn, x), expected, 1e-4 if activation == "tanh" else 1e-9)
    other = Recursion(config_of(activation="erf"))(x, shares(density, kind))
    assert not same(in_float64(kernel_fn, x), other, 0.05)


def test_error_of_the_quadrature_for_tanh():
    """The bounds that `TANH_DEGREE` documents, against ten times as many nodes."""
    for variance, bound in ((1.0, 3e-7), (2.0, 7e-5), (4.0, 4e-3)):
        errors = []
        for slope in (False, True):
            values = []
            for degree in (analytic.TANH_DEGREE, 640):
                nodes, weights = scipy.special.roots_hermite(degree)
                y = np.tanh(np.sqrt(2 * variance) * nodes)
                values.append(weights @ ((1 - y**2 if slope else y) ** 2) / np.sqrt(np.pi))
            errors.append(abs(values[0] / values[1] - 1))
        assert bound / 3 < max(errors) < bound


CONVOLUTIONAL: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "lenet5": ((17, 16, 2), (1.0, 0.2, 0.05, 0.5), ("random", "magnitude", "magnitude", "random")),
    "conv4": ((5, 4, 2), (0.4, 0.3, 0.2, 0.1, 0.5, 0.05, 1.0), ("magnitude",) * 7),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutions(name: str):
    shape, density, kind = CONVOLUTIONAL[name]
    config = config_of(name, activation="relu" if name == "conv4" else "erf")
    x = inputs(1, 3, *shape)
    kernel_fn = network(config, shape, 2, density=density, kind=kind).kernel_fn
    actual = in_float64(kernel_fn, x[:1], x[1:])
    expected = Recursion(config)
    assert same(actual, parts(expected(x, shares(density, kind)), 1))
    assert not close(actual.ntk, parts(expected(x, [(p, p) for p in density]), 1).ntk, 0.05)
    other_window = Recursion(config, window=expected.window - 2)
    assert not same(actual, parts(other_window(x, shares(density, kind)), 1), 0.01)


# ---------------------------------------------------------------- as layers of neural-tangents


def stack(dense: Callable[..., Any], conv: Callable[..., Any], *, pool: bool) -> Any:
    """Two convolutions and a dense layer, of either library."""
    pooling = [stax.AvgPool((2, 2), (2, 2))] if pool else []
    return stax.serial(conv(4), stax.Erf(), *pooling, conv(5), stax.Erf(), stax.Flatten(), dense(2))


def plain(*, pool: bool) -> Any:
    return stack(
        lambda width: stax.Dense(width, STD, BIAS),
        lambda width: stax.Conv(width, (3, 3), padding="SAME", W_std=STD, b_std=BIAS),
        pool=pool,
    )


def with_masks(density: float, kind: str, *, pool: bool) -> Any:
    options: Any = {"kind": kind, "weight_std": STD, "bias_std": BIAS}
    return stack(
        lambda width: masked_dense(width, density, **options),
        lambda width: masked_conv(width, 3, density, **options),
        pool=pool,
    )


def kernels_of(layer: Any, x1: np.ndarray, x2: np.ndarray | None = None, **options: Any) -> Kernels:
    @jax.jit
    def compiled(x1: jax.Array, x2: jax.Array | None) -> Kernels:
        return Kernels(*layer[2](x1, x2, ("ntk", "nngp"), **options))

    return in_float64(compiled, x1, x2)


def test_density_one_and_random_masks_are_the_plain_layers():
    x = inputs(1, 3, 6, 5, 3)
    expected = kernels_of(plain(pool=True), x)
    one = kernels_of(with_masks(1.0, "magnitude", pool=True), x)
    assert same(one, expected, 1e-12)  # convolutions are summed in another order
    features = inputs(2, 3, 9)
    plain_dense = kernels_of(stax.serial(stax.Dense(1, STD, BIAS)), features)
    own_dense = kernels_of(masked_dense(1, weight_std=STD, bias_std=BIAS), features)
    np.testing.assert_array_equal(own_dense.ntk, plain_dense.ntk)
    np.testing.assert_array_equal(own_dense.nngp, plain_dense.nngp)
    assert same(kernels_of(with_masks(0.2, "random", pool=True), x), expected, 1e-12)
    shrunk = kernels_of(with_masks(0.2, "magnitude", pool=True), x)
    assert close(shrunk.nngp, expected.nngp, 1e-12)
    assert np.all(np.diag(shrunk.ntk) < 0.6 * np.diag(expected.ntk))


def test_requirements_of_the_network_are_kept():
    """Without pooling only covariances within a pixel are needed: both ways must agree."""
    for pool in (False, True):
        layer = with_masks(0.2, "magnitude", pool=pool)
        assert layer[2].input_req == plain(pool=pool)[2].input_req
    layer, x = with_masks(0.2, "magnitude", pool=False), inputs(3, 2, 5, 4, 3)
    expected = kernels_of(layer, x)
    full = kernels_of(layer, x, diagonal_spatial=False, diagonal_batch=False)
    assert same(full, expected, 1e-12)
    nngp_only = in_float64(jax.jit(lambda x: layer[2](x, None, "nngp")), x)
    assert close(nngp_only, expected.nngp, 1e-12)


@pytest.mark.parametrize(
    ("window", "padding", "diagonal"),
    [(3, "SAME", False), (4, "SAME", True), (4, "VALID", True), (3, "CIRCULAR", False)],
)
def test_average_over_the_window_is_that_of_neural_tangents(
    window: int, padding: str, diagonal: bool
):
    """Two convolutions, since after an odd number neural-tangents swaps the spatial axes."""
    own = masked_conv(2, window, kind="magnitude", weight_std=STD, bias_std=BIAS, padding=padding)
    other = stax.Conv(2, (window, window), padding=padding, W_std=STD, b_std=BIAS)
    own, other = (stax.serial(layer, stax.Erf(), layer) for layer in (own, other))
    x1, x2 = inputs(1, 2, 8, 7, 2), inputs(2, 1, 8, 7, 2)
    options = {"diagonal_spatial": diagonal, "diagonal_batch": not diagonal}
    expected = kernels_of(other, x1, x2, **options)
    assert expected.ntk.ndim == (4 if diagonal else 6)
    assert same(kernels_of(own, x1, x2, **options), expected, 1e-12)


def test_padded_convolution_of_sixteen_pixels():
    """In float64 this size can crash in XLA's own convolution on a CPU."""
    x = inputs(1, 1, 16, 16, 2)
    actual = kernels_of(masked_conv(1, 3), x, diagonal_spatial=False)
    expected = window_mean(np.einsum("iyxc,jzwc->ijyxzw", x, x) / 2, 3, "SAME")
    assert close(actual.nngp.transpose(0, 1, 2, 4, 3, 5), expected)


@pytest.mark.parametrize("conv", [False, True])
def test_masked_pixels_stay_masked(conv: bool):
    """`mask_constant` of neural-tangents marks missing pixels: no covariance, no kernel there."""
    x = inputs(4, 2, 5, 4, 3)
    x[:, 2] = 7.0
    options: Any = {"kind": "magnitude", "bias_std": 1.0}
    layer = masked_conv(1, 1, 0.1, **options) if conv else masked_dense(1, 0.1, **options)
    kernel = kernels_of(layer, x, mask_constant=7.0, diagonal_spatial=True)
    for k in kernel:
        assert np.all(k[:, :, 2] == 0)
        assert np.all(np.diagonal(k[:, :, 1]) != 0)


# ---------------------------------------------------------------- finite networks


def stax_params(params: Any) -> list[Any]:
    """Parameters of `models` as those of the masked layers, with nothing pruned."""
    leaves = {name: (leaf["kernel"], leaf["bias"]) for name, leaf in params.items()}
    order = sorted(leaves, key=lambda name: (not name.startswith("conv"), name))

    def entry(name: str) -> Any:
        kernel, bias = leaves[name]
        return kernel, bias.reshape((1,) * (kernel.ndim - 1) + bias.shape), jnp.ones_like(kernel)

    return [entry(name) for name in order]


def drawn_params(config: ModelConfig, shape: tuple[int, ...], outputs: int, seed: int) -> Any:
    """Parameters of the model of `models`, drawn by NumPy: standard normal, as in its draws."""
    rng = np.random.default_rng(seed)
    build = partial(models.build, config, shape, outputs)
    leaves = jax.eval_shape(lambda: build(jax.random.key(0)).params)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), leaves)


@pytest.mark.parametrize("name", models.MODELS)
def test_finite_network_is_the_one_of_models(name: str):
    """The same layers in the same order, so the limit is the one of the models."""
    shape = {"mlp": (4, 3), "lenet5": (17, 16, 2), "conv4": (9, 7, 2)}[name]
    config = config_of(name)
    init, apply, _ = network(config, shape, 3).layer
    found = jax.eval_shape(lambda: init(jax.random.key(0), (2, *shape))[1])
    params = drawn_params(config, shape, 3, 0)
    weights = iter(stax_params(params))
    same_params = [next(weights) if entry else () for entry in found]
    assert jax.tree.map(jnp.shape, same_params) == jax.tree.map(lambda a: a.shape, found)
    x = jnp.asarray(inputs(0, 2, *shape), jnp.float32)

    @jax.jit
    def own(params: Any, x: jax.Array) -> jax.Array:
        return models.build(config, shape, 3, jax.random.key(0)).apply(params, x)

    expected = own(params, x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(jax.jit(apply)(same_params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", analytic.KINDS)
def test_drawn_masks_and_their_gain(kind: str):
    """The mask keeps p and s within 5 standard errors; it and the gain act in the forward pass."""
    p, s = 0.1, moment(0.1, kind)
    init, apply, _ = masked_conv(50, 3, p, kind=kind, weight_std=STD, bias_std=BIAS)
    plain_apply = stax.Conv(50, (3, 3), padding="SAME", W_std=STD, b_std=BIAS)[1]
    w, b, mask = jax.jit(lambda key: init(key, (1, 6, 6, 30))[1])(jax.random.key(0))
    assert w.shape == mask.shape == (3, 3, 30, 50)
    assert set(np.unique(mask)) == {0, 1}
    assert abs(np.mean(mask) - p) < 5 * np.sqrt(p * (1 - p) / mask.size)
    energy = np.asarray(mask * w**2, np.float64)
    assert abs(energy.mean() - s) < 5 * energy.std() / np.sqrt(mask.size)
    smallest = np.abs(w)[mask == 1].min()
    assert np.array_equal(mask, np.abs(w) >= smallest) == (kind == "magnitude")

    x = jnp.asarray(inputs(0, 2, 6, 6, 30), jnp.float32)

    @jax.jit
    def both(params: Any) -> Any:
        of, y = jax.grad(lambda q: (jnp.sum((y := apply(q, x)) ** 2), y), has_aux=True)(params)
        return of, y, plain_apply((params[0] * params[2] / s**0.5, params[1]), x)

    (of_w, _, of_mask), y, expected = both((w, b, mask))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert not np.any(of_mask)
    assert np.array_equal(of_w != 0, mask == 1)


FEATURES, OUTPUTS = 32, 4


@cache
def mean_kernel(config: ModelConfig, features: int) -> Callable[..., jax.Array]:
    """Empirical kernel of our masked model, averaged over its outputs."""
    apply = models.build(config, (features,), OUTPUTS, jax.random.key(0)).apply

    @jax.jit
    def kernel(x: jax.Array, params: Any, mask: Any, gain: Any) -> jax.Array:
        theta = kernels.empirical(apply, params, x, mask=mask, gain=gain)
        return jnp.einsum("ijaa->ij", theta) / OUTPUTS

    return kernel


top_k = jax.jit(masks.top_k)


def sparse_kernels(
    config: ModelConfig, x: np.ndarray, densities: tuple[float, ...], kind: str, seeds: int
) -> np.ndarray:
    """Kernels [seeds, n, n] of our models with our masks and gains."""
    features = x.shape[1]

    kernel = mean_kernel(config, features)

    def draw(seed: int) -> np.ndarray:
        params = drawn_params(config, (features,), OUTPUTS, seed)
        scores = (
            params
            if kind == "magnitude"
            else drawn_params(config, (features,), OUTPUTS, 1000 + seed)
        )
        counts = jax.tree.map(jnp.size, params)
        for name, p in zip(sorted(params), densities, strict=True):
            counts[name]["kernel"] = round(p * params[name]["kernel"].size)
        mask = top_k(masks.magnitude_scores(scores), counts)
        gain = masks.energy_gain(params, mask)
        return np.asarray(kernel(jnp.asarray(x, jnp.float32), params, mask, gain))

    return np.array([draw(seed) for seed in range(seeds)], np.float64)


def distance(kernel: Any, limit: Any) -> float:
    return float(np.linalg.norm(kernel - limit) / np.linalg.norm(limit))


@pytest.mark.parametrize("kind", analytic.KINDS)
def test_wide_masked_models_approach_the_limit(kind: str):
    """5 % at width 1024 and a kept fan-in of 205; one draw is 3 to 4 % away."""
    config, densities = config_of(widths=(1024, 1024)), (1.0, 0.2, 0.2)
    x = inputs(0, 3, FEATURES)
    limit, wrong = (
        network(config, (FEATURES,), 1, density=densities, kind=k).kernel_fn(jnp.asarray(x)).ntk
        for k in (kind, *(other for other in analytic.KINDS if other != kind))
    )
    found = sparse_kernels(config, x, densities, kind, seeds=4).mean(0)
    assert distance(found, limit) < 0.05
    assert distance(found, wrong) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", analytic.KINDS)
def test_very_wide_masked_models_approach_the_limit(kind: str):
    """3 % at width 4096 and a kept fan-in of 410, and closer than at width 1024."""
    x, densities = inputs(0, 3, FEATURES), (1.0, 0.1, 0.1)
    errors = []
    for width, seeds in ((1024, 10), (4096, 10)):
        config = config_of(widths=(width, width))
        analytic_network = network(config, (FEATURES,), 1, density=densities, kind=kind)
        limit = np.asarray(analytic_network.kernel_fn(jnp.asarray(x)).ntk)
        found = sparse_kernels(config, x, densities, kind, seeds)
        errors.append(np.mean([distance(k, limit) for k in found]))
        if width == 4096:
            mean, standard_error = found.mean(0), found.std(0, ddof=1) / np.sqrt(seeds)
            near = np.abs(mean - limit) <= 3 * standard_error
            assert distance(mean, limit) < 0.03 or near.all()
    assert errors[1] < 0.7 * errors[0]  # 0.5 if the error falls like 1/√width


@pytest.mark.parametrize("conv", [False, True])
def test_finite_layers_approach_their_kernel_fn(conv: bool):
    """neural-tangents' empirical kernel of 4 drawn networks; 5 %, where one is 1 to 5 % away."""
    options: Any = {"kind": "magnitude", "weight_std": STD, "bias_std": BIAS}
    if conv:
        first, second = masked_conv(128, 3, **options), masked_conv(128, 3, 0.3, **options)
        x, end = inputs(0, 2, 4, 4, 3), [stax.Flatten()]
    else:
        first, second = masked_dense(1024, **options), masked_dense(1024, 0.2, **options)
        x, end = inputs(0, 3, FEATURES), []
    last = masked_dense(OUTPUTS, 0.3, **options)
    init, apply, kernel_fn = stax.serial(first, stax.Erf(), second, stax.Erf(), *end, last)
    theta = empirical_ntk_fn(apply, trace_axes=(-1,), vmap_axes=0)

    @jax.jit
    def drawn(keys: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.map(lambda key: theta(x, None, init(key, x.shape)[1]), keys).mean(0)

    x = jnp.asarray(x, jnp.float32)
    found = drawn(jax.random.split(jax.random.key(0), 4), x)
    assert distance(found, jax.jit(lambda x: kernel_fn(x, None, "ntk"))(x)) < 0.05


# ---------------------------------------------------------------- a masked first layer


def standard_errors(mean: Kernels, error: Kernels, expected: Kernels) -> float:
    """Largest distance in standard errors."""
    return max(
        np.abs((a - wanted) / e).max() for a, e, wanted in zip(mean, error, expected, strict=True)
    )


def test_mixture_against_all_masks():
    config, p = config_of(widths=(5, 5), activation="relu"), 0.4
    density, kind = (p, 0.3, 0.5), ("random", "magnitude", "magnitude")
    x = inputs(0, 3, 6)
    reference = Recursion(config)
    exact, dense = (
        reference.enumerate(x, shares(density, kind)),
        reference(x, shares(density, kind)),
    )
    kernel_fn = mixture(config, (6,), density=density, kind=kind, samples=512, groups=16)
    drawn = [in_float64(kernel_fn, jax.random.key(seed), x) for seed in range(40)]
    # 16 groups: the ratio is Student's t with 15 degrees of freedom, of variance 15/13.
    ratios = np.array([(k.mean.ntk - exact.ntk) / k.error.ntk for k in drawn])
    assert 0.75 < np.sqrt(np.mean(ratios**2)) < 1.4
    for k in drawn:
        assert standard_errors(k.mean, k.error, exact) < 8
    mean, error = (Kernels(*np.mean([k[part] for k in drawn], axis=0)) for part in (0, 1))
    error = Kernels(*(e / np.sqrt(len(drawn)) for e in error))
    assert standard_errors(mean, error, exact) < 5
    assert standard_errors(mean, error, dense) > 20
    block = in_float64(kernel_fn, jax.random.key(0), x[:1], x[1:])
    assert close(block.mean.ntk, drawn[0].mean.ntk[:1, 1:], 1e-9)
    assert close(block.error.nngp, drawn[0].error.nngp[:1, 1:], 1e-6)


def test_mixture_of_a_convolution_against_all_masks():
    config = config_of("conv4")
    density, kind = (0.4, *(0.3,) * 6), ("random", *("magnitude",) * 6)
    x = inputs(0, 2, 4, 5, 1)
    reference = Recursion(config)
    exact = reference.enumerate(x, shares(density, kind))
    kernel_fn = mixture(config, (4, 5, 1), density=density, kind=kind, samples=256, groups=16)
    drawn = in_float64(kernel_fn, jax.random.key(0), x)
    assert standard_errors(drawn.mean, drawn.error, exact) < 5
    assert standard_errors(drawn.mean, drawn.error, reference(x, shares(density, kind))) > 8


def test_mixture_without_pruning_is_the_dense_network():
    config = config_of("lenet5")
    x = inputs(0, 2, 16, 16, 1)
    density = (1.0, 0.2, 0.2, 0.2)
    kind = ("random", "magnitude", "magnitude", "magnitude")
    kernel_fn = mixture(config, (16, 16, 1), density=density, kind=kind, samples=2, groups=2)
    drawn = in_float64(kernel_fn, jax.random.key(0), x)
    dense = network(config, (16, 16, 1), 1, density=density, kind="magnitude").kernel_fn
    assert same(drawn.mean, in_float64(dense, x))
    assert max(np.abs(k).max() for k in drawn.error) < 1e-12


def test_mixture_tends_to_the_dense_limit():
    """The same covariances at d = 8, 32, 128 inputs: the difference falls like 1/(dp)."""
    p, config = 0.5, config_of(widths=(5,))
    base = inputs(0, 2, 8)
    dense = Recursion(config)(base, [(1.0, 1.0)] * 2)
    sizes, gaps = np.array([8, 32, 128]), []
    for d in sizes:
        kernel_fn = mixture(config, (int(d),), density=(p, 1.0), samples=2**15)
        drawn = in_float64(kernel_fn, jax.random.key(1), np.tile(base, d // 8))
        gaps.append(np.linalg.norm(drawn.mean.ntk - dense.ntk))
        assert gaps[-1] > 5 * np.linalg.norm(drawn.error.ntk)
    slope = np.polyfit(np.log(sizes * p), np.log(gaps), 1)[0]
    assert -1.2 < slope < -0.8, slope


def test_wide_networks_with_a_masked_first_layer_approach_the_mixture():
    """Two layers of width 8192: 2 %, where the dense limit and a shared mask are far away."""
    config = config_of(widths=(8192,))
    density = (0.2, 0.5)
    x = inputs(0, 3, 16)
    drawn = mixture(config, (16,), density=density, samples=4096)(jax.random.key(0), jnp.asarray(x))
    found = sparse_kernels(config, x, density, "random", seeds=3).mean(0)
    dense = network(config, (16,), 1, density=density).kernel_fn(jnp.asarray(x))
    assert distance(found, drawn.mean.ntk) < 0.02
    assert distance(found, dense.ntk) > 0.06
    reference = Recursion(config)
    mask = np.random.default_rng(0).random(16) < 0.2
    nngp, ntk = reference.behind_first(x, mask / np.sqrt(0.2))
    shared = reference.run(["last"], nngp, ntk, [(1.0, 1.0)])
    assert distance(found, shared.ntk) > 0.06


# ---------------------------------------------------------------- use and misuse


def test_kernel_can_be_differentiated():
    """Attacks on the kernel predictor need the gradient with respect to the images."""
    kernel_fn = network(config_of(), (6,), 1, density=0.2, kind="magnitude").kernel_fn
    x1, x2, direction = inputs(0, 2, 6), inputs(1, 3, 6), inputs(2, 3, 6)

    def along(step: Any, x1: Any, x2: Any, direction: Any) -> Any:
        return kernel_fn(x1, x2 + step * direction).ntk.sum()

    slope = in_float64(jax.grad(along), np.float64(0) + np.zeros(()), x1, x2, direction)
    ends = [in_float64(along, np.full((), step), x1, x2, direction) for step in (1e-5, -1e-5)]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-7)


def test_kernels_are_float32_by_default():
    kernel_fn = network(config_of(), (6,), 1).kernel_fn
    x = jnp.asarray(inputs(0, 2, 6), jnp.float32)
    assert {k.dtype for k in kernel_fn(x)} == {jnp.dtype("float32")}
    drawn = mixture(config_of(), (6,), density=0.5, samples=16)(jax.random.key(0), x)
    assert {k.dtype for k in (*drawn.mean, *drawn.error)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moment(0.0, "random"), r"density: expected a number in \(0, 1\]"),
        (lambda: moment(0.5, "magnitud"), "kind of mask: .* did you mean 'magnitude'"),
        (lambda: masked_dense(3, 1.5), r"density: expected a number in \(0, 1\], got 1.5"),
        (lambda: masked_conv(3, 3, 0.5, kind="erk"), "kind of mask: expected one of"),
        (lambda: masked_conv(3, 3, 0.5, padding="same"), "padding: expected one of .*SAME"),
        (
            lambda: network(config_of(parametrization="standard"), (4,), 1),
            "parametrization of an analytic kernel: expected ntk, got standard; .*width",
        ),
        (
            lambda: network(config_of("conv4", pooling="max"), (8, 8, 1), 1),
            "pooling of an analytic kernel: expected average, got max; .*pooling='average'",
        ),
        (lambda: network(config_of(activation="tanh", bias_std=0.0), (4,), 1), "bias_std .*tanh"),
        (lambda: network(config_of(input_std=0.3), (4,), 1), "input_std .* 1.0, got 0.3"),
        (lambda: network(config_of(input_mean=0.3), (4,), 1), "input_mean .* 0.0, got 0.3"),
        (lambda: network(config_of(fan="average"), (4,), 1), "fan of .* in, got average"),
        (lambda: network(config_of(distribution="truncated"), (4,), 1), "distribution of .*normal"),
        (lambda: network(config_of(activation="rely"), (4,), 1), "activation: .*'relu'"),
        (lambda: network(config_of("lenet"), (4,), 1), "model: .*'lenet5'"),
        (lambda: network(config_of("lenet5"), (15, 16, 1), 1), "at least 16×16 pixels"),
        (lambda: network(config_of("conv4"), (16,), 1), r"with a channel axis, got shape \(16,\)"),
        (
            lambda: network(config_of(), (4,), 1, density=(0.5, 0.5)),
            "density: expected one value, or one for each of 3 layers, got 2",
        ),
        (
            lambda: network(config_of(), (4,), 1, kind=("random",) * 4),
            "kind of mask: expected one value, or one for each of 3 layers, got 4",
        ),
        (lambda: network(config_of(), (4,), 1, density=(1.0, 0.5, 2.0)), "density: .* got 2.0"),
        (lambda: mixture(config_of(), (4,), density=0.5, kind="magnitude"), "first layer's mask"),
        (lambda: mixture(config_of(widths=()), (4,), density=0.5), "at least one hidden layer"),
        (lambda: mixture(config_of(), (4,), density=0.5, samples=40), "a multiple of 16 groups"),
        (lambda: mixture(config_of(), (4,), density=0.5, samples=0), "a multiple of 16 groups"),
        (lambda: mixture(config_of(), (4,), density=0.5, groups=1), "groups: .* ≥ 2"),
        (
            lambda: network(config_of(), (4,), 1).kernel_fn(jnp.ones((2, 4)), jnp.ones((2, 5))),
            r"input of an analytic kernel: expected images \[n, 4\], got shape \(2, 5\)",
        ),
        (
            lambda: mixture(config_of(), (4,), density=0.5)(jax.random.key(0), jnp.ones((2, 5))),
            r"expected images \[n, 4\], got shape \(2, 5\)",
        ),
    ],
)
def test_bad_input_is_explained(call: Callable[[], Any], message: str):
    with pytest.raises(InputError, match=message):
        call()
