"""Measures of tangent kernels, and distances between two networks on the same inputs (theory §0).

Axes: "full" kernels are [n1, n2, c, c], [i, j, a, b] = ⟨∂f_a(x1_i)/∂θ, ∂f_b(x2_j)/∂θ⟩; [n1, n2] is
the mean over outputs (the trace kernel divided by c) or the kernel of one output; [n1, n2, c] are
the diagonal blocks Θ^{aa} alone. Their unit is squared logits per squared parameter; what is
divided by a norm has none.

**One normalisation.** Distances are those of full kernels, so the numbers of all three forms can be
set beside each other. Diagonal blocks stand for the kernel with nothing between different outputs,
and the mean k over c outputs stands for k ⊗ I_c, whose norm is √c·‖k‖_F. For kernels Θ = k ⊗ I_c
(infinite width) the three forms give one number. In general they are the norms of orthogonal
projections of one difference, so that mean ≤ diagonal ≤ full: what differs between outputs, as at
finite width, is averaged away in the mean. Compare relative and cosine distances within one form.

Two kernels are compared on one fixed probe set, so their shapes must agree; nothing is broadcast.
Every function is traceable and differentiable where it is smooth. It keeps the dtype of its input,
but sums half precision in float32 and returns that.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntk_awt.errors import InputError, check_count
from ntk_awt.types import widened

# Accelerators may round the factors of a product to 10 bits unless told otherwise.
_PRECISION = jax.lax.Precision.HIGHEST

_FORMS = {2: "[n1, n2]", 3: "[n1, n2, c]", 4: "[n1, n2, c, c]"}


# ---------------------------------------------------------------- checks


def _pair(what: str, first: Array, second: Array) -> tuple[Array, Array]:
    """Both, to be summed; raise unless they have one shape and at least one image."""
    first, second = widened((jnp.asarray(first), jnp.asarray(second)))
    if first.shape != second.shape:
        raise InputError(
            what,
            expected="two of the same shape",
            got=f"shapes {first.shape} and {second.shape}",
            fix="compute both on the same fixed probe set",
        )
    if 0 in first.shape:
        raise InputError(what, expected="at least one image", got=f"shape {first.shape}")
    return first, second


def _checked(kernel: Array, *ranks: int, square: bool = False) -> Array:
    """The kernel, to be summed; raise unless it has one of these numbers of axes, and images.

    Args:
        square: whether n1 = n2 as well.
    """
    kernel = widened(jnp.asarray(kernel))
    shape = kernel.shape
    fits = len(shape) in ranks and (len(shape) != 4 or shape[2] == shape[3])
    if not (fits and (not square or shape[0] == shape[1])):
        forms = " or ".join(_FORMS[rank] for rank in ranks)
        raise InputError(
            "kernel",
            expected=f"axes {forms}" + (" with n1 = n2" if square else ""),
            got=f"shape {shape}",
        )
    if 0 in shape:
        raise InputError("kernel", expected="at least one image", got=f"shape {shape}")
    return kernel


def _targets_like(kernel: Array, targets: Array) -> Array:
    """The targets in the dtype of the kernel; raise unless they are [n, c] of its n (and c)."""
    targets = jnp.asarray(targets)
    n, classes = kernel.shape[0], kernel.shape[2:3] or targets.shape[1:2]
    if targets.ndim != 2 or targets.shape != (n, *classes):
        form = f"[{n}, {kernel.shape[2] if kernel.ndim > 2 else 'c'}]"
        raise InputError("targets", expected=form, got=f"shape {targets.shape}")
    return targets.astype(kernel.dtype)


# ---------------------------------------------------------------- distances


def _squares(x: Array) -> Array:
    return jnp.sum(jnp.square(x))


def _root(x: Array) -> Array:
    """√x, with gradient 0 at 0: two equal networks must not make a search's gradient NaN."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _unit(x: Array) -> Array:
    return x / jnp.sqrt(_squares(x))


