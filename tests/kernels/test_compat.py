"""neural-tangents on current JAX: every part against a computation that does not use it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

from ntk_awt.kernels import compat
from ntk_awt.kernels.compat import (
    NtkImplementation,
    batch,
    empirical_kernel_fn,
    empirical_nngp_fn,
    empirical_ntk_fn,
    linearize,
    monte_carlo_kernel_fn,
    predict,
    stax,
    taylor_expand,
)

SLOW = (
    "test_mse_ensemble",
    "test_empirical_ntk trace[234567]*-2",
    "test_empirical_ntk trace[0123456]*-None-*",
    "test_empirical_ntk_of_several_outputs 2",
    "test_attention_kernel",
    "test_branches_normalization_and_dropout",
    "test_monte_carlo *",
)

Kernel = np.ndarray
WORKING = [NtkImplementation.JACOBIAN_CONTRACTION, NtkImplementation.NTK_VECTOR_PRODUCTS]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def rejects(actual: Any, wrong: Any) -> None:
    """The comparison used in these tests must notice a wrong value."""
    with pytest.raises(AssertionError):
        assert_allclose(actual, wrong, rtol=1e-3)


def compiled(layer: Any) -> Callable[..., Any]:
    """The kernel function of a layer, compiled as a whole."""
    return jax.jit(layer[2], static_argnames=("get", "mask_constant"))


# Empirical kernels


def mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.sin(hidden @ params["w2"]) + hidden[:, :3] ** 2


def mlp_params(seed: int = 0) -> dict[str, Any]:
    return {"w1": normal(seed, 5, 6), "b1": normal(seed + 100, 6), "w2": normal(seed + 200, 6, 3)}


@cache
def jacobian(seed: int, n: int) -> np.ndarray:
    """The Jacobian of `mlp` at `n` inputs: examples, outputs, parameters."""
    flat, unravel = ravel_pytree(mlp_params())
    x = normal(seed, n, 5)
    return np.asarray(jax.jit(jax.jacobian(lambda p: mlp(unravel(p), x)))(flat))


# Axes of the output: traced, kept on the diagonal, and the sum over both Jacobians that they mean.
AXES = [
    ((), (), "iap,jbp->ijab", 1),
    ((-1,), (), "iap,jap->ij", 3),
    ((), (-1,), "iap,jap->ija", 1),
    ((), (0,), "iap,ibp->iab", 1),
    ((0,), (), "iap,ibp->ab", 4),
    ((-1,), (0,), "iap,iap->i", 3),
    ((0, 1), (), "iap,iap->", 12),
    ((0,), (1,), "iap,iap->a", 4),
]


@pytest.mark.parametrize("implementation", WORKING)
@pytest.mark.parametrize("vmap_axes", [None, 0])
@pytest.mark.parametrize(("trace", "diagonal", "sums", "size"), AXES)
def test_empirical_ntk(
    implementation: NtkImplementation,
    vmap_axes: int | None,
    trace: tuple[int, ...],
    diagonal: tuple[int, ...],
    sums: str,
    size: int,
) -> None:
    x1 = normal(1, 4, 5)
    x2 = normal(2, 4 if 0 in trace + diagonal else 2, 5)
    ntk_fn = jax.jit(empirical_ntk_fn(mlp, trace, diagonal, vmap_axes, implementation))
    j1, j2 = jacobian(1, len(x1)), jacobian(2, len(x2))
    ntk = ntk_fn(x1, x2, mlp_params())
    assert ntk.dtype == jnp.float64
    assert_allclose(ntk, np.einsum(sums, j1, j2) / size, rtol=1e-10, atol=1e-12)
    if not trace + diagonal:
        same = ntk_fn(x1, None, mlp_params())
        assert_allclose(same, np.einsum(sums, j1, j1) / size, rtol=1e-10, atol=1e-12)
    rejects(ntk, np.einsum(sums, j1, j2) / (size + 1))


def test_empirical_kernels_together() -> None:
    x1, x2, params = normal(1, 4, 5), normal(2, 2, 5), mlp_params()
    f1, f2 = np.asarray(mlp(params, x1)), np.asarray(mlp(params, x2))
    kernel_fn = jax.jit(empirical_kernel_fn(mlp), static_argnames="get")
    kernels = kernel_fn(x1, x2, get=("nngp", "ntk"), params=params)
    assert_allclose(kernels.nngp, f1 @ f2.T / 3, rtol=1e-12)
    assert_allclose(kernels.ntk, np.einsum("iap,jap->ij", jacobian(1, 4), jacobian(2, 2)) / 3)
    full = empirical_nngp_fn(mlp, trace_axes=())(x1, x2, params)
    assert_allclose(full, np.einsum("ia,jb->ijab", f1, f2), rtol=1e-12)


@pytest.mark.parametrize("implementation", WORKING)
def test_empirical_ntk_of_several_outputs(implementation: NtkImplementation) -> None:
    """A tree of outputs of different shapes, which the replaced helpers split."""

    def two(params: dict[str, Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mlp(params, x), jnp.tanh(x @ params["w1"])

    x1, x2, params = normal(1, 3, 5), normal(2, 2, 5), mlp_params()
    ntk_fn = jax.jit(empirical_ntk_fn(two, (), implementation=implementation))
    first, second = ntk_fn(x1, x2, params)
    assert_allclose(first, np.einsum("iap,jbp->ijab", jacobian(1, 3), jacobian(2, 2)), atol=1e-12)
    flat, unravel = ravel_pytree(params)
    j1, j2 = (
        jax.jit(jax.jacobian(lambda p, x=x: jnp.tanh(x @ unravel(p)["w1"])))(flat) for x in (x1, x2)
    )
    assert_allclose(second, np.einsum("iap,jbp->ijab", j1, j2), atol=1e-12)


@pytest.mark.parametrize("name", ["STRUCTURED_DERIVATIVES", "AUTO"])
@pytest.mark.parametrize("make", [empirical_ntk_fn, empirical_kernel_fn])
def test_what_cannot_work_says_so(name: str, make: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}.*JAX internals.*JACOBIAN_CONTRACTION"):
        make(mlp, implementation=NtkImplementation[name])
    with pytest.raises(NotImplementedError, match="NTK_VECTOR_PRODUCTS"):
        make(mlp, implementation=int(NtkImplementation[name]))


# Analytic kernels of dense layers


def relu_moments(k12: Kernel, k11: Kernel, k22: Kernel) -> tuple[Kernel, Kernel]:
    """E[f(u) f(v)] and E[f'(u) f'(v)] for f = ReLU: arc-cosine kernels of order 1 and 0."""
    norm = np.sqrt(k11 * k22)
    cos = np.clip(k12 / norm, -1, 1)
    angle = np.arccos(cos)
    value = norm * (np.sin(angle) + (np.pi - angle) * cos) / (2 * np.pi)
    return value, (np.pi - angle) / (2 * np.pi)


def erf_moments(k12: Kernel, k11: Kernel, k22: Kernel) -> tuple[Kernel, Kernel]:
    product = (1 + 2 * k11) * (1 + 2 * k22)
    value = 2 / np.pi * np.arcsin(2 * k12 / np.sqrt(product))
    return value, 4 / np.pi / np.sqrt(product - 4 * k12**2)


def abrelu_moments(k12: Kernel, k11: Kernel, k22: Kernel) -> tuple[Kernel, Kernel]:
    """For f(x) = 0.3 min(x, 0) + 1.2 max(x, 0), put together from ReLUs of x and -x."""
    a, b = 0.3, 1.2
    (same, same_slope), (other, other_slope) = (relu_moments(k, k11, k22) for k in (k12, -k12))
    squares = a**2 + b**2
    return squares * same - 2 * a * b * other, squares * same_slope + 2 * a * b * other_slope


def by_quadrature(
    f: Callable[[np.ndarray], np.ndarray], slope: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Kernel, Kernel, Kernel], tuple[Kernel, Kernel]]:
    """The two moments of a smooth function by Gauss-Hermite quadrature in two dimensions."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def moments(k12: Kernel, k11: Kernel, k22: Kernel) -> tuple[Kernel, Kernel]:
        k12, k11, k22 = (k[..., None, None] for k in np.broadcast_arrays(k12, k11, k22))
        u = np.sqrt(k11) * nodes[:, None]
        rest = np.sqrt(np.maximum(k22 - k12**2 / k11, 0))
        v = k12 / np.sqrt(k11) * nodes[:, None] + rest * nodes
        w = weights[:, None] * weights
        return (w * f(u) * f(v)).sum((-2, -1)), (w * slope(u) * slope(v)).sum((-2, -1))

    return moments


