"""The share of one weight in a tangent kernel, in six forms of equal value and different cost.

For a product y = a·W with inputs a[n, t, i] (t: positions; one for a dense layer, the output pixels
of a convolution) and cotangents δ[n, q, t, j] of the outputs q at y, the Jacobian is
J[n, q, (i, j)] = Σ_t a[n, t, i]·δ[n, q, t, j] and the share of W in the kernel

    Θ[n, m, q, r] = Σ_ij M_ij J[n, q, ij] J[m, r, ij],      M = (γ⊙m)², or 1 without a mask.

A bias is one more input that is always 1. The forms:

- `gram` (no mask): Σ_ts ⟨a_nt, a_ms⟩ ⟨δ_nqt, δ_mrs⟩; no Jacobian is formed.
- `packed` (boolean mask, one position): Σ_j [Σ_i M_ij a_ni a_mi] δ_nqj δ_mrj with one small Gram
  matrix a unit over its kept inputs. Kept inputs lie in rows of a fixed width, and a unit with more
  of them takes several rows, so an uneven mask costs no more than an even one.
- `soft` (any mask, one position): the same with all inputs, for real-valued or traced masks.
- `jacobian` (any mask): J explicitly, in chunks of units.
- `kept` (boolean mask): J explicitly at the kept entries only, from the same rows as `packed`.
- `lookup` (any mask, rows of W looked up: y_t = W[k_t], a_t is the unit vector of k_t):
  Σ_ts 1[k_nt = k_ms] Σ_j M[k_nt, j] δ_nqtj δ_mrsj; rows that no image has cost nothing.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.kernels.engine.varying import along

FORMS = ("gram", "packed", "soft", "jacobian", "kept", "lookup")
EXPLICIT = ("jacobian", "kept")
"""Forms that need of an image its Jacobian; its inputs and cotangents may be forgotten."""

Cuts: TypeAlias = tuple[tuple[int, int, int], ...]


class Rows(NamedTuple):
    """The kept inputs of each unit, in rows of equal width.

    Attributes:
        inputs: [rows, width], numbers of the inputs; 0 where a row is not full.
        valid: [rows, width], whether there is an entry.
        units: [rows], the unit of each row, ascending.
    """

    inputs: Any
    valid: Any
    units: Any


def row_counts(mask: np.ndarray, width: int) -> np.ndarray:
    """Rows that each unit of a mask [inputs, units] takes at that width."""
    return -(-np.count_nonzero(mask, axis=0) // width)


def pack(mask: np.ndarray, width: int, *, padded: bool = False) -> Rows:
    """Rows of the kept inputs of a boolean mask [inputs, units].

    Args:
        mask: which inputs each unit keeps.
        width: of the rows.
        padded: add empty rows, up to the most that any mask of as many kept entries has, so that
            the shapes depend on their number alone.

    Example:
        >>> rows = pack(np.array([[True, False], [True, True], [True, False]]), 2)
        >>> rows.inputs.tolist(), rows.valid.tolist(), rows.units.tolist()
        ([[0, 1], [2, 0], [1, 0]], [[True, True], [True, False], [True, False]], [0, 0, 1])
    """
    counts = row_counts(mask, width)
    units, inputs = np.nonzero(mask.T)
    first = np.concatenate([[0], np.cumsum(counts)])
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(mask, axis=0))])
    rank = np.arange(len(inputs)) - starts[units]
    row, column = first[units] + rank // width, rank % width
    kept, every = len(inputs), mask.shape[1]
    # Each unit's last row may hold one entry only: most rows with as many such units as there are.
    most = min(kept, every + max(kept - every, 0) // width) if padded else int(first[-1])
    found, valid = np.zeros((most, width), np.int32), np.zeros((most, width), bool)
    found[row, column], valid[row, column] = inputs, True
    owners = np.full(most, every - 1, np.int32)  # empty rows at the end keep the order
    owners[: first[-1]] = np.repeat(np.arange(every, dtype=np.int32), counts)
    return Rows(found, valid, owners)


class Share(NamedTuple):
    """What a form needs of one weight beside the images.

    Attributes:
        form: its name.
        metric: M [inputs, units], or None without a mask.
        rows: for `packed` and `kept`, else None.
        chunks: for `jacobian`, into how many parts the units are cut.
    """

    form: str
    metric: Any
    rows: Rows | None
    chunks: int


def _row_weights(share: Share) -> jax.Array:
    """M at the entries of the rows, 0 where there is none: [rows, width]."""
    rows = share.rows
    assert rows is not None
    return jnp.where(rows.valid, share.metric[rows.inputs, rows.units[:, None]], 0.0)


# ---------------------------------------------------------------- what one side needs


class Side(NamedTuple):
    """Arrays of some images, and the axis of each that numbers the images."""

    arrays: tuple[Any, ...]
    axes: tuple[int, ...]

    def cut(self, start: int, stop: int | None) -> "Side":
        """The images from `start` on, up to `stop` − 1."""
        return Side(
            tuple(
                jax.lax.slice_in_dim(a, start, stop, axis=axis)
                for a, axis in zip(self.arrays, self.axes, strict=True)
            ),
            self.axes,
        )


jax.tree_util.register_pytree_node(
    Side, lambda side: ((side.arrays,), side.axes), lambda axes, arrays: Side(arrays[0], axes)
)


def prepare(share: Share, a: jax.Array, d: jax.Array) -> Side:
    """What a form needs of some images.

    Args:
        share: the weight's form.
        a: inputs [n, t, i], or the numbers of rows [n, t, 1] for `lookup`.
        d: cotangents [n, q, t, j].
    """
    if share.form in ("gram", "lookup"):
        return Side((a, d), (0, 0))
    if share.form == "packed":
        rows = share.rows
        assert rows is not None
        gathered = a[:, 0].T[rows.inputs]  # [row, width, n]
        return Side((gathered, d[:, :, 0][:, :, rows.units]), (2, 0))
    if share.form == "soft":
        return Side((a[:, 0], d[:, :, 0]), (0, 0))
    if share.form == "jacobian":
        if share.chunks > 1:
            return Side((a, d), (0, 0))
        jacobian = jnp.einsum("nqtj,nti->nqji", d, a)  # this order needs no transposed copy
        return Side((jacobian.reshape(*d.shape[:2], -1),), (0,))
    rows = share.rows
    assert rows is not None
    n, t = a.shape[:2]
    gathered = a.reshape(n * t, -1).T[rows.inputs].reshape(*rows.inputs.shape, n, t)
    units = d.transpose(3, 0, 1, 2)[rows.units]  # [row, n, q, t]
    jacobian = jnp.einsum("rwnt,rnqt->nqrw", gathered, units)
    return Side((jacobian.reshape(n, d.shape[1], -1),), (0,))


# ---------------------------------------------------------------- pairs of images


def pair_jacobians(left: jax.Array, right: jax.Array, outputs: str) -> jax.Array:
    """⟨J[n, q, :], J[m, r, :]⟩ as [n, m, q, r], its diagonal [n, m, q] or its mean [n, m]."""
    if outputs == "full":
        return jnp.einsum("nqk,mrk->nqmr", left, right).transpose(0, 2, 1, 3)
    if outputs == "diagonal":
        return jnp.einsum("nqk,mqk->nmq", left, right)
    return jnp.einsum("nqk,mqk->nm", left, right) / left.shape[1]


def _gram(left: Side, right: Side, outputs: str) -> jax.Array:
    """The form `gram` of one position."""
    (a1, d1), (a2, d2) = left.arrays, right.arrays
    inner = a1[:, 0] @ a2[:, 0].T
    found = pair_jacobians(d1[:, :, 0], d2[:, :, 0], outputs)
    return found * inner.reshape(*inner.shape, *[1] * (found.ndim - 2))


Row: TypeAlias = tuple[Any, Callable[[Any], jax.Array]]
"""Arrays numbered by the left images, and what one image's part gives: [m, *outputs]."""


