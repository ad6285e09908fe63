"""Empirical kernels against a float64 loop over single gradients and neural-tangents; metrics."""

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_awt import kernels, masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError
from ntk_awt.kernels.engine.engines import ENGINES
from ntk_awt.network import Network
from tests.quick import quick

SLOW = (
    "test_engines_agree_with_the_loop mlp-erf*",
    "test_engines_agree_with_the_loop mlp-tanh-[cp]*",
    "test_engines_agree_with_the_loop residual-[cp]*",
    "test_derivatives_agree_with_finite_differences layerwise-packed",
    "test_forms_agree_with_the_loop *-diagonal",
    "test_forms_agree_with_the_loop *-1",
    "test_derivatives_agree_with_finite_differences layerwise-chunks",
    "test_derivatives_agree_with_finite_differences layerwise-kept",
    "test_derivatives_agree_with_finite_differences contraction",
    "test_everything_traced *-real",
    "test_neural_tangents_agrees cnn*",
    "test_a_batch_of_parameters",
    "test_computing_in_a_smaller_type [cp]*",
    "test_derivatives_agree_with_finite_differences layerwise-soft",
    "test_other_engines_in_all_settings contraction-*",
    "test_derivatives_agree_with_finite_differences products",
)

IMAGE = (8, 8, 1)

# ---------------------------------------------------------------- the reference


@cache
def single_gradient(apply):
    """∂f_c(x)/∂θ of one image and one output, compiled once for each network."""
    return quick(jax.grad(lambda w, image, c: apply(w, image[None])[0, c]))


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

    left = jacobian(x1)
    return np.einsum("iap,jbp->ijab", left, left if x2 is x1 else jacobian(x2))


def doubled(tree):
    """Floating leaves in float64; others as they are."""

    def double(a):
        a = np.asarray(a)
        return a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(double, tree)


def reference(net, x1, x2=None, mask=None, gain=None, jacobian="masked", at=None):
    """`loop_kernel` with everything cast to float64 first."""
    with jax.enable_x64(True):
        params = doubled(net.params)
        columns = jax.tree.map(np.ones_like, params)
        if mask is not None:
            gain = jax.tree.map(lambda _: 1.0, params) if gain is None else gain
            factor = jax.tree.map(
                lambda w, m, g: np.ones_like(w) * np.asarray(m) * np.float64(g), params, mask, gain
            )
            params = jax.tree.map(np.multiply, params, factor)
            columns = factor if jacobian == "masked" else columns
        params = jax.tree.map(jnp.asarray, params if at is None else doubled(at))
        x1 = jnp.asarray(doubled(x1))
        x2 = x1 if x2 is None else jnp.asarray(doubled(x2))
        return loop_kernel(net.apply, params, x1, x2, columns)


def pick(full, outputs):
    """What `outputs` stands for, of all pairs [n, m, q, r]."""
    diagonal = np.einsum("nmqq->nmq", full)
    if isinstance(outputs, int):
        return diagonal[..., outputs]
    return {"full": full, "diagonal": diagonal, "trace": diagonal.mean(-1)}[outputs]


def agree(kernel, expected, limit=2e-5):
    """Equal up to float32 rounding: each entry is a sum of P products, so ~√P·2⁻²⁴ of its scale."""
    assert kernel.shape == expected.shape
    return np.abs(np.asarray(kernel) - expected).max() <= limit * np.abs(expected).max()


# ---------------------------------------------------------------- networks


def mlp(activation="relu", parametrization="ntk"):
    config = ModelConfig(widths=(7, 5), activation=activation, parametrization=parametrization)
    return models.build(config, IMAGE, 3, jax.random.key(1))


def cnn():
    """One convolution, pooling, one dense layer, three logits."""
    config = ModelConfig(activation="gelu", parametrization="standard")
    return Network.from_nnx(
        models.Classifier(IMAGE, 3, config, blocks=((4,),), hidden=(), rngs=nnx.Rngs(3))
    )