def density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


gelu_moments = by_quadrature(
    lambda x: x * scipy.special.ndtr(x), lambda x: scipy.special.ndtr(x) + x * density(x)
)
sigmoid_moments = by_quadrature(
    lambda x: (scipy.special.erf(x / 2.4020563531719796) + 1) / 2,
    lambda x: np.exp(-((x / 2.4020563531719796) ** 2)) / np.sqrt(np.pi) / 2.4020563531719796,
)
tanh_moments = by_quadrature(np.tanh, lambda x: 1 - np.tanh(x) ** 2)
sin_moments = by_quadrature(np.sin, np.cos)
square_moments = by_quadrature(lambda x: x**2, lambda x: 2 * x)


def dense_kernels(
    x1: np.ndarray, x2: np.ndarray, moments: Callable[..., Any], hidden: int, w: float, b: float
) -> tuple[Kernel, Kernel]:
    """NNGP and NTK of `hidden` hidden layers in NTK parameterization, by their recursion."""

    def affine(k: Kernel) -> Kernel:
        return w**2 * k + b**2

    d = x1.shape[1]
    k12 = affine(x1 @ x2.T / d)
    k11, k22 = affine((x1**2).sum(1)[:, None] / d), affine((x2**2).sum(1)[None] / d)
    ntk = k12
    for _ in range(hidden):
        value, slope = moments(k12, k11, k22)
        k11, k22 = (affine(moments(k, k, k)[0]) for k in (k11, k22))
        k12 = affine(value)
        ntk = k12 + w**2 * ntk * slope
    return k12, ntk


