"""Where weights enter a network, on networks where they enter in unusual ways.

Every case is a masked kernel of the layerwise engine against the float64 loop of `test_kernels`: a
weight that is taken for a product with the data where it is not one gives a wrong value there.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ntk_awt import kernels
from ntk_awt.errors import leaf_name
from ntk_awt.kernels.engine import program
from ntk_awt.network import Network
from tests.kernels.test_empirical import agree, factors, reference
from tests.quick import quick

SLOW = (
    "test_weights_enter_in_any_way attention",
    "test_weights_enter_in_any_way bias_transposed",
    "test_weights_enter_in_any_way several_axes_of_inputs",
    "test_weights_enter_in_any_way weight_scaled*",
    "test_weights_enter_in_any_way grouped_convolution",
    "test_weights_enter_in_any_way one_weight*",
    "test_weights_enter_in_any_way dense",
    "test_weights_enter_in_any_way axes_in*",
    "test_weights_enter_in_any_way several_axes_of_units",
    "test_weights_enter_in_any_way parts_of*",
    "test_weights_enter_in_any_way weight_as*",
)

INPUTS = 6


class Case(NamedTuple):
    """A network and its weights that enter in one product, each with `+bias` where one is added."""

    apply: Callable[..., Any]
    shapes: Any
    sites: str


CASES: dict[str, Case] = {}


def case(shapes: Any, sites: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a network `(params, x[n, 6]) -> logits` by the shapes of its parameters."""

    def add(apply: Callable[..., Any]) -> Callable[..., Any]:
        CASES[apply.__name__] = Case(apply, shapes, sites)
        return apply

    return add