class Residual(nnx.Module):
    """All that such networks are made of: a strided, dilated block beside a 1×1 convolution."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 2, (3, 3), padding="VALID", rngs=rngs)
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, kernel_dilation=2, rngs=rngs)
        self.group = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.skip = nnx.Conv(2, 4, (1, 1), strides=2, use_bias=False, rngs=rngs)
        self.layer = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.stem(x))
        x = self.skip(x) + jax.nn.relu(self.group(self.conv(x)))
        return self.head(self.layer(x.mean((1, 2))))


def residual():
    net = Network.from_nnx(Residual(nnx.Rngs(0)))
    # Scales and biases at their initial 1 and 0 would hide what multiplies them.
    return net.replace(params=noisy(net.params, 7))


BUILDERS = {
    "mlp-relu": (mlp, ("boolean", "real")),
    "mlp-erf-standard": (lambda: mlp("erf", "standard"), ("dense",)),
    "mlp-tanh": (lambda: mlp("tanh"), ("boolean",)),
    "cnn-gelu": (cnn, ("dense", "boolean")),
    "residual": (residual, ("dense", "boolean")),
}
"""Networks, and the kinds of mask that they are tried with."""


@cache
def network(name="mlp-relu"):
    return BUILDERS[name][0]()


def positions(params, x):
    """Five positions, then one, with scales around each bias: x [n, 5, 2] → logits [n, 3]."""
    conv, head = params["conv"], params["head"]
    y = jax.lax.conv_general_dilated(
        x, conv["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    h = jax.nn.gelu(1.5 * y + 0.5 * conv["bias"]).reshape(len(x), -1)
    return h @ (-0.7 * head["kernel"]) + 2.0 * head["bias"]


@cache
def small():
    """`positions`: one convolution and one dense layer."""
    shapes = {"conv": (3, 2, 4), "head": (20, 3)}
    keys = iter(jax.random.split(jax.random.key(2), 4))
    params = {
        name: {
            "kernel": 0.5 * jax.random.normal(next(keys), shape),
            "bias": jax.random.normal(next(keys), shape[-1:]),
        }
        for name, shape in shapes.items()
    }
    return Network(positions, params)


def images(seed, n, shape=IMAGE):
    return jax.random.uniform(jax.random.key(seed), (n, *shape))


def leafwise(f, tree, seed):
    """f(key, leaf) of each leaf, with a key of its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([f(k, w) for k, w in zip(keys, leaves, strict=True)])


def noisy(params, seed):
    return leafwise(lambda k, w: w + 0.3 * jax.random.normal(k, w.shape, w.dtype), params, seed)


def factors(params, kind):
    """No mask; or a mask (of booleans or numbers, biases as well) and gains, none of them 1."""
    if kind == "dense":
        return {}
    gain = leafwise(lambda k, w: jax.random.uniform(k, (), w.dtype, 0.5, 2.0), params, 3)
    if kind == "boolean":
        mask = leafwise(lambda k, w: jax.random.bernoulli(k, 0.6, w.shape), params, 4)
    else:
        mask = leafwise(lambda k, w: jax.random.normal(k, w.shape, w.dtype), params, 5)
    return {"mask": mask, "gain": gain}


# ---------------------------------------------------------------- values


@cache
def expected(name, kind):
    net = network(name)
    return reference(net, images(0, 3), images(1, 2), **factors(net.params, kind))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BUILDERS)
def test_engines_agree_with_the_loop(name, engine):
    net = network(name)
    for kind in BUILDERS[name][1]:
        kernel = kernels.empirical(
            net, net.params, images(0, 3), images(1, 2), engine=engine, **factors(net.params, kind)
        )
        assert kernel.dtype == jnp.float32
        assert agree(kernel, expected(name, kind)), kind


LAYERS = ("conv/kernel", "head/kernel")

FORMS: dict[str, tuple[str, tuple[str, str]]] = {
    "gram": ("dense", ("gram", "gram")),
    "jacobian": ("dense", ("jacobian", "jacobian")),
    "packed": ("boolean", ("kept", "packed")),
    "kept": ("boolean", ("jacobian", "kept")),
    "soft-known": ("boolean", ("kept", "soft")),
    "soft": ("real", ("jacobian", "soft")),
}
"""Kind of mask, and the forms of the layers of `small`."""

OUTPUTS = ("full", "diagonal", "trace", 1)

SETTINGS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "half": (17, 0, {}, {}),
    "tiles": (7, 0, {"batch": 3}, {"images": 2}),
    "mixed": (5, 4, {}, {"rows": 2}),
    "mixed-tiles": (4, 6, {"batch": 2}, {}),
    "little-memory": (6, 3, {"memory": 2500}, {}),
}
"""Numbers of images (none: x2 not given), arguments of `plan`, and what is changed in the plan."""


@cache
def expected_small(kind, n1, n2):
    x1, x2 = images(8, n1, (5, 2)), images(9, n2, (5, 2)) if n2 else None
    return reference(small(), x1, x2, **factors(small().params, kind))