def _gram_rows(left: Side, right: Side, outputs: str) -> Row:
    a2, d2 = right.arrays
    pattern = {"full": "qtmrs,tms->mqr", "diagonal": "qtms,tms->mq", "trace": "tms,tms->m"}[outputs]

    @jax.checkpoint
    def row(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, d = image
        inner = jnp.einsum("ti,msi->tms", a, a2)
        if outputs == "full":
            outer = jnp.einsum("qtj,mrsj->qtmrs", d, d2)
        elif outputs == "diagonal":
            outer = jnp.einsum("qtj,mqsj->qtms", d, d2)
        else:
            outer = jnp.einsum("qtj,mqsj->tms", d, d2) / d.shape[0]
        return jnp.einsum(pattern, outer, inner)

    return left.arrays, row


def _lookup_rows(share: Share, left: Side, right: Side, outputs: str) -> Row:
    (a1, d1), (a2, d2) = left.arrays, right.arrays
    if share.metric is not None:  # −1, no such row, is the last one here, and equal to none below
        d1 = d1 * share.metric[a1[..., 0]][:, None]

    @jax.checkpoint
    def row(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        ids, d = image
        equal = (ids[:, None] == a2[None, :, :, 0]) & (ids >= 0)[:, None]  # [t, m, s]
        summed = jnp.einsum("tms,mrsj->mrtj", equal.astype(d.dtype), d2)
        if outputs == "full":
            return jnp.einsum("qtj,mrtj->mqr", d, summed)
        if outputs == "diagonal":
            return jnp.einsum("qtj,mqtj->mq", d, summed)
        return jnp.einsum("qtj,mqtj->m", d, summed) / d.shape[0]

    return (a1, d1), row


@jax.checkpoint  # else the scaled cotangents of all rows would be kept
def _weighted_product(g: jax.Array, d: jax.Array, d2: jax.Array) -> jax.Array:
    """Σ_j g[j, m] d[q, j] d2[j, m, r] as [m, q, r], by one product with the short side first."""
    units, images, outputs = d2.shape
    found = d @ (g[:, :, None] * d2).reshape(units, images * outputs)
    return found.reshape(len(d), images, outputs).transpose(1, 0, 2)


def _weighted_row(g: jax.Array, d: jax.Array, d2: jax.Array, outputs: str) -> jax.Array:
    """Σ_j g[j, m] d[q, j] d2[j, m, r] of one image, for all q and r, q = r, or their mean."""
    if outputs == "full":
        return _weighted_product(g, d, d2)
    if outputs == "diagonal":
        return jnp.einsum("jm,qj,jmq->mq", g, d, d2)
    return jnp.sum(g * jnp.einsum("qj,jmq->jm", d, d2), axis=0) / len(d)


def _packed_rows(share: Share, left: Side, right: Side, outputs: str) -> Row:
    (a1, d1), (a2, d2) = left.arrays, right.arrays
    weighted, of_units = a1 * _row_weights(share)[:, :, None], d2.transpose(2, 0, 1)
    grams = jnp.einsum("jwn,jwm->jnm", weighted, a2).transpose(1, 0, 2)
    return (grams, d1), lambda image: _weighted_row(image[0], image[1], of_units, outputs)


def _soft_rows(share: Share, left: Side, right: Side, outputs: str) -> Row:
    a2, d2 = right.arrays
    of_units = d2.transpose(2, 0, 1)

    def row(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, d = image
        grams = jnp.einsum("mi,ij->jm", a[None] * a2, share.metric)
        return _weighted_row(grams, d, of_units, outputs)

    return left.arrays, row


def _chunked(share: Share, left: Side, right: Side, cuts: Cuts, outputs: str) -> list[jax.Array]:
    """The blocks of the form `jacobian`, a part of the units at a time."""
    (a1, d1), (a2, d2) = left.arrays, right.arrays
    metric, units, chunks = share.metric, d1.shape[-1], share.chunks

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -units % chunks)])
        return jnp.moveaxis(padded.reshape(*x.shape[:-1], chunks, -1), -2, 0)

    @jax.checkpoint
    def part(parts: tuple[Any, ...]) -> list[jax.Array]:
        e1, e2, m = parts
        j2 = jnp.einsum("nqtj,nti->nqji", e2, a2)
        j1 = j2 if right is left else jnp.einsum("nqtj,nti->nqji", e1, a1)
        j1 = j1 if m is None else j1 * m.T[None, None]
        j1, j2 = (j.reshape(*j.shape[:2], -1) for j in (j1, j2))
        return [pair_jacobians(j1[start:stop], j2[first:], outputs) for start, stop, first in cuts]

    def add(total: list[jax.Array], parts: tuple[Any, ...]) -> tuple[list[jax.Array], None]:
        return jax.tree.map(jnp.add, total, part(parts)), None

    parts = (split(d1), split(d2), None if metric is None else split(metric))
    shapes = jax.eval_shape(part, jax.tree.map(lambda p: p[0], parts))
    zeros = along([jnp.zeros(shape.shape, shape.dtype) for shape in shapes], d1)
    return jax.lax.scan(add, zeros, parts)[0]