def made(shapes, seed=0):
    """Parameters of some shapes, standard normal."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


def inputs(n, seed=1):
    return jax.random.normal(jax.random.key(seed), (n, INPUTS))


# ---------------------------------------------------------------- the ordinary

DENSE = {"w": (6, 4), "b": (4,), "v": (4, 2), "c": (2,)}


@case(DENSE, "v+c w+b")
def dense(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


@case((6, 3), "")
def bare_array(w, x):
    """The whole pytree is one array; its name is empty."""
    return jnp.tanh(x @ w)


@case(DENSE, "v+c w+b")
def weight_on_the_left(p, x):
    h = jnp.tanh(p["w"].T @ x.T + p["b"][:, None])
    return (p["v"].T @ h + p["c"][:, None]).T


@case({"w": (4, 3, 2), "b": (4,), "v": (2, 4)}, "v w+b")
def weight_scaled_reshaped_transposed_negated(p, x):
    w = -(p["w"] / 2.0).transpose(1, 2, 0).reshape(6, 4) * 1.5
    return jnp.tanh(x @ w + p["b"]) @ (3.0 * p["v"].T)


@case(DENSE, "v+c w+b")
def scales_everywhere(p, x):
    h = -1.5 * (0.5 * (2.0 * (x @ p["w"])) + 3.0 * p["b"])
    return jnp.tanh(h) @ p["v"] * 0.3 + -p["c"] / 4.0


@case({"w": (6, 2, 3), "b": (2, 3), "v": (6, 2)}, "v w+b")
def several_axes_of_units(p, x):
    y = jnp.einsum("ni,iab->nab", x, p["w"]) + p["b"]
    return jnp.tanh(y).reshape(len(x), -1) @ p["v"]


@case({"w": (2, 3, 4), "b": (4,), "v": (4, 2)}, "v w+b")
def several_axes_of_inputs(p, x):
    y = jnp.einsum("nji,ijo->no", x.reshape(-1, 3, 2), p["w"]) + p["b"]
    return jnp.tanh(y) @ p["v"]


@case({"w": (2, 4), "b": (4,), "v": (4, 2)}, "v w+b")
def bias_at_all_positions(p, x):
    return jnp.tanh(x.reshape(-1, 3, 2) @ p["w"] + p["b"]).mean(1) @ p["v"]


@case({"a": DENSE, "b": {"w": (2, 2), "b": (2,)}}, "a/v+a/c a/w+a/b b/w+b/b")
def calls_inside_calls(p, x):
    """`jit` and `checkpoint`, one inside the other, the same function called twice."""

    @jax.jit
    def layer(w, b, x):
        return jnp.tanh(x @ w + b)

    h = jax.checkpoint(lambda a, x: layer(a["v"], a["c"], layer(a["w"], a["b"], x)))(p["a"], x)
    return jax.checkpoint(jax.jit(lambda h: layer(p["b"]["w"], p["b"]["b"], h)))(h)


@case(DENSE, "v+c w+b")
def each_image_on_its_own(p, x):
    return jax.vmap(lambda image: jnp.tanh(image @ p["w"] + p["b"]) @ p["v"] + p["c"])(x)


# ---------------------------------------------------------------- convolutions

CONV = {"k": (3, 2, 4), "b": (4,), "v": (4, 2)}
NHC = ("NHC", "HIO", "NHC")


def pooled(p, y):
    return jnp.tanh(y).mean(1) @ p["v"]


@case(CONV, "k+b v")
def strides_dilation_and_borders(p, x):
    x = jnp.tile(x.reshape(-1, 3, 2), (1, 4, 1))
    y = lax.conv_general_dilated(
        x, p["k"], (2,), [(-1, 3)], lhs_dilation=(3,), rhs_dilation=(2,), dimension_numbers=NHC
    )
    return pooled(p, 0.5 * y + p["b"])


@case(CONV, "k+b v")
def transposed_convolution(p, x):
    return pooled(p, lax.conv_transpose(x.reshape(-1, 3, 2), p["k"], (2,), "SAME") + p["b"])


@case({**CONV, "k": (3, 4, 2)}, "v")
def mirrored_kernel(p, x):
    x = x.reshape(-1, 3, 2)
    return pooled(p, lax.conv_transpose(x, p["k"], (2,), "VALID", transpose_kernel=True) + p["b"])


@case({**CONV, "k": (3, 1, 4)}, "v")
def grouped_convolution(p, x):
    y = lax.conv_general_dilated(
        x.reshape(-1, 3, 2), p["k"], (1,), "SAME", dimension_numbers=NHC, feature_group_count=2
    )
    return pooled(p, y + p["b"])


@case({"k": (1, 2, 4, 3), "b": (4,), "v": (24, 2)}, "k+b v")
def axes_in_another_order(p, x):
    """Axes of the input, the kernel and the output in three orders; output pixels transposed."""
    y = lax.conv_general_dilated(
        x.reshape(-1, 2, 3, 1), p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "IHOW", "CWNH")
    )
    y = jnp.tanh(y + p["b"][:, None, None, None])
    return jnp.moveaxis(y, 2, 0).reshape(len(x), -1) @ p["v"]


@case({"k": (2, 1, 3), "b": (3,), "v": (18, 2)}, "k+b v")
def parts_of_an_image_as_a_batch(p, x):
    """Frames of a film: each image is two of the convolution's batch."""
    y = lax.conv_general_dilated(x.reshape(-1, 3, 1), p["k"], (1,), "SAME", dimension_numbers=NHC)
    return jnp.tanh(y + p["b"]).reshape(len(x), -1) @ p["v"]


@case({"k": (1, 3, 4), "v": (4, 2)}, "v")
def weight_as_the_image(p, x):
    """The kernel of the convolution is the data, the weight its input."""

    def one(image):
        y = lax.conv_general_dilated(
            p["k"], image.reshape(2, 3, 1), (1,), "SAME", dimension_numbers=("NCH", "HIO", "NHC")
        )
        return jnp.tanh(y[0, :, 0]) @ p["v"]

    return jnp.stack([one(image) for image in x]) if len(x) > 1 else one(x[0])[None]


# ---------------------------------------------------------------- not one product


