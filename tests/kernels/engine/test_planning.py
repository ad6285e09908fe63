"""How a kernel is going to be computed: costs, choices, memory, the printed plan, refusals."""

import itertools
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels, masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError
from ntk_awt.kernels.engine import forms, planning, program
from ntk_awt.kernels.engine.engines import ENGINES
from tests.kernels.test_empirical import LAYERS, factors, images, positions, small

SLOW = ("test_explicit_jacobians_keep_to_the_memory",)


@cache
def wide():
    return models.build(ModelConfig(widths=(100, 50)), (12, 12, 1), 4, jax.random.key(1))


def wide_images(n):
    return images(0, n, (12, 12, 1))


def sparse(params, density):
    return masks.make(masks.random_scores(jax.random.key(5), params), density, "erk")


@cache
def pictures():
    return images(8, 6, (5, 2))


@cache
def given():
    return factors(small().params, "boolean")


def plan(x1=None, x2=None, **kwargs):
    x1 = pictures() if x1 is None else x1
    return kernels.plan(positions, small().params, x1, x2, **kwargs)


NOTHING = np.zeros((0, 5, 2), np.float32)
WHOLE = {
    "conv": {"kernel": np.ones((3, 2, 4), bool), "bias": np.ones(4, bool)},
    "head": {"kernel": np.ones((20, 3), bool), "bias": np.ones(3, bool)},
}

# ---------------------------------------------------------------- sizes


def test_sizes_of_the_layers():
    """T × I × O by hand: a convolution of 5 positions over 3 × 2 inputs, then 20 inputs; biases."""
    conv, head = plan().layers
    assert (conv.positions, conv.inputs, conv.units) == (5, 3 * 2 + 1, 4)
    assert (head.positions, head.inputs, head.units) == (1, 20 + 1, 3)
    assert (conv.kept, head.kept) == (28, 63)
    mask = given()["mask"]
    for layer, name in zip(plan(mask=mask).layers, ("conv", "head"), strict=True):
        assert layer.kept == sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask[name]))
    assert [layer.kept for layer in plan(mask=jax.tree.map(jnp.float32, mask)).layers] == [None] * 2


@pytest.mark.parametrize(
    ("outputs", "shape"),
    [("full", (6, 6, 3, 3)), ("diagonal", (6, 6, 3)), ("trace", (6, 6)), (2, (6, 6))],
)
def test_shape_and_bytes_are_those_of_the_kernel(outputs, shape):
    found = plan(outputs=outputs)
    net, x = small(), pictures()
    kernel = jax.eval_shape(lambda p: kernels.empirical(net, p, x, plan=found), net.params)
    assert found.shape == shape == kernel.shape
    assert found.bytes[0] == kernel.size * 4
    assert found.symmetric
    assert plan(pictures(), pictures()[:2], outputs=outputs).shape == (6, 2, *shape[2:])
    assert not plan(pictures(), pictures()[:2], outputs=outputs).symmetric