def _kept(share: Share, left: Side, right: Side, outputs: str) -> jax.Array:
    """The forms `jacobian` and `kept`, with all units at once."""
    (j1,), (j2,) = left.arrays, right.arrays
    if share.form == "kept":
        j1 = j1 * _row_weights(share).reshape(1, 1, -1)
    elif share.metric is not None:
        j1 = j1 * share.metric.T.reshape(1, 1, -1)
    return pair_jacobians(j1, j2, outputs)


def _block(
    shares: Sequence[Share], lefts: list[Side], rights: list[Side], outputs: str, rows: int
) -> jax.Array:
    """The sum of some shares between two sets of images."""
    whole, by_rows = [], []
    for share, left, right in zip(shares, lefts, rights, strict=True):
        if share.form == "packed":
            by_rows.append(_packed_rows(share, left, right, outputs))
        elif share.form == "lookup":
            by_rows.append(_lookup_rows(share, left, right, outputs))
        elif share.form == "soft":
            by_rows.append(_soft_rows(share, left, right, outputs))
        elif share.form != "gram":
            whole.append(_kept(share, left, right, outputs))
        elif left.arrays[0].shape[1] > 1:
            by_rows.append(_gram_rows(left, right, outputs))
        else:
            whole.append(_gram(left, right, outputs))
    if by_rows:  # in one loop: several would be run at once and evict each other from the cache
        arrays, functions = zip(*by_rows, strict=True)

        def row(parts: tuple[Any, ...]) -> jax.Array:
            return reduce(jnp.add, [f(part) for f, part in zip(functions, parts, strict=True)])

        whole.append(jax.lax.map(row, arrays, batch_size=None if rows == 1 else rows))
    return reduce(jnp.add, whole)


