"""Estimates for tangent kernels that do not fit into memory, from products with vectors.

Θ(X, X')v = J(X)·(J(X')ᵀv) takes one reverse pass over X' and one forward pass over X, whatever
their number, while the kernel itself has N²C² entries. With random vectors these products give
norms, distances, traces and alignments with a standard error, and the largest eigenvalues with a
bound of their error.

**The split.** The mean of ‖Ag‖² over random g is ‖A‖_F², but where one direction carries most of
the kernel, as in differences of kernels, it varies as much as g₁² does. So the dominant directions
are found first, with other random vectors, and counted exactly (after Meyer, Musco, Musco and
Woodruff, "Hutch++: optimal stochastic trace estimation", 2021). With Q an orthonormal basis of the
span of AS, S the *sketch* of Gaussian columns, and P = QQᵀ,

    ‖A‖_F² = ‖AᵀQ‖_F² + ‖(I − P)A‖_F²,        ‖(I − P)A‖_F² = E‖(I − P)Ag‖².

Given Q this is unbiased, since the *probes* g (entries ±1) are independent of Q; with probes that
Q was made from, it is not: (I − P)As = 0 for a column s of S.

**The standard error** needs no more products. For probes g, h and a matrix M the values gᵀMg have
variance 2(‖M‖_F² − Σ M_ii²) for M symmetric, at most 2·E(gᵀMh)². All m(m − 1)/2 pairs of probes
give the latter, with less noise than the m values gᵀMg give their variance, so that intervals of
few probes cover better.

**Gradients.** Q is held fixed (`stop_gradient`). For every fixed Q the expectation over the probes
is the exact value as a function of the parameters, so its derivative with Q fixed is the exact
derivative, and the gradient of an unbiased estimate is unbiased too.

**Cost.** One product takes about three passes through the network backwards and two forwards. Of
N images and V vectors at a time are `batch` and `vectors` in memory at once; gradients run the
passes once more instead of keeping them. Matrix products inside the network have JAX's default
precision (`jax.default_matmul_precision`), those between vectors the highest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float

from ntk_awt.errors import InputError, check_count, check_number, check_same_tree
from ntk_awt.kernels.engine import passes
from ntk_awt.kernels.engine.varying import along
from ntk_awt.masks import masked, unit_gain
from ntk_awt.network import Network, check_network
from ntk_awt.types import ApplyFn, Gain, Images, Key, Mask, Params, wide, widened

# Accelerators may round the factors of a product to 10 bits unless told otherwise.
_PRECISION = jax.lax.Precision.HIGHEST

SKETCH = 8
PROBES = 16
"""Vectors of the sketch and of the residual, unless told otherwise.

On differences of dense and masked kernels (MLPs and CNNs, densities 0.05 to 0.3, 60 and 240 rows)
the relative standard deviation of the squared distance was 0.4 to 4 %, against 12 to 28 % with 16
probes alone and 9 to 20 % with 32, and the 95 % interval covered in 92 to 96 % of 600 draws.
"""

_OVERSAMPLING = 4
"""Vectors in a block of the eigenvalue iteration above the number of eigenvalues."""

_ROUNDING = 4.0
"""Relative rounding error of a product with a kernel, in units of the dtype's epsilon."""


# ---------------------------------------------------------------- products


@dataclass(frozen=True)
class Product:
    """A kernel as a linear map: `product(v)` is Θv. From `kernel_product`, or made by hand.

    Image i, output a is entry [i, a] of a vector. A block of vectors goes through `jax.vmap`.

    Attributes:
        forward: v [n2, c] to Θv [n1, c]; linear.
        transposed: u [n1, c] to Θᵀu [n2, c]; the same function as `forward` if Θ is symmetric.
        rows: (n1, c).
        columns: (n2, c).
        dtype: of the vectors.
        vectors: how many vectors the estimates send through together.
    """

    forward: Callable[[jax.Array], jax.Array]
    transposed: Callable[[jax.Array], jax.Array]
    rows: tuple[int, int]
    columns: tuple[int, int]
    dtype: Any
    vectors: int = 8

    @property
    def symmetric(self) -> bool:
        """Whether Θ is symmetric by construction."""
        return self.transposed is self.forward

    def __call__(self, v: Float[Array, "n2 c"]) -> Float[Array, "n1 c"]:
        """Θv.

        Raises:
            InputError: a vector of another shape or dtype.
        """
        if v.shape != self.columns or v.dtype != self.dtype:
            raise InputError(
                "vector",
                expected=f"{jnp.dtype(self.dtype)} of shape {self.columns}",
                got=f"{v.dtype} of shape {v.shape}",
            )
        return self.forward(v)