def test_rows_hold_each_kept_input_once():
    """`pack` against a loop, for every width and masks with empty and full units."""
    rng = np.random.default_rng(0)
    mask = rng.random((9, 5)) < 0.5
    mask[:, 1], mask[:, 2] = False, True
    for width in range(1, 11):
        rows = forms.pack(mask, width)
        counts = [-(-int(column.sum()) // width) for column in mask.T]
        assert forms.row_counts(mask, width).tolist() == counts
        assert rows.inputs.shape == (sum(counts), width)
        assert rows.units.tolist() == [j for j, count in enumerate(counts) for _ in range(count)]
        found = np.zeros(mask.shape, int)
        for row, column in zip(*np.nonzero(rows.valid), strict=True):
            found[rows.inputs[row, column], rows.units[row]] += 1
        assert np.array_equal(found, mask)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("kind", ["dense", "boolean", "real"])
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_the_cheapest_is_chosen(kind, outputs):
    """Form by form, then the engine; nothing else is forced or named."""
    mask = factors(small().params, kind).get("mask")
    found = plan(mask=mask, outputs=outputs)
    for layer in found.layers:
        costs = dict(layer.costs)
        assert costs[layer.form] == min(costs.values())
    assert dict(found.costs)[found.engine] == min(dict(found.costs).values())
    assert [name for name, _ in found.costs] == list(ENGINES)
    possible = {
        "dense": [{"gram", "jacobian"}] * 2,
        "boolean": [{"jacobian", "kept"}, {"jacobian", "kept", "packed", "soft"}],
        "real": [{"jacobian"}, {"jacobian", "soft"}],
    }[kind]
    assert [set(dict(layer.costs)) for layer in found.layers] == possible


def test_cost_of_the_engines_follows_the_layers():
    """A form that costs more by so much makes its engine cost more by as much."""
    cheap = plan(engine="layerwise", mask=given()["mask"])
    for layer, (form, cost) in itertools.chain.from_iterable(
        itertools.product([layer], layer.costs) for layer in cheap.layers
    ):
        dear = plan(mask=given()["mask"], forms={layer.name.split()[0]: form})
        more = dict(dear.costs)["layerwise"] - dict(cheap.costs)["layerwise"]
        assert more == pytest.approx(cost - dict(layer.costs)[layer.form])
        assert dict(dear.costs)["products"] == dict(cheap.costs)["products"]


def test_masked_cost_falls_with_the_density():
    x = wide_images(32)
    costs = []
    for density in (0.5, 0.2, 0.1, 0.05, 0.03):
        found = kernels.plan(wide(), wide().params, x, mask=sparse(wide().params, density))
        costs.append(dict(found.costs)["layerwise"])
        assert density > 0.05 or found.layers[0].form in ("packed", "kept")
    assert costs == sorted(costs, reverse=True)


def test_half_the_pairs_cost_about_half():
    x = wide_images(64)
    half = dict(kernels.plan(wide(), wide().params, x, engine="contraction").costs)
    whole = dict(kernels.plan(wide(), wide().params, x, x, engine="contraction").costs)
    assert 0.45 < half["layerwise"] / whole["layerwise"] < 0.6
    assert 0.45 < half["contraction"] / whole["contraction"] < 0.6


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_can_be_forced(engine):
    assert plan(engine=engine).engine == engine


@pytest.mark.parametrize("form", ["jacobian", "kept", "packed", "soft"])
def test_forms_can_be_forced(form):
    found = plan(mask=given()["mask"], forms={"head/kernel": form})
    assert found.engine == "layerwise"
    assert found.layers[1].form == form
    assert (found.layers[1].width > 0) == (form in ("kept", "packed"))
    assert found.layers[0].form == plan(mask=given()["mask"]).layers[0].form


@pytest.mark.parametrize("known", [True, False])
def test_a_traced_mask_has_no_rows(known):
    """Under jit the forms that need the mask's values are no choice; closed over, they are."""
    mask, seen = sparse(wide().params, 0.03), []

    @jax.jit
    def run(traced):
        seen.append(
            kernels.plan(wide(), wide().params, wide_images(32), mask=mask if known else traced)
        )
        return 0

    run(mask)
    (found,) = seen
    for layer in found.layers:
        assert {"packed", "kept"}.isdisjoint(dict(layer.costs)) != known
        assert (layer.kept is None) != known
    assert (found.layers[0].form in ("packed", "kept")) == known


def test_models_are_taken_as_by_empirical():
    assert kernels.plan(small(), small().params, pictures()) == plan()


def test_number_of_a_logit_may_be_of_numpy():
    assert plan(outputs=np.int64(1)) == plan(outputs=1)
    assert type(plan(outputs=np.int64(1)).outputs) is int


# ---------------------------------------------------------------- memory


def test_tiles_and_cuts():
    found = plan(images(8, 50, (5, 2)))
    assert (found.tile, found.stored) == (50, True)
    for n in (1, 15, 16, 63, 64, 100):
        cuts = plan(images(8, n, (5, 2)), engine="layerwise").cuts
        rows = [i for start, stop, _ in cuts for i in range(start, stop)]
        assert rows == list(range(n))
        assert all(first == start for start, _, first in cuts)
        assert len(cuts) == (4 if n >= 64 else 2 if n >= 16 else 1)
        assert plan(images(8, n, (5, 2)), pictures()).cuts == ((0, n, 0),)
    assert plan(batch=4).tile == 4
    assert plan(batch=100).tile == 6


def temporary(memory, **kwargs):
    """Bytes of temporary arrays of the compiled kernel, and the plan."""
    x = wide_images(64)
    found = kernels.plan(wide(), wide().params, x, memory=memory, **kwargs)
    run = jax.jit(lambda p, x: kernels.empirical(wide(), p, x, mask=kwargs.get("mask"), plan=found))
    analysis = run.lower(wide().params, x).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes, found


@pytest.mark.parametrize(
    ("engine", "little"), [("layerwise", 2**17), ("contraction", 2**20), ("products", 2**16)]
)
def test_less_memory_is_taken_where_there_is_less(engine, little):
    much, whole = temporary(2**30, engine=engine)
    less, parts = temporary(little, engine=engine)
    assert whole.tile == 64
    assert parts.tile < 64
    assert parts.bytes[1] < whole.bytes[1]
    assert less < 0.85 * much


def test_explicit_jacobians_keep_to_the_memory():
    """In chunks of units where the mask is not known."""
    chosen = dict.fromkeys(("dense1/kernel", "dense2/kernel"), "jacobian")
    mask = jax.tree.map(jnp.float32, sparse(wide().params, 0.1))
    much, whole = temporary(2**30, forms=chosen, mask=mask)
    less, parts = temporary(2**20, forms=chosen, mask=mask)
    assert [layer.chunks for layer in whole.layers[:2]] == [1, 1]
    assert all(layer.chunks > 1 for layer in parts.layers[:2])
    assert less < 0.1 * much
    assert less < 2 * 2**20


def test_engine_that_fits_is_chosen():
    """A Jacobian that does not fit is no choice, however cheap."""
    x = wide_images(4)
    assert kernels.plan(wide(), wide().params, x, memory=100).engine == "products"


# ---------------------------------------------------------------- the table


def test_printed_plan():
    found = plan(mask=given()["mask"], forms={"conv/kernel": "kept", "head/kernel": "packed"})
    first, second, third, header, *rows = str(found).splitlines()
    assert first == "masked kernel [6, 6, 3, 3], outputs full, upper half only: 1.27 KiB"
    for engine, cost in found.costs:
        assert f"{engine} {cost:.3g}" in second
    assert second.startswith("engine layerwise")
    assert third.startswith("tiles of 6 images")
    assert header.split()[:1] == ["layer"]
    assert len(rows) == 2
    for row, layer in zip(rows, found.layers, strict=True):
        cells = re.split(r"  +", row)
        sizes = f"{layer.positions} × {layer.inputs} × {layer.units}"
        assert cells[:3] == [layer.name, sizes, str(layer.kept)]
        assert cells[3] == f"{layer.form} (width {layer.width})"
        assert cells[4] == ", ".join(f"{form} {cost:.3g}" for form, cost in layer.costs)


def test_printed_plan_of_other_networks():
    def apply(params, x):
        return params["scale"] * jnp.tanh(x @ params["w"])

    params = {"w": jnp.ones((6, 2)), "scale": jnp.ones(2)}
    mask = jax.tree.map(jnp.ones_like, params)
    x = images(0, 3, (6,))
    text = str(kernels.plan(apply, params, x, x, mask=mask, engine="layerwise", outputs=1))
    assert text.startswith("masked kernel [3, 3], outputs 1: 36 B")
    assert text.endswith("by explicit Jacobian: scale")
    assert re.search(r"^w +1 × 6 × 2 +\? +", text, re.MULTILINE)
    text = str(kernels.plan(apply, params, x, engine="products"))
    assert "layer " not in text
    chunked = plan(images(8, 6, (5, 2)), memory=2500, forms=dict.fromkeys(LAYERS, "jacobian"))
    assert re.search(r"jacobian \(\d+ chunks\)", str(chunked))
    assert "computed again for each pair of tiles" in str(chunked)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1.02e+03 B"),
        (1024, "1 KiB"),
        (3 * 2**30, "3 GiB"),
        (2**52, "4.1e+03 TiB"),
    ],
)
def test_bytes_as_people_read_them(count, text):
    assert planning.size(count) == text


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "layer"}, "engine: expected one of auto, .*got 'layer'"),
        ({"outputs": "ful"}, "outputs: .*did you mean 'full'"),
        ({"outputs": 3}, "outputs: .*number of a logit, 0…2, got 3"),
        ({"outputs": -1}, "outputs: .*got -1"),
        ({"outputs": 1.0}, r"outputs: .*got 1\.0"),
        ({"outputs": True}, "outputs: .*got True"),
        ({"batch": 0}, "batch: expected a whole number ≥ 1"),
        ({"memory": 0}, "memory: expected a number"),
        ({"x1": NOTHING}, "images x1: expected a whole number ≥ 1, got 0"),
        ({"x2": NOTHING}, "images x2: expected a whole number ≥ 1, got 0"),
        (
            {"forms": {"mid/kernel": "gram"}},
            "forms: expected layers among conv/kernel, head/kernel",
        ),
        ({"forms": {"head/kernel": "grams"}}, "form of head/kernel: .*did you mean 'gram'"),
        ({"forms": {"head/kernel": "soft"}}, "form of head/kernel: expected one of gram, jacobian"),
        ({"forms": {"conv/kernel": "packed"}, "mask": WHOLE}, "form of conv/kernel: .*got packed"),
        ({"forms": {"head/kernel": "gram"}, "mask": WHOLE}, "form of head/kernel: .*got gram"),
        ({"forms": {"head/kernel": "gram"}, "engine": "products"}, "forms: .*'layerwise'"),
        ({"mask": {"conv": WHOLE["conv"]}}, "mask head/bias: expected a leaf"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        plan(**arguments)


def test_a_kernel_too_large_is_refused_before_it_starts(monkeypatch):
    """With its size and what would help; nothing is computed."""
    x = images(8, 100, (5, 2))
    monkeypatch.setattr(planning, "free_memory", lambda: 100_000)
    sizes = r"kernel \[100, 100, 3, 3\]: expected at most 48\.8 KiB .*got 352 KiB; "
    with pytest.raises(InputError, match=sizes + ".*outputs='trace'.*kernels.probes"):
        kernels.empirical(positions, small().params, x)
    with pytest.raises(InputError, match="fewer images"):
        plan(images(8, 200, (5, 2)), outputs="trace")
    assert plan(x, outputs="trace").shape == (100, 100)
    assert planning.free_memory() == 100_000


def test_free_memory_is_that_of_this_machine():
    assert 2**24 < planning.free_memory() < 2**46


def test_a_plan_for_something_else_is_refused():
    """Other numbers of images, another network, a mask that the plan does not know."""
    mask = given()["mask"]

    def run(found, x1=None, x2=None, **factors):
        x1 = pictures() if x1 is None else x1
        return kernels.empirical(positions, small().params, x1, x2, plan=found, **factors)

    with pytest.raises(InputError, match=r"plan: expected \[6, 6\] images, x2 not given, got \[5"):
        run(plan(), pictures()[:5])
    with pytest.raises(InputError, match=r"plan: expected .*x2 not given, got .*x2 given"):
        run(plan(), pictures(), pictures())
    with pytest.raises(InputError, match=r"plan: expected no mask.*got a mask"):
        run(plan(), **given())
    with pytest.raises(InputError, match=r"plan: expected a mask.*got no mask"):
        run(plan(mask=mask))
    with pytest.raises(InputError, match=r"plan: expected a mask.*got no mask"):
        run(plan(mask=mask), jacobian="full", **given())
    packed = plan(mask=mask, forms={"head/kernel": "packed"})
    with pytest.raises(InputError, match=r"mask: expected booleans known beforehand.*head/kernel"):
        jax.jit(lambda m: run(packed, mask=m))(mask)
    with pytest.raises(InputError, match=r"plan: expected layers .*\(5, 7, 4\), \(1, 21, 3\)"):
        kernels.empirical(wide(), wide().params, wide_images(6), plan=plan(engine="layerwise"))


def test_a_plan_for_another_mask_of_its_size_gives_that_masks_kernel():
    """Rows are packed anew from the mask that is given."""
    other = jax.tree.map(lambda m: ~m, given()["mask"])
    for chosen in ("packed", "kept"):
        found = plan(mask=given()["mask"], forms={"conv/kernel": "kept", "head/kernel": chosen})
        kernel = kernels.empirical(small(), small().params, pictures(), mask=other, plan=found)
        wanted = kernels.empirical(
            small(), small().params, pictures(), mask=other, engine="products"
        )
        np.testing.assert_allclose(kernel, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_masks_that_keep_as_much_in_each_unit_need_no_empty_rows():
    """Their selections have equal shapes, and the kernel is the same with and without padding."""
    mask, x = sparse(wide().params, 0.2), wide_images(3)
    turned = jax.tree.map(lambda m: m[::-1] if m.ndim > 1 else m, mask)
    found = kernels.plan(wide(), wide().params, x, mask=mask, forms={"dense1/kernel": "packed"})

    def selected(mask, padded):
        return kernels.selection(found, wide(), wide().params, x, mask, padded=padded)

    exact, padded = selected(turned, False), selected(turned, True)
    assert exact[0].valid.any(axis=1).all()
    assert not padded[0].valid.any(axis=1).all()
    assert jax.tree.map(np.shape, exact) == jax.tree.map(np.shape, selected(mask, False))

    @jax.jit
    def kernel(mask, entries):
        return kernels.empirical(wide(), wide().params, x, mask=mask, plan=found, selection=entries)

    wanted = kernels.empirical(wide(), wide().params, x, mask=turned, engine="products")
    for entries in (exact, padded):
        np.testing.assert_allclose(
            kernel(turned, entries), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max())
        )
    for wrong in (selected(mask, False), selected(mask, True)):  # the other mask's rows
        assert np.abs(kernel(turned, wrong) - wanted).max() > 1e-2 * wanted.max()


def test_plans_that_compute_the_same_are_equal():
    """What it cost to choose them does not count: jit compiles once for them."""
    found = plan(mask=given()["mask"])
    head = replace(found.layers[1], costs=(), kept=1)
    same = replace(found, costs=(), bytes=(0, 0), layers=(found.layers[0], head))
    assert same == found
    assert hash(same) == hash(found)
    other = replace(found, layers=(found.layers[0], replace(head, form="kept")))
    assert found.layers[1].form != "kept"
    assert other != found


# ---------------------------------------------------------------- wrong plans


def test_wrong_tables_are_told_apart():
    """What the checks above rest on fails for a plan that chose the dearest form."""
    found = plan(mask=given()["mask"])
    head = found.layers[1]
    worst = max(head.costs, key=lambda entry: entry[1])[0]
    wrong = replace(found, layers=(found.layers[0], replace(head, form=worst)))
    costs = dict(wrong.layers[1].costs)
    assert costs[wrong.layers[1].form] != min(costs.values())
    assert str(wrong) != str(found)


def test_matrix_of_a_mask_is_in_the_order_of_the_rows():
    """[inputs, units]: inputs of a convolution are window × channel, the bias the last."""
    traced = program.trace(positions, small().params, pictures())
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(given()["mask"])]
    conv, head = (planning.matrix(traced, site, leaves) for site in traced.sites)
    for found, name, inputs in ((conv, "conv", 6), (head, "head", 20)):
        mask = given()["mask"][name]
        assert np.array_equal(found[:-1], mask["kernel"].reshape(inputs, -1))
        assert np.array_equal(found[-1], mask["bias"])