ACTIVATIONS = {
    "relu": (stax.Relu, relu_moments, 1e-9),
    "erf": (stax.Erf, erf_moments, 1e-9),
    "abrelu": (partial(stax.ABRelu, 0.3, 1.2), abrelu_moments, 1e-9),
    "gelu": (stax.Gelu, gelu_moments, 1e-7),
    "sin": (stax.Sin, sin_moments, 1e-7),
    "sigmoid": (stax.Sigmoid_like, sigmoid_moments, 1e-4),
    "polynomial": (partial(stax.Monomial, 2), square_moments, 1e-9),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [1, 2])
def test_dense_kernels(name: str, hidden: int) -> None:
    activation, moments, tolerance = ACTIVATIONS[name]
    w, b = 1.2, 0.3
    layers = [stax.Dense(1, w, b), *([activation(), stax.Dense(1, w, b)] * hidden)]
    kernel_fn = compiled(stax.serial(*layers))
    x1, x2 = normal(1, 3, 7), normal(2, 4, 7)
    kernels = kernel_fn(x1, x2, get=("nngp", "ntk"))
    nngp, ntk = dense_kernels(np.asarray(x1), np.asarray(x2), moments, hidden, w, b)
    assert_allclose(kernels.nngp, nngp, rtol=tolerance)
    assert_allclose(kernels.ntk, ntk, rtol=tolerance)
    if name == "relu":
        assert_allclose(kernel_fn(x1, x2, get="nngp"), nngp, rtol=tolerance)
        assert_allclose(kernel_fn(x1, x2, get="ntk"), ntk, rtol=tolerance)
    rejects(kernels.ntk, dense_kernels(np.asarray(x1), np.asarray(x2), moments, hidden, 1.1, b)[1])
    rejects(kernels.ntk, kernels.nngp)


def test_numerical_activation() -> None:
    """`ElementwiseNumerical` (quadrature) and `Elementwise` (a function of the covariances)."""
    x1, x2 = normal(1, 3, 7), normal(2, 4, 7)
    expected = dense_kernels(np.asarray(x1), np.asarray(x2), tanh_moments, 1, 1.0, 0.0)
    with pytest.warns(UserWarning, match="Numerical Activation Layer|autodiff"):
        tanh = stax.ElementwiseNumerical(jnp.tanh, deg=40)
    kernels = compiled(stax.serial(stax.Dense(1), tanh, stax.Dense(1)))(x1, x2, get=("nngp", "ntk"))
    assert_allclose(kernels.nngp, expected[0], rtol=1e-3)
    assert_allclose(kernels.ntk, expected[1], rtol=1e-3)

    def squares(k12: jax.Array, k11: jax.Array, k22: jax.Array) -> jax.Array:
        return k11 * k22 + 2 * k12**2

    with pytest.warns(UserWarning, match="autodiff"):
        square = stax.Elementwise(lambda x: x**2, squares)
    kernels = compiled(stax.serial(stax.Dense(1), square, stax.Dense(1)))(
        x1, x2, get=("nngp", "ntk")
    )
    expected = dense_kernels(np.asarray(x1), np.asarray(x2), square_moments, 1, 1.0, 0.0)
    assert_allclose(kernels.nngp, expected[0], rtol=1e-9)
    assert_allclose(kernels.ntk, expected[1], rtol=1e-9)


def test_standard_parameterization() -> None:
    """NTK of Dense(20), ReLU, Dense: the weights are not scaled, so their widths appear."""
    width, w = 20, 1.3
    x1, x2 = np.asarray(normal(1, 3, 7)), np.asarray(normal(2, 4, 7))
    kernels = stax.serial(
        stax.Dense(width, w, parameterization="standard"),
        stax.Relu(),
        stax.Dense(1, w, parameterization="standard"),
    )[2](x1, x2, ("nngp", "ntk"))
    k12 = w**2 * x1 @ x2.T / 7
    k11, k22 = w**2 * (x1**2).sum(1)[:, None] / 7, w**2 * (x2**2).sum(1)[None] / 7
    value, slope = relu_moments(k12, k11, k22)
    assert_allclose(kernels.nngp, w**2 * value, rtol=1e-9)
    assert_allclose(kernels.ntk, width * value + w**2 * slope * (x1 @ x2.T), rtol=1e-9)


# Analytic kernels of convolutions and other layers on sequences: kernels [n, m, p, q]


def sequence_kernel(x1: np.ndarray, x2: np.ndarray) -> Kernel:
    return np.einsum("npc,mqc->nmpq", x1, x2) / x1.shape[-1]


