"""Estimates from kernel-vector products against explicit float64 kernels, over many draws."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels, masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError
from ntk_awt.kernels import probes
from ntk_awt.network import Network
from tests.keys import key_of
from tests.quick import quick

SLOW = (
    "test_means_over_many_draws_are_exact [cw]*",
    "test_intervals_cover_nine_times_in_ten [cw]*",
    "test_gradients_are_finite_where_nothing_is_left",
    "test_memory_is_that_of_a_batch_and_of_the_vectors *",
    "test_products_are_those_with_the_explicit_kernel mlp-dense",
    "test_with_as_many_vectors_as_rows_the_values_are_exact mixed",
    "test_a_sketch_that_captures_everything_leaves_rounding [03]",
    "test_ritz_values_lie_within_their_residuals [12]",
    "test_eigenvalues_of_kernels_of_any_rank [03]-*",
    "test_estimates_of_networks_cover_the_exact_values",
    "test_a_wrong_transposed_product_is_caught",
    "test_products_are_those_with_the_explicit_kernel mlp-real",
    "test_means_over_many_draws_are_exact symmetric",
    "test_intervals_cover_nine_times_in_ten symmetric",
    "test_means_over_many_draws_are_exact mlp",
    "test_ritz_values_lie_within_their_residuals 4",
)

IMAGE = (6, 6, 1)
CLASSES = 2

# ---------------------------------------------------------------- networks and their kernels


def mlp():
    config = ModelConfig(name="mlp", widths=(7, 5), activation="gelu")
    return models.build(config, IMAGE, CLASSES, jax.random.key(1))


def cnn():
    """One convolution, pooling, one dense layer."""
    from flax import nnx

    config = ModelConfig(activation="tanh", parametrization="standard")
    return Network.from_nnx(
        models.Classifier(IMAGE, CLASSES, config, blocks=((4,),), hidden=(), rngs=nnx.Rngs(3))
    )


NETWORKS = {"mlp": mlp, "cnn": cnn}


def images(seed, n):
    return jax.random.uniform(jax.random.key(seed), (n, *IMAGE))


def no_mask(params):
    return {}


def ticket(params):
    mask = masks.make(masks.random_scores(jax.random.key(5), params), 0.3, "erk")
    return {"mask": mask, "gain": masks.energy_gain(params, mask)}


def soft(params):
    """Numbers in place of booleans, of both signs, and gains that are not 1."""
    scores = masks.random_scores(jax.random.key(6), params)
    mask = jax.tree.map(lambda s: 2 * s - 0.7, scores)
    return {"mask": mask, "gain": jax.tree.map(lambda s: 1 + jnp.mean(s), scores)}


SPARSE = {"dense": no_mask, "boolean": ticket, "real": soft}


def doubled(tree):
    """Numbers in float64; booleans as they are."""

    def cast(a):
        return jnp.asarray(np.asarray(a) if a.dtype == bool else np.asarray(a, np.float64))

    return jax.tree.map(cast, tree)


def explicit(apply, params, x1, x2, mask=None, gain=None):
    """Θ [n1·c, n2·c] by the definition: the Jacobian of θ ↦ f(x; γ⊙m⊙θ), written out."""

    def network(w, x):
        if mask is not None:
            scale = jax.tree.map(jnp.ones_like, w) if gain is None else gain
            w = jax.tree.map(lambda w, m, g: w * m * g, w, mask, scale)
        return apply(w, x).ravel()

    def jacobian(x):
        leaves = jax.tree.leaves(jax.jacrev(network)(params, x))
        return jnp.concatenate([j.reshape(j.shape[0], -1) for j in leaves], axis=1)

    return jacobian(x1) @ jacobian(x2).T


def exact(net, x1, x2, **sparse):
    with jax.enable_x64(True):
        x1, x2, params, sparse = (doubled(a) for a in (x1, x2, net.params, sparse))
        return np.asarray(quick(partial(explicit, net.apply))(params, x1, x2, **sparse))


def agree(found, expected, tolerance=2e-5):
    """Equal up to float32 rounding: each entry is a sum of P products, so ~√P·2⁻²⁴ of its scale."""
    return np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


# ---------------------------------------------------------------- products


@pytest.mark.parametrize(
    ("name", "sparse"), [("mlp", "dense"), ("mlp", "real"), ("cnn", "boolean")]
)
def test_products_are_those_with_the_explicit_kernel(name, sparse):
    net, x1, x2 = NETWORKS[name](), images(0, 3), images(1, 5)
    options = SPARSE[sparse](net.params)
    expected = exact(net, x1, x2, **options)

    @quick
    def both(params, options):
        mixed = probes.kernel_product(net.apply, params, x1, x2, batch=2, **options)
        assert (mixed.rows, mixed.columns, mixed.dtype) == ((3, 2), (5, 2), jnp.float32)
        assert not mixed.symmetric
        units = jnp.eye(6).reshape(6, 3, 2)
        return [
            jax.vmap(mixed)(jnp.eye(10).reshape(10, 5, 2)).reshape(10, 6).T,
            jax.vmap(mixed.transposed)(units).reshape(6, 10),
        ]

    for matrix in both(net.params, options):
        assert agree(matrix, expected)
    engine = kernels.empirical(net.apply, net.params, x1, x2, **options)
    assert agree(kernels.flatten(engine), expected)
    if options:
        weights = masks.effective(net.params, options["mask"], options["gain"])
        assert not agree(exact(net.replace(params=weights), x1, x2), expected)  # without γ⊙m


def test_the_batch_does_not_change_the_values():
    """Nor does what is left out: x2 is x1, and the gain of a mask is 1."""
    net, x = mlp(), images(0, 7)
    mask = ticket(net.params)["mask"]
    expected = exact(net, x, x, mask=mask)

    @quick
    def matrices(units):
        found = []
        for batch in (None, 1, 3, 4, 100):
            product = probes.kernel_product(net, net.params, x, mask=mask, batch=batch)
            assert product.symmetric
            found.append(jax.vmap(product)(units).reshape(14, 14))
        return found

    for matrix in matrices(jnp.eye(14).reshape(14, 7, 2)):
        assert agree(matrix, expected, 2e-6)


# ---------------------------------------------------------------- matrices as kernels


def by_hand(matrix, transposed=None, symmetric=False):
    """A matrix [n1·c, n2·c] as a product."""
    rows, others = (size // CLASSES for size in matrix.shape)

    def times(a):
        return lambda v: (jnp.asarray(a) @ v.ravel()).reshape(-1, CLASSES)

    forward = times(matrix)
    back = forward if symmetric else times(matrix.T if transposed is None else transposed)
    dtype = jnp.asarray(matrix).dtype
    return probes.Product(forward, back, (rows, CLASSES), (others, CLASSES), dtype, vectors=3)


@cache
def network_pair(name):
    """Kernels of a dense network and of its ticket on 12 images."""
    net, x = NETWORKS[name](), images(2, 12)
    return exact(net, x, x), exact(net, x, x, **ticket(net.params))


@cache
def pair(kind):
    """Two kernels [24, 24 or 16] of about the same dominating directions, in float64."""
    if kind in NETWORKS:
        return network_pair(kind)
    rng = np.random.default_rng(1)
    scales = np.arange(1, 61.0) ** -0.7
    j1, j2 = rng.normal(size=(2, 24, 60)) * scales + 0.3 * rng.normal(size=60) * scales
    drop = rng.uniform(0.5, 1.5, size=60)
    if kind == "symmetric":
        return j1 @ j1.T, (j1 * drop) @ (j1 * drop).T
    j2 = j2[: {"mixed": 24, "wide": 16}[kind]]
    return j1 @ j2.T, (j1 * drop) @ (j2 * drop).T


KINDS = ("symmetric", "mixed", "wide", "mlp", "cnn")
Y = np.random.default_rng(2).normal(size=(12, CLASSES))


def cosine(a, b):
    return np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2))


ESTIMATES: dict[str, Any] = {
    "squared_norm": (
        lambda a, b, key, **k: probes.squared_norm(a, key, **k),
        lambda a, b: np.sum(a**2),
    ),
    "squared_distance": (probes.squared_distance, lambda a, b: np.sum((a - b) ** 2)),
    "inner_product": (probes.inner_product, lambda a, b: np.sum(a * b)),
    "trace": (lambda a, b, key, **k: probes.trace(a, key, **k), lambda a, b: np.trace(a)),
    "relative_squared_distance": (
        probes.relative_squared_distance,
        lambda a, b: np.sum((a - b) ** 2) / np.sum(a**2),
    ),
    "alignment": (probes.alignment, cosine),
    "label_alignment": (
        lambda a, b, key, **k: probes.label_alignment(a, jnp.asarray(Y), key, **k),
        lambda a, b: cosine(a, np.outer(Y, Y)),
    ),
}
"""Name: the estimate from two products, and what it estimates."""

UNBIASED = ("squared_norm", "squared_distance", "inner_product", "trace")


def truth(name, a, b):
    return ESTIMATES[name][1](np.float64(a), np.float64(b))


@cache
def sampler(names, transposed, settings):
    """Estimates of the names for each key, of any two matrices."""

    def one(a, b, key):
        first, second = (by_hand(m, m if transposed == "wrong" else None) for m in (a, b))
        return {n: ESTIMATES[n][0](first, second, key, **dict(settings)) for n in names}

    return quick(jax.vmap(one, in_axes=(None, None, 0)))


def draws(a, b, count, names=tuple(ESTIMATES), transposed="right", **settings):
    keys = jax.random.split(key_of(0), count)
    return sampler(names, transposed, tuple(settings.items()))(a, b, keys)


@cache
def sample(kind):
    """1000 draws of every estimate with the default numbers of vectors, in float64."""
    with jax.enable_x64(True):
        names = ("squared_distance",) if kind == "wide" else tuple(ESTIMATES)
        found = draws(*pair(kind), 1000, names=names)
        return jax.tree.map(lambda a: np.asarray(a, np.float64), found)


def z_score(values, expected):
    """Distance of the mean from what is expected, in its standard errors."""
    values = np.asarray(values, np.float64)
    return abs(values.mean() - expected) / (values.std(ddof=1) / np.sqrt(len(values)))


def coverage(estimates, expected):
    """Share of the 95 % intervals that contain what is expected."""
    with jax.enable_x64(True):
        low, high = jax.tree.map(jnp.asarray, estimates).interval(0.95)
    return np.mean((np.asarray(low) <= expected) & (expected <= np.asarray(high)))


def caution(name, a, b, draws=400):
    """Squared standard error over variance that is to be expected, by hand.

    Probes ±1 have the variance 2(‖M‖² − Σ_i M_ii²)/m about the quadratic form of M (symmetric) that
    they estimate; the standard error takes it as 2‖M‖²/m, since only M's forms are seen.
    """
    rng, above, below = np.random.default_rng(0), 0.0, 0.0
    left, right = {
        "squared_norm": (a, a),
        "squared_distance": (a - b, a - b),
        "inner_product": (a, b),
        "trace": (a, a),
    }[name]
    for _ in range(draws):
        columns = rng.standard_normal((a.shape[1], probes.SKETCH))
        seen = [left @ columns, right @ columns] if left is not right else [left @ columns]
        basis, _ = np.linalg.qr(np.concatenate(seen, axis=1))
        rest = np.eye(len(a)) - basis @ basis.T
        form = rest @ a @ rest if name == "trace" else left.T @ rest @ right
        form = (form + form.T) / 2
        above += np.sum(form**2)
        below += np.sum(form**2) - np.sum(np.diag(form) ** 2)
    return above / below


Z = 4.0
"""Largest z-score of an unbiased mean: exceeded by chance with probability 6e-5."""


@pytest.mark.parametrize("kind", KINDS)
def test_means_over_many_draws_are_exact(kind):
    for name in set(UNBIASED) & set(sample(kind)):
        found = sample(kind)[name]
        assert z_score(found.value, truth(name, *pair(kind))) < Z, name
        # A variance of 1000 draws with kurtosis up to 5 errs by 6 %, and four times that at most.
        ratio = np.mean(found.standard_error**2) / np.var(found.value)
        assert 0.76 < ratio / caution(name, *pair(kind)) < 1.24, name


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_cover_nine_times_in_ten(kind):
    for name, found in sample(kind).items():
        expected = truth(name, *pair(kind))
        assert coverage(found, expected) >= 0.9, name
        assert coverage(found._replace(degrees=10**6), expected) < coverage(found, expected), name
        short = found._replace(standard_error=found.standard_error / 2)
        assert coverage(short, expected) < 0.9, name
        # A ratio's bias is of second order: it is far below the standard error.
        assert abs(np.mean(found.value) - expected) < 0.3 * np.mean(found.standard_error), name


def test_probes_that_made_the_sketch_are_caught(monkeypatch):
    def reuse(key, product, sketch, probes):
        vectors = jax.random.normal(key, (sketch, *product.columns), product.dtype)
        return vectors, vectors[:probes]

    monkeypatch.setattr(probes, "_draw", reuse)
    names = ("squared_distance", "trace")
    with jax.enable_x64(True):
        found = draws(*pair("mlp"), 1000, names=names, sketch=8, probes=7)
        for name in names:
            assert z_score(found[name].value, truth(name, *pair("mlp"))) > 2 * Z
            assert coverage(found[name], truth(name, *pair("mlp"))) < 0.5


def test_a_wrong_transposed_product_is_caught():
    names = ("squared_norm",)
    with jax.enable_x64(True):
        found = draws(*pair("mixed"), 1000, names=names, transposed="wrong")
        assert z_score(found["squared_norm"].value, truth(*names, *pair("mixed"))) > 2 * Z


def test_plain_probes_vary_far_more():
    """What the sketch is for: the same number of products without it."""
    a, b = pair("mlp")
    rng = np.random.default_rng(0)
    plain = [
        np.mean(np.sum(((a - b) @ rng.choice([-1.0, 1.0], size=(24, 32))) ** 2, axis=0))
        for _ in range(300)
    ]
    assert np.std(sample("mlp")["squared_distance"].value) < np.std(plain) / 4


@pytest.mark.parametrize("kind", ["symmetric", "mixed"])
def test_with_as_many_vectors_as_rows_the_values_are_exact(kind):
    a, b = pair(kind)
    with jax.enable_x64(True):
        found = draws(a, b, 3, sketch=24, probes=2)
        for name, estimate in found.items():
            expected = truth(name, a, b)
            assert estimate.value.dtype == jnp.float64
            np.testing.assert_allclose(estimate.value, expected, rtol=1e-12, err_msg=name)
            assert (np.asarray(estimate.standard_error) <= 1e-12 * abs(expected)).all(), name
            assert coverage(estimate, expected) == 1, name
        dense, sparse = (jnp.asarray(m.reshape(12, 2, 12, 2).transpose(0, 2, 1, 3)) for m in (a, b))
        measures = {
            "squared_distance": (12 * kernels.kernel_distance(dense, sparse)) ** 2,
            "relative_squared_distance": kernels.relative_kernel_distance(dense, sparse),
            "alignment": 1 - kernels.cosine_kernel_distance(dense, sparse),
            "label_alignment": kernels.label_alignment(dense, jnp.asarray(Y)),
        }
        for name, expected in measures.items():
            assert float(found[name].value[0]) == pytest.approx(float(expected), rel=1e-12), name


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_sketch_that_captures_everything_leaves_rounding(rank):
    """In float32: values finite, errors of the size of rounding, intervals that still cover."""
    j = np.random.default_rng(3).normal(size=(2, 24, rank)).astype(np.float32)
    a, b = (m @ m.T for m in j)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    found = draws(a, b, 30, sketch=8, probes=4)
    for name in UNBIASED if rank == 0 else ESTIMATES:  # the others are 0/0
        assert found[name].value.dtype == jnp.float32
        assert coverage(found[name], truth(name, a, b)) == 1, name
        scale = np.linalg.norm(a) if name == "trace" else size if name in UNBIASED else 1
        assert np.max(found[name].standard_error) <= 1e-5 * scale, name


def test_rounding_of_close_kernels_is_in_the_standard_error():
    """In float32, kernels of rank 3 that differ by 1e-5: products are rounded by 1 % of that."""
    rng = np.random.default_rng(4)
    j = rng.normal(size=(24, 3))
    a, b = (np.float32(m @ m.T) for m in (j, j + 1e-5 * rng.normal(size=(24, 3))))
    found = draws(a, b, 30, sketch=8, probes=4)["squared_distance"]
    expected = truth("squared_distance", a, b)
    assert coverage(found, expected) == 1
    assert np.max(np.abs(found.value - expected)) > 1e-5 * expected  # there is some


# ---------------------------------------------------------------- intervals


def test_interval_is_students():
    estimate = probes.Estimate(jnp.float32(1), jnp.float32(2), 7)
    low, high = estimate.interval(0.9)  # t(0.95; 7) = 1.8946, from tables
    assert float(low) == pytest.approx(1 - 2 * 1.8946, rel=1e-4)
    assert float(high) == pytest.approx(1 + 2 * 1.8946, rel=1e-4)
    inside = quick(lambda v: probes.Estimate(v, v, 7).interval(0.9))(jnp.float32(1))
    assert float(inside[1]) == pytest.approx(2.8946, rel=1e-4)


# ---------------------------------------------------------------- networks, end to end


def test_estimates_of_networks_cover_the_exact_values():
    """In float32, compiled, in batches that do not divide the images, mixed kernels."""
    net, x1, x2 = mlp(), images(0, 9), images(1, 7)
    options = ticket(net.params)
    a, b = exact(net, x1, x2), exact(net, x1, x2, **options)

    @quick
    @jax.vmap
    def both(key):
        product = partial(probes.kernel_product, net.apply, net.params, x1, x2, batch=4)
        dense, sparse = product(), product(**options)
        return (
            probes.squared_distance(dense, sparse, key),
            probes.relative_squared_distance(dense, sparse, key),
        )

    distance, relative = both(jax.random.split(key_of(0), 100))
    expected = np.sum((a - b) ** 2)
    assert coverage(distance, expected) >= 0.9
    assert coverage(relative, expected / np.sum(a**2)) >= 0.9
    unmasked = exact(net.replace(params=masks.effective(net.params, **options)), x1, x2)
    assert coverage(distance, np.sum((a - unmasked) ** 2)) < 0.1  # forgets the factor γ⊙m


# ---------------------------------------------------------------- gradients


def hand(width=4):
    """A network without any library: x [n, 6] to 2 logits."""

    def apply(w, x):
        return jnp.tanh(jnp.tanh(x @ w["in"]) @ w["middle"] + w["bias"]) @ w["out"]

    shapes = {"in": (6, width), "middle": (width, width), "bias": (width,), "out": (width, 2)}
    keys = jax.random.split(jax.random.key(1), 4)
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return Network(apply, params)


def gradient_case():
    """Parameters θ, a real mask and images, and the squared distance, exact and estimated."""
    net = hand()
    variables = doubled(
        {
            "params": net.params,
            "mask": soft(net.params)["mask"],
            "x": jax.random.normal(jax.random.key(2), (4, 6)),
        }
    )
    gain, fixed = doubled(soft(net.params)["gain"]), doubled(net.params)

    def distance(v):
        dense = explicit(net.apply, fixed, v["x"], v["x"])
        sparse = explicit(net.apply, v["params"], v["x"], v["x"], v["mask"], gain)
        return jnp.sum((dense - sparse) ** 2)

    def estimate(v, key, **settings):
        product = partial(probes.kernel_product, net.apply, x1=v["x"], batch=3)
        sparse = product(v["params"], mask=v["mask"], gain=gain)
        return probes.squared_distance(product(fixed), sparse, key, **settings).value

    return variables, distance, estimate


def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


def test_gradients_are_exact_with_a_full_sketch_and_unbiased_with_a_small_one():
    """With respect to parameters, a real-valued mask and the images, at once.

    Unbiased along the exact gradient and along random directions.
    """
    with jax.enable_x64(True):
        variables, distance, estimate = gradient_case()
        expected = flat(quick(jax.grad(distance))(variables))
        from_mask = flat(
            {name: np.full(np.size(flat(v)), name == "mask") for name, v in variables.items()}
        )
        wrong = np.where(from_mask, 0, expected)

        full = partial(estimate, key=key_of(0), sketch=8, probes=2)
        found = flat(quick(jax.grad(full))(variables))
        size = np.linalg.norm(expected)
        assert np.linalg.norm(found - expected) < 1e-11 * size
        assert np.linalg.norm(wrong - expected) > 1e-2 * size

        draw = jax.vmap(jax.grad(partial(estimate, sketch=2, probes=2)), in_axes=(None, 0))
        found = quick(draw)(variables, jax.random.split(key_of(0), 600))
        rows = np.concatenate([a.reshape(600, -1) for a in jax.tree.leaves(found)], axis=1)
        random = np.random.default_rng(0).normal(size=(4, expected.size))
        directions = np.stack([expected, *random])
        assert max(z_score(rows @ d, expected @ d) for d in directions) < Z
        assert max(z_score(rows @ d, wrong @ d) for d in directions) > Z


def test_gradients_are_finite_where_nothing_is_left():
    """A kernel of rank 1: the sketch has dependent columns, and the residual is 0."""

    def values(scale):
        j = scale * jnp.arange(1.0, 25.0)[:, None]
        first, second = by_hand(j @ j.T), by_hand(jnp.eye(24))
        found = [estimate(first, second, key_of(0)) for estimate, _ in ESTIMATES.values()]
        return jnp.stack([f.value + 0 * f.standard_error for f in found])

    assert np.isfinite(quick(jax.jacfwd(values))(1.5)).all()
    assert np.isfinite(quick(jax.grad(lambda s: jnp.sum(values(s))))(1.5)).all()


# ---------------------------------------------------------------- cost


def lowered(function, n) -> Any:
    """A function of (params, images [n, 6], vector or key) as a program, not yet compiled."""
    x = jax.ShapeDtypeStruct((n, 6), jnp.float32)
    return quick(function).lower(hand(64).params, x, key_of(0))


def distance(params, x, key):
    product = partial(probes.kernel_product, hand(64).apply, params, x)
    return probes.squared_distance(product(), product(mask=params), key).value


def test_operations_grow_with_the_number_of_images():
    def ratio(function):
        flops: list[Any] = [lowered(function, n).cost_analysis()["flops"] for n in (100, 200)]
        return flops[1] / flops[0]

    def by_the_kernel(params, x, key):
        return jnp.sum(explicit(hand(64).apply, params, x, x) ** 2)

    assert ratio(distance) == pytest.approx(2, rel=0.02)
    assert ratio(by_the_kernel) > 3


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_that_of_a_batch_and_of_the_vectors(gradient):
    def bytes_an_image(batch):
        def norm(params, x, key):
            product = probes.kernel_product(hand(64).apply, params, x, batch=batch, vectors=2)
            return probes.squared_norm(product, key, sketch=2, probes=2).value

        function = jax.grad(norm) if gradient else norm
        sizes = [
            lowered(function, n).compile().memory_analysis().temp_size_in_bytes for n in (512, 1024)
        ]
        return (sizes[1] - sizes[0]) / 512

    # An image has 6 numbers and each of the 4 vectors 2, before and after the product; with room
    # for one more copy of all. One vector's activations alone are 2·64 numbers an image.
    allowed = 4 * 2 * (6 + 4 * 2 * 2)
    assert bytes_an_image(64) <= allowed < 4 * 128 < bytes_an_image(None)


# ---------------------------------------------------------------- eigenvalues


def check_eigenvalues(found, matrix, slack):
    """Orthonormal vectors, residuals as stated, an eigenvalue in each interval, none overrated."""
    values, residuals, vectors = (np.asarray(a, np.float64) for a in found)
    truth = np.linalg.eigvalsh(matrix)[::-1]
    slack = slack * max(1, np.abs(truth).max())
    rows = vectors.reshape(len(values), -1)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(values)), atol=slack)
    stated = np.linalg.norm(rows @ matrix - values[:, None] * rows, axis=1)
    np.testing.assert_allclose(residuals, stated, atol=slack)
    gaps = np.abs(values[:, None] - truth).min(axis=1)
    assert (gaps <= residuals + slack).all()
    assert (values <= truth[: len(values)] + slack).all()
    assert (np.diff(values) <= slack).all()


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_ritz_values_lie_within_their_residuals(iterations):
    matrix, _ = pair("symmetric")
    with jax.enable_x64(True):
        product = by_hand(matrix, symmetric=True)
        found = probes.top_eigenvalues(product, 2, key_of(0), iterations=iterations)
        check_eigenvalues(found, matrix, 1e-12)
        assert (np.max(found.residuals) < 1e-10) == (iterations == 4)  # 4·(2 + 4) = all of 24
        wrong = found._replace(values=found.values + 2 * found.residuals + 1e-9)
        with pytest.raises(AssertionError):
            check_eigenvalues(wrong, matrix, 1e-12)


@pytest.mark.parametrize("k", [1, 5, 24])
@pytest.mark.parametrize("rank", [0, 1, 3, 24])
def test_eigenvalues_of_kernels_of_any_rank(rank, k):
    j = np.random.default_rng(0).normal(size=(24, rank)).astype(np.float32)
    matrix = j @ j.T
    product = by_hand(matrix, symmetric=True)
    found = quick(lambda: probes.top_eigenvalues(product, k, key_of(0), iterations=3))()
    assert found.values.dtype == jnp.float32
    check_eigenvalues(found, matrix.astype(np.float64), 3e-6)
    if k < 24 and rank <= 3:
        truth = np.linalg.eigvalsh(matrix.astype(np.float64))[::-1]
        np.testing.assert_allclose(found.values, truth[:k], atol=1e-5 * max(1, truth[0]))


def test_a_krylov_space_finds_more_than_its_last_block():
    """Few products, a slowly falling spectrum of 600: closer than subspace iteration with them."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(600, 600)))[0]
    spectrum = np.arange(1, 601.0) ** -0.5
    matrix = (q * spectrum) @ q.T
    matrix = (matrix + matrix.T) / 2
    with jax.enable_x64(True):
        product = by_hand(matrix, symmetric=True)
        found = quick(lambda: probes.top_eigenvalues(product, 4, key_of(0), iterations=8))()
        check_eigenvalues(found, matrix, 1e-12)
    block = rng.normal(size=(600, 8))
    for _ in range(8):
        block = np.linalg.qr(matrix @ block)[0]
    plain = np.sort(np.linalg.eigvalsh(block.T @ matrix @ block))[::-1][:4]
    errors = [np.max(spectrum[:4] - values) for values in (np.asarray(found.values), plain)]
    assert errors[0] < errors[1] / 10


