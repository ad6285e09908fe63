"""Measures of kernels against float64 NumPy by the definition, closed forms, and wrong versions."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import kernels
from ntk_awt.errors import InputError

N, C = 7, 3
LABELS = np.array([0, 1, 2, 2, 0, 1, 1])
ONE_HOT = np.eye(C)[LABELS]

# ---------------------------------------------------------------- instances


def jacobian(rng, n=N):
    """A random Jacobian [n, c, p] of rank below n·c, with a part that all images have in common."""
    return rng.normal(size=(n, C, 15)) + 2 * rng.normal(size=(1, C, 15))


def full(rng, n=N):
    j = jacobian(rng, n)
    return np.einsum("iap,jbp->ijab", j, j)


def mixed(rng, n1=N, n2=N):
    return np.einsum("iap,jbp->ijab", jacobian(rng, n1), jacobian(rng, n2))


def matrix(rng):
    return np.einsum("ijaa->ij", full(rng)) / C


def blocks(rng):
    return np.einsum("ijaa->ija", full(rng))


def values(rng):
    """Of both signs and several sizes, none near 0."""
    return rng.choice([-1, 1], size=9) * np.exp(1.5 * rng.normal(size=9))


def turned(rng, angles, shape=(N, N, C, C)):
    """Kernels cos φ·A + sin φ·B at these angles from A; A, B orthogonal and of equal norm."""
    a, b = rng.normal(size=(2, *shape)) + 1.0
    b -= a * np.sum(a * b) / np.sum(a * a)
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    return np.stack([np.cos(phi) * a + np.sin(phi) * b for phi in angles])


# ---------------------------------------------------------------- definitions


def norm(a):
    return np.sqrt(np.sum(a**2))


def cosine(a, b):
    return np.sum(a * b) / (norm(a) * norm(b))


def velocity(records, times):
    pairs = zip(records[:-1], records[1:], times[:-1], times[1:], strict=True)
    return np.array([(1 - cosine(a, b)) / (t2 - t1) for a, b, t1, t2 in pairs])


def polar(records, reference):
    """Arccos is accurate enough in float64 at the angles used with it."""
    radius = [norm(a) / norm(reference) for a in records]
    return np.array(radius), np.array([np.arccos(cosine(a, reference)) for a in records])


def centre(kernel):
    """H K H with the matrix H, for each pair of outputs."""
    n1, n2 = kernel.shape[:2]
    h1, h2 = np.eye(n1) - 1 / n1, np.eye(n2) - 1 / n2
    columns = kernel.reshape(n1, n2, -1)
    out = [h1 @ columns[:, :, k] @ h2 for k in range(columns.shape[2])]
    return np.stack(out, -1).reshape(kernel.shape)


def centred_alignment(a, b):
    return cosine(centre(a), centre(b))


def flatten(kernel):
    if kernel.ndim == 2:
        return kernel
    n1, n2, c, _ = kernel.shape
    out = np.zeros((n1 * c, n2 * c))
    for i, j, a, b in np.ndindex(n1, n2, c, c):
        out[i * c + a, j * c + b] = kernel[i, j, a, b]
    return out


def label_alignment(kernel, targets):
    """With the kernel of the targets written out."""
    if kernel.ndim == 2:
        return cosine(kernel, targets @ targets.T)
    y = targets.ravel()  # image i, output a is entry i·c + a
    return cosine(flatten(kernel), np.outer(y, y))


def alignments(kernel, targets):
    """Centred alignment of class d's label vector (row) with output a's kernel (column)."""
    out = np.zeros((C, C))
    for d in range(C):
        y = targets[:, d]
        for a in range(C):
            block = kernel[:, :, a, a] if kernel.ndim == 4 else kernel[:, :, a]
            out[d, a] = centred_alignment(block, np.outer(y, y))
    return out


def specialisation(kernel, targets):
    table = alignments(kernel, targets)
    return table / table.sum(1, keepdims=True)


def spectrum(kernel):
    m = flatten(kernel)
    return np.sort(np.linalg.eigvalsh((m + m.T) / 2))[::-1]


def singular_values(kernel):
    return np.linalg.svd(flatten(kernel), compute_uv=False)


def effective_rank(v):
    p = np.abs(v) / np.sum(np.abs(v))
    return np.exp(-sum(x * np.log(x) for x in p if x > 0))


def participation_ratio(v):
    return np.sum(np.abs(v)) ** 2 / np.sum(v**2)


def mass(v, k):
    return np.sum(np.sort(np.abs(v))[::-1][:k]) / np.sum(np.abs(v))


def condition_number(v):
    return np.abs(v).max() / np.abs(v).min()


class Case(NamedTuple):
    """A measure, its definition, its arguments, and whether it is differentiable in the first."""

    ours: Callable[..., Any]
    definition: Callable[..., Any]
    arguments: Callable[[np.random.Generator], tuple[Any, ...]]
    smooth: bool = True


def two(make):
    return lambda rng: (make(rng), make(rng))


def labelled(make, targets=ONE_HOT):
    return lambda rng: (make(rng), targets)


def path(rng):
    return np.stack([full(rng) for _ in range(4)])


def mean_square(a, b):
    return norm(a - b) / np.sqrt(a.shape[0] * a.shape[1])


CASES = {
    "kernel distance": Case(kernels.kernel_distance, mean_square, two(partial(mixed, n2=4))),
    "relative kernel distance": Case(
        kernels.relative_kernel_distance, lambda a, b: (norm(a - b) / norm(a)) ** 2, two(full)
    ),
    "cosine, full": Case(kernels.cosine_kernel_distance, lambda a, b: 1 - cosine(a, b), two(full)),
    "cosine, matrix": Case(
        kernels.cosine_kernel_distance, lambda a, b: 1 - cosine(a, b), two(matrix)
    ),
    "velocity": Case(
        kernels.kernel_velocity, velocity, lambda rng: (path(rng), np.array([0.0, 1.0, 5.0, 25.0]))
    ),
    "polar": Case(kernels.polar, polar, lambda rng: (path(rng), full(rng))),
    "centre": Case(kernels.centre, centre, lambda rng: (mixed(rng, n2=4),)),
    "centred alignment, full": Case(kernels.centred_alignment, centred_alignment, two(full)),
    "centred alignment, matrix": Case(kernels.centred_alignment, centred_alignment, two(matrix)),
    "label alignment, full": Case(kernels.label_alignment, label_alignment, labelled(full)),
    "label alignment, mixed": Case(kernels.label_alignment, label_alignment, labelled(mixed)),
    "label alignment, matrix": Case(
        kernels.label_alignment, label_alignment, labelled(matrix, ONE_HOT - ONE_HOT.mean(0))
    ),
    "specialisation, full": Case(kernels.specialisation, specialisation, labelled(full)),
    "specialisation, blocks": Case(kernels.specialisation, specialisation, labelled(blocks)),
    "flatten": Case(kernels.flatten, flatten, lambda rng: (mixed(rng, n2=4),)),
    "spectrum, full": Case(kernels.spectrum, spectrum, lambda rng: (full(rng),), smooth=False),
    "spectrum, matrix": Case(kernels.spectrum, spectrum, lambda rng: (matrix(rng),)),
    "spectrum, n1 ≠ n2": Case(kernels.spectrum, singular_values, lambda rng: (mixed(rng, n2=4),)),
    "spectrum, mixed": Case(
        partial(kernels.spectrum, mixed=True),
        singular_values,
        lambda rng: (mixed(rng),),
        smooth=False,
    ),
    "effective rank": Case(kernels.effective_rank, effective_rank, lambda rng: (values(rng),)),
    "participation ratio": Case(
        kernels.participation_ratio, participation_ratio, lambda rng: (values(rng),)
    ),
    "mass": Case(
        partial(kernels.spectrum_mass, k=3), partial(mass, k=3), lambda rng: (values(rng),)
    ),
    "condition number": Case(
        kernels.condition_number, condition_number, lambda rng: (values(rng),)
    ),
}

EPSILON = {np.float32: 2.0**-23, np.float64: 2.0**-52}


def agree(found, expected, epsilon):
    """Equal up to rounding, relative to the largest entry.

    An entry is made of up to (n·c)² ≈ 440 rounded terms, whose errors add at random to about 20
    units; decompositions lose a factor like the size of the matrix, 21. 100 units hold both.
    """
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(
        np.shape(a) == np.shape(b)
        and np.abs(np.asarray(a, np.float64) - b).max() <= 100 * epsilon * np.abs(b).max()
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_measures_follow_their_definition(name, dtype):
    case = CASES[name]
    arguments = [a.astype(dtype) for a in case.arguments(np.random.default_rng(3))]
    with jax.enable_x64(dtype is np.float64):
        found = jax.jit(case.ours)(*arguments)
    expected = case.definition(*(a.astype(np.float64) for a in arguments))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
    assert agree(found, expected, EPSILON[dtype])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_gradients_agree_with_finite_differences(name):
    case = CASES[name]
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        first, *rest = map(jnp.asarray, case.arguments(rng))
        shapes = jax.eval_shape(case.ours, first, *rest)
        weights = [rng.normal(size=leaf.shape) for leaf in jax.tree.leaves(shapes)]

        @jax.jit
        def scalar(x):
            leaves = jax.tree.leaves(case.ours(x, *rest))
            return sum(jnp.sum(w * leaf) for w, leaf in zip(weights, leaves, strict=True))

        direction = rng.normal(size=first.shape) / np.sqrt(first.size)
        slope = np.sum(np.asarray(jax.grad(scalar)(first)) * direction)
        step = 1e-5
        numeric = (scalar(first + step * direction) - scalar(first - step * direction)) / (2 * step)
    assert slope == pytest.approx(float(numeric), rel=1e-5)


def naive_cosine(a, b):
    return 1 - jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))


WRONG = {
    "cosine, full": {"of squared norms": lambda a, b: 1 - np.sum(a * b) / np.sum(a * a)},
    "velocity": {
        "not divided by time": lambda records, _: velocity(records, range(len(records))),
        "divided by the total time": lambda r, t: velocity(r, t) * np.diff(t) / (t[-1] - t[0]),
    },
    "polar": {
        "radius without reference": lambda r, a: (np.array([norm(x) for x in r]), polar(r, a)[1])
    },
    "centre": {"one axis": lambda k: k - k.mean(0)},
    "centred alignment, full": {
        "not centred": cosine,
        "centred by the mean entry": lambda a, b: cosine(a - a.mean((0, 1)), b - b.mean((0, 1))),
        "centred over outputs": lambda a, b: centred_alignment(
            np.transpose(a, (2, 3, 0, 1)), np.transpose(b, (2, 3, 0, 1))
        ),
    },
    "label alignment, full": {
        "of the mean over outputs": lambda k, y: label_alignment(np.einsum("ijaa->ij", k) / C, y),
        "outputs mixed up": lambda k, y: label_alignment(k, y[:, [1, 2, 0]]),
    },
    "label alignment, matrix": {
        "with the squared norm of the targets": lambda k, y: (
            np.sum(k * (y @ y.T)) / (norm(k) * np.sum(y**2))
        ),
    },
    "specialisation, full": {
        "transposed": lambda k, y: specialisation(k, y).T,
        "columns sum to one": lambda k, y: alignments(k, y) / alignments(k, y).sum(0),
        "not centred": lambda k, y: (
            (
                t := np.array(
                    [[cosine(k[:, :, a, a], np.outer(c, c)) for a in range(C)] for c in y.T]
                )
            )
            / t.sum(1, keepdims=True)
        ),
    },
    "flatten": {
        "no transposition": lambda k: k.reshape(N * C, 4 * C),
        "outputs first": lambda k: k.transpose(2, 0, 3, 1).reshape(N * C, 4 * C),
    },
    "spectrum, mixed": {"of the symmetric part": spectrum},
    "effective rank": {"in bits": lambda v: np.log2(np.e) * effective_rank(v)},
    "mass": {"by value, not by size": lambda v: np.sum(np.sort(v)[::-1][:3]) / np.sum(np.abs(v))},
}


@pytest.mark.parametrize(("name", "which"), [(n, w) for n, all_ in WRONG.items() for w in all_])
def test_wrong_versions_are_told_apart(name, which):
    case = CASES[name]
    arguments = case.arguments(np.random.default_rng(3))
    assert not agree(WRONG[name][which](*arguments), case.definition(*arguments), 1e-6)


# ---------------------------------------------------------------- nearly equal kernels


@pytest.mark.parametrize("angle", [1e-5, 1e-4, 1e-3, 0.1, 1.5, 3.0])
def test_small_distances_and_angles_keep_their_digits(angle):
    """In float32, against 1 − cos φ in float64, of float32 kernels that are φ apart."""
    a, b = turned(np.random.default_rng(5), [0, angle]).astype(np.float32)
    exact = cosine(a.astype(np.float64), b.astype(np.float64))
    # The kernels and their unit vectors are rounded, each by 6e-8 of its norm.
    relative = 1e-7 / angle + 1e-6
    for function in (kernels.cosine_kernel_distance, jax.jit(kernels.cosine_kernel_distance)):
        assert float(function(a, b)) == pytest.approx(1 - exact, rel=2 * relative)
    radius, found = kernels.polar(b[None], a)
    assert float(found[0]) == pytest.approx(angle, rel=relative)
    assert float(radius[0]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("angle", [1e-5, 1e-4])
def test_arccos_and_one_minus_cosine_lose_small_angles(angle):
    """The control of the test above: the textbook formulas in float32 are off by half and more."""
    a, b = turned(np.random.default_rng(5), [0, angle]).astype(np.float32)
    lost = float(naive_cosine(a, b))
    assert lost != pytest.approx(angle**2 / 2, rel=0.5)
    assert float(jnp.arccos(jnp.clip(1 - lost, -1, 1))) != pytest.approx(angle, rel=0.5)


def test_proportional_kernels_have_distance_and_angle_zero():
    a = full(np.random.default_rng(6)).astype(np.float32)
    assert float(jax.jit(kernels.cosine_kernel_distance)(a, a.copy())) <= 1e-14
    assert float(kernels.cosine_kernel_distance(a, 3 * a)) <= 1e-14
    gradient = jax.grad(kernels.cosine_kernel_distance)(jnp.asarray(a), jnp.asarray(a))
    assert np.abs(gradient).max() * norm(a) <= 1e-6
    radius, angle = kernels.polar(jnp.stack([a, 3 * a, -a]), jnp.asarray(a))
    np.testing.assert_allclose(radius, [1, 3, 1], rtol=1e-6)
    np.testing.assert_allclose(angle, [0, 0, np.pi], atol=1e-6)
    assert np.isnan(kernels.cosine_kernel_distance(a, 0 * a))


@pytest.mark.parametrize("times", [[0, 4, 12], [0.0, 0.4, 1.2]])
def test_velocity_of_a_kernel_that_turns_evenly(times):
    """At ω per unit of time an interval Δ has distance 1 − cos ωΔ = 2 sin²(ωΔ/2)."""
    records = turned(np.random.default_rng(7), 0.02 * np.array(times)).astype(np.float32)
    gaps = np.diff(times)
    found = jax.jit(kernels.kernel_velocity)(records, np.array(times))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 2 * np.sin(0.01 * gaps) ** 2 / gaps, rtol=1e-4)


# ---------------------------------------------------------------- alignment in closed form


def test_alignment_of_the_targets_own_kernel_is_one():
    y = (ONE_HOT - ONE_HOT.mean(0)).astype(np.float32)
    assert float(kernels.label_alignment(y @ y.T, y)) == pytest.approx(1)
    assert float(kernels.label_alignment(np.einsum("ia,jb->ijab", y, y), y)) == pytest.approx(1)
    assert float(kernels.centred_alignment(y @ y.T, 2 * y @ y.T + 50)) == pytest.approx(1)
    assert float(kernels.label_alignment(-y @ y.T, y)) == pytest.approx(-1)
    # Of the identity: ⟨I, yyᵀ⟩ / (√m·‖y‖²) = 1/√m.
    identity = np.einsum("ij,ab->ijab", np.eye(N), np.eye(C)).astype(np.float32)
    assert float(kernels.label_alignment(identity, y)) == pytest.approx((N * C) ** -0.5)


def test_centred_label_alignment_is_composed():
    kernel = full(np.random.default_rng(8)).astype(np.float32)
    y = (ONE_HOT - ONE_HOT.mean(0)).astype(np.float32)
    composed = kernels.label_alignment(kernels.centre(kernel), y)
    direct = kernels.centred_alignment(kernel, np.einsum("ia,jb->ijab", y, y))
    assert float(composed) == pytest.approx(float(direct), rel=1e-5)


def test_specialisation_names_the_output_that_sees_the_class():
    """Output a's kernel sees class a + 1 only: of class d, output d − 1 has the largest share."""
    sees = ONE_HOT[:, [1, 2, 0]]
    kernel = (np.einsum("ia,ja->ija", sees, sees) * [1, 10, 100]).astype(np.float32)
    found = np.asarray(kernels.specialisation(kernel, LABELS[:, None] == np.arange(C)))
    assert found.argmax(1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_specialisation_reads_the_diagonal_blocks_only():
    rng = np.random.default_rng(9)
    kernel = full(rng).astype(np.float32)
    noise = rng.normal(size=kernel.shape).astype(np.float32) * (1 - np.eye(C, dtype=np.float32))
    targets = jnp.asarray(ONE_HOT)
    found = kernels.specialisation(jnp.asarray(kernel + 1e3 * noise), targets)
    diagonal = jnp.einsum("ijaa->ija", kernel)
    np.testing.assert_allclose(found, kernels.specialisation(diagonal, targets), rtol=1e-5)


@pytest.mark.parametrize("n", [7, 41])  # XLA's mean of 41 equal numbers is another number
def test_specialisation_is_undefined_where_nothing_varies(n):
    function = jax.jit(kernels.specialisation)
    kernel = np.einsum("ijaa->ija", full(np.random.default_rng(12), n))
    targets = np.eye(C)[np.arange(n) % C]
    for same in (0, 1):  # a class with none, or with all, of the images
        targets[:, 2] = same
        undefined = np.isnan(function(kernel, targets))
        assert undefined.tolist() == [[False] * C, [False] * C, [True] * C]
    kernel[:, :, 1] = 0.3
    assert np.isnan(function(kernel, np.eye(C)[np.arange(n) % C])).all()


# ---------------------------------------------------------------- spectrum and eigenvectors


@pytest.mark.parametrize("rank", [1, 4])
def test_ranks_of_equal_eigenvalues(rank):
    found = jnp.concatenate([jnp.full(rank, 5.0), jnp.zeros(6 - rank)])
    assert float(kernels.effective_rank(found)) == pytest.approx(rank)
    assert float(kernels.participation_ratio(found)) == pytest.approx(rank)
    assert float(kernels.spectrum_mass(found, rank)) == pytest.approx(1)
    assert float(kernels.spectrum_mass(found[::-1], 1)) == pytest.approx(1 / rank)


def test_participation_ratio_is_at_most_the_effective_rank():
    for seed in range(20):
        found = jnp.asarray(values(np.random.default_rng(seed)))
        ratio, rank = kernels.participation_ratio(found), kernels.effective_rank(found)
        assert 1 <= float(ratio) <= float(rank) * (1 + 1e-6) <= len(found) * (1 + 2e-6)


def test_condition_number_is_infinite_from_the_rounding_limit_on():
    limit = 3 * 2.0**-23  # m·u of float32
    sizes = [8.0, 8 * limit, 8.0]
    assert float(kernels.condition_number(jnp.array(sizes))) == np.inf
    sizes[1] *= 1 + 1e-6
    assert float(kernels.condition_number(jnp.array(sizes))) == pytest.approx(1 / limit, rel=1e-5)
    assert float(kernels.condition_number(-jnp.array(sizes))) == pytest.approx(1 / limit, rel=1e-5)
    assert float(kernels.condition_number(jnp.zeros(3))) == np.inf
    with jax.enable_x64(True):
        assert float(kernels.condition_number(jnp.array([8.0, 8 * limit]))) < np.inf
    # A kernel of rank 15 < 21, whose zero eigenvalues come out as rounding, is singular.
    kernel = full(np.random.default_rng(0)).astype(np.float32)
    assert float(kernels.condition_number(kernels.spectrum(kernel))) == np.inf


@pytest.mark.parametrize("make", [full, blocks, matrix, mixed])
def test_eigenvectors_solve_the_eigenproblem(make):
    kernel = make(np.random.default_rng(10))
    mean = {4: lambda: np.einsum("ijaa->ij", kernel) / C, 3: lambda: kernel.mean(2)}
    dense = mean.get(kernel.ndim, lambda: kernel)()
    dense = (dense + dense.T) / 2
    expected = np.sort(np.linalg.eigvalsh(dense))[::-1][:4]
    function = jax.jit(kernels.eigenvectors, static_argnames="k")
    found, vectors = map(np.asarray, function(kernel.astype(np.float32), k=4))
    assert (found.dtype, vectors.dtype, vectors.shape) == (np.float32, np.float32, (4, N))
    scale = np.abs(np.linalg.eigvalsh(dense)).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
    np.testing.assert_allclose(dense @ vectors.T, vectors.T * expected, atol=1e-5 * scale)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(4), atol=1e-5)
    assert (vectors.max(1) >= -vectors.min(1)).all()