def kernel_product(
    apply: ApplyFn | Network,
    params: Params,
    x1: Images,
    x2: Images | None = None,
    *,
    mask: Mask | None = None,
    gain: Gain | None = None,
    batch: int | None = None,
    vectors: int = 8,
) -> Product:
    """The empirical tangent kernel Θ(x1, x2) as a linear map v ↦ J(x1)·(J(x2)ᵀv).

    Weights and images of fewer than 32 bits are cast to float32 first, as by `kernels.empirical`.

    J is the Jacobian with respect to θ; for a masked network f(x; γ⊙m⊙θ) it has the factor γ⊙m
    (theory §0). Differentiable in the parameters, in a real-valued mask, the gain and the images;
    make it inside the function that is compiled or differentiated.

    Args:
        apply: `(params, x[n, *shape]) -> logits[n, c]`, or what has one as `.apply` (a `Network`);
            image by image (no batch statistics).
        params: θ, a pytree of float arrays.
        x1: [n1, *shape].
        x2: [n2, *shape]; x1 if not given, and then the kernel is symmetric.
        mask: m, booleans or real numbers with the structure and shapes of θ; 1 if not given.
        gain: γ, scalars with the structure of θ; 1 if not given.
        batch: images at a time, at most; all if not given. It does not change the values. What one
            batch needs backwards, times `vectors`, is all the memory beside inputs and vectors.
        vectors: how many vectors the estimates send through together; each takes the memory of
            the parameters and of a batch, and together they share the pass that is common to all.

    Returns:
        A `Product`: call it with v [n2, c], get Θv [n1, c].

    Raises:
        InputError: a mask or gain that does not fit the parameters (the leaf is named), a gain
            without a mask, images of different shapes, a batch or a number of vectors below 1.

    Source: theory §0; products of Jacobians with vectors: Novak et al., "Fast finite width neural
    tangent kernel" (2022), section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: x @ w                 # Θ = ⟨x, x'⟩·I
        >>> product = kernel_product(apply, jnp.ones((2, 2)), jnp.array([[1.0, 2.0], [3.0, 0.0]]))
        >>> product(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [[5.0, 3.0], [3.0, 9.0]]
    """
    network: Any = getattr(apply, "apply", apply)
    check_network(Network(network, params), x1)
    params, x1, x2, gain = widened((params, x1, x2, gain))
    other = x1 if x2 is None else x2
    if x2 is not None and x1.shape[1:] != x2.shape[1:]:
        raise InputError("x2", expected=f"images of shape {x1.shape[1:]}", got=f"{x2.shape[1:]}")
    if batch is not None:
        check_count("batch", batch, low=1)
    check_count("vectors", vectors, low=1)
    check_count("number of images x1", x1.shape[0], low=1)
    check_count("number of images x2", other.shape[0], low=1)
    params = along(params, (x1, other))
    if mask is not None:
        check_same_tree("mask", mask, params)
        gain = unit_gain(params) if gain is None else gain
        check_same_tree("gain", gain, params, scalars=True)
        network = masked(network, mask, gain)
    elif gain is not None:
        raise InputError("gain", expected="a mask with it", got="no mask")

    def forward(v: jax.Array) -> jax.Array:
        return _push(network, params, x1, _pull(network, params, other, v, batch), batch)

    def transposed(u: jax.Array) -> jax.Array:
        return _push(network, params, other, _pull(network, params, x1, u, batch), batch)

    logits = jax.eval_shape(network, params, x1)
    return Product(
        forward=forward,
        transposed=forward if x2 is None else transposed,
        rows=(x1.shape[0], logits.shape[1]),
        columns=(other.shape[0], logits.shape[1]),
        dtype=wide(logits.dtype),
        vectors=vectors,
    )


