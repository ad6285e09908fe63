"""Masks against NumPy written from their definitions: allocation, selection, gain, files."""

import itertools
import re
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_awt import masks
from ntk_awt.errors import InputError
from ntk_awt.masks import Ticket, allocate, energy_gain, load_ticket, save_ticket, top_k
from ntk_awt.network import density as kept_share

Shape = tuple[int, ...]

SHAPES: dict[str, Shape] = {"conv": (3, 3, 2, 8), "dense1": (50, 30), "dense2": (30, 4)}
"""Kernels of a small network; each has a bias as well."""


def normal_params(seed: int, shapes: dict[str, Shape] = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: {
            "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
        }
        for name, shape in shapes.items()
    }


def random_ticket(seed: int = 0) -> Ticket:
    params = normal_params(seed)
    scores = masks.random_scores(jax.random.key(seed), params)
    mask = masks.make(scores, 0.3, "erk")
    return Ticket(params, mask, energy_gain(params, mask))


def assert_same(actual: Any, expected: Any) -> None:
    """Same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


# ---------------------------------------------------------------- allocation


def scaled(rates: Sequence[float], sizes: Sequence[int], total: int) -> np.ndarray:
    """size·min(1, s·rate) with the s that gives `total`, by bisection."""
    rate, size = np.asarray(rates, float), np.asarray(sizes, float)
    low, high = 0.0, 1 / rate.min()
    for _ in range(200):
        middle = (low + high) / 2
        if (size * np.minimum(1, middle * rate)).sum() < total:
            low = middle
        else:
            high = middle
    return size * np.minimum(1, high * rate)


def rates_of(shapes: Sequence[Shape], method: str) -> list[float]:
    """Density of each layer up to a common factor."""
    if method == "uniform":
        return [1.0] * len(shapes)
    return [float(np.sum(shape) / np.prod(shape)) for shape in shapes]


def nearest(ideal: np.ndarray, sizes: Sequence[int], total: int) -> float:
    """Least squared distance to `ideal` of whole counts in [1, size] that sum to `total`."""
    ranges = [range(1, size + 1) for size in sizes[:-1]]
    return min(
        float(np.sum((np.array([*first, last]) - ideal) ** 2))
        for first in itertools.product(*ranges)
        if 1 <= (last := total - sum(first)) <= sizes[-1]
    )


axes = st.integers(1, 24)
kernel_shapes = st.tuples(axes, axes) | st.tuples(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)
)
densities = st.floats(0.01, 1.0)


def tree_of(shapes: Sequence[Shape]) -> dict[str, Any]:
    return {
        f"layer{i:02}": {"bias": np.zeros(shape[-1]), "kernel": np.zeros(shape)}
        for i, shape in enumerate(shapes)
    }


def kernel_counts(counts: Any) -> list[int]:
    return [layer["kernel"] for layer in counts.values()]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(kernel_shapes, min_size=1, max_size=6), densities, st.sampled_from(["uniform", "erk"])
)
def test_allocation_matches_bisection(shapes: list[Shape], density: float, method: str):
    scores = tree_of(shapes)
    sizes = [int(np.prod(shape)) for shape in shapes]
    total = round(density * sum(sizes))
    if total < len(sizes):
        with pytest.raises(InputError, match="one weight in each layer"):
            allocate(scores, density, method)
        return
    counts = allocate(scores, density, method)
    kept = kernel_counts(counts)
    assert sum(kept) == total
    assert all(type(count) is int for count in kept)
    assert all(1 <= count <= size for count, size in zip(kept, sizes, strict=True))
    assert [layer["bias"] for layer in counts.values()] == [shape[-1] for shape in shapes]
    ideal = scaled(rates_of(shapes, method), sizes, total)
    if ideal.min() >= 1:  # else one weight in an empty layer costs the others more than rounding
        assert np.abs(kept - ideal).max() < 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3),
    st.floats(0.05, 1.0),
    st.sampled_from(["uniform", "erk"]),
)
def test_rounding_is_nearest(shapes: list[Shape], density: float, method: str):
    sizes = [int(np.prod(shape)) for shape in shapes]
    total = round(density * sum(sizes))
    if total < len(sizes):
        return
    ideal = scaled(rates_of(shapes, method), sizes, total)
    kept = kernel_counts(allocate(tree_of(shapes), density, method))
    assert np.sum((kept - ideal) ** 2) == pytest.approx(nearest(ideal, sizes, total), abs=1e-6)


def test_erk_by_hand():
    """Window, in and out axes all count, and a small layer is capped at density 1."""
    shapes = [(5, 5, 2, 10), (40, 20), (2, 2)]
    # rates 22/500, 60/800, 4/4: the last layer is full, and s = (230 − 4) / (22 + 60).
    s = Fraction(230 - 4, 22 + 60)
    ideal = [22 * s, 60 * s, Fraction(4)]
    kept = kernel_counts(allocate(tree_of(shapes), 230 / 1304, "erk"))
    assert kept == [61, 165, 4]
    assert all(abs(a - b) < 1 for a, b in zip(kept, ideal, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    # A few shapes only, since `top_k` is compiled for each.
    st.lists(st.sampled_from([(1, 1), (7, 3), (3, 3, 2, 4)]), min_size=1, max_size=5),
    densities,
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_global_matches_brute_force(shapes: list[Shape], density: float, levels: int, seed: int):
    """Few distinct scores, so that the last kept one is often tied within and between layers."""
    rng = np.random.default_rng(seed)
    scores = {
        f"layer{i:02}": {
            "bias": np.full(shape[-1], 100.0, np.float32),
            "kernel": rng.integers(levels, size=shape).astype(np.float32),
        }
        for i, shape in enumerate(shapes)
    }
    size = sum(int(np.prod(shape)) for shape in shapes)
    total = round(density * size)
    if total < len(shapes):
        return
    entries = [
        (-float(score), name, index)
        for name, layer in scores.items()
        for index, score in enumerate(layer["kernel"].ravel())
    ]
    best = sorted(entries)[:total]  # by score, then first layer, then first in memory
    mask = masks.make(scores, density, "global")
    counts = allocate(scores, density, "global")
    for name, layer in scores.items():
        expected = np.zeros(layer["kernel"].size, bool)
        expected[[index for _, other, index in best if other == name]] = True
        assert counts[name]["kernel"] == expected.sum()
        np.testing.assert_array_equal(np.ravel(mask[name]["kernel"]), expected)
        assert np.all(mask[name]["bias"])


@pytest.mark.parametrize("method", masks.ALLOCATIONS)
@pytest.mark.parametrize("density", [0.05, 1 / 3, 0.9, 1.0])
def test_mask_has_exactly_the_density(method: str, density: float):
    params = normal_params(1)
    mask = masks.make(masks.magnitude_scores(params), density, method)
    kernels = [np.asarray(layer["kernel"]) for layer in mask.values()]
    size = sum(m.size for m in kernels)
    assert sum(m.sum() for m in kernels) == round(density * size)
    assert kept_share(mask) == pytest.approx(round(density * size) / size, abs=1e-12)
    assert all(np.all(layer["bias"]) for layer in mask.values())
    assert all(m.dtype == bool for m in jax.tree.leaves(mask))


@pytest.mark.parametrize(
    ("density", "method", "message"),
    [
        (0.0, "erk", r"density: expected a number in \(0, 1\], got 0"),
        (1.1, "erk", r"density: expected a number in \(0, 1\], got 1.1"),
        (float("nan"), "erk", "density: expected a number"),
        (0.0005, "uniform", r"density: expected at least 0.001[78] \(one weight in each layer\)"),
        (0.5, "ekr", "allocation: expected one of erk, global, uniform, got 'ekr'; did you mean"),
    ],
)
def test_allocation_rejects(density: float, method: str, message: str):
    with pytest.raises(InputError, match=message):
        allocate(normal_params(0), density, method)


def test_suggested_density_is_accepted():
    scores = [np.zeros((4, 24))] * 13 + [np.zeros((10, 10))]  # 14 of 1348 entries: 0.010386
    with pytest.raises(InputError) as caught:
        allocate(scores, 0.0001, "erk")
    found = re.search(r"at least ([0-9.e-]+) ", str(caught.value))
    assert found
    allocate(scores, float(found[1]), "erk")


@pytest.mark.parametrize(
    "method",
    [
        "uniform",
        "erk",
        "global",
    ],
)
def test_nothing_to_prune(method: str):
    assert allocate({"bias": np.zeros(3)}, 0.5, method) == {"bias": 3}


# ---------------------------------------------------------------- selection


def first_of_the_highest(score: np.ndarray, count: int) -> np.ndarray:
    """The slow definition: take the highest remaining score, first in memory, `count` times."""
    left = [float(s) for s in score.ravel()]
    kept = np.zeros(len(left), bool)
    for _ in range(count):
        index = left.index(max(left))
        kept[index], left[index] = True, -np.inf
    return kept.reshape(score.shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.data())
def test_top_k_with_ties(seed: int, levels: int, data: st.DataObject):
    score = np.random.default_rng(seed).integers(-levels, levels, size=(6, 5)).astype(np.float32)
    count = data.draw(st.integers(0, score.size))
    expected = first_of_the_highest(score, count)
    np.testing.assert_array_equal(top_k(score, count), expected)
    np.testing.assert_array_equal(jax.jit(top_k)(score, count), expected)  # a traced count


def by_threshold(scores: Any, counts: Any) -> Any:
    """The usual shortcut, which keeps too many where scores are equal."""

    def select(score: Any, count: int) -> Any:
        return score >= np.sort(np.ravel(score))[::-1][count - 1]

    return jax.tree.map(select, scores, counts)


def keeps_the_number(select: Callable[[Any, Any], Any]) -> bool:
    """Whether `select` keeps as many equal scores as it is told to."""
    return int(np.sum(select(np.zeros((4, 4)), 5))) == 5


def test_number_kept_is_exact_with_ties():
    assert keeps_the_number(top_k)
    assert not keeps_the_number(by_threshold)


def test_ties_keep_the_first_in_memory():
    score = np.array([[1.0, 2.0, 2.0], [2.0, 0.0, 2.0]])
    expected = [[False, True, True], [True, False, False]]
    assert top_k(score, 3).tolist() == expected
    # Memory order of the leaf as an array, not of a transposed view.
    assert top_k(np.asfortranarray(score), 3).tolist() == expected
    zeros = jnp.array([[-0.0, 0.0, -0.0, 0.0]])
    assert top_k(zeros, 2).tolist() == [[True, True, False, False]]


def test_random_scores():
    params = normal_params(0, {"one": (40, 50), "two": (40, 50)})
    scores = masks.random_scores(jax.random.key(3), params)
    assert_same(scores, masks.random_scores(jax.random.key(3), params))
    assert jax.tree.map(jnp.shape, scores) == jax.tree.map(jnp.shape, params)
    one, two = (np.ravel(scores[name]["kernel"]) for name in ("one", "two"))
    n = one.size
    assert abs(np.corrcoef(one, two)[0, 1]) < 4.5 / np.sqrt(n)
    for drawn in (one, two):
        assert abs(drawn.mean() - 0.5) < 4.5 * np.sqrt(1 / 12 / n)
        assert len(np.unique(drawn)) > 0.99 * n


def test_every_entry_is_equally_likely():
    """Each entry of a random mask is kept with probability p; worst of all entries, 5 σ."""
    params = jnp.zeros((6, 5))
    draws, count = 2000, 9

    @jax.vmap
    def draw(key: jax.Array) -> Any:
        return top_k(masks.random_scores(key, params), count)

    rate = np.mean(draw(jax.random.split(jax.random.key(0), draws)), axis=0)
    p = count / 30
    assert np.abs(rate - p).max() < 5 * np.sqrt(p * (1 - p) / draws)


def test_make_rejects_scores_that_are_not_finite():
    scores: Any = normal_params(0)
    scores["dense1"]["kernel"] = scores["dense1"]["kernel"].at[2, 3].set(jnp.nan)
    with pytest.raises(InputError, match="scores dense1/kernel: expected finite values, got 1 of"):
        masks.make(scores, 0.5, "erk")


# ---------------------------------------------------------------- gain


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["random", "magnitude"])
def test_energy_is_preserved(kind: str, density: float):
    params = normal_params(4)
    random = masks.random_scores(jax.random.key(5), params)
    scores = random if kind == "random" else masks.magnitude_scores(params)
    mask = masks.make(scores, density, "uniform")
    gain = energy_gain(params, mask)
    for name, layer in params.items():
        w = np.asarray(layer["kernel"], np.float64)
        kept = float(gain[name]["kernel"]) * np.asarray(mask[name]["kernel"]) * w
        assert np.linalg.norm(kept) == pytest.approx(np.linalg.norm(w), rel=1e-6)
        assert float(gain[name]["bias"]) == 1
        assert np.shape(gain[name]["kernel"]) == ()
        p = float(np.mean(mask[name]["kernel"]))
        ratio = float(gain[name]["kernel"]) * np.sqrt(p)
        if density == 1:
            assert ratio == pytest.approx(1, rel=1e-6)
        elif kind == "random":
            # γ²p = Σw²p / Σmw²; the spread of Σmw²/(pΣw²) is √(2(1−p)/(p·n)) for normal weights.
            spread = np.sqrt(2 * (1 - p) / (p * w.size))
            assert abs(1 / ratio**2 - 1) < 5 * spread
        else:
            assert ratio < 0.8


def test_gain_of_an_empty_layer_is_refused():
    params = normal_params(0)
    mask: Any = masks.ones(params)
    mask["dense2"]["kernel"] = jnp.zeros((30, 4), bool)
    with pytest.raises(InputError, match="mask dense2/kernel: expected at least one kept weight"):
        energy_gain(params, mask)


def test_unit_gain_and_full_mask_change_nothing():
    params = normal_params(0)
    ones = masks.ones(params)
    assert kept_share(ones) == 1
    assert_same(masks.effective(params, ones, masks.unit_gain(params)), params)


# ---------------------------------------------------------------- masked networks


def small_network(params: Any, x: Any) -> Any:
    """One convolution and two dense layers, smooth, written by hand."""
    y = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jnp.tanh(y + params["conv"]["bias"]).reshape(len(x), -1)[:, :50]
    y = jnp.tanh(y @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    return y @ params["dense2"]["kernel"] + params["dense2"]["bias"]


def test_masked_network_and_its_gradient():
    ticket = random_ticket(7)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), ticket.params)
        gain = jax.tree.map(lambda g: jnp.asarray(g, jnp.float64), ticket.gain)
        x = jnp.asarray(np.random.default_rng(8).normal(size=(3, 6, 6, 2)))
        network = masks.masked(small_network, ticket.mask, gain)

        product = jax.tree.map(
            lambda w, m, g: np.asarray(w) * np.asarray(m) * float(g), params, ticket.mask, gain
        )

        def run(apply: Any, weights: Any) -> tuple[Any, Any]:
            """Gradient of a loss, and the logits."""

            def loss(weights: Any) -> tuple[jax.Array, jax.Array]:
                y = apply(weights, x)
                return jnp.sum(y**2), y

            return jax.jit(jax.grad(loss, has_aux=True))(weights)

        actual, y = run(network, params)
        outer, expected = run(small_network, product)
    np.testing.assert_allclose(y, expected, rtol=1e-12)

    def compare(d: Any, m: Any, g: Any, inner: Any) -> None:
        m = np.asarray(m)
        assert np.all(np.asarray(d)[~m] == 0)
        assert np.all(np.asarray(inner)[~m] != 0) or m.all()  # else the zeros would show nothing
        np.testing.assert_allclose(d, float(g) * m * np.asarray(inner), rtol=1e-12)

    jax.tree.map(compare, actual, ticket.mask, gain, outer)


def test_effective_weights_keep_their_type():
    params = {"kernel": jnp.full((2, 2), 3.0, jnp.float16)}
    mask = {"kernel": jnp.array([[True, False], [True, True]])}
    kept = masks.effective(params, mask, {"kernel": jnp.float32(2.0)})
    assert kept["kernel"].dtype == jnp.float16
    assert kept["kernel"].tolist() == [[6, 0], [6, 6]]


# ---------------------------------------------------------------- statistics


def test_statistics_by_hand():
    conv = np.zeros((2, 2, 3, 4), bool)
    conv[0, 1, 0, 0] = conv[1, 1, 0, 3] = conv[0, 0, 2, 3] = True  # input 1, outputs 1, 2 are dead
    dense = np.array([[1, 0], [0, 0], [1, 0]], bool)  # input 1, output 1 are dead
    mask = {
        "conv": {"bias": np.ones(4, bool), "kernel": conv},
        "dense": {"bias": np.ones(2, bool), "kernel": dense},
    }
    gain = {"conv": {"bias": 1.0, "kernel": 4.0}, "dense": {"bias": 1.0, "kernel": 1.5}}
    assert masks.statistics(mask, gain) == [
        masks.LayerStatistics("conv/kernel", (2, 2, 3, 4), 48, 3, 3 / 48, 4.0, 1, 2),
        masks.LayerStatistics("dense/kernel", (3, 2), 6, 2, 2 / 6, 1.5, 1, 1),
    ]
    assert kept_share(mask) == pytest.approx(5 / 54)
    full = masks.statistics(masks.ones(mask), gain)
    assert [(row.dead_inputs, row.dead_outputs, row.density) for row in full] == [(0, 0, 1.0)] * 2


# ---------------------------------------------------------------- files


def test_ticket_round_trip(tmp_path: Path):
    ticket = random_ticket()
    path = tmp_path / "new" / "folder" / "ticket.safetensors"
    save_ticket(ticket, path, {"digest": "0123abcd", "note": "γ"})
    assert_same(load_ticket(path, ticket.params), ticket)
    shapes = jax.eval_shape(lambda: ticket.params)
    assert_same(load_ticket(path, shapes), ticket)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"digest": "0123abcd", "note": "γ"}
        assert "mask/dense1/kernel" in file.keys()  # noqa: SIM118
    assert [p.name for p in path.parent.iterdir()] == ["ticket.safetensors"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(axes, axes), min_size=1, max_size=3),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(0, 2**32 - 1),
)
def test_any_ticket_survives_a_file(shapes: list[Shape], dtype: str, seed: int):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    mask = [jnp.asarray(rng.random(shape) < 0.5) for shape in shapes]
    ticket = Ticket(params, mask, masks.unit_gain(params))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket"
        save_ticket(ticket, path)
        assert_same(load_ticket(path, params), ticket)


def test_transposed_weights_survive_a_file(tmp_path: Path):
    params = {"kernel": np.arange(6, dtype=np.float32).reshape(3, 2).T}
    ticket = masks.dense(params)
    save_ticket(ticket, tmp_path / "ticket")
    loaded = load_ticket(tmp_path / "ticket", params).params["kernel"]
    np.testing.assert_array_equal(loaded, params["kernel"])


def drop(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        del arrays[name]

    return change


def put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = value

    return change


def spoil(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].flat[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("params/dense1/kernel"),
            r"params dense1/kernel: expected a leaf of shape \(50, 30\), got no leaf",
        ),
        (drop("mask/conv/bias"), r"mask conv/bias: expected a leaf of shape \(8,\), got no leaf"),
        (
            drop("gain/dense2/kernel"),
            r"gain dense2/kernel: expected a leaf of shape \(\), got no leaf",
        ),
        (
            put("params/dense3/kernel", np.ones((2, 2), np.float32)),
            r"params dense3/kernel: expected only the leaves .*, got one more",
        ),
        (
            put("mask/conv/extra", np.ones(3, bool)),
            r"mask conv/extra: expected only the leaves .*, got one more",
        ),
        (
            put("mask/dense1/kernel", np.ones((30, 50), bool)),
            r"mask dense1/kernel: expected shape \(50, 30\), got shape \(30, 50\)",
        ),
        (
            put("gain/conv/kernel", np.ones(8, np.float32)),
            r"gain conv/kernel: expected shape \(\), got shape \(8,\)",
        ),
        (
            put("mask/dense2/kernel", np.ones((30, 4), np.float32)),
            r"mask dense2/kernel: expected booleans, got dtype float32",
        ),
        (
            spoil("params/dense2/kernel", np.nan),
            r"params dense2/kernel: expected finite values, got 1 of 120 NaN or infinite",
        ),
        (
            put("gain/conv/kernel", np.array(np.inf, np.float32)),
            r"gain conv/kernel: expected finite values, got 1 of 1 NaN or infinite",
        ),
        (put("masks/conv/kernel", np.ones(3, bool)), r"masks/conv/kernel"),
    ],
)
def test_bad_ticket_is_named(tmp_path: Path, change: Callable[[Any], None], message: str):
    ticket = random_ticket()
    path = tmp_path / "some.safetensors"
    save_ticket(ticket, path)
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(InputError, match=rf"ticket .*some\.safetensors: {message}"):
        load_ticket(path, ticket.params)


@pytest.mark.parametrize("content", [None, b"", b"not a ticket at all", b"\x08" + b"\0" * 7 + b"{"])
def test_file_that_is_no_ticket(tmp_path: Path, content: bytes | None):
    path = tmp_path / "some.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"ticket .*some\.safetensors: expected a safetensors fil"):
        load_ticket(path, normal_params(0))


def test_truncated_ticket(tmp_path: Path):
    ticket = random_ticket()
    path = tmp_path / "some.safetensors"
    save_ticket(ticket, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"ticket .*some\.safetensors: expected a safetensors fil"):
        load_ticket(path, ticket.params)


def test_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, new = random_ticket(0), random_ticket(1)
    path = tmp_path / "ticket.safetensors"
    save_ticket(old, path)

    def interrupted(partial: Path, content: bytes) -> None:
        partial.write_text("half of")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_ticket(new, path)
        assert_same(load_ticket(path, old.params), old)
    save_ticket(new, path)
    assert_same(load_ticket(path, new.params), new)