@case({"w": (6, 6), "b": (6,), "v": (6, 2)}, "v")
def weight_in_two_layers(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T) @ p["v"]


@case({"w": (6, 6), "b": (6,), "v": (6, 2)}, "v")
def weight_times_itself(p, x):
    return jnp.tanh(x @ (p["w"] @ p["w"]) + x @ (p["b"][:, None] * p["b"])) @ p["v"]


@case({"w": (6, 6), "v": (6, 2)}, "v")
def weight_plus_its_transpose(p, x):
    return jnp.tanh(x @ (p["w"] + p["w"].T)) @ p["v"]


@case({"w": (6, 6), "b": (6,), "v": (6, 2)}, "v")
def weight_in_a_loop(p, x):
    h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ p["w"] + p["b"]), None), x, None, length=3)
    return h @ p["v"]


@case({"w": (3, 6, 6), "v": (6, 2)}, "v")
def one_weight_a_pass_of_a_loop(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0] @ p["v"]


@case({"w": (6, 4), "u": (6, 4), "v": (4, 2)}, "v")
def weight_in_a_branch(p, x):
    def one(image):
        return lax.cond(image[0] > 0, lambda: image @ p["w"], lambda: image @ p["u"])

    return jnp.tanh(jax.vmap(one)(x)) @ p["v"]


@case({"e": (5, 4), "v": (4, 2)}, "e v")
def embedding(p, x):
    index = (jnp.abs(x) * 3).astype(int) % 5
    return jnp.tanh(p["e"][index].mean(1)) @ p["v"]


@case({"w": (2, 3, 4), "b": (4,), "v": (8, 2)}, "v")
def product_with_batch_axes(p, x):
    y = jnp.einsum("nhi,hio->nho", x.reshape(-1, 2, 3), p["w"]) + p["b"]
    return jnp.tanh(y).reshape(len(x), -1) @ p["v"]


@case({"w": (6,), "b": (4,), "v": (4, 2)}, "v")
def weight_copied_into_columns(p, x):
    return jnp.tanh(x @ jnp.broadcast_to(p["w"][:, None], (6, 4)) + p["b"]) @ p["v"]


@case({"w": (6, 4), "s": (), "v": (4, 2)}, "")
def products_of_weights(p, x):
    """A trained scale on the weight, on the output and of another layer."""
    return jnp.tanh(p["s"] * (x @ (p["w"] * p["s"]))) @ (p["v"] / p["s"])


@case({"w": (6, 4), "b": (4,), "v": (4, 2)}, "v")
def weight_normalised(p, x):
    return jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)) + p["b"]) @ p["v"]


@case(DENSE, "v+c")
def gradient_as_output(p, x):
    """Weights enter a network and its derivative."""

    def energy(image):
        return jnp.sum(jnp.tanh(image @ p["w"] + p["b"]))

    return jax.vmap(jax.grad(energy))(x)[:, :4] @ p["v"] + p["c"]


# ---------------------------------------------------------------- taps and biases


@case(DENSE, "v w")
def product_used_twice(p, x):
    """A skip connection before the bias and one behind it: neither is in the other."""
    y = x @ p["w"]
    z = y + p["b"]
    return (jnp.tanh(z) + y) @ p["v"] + z[:, :2] * p["c"]


@case(DENSE, "v+c w+b")
def sum_used_twice(p, x):
    z = x @ p["w"] + p["b"]
    return (jnp.tanh(z) + z) @ p["v"] + p["c"] + jnp.sin(z[:, :2])


@case({"w": (6, 4), "u": (6, 4), "b": (4,), "v": (4, 2)}, "u v w")
def two_products_and_one_bias(p, x):
    return jnp.tanh(x @ p["w"] + x**2 @ p["u"] + p["b"]) @ p["v"]


@case({"w": (6, 4), "b": (4,), "v": (4, 2)}, "v w")
def bias_in_two_layers(p, x):
    return (jnp.tanh(x @ p["w"] + p["b"]) + p["b"]) @ p["v"]