def _pull(network: ApplyFn, params: Params, x: Images, v: jax.Array, batch: int | None) -> Params:
    """J(x)ᵀv, summed over blocks of images."""
    v = along(v, (params, x))

    @jax.checkpoint  # else a gradient would keep what every block needs backwards
    def block(images: Images, cotangents: jax.Array) -> Params:
        return passes.pull(lambda w: network(w, images), params)(cotangents)

    def add(total: Params, part: tuple[Images, jax.Array]) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, total, block(*part)), None

    blocks = (_blocks(x, x[-1:], batch), _blocks(v, jnp.zeros_like(v[-1:]), batch))
    zeros = along(jax.tree.map(jnp.zeros_like, params), blocks)
    return jax.lax.scan(add, zeros, blocks)[0]


def _push(
    network: ApplyFn, params: Params, x: Images, tangent: Params, batch: int | None
) -> jax.Array:
    """J(x)·tangent, block by block of the images."""

    @jax.checkpoint
    def block(images: Images) -> jax.Array:
        return passes.push(lambda w: network(w, images), params, tangent)

    found = jax.lax.map(block, _blocks(x, x[-1:], batch))
    return found.reshape(-1, found.shape[-1])[: x.shape[0]]


def _blocks(a: jax.Array, filler: jax.Array, batch: int | None) -> jax.Array:
    """[n, …] in blocks [count, size, …] of about equal size, at most `batch`."""
    n = a.shape[0]
    count = 1 if batch is None else math.ceil(n / batch)
    size = math.ceil(n / count)
    if missing := count * size - n:
        a = jnp.concatenate([a, jnp.broadcast_to(filler, (missing, *a.shape[1:]))])
    return a.reshape(count, size, *a.shape[1:])


# ---------------------------------------------------------------- vectors


def _through(
    function: Callable[[jax.Array], jax.Array], product: Product, vectors: jax.Array
) -> jax.Array:
    """A product with each of the vectors [k, n, c], as rows [k, n'·c]."""
    # Again computed twice for a gradient: J(x)ᵀv of every vector would be kept, each as large as θ.
    found = jax.lax.map(jax.checkpoint(function), vectors, batch_size=product.vectors)
    return found.reshape(vectors.shape[0], -1)


def _orthonormal(rows: jax.Array, key: Key) -> jax.Array:
    """An orthonormal basis of a space that contains the rows [k, d], as at most d rows; a constant.

    A row that depends on earlier ones becomes a random direction.
    """
    rows = rows[: rows.shape[1]]
    return _extend(jnp.zeros_like(rows), 0, rows, key)


def _extend(basis: jax.Array, start: int | jax.Array, rows: jax.Array, key: Key) -> jax.Array:
    """The basis with the rows, made orthonormal to it and to each other, written from `start` on.

    Gram–Schmidt, each row projected three times. Not `jnp.linalg.qr`: on a CPU with few cores two
    batches of it at once (from `vmap`) can wait for each other for ever.
    """
    rows = jax.lax.stop_gradient(rows)
    change = jax.random.normal(key, rows.shape, rows.dtype)
    rows = _unit(rows) + jnp.finfo(rows.dtype).eps * _unit(change)  # never in the basis's span

    def step(i: jax.Array, basis: jax.Array) -> jax.Array:
        row = rows[i][None]
        for _ in range(3):
            row = _unit(_without(row, basis))
        return basis.at[start + i].set(row[0])

    return jax.lax.fori_loop(0, rows.shape[0], step, basis)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows of norm 1; a row of zeros stays."""
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of all rows of `a` with all rows of `b`."""
    return jnp.matmul(a, b.T, precision=_PRECISION)