def combine(
    shares: Sequence[Share],
    left: list[Side],
    right: list[Side],
    cuts: Cuts,
    outputs: str,
    rows: int,
) -> list[jax.Array]:
    """The kernel between two sets of images, as blocks of rows.

    Args:
        shares: the weights' forms.
        left, right: from `prepare`, for each share; the same list if the kernel is symmetric.
        cuts: for each block the first image of the left side, the one after the last, and the
            first image of the right side (which goes to its end).
        outputs: "full" [n, m, q, r], "diagonal" [n, m, q], or "trace" (the mean) [n, m].
        rows: images of the left side at a time, in the forms that go through them one by one.

    Returns:
        The blocks, in the order of the cuts.
    """
    parts = list(zip(shares, left, right, strict=True))
    found = [_chunked(share, a, b, cuts, outputs) for share, a, b in parts if share.chunks > 1]
    if rest := [part for part in parts if part[0].chunks == 1]:
        chosen, lefts, rights = zip(*rest, strict=True)
        blocks = [
            _block(
                chosen,
                [side.cut(start, stop) for side in lefts],
                [side.cut(first, None) for side in rights],
                outputs,
                rows,
            )
            for start, stop, first in cuts
        ]
        found.append(blocks)
    return [reduce(jnp.add, blocks) for blocks in zip(*found, strict=True)]