def kernel_distance(
    dense: Float[Array, "n1 n2 *c"],
    sparse: Float[Array, "n1 n2 *c"],
    *,
    classes: int | None = None,
) -> Float[Array, ""]:
    """α = ‖Θ^d − Θ^s‖_F / √(n1·n2); for a square kernel that is 1/N times the norm (theory §0).

    Θ is the kernel of all outputs, in whatever form it is given (see the module).

    Args:
        dense, sparse: kernels of the two networks on the same inputs, any output axes.
        classes: of [n1, n2] kernels, which do not tell: the c of how many outputs they are the mean
            (`outputs="trace"`), and then stand for k ⊗ I_c; 1 for the kernel of one output.

    Returns:
        A scalar, in the unit of the kernels (squared logits per squared parameter).

    Raises:
        InputError: kernels of different shapes, [n1, n2] kernels without `classes`.

    Example:
        >>> import jax.numpy as jnp
        >>> k, unit = jnp.ones((2, 2)), jnp.eye(4)
        >>> full = jnp.einsum("ij,ab->ijab", k, unit)
        >>> float(kernel_distance(full, 0 * full)), float(kernel_distance(k, 0 * k, classes=4))
        (2.0, 2.0)
    """
    dense, sparse = _pair("kernels", dense, sparse)
    n1, n2 = dense.shape[:2]
    if dense.ndim > 2:
        classes = 1
    if classes is None:
        raise InputError(
            "classes",
            expected="how many outputs an [n1, n2] kernel is the mean of",
            got="none",
            fix="give classes=c with outputs='trace', classes=1 for the kernel of one output",
        )
    check_count("classes", classes, low=1)
    return _root(_squares(dense - sparse)) * (classes / (n1 * n2)) ** 0.5


def relative_kernel_distance(
    dense: Float[Array, "n1 n2 *c"], sparse: Float[Array, "n1 n2 *c"]
) -> Float[Array, ""]:
    """‖Θ^d − Θ^s‖_F² / ‖Θ^d‖_F², without unit: 0 for equal kernels, 1 for a zero one (theory §0).

    Compare values of one form only, full, diagonal or mean (see the module).

    Raises:
        InputError: kernels of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> float(relative_kernel_distance(jnp.full((2, 2), 2.0), jnp.ones((2, 2))))
        0.25
    """
    dense, sparse = _pair("kernels", dense, sparse)
    return _squares(dense - sparse) / _squares(dense)


def target_distance(dense: Float[Array, "n c"], sparse: Float[Array, "n c"]) -> Float[Array, ""]:
    """β = ‖f^d − f^s‖_F / √N of outputs on the same N inputs, in logits (theory §0).

    Along a training this is the dynamics gap ‖f^d_t − f^s_t‖ / √N.

    Raises:
        InputError: outputs of different shapes.
    """
    dense, sparse = _pair("outputs", dense, sparse)
    return _root(_squares(dense - sparse) / dense.shape[0])


def relative_target_distance(
    dense: Float[Array, "n c"], sparse: Float[Array, "n c"]
) -> Float[Array, ""]:
    """‖f^d − f^s‖_F² / ‖f^d‖_F², without unit (theory §0).

    Raises:
        InputError: outputs of different shapes.
    """
    dense, sparse = _pair("outputs", dense, sparse)
    return _squares(dense - sparse) / _squares(dense)


def cosine_kernel_distance(
    first: Float[Array, "n1 n2 *c"], second: Float[Array, "n1 n2 *c"]
) -> Float[Array, ""]:
    """1 − ⟨Θ, Θ'⟩ / (‖Θ‖_F ‖Θ'‖_F), the distance of two kernels up to scale.

    Computed as ‖Θ/‖Θ‖ − Θ'/‖Θ'‖‖² / 2, which is the same number. One minus a cosine near 1 keeps
    only what is above the rounding of 1 (6e-8 in float32), while kernels an angle φ apart have
    distance φ²/2: an angle of 3e-4 would be lost. The difference of the unit vectors is rounded
    relative to φ instead, so the distance has relative error about 1e-7/φ.

    Args:
        first, second: kernels on the same inputs, any output axes; not zero.

    Returns:
        A scalar without unit in [0, 2]; at most 1 for positive semidefinite kernels, 0 for
        proportional ones. Differentiable, with gradient 0 at proportional kernels. NaN for a zero
        kernel, which has no direction.

    Raises:
        InputError: kernels of different shapes.

    Source: the kernel distance of Fort et al., "Deep learning versus kernel learning" (2020).

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(cosine_kernel_distance(jnp.eye(2), jnp.ones((2, 2)))), 4)  # 1 − cos 45°
        0.2929
    """
    first, second = _pair("kernels", first, second)
    return _squares(_unit(first) - _unit(second)) / 2