def _without(rows: jax.Array, basis: jax.Array) -> jax.Array:
    """The rows less their projection on the span of the basis."""
    return rows - jnp.matmul(_dot(rows, basis), basis, precision=_PRECISION)


def _draw(key: Key, product: Product, sketch: int, probes: int) -> tuple[jax.Array, jax.Array]:
    """Columns of the sketch, normal, and probes, ±1, independent of each other; [·, n2, c]."""
    normal = jax.random.normal(key, (sketch + probes, *product.columns), product.dtype)
    return normal[:sketch], jnp.where(normal[sketch:] < 0, -1, 1).astype(product.dtype)


# ---------------------------------------------------------------- estimates


class Estimate(NamedTuple):
    """An estimate from random probes.

    Attributes:
        value: a scalar.
        standard_error: of the value, with an allowance for rounding; a constant for gradients.
        degrees: degrees of freedom, the number of probes less one.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    degrees: int

    def interval(self, level: float = 0.95) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Confidence interval, value ± t·standard error with Student's t.

        Args:
            level: in (0, 1).

        Returns:
            Its ends.

        Raises:
            InputError: a level outside (0, 1].

        Example:
            >>> import jax.numpy as jnp
            >>> low, high = Estimate(jnp.array(5.0), jnp.array(1.0), 15).interval()
            >>> round(float(low), 3), round(float(high), 3)
            (2.869, 7.131)
        """
        check_number("level", level, low=0, high=1, low_open=True)
        quantile = scipy.special.stdtrit(np.asarray(self.degrees), (1 + level) / 2)
        half = jnp.asarray(quantile, self.value.dtype) * self.standard_error
        return self.value - half, self.value + half


def _pair_error(pairs: jax.Array) -> jax.Array:
    """Standard error of the mean of gᵀMg from gᵀMh for all pairs of probes, [m, m]."""
    m = pairs.shape[0]
    squares = jnp.square(pairs + pairs.T) / 4  # of M made symmetric, which has the same gᵀMg
    other = (jnp.sum(squares) - jnp.sum(jnp.diagonal(squares))) / (m * (m - 1))
    return jnp.sqrt(2 * other / m)


def _estimate(value: jax.Array, pairs: jax.Array, rounding: jax.Array) -> Estimate:
    error = jax.lax.stop_gradient(jnp.hypot(_pair_error(pairs), rounding))
    return Estimate(value, error, pairs.shape[0] - 1)


class _Gram(NamedTuple):
    """Inner products of matrices A_r, in parts.

    Attributes:
        exact: ⟨A_rᵀQ, A_sᵀQ⟩, [r, s].
        pairs: ⟨(I − P)A_r g_i, (I − P)A_s g_j⟩, [r, s, i, j]; for i = j its mean over the probes is
            ⟨(I − P)A_r, (I − P)A_s⟩.
        sizes: about Σ_q |weights_rq| ‖Θ_q‖_F, which rounding is relative to, [r].
    """

    exact: jax.Array
    pairs: jax.Array
    sizes: jax.Array


def _gram(
    products: Sequence[Product],
    weights: Sequence[Sequence[float]],
    key: Key,
    sketch: int,
    probes: int,
) -> _Gram:
    """Inner products of A_r = Σ_q weights_rq Θ_q, all from one basis Q and the same probes."""
    first = products[0]
    for product in products[1:]:
        if (product.rows, product.columns) != (first.rows, first.columns):
            raise InputError(
                "products",
                expected="kernels of the same shape",
                got=f"{first.rows} × {first.columns} and {product.rows} × {product.columns}",
            )
    _check_counts(sketch, probes)
    mixing = jnp.asarray(weights, first.dtype)

    def mixed(found: jax.Array) -> jax.Array:
        return jnp.einsum("rq,qkd->rkd", mixing, found, precision=_PRECISION)

    draw_key, basis_key = jax.random.split(key)
    columns, others = _draw(draw_key, first, sketch, probes)
    seen = mixed(jnp.stack([_through(p, p, columns) for p in products]))
    basis = _orthonormal(seen.reshape(-1, seen.shape[-1]), basis_key)
    vectors = basis.reshape(-1, *first.rows)
    inside = jnp.stack([_through(p.transposed, p, vectors) for p in products])
    outside = jnp.stack([_without(_through(p, p, others), basis) for p in products])
    norms = jnp.sqrt(jnp.sum(inside**2, (1, 2)) + jnp.sum(outside**2, (1, 2)) / probes)
    inside, outside = mixed(inside), mixed(outside)
    return _Gram(
        jnp.einsum("rkd,skd->rs", inside, inside, precision=_PRECISION),
        jnp.einsum("rid,sjd->rsij", outside, outside, precision=_PRECISION),
        jnp.abs(mixing) @ norms,
    )