def convolve(k: Kernel, padding: str) -> Kernel:
    """Mean of the kernel over a window of 3 that moves at both positions together."""
    if padding != "VALID":
        pads = [(0, 0), (0, 0), (1, 1), (1, 1)]
        k = np.pad(k, pads, mode="constant" if padding == "SAME" else "wrap")
    n = k.shape[-1] - 2
    return np.mean([k[..., o : o + n, o : o + n] for o in range(3)], axis=0)


def variances(k: Kernel, first: bool) -> Kernel:
    """Variances at each position, from a kernel of a batch with itself, for broadcasting."""
    diagonal = np.einsum("nnpp->np", k)
    return diagonal[:, None, :, None] if first else diagonal[None, :, None, :]


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
@pytest.mark.parametrize("readout", ["flatten", "pool"])
def test_convolution_kernels(padding: str, readout: str) -> None:
    w, b = 1.2, 0.2
    conv = stax.Conv(1, (3,), W_std=w, b_std=b, padding=padding)
    last = stax.Flatten() if readout == "flatten" else stax.GlobalAvgPool()
    kernel_fn = compiled(
        stax.serial(conv, stax.Relu(), conv, stax.Relu(), last, stax.Dense(1, w, b))
    )
    x1, x2 = np.asarray(normal(1, 2, 7, 4)), np.asarray(normal(2, 3, 7, 4))
    ks = [sequence_kernel(*pair) for pair in ((x1, x2), (x1, x1), (x2, x2))]
    ntk = np.zeros_like(ks[0])
    for _ in range(2):
        ks = [w**2 * convolve(k, padding) + b**2 for k in ks]
        ntk = w**2 * convolve(ntk, padding) + ks[0]
        v1, v2 = variances(ks[1], True), variances(ks[2], False)
        value, slope = relu_moments(ks[0], v1, v2)
        ks = [
            value,
            relu_moments(ks[1], v1, variances(ks[1], False))[0],
            relu_moments(ks[2], variances(ks[2], True), v2)[0],
        ]
        ntk = ntk * slope

    def read(k: Kernel) -> Kernel:
        if readout == "flatten":
            return w**2 * np.einsum("nmpp->nm", k) / k.shape[-1]
        return w**2 * k.mean((2, 3))

    nngp = read(ks[0]) + b**2
    kernels = kernel_fn(x1, x2, get=("nngp", "ntk"))
    assert_allclose(kernels.nngp, nngp, rtol=1e-9)
    assert_allclose(kernels.ntk, nngp + read(ntk), rtol=1e-9)
    rejects(kernels.nngp, read(ks[0] * 3) + b**2)