def test_eigenvalues_of_a_network_and_their_gradient():
    with jax.enable_x64(True):
        net = hand()
        params, x = doubled((net.params, jax.random.normal(key_of(0), (6, 6))))
        weights = jnp.array([1.0, 10.0, 100.0])

        def exact_top(params):
            values = jnp.linalg.eigvalsh(explicit(net.apply, params, x, x))[::-1][:3]
            return values @ weights, values

        def found_top(params):
            product = probes.kernel_product(net.apply, params, x, batch=4)
            values = probes.top_eigenvalues(product, 3, key_of(0), iterations=2).values  # of all 12
            return values @ weights, values

        (slope, values), (exact_slope, exact_values) = (
            quick(jax.grad(f, has_aux=True))(params) for f in (found_top, exact_top)
        )
        np.testing.assert_allclose(values, exact_values, rtol=1e-11)
        size = np.abs(flat(exact_slope)).max()
        np.testing.assert_allclose(flat(slope), flat(exact_slope), atol=1e-8 * size)


# ---------------------------------------------------------------- bad input


def test_bad_input_is_named():
    net, x = mlp(), images(0, 2)
    options = ticket(net.params)
    product = partial(probes.kernel_product, net.apply, net.params)
    broken = {**options["mask"], "dense2": {"kernel": options["mask"]["dense2"]["kernel"][:2]}}
    with pytest.raises(InputError, match="mask dense2/"):
        product(x, mask=broken)
    partial_gain = {**options["gain"], "dense1": {"kernel": jnp.float32(1)}}
    with pytest.raises(InputError, match="gain dense1/bias: expected a leaf"):
        product(x, mask=options["mask"], gain=partial_gain)
    with pytest.raises(InputError, match="expected a mask"):
        product(x, gain=options["gain"])
    with pytest.raises(InputError, match="x2: expected images of shape"):
        product(x, jnp.zeros((2, 4, 4, 1)))
    with pytest.raises(InputError, match="batch: expected a whole number ≥ 1"):
        product(x, batch=0)
    with pytest.raises(InputError, match="vectors: expected a whole number ≥ 1"):
        product(x, vectors=0)

    square, mixed = product(x), product(x, images(1, 3))
    with pytest.raises(InputError, match=r"vector: expected float32 of shape \(2, 2\)"):
        square(jnp.zeros((4, 1)))
    with pytest.raises(InputError, match="got int32 of shape"):
        square(jnp.zeros((2, 2), int))
    with pytest.raises(InputError, match="products: expected kernels of the same shape"):
        probes.squared_distance(square, mixed, key_of(0))
    with pytest.raises(InputError, match="sketch: expected a whole number ≥ 1"):
        probes.squared_norm(square, key_of(0), sketch=0)
    with pytest.raises(InputError, match="probes: expected a whole number ≥ 2"):
        probes.trace(square, key_of(0), probes=1)
    with pytest.raises(InputError, match="as many rows as columns"):
        probes.trace(mixed, key_of(0))
    with pytest.raises(InputError, match="as many rows as columns"):
        probes.label_alignment(mixed, jnp.ones((2, 2)), key_of(0))
    with pytest.raises(InputError, match=r"targets: expected shape \(2, 2\)"):
        probes.label_alignment(square, jnp.ones((3, 2)), key_of(0))
    with pytest.raises(InputError, match="symmetric"):
        probes.top_eigenvalues(mixed, 1, key_of(0))
    with pytest.raises(InputError, match="k: expected at most 4"):
        probes.top_eigenvalues(square, 5, key_of(0))
    with pytest.raises(InputError, match="iterations"):
        probes.top_eigenvalues(square, 1, key_of(0), iterations=0)
    with pytest.raises(InputError, match="level"):
        probes.Estimate(jnp.float32(1), jnp.float32(1), 3).interval(1.5)