def _of_gram(function: Callable[[jax.Array], jax.Array], gram: _Gram) -> Estimate:
    """A function of the inner products [r, s], its error by the delta method."""
    mean = gram.exact + jnp.mean(jnp.diagonal(gram.pairs, axis1=2, axis2=3), axis=-1)
    fixed = jax.lax.stop_gradient(mean)
    slope = jax.grad(function)(fixed)
    products = jnp.sqrt(jnp.diagonal(fixed))[:, None] * gram.sizes[None]
    rounding = _ROUNDING * jnp.finfo(mean.dtype).eps * (products + products.T)
    return _estimate(
        function(mean),
        jnp.einsum("rs,rsij->ij", slope, gram.pairs, precision=_PRECISION),
        jnp.sum(jnp.abs(slope) * rounding),
    )


def _check_counts(sketch: int, probes: int) -> None:
    check_count("sketch", sketch, low=1)
    check_count("probes", probes, low=2)


def squared_norm(
    product: Product, key: Key, *, sketch: int = SKETCH, probes: int = PROBES
) -> Estimate:
    """Unbiased estimate of ‖Θ‖_F².

    Args:
        product: of the kernel; it need not be symmetric.
        key: of the random vectors.
        sketch: vectors that find the dominant directions.
        probes: random vectors for the rest.

    Returns:
        The estimate, in squared units of the kernel. It takes 2·sketch + probes products. If the
        sketch has as many vectors as the kernel has rank, it is exact up to rounding.

    Raises:
        InputError: fewer than 1 vector in the sketch or 2 probes.

    Source: the module's notes; Meyer et al. (2021).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> product = kernel_product(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2))  # Θ = I
        >>> round(float(squared_norm(product, jax.random.key(0)).value), 4)
        2.0
    """
    return _of_gram(lambda g: g[0, 0], _gram([product], [[1]], key, sketch, probes))


def squared_distance(
    first: Product, second: Product, key: Key, *, sketch: int = SKETCH, probes: int = PROBES
) -> Estimate:
    """Unbiased estimate of ‖Θ − Θ'‖_F²; divided by n1·n2 it is the square of `kernel_distance`.

    The difference is taken of products with the same vector, so what the kernels have in common
    cancels without noise; its rounding, about 1e-7·‖Θ‖ in float32, is in the standard error.

    Args:
        first, second: of kernels of the same shape; they need not be symmetric.
        key, sketch, probes: as for `squared_norm`.

    Returns:
        The estimate, in squared units of the kernels. It takes 2·sketch + probes products with each
        kernel.

    Raises:
        InputError: kernels of different shapes, or what `squared_norm` raises.

    Source: the module's notes; Meyer et al. (2021).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> apply, x = lambda w, x: x @ w, jnp.eye(2)
        >>> dense = kernel_product(apply, jnp.ones((2, 1)), x)
        >>> sparse = kernel_product(apply, jnp.ones((2, 1)), x, mask=jnp.array([[True], [False]]))
        >>> round(float(squared_distance(dense, sparse, jax.random.key(0)).value), 4)
        1.0
    """
    return _of_gram(lambda g: g[0, 0], _gram([first, second], [[1, -1]], key, sketch, probes))