LINEAR = {
    "average pool": partial(stax.AvgPool, (2,), (2,)),
    "average pool, same": partial(stax.AvgPool, (3,), (1,), "SAME"),
    "average pool, circular": partial(stax.AvgPool, (3,), (1,), "CIRCULAR"),
    "sum pool": partial(stax.SumPool, (3,), (1,)),
    "global average pool": stax.GlobalAvgPool,
    "global sum pool": stax.GlobalSumPool,
    "resize": partial(stax.ImageResize, (-1, 4, -1), "linear"),
    "slice": partial(stax.Index, stax.Slice[:, 1::2]),
    "dot": partial(
        stax.DotGeneral,
        rhs=np.array([1, -2, 3, 0, 1, -1]),
        dimension_numbers=(((1,), (0,)), ((), ())),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name: str) -> None:
    """The kernel of a linear layer is A k A', with A read off from what it does to unit inputs."""
    layer = LINEAR[name]()
    x1, x2 = np.asarray(normal(1, 2, 6, 4)), np.asarray(normal(2, 3, 6, 4))
    matrix = np.asarray(layer[1]((), jnp.eye(6)[:, :, None])).reshape(6, -1).T
    if name == "average pool":
        assert_allclose(matrix, np.kron(np.eye(3), [0.5, 0.5]))
    k = np.einsum("ap,nmpq,bq->nmab", matrix, sequence_kernel(x1, x2), matrix)
    nngp = np.asarray(compiled(stax.serial(stax.Identity(), layer))(x1, x2, get="nngp"))
    if k[0, 0].size > 1 and nngp.ndim == 3:  # only each position with itself
        k = np.einsum("nmpp->nmp", k)
    assert_allclose(nngp.reshape(k.shape), k, rtol=1e-9, atol=1e-12)
    rejects(nngp.reshape(k.shape), k / 2)


@pytest.mark.parametrize("implementation", ["DENSE", "SPARSE"])
def test_aggregate(implementation: str) -> None:
    """Sums over the edges of a graph of its own for each example."""
    edges = [np.random.default_rng(n).integers(0, 6, (n, 9, 2)) for n in (2, 3)]
    dense = []
    for pattern in edges:
        matrix = np.zeros((len(pattern), 6, 6))
        for example, pairs in zip(matrix, pattern, strict=True):
            np.add.at(example, tuple(pairs.T), 1)
        dense.append(matrix)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Negative indices")
        layer = stax.Aggregate(aggregate_axis=1, implementation=implementation)
    kernel_fn = stax.serial(layer, stax.GlobalSumPool())[2]
    x1, x2 = np.asarray(normal(1, 2, 6, 4)), np.asarray(normal(2, 3, 6, 4))
    pattern = tuple(map(jnp.asarray, edges if implementation == "SPARSE" else dense))
    nngp = jax.jit(lambda p: kernel_fn(x1, x2, "nngp", pattern=p))(pattern)
    s1, s2 = (np.einsum("npc,npq->nc", x, d) for x, d in zip((x1, x2), dense, strict=True))
    assert_allclose(nngp, s1 @ s2.T / 4, rtol=1e-9)


def test_branches_normalization_and_dropout() -> None:
    x1, x2 = np.asarray(normal(1, 3, 7)), np.asarray(normal(2, 4, 7))
    # A residual block: the kernels of its branches add up.
    block = stax.serial(
        stax.FanOut(2),
        stax.parallel(
            stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1)), stax.serial(stax.Dense(1))
        ),
        stax.FanInSum(),
    )
    with pytest.warns(UserWarning, match="assume independent inputs"):
        kernels = block[2](x1, x2, ("nngp", "ntk"))
    nngp, ntk = dense_kernels(x1, x2, relu_moments, 1, 1.0, 0.0)
    assert_allclose(kernels.nngp, nngp + x1 @ x2.T / 7, rtol=1e-9)
    assert_allclose(kernels.ntk, ntk + x1 @ x2.T / 7, rtol=1e-9)
    # Three equal layers.
    repeated = stax.repeat(stax.serial(stax.Dense(7), stax.Relu()), 3)
    assert_allclose(
        stax.serial(repeated, stax.Dense(1))[2](x1, x2, "ntk"),
        dense_kernels(x1, x2, relu_moments, 3, 1.0, 0.0)[1],
        rtol=1e-9,
    )
    # Layer normalization makes covariances correlations.
    normed = stax.serial(stax.Dense(1, 3.0), stax.LayerNorm(eps=0.0))[2](x1, x2, "nngp")
    norms = np.linalg.norm(x1, axis=1)[:, None] * np.linalg.norm(x2, axis=1)
    assert_allclose(normed, x1 @ x2.T / norms, rtol=1e-9)
    # Dropout keeping 70 % divides an example's own variance by 0.7, nothing else.
    dropout = stax.serial(stax.Dense(1), stax.Dropout(0.7))[2](x1, None, "nngp")
    expected = x1 @ x1.T / 7 * np.where(np.eye(3), 1 / 0.7, 1)
    assert_allclose(dropout, expected, rtol=1e-9)


def test_attention_kernel() -> None:
    """Linear scaling: softmax of the input kernel mixes positions on both sides."""
    attention = stax.GlobalSelfAttention(
        n_chan_out=1,
        n_chan_key=1,
        n_chan_val=1,
        n_heads=1,
        linear_scaling=True,
        W_key_std=1.1,
        W_value_std=1.2,
        W_query_std=1.3,
        W_out_std=1.4,
        b_std=None,
    )
    x1, x2 = np.asarray(normal(1, 2, 5, 4)), np.asarray(normal(2, 3, 5, 4))
    with pytest.warns(UserWarning, match="Linear scaling attention"):
        nngp = stax.serial(attention, stax.GlobalAvgPool())[2](x1, x2, "nngp")
    a1, a2 = (
        scipy.special.softmax(1.1 * 1.3 * np.einsum("nnpq->npq", sequence_kernel(x, x)), axis=-1)
        for x in (x1, x2)
    )
    k = np.einsum("npa,nmab,mqb->nmpq", a1, sequence_kernel(x1, x2), a2)
    assert_allclose(nngp, (1.2 * 1.4) ** 2 * k.mean((2, 3)), rtol=1e-9)


def test_masked_positions_do_not_count() -> None:
    kernel_fn = compiled(
        stax.serial(stax.Dense(1), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1))
    )
    x1, x2 = np.array(normal(1, 2, 6, 4)), np.array(normal(2, 3, 6, 4))
    short = kernel_fn(x1[:, :4], x2, get="ntk")
    x1[:, 4:] = 1e3
    assert_allclose(kernel_fn(x1, x2, get="ntk", mask_constant=1e3), short, rtol=1e-9)
    rejects(kernel_fn(x1, x2, get="ntk"), short)


# Monte Carlo