def kernel_velocity(
    kernels: Float[Array, "t n1 n2 *c"], times: Float[Array, "t"]
) -> Float[Array, "t-1"]:
    """v_k = S(Θ_k, Θ_{k+1}) / (t_{k+1} − t_k), S the `cosine_kernel_distance` of recorded kernels.

    S falls like the square of a short interval, so v depends on the spacing of the records: compare
    the velocities of two networks only at the same times.

    Args:
        kernels: recorded along a training on one probe set, any output axes.
        times: of the records, increasing; integers (steps) or floats.

    Returns:
        One velocity for each interval, per unit of `times`.

    Raises:
        InputError: fewer than two records, or not one time for each.

    Source: Fort et al., "Deep learning versus kernel learning" (2020).

    Example:
        >>> import jax.numpy as jnp
        >>> kernels = jnp.stack([jnp.eye(2), jnp.eye(2), jnp.ones((2, 2))])
        >>> [round(v, 4) for v in kernel_velocity(kernels, jnp.array([0, 10, 20])).tolist()]
        [0.0, 0.0293]
    """
    kernels, times = widened(jnp.asarray(kernels)), jnp.asarray(times)
    if len(kernels) < 2:
        raise InputError("kernels", expected="two or more records", got=f"{len(kernels)}")
    if times.shape != kernels.shape[:1]:
        raise InputError("times", expected=f"shape {kernels.shape[:1]}", got=f"shape {times.shape}")
    distances = jax.vmap(cosine_kernel_distance)(kernels[:-1], kernels[1:])
    return distances / jnp.diff(times).astype(kernels.dtype)


def polar(
    kernels: Float[Array, "t n1 n2 *c"], reference: Float[Array, "n1 n2 *c"]
) -> tuple[Float[Array, "t"], Float[Array, "t"]]:
    """Radius ‖Θ_t‖/‖Θ_0‖ and angle ∠(Θ_t, Θ_0) of kernels seen from a reference kernel.

    The angle is 2·atan2(‖u − v‖, ‖u + v‖) of the unit vectors u, v (Kahan, 2006), which is accurate
    at every angle; arccos of a cosine near 1 is not (in float32 it has steps of 3e-4).

    Args:
        kernels: recorded along a training on one probe set, any output axes.
        reference: Θ_0, e.g. `kernels[0]` or the dense network's kernel at initialisation.

    Returns:
        The radius, without unit, and the angle in radians: in [0, π], at most π/2 if the kernels
        are positive semidefinite. The angle has no derivative where it is 0.

    Raises:
        InputError: kernels of different shapes.

    Source: Kahan, "How futile are mindless assessments of roundoff" (2006), for the angle.

    Example:
        >>> import jax.numpy as jnp
        >>> radius, angle = polar(jnp.array([[[5.0, 0.0]], [[3.0, 4.0]]]), jnp.array([[5.0, 0.0]]))
        >>> radius.tolist(), [round(a, 4) for a in jnp.cos(angle).tolist()]
        ([1.0, 1.0], [1.0, 0.6])
    """
    kernels, reference = widened((jnp.asarray(kernels), jnp.asarray(reference)))
    v = _unit(reference)

    def view(kernel: Array) -> tuple[Array, Array]:
        _pair("kernel and reference", kernel, reference)
        u = _unit(kernel)
        angle = 2 * jnp.arctan2(jnp.sqrt(_squares(u - v)), jnp.sqrt(_squares(u + v)))
        return jnp.sqrt(_squares(kernel) / _squares(reference)), angle

    return jax.vmap(view)(kernels)


# ---------------------------------------------------------------- alignment


def centre(kernel: Float[Array, "n1 n2 *c"]) -> Float[Array, "n1 n2 *c"]:
    """HΘH, H = I − 11ᵀ/n: the kernel of the outputs less their mean over the images.

    Args:
        kernel: any output axes; each pair of outputs is centred by itself.

    Returns:
        The same shape and unit; sums over either image axis are 0.

    Source: Cortes, Mohri, Rostamizadeh, "Algorithms for learning kernels based on centered
    alignment" (2012).

    Example:
        >>> import jax.numpy as jnp
        >>> centre(jnp.array([[3.0, 1.0], [1.0, 1.0]])).tolist()
        [[0.5, -0.5], [-0.5, 0.5]]
    """
    kernel = widened(jnp.asarray(kernel))
    rows = kernel - jnp.mean(kernel, axis=0, keepdims=True)
    return rows - jnp.mean(rows, axis=1, keepdims=True)