def settled(kind, setting, outputs, **kwargs):
    """The kernel of `small` in float64 under a setting, with its plan."""
    n1, n2, arguments, changes = SETTINGS[setting]
    x1, x2 = images(8, n1, (5, 2)), images(9, n2, (5, 2)) if n2 else None
    given = factors(small().params, kind)
    with jax.enable_x64(True):
        params, x1, x2, given = jax.tree.map(
            jnp.asarray, doubled((small().params, x1, x2, given))
        )  # None is a pytree without leaves
        plan = kernels.plan(
            small().apply, params, x1, x2, mask=given.get("mask"), outputs=outputs,
            **arguments, **kwargs,
        )  # fmt: skip
        plan = replace(plan, **changes)
        kernel = quick(
            lambda p, x1, x2: kernels.empirical(small().apply, p, x1, x2, plan=plan, **given)
        )(params, x1, x2)
        assert kernel.dtype == jnp.float64
        return kernel, plan


# Each form meets all outputs and four of the five settings.
GRID = [
    (form, list(SETTINGS)[(i + j) % len(SETTINGS)], outputs)
    for (i, form), (j, outputs) in itertools.product(enumerate(FORMS), enumerate(OUTPUTS))
]


@pytest.mark.parametrize(("form", "setting", "outputs"), GRID)
def test_forms_agree_with_the_loop(form, setting, outputs):
    kind, chosen = FORMS[form]
    kernel, plan = settled(kind, setting, outputs, forms=dict(zip(LAYERS, chosen, strict=True)))
    assert [layer.name for layer in plan.layers] == [f"{name} +bias" for name in LAYERS]
    assert tuple(layer.form for layer in plan.layers) == chosen
    if setting == "little-memory":
        assert not plan.stored
        assert plan.tile < 6
        assert any(layer.chunks > 1 for layer in plan.layers) == ("jacobian" in chosen)
    want = pick(expected_small(kind, *SETTINGS[setting][:2]), outputs)
    assert agree(kernel, want, 1e-12)


@pytest.mark.parametrize(
    ("engine", "kind", "setting", "outputs"),
    [
        ("contraction", "dense", "half", "full"),
        ("contraction", "boolean", "mixed-tiles", "diagonal"),
        ("contraction", "boolean", "little-memory", "trace"),
        ("contraction", "real", "tiles", 1),
        ("products", "boolean", "half", 1),
        ("products", "dense", "mixed-tiles", "trace"),
        ("products", "real", "tiles", "diagonal"),
        ("products", "boolean", "mixed", "full"),
    ],
)
def test_other_engines_in_all_settings(engine, kind, setting, outputs):
    kernel, plan = settled(kind, setting, outputs, engine=engine)
    assert plan.engine == engine
    assert agree(kernel, pick(expected_small(kind, *SETTINGS[setting][:2]), outputs), 1e-12)


def test_four_blocks_of_a_large_symmetric_kernel():
    x = images(8, 66, (5, 2))
    plan = kernels.plan(small().apply, small().params, x, outputs="diagonal", engine="layerwise")
    assert len(plan.cuts) == 4
    kernel = kernels.empirical(small().apply, small().params, x, plan=plan)
    assert agree(kernel, pick(reference(small(), x), "diagonal"))
    assert np.array_equal(kernel, kernel.transpose(1, 0, 2))


def test_empty_units_layers_and_masks():
    """Units without inputs, a layer without weights, nothing kept at all."""
    params, x = small().params, images(8, 3, (5, 2))
    ones = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    none = jax.tree.map(np.zeros_like, ones)
    unit = jax.tree.map(np.copy, ones)
    unit["head"]["kernel"][:, 1:] = False
    unit["head"]["bias"][:2] = False
    unit["conv"] = none["conv"]
    for form, mask in (("packed", unit), ("kept", unit), ("packed", none), ("kept", none)):
        chosen: dict[str, str] = dict(zip(LAYERS, ("kept", form), strict=True))
        plan = kernels.plan(small().apply, params, x, mask=mask, forms=chosen)
        kernel = kernels.empirical(small().apply, params, x, mask=mask, plan=plan)
        assert agree(kernel, reference(small(), x, mask=mask))


