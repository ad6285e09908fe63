"""Empirical tangent kernels of any network: clean, mixed, masked.

Θ(x, x') = J(x) J(x')ᵀ with J = ∂f/∂θ [classes, parameters]. Of a masked network f(x; γ⊙m⊙θ) the
Jacobian is J_m = J(γ⊙m⊙θ)·diag(γ⊙m): pruned weights contribute nothing, since they never move
(theory §0). With x clean and x' adversarial Θ(X, X̃) is the mixed tangent kernel of adversarial
training; it is not symmetric.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk_awt.errors import InputError, check_same_tree, choose
from ntk_awt.kernels.engine import engines, forms, planning, program
from ntk_awt.kernels.engine.engines import Engine
from ntk_awt.kernels.engine.planning import BUDGET, Plan
from ntk_awt.kernels.engine.varying import along
from ntk_awt.masks import effective, unit_gain
from ntk_awt.network import Network, check_network
from ntk_awt.types import ApplyFn, Gain, Images, Mask, Params, common_dtype, widened

JACOBIANS = ("masked", "full")


def empirical(
    apply: ApplyFn | Network,
    params: Params,
    x1: Images,
    x2: Images | None = None,
    *,
    mask: Mask | None = None,
    gain: Gain | None = None,
    jacobian: str = "masked",
    at: Params | None = None,
    outputs: str | int = "full",
    engine: str = "auto",
    batch: int | None = None,
    memory: int = BUDGET,
    plan: Plan | None = None,
    selection: list[Any] | None = None,
) -> Float[Array, "n1 n2 *outputs"]:
    """Empirical tangent kernel Θ(x1, x2) of a dense or masked network.

    Θ[i, j, a, b] = ⟨∂f_a(x1_i)/∂θ, ∂f_b(x2_j)/∂θ⟩. Differentiable in the parameters, in a
    real-valued mask, the gain and the images; may be called under jit. A boolean mask whose values
    are known (not traced) is the fast case: pruned weights then cost nothing.

    Weights and images of fewer than 32 bits are cast to float32 first: what a network computes in
    float16 is rounded to 3 digits, and infinite above 65504. Inside `jax.shard_map` each device
    computes the kernel of its own images.

    Args:
        apply: `(params, x[n, *shape]) -> logits[n, c]`, or what has one as `.apply` (a `Network`);
            image by image (no batch statistics).
        params: θ, a pytree of float arrays.
        x1: [n1, *shape], floats, or integers for a network that looks up rows of its weights.
        x2: [n2, *shape]; x1 if not given, and then only half of the kernel is computed.
        mask: m, booleans or real numbers with the structure and shapes of θ; 1 if not given.
        gain: γ, scalars with the structure of θ; 1 if not given.
        jacobian: "masked" for J·diag(γ⊙m), the gradient with respect to θ; "full" for the gradient
            with respect to the effective weights γ⊙m⊙θ, pruned ones included (the convention of
            Neural Tangent Transfer, Liu & Zenke, 2020).
        at: effective weights at which J is taken; γ⊙m⊙θ if not given.
        outputs: "full" for all pairs, "diagonal" for a = b, "trace" for the mean over a = b, or a
            number c for Θ[:, :, c, c] alone.
        engine: "layerwise", "contraction", "products" (see `engines.py`), or "auto": the one that
            costs least.
        batch: images a tile; chosen from `memory` if not given. It does not change the values.
        memory: bytes for features and temporary arrays, the kernel itself apart.
        plan: from `kernels.plan`, in place of the last four; print it to see what was chosen.
        selection: from `kernels.selection` for that plan and this mask, which may then be traced:
            so a function that is compiled once can take any mask of as many kept weights.

    Returns:
        Θ, the dtype of the parameters, float32 at least: [n1, n2, c, c] for "full", [n1, n2, c] for
        "diagonal", [n1, n2] else.

    Raises:
        InputError: a mask or gain that does not fit the parameters (the leaf is named), a gain
            without a mask, images of different shapes, an unknown option, a kernel that would not
            fit into memory, a plan for other sizes.

    Source: theory §0; what the engines do is described in `forms.py` and `engines.py`.

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: x @ w                 # Θ = ⟨x, x'⟩·I
        >>> kernel = empirical(apply, jnp.ones((2, 2)), jnp.array([[1.0, 2.0]]))
        >>> kernel.shape, kernel[0, 0].tolist()
        ((1, 1, 2, 2), [[5.0, 0.0], [0.0, 5.0]])
    """
    function: Any = getattr(apply, "apply", apply)
    choose("jacobian", jacobian, JACOBIANS)
    if plan is None:
        check_network(Network(function, params), x1)
    if x2 is not None and x1.shape[1:] != x2.shape[1:]:
        raise InputError("x2", expected=f"images of shape {x1.shape[1:]}", got=f"{x2.shape[1:]}")
    params, x1, x2, gain, at = widened((params, x1, x2, gain, at))
    weights, factor = params, None
    if mask is not None:
        check_same_tree("mask", mask, params)
        gain = unit_gain(params) if gain is None else gain
        check_same_tree("gain", gain, params, scalars=True)
        weights = effective(params, mask, gain)
        if jacobian == "masked":
            factor = effective(jax.tree.map(jnp.ones_like, params), mask, gain)
    elif gain is not None:
        raise InputError("gain", expected="a mask with it", got="no mask")
    if at is not None:
        check_same_tree("at", at, params)
        weights = at
    known = None if factor is None else mask
    if selection is not None and (plan is None or known is None):
        raise InputError("selection", expected="a plan and a mask with it", got="one of them alone")
    if plan is None:
        plan = planning.make(
            function, weights, x1, x2, mask=known, outputs=outputs, engine=engine, batch=batch,
            memory=memory,
        )  # fmt: skip
    else:
        _check_plan(plan, function, weights, x1, x2, factor is not None)
    if selection is None:
        selection = _selection(plan, function, weights, x1, known)
    return _compute(weights, factor, selection, x1, x2, function, plan)


def selection(
    plan: Plan,
    apply: ApplyFn | Network,
    params: Params,
    x: Images,
    mask: Mask,
    *,
    padded: bool = True,
) -> list[Any]:
    """What the plan's forms need of a mask, as arrays that may be arguments of a jitted function.

    Their shapes depend on the number of kept weights of each layer alone, not on which they are.

    Args:
        plan: from `kernels.plan`, made with a mask of as many kept weights in each layer.
        apply, params: the network; only shapes are looked at.
        x: images [n, *shape]; only the shape is looked at.
        mask: m, booleans that can be read now.
        padded: False where all masks keep as many weights in each *unit*: their shapes are the same
            then without empty rows, which cost as much as full ones.

    Returns:
        A list of arrays, for `empirical(plan=plan, selection=…)`.

    Raises:
        InputError: a mask that does not fit the parameters or whose values are not known.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ntk_awt.kernels import plan
        >>> apply, x = lambda w, x: x @ w, jnp.eye(3)
        >>> masks = [jnp.array([[True], [False], [False]]), jnp.array([[False], [True], [False]])]
        >>> chosen = plan(apply, jnp.ones((3, 1)), x, mask=masks[0])
        >>> @jax.jit
        ... def kernel(mask, entries):
        ...     w = jnp.ones((3, 1))
        ...     return empirical(apply, w, x, mask=mask, plan=chosen, selection=entries)
        >>> for mask in masks:
        ...     entries = selection(chosen, apply, jnp.ones((3, 1)), x, mask)
        ...     print(kernel(mask, entries)[:, :, 0, 0].diagonal())
        [1. 0. 0.]
        [0. 1. 0.]
    """
    check_same_tree("mask", mask, params)
    params, x = widened((params, x))
    function: Any = getattr(apply, "apply", apply)
    return _selection(plan, function, params, x, mask, padded=padded)


def _check_plan(
    plan: Plan, apply: ApplyFn, params: Params, x1: Images, x2: Images | None, masked: bool
) -> None:
    found = (x1.shape[0], (x1 if x2 is None else x2).shape[0], x2 is None)
    if found != (*plan.shape[:2], plan.symmetric):
        wanted = f"{list(plan.shape[:2])} images, x2 {'not ' * plan.symmetric}given"
        got = f"{list(found[:2])} images, x2 {'not ' * found[2]}given"
        raise InputError("plan", expected=wanted, got=got, fix="make a plan for these images")
    if masked != plan.masked:
        got = f"{'a' if masked else 'no'} mask"
        wanted = f"{'a' if plan.masked else 'no'} mask in the Jacobian"
        raise InputError("plan", expected=wanted, got=got, fix="make the plan with the same mask")
    if plan.engine == "layerwise":
        traced = program.trace(apply, params, x1)
        sizes = [planning.sizes(traced, site) for site in traced.sites]
        wanted = [(layer.positions, layer.inputs, layer.units) for layer in plan.layers]
        if sizes != wanted:
            raise InputError("plan", expected=f"layers (T, I, O) {wanted}", got=f"{sizes}")


def _selection(
    plan: Plan,
    apply: ApplyFn,
    params: Params,
    x: Images,
    mask: Mask | None,
    *,
    padded: bool = False,
) -> list[Any]:
    """What is known of the mask beforehand: rows for each layer, or kept entries of each leaf."""
    masks = planning.known(mask)
    if plan.engine == "contraction":
        if masks is None:
            return [None] * len(jax.tree.leaves(params))
        return [None if m.all() else np.flatnonzero(m) for m in masks]
    if plan.engine == "products":
        return []
    traced = program.trace(apply, params, x)
    rows = []
    for site, layer in zip(traced.sites, plan.layers, strict=True):
        if layer.width and masks is None:
            raise InputError(
                "mask",
                expected=f"booleans known beforehand, for the form {layer.form} of {layer.name}",
                got="none, traced ones or numbers",
                fix="make the plan with the mask that it is used with",
            )
        if layer.width and masks is not None:
            matrix = planning.matrix(traced, site, masks)
            rows.append(forms.pack(matrix, layer.width, padded=padded))
        else:
            rows.append(None)
    return rows


@partial(jax.jit, static_argnames=("apply", "plan"))
def _compute(
    weights: Params,
    factor: Params | None,
    selection: list[Any],
    x1: Images,
    x2: Images | None,
    apply: ApplyFn,
    plan: Plan,
) -> jax.Array:
    # Accelerators may round the factors of a product to 10 bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        everything = (weights, factor, selection, x1, x2)
        weights, factor, selection, x1, x2 = along(everything, everything)
        return _kernel(weights, factor, selection, x1, x2, apply, plan)


def _kernel(
    weights: Params,
    factor: Params | None,
    selection: list[Any],
    x1: Images,
    x2: Images | None,
    apply: ApplyFn,
    plan: Plan,
) -> jax.Array:
    # In a function of our own: JAX keeps its argument by a weak reference, which not all allow.
    logits = jax.eval_shape(lambda w, x: apply(w, x), weights, x1)
    basis = along(jnp.eye(logits.shape[1], dtype=logits.dtype), x1)
    outputs = plan.outputs
    if isinstance(outputs, int):
        basis, outputs = basis[outputs : outputs + 1], "trace"
    settings = engines.Settings(outputs, plan.images, plan.rows)
    common = (apply, weights, factor, basis, settings)
    if plan.engine == "layerwise":
        shares = [
            (layer.form, layer.chunks, rows)
            for layer, rows in zip(plan.layers, selection, strict=True)
        ]
        engine = engines.layerwise(*common, shares, x1)
    elif plan.engine == "contraction":
        engine = engines.contraction(*common, selection)
    else:
        engine = engines.products(*common)
    return _tiles(engine, x1, x2, plan).astype(common_dtype(*jax.tree.leaves(weights)))


def _swap(block: jax.Array) -> jax.Array:
    """Θ(x', x) from Θ(x, x')."""
    axes = (1, 0, 3, 2) if block.ndim == 4 else (1, 0, *range(2, block.ndim))
    return block.transpose(axes)


def _mirror(blocks: list[jax.Array], cuts: forms.Cuts) -> jax.Array:
    """A symmetric kernel from its rows right of the diagonal."""
    rows = []
    for k, (start, stop, _) in enumerate(cuts):
        left = [
            _swap(block[:, start - first : stop - first])
            for block, (_, _, first) in zip(blocks[:k], cuts[:k], strict=True)
        ]
        rows.append(jnp.concatenate([*left, blocks[k]], axis=1))
    return jnp.concatenate(rows)


def _tiles(engine: Engine, x1: Images, x2: Images | None, plan: Plan) -> jax.Array:
    """The kernel, tile by tile if it does not fit into one."""
    n1, n2 = plan.shape[:2]
    if max(n1, n2) <= plan.tile:
        left = engine.prepare(x1)
        if x2 is None:
            return _mirror(engine.combine(left, left, plan.cuts), plan.cuts)
        (block,) = engine.combine(left, engine.prepare(x2), ((0, n1, 0),))
        return block
    size1, size2 = min(plan.tile, n1), min(plan.tile, n2)
    whole = ((0, size1, 0),)
    tiles1 = _cut(x1, size1)
    tiles2 = tiles1 if x2 is None else _cut(x2, size2)
    count1, count2 = len(tiles1), len(tiles2)
    pairs = [(i, j) for i in range(count1) for j in range(i if x2 is None else 0, count2)]
    stored1 = jax.lax.map(engine.prepare, tiles1) if plan.stored else None
    stored2 = (
        stored1 if x2 is None else jax.lax.map(engine.prepare, tiles2) if plan.stored else None
    )

    def get(tiles: jax.Array, stored: Any, i: jax.Array) -> Any:
        if stored is None:
            return engine.prepare(tiles[i])
        return jax.tree.map(lambda a: a[i], stored)

    def pair(i: jax.Array, j: jax.Array) -> jax.Array:
        return engine.combine(get(tiles1, stored1, i), get(tiles2, stored2, j), whole)[0]

    block: Any = jax.checkpoint(pair)

    def write(kernel: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
        i, j = place
        found = block(i, j)
        rest = [0] * (kernel.ndim - 2)
        kernel = jax.lax.dynamic_update_slice(kernel, found, (i * size1, j * size2, *rest))
        if x2 is None:
            mirrored = (j * size2, i * size1, *rest)
            kernel = jax.lax.dynamic_update_slice(kernel, _swap(found), mirrored)
        return kernel, None

    one = jax.eval_shape(block, 0, 0)
    empty = jnp.zeros((count1 * size1, count2 * size2, *one.shape[2:]), one.dtype)
    empty = along(empty, x1)
    return jax.lax.scan(write, empty, jnp.array(pairs))[0][:n1, :n2]


def _cut(x: Images, size: int) -> jax.Array:
    """Tiles [count, size, *shape]; the last image fills up the last tile."""
    count = math.ceil(x.shape[0] / size)
    fill = jnp.broadcast_to(x[-1:], (count * size - x.shape[0], *x.shape[1:]))
    return jnp.concatenate([x, fill]).reshape(count, size, *x.shape[1:])