def centred_alignment(
    first: Float[Array, "n1 n2 *c"], second: Float[Array, "n1 n2 *c"]
) -> Float[Array, ""]:
    """⟨HΘH, HΘ'H⟩ / (‖HΘH‖_F ‖HΘ'H‖_F), H = I − 11ᵀ/n on both image axes.

    Without the centring a constant common to all entries, which tangent kernels have, hides how
    the kernels differ.

    Args:
        first, second: kernels on the same inputs, any output axes; not constant over the images.

    Returns:
        A scalar without unit in [−1, 1], in [0, 1] for positive semidefinite kernels.

    Raises:
        InputError: kernels of different shapes.

    Source: Cortes, Mohri, Rostamizadeh, "Algorithms for learning kernels based on centered
    alignment" (2012).

    Example:
        >>> import jax.numpy as jnp
        >>> y = jnp.array([1.0, 1.0, -1.0])
        >>> float(centred_alignment(jnp.outer(y, y), 5 + 2 * jnp.outer(y, y)))
        1.0
    """
    first, second = _pair("kernels", first, second)
    return jnp.sum(_unit(centre(first)) * _unit(centre(second)))


def label_alignment(
    kernel: Float[Array, "n n *c"], targets: Float[Array, "n c"]
) -> Float[Array, ""]:
    """⟨Θ, K_Y⟩ / (‖Θ‖_F ‖K_Y‖_F) with the kernel K_Y of the targets Y [n, c].

    - full kernel: K_Y = yyᵀ with y = vec Y in R^{nc}, so yᵀΘy / (‖Θ‖_F ‖yyᵀ‖_F);
    - kernel [n, n]: K_Y = YYᵀ, so tr(YᵀΘY) / (‖Θ‖_F ‖YYᵀ‖_F).

    The two agree for one output, and are different measures for more.

    Args:
        kernel: [n, n, c, c] or [n, n].
        targets: one-hot labels, or those less their mean over the images. With centred targets and
            `centre(kernel)` this is the centred alignment with K_Y.

    Returns:
        A scalar without unit in [−1, 1], in [0, 1] for a positive semidefinite kernel.

    Raises:
        InputError: a kernel with other axes, targets that do not fit it.

    Source: Cristianini et al., "On kernel-target alignment" (2001); of tangent kernels: Baratin et
    al., "Implicit regularization via neural feature alignment" (2021).

    Example:
        >>> import jax.numpy as jnp
        >>> targets = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> round(float(label_alignment(jnp.ones((2, 2)), targets)), 4)
        0.7071
    """
    kernel = _checked(kernel, 2, 4, square=True)
    targets = _targets_like(kernel, targets)
    if kernel.ndim == 4:
        sides = "ia,ijab,jb->"
        size = _squares(targets)
    else:
        sides = "ia,ij,ja->"
        size = jnp.sqrt(_squares(jnp.matmul(targets.T, targets, precision=_PRECISION)))
    return jnp.einsum(sides, targets, _unit(kernel), targets, precision=_PRECISION) / size


def specialisation(
    kernel: Float[Array, "n n c c"] | Float[Array, "n n c"], targets: Float[Array, "n c"]
) -> Float[Array, "c c"]:
    """S[d, a] = A_da / Σ_a' A_da': which output's own kernel is aligned with the labels of class d.

    A_da = ȳ_dᵀ Θ^{aa} ȳ_d / (‖HΘ^{aa}H‖_F ‖ȳ_d‖²) is the centred alignment of output a's kernel
    with class d's label vector, ȳ_d = H y_d, H = I − 11ᵀ/n. Row d says how the alignment with class
    d is shared among the outputs, and sums to 1. At a random initialisation the outputs are
    exchangeable, so every entry is about 1/c, however easy the class; a diagonal above 1/c means
    that outputs specialise in their own class. (Shares among the classes for a fixed output would
    mostly show which classes are easy.)

    Args:
        kernel: full, or only its diagonal blocks Θ^{aa} as [n, n, c]; other blocks are not read.
        targets: one-hot labels.

    Returns:
        [c, c] without unit, row = class, column = output; in [0, 1] for positive semidefinite
        kernels. NaN in the row of a class that has none or all of the images, and everywhere if an
        output's kernel is constant over the images.

    Raises:
        InputError: a kernel with other axes, targets that do not fit it.

    Source: after kernel specialisation in Shan and Bordelon, "A theory of neural tangent kernel
    alignment and its influence on training" (2021); centring and normalisation as stated here.

    Example:
        >>> import jax.numpy as jnp
        >>> targets = jnp.eye(3)
        >>> blocks = jnp.einsum("ia,ja->ija", targets, targets)  # each output sees its own class
        >>> [round(share, 4) for share in specialisation(blocks, targets)[0].tolist()]
        [0.6667, 0.1667, 0.1667]
    """
    kernel = _checked(kernel, 3, 4, square=True)
    targets = _targets_like(kernel, targets)
    blocks = kernel if kernel.ndim == 3 else jnp.diagonal(kernel, axis1=2, axis2=3)
    centred = centre(blocks)
    products = jnp.einsum("id,ija,jd->da", targets, centred, targets, precision=_PRECISION)
    # Centring leaves the rounding of a constant, not 0; ‖ȳ_d‖² is common to row d and cancels.
    defined = jnp.ptp(targets, axis=0)[:, None] * jnp.ptp(blocks, axis=(0, 1))[None] > 0
    norms = jnp.sqrt(jnp.sum(jnp.square(centred), axis=(0, 1)))
    shares = jnp.where(defined, products / norms[None], jnp.nan)
    return shares / jnp.sum(shares, axis=1, keepdims=True)