@case({"w": (6, 2), "v": (2, 2), "b": (2,)}, "v w")
def bias_of_two_layers(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["b"]


@case({"w": (6, 4), "b": (4,), "v": (4, 2)}, "v w")
def bias_subtracted(p, x):
    return jnp.tanh(x @ p["w"] - p["b"]) @ p["v"]


@case({"w": (6, 4), "b": (), "v": (4, 2)}, "v w")
def bias_of_all_units(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


@case({"w": (2, 4), "b": (3, 4), "v": (4, 2)}, "v w")
def bias_of_each_position(p, x):
    return jnp.tanh(x.reshape(-1, 3, 2) @ p["w"] + p["b"]).sum(1) @ p["v"]


@case({"w": (6, 3, 3), "b": (3, 3), "v": (9, 2)}, "v w")
def bias_transposed(p, x):
    y = jnp.einsum("ni,iab->nab", x, p["w"]) + p["b"].T
    return jnp.tanh(y).reshape(len(x), -1) @ p["v"]


@case({"w": (4, 4), "b": (4,), "v": (4, 2)}, "v w")
def bias_along_the_positions(p, x):
    """As many positions as units, and the bias belongs to the positions."""
    x = jnp.stack([x[:, i : i + 4] for i in (0, 1, 2, 0)], 1)
    return jnp.tanh(x @ p["w"] + p["b"][:, None]).sum(1) @ p["v"]


@case({"w": (6, 4), "b": (4,), "v": (4, 2)}, "v w+b")
def bias_scaled_by_data_later(p, x):
    z = x @ p["w"] + p["b"]
    return (z * x[:, :4]) @ p["v"]


@case({"w": (6, 4), "b": (4,), "v": (4, 2)}, "v w")
def product_scaled_by_data_before(p, x):
    return jnp.tanh(x[:, :1] * (x @ p["w"]) + p["b"]) @ p["v"]


@case({"w": (6, 4), "b": (4,), "v": (4, 2)}, "v")
def stopped_gradients(p, x):
    return jnp.tanh(x @ lax.stop_gradient(p["w"]) + lax.stop_gradient(p["b"])) @ p["v"]


@case({"w": (6, 4), "b": (4,), "v": (4, 2)}, "v w+b")
def backward_rule_of_its_own(p, x):
    """Signs with the gradient of the identity, on the data's way."""

    @jax.custom_vjp
    def signs(y):
        return jnp.sign(y)

    signs.defvjp(lambda y: (jnp.sign(y), None), lambda _, g: (g,))
    return signs(x @ p["w"] + p["b"]) @ p["v"]


# ---------------------------------------------------------------- outputs


@case({"w": (6, 4), "b": (4,), "u": (3,)}, "w+b")
def parameters_without_influence(p, x):
    _ = x[:, :3] * p["u"]
    return x @ p["w"] + p["b"]


@case({"b": (3,)}, "")
def output_without_the_data(p, x):
    return jnp.broadcast_to(2.0 * p["b"], (len(x), 3))


@case({"w": (6,)}, "")
def output_is_the_weight(p, x):
    """The product is of no use, and the weight is the output."""
    _ = x @ p["w"]
    return jnp.broadcast_to(p["w"], (len(x), 6))


@case({"w": (6, 2)}, "w")
def output_is_constant(p, x):
    """A product that is there, with the scale 0."""
    return jnp.ones((len(x), 2)) + 0 * (x @ p["w"])


@case({"w": (4, 2), "m": (6, 4)}, "w")
def output_behind_a_constant_layer(p, x):
    """An array that the function closes over, and a weight that multiplies no data."""
    fixed = jnp.asarray(np.linspace(-1, 1, 24).reshape(6, 4), x.dtype)
    return jnp.tanh(x @ fixed + jnp.ones((1, 6)) @ p["m"]) @ p["w"]


HEADS = {"q": (4, 2, 2), "k": (4, 2, 2), "v": (4, 2, 2)}
ATTENTION = {
    "e": (2, 4),
    "pos": (3, 4),
    "w": HEADS,
    "b": dict.fromkeys(HEADS, (2, 2)),
    "o": (2, 2, 4),
    "c": (4,),
    "head": (4, 2),
}


@case(ATTENTION, "e head o w/k+b/k w/q+b/q w/v+b/v")
def attention(p, x):
    """The bias `c` comes after the skip connection, so it is not taken into the product of `o`."""
    h = x.reshape(-1, 3, 2) @ p["e"] + p["pos"]
    q, k, v = (jnp.einsum("ntd,dhk->nthk", h, p["w"][n]) + p["b"][n] for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k) / np.sqrt(2.0), -1)
    o = jnp.einsum("nhts,nshk->nthk", a, v)
    return (h + jnp.einsum("nthk,hkd->ntd", o, p["o"]) + p["c"]).mean(1) @ p["head"]


# ---------------------------------------------------------------- tests


def sites_of(apply, params, x):
    """The names of the weights that enter in one product, as in `Case.sites`."""
    found = program.trace(apply, params, x)
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    used = [names[s.leaf] + ("" if s.bias is None else f"+{names[s.bias]}") for s in found.sites]
    others = {names[i] for i in found.others}
    assert others == set(names) - {name for site in used for name in site.split("+")}
    return " ".join(sorted(used))


def layerwise(apply, params, x1, x2, **given):
    @quick
    def kernel(params, x1, x2):
        return kernels.empirical(apply, params, x1, x2, engine="layerwise", **given)

    return kernel(params, x1, x2)


@pytest.mark.parametrize("name", CASES)
def test_weights_enter_in_any_way(name):
    apply, shapes, sites = CASES[name]
    params, x1, x2 = made(shapes), inputs(3), inputs(2, 2)
    given = factors(params, "boolean")
    kernel = layerwise(apply, params, x1, x2, **given)
    wanted = reference(Network(apply, params), x1, x2, **given)
    assert agree(kernel, wanted)
    assert sites_of(apply, params, x1) == sites


def test_dense_kernel_of_odd_axes():
    """The form without mask of layers with several positions, in unusual orders of the axes."""
    for name in ("axes_in_another_order", "parts_of_an_image_as_a_batch", "attention"):
        apply, shapes, _ = CASES[name]
        params, x1, x2 = made(shapes), inputs(2), inputs(2, 2)
        names = [layer.name.split()[0] for layer in kernels.plan(apply, params, x1).layers]
        plan = kernels.plan(apply, params, x1, x2, forms=dict.fromkeys(names, "gram"))
        kernel = kernels.empirical(apply, params, x1, x2, plan=plan)
        assert agree(kernel, reference(Network(apply, params), x1, x2))


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("scales_everywhere", "scale of a weight"),
        ("scales_everywhere", "scale of a bias"),
        ("weight_scaled_reshaped_transposed_negated", "weight not transposed"),
        ("axes_in_another_order", "positions in order of the axes"),
        ("product_used_twice", "bias before the skip connection"),
        ("weight_in_two_layers", "one use of a weight only"),
    ],
)
def test_wrong_programs_are_told_apart(name, mistake, monkeypatch):
    """Each is a mistake that a case above would show."""
    apply, shapes, _ = CASES[name]
    params, x1, x2 = made(shapes), inputs(3), inputs(2, 2)
    given = factors(params, "boolean")
    wanted = reference(Network(apply, params), x1, x2, **given)
    apply = partial(apply)  # not known yet to any cache
    right = program.trace(apply, params, x1)

    def change(**changes):
        made = replace(right, **changes)
        monkeypatch.setattr(program, "trace", lambda *_: made)

    if mistake == "scale of a weight":
        monkeypatch.setattr(program, "weight_scale", lambda site: site.scale)
        # Here all scales lie behind the product.
        change(sites=tuple(replace(s, scale=1.0) for s in right.sites))
    elif mistake == "scale of a bias":
        change(sites=tuple(replace(s, bias_scale=1.0) for s in right.sites))
    elif mistake == "weight not transposed":

        def normal_weight(program_, site, leaf):
            return leaf.reshape(6, 4) if leaf.ndim == 3 else leaf.reshape(4, 2)

        monkeypatch.setattr(program, "normal_weight", normal_weight)
    elif mistake == "positions in order of the axes":

        def normal_output(program_, site, value):
            return value.transpose(1, 2, 3, 0).reshape(-1, 4) if value.ndim == 4 else value

        monkeypatch.setattr(program, "normal_output", normal_output)
    elif mistake == "bias before the skip connection":
        first, second = right.sites
        leaf = sorted(params).index("b")
        others = tuple(i for i in right.others if i != leaf)
        change(sites=(replace(first, bias=leaf, bias_scale=1.0), second), others=others)
    elif mistake == "one use of a weight only":

        def ends(self, *arguments):
            start(self, *arguments)
            self.ends = dict.fromkeys(self.ends, 1)

        start = program._Analysis.__init__
        monkeypatch.setattr(program._Analysis, "__init__", ends)
        apply = partial(apply)
    assert not agree(layerwise(apply, params, x1, x2, **given), wanted)