@pytest.mark.parametrize("implementation", ["JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS"])
@pytest.mark.parametrize(("name", "kind"), [("mlp-relu", "boolean"), ("cnn-gelu", "dense")])
def test_neural_tangents_agrees(name, kind, implementation):
    from ntk_awt.kernels import compat

    net, x1, x2 = network(name), images(0, 3), images(1, 2)
    given = factors(net.params, kind)
    apply = masks.masked(net.apply, **given) if given else net.apply
    kernel_fn = compat.empirical_ntk_fn(
        apply, trace_axes=(), vmap_axes=0,
        implementation=compat.NtkImplementation[implementation],
    )  # fmt: skip
    theirs = np.asarray(jax.jit(kernel_fn)(x1, x2, net.params), np.float64)
    for engine in ENGINES:  # compiled before, for the test against the loop
        ours = kernels.empirical(net, net.params, x1, x2, engine=engine, **given)
        assert agree(ours, theirs, 1e-5), engine


# ---------------------------------------------------------------- wrong kernels


def wrong(net, mask, gain, mistake):
    """Factors of the Jacobian's columns with a mistake in them."""
    factor = jax.tree.map(lambda m, g: np.asarray(m) * np.float64(g), mask, gain)
    if mistake == "pruned weights counted":
        return jax.tree.map(lambda m, g: np.ones(m.shape) * np.float64(g), mask, gain)
    if mistake == "γ instead of γ²":
        return jax.tree.map(np.sqrt, factor)
    if mistake == "mask of θ used twice":
        return jax.tree.map(lambda f, w: f * np.asarray(w), factor, net.params)
    head = dict(factor["head"])
    if mistake == "metric transposed":
        head["kernel"] = head["kernel"].reshape(head["kernel"].shape[::-1]).T
    if mistake == "scale of a bias forgotten":
        head["bias"] = head["bias"] / 2.0
    if mistake == "one weight forgotten":
        kept = tuple(np.argwhere(head["kernel"])[0])
        head["kernel"] = head["kernel"].copy()
        head["kernel"][kept] = 0
    return {**factor, "head": head}


MISTAKES = (
    "pruned weights counted",
    "γ instead of γ²",
    "mask of θ used twice",
    "metric transposed",
    "scale of a bias forgotten",
    "one weight forgotten",
)


@pytest.mark.parametrize("mistake", ["", *MISTAKES])
def test_wrong_kernels_are_told_apart(mistake):
    """The comparison that all other tests rest on fails for each of these, and for no other."""
    x = images(8, 4, (5, 2))
    given = factors(small().params, "boolean")
    kernel = kernels.empirical(small().apply, small().params, x, **given)
    with jax.enable_x64(True):
        weights = jax.tree.map(jnp.asarray, doubled(masks.effective(small().params, **given)))
        double, columns = jnp.asarray(doubled(x)), wrong(small(), mistake=mistake, **given)
        found = loop_kernel(small().apply, weights, double, double, columns)
    assert agree(kernel, found) == (mistake == "")


def test_axes_are_images_then_outputs():
    """f(x) = (w·x₀, 2v·x₁): the kernel is diagonal in the outputs, with known entries."""

    def apply(params, x):
        return jnp.stack([params["w"] * x[:, 0], 2 * params["v"] * x[:, 1]], -1)

    params = {"w": jnp.array(3.0), "v": jnp.array(5.0)}
    x1, x2 = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[5.0, 7.0]])
    kernel = kernels.empirical(apply, params, x1, x2)
    wanted = np.zeros((2, 1, 2, 2))
    wanted[:, 0, 0, 0] = [1 * 5, 3 * 5]
    wanted[:, 0, 1, 1] = [4 * 2 * 7, 4 * 4 * 7]
    np.testing.assert_allclose(kernel, wanted, rtol=1e-6)


def test_symmetric_and_positive():
    net, x = network(), images(0, 5)
    kernel = np.asarray(kernels.empirical(net.apply, net.params, x))
    np.testing.assert_allclose(kernel, kernel.transpose(1, 0, 3, 2), rtol=1e-5, atol=1e-4)
    flat = kernel.transpose(0, 2, 1, 3).reshape(15, 15)
    assert np.linalg.eigvalsh(flat).min() > -1e-4 * np.linalg.eigvalsh(flat).max()


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("jacobian", ["masked", "full"])
def test_the_two_jacobians_are_told_apart(jacobian):
    net, x = small(), images(8, 4, (5, 2))
    given = factors(net.params, "boolean")
    kernel = kernels.empirical(net, net.params, x, jacobian=jacobian, **given)
    other = {"masked": "full", "full": "masked"}[jacobian]
    assert agree(kernel, reference(net, x, jacobian=jacobian, **given))
    assert not agree(kernel, reference(net, x, jacobian=other, **given))