@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_monte_carlo(get: str) -> None:
    """With one hidden layer, the mean over initialisations is the analytic kernel."""
    init_fn, apply_fn, kernel_fn = stax.serial(
        stax.Dense(32, 1.2, 0.1), stax.Relu(), stax.Dense(4, 1.2, 0.1)
    )
    x, n = normal(1, 2, 7), 40
    key = jax.random.PRNGKey(3)
    apply_fn, init_fn = jax.jit(apply_fn), jax.jit(init_fn, static_argnums=1)
    running = monte_carlo_kernel_fn(init_fn, apply_fn, key, range(1, n + 1))(x, None, get)
    sums = np.stack([i * np.asarray(mean) for i, mean in enumerate(running, 1)])
    samples = np.diff(sums, axis=0, prepend=0)
    error = samples.std(0, ddof=1) / np.sqrt(n)
    exact = np.asarray(kernel_fn(x, None, get))
    assert np.all(np.abs(samples.mean(0) - exact) < 5 * error)
    assert np.any(np.abs(samples.mean(0) - 2 * exact) > 5 * error)
    once = monte_carlo_kernel_fn(init_fn, apply_fn, key, 5)(x, None, get)
    assert_allclose(once, sums[4] / 5, rtol=1e-10)


# Predictions


N, M, OUTPUTS = 5, 4, 2


def regression() -> tuple[np.ndarray, ...]:
    """Kernels train-train and test-train, targets, and outputs at time 0 of train and test."""
    a, b = np.asarray(normal(1, N, 6)), np.asarray(normal(2, M, 6))
    y, f0, g0 = (np.asarray(normal(i, n, OUTPUTS)) for i, n in ((3, N), (4, N), (5, M)))
    return a @ a.T + 0.1 * np.eye(N), b @ a.T, y, f0, g0


@pytest.mark.parametrize("t", [0.0, 1.7, 40.0, np.inf, None])
def test_mse_in_closed_form(t: float | None) -> None:
    k, kd, y, f0, g0 = regression()
    rate = 0.4
    predict_fn = predict.gradient_descent_mse(k, y, learning_rate=rate)

    def expected(speed: float) -> tuple[np.ndarray, np.ndarray]:
        time = np.inf if t is None else t
        decay = scipy.linalg.expm(-speed * time * k) if np.isfinite(time) else np.zeros_like(k)
        left = decay @ (f0 - y)
        return y + left, g0 + kd @ np.linalg.solve(k, left - (f0 - y))

    f, g = predict_fn(t, f0, g0, kd)
    train, test = expected(rate / y.size)
    assert_allclose(f, train, rtol=1e-8, atol=1e-10)
    assert_allclose(g, test, rtol=1e-8, atol=1e-10)
    assert_allclose(predict_fn(t, f0), train, rtol=1e-8, atol=1e-10)
    if t in (1.7, 40.0):
        rejects(g, expected(rate)[1])
        jitted = jax.jit(predict_fn)(t, f0, g0, kd)
        assert_allclose(jitted[1], test, rtol=1e-8, atol=1e-10)


def test_mse_at_several_times_and_for_a_full_kernel() -> None:
    """A kernel over outputs too (`trace_axes=()`), and times in an array."""
    _, _, y, f0, g0 = regression()
    root, other = (np.asarray(normal(i, n * OUTPUTS, 12)) for i, n in ((6, N), (7, M)))
    k, kd = root @ root.T, other @ root.T

    def full(matrix: np.ndarray, n: int) -> np.ndarray:
        return matrix.reshape(n, OUTPUTS, N, OUTPUTS).transpose(0, 2, 1, 3)

    times = np.array([0.0, 0.5, 3.0])
    predict_fn = predict.gradient_descent_mse(full(k, N), y, trace_axes=())
    f, g = predict_fn(times, f0, g0, full(kd, M))
    for t, ft, gt in zip(times, f, g, strict=True):
        left = scipy.linalg.expm(-t * k / y.size) @ (f0 - y).ravel()
        assert_allclose(ft.ravel(), y.ravel() + left, rtol=1e-8, atol=1e-10)
        moved = kd @ np.linalg.solve(k, left - (f0 - y).ravel())
        assert_allclose(gt.ravel(), g0.ravel() + moved, rtol=1e-7, atol=1e-9)


def test_mse_with_ridge() -> None:
    k, kd, y, f0, g0 = regression()
    for absolute, ridge in ((True, 0.1), (False, 0.1 * np.trace(k) / N)):
        predict_fn = predict.gradient_descent_mse(
            k, y, diag_reg=0.1, diag_reg_absolute_scale=absolute
        )
        g = predict_fn(None, f0, g0, kd)[1]
        assert_allclose(g, g0 + kd @ np.linalg.solve(k + ridge * np.eye(N), y - f0), rtol=1e-9)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_generic_loss(momentum: float | None) -> None:
    """Cross-entropy, against SciPy's integration of the same flow with its gradient by hand."""
    k, kd, y, f0, g0 = regression()
    y = scipy.special.softmax(y, axis=1)
    rate = 0.3

    def loss(f: jax.Array, targets: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(f) * targets)

    both = np.concatenate([k, kd])

    def flow(_: float, state: np.ndarray) -> np.ndarray:
        f, speed = state.reshape(2, N + M, OUTPUTS)
        force = -both @ ((scipy.special.softmax(f[:N], axis=1) - y) / y.size)
        if momentum is None:
            return np.stack([force, np.zeros_like(f)]).ravel()
        return np.stack([speed, force - (1 - momentum) / np.sqrt(rate) * speed]).ravel()

    times = np.array([0.0, 1.0, 12.0])
    start = np.stack([np.concatenate([f0, g0]), np.zeros((N + M, OUTPUTS))]).ravel()
    scaled = times * (rate if momentum is None else np.sqrt(rate))
    solution = scipy.integrate.solve_ivp(
        flow, (0, scaled[-1]), start, "DOP853", scaled, rtol=1e-11, atol=1e-12
    ).y.T.reshape(3, 2, N + M, OUTPUTS)[:, 0]
    predict_fn = predict.gradient_descent(loss, k, y, learning_rate=rate, momentum=momentum)
    f, g = jax.jit(predict_fn)(times, f0, g0, kd)
    assert_allclose(f, solution[:, :N], rtol=1e-6, atol=1e-7)
    assert_allclose(g, solution[:, N:], rtol=1e-6, atol=1e-7)
    rejects(f[2], solution[1, :N])