def relative_squared_distance(
    dense: Product, sparse: Product, key: Key, *, sketch: int = SKETCH, probes: int = PROBES
) -> Estimate:
    """Estimate of ‖Θ^d − Θ^s‖_F² / ‖Θ^d‖_F², as `relative_kernel_distance`.

    Numerator and denominator come from the same sketch and probes, so their errors cancel in part;
    the standard error is that of the ratio's linearisation. Consistent, not unbiased: the bias
    falls as 1/probes and is of the order of the squared relative standard error.

    Args:
        dense, sparse: of kernels of the same shape; they need not be symmetric.
        key, sketch, probes: as for `squared_norm`; the sketch is of the difference and of Θ^d.

    Returns:
        The estimate, without unit. It takes 3·sketch + probes products with each kernel.

    Raises:
        InputError: as `squared_distance`.

    Source: theory §0 for the distance; the module's notes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> apply, x = lambda w, x: x @ w, jnp.eye(2)
        >>> dense = kernel_product(apply, jnp.ones((2, 1)), x)
        >>> sparse = kernel_product(apply, jnp.ones((2, 1)), x, mask=jnp.array([[True], [False]]))
        >>> round(float(relative_squared_distance(dense, sparse, jax.random.key(0)).value), 4)
        0.5
    """
    gram = _gram([dense, sparse], [[1, -1], [1, 0]], key, sketch, probes)
    return _of_gram(lambda g: g[0, 0] / g[1, 1], gram)


def inner_product(
    first: Product, second: Product, key: Key, *, sketch: int = SKETCH, probes: int = PROBES
) -> Estimate:
    """Unbiased estimate of ⟨Θ, Θ'⟩_F, from E⟨Θg, Θ'g⟩.

    Args:
        first, second: of kernels of the same shape; they need not be symmetric.
        key, sketch, probes: as for `squared_norm`; the sketch is of both kernels.

    Returns:
        The estimate, in the product of the kernels' units. It takes 3·sketch + probes products with
        each kernel.

    Raises:
        InputError: as `squared_distance`.

    Source: the module's notes; Meyer et al. (2021).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> apply, w = lambda w, x: x @ w, jnp.ones((2, 1))
        >>> first = kernel_product(apply, w, jnp.eye(2))
        >>> second = kernel_product(apply, w, jnp.ones((2, 2)))
        >>> round(float(inner_product(first, second, jax.random.key(0)).value), 4)
        4.0
    """
    return _of_gram(
        lambda g: g[0, 1], _gram([first, second], [[1, 0], [0, 1]], key, sketch, probes)
    )


def alignment(
    first: Product, second: Product, key: Key, *, sketch: int = SKETCH, probes: int = PROBES
) -> Estimate:
    """Estimate of ⟨Θ, Θ'⟩_F / (‖Θ‖_F ‖Θ'‖_F), the cosine of the angle between two kernels.

    All three numbers come from the same sketch and probes; the standard error is that of the
    linearisation. Consistent, not unbiased, as `relative_squared_distance`.

    Args:
        first, second: of kernels of the same shape; they need not be symmetric.
        key, sketch, probes: as for `inner_product`.

    Returns:
        The estimate, without unit, in [−1, 1]. Products as for `inner_product`.

    Raises:
        InputError: as `squared_distance`.

    Source: Cristianini et al., "On kernel-target alignment" (2001); the module's notes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> apply, w = lambda w, x: x @ w, jnp.ones((2, 1))
        >>> first = kernel_product(apply, w, jnp.eye(2))
        >>> second = kernel_product(apply, w, jnp.ones((2, 2)))
        >>> round(float(alignment(first, second, jax.random.key(0)).value), 4)
        0.7071
    """
    gram = _gram([first, second], [[1, 0], [0, 1]], key, sketch, probes)
    return _of_gram(lambda g: g[0, 1] / jnp.sqrt(g[0, 0] * g[1, 1]), gram)