@pytest.mark.parametrize("engine", ENGINES)
def test_jacobian_at_other_weights(engine):
    """`at` replaces γ⊙m⊙θ; the factor γ⊙m of the columns stays."""
    net, x, at = small(), images(8, 4, (5, 2)), noisy(small().params, 11)
    given = factors(net.params, "boolean")
    kernel = kernels.empirical(net, net.params, x, at=at, engine=engine, **given)
    assert agree(kernel, reference(net, x, at=at, **given))
    assert not agree(kernel, reference(net, x, **given))


def test_a_mask_without_gain_has_gain_one():
    x = images(8, 4, (5, 2))
    mask = factors(small().params, "boolean")["mask"]
    kernel = kernels.empirical(small(), small().params, x, mask=mask)
    assert agree(kernel, reference(small(), x, mask=mask))


@pytest.mark.parametrize("kind", ["boolean", "real"])
@pytest.mark.parametrize("engine", ENGINES)
def test_everything_traced(engine, kind):
    x1, x2 = images(8, 3, (5, 2)), images(9, 2, (5, 2))
    given = factors(small().params, kind)

    @jax.jit
    def kernel(params, x1, x2, mask, gain):
        return kernels.empirical(
            positions, params, x1, x2, mask=mask, gain=gain, engine=engine, outputs=2
        )

    found = kernel(small().params, x1, x2, given["mask"], given["gain"])
    assert agree(found, pick(reference(small(), x1, x2, **given), 2))


def test_a_second_call_traces_nothing():
    """New values of the same shapes, and the same mask: neither traced nor compiled again."""
    traces = []

    def apply(params, x):
        traces.append(1)
        return positions(params, x)

    given = factors(small().params, "boolean")
    for engine in ENGINES:
        for params, seed in ((small().params, 8), (noisy(small().params, 1), 9)):
            first = len(traces)
            x = images(seed, 3, (5, 2))
            kernels.empirical(apply, params, x, engine=engine, outputs="trace", **given)
        assert len(traces) == first, engine


def test_a_batch_of_parameters():
    """`vmap` over networks: each has the kernel that it has alone."""
    x = images(8, 3, (5, 2))
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), small().params, noisy(small().params, 1))
    found = jax.vmap(lambda p: kernels.empirical(positions, p, x))(stack)
    one = kernels.empirical(positions, noisy(small().params, 1), x)
    assert agree(found[1], np.asarray(one, np.float64))


def test_a_function_that_closes_over_traced_values():
    """The gradient with respect to a number that only `apply` knows."""
    x = images(8, 3, (5, 2))

    def scalar(c):
        kernel = kernels.empirical(lambda p, x: positions(p, c * x), small().params, x)
        return jnp.sum(kernel)

    slope = (scalar(1.01) - scalar(0.99)) / 0.02
    assert float(jax.grad(scalar)(1.0)) == pytest.approx(float(slope), rel=1e-3)
    assert float(jax.jit(jax.grad(scalar))(1.0)) == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_computing_in_a_smaller_type(engine):
    """Parameters in float32, layers in bfloat16: the kernel is float32 and about right."""

    def apply(params, x):
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        return positions(half, x.astype(jnp.bfloat16))

    x = images(8, 3, (5, 2))
    kernel = kernels.empirical(apply, small().params, x, engine=engine)
    assert kernel.dtype == jnp.float32
    assert agree(kernel, reference(small(), x), 0.05)


# ---------------------------------------------------------------- derivatives

DERIVATIVES = {
    "layerwise-gram": ("layerwise", "gram", "half"),
    "layerwise-packed": ("layerwise", "packed", "half"),
    "layerwise-kept": ("layerwise", "kept", "tiles"),
    "layerwise-soft": ("layerwise", "soft", "mixed"),
    "layerwise-chunks": ("layerwise", "soft", "little-memory"),
    "contraction": ("contraction", "packed", "tiles"),
    "products": ("products", "soft", "mixed"),
}
"""Engine, forms (and so the kind of mask) and setting."""


def along(tree, direction, step):
    return jax.tree.map(lambda w, d: w + step * d, tree, direction)