def test_mse_ensemble() -> None:
    """Means by kernel regression; covariances of an infinite ensemble after training."""
    kernel_fn = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))[2]
    x, xt, y = np.asarray(normal(1, N, 6)), np.asarray(normal(2, M, 6)), normal(3, N, OUTPUTS)
    moments = (relu_moments, 1, 1.0, 0.0)
    (n_dd, t_dd), (n_td, t_td), (n_tt, _) = (
        dense_kernels(a, b, *moments) for a, b in ((x, x), (xt, x), (xt, xt))
    )
    predict_fn = predict.gradient_descent_mse_ensemble(kernel_fn, x, y)
    out = predict_fn(None, xt, ("nngp", "ntk"), compute_cov=True)
    assert_allclose(out.nngp.mean, n_td @ np.linalg.solve(n_dd, y), rtol=1e-6)
    assert_allclose(out.ntk.mean, t_td @ np.linalg.solve(t_dd, y), rtol=1e-6)
    assert_allclose(
        out.nngp.covariance, n_tt - n_td @ np.linalg.solve(n_dd, n_td.T), rtol=1e-6, atol=1e-9
    )
    w = np.linalg.solve(t_dd, t_td.T)
    covariance = n_tt + w.T @ n_dd @ w - n_td @ w - (n_td @ w).T
    assert_allclose(out.ntk.covariance, covariance, rtol=1e-6, atol=1e-9)
    rejects(out.ntk.mean, n_td @ np.linalg.solve(n_dd, y))
    # At a finite time, the mean follows the flow from a mean output of zero.
    left = scipy.linalg.expm(-2.0 * t_dd / y.size) @ -np.asarray(y)
    finite = predict_fn(2.0, xt, "ntk")
    assert_allclose(finite, t_td @ np.linalg.solve(t_dd, left + y), rtol=1e-6, atol=1e-9)


def test_inference_and_learning_rate() -> None:
    k, kd, y, _, _ = regression()
    mean = predict.gp_inference(k, y, diag_reg=1e-3)("ntk", kd)
    ridge = 1e-3 * np.trace(k) / N * np.eye(N)
    assert_allclose(mean, kd @ np.linalg.solve(k + ridge, y), rtol=1e-9)
    # Gradient descent on the mean loss is stable up to 2 / (largest eigenvalue / size).
    rate = predict.max_learning_rate(jnp.asarray(k), y.size)
    assert_allclose(rate, 2 * y.size / np.linalg.eigvalsh(k)[-1], rtol=1e-9)


# Batching


def test_batch() -> None:
    layers = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))
    x1, x2 = normal(1, 8, 5), normal(2, 12, 5)
    sizes = []

    def spy(a: jax.Array, b: jax.Array | None, get: Any) -> Any:
        sizes.append((len(a), len(a if b is None else b)))
        return layers[2](a, b, get)

    kernels = batch(spy, batch_size=4, device_count=0)(x1, x2, ("nngp", "ntk"))
    unbatched = compiled(layers)(x1, x2, get=("nngp", "ntk"))
    assert_allclose(kernels.nngp, unbatched.nngp, rtol=1e-9)
    assert_allclose(kernels.ntk, unbatched.ntk, rtol=1e-9)
    _, ntk = dense_kernels(np.asarray(x1), np.asarray(x2), relu_moments, 1, 1.0, 0.0)
    assert_allclose(kernels.ntk, ntk, rtol=1e-9)
    rejects(kernels.ntk, np.roll(ntk, 4, axis=1))
    on_host = batch(spy, 4, store_on_device=False)(x1, None, "ntk")
    assert_allclose(on_host, compiled(layers)(x1, None, get="ntk"), rtol=1e-7)
    assert set(sizes) == {(4, 4)}


