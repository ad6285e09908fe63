"""Empirical kernels against a float64 loop over single gradients, and the metrics against NumPy."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels, masks, models
from ntk_awt.config import ModelConfig
from ntk_awt.errors import InputError

IMAGE = (8, 8, 1)


empirical = jax.jit(kernels.empirical, static_argnames=("apply", "jacobian", "engine"))


@cache
def single_gradient(apply):
    """∂f_c(x)/∂θ of one image and one output, compiled once for each network."""
    return jax.jit(jax.grad(lambda w, image, c: apply(w, image[None])[0, c]))


def loop_kernel(apply, params, x1, x2, columns):
    """Θ by the definition: one gradient for each image and output, in float64, then dot products.

    `columns` (a pytree like the parameters) multiplies the Jacobian's columns: 1 for a dense
    network, γ⊙m for a masked one whose effective weights are `params`.
    """
    gradient = single_gradient(apply)
    classes = jax.eval_shape(apply, params, x1).shape[1]

    def row(image, c):
        pairs = zip(*map(jax.tree.leaves, (gradient(params, image, c), columns)), strict=True)
        return np.concatenate([np.ravel(a * b) for a, b in pairs])

    def jacobian(x):
        return np.array([[row(image, c) for c in range(classes)] for image in x])

    return np.einsum("iap,jbp->ijab", jacobian(x1), jacobian(x2))


def network(activation="relu", name="mlp", parametrization="ntk"):
    config = ModelConfig(
        name=name, widths=(7, 5), activation=activation, parametrization=parametrization
    )
    return models.build(config, IMAGE, 3, jax.random.key(1))


def small_cnn():
    """One convolution, pooling, one dense layer, three logits."""
    from flax import nnx

    config = ModelConfig(activation="gelu", parametrization="standard")
    return models.from_module(
        models.Classifier(IMAGE, 3, config, blocks=((4,),), hidden=(), rngs=nnx.Rngs(3))
    )


NETWORKS = {
    "mlp-relu": network,
    "mlp-erf-standard": lambda: network("erf", parametrization="standard"),
    "mlp-tanh": lambda: network("tanh"),
    "cnn-gelu": small_cnn,
}


def images(seed, n):
    return jax.random.uniform(jax.random.key(seed), (n, *IMAGE))


def sparse(params, density=0.3):
    mask = masks.make(masks.random_scores(jax.random.key(5), params), density, "erk")
    return mask, masks.energy_gain(params, mask)


def doubled(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def reference(net, x1, x2, mask=None, gain=None, jacobian="masked"):
    """`loop_kernel` with everything cast to float64 first."""
    with jax.enable_x64(True):
        params = doubled(net.params)
        columns = jax.tree.map(np.ones_like, params)
        if mask is not None:
            factor = jax.tree.map(lambda m, g: np.asarray(m) * np.float64(g), mask, gain)
            params = jax.tree.map(np.multiply, params, factor)
            columns = factor if jacobian == "masked" else columns
        params = jax.tree.map(jnp.asarray, params)
        x1, x2 = (jnp.asarray(doubled(x)) for x in (x1, x2))
        return loop_kernel(net.apply, params, x1, x2, columns)


def agree(kernel, expected):
    """Equal up to float32 rounding: each entry is a sum of P products, so ~√P·2⁻²⁴ of its scale."""
    return np.abs(np.asarray(kernel) - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("engine", ["products", "contraction"])
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_and_masked_agree_with_the_loop(name, engine):
    net = NETWORKS[name]()
    x1, x2 = images(0, 3), images(1, 2)
    mask, gain = sparse(net.params)
    dense = empirical(net.apply, net.params, x1, x2, engine=engine)
    assert dense.shape == (3, 2, 3, 3)
    assert dense.dtype == jnp.float32
    assert agree(dense, reference(net, x1, x2))
    masked = empirical(net.apply, net.params, x1, x2, mask=mask, gain=gain, engine=engine)
    assert agree(masked, reference(net, x1, x2, mask, gain))


@pytest.mark.parametrize("jacobian", ["masked", "full"])
def test_the_two_jacobians_are_told_apart(jacobian):
    net, x = network(), images(0, 3)
    mask, gain = sparse(net.params)
    kernel = empirical(net.apply, net.params, x, mask=mask, gain=gain, jacobian=jacobian)
    other = {"masked": "full", "full": "masked"}[jacobian]
    assert agree(kernel, reference(net, x, x, mask, gain, jacobian))
    assert not agree(kernel, reference(net, x, x, mask, gain, other))


def test_a_mask_without_gain_has_gain_one():
    net, x = network(), images(0, 2)
    mask, _ = sparse(net.params)
    kernel = empirical(net.apply, net.params, x, mask=mask)
    ones = masks.unit_gain(net.params)
    assert agree(kernel, reference(net, x, x, mask, ones))


def test_axes_are_images_then_outputs():
    """f(x) = (w·x₀, 2v·x₁): the kernel is diagonal in the outputs, with known entries."""

    def apply(params, x):
        return jnp.stack([params["w"] * x[:, 0], 2 * params["v"] * x[:, 1]], -1)

    params = {"w": jnp.array(3.0), "v": jnp.array(5.0)}
    x1, x2 = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[5.0, 7.0]])
    kernel = empirical(apply, params, x1, x2)
    expected = np.zeros((2, 1, 2, 2))
    expected[:, 0, 0, 0] = [1 * 5, 3 * 5]
    expected[:, 0, 1, 1] = [4 * 2 * 7, 4 * 4 * 7]
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)


def test_symmetric_positive_and_independent_of_the_batch():
    net, x = network(), images(0, 5)
    kernel = np.asarray(empirical(net.apply, net.params, x))
    np.testing.assert_allclose(kernel, kernel.transpose(1, 0, 3, 2), rtol=1e-5, atol=1e-4)
    flat = kernel.transpose(0, 2, 1, 3).reshape(15, 15)
    assert np.linalg.eigvalsh(flat).min() > -1e-4 * np.linalg.eigvalsh(flat).max()
    part = empirical(net.apply, net.params, x[1:3], x[4:])
    np.testing.assert_allclose(part, kernel[1:3, 4:], rtol=1e-5, atol=1e-4)


def test_jit_and_gradient_agree_with_finite_differences():
    """d/dθ of a scalar of the masked kernel, against central differences in float64."""
    net, x = network("erf"), images(0, 2)
    mask, gain = sparse(net.params)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, doubled(net.params))
        gain = jax.tree.map(jnp.asarray, doubled(gain))
        x = jnp.asarray(doubled(x))

        @jax.jit
        def scalar(params):
            return jnp.sum(empirical(net.apply, params, x, mask=mask, gain=gain) ** 2)

        gradient = jax.grad(scalar)(params)
        keys = jax.random.split(jax.random.key(2), 3)
        for key in keys:
            leaves, structure = jax.tree.flatten(params)
            noise = [
                jax.random.normal(k, w.shape)
                for k, w in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
            ]
            direction = structure.unflatten(noise)
            step = 1e-5
            ends = [
                scalar(jax.tree.map(lambda w, d, s=s: w + s * d, params, direction))
                for s in (step, -step)
            ]
            slope = sum(
                jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), noise, strict=True)
            )
            assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-6)
        pruned = jax.tree.map(lambda g, m: np.abs(g * ~m).max(), gradient, mask)
        assert max(jax.tree.leaves(pruned)) == 0


def test_bad_input_names_the_leaf():
    net, x = network(), images(0, 2)
    mask, gain = sparse(net.params)
    broken = {**mask, "dense2": {**mask["dense2"], "kernel": mask["dense2"]["kernel"][:2]}}
    with pytest.raises(InputError, match="mask dense2/kernel: expected shape"):
        kernels.empirical(net.apply, net.params, x, mask=broken, gain=gain)
    partial = {**gain, "dense1": {"kernel": gain["dense1"]["kernel"]}}
    with pytest.raises(InputError, match="gain dense1/bias: expected a leaf"):
        kernels.empirical(net.apply, net.params, x, mask=mask, gain=partial)
    with pytest.raises(InputError, match="expected a mask"):
        kernels.empirical(net.apply, net.params, x, gain=gain)
    with pytest.raises(InputError, match="x2"):
        kernels.empirical(net.apply, net.params, x, jnp.zeros((2, 4, 4, 1)))
    with pytest.raises(InputError, match="did you mean 'full'"):
        kernels.empirical(net.apply, net.params, x, jacobian="ful")
    with pytest.raises(InputError, match="contraction, products"):
        kernels.empirical(net.apply, net.params, x, engine="magic")


def test_metrics_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 6, 3, 3)).astype(np.float32)
    difference = np.sqrt(((a.astype(float) - b) ** 2).sum())
    size = np.sqrt((a.astype(float) ** 2).sum())
    assert float(kernels.kernel_distance(a, b)) == pytest.approx(difference / np.sqrt(24), rel=1e-5)
    expected = pytest.approx((difference / size) ** 2, rel=1e-5)
    assert float(kernels.relative_kernel_distance(a, b)) == expected
    f, g = a[0, :, 0], b[0, :, 0]
    gap = np.sqrt(((f.astype(float) - g) ** 2).sum())
    assert float(kernels.target_distance(f, g)) == pytest.approx(gap / np.sqrt(6), rel=1e-5)
    expected = pytest.approx((gap / np.linalg.norm(f)) ** 2, rel=1e-5)
    assert float(kernels.relative_target_distance(f, g)) == expected
    assert float(kernels.kernel_distance(a, a)) == 0
    assert float(kernels.relative_kernel_distance(a, np.zeros_like(a))) == pytest.approx(1)