def label_alignment(
    product: Product,
    targets: Float[Array, "n c"],
    key: Key,
    *,
    sketch: int = SKETCH,
    probes: int = PROBES,
) -> Estimate:
    """Estimate of yᵀΘy / (‖Θ‖_F ‖y‖²), y = vec Y, as `label_alignment` of a full kernel.

    yᵀΘy is exact, by one product; only ‖Θ‖_F is estimated. Consistent, not unbiased, as
    `relative_squared_distance`.

    Args:
        product: of a kernel with as many rows as columns.
        targets: Y [n, c], one-hot labels, or those less their mean over the images.
        key, sketch, probes: as for `squared_norm`.

    Returns:
        The estimate, without unit. It takes 2·sketch + probes + 1 products.

    Raises:
        InputError: a kernel that is not square, targets of another shape, or what `squared_norm`
            raises.

    Source: Cristianini et al., "On kernel-target alignment" (2001); the module's notes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> product = kernel_product(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2))  # Θ = I
        >>> targets = jnp.array([[1.0], [-1.0]])
        >>> round(float(label_alignment(product, targets, jax.random.key(0)).value), 4)
        0.7071
    """
    _check_square(product)
    y = jnp.asarray(targets)
    if y.shape != product.rows:
        raise InputError("targets", expected=f"shape {product.rows}", got=f"shape {y.shape}")
    y = y.astype(product.dtype)
    numerator = jnp.vdot(y, product(y), precision=_PRECISION) / jnp.sum(y**2)
    gram = _gram([product], [[1]], key, sketch, probes)
    return _of_gram(lambda g: numerator / jnp.sqrt(g[0, 0]), gram)


def trace(product: Product, key: Key, *, sketch: int = SKETCH, probes: int = PROBES) -> Estimate:
    """Unbiased estimate of tr Θ = tr QᵀΘQ + E gᵀ(I − P)Θ(I − P)g.

    Args:
        product: of a kernel with as many rows as columns; it need not be symmetric.
        key, sketch, probes: as for `squared_norm`.

    Returns:
        The estimate, in the unit of the kernel: Σ_i Σ_a Θ[i, i, a, a]. It takes 2·sketch + probes
        products.

    Raises:
        InputError: a kernel that is not square, or what `squared_norm` raises.

    Source: Meyer et al. (2021).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> product = kernel_product(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2))  # Θ = I
        >>> round(float(trace(product, jax.random.key(0)).value), 4)
        2.0
    """
    _check_square(product)
    _check_counts(sketch, probes)
    draw_key, basis_key = jax.random.split(key)
    columns, others = _draw(draw_key, product, sketch, probes)
    basis = _orthonormal(_through(product, product, columns), basis_key)
    rest = _without(others.reshape(probes, -1), basis)
    inside = _through(product, product, basis.reshape(-1, *product.columns))
    pairs = _dot(rest, _through(product, product, rest.reshape(-1, *product.columns)))
    exact = jnp.sum(basis * inside)
    sizes = jnp.sum(jnp.linalg.norm(inside, axis=1)) + jnp.mean(jnp.abs(jnp.diagonal(pairs)))
    rounding = _ROUNDING * jnp.finfo(pairs.dtype).eps * sizes
    return _estimate(exact + jnp.mean(jnp.diagonal(pairs)), pairs, rounding)


def _check_square(product: Product) -> None:
    if product.rows != product.columns:
        raise InputError(
            "kernel",
            expected="as many rows as columns",
            got=f"{product.rows[0]} and {product.columns[0]} images",
        )


# ---------------------------------------------------------------- eigenvalues


class Eigenvalues(NamedTuple):
    """Approximate eigenvalues of a symmetric kernel, largest first.

    Attributes:
        values: [k], the unit of the kernel.
        residuals: ‖Θu − λu‖ [k], the unit of the kernel; the interval λ ± residual contains an
            eigenvalue. Constants for gradients.
        vectors: u [k, n, c], orthonormal. Constants for gradients.
    """

    values: Float[Array, "k"]
    residuals: Float[Array, "k"]
    vectors: Float[Array, "k n c"]