def test_batch_of_an_empirical_kernel() -> None:
    x1, x2, params = normal(1, 8, 5), normal(2, 4, 5), mlp_params()
    ntk = batch(empirical_ntk_fn(mlp, vmap_axes=0), batch_size=2, device_count=0)(x1, x2, params)
    assert_allclose(ntk, np.einsum("iap,jap->ij", jacobian(1, 8), jacobian(2, 4)) / 3, rtol=1e-9)


# Linearization


def test_linearize_and_taylor_expand() -> None:
    """Against the Jacobian and the Hessian as arrays, over all parameters in one vector."""
    x, params = normal(1, 3, 5), mlp_params()
    flat, unravel = ravel_pytree(params)
    step = 0.1 * normal(9, flat.size)

    def f(p: jax.Array) -> jax.Array:
        return mlp(unravel(p), x)

    value, first = jax.jit(f)(flat), jax.jit(jax.jacobian(f))(flat) @ step
    second = jax.jit(jax.hessian(f))(flat) @ step @ step
    moved = unravel(flat + step)
    assert_allclose(jax.jit(linearize(mlp, params))(moved, x), value + first, rtol=1e-10)
    expansions = [jax.jit(taylor_expand(mlp, params, degree))(moved, x) for degree in range(4)]
    assert_allclose(expansions[0], value, rtol=1e-12)
    assert_allclose(expansions[1], value + first, rtol=1e-10)
    assert_allclose(expansions[2], value + first + second / 2, rtol=1e-10)
    rejects(expansions[2], value + first + second)
    exact = jax.jit(f)(flat + step)
    errors = [np.abs(e - exact).max() for e in expansions]
    assert errors[3] < 0.5 * errors[2] < 0.1 * errors[0]


# The import


def test_single_precision_stays() -> None:
    with jax.enable_x64(False):
        x = normal(1, 3, 7)
        kernels = compiled(stax.serial(stax.Dense(1), stax.Erf(), stax.Dense(1)))(
            x, None, get=("nngp", "ntk")
        )
        assert kernels.ntk.dtype == kernels.nngp.dtype == jnp.float32
        exact = dense_kernels(np.asarray(x), np.asarray(x), erf_moments, 1, 1.0, 0.0)[1]
        assert_allclose(kernels.ntk, exact, rtol=1e-4, atol=1e-5)


def test_no_experimental_part() -> None:
    with pytest.raises(AttributeError, match="needs TensorFlow"):
        compat.neural_tangents.experimental.empirical_ntk_fn_tf  # noqa: B018
    assert set(compat.__all__) <= set(dir(compat))


def run_python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh interpreter that takes warnings for errors."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [environment.pop("first", ""), root]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_leaves_no_trace(tmp_path: Path) -> None:
    """An installed TensorFlow is not touched, nor JAX's settings, names or warnings."""
    for name in ("tensorflow", "tf2jax"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    code = """
        import sys, warnings
        import jax, jax.numpy as jnp, jax.core, jax.interpreters.ad, jax.extend.core
        import ntk_awt.kernels

        def state():
            modules = (jax.core, jax.interpreters.ad, jax.extend.core)
            return (
                [sorted(vars(m)) for m in modules],
                dict(jax.config.values),
                jnp.ones(2).dtype,
                sorted(k for k in sys.modules if k.startswith(("jax.util", "tensorflow", "tf2"))),
                list(warnings.filters),
                list(sys.meta_path),
            )

        state()
        before = state()
        import ntk_awt.kernels.compat
        after = state()
        for old, new in zip(before, after):
            assert old == new, (old, new)
        assert before[2] == jnp.float32
        assert not hasattr(jax, "util")
        assert "neural_tangents.experimental" not in sys.modules
        assert not any(k.split(".")[0] in ("tensorflow", "tf2jax") for k in sys.modules)
        import importlib.util
        assert importlib.util.find_spec("tensorflow") is not None
    """
    assert run_python(code, first=str(tmp_path)) == ""


def test_unknown_jax_gives_one_line() -> None:
    code = """
        import sys
        import ntk_awt.kernels
        import jax.extend.core, jax.interpreters.ad

        def fails(module, name):
            kept = getattr(module, name)
            delattr(module, name)
            try:
                import ntk_awt.kernels.compat
            except ImportError as error:
                assert type(error) is ImportError
                assert not [k for k in sys.modules if k.startswith("neural_tangents")]
                print(error)
            else:
                raise SystemExit("imported")
            setattr(module, name, kept)

        fails(jax.extend.core, "Jaxpr")
        fails(jax.interpreters.ad, "Zero")
        from ntk_awt.kernels.compat import stax
        stax.Relu()
    """
    lines = run_python(code).splitlines()
    assert len(lines) == 2
    versions = rf"jax {jax.__version__}, jaxlib \S+, Python {sys.version.split()[0]}: "
    for line, name in zip(lines, ("Jaxpr", "Zero"), strict=True):
        assert line.startswith("neural-tangents 0.6.5 cannot be used with jax")
        assert re.search(versions, line)
        assert f"'{name}'" in line
        assert line.endswith("(works with JAX 0.10 and 0.11)")