# ---------------------------------------------------------------- spectrum


def flatten(kernel: Float[Array, "n1 n2 *c"]) -> Float[Array, "m1 m2"]:
    """The kernel as one matrix [n1·c, n2·c]; image i, output a is row i·c + a.

    Args:
        kernel: [n1, n2, c, c], or [n1, n2], which stays as it is.

    Returns:
        [n1·c, n2·c], the unit of the kernel.

    Raises:
        InputError: a kernel with other axes.

    Example:
        >>> import jax.numpy as jnp
        >>> flatten(jnp.arange(8).reshape(1, 2, 2, 2)).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    kernel = _checked(kernel, 2, 4)
    if kernel.ndim == 2:
        return kernel
    n1, n2, c, _ = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(n1 * c, n2 * c)


def spectrum(kernel: Float[Array, "n1 n2 *c"], *, mixed: bool = False) -> Float[Array, "m"]:
    """Eigenvalues of (K + Kᵀ)/2, K = `flatten(kernel)`; singular values of K if it is mixed.

    Args:
        kernel: [n1, n2, c, c] or [n1, n2].
        mixed: rows and columns belong to different inputs, as in Θ(X, X̃). Always so if n1 ≠ n2.

    Returns:
        Largest first, the unit of the kernel: n·c eigenvalues (those of a positive semidefinite
        kernel may be negative by rounding, about 1e-7 of the largest in float32), or
        min(n1, n2)·c singular values. Differentiable where all are different.

    Raises:
        InputError: a kernel with other axes.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> [round(value, 4) for value in spectrum(kernel).tolist()]
        [3.0, 1.0]
        >>> [round(value, 4) for value in spectrum(jnp.array([[3.0, 4.0]])).tolist()]
        [5.0]
    """
    matrix = flatten(kernel)
    if mixed or matrix.shape[0] != matrix.shape[1]:
        return jnp.linalg.svd(matrix, compute_uv=False)
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]


def _shares(values: Float[Array, "m"]) -> Float[Array, "m"]:
    """|λ_i| / Σ|λ|, the shares of the trace; sizes, since rounding may turn a zero negative."""
    sizes = widened(jnp.abs(values))
    return sizes / jnp.sum(sizes)


def effective_rank(values: Float[Array, "m"]) -> Float[Array, ""]:
    """exp(−Σ p_i ln p_i) with p_i = |λ_i| / Σ|λ|: how many eigenvalues carry the kernel.

    Args:
        values: a `spectrum`, in any order.

    Returns:
        A scalar without unit from 1 (rank one) to m (all equal); NaN for a zero kernel.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007).

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(effective_rank(jnp.array([2.0, 2.0, 0.0]))), 4)
        2.0
    """
    return jnp.exp(jnp.sum(jax.scipy.special.entr(_shares(values))))


def participation_ratio(values: Float[Array, "m"]) -> Float[Array, ""]:
    """(Σ|λ|)² / Σλ²: like the effective rank, with less weight on the tail, and never above it.

    Args:
        values: a `spectrum`, in any order.

    Returns:
        A scalar without unit from 1 (rank one) to m (all equal); NaN for a zero kernel.

    Source: Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement" (2017).

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(participation_ratio(jnp.array([3.0, 1.0]))), 4)
        1.6
    """
    return 1 / _squares(_shares(values))


def spectrum_mass(values: Float[Array, "m"], k: int) -> Float[Array, ""]:
    """Σ_{i ≤ k} |λ_i| / Σ|λ|: the share of the trace in the k largest eigenvalues.

    Args:
        values: a `spectrum`, in any order.
        k: how many, from 1 to m.

    Returns:
        A scalar without unit in [0, 1]; NaN for a zero kernel.

    Raises:
        InputError: k outside 1 … m.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(spectrum_mass(jnp.array([6.0, 3.0, 1.0]), 2)), 4)
        0.9
    """
    _check_k(k, values.shape[0])
    return jnp.sum(jax.lax.top_k(_shares(values), k)[0])


def condition_number(values: Float[Array, "m"]) -> Float[Array, ""]:
    """max|λ| / min|λ|; ∞ if min|λ| ≤ m·u·max|λ|, u the spacing of floats at 1.

    Below that limit an eigenvalue is the rounding of the decomposition and cannot be told from 0:
    the kernel is numerically singular. In float32, m = 1000, the largest condition number that can
    be told from ∞ is about 8000; for more compute the kernel and its spectrum in float64.

    Args:
        values: a `spectrum` (all of it), in any order.

    Returns:
        A scalar without unit in [1, ∞].

    Example:
        >>> import jax.numpy as jnp
        >>> float(condition_number(jnp.array([8.0, 2.0])))
        4.0
        >>> float(condition_number(jnp.array([8.0, 1e-9])))
        inf
    """
    sizes = widened(jnp.abs(values))
    largest, smallest = jnp.max(sizes), jnp.min(sizes)
    regular = smallest > sizes.size * jnp.finfo(sizes.dtype).eps * largest
    return jnp.where(regular, largest / jnp.where(regular, smallest, 1), jnp.inf)


# ---------------------------------------------------------------- eigenvectors


def _check_k(k: int, size: int) -> None:
    check_count("k", k, low=1)
    if k > size:
        raise InputError("k", expected=f"at most {size}", got=f"{k}")


def eigenvectors(
    kernel: Float[Array, "n n *c"], k: int
) -> tuple[Float[Array, "k"], Float[Array, "k n"]]:
    """The k largest eigenvalues and eigenvectors of the kernel on the images.

    Of Θ̄ = (1/c) Σ_a Θ^{aa}, the mean over outputs, made symmetric. An eigenvector's sign is free:
    here its largest entry in size is positive.

    Args:
        kernel: [n, n, c, c], [n, n, c] or [n, n].
        k: how many, from 1 to n.

    Returns:
        The eigenvalues [k], largest first, in the unit of the kernel, and the eigenvectors [k, n],
        one a row, of norm 1.

    Raises:
        InputError: a kernel that is not square on the images, k outside 1 … n.

    Example:
        >>> import jax.numpy as jnp
        >>> values, vectors = eigenvectors(jnp.diag(jnp.array([1.0, 5.0, 3.0])), 2)
        >>> values.tolist(), abs(vectors).tolist()
        ([5.0, 3.0], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """
    kernel = _checked(kernel, 2, 3, 4, square=True)
    _check_k(k, kernel.shape[0])
    if kernel.ndim == 4:
        kernel = jnp.diagonal(kernel, axis1=2, axis2=3)
    mean = kernel if kernel.ndim == 2 else jnp.mean(kernel, axis=2)
    values, columns = jnp.linalg.eigh((mean + mean.T) / 2)
    vectors = columns.T[::-1][:k]
    largest = jnp.argmax(jnp.abs(vectors), axis=1, keepdims=True)
    return values[::-1][:k], vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=1))


def eigenpictures(
    vectors: Float[Array, "k n"], images: Float[Array, "n *shape"]
) -> Float[Array, "k *shape"]:
    """Σ_i u_i x_i for each eigenvector u: the images that it weights up, as one picture.

    Args:
        vectors: eigenvectors of a kernel on the images, [k, n].
        images: the n images.

    Returns:
        One picture an eigenvector, in pixel units, of either sign.

    Raises:
        InputError: another number of images than of entries in an eigenvector.

    Example:
        >>> import jax.numpy as jnp
        >>> eigenpictures(jnp.array([[1.0, -1.0]]), jnp.array([[3.0, 4.0], [1.0, 4.0]])).tolist()
        [[2.0, 0.0]]
    """
    if vectors.ndim != 2 or vectors.shape[1] != images.shape[0]:
        raise InputError(
            "vectors",
            expected=f"shape [k, {images.shape[0]}], one entry an image",
            got=f"shape {vectors.shape}",
        )
    return jnp.tensordot(*widened((vectors, images)), axes=1, precision=_PRECISION)