def top_eigenvalues(product: Product, k: int, key: Key, *, iterations: int = 4) -> Eigenvalues:
    """The k largest eigenvalues of a symmetric kernel, by a randomised block Krylov space.

    Rayleigh–Ritz on the span of Z, ΘZ, …, Θ^{q−1}Z with Z of k + 4 random columns, the blocks made
    orthonormal to all earlier ones; then once more on the k vectors found, with new products, so
    that the residuals hold whatever rounding did before. For u of norm 1, λ = uᵀΘu has an
    eigenvalue within ‖Θu − λu‖, and the i-th largest eigenvalue is at least the i-th value. That no
    larger eigenvalue was missed is not certain, but has probability 1 in exact arithmetic.

    Gradients are those of uᵀΘu with u fixed: exact for a converged eigenvalue, up to the residual.

    Args:
        product: of a symmetric kernel (made without x2).
        k: how many.
        key: of the first block.
        iterations: q, products with each of the k + 4 columns; k more products follow. The basis
            takes the memory of 2q(k + 4) vectors.

    Returns:
        Values, residuals and vectors.

    Raises:
        InputError: a kernel that is not symmetric, k outside 1 … n·c, iterations below 1.

    Source: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
    singular value decomposition" (2015); residual bound: Parlett, "The symmetric eigenvalue
    problem" (1998), section 4.5.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
        >>> product = kernel_product(lambda w, x: x @ w, jnp.ones((3, 1)), x)  # Θ = x·xᵀ
        >>> [round(v, 4) for v in top_eigenvalues(product, 2, jax.random.key(0)).values.tolist()]
        [9.0, 4.0]
    """
    if not product.symmetric:
        raise InputError(
            "kernel", expected="a symmetric one", got="a mixed one", fix="make it without x2"
        )
    size = math.prod(product.rows)
    check_count("k", k, low=1)
    check_count("iterations", iterations, low=1)
    if k > size:
        raise InputError("k", expected=f"at most {size}", got=f"{k}")
    width = k + _OVERSAMPLING
    if width * iterations >= size:  # the whole space takes fewer products
        width, iterations = size, 1

    def image(rows: jax.Array) -> jax.Array:
        return _through(product, product, rows.reshape(-1, *product.rows))

    def step(basis: jax.Array, inputs: tuple[jax.Array, Key]) -> tuple[jax.Array, jax.Array]:
        first, key = inputs
        found = image(jax.lax.dynamic_slice_in_dim(basis, first, width))
        # What the last block gives would come after the end of the basis, and is dropped.
        return _extend(basis, first + width, found, key), jax.lax.stop_gradient(found)

    draw_key, start_key, last_key, *step_keys = jax.random.split(key, 3 + iterations)
    start = jax.random.normal(draw_key, (width, size), product.dtype)
    # As the products will, inside `jax.shard_map`; the values of this one are not used.
    start = along(start, image(start[:1]))
    basis = along(jnp.zeros((iterations * width, size), product.dtype), start)
    basis = _extend(basis, 0, start, start_key)
    inputs = (width * jnp.arange(iterations), jnp.stack(step_keys))
    basis, found = jax.lax.scan(step, basis, inputs)
    vectors = _orthonormal(_ritz(_dot(basis, found.reshape(-1, size)), k, basis), last_key)
    images = image(vectors)
    turn = _ritz(_dot(vectors, images), k, jnp.eye(k, dtype=product.dtype))
    vectors, images = (jnp.matmul(turn, a, precision=_PRECISION) for a in (vectors, images))
    values = jnp.sum(vectors * images, axis=1)
    residuals = jax.lax.stop_gradient(jnp.linalg.norm(images - values[:, None] * vectors, axis=1))
    return Eigenvalues(values, residuals, vectors.reshape(k, *product.rows))


def _ritz(quotients: jax.Array, k: int, basis: jax.Array) -> jax.Array:
    """The k top eigenvectors of a small matrix, largest first, as combinations of the basis."""
    matrix = jax.lax.stop_gradient(quotients + quotients.T) / 2
    top = jnp.linalg.eigh(matrix)[1].T[::-1][:k]
    return jnp.matmul(top, basis, precision=_PRECISION)