def test_eigenpictures_are_weighted_sums_of_the_images():
    rng = np.random.default_rng(11)
    vectors, images = rng.normal(size=(2, N)), rng.uniform(size=(N, 3, 2, 1))
    expected = [sum(w * image for w, image in zip(u, images, strict=True)) for u in vectors]
    pictures = kernels.eigenpictures(jnp.asarray(vectors), jnp.asarray(images))
    assert agree(pictures, np.array(expected), EPSILON[np.float32])
    assert not agree(pictures, np.array(expected)[::-1], 1e-3)


# ---------------------------------------------------------------- bad input


PAIRS = {
    "kernel_distance": kernels.kernel_distance,
    "relative_kernel_distance": kernels.relative_kernel_distance,
    "cosine_kernel_distance": kernels.cosine_kernel_distance,
    "centred_alignment": kernels.centred_alignment,
    "target_distance": kernels.target_distance,
    "relative_target_distance": kernels.relative_target_distance,
    "polar": lambda a, b: kernels.polar(a[None], b),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((4, 4), (4, 1)),
        ((4, 4), (1, 4)),
        ((4, 4), (4,)),
        ((4, 4, 3, 3), (4, 4, 1, 1)),
        ((4, 4), (3, 3)),
    ],
)
def test_two_shapes_are_named_and_never_broadcast(name, first, second):
    both = rf"shapes {re.escape(str(first))} and {re.escape(str(second))}"
    for function in (PAIRS[name], jax.jit(PAIRS[name])):
        with pytest.raises(InputError, match=both):
            function(jnp.ones(first), jnp.ones(second))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.kernel_velocity(jnp.ones((1, 2, 2)), jnp.zeros(1)), "two or more records"),
        (
            lambda: kernels.kernel_velocity(jnp.ones((3, 2, 2)), jnp.zeros(2)),
            r"times: expected shape \(3,\)",
        ),
        (lambda: kernels.label_alignment(jnp.ones((4, 3)), jnp.ones((4, 2))), "n1 = n2"),
        (
            lambda: kernels.label_alignment(jnp.ones((4, 4, 2)), jnp.ones((4, 2))),
            r"\[n1, n2, c, c\]",
        ),
        (lambda: kernels.label_alignment(jnp.ones((4, 4, 2, 2)), jnp.ones((4, 3))), r"\[4, 2\]"),
        (lambda: kernels.label_alignment(jnp.ones((4, 4)), jnp.ones(4)), r"\[4, c\]"),
        (lambda: kernels.label_alignment(jnp.ones((4, 4)), jnp.ones((1, 2))), r"\[4, c\]"),
        (lambda: kernels.specialisation(jnp.ones((4, 4)), jnp.ones((4, 2))), r"\[n1, n2, c\] or"),
        (lambda: kernels.specialisation(jnp.ones((4, 4, 2)), jnp.ones((4, 1))), r"\[4, 2\]"),
        (lambda: kernels.specialisation(jnp.ones((4, 3, 2)), jnp.ones((4, 2))), "n1 = n2"),
        (lambda: kernels.flatten(jnp.ones((4, 4, 2))), r"got shape \(4, 4, 2\)"),
        (lambda: kernels.flatten(jnp.ones((4, 4, 2, 3))), r"got shape \(4, 4, 2, 3\)"),
        (lambda: kernels.spectrum(jnp.ones(4)), r"\[n1, n2\] or"),
        (lambda: kernels.spectrum_mass(jnp.ones(4), 5), "k: expected at most 4, got 5"),
        (lambda: kernels.spectrum_mass(jnp.ones(4), 0), "a whole number ≥ 1"),
        (lambda: kernels.eigenvectors(jnp.ones((4, 4)), 5), "k: expected at most 4, got 5"),
        (lambda: kernels.eigenvectors(jnp.ones((4, 3)), 1), "n1 = n2"),
        (lambda: kernels.eigenpictures(jnp.ones((2, 3)), jnp.ones((4, 5))), r"\[k, 4\]"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(InputError, match=message):
        call()