def dot(a, b):
    return sum(jnp.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("case", DERIVATIVES)
def test_derivatives_agree_with_finite_differences(case):
    """Of a scalar of the kernel, in each argument alone; and the derivative of that gradient."""
    engine, form, setting = DERIVATIVES[case]
    kind, chosen = FORMS[form]
    _, n2, arguments, changes = SETTINGS[setting]
    given = factors(small().params, kind)
    with jax.enable_x64(True):
        x1, x2 = images(8, 3, (5, 2)), images(9, 2, (5, 2))
        params, x1, x2, given = jax.tree.map(jnp.asarray, doubled((small().params, x1, x2, given)))
        right = x2 if n2 else None
        layers: dict[str, str] = dict(zip(LAYERS, chosen, strict=True))
        forced = layers if engine == "layerwise" else None
        plan = kernels.plan(
            positions, params, x1, right, mask=given.get("mask"), engine=engine, forms=forced,
            **{**arguments, "batch": 2 if "batch" in arguments else None},
        )  # fmt: skip
        plan = replace(plan, **changes)
        weight = jax.random.normal(jax.random.key(0), plan.shape)
        free = {"params": params, "x1": x1, **({"x2": right} if n2 else {})}
        free |= {"gain": given["gain"]} if given else {}
        free |= {"mask": given["mask"]} if kind == "real" else {}

        def scalar(free):
            mask = free.get("mask", given.get("mask"))
            kernel = kernels.empirical(
                positions, free["params"], free["x1"], free.get("x2"), mask=mask,
                gain=free.get("gain"), plan=plan,
            )  # fmt: skip
            return jnp.sum(weight * kernel**2)

        both = quick(jax.value_and_grad(scalar))
        gradient = both(free)[1]
        step, direction, ends = 1e-5, {}, []
        for name in free:
            noise = leafwise(lambda k, w: jax.random.normal(k, w.shape, w.dtype), free, 6)
            direction = {k: v if k == name else 0 * v for k, v in noise.items() if k == name}
            direction |= jax.tree.map(jnp.zeros_like, {k: v for k, v in free.items() if k != name})
            ends = [both(along(free, direction, s)) for s in (step, -step)]
            slope = float(ends[0][0] - ends[1][0]) / (2 * step)
            assert float(dot(gradient, direction)) == pytest.approx(slope, rel=1e-6), name
        if kind == "boolean":
            pruned = jax.tree.map(
                lambda g, m: jnp.abs(g * ~m).max(), gradient["params"], given["mask"]
            )
            assert max(jax.tree.leaves(pruned)) == 0
        # `direction`, `ends`: of the last argument.
        second = quick(lambda f, d: jax.jvp(jax.grad(scalar), (f,), (d,))[1])(free, direction)
        change = jax.tree.map(lambda a, b: (a - b) / (2 * step), ends[0][1], ends[1][1])
        probe = leafwise(lambda k, w: jax.random.normal(k, w.shape, w.dtype), free, 7)
        assert float(dot(second, probe)) == pytest.approx(float(dot(change, probe)), rel=1e-6)


# ---------------------------------------------------------------- bad input


def test_bad_input_names_the_leaf():
    net, x = network(), images(0, 2)
    mask, gain = factors(net.params, "boolean").values()
    broken = {**mask, "dense2": {**mask["dense2"], "kernel": mask["dense2"]["kernel"][:2]}}
    with pytest.raises(InputError, match="mask dense2/kernel: expected shape"):
        kernels.empirical(net.apply, net.params, x, mask=broken, gain=gain)
    partial = {**gain, "dense1": {"kernel": gain["dense1"]["kernel"]}}
    with pytest.raises(InputError, match="gain dense1/bias: expected a leaf"):
        kernels.empirical(net.apply, net.params, x, mask=mask, gain=partial)
    with pytest.raises(InputError, match="at dense2/kernel: expected shape"):
        kernels.empirical(net.apply, net.params, x, at=broken)
    with pytest.raises(InputError, match="expected a mask"):
        kernels.empirical(net.apply, net.params, x, gain=gain)
    with pytest.raises(InputError, match=r"x2: expected images of shape \(8, 8, 1\)"):
        kernels.empirical(net.apply, net.params, x, jnp.zeros((2, 4, 4, 1)))
    with pytest.raises(InputError, match="did you mean 'full'"):
        kernels.empirical(net.apply, net.params, x, jacobian="ful")
    with pytest.raises(InputError, match="layerwise, products"):
        kernels.empirical(net.apply, net.params, x, engine="magic")


# ---------------------------------------------------------------- metrics


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