def test_a_network_is_traced_once():
    apply, shapes, _ = CASES["dense"]
    params = made(shapes)
    traced = program.trace(apply, params, inputs(3))
    assert program.trace(apply, made(shapes, 1), inputs(7)) is traced
    assert program.trace(apply, params, inputs(3)[:, :, None][:, :, 0].astype(jnp.float16)) is not (
        traced
    )


def test_precision_of_the_trace_follows_the_scope():
    """Arrays made inside the network are float64 in one scope and float32 in the other."""

    def apply(params, x):
        return jnp.tanh(x @ params) * jnp.linspace(0.5, 1.5, 3)

    params, x = made((6, 3)), inputs(2)
    single = layerwise(apply, params, x, x)
    with jax.enable_x64(True):
        double = layerwise(apply, params, x, x)
    assert single.dtype == double.dtype == jnp.float32
    assert agree(double, np.asarray(single, np.float64))


def test_traces_go_with_their_network():
    def apply(params, x):
        return jax.nn.relu(x @ params)

    program.trace(apply, made((6, 3)), inputs(2))
    alive = weakref.ref(apply)
    del apply
    gc.collect()
    assert alive() is None


def test_functions_without_weak_references():
    """A callable that no cache can hold is traced again each time."""

    class Function(tuple):
        def __call__(self, params, x):
            return x @ params

    apply, params = Function(), made((6, 3))
    first = program.trace(apply, params, inputs(2))
    assert program.trace(apply, params, inputs(2)) is not first
    assert agree(
        layerwise(apply, params, inputs(2), inputs(1)),
        np.asarray(layerwise(lambda w, x: x @ w, params, inputs(2), inputs(1)), np.float64),
    )


def test_run_is_the_network():
    """With nothing added to the taps; what is added to one moves the logits as the bias does."""
    apply, shapes, _ = CASES["dense"]
    params, x = made(shapes), inputs(1)
    traced = program.trace(apply, params, x)
    taps = [jnp.zeros(traced.shapes[site.tap].shape) for site in traced.sites]
    logits, data = program.run(traced, jax.tree.leaves(params), x, taps)
    np.testing.assert_allclose(logits, apply(params, x), rtol=1e-6)
    np.testing.assert_allclose(data[0], x)
    taps[0] = taps[0] + jnp.arange(4.0)
    moved, _ = program.run(traced, jax.tree.leaves(params), x, taps)
    shifted = {**params, "b": params["b"] + jnp.arange(4.0)}
    np.testing.assert_allclose(moved, apply(shifted, x), rtol=1e-6)
