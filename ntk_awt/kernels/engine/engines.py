"""Three ways to a tangent kernel, behind one contract.

Each takes effective weights w = γ⊙m⊙θ and column factors f = γ⊙m (or none): the kernel is
J(w)·diag(f²)·J(w)ᵀ, with J the Jacobian with respect to the effective weights.

- `layerwise`: inputs and cotangents of each layer, combined in the form that costs least
  (`forms.py`); weights that do not enter in one product with the data by explicit Jacobian.
- `contraction`: the explicit Jacobian, at the kept weights only where the mask is known.
- `products`: reverse mode at one image, then forward mode at the others; any function, least
  memory (Novak et al., "Fast finite width neural tangent kernel", 2022, section 3.3).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntk_awt.kernels.engine import forms, passes, program
from ntk_awt.kernels.engine.forms import Cuts, Rows, Share, Side
from ntk_awt.kernels.engine.varying import along
from ntk_awt.types import ApplyFn, Images, Params, common_dtype, widened

ENGINES = ("layerwise", "contraction", "products")


class Engine(NamedTuple):
    """How a kernel is computed between two sets of images.

    Attributes:
        prepare: images [n, *shape] to whatever is needed of them, a pytree.
        combine: `(left, right, cuts)` to blocks of the kernel; `left is right` if symmetric.
    """

    prepare: Callable[[Images], Any]
    combine: Callable[[Any, Any, Cuts], list[jax.Array]]


class Settings(NamedTuple):
    """What all engines are told; static.

    Attributes:
        outputs: "full", "diagonal" or "trace".
        images: images at a time whose cotangents are computed together.
        rows: images at a time in row-wise forms.
    """

    outputs: str
    images: int
    rows: int


def _over_images(f: Callable[[Any], Any], x: Images, settings: Settings) -> Any:
    """f of a batch of images [n, *shape], `settings.images` of them at a time."""
    n, size = x.shape[0], settings.images
    if size >= n:
        return f(x)
    whole = n // size * size
    blocks = jax.lax.map(f, x[:whole].reshape(-1, size, *x.shape[1:]))
    found = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), blocks)
    if whole == n:
        return found
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, f(x[whole:]))


def _leaves(tree: Params | None, count: int) -> list[Any]:
    return [None] * count if tree is None else jax.tree.leaves(tree)


def layerwise(
    apply: ApplyFn,
    weights: Params,
    factor: Params | None,
    basis: jax.Array,
    settings: Settings,
    shares: Sequence[tuple[str, int, Rows | None]],
    example: Images,
) -> Engine:
    """Layer by layer, from inputs and cotangents.

    Args:
        apply, weights, factor: see the module.
        basis: cotangents of the logits, [q, c].
        settings: see `Settings`.
        shares: form, chunks and rows of each site of `program.trace(apply, weights, example)`.
        example: images of the shape and dtype to come.
    """
    traced = program.trace(apply, weights, example)
    leaves = jax.tree.leaves(weights)
    squares = None if factor is None else [f * f for f in jax.tree.leaves(factor)]

    def share(site: program.Site, form: str, chunks: int, rows: Rows | None) -> Share:
        if squares is None:
            return Share(form, None, rows, chunks)
        metric = program.normal_weight(traced, site, squares[site.leaf])
        if site.bias is not None:
            metric = jnp.concatenate([metric, squares[site.bias].reshape(1, -1)])
        return Share(form, metric, rows, chunks)

    made = [share(site, *chosen) for site, chosen in zip(traced.sites, shares, strict=True)]
    taps = [jnp.zeros(traced.shapes[s.tap].shape, traced.shapes[s.tap].dtype) for s in traced.sites]
    taps = along(taps, example)
    rest = [leaves[i] for i in traced.others]
    dtype = common_dtype(*leaves)  # some networks compute in a smaller one

    def features(image: jax.Array) -> tuple[list[Any], list[Any], Any]:
        def logits(taps: list[Any], rest: list[Any]) -> tuple[jax.Array, list[Any]]:
            values = list(leaves)
            for i, leaf in zip(traced.others, rest, strict=True):
                values[i] = leaf
            found, data = program.run(traced, values, image[None], taps)
            return found[0], data

        _, pull, data = jax.vjp(logits, taps, rest, has_aux=True)
        cotangents, jacobians = jax.vmap(pull)(basis)
        rows = []
        for site, part, a in zip(traced.sites, made, data, strict=True):
            a = program.normal_data(traced, site, a)
            if count := program.looked_up(traced, site):
                rows.append(
                    a if part.form == "lookup" else jax.nn.one_hot(a[:, 0], count, dtype=dtype)
                )
                continue
            a = program.weight_scale(site) * a.astype(dtype)
            if site.bias is not None:
                a = jnp.concatenate([a, jnp.full_like(a[:, :1], site.bias_scale)], axis=1)
            rows.append(a)
        units = []
        for site, d in zip(traced.sites, cotangents, strict=True):
            d = jax.vmap(partial(program.normal_output, traced, site))(d).astype(dtype)
            units.append(program.weight_scale(site) * d if program.looked_up(traced, site) else d)
        return rows, units, [j.reshape(len(basis), -1) for j in jacobians]

    def block(x: Images) -> tuple[list[Any], list[Any]]:
        # Explicit Jacobians are made at once, while the cotangents are in the cache.
        rows, units, jacobians = jax.vmap(features)(x)
        parts = [
            forms.prepare(share, a, d) if share.form in forms.EXPLICIT else (a, d)
            for share, a, d in zip(made, rows, units, strict=True)
        ]
        return parts, jacobians

    def prepare(x: Images) -> list[Side]:
        parts, jacobians = _over_images(block, x, settings)
        sides = [
            part if isinstance(part, Side) else forms.prepare(share, *part)
            for share, part in zip(made, parts, strict=True)
        ]
        if rest:
            factors = _leaves(factor, len(leaves))
            scaled = [
                j if factors[i] is None else j * factors[i].reshape(1, 1, -1)
                for i, j in zip(traced.others, jacobians, strict=True)
            ]
            sides.append(Side((jnp.concatenate(scaled, axis=2),), (0,)))
        return sides

    all_shares = [*made, *([Share("jacobian", None, None, 1)] if rest else [])]

    def combine(left: list[Side], right: list[Side], cuts: Cuts) -> list[jax.Array]:
        return forms.combine(all_shares, left, right, cuts, settings.outputs, settings.rows)

    return Engine(prepare, combine)


def contraction(
    apply: ApplyFn,
    weights: Params,
    factor: Params | None,
    basis: jax.Array,
    settings: Settings,
    kept: Sequence[Any],
) -> Engine:
    """Explicit Jacobians [n, q, kept weights].

    Args:
        apply, weights, factor, basis, settings: see the module and `layerwise`.
        kept: for each leaf the flat positions of the kept entries, or None for all.
    """
    factors = _leaves(factor, len(kept))

    def jacobian(image: jax.Array) -> jax.Array:
        _, pull = jax.vjp(lambda w: apply(w, image[None])[0], weights)
        (tree,) = jax.vmap(pull)(basis)
        columns = []
        for leaf, f, index in zip(jax.tree.leaves(tree), factors, kept, strict=True):
            leaf = (leaf if f is None else leaf * f).reshape(len(basis), -1)
            columns.append(leaf if index is None else leaf[:, index])
        return jnp.concatenate(columns, axis=1)

    def combine(left: jax.Array, right: jax.Array, cuts: Cuts) -> list[jax.Array]:
        return [
            forms.pair_jacobians(left[start:stop], right[first:], settings.outputs)
            for start, stop, first in cuts
        ]

    return Engine(lambda x: _over_images(jax.vmap(jacobian), x, settings), combine)


def products(
    apply: ApplyFn,
    weights: Params,
    factor: Params | None,
    basis: jax.Array,
    settings: Settings,
) -> Engine:
    """Vector products: for each right image and output one pass back and one forward.

    Args:
        apply, weights, factor, basis, settings: see the module and `layerwise`.
    """

    def block(left: Images, right: Images) -> jax.Array:
        def column(image: jax.Array) -> jax.Array:
            pull = passes.pull(lambda w: apply(w, image[None])[0], weights)

            def push(cotangent: jax.Array) -> jax.Array:
                direction = pull(cotangent)
                if factor is not None:
                    direction = jax.tree.map(lambda v, f: v * f * f, direction, factor)
                found = passes.push(lambda w: apply(w, left), weights, direction)
                return found @ widened(basis).T

            found = jax.vmap(push)(widened(basis))  # [r, n, q]
            if settings.outputs == "full":
                return found.transpose(1, 2, 0)
            diagonal = jnp.einsum("qnq->nq", found)
            return diagonal if settings.outputs == "diagonal" else diagonal.mean(axis=1)

        return jnp.moveaxis(jax.lax.map(column, right), 0, 1)

    def combine(left: Images, right: Images, cuts: Cuts) -> list[jax.Array]:
        return [block(left[start:stop], right[first:]) for start, stop, first in cuts]

    return Engine(lambda x: x, combine)
