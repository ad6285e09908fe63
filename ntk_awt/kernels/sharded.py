"""Tangent kernels over several devices, of one process or of several.

Each device computes the rows Θ(X_d, X2) of its share X_d of the first images, through the engines
of `kernels.empirical`; the network and the second images are on all of them, and the devices
exchange nothing. Several processes (after `jax.distributed.initialize`, on a mesh of all of
`jax.devices()`) make the same calls with the same arguments; each then holds its devices' rows.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from ntk_awt.errors import InputError, check_same_tree, choose
from ntk_awt.kernels.empirical import _compute, _selection
from ntk_awt.kernels.engine import planning
from ntk_awt.kernels.engine.planning import BUDGET, Plan
from ntk_awt.masks import effective, unit_gain
from ntk_awt.network import Network
from ntk_awt.types import ApplyFn, Gain, Images, Mask, Params, widened


def empirical(
    apply: ApplyFn | Network,
    params: Params,
    x1: Images,
    x2: Images | None = None,
    *,
    mesh: Mesh,
    axis: str | None = None,
    mask: Mask | None = None,
    gain: Gain | None = None,
    outputs: str | int = "full",
    engine: str = "auto",
    batch: int | None = None,
    memory: int = BUDGET,
) -> Float[Array, "n1 n2 *outputs"]:
    """Empirical tangent kernel Θ(x1, x2), its rows shared among the devices of a mesh.

    The numbers are those of `kernels.empirical`, up to rounding. It is differentiable in the same
    arguments and may be called under jit. Every device computes all columns of its rows, also where
    x2 is x1, so D devices take about 2/D of the time that one takes for a symmetric kernel, and 1/D
    for any other.

    Args:
        apply, params, mask, gain, outputs, engine, batch: as of `kernels.empirical`.
        x1: [n1, *shape], n1 any number: the last image fills up the last device's share.
        x2: [n2, *shape]; x1 if not given.
        mesh: of all devices that take part.
        axis: the axis of the mesh that the rows are shared over, with copies along its other axes;
            all axes together if not given.
        memory: bytes for features and temporary arrays on each device, the kernel itself apart.

    Returns:
        Θ of the shape and dtype that `kernels.empirical` gives, as one global array. Its rows stay
        on their devices if their number divides n1. JAX has no uneven shares, so any other kernel
        ends up whole on every device: take a multiple of it for kernels that fit on none.

    Raises:
        InputError: an axis that the mesh does not have, or what `kernels.empirical` raises.

    Source: theory §0; rows of a kernel are independent of each other.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import Mesh
        >>> mesh = Mesh(jax.devices(), ("rows",))
        >>> apply = lambda w, x: x @ w                 # Θ = ⟨x, x'⟩·I
        >>> images = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> empirical(apply, jnp.ones((2, 2)), images, mesh=mesh, outputs="trace").tolist()
        [[5.0, 11.0], [11.0, 25.0]]
    """
    function: Any = getattr(apply, "apply", apply)
    if axis is not None:
        choose("axis", axis, mesh.axis_names)
    axes = mesh.axis_names if axis is None else (axis,)
    params, x1, x2, gain = widened((params, x1, x2, gain))
    x2 = x1 if x2 is None else x2
    if x1.shape[1:] != x2.shape[1:]:
        raise InputError("x2", expected=f"images of shape {x1.shape[1:]}", got=f"{x2.shape[1:]}")
    if mask is not None:
        check_same_tree("mask", mask, params)
        gain = unit_gain(params) if gain is None else gain
        check_same_tree("gain", gain, params, scalars=True)
    elif gain is not None:
        raise InputError("gain", expected="a mask with it", got="no mask")
    share = math.ceil(x1.shape[0] / math.prod(mesh.shape[name] for name in axes))
    rows: Any = jax.ShapeDtypeStruct((share, *x1.shape[1:]), jnp.result_type(x1))
    plan = planning.make(
        function, params, rows, x2, mask=mask, outputs=outputs, engine=engine, batch=batch,
        memory=memory,
    )  # fmt: skip
    selection = _selection(plan, function, params, rows, mask)
    return _rows(params, mask, gain, selection, x1, x2, function, plan, mesh, axes)


@partial(jax.jit, static_argnames=("apply", "plan", "mesh", "axes"))
def _rows(
    params: Params,
    mask: Mask | None,
    gain: Gain | None,
    selection: list[Any],
    x1: Images,
    x2: Images,
    apply: ApplyFn,
    plan: Plan,
    mesh: Mesh,
    axes: tuple[str, ...],
) -> jax.Array:
    weights, factor = params, None
    if mask is not None:
        weights = effective(params, mask, gain)
        factor = effective(jax.tree.map(jnp.ones_like, params), mask, gain)

    n, share = x1.shape[0], plan.shape[0]
    even = share * math.prod(mesh.shape[name] for name in axes) == n

    def local(params: Params, x: Images) -> jax.Array:
        # What is traced on one device must not be found again (it is kept for each function) by a
        # kernel that is computed elsewhere.
        return apply(params, x)

    def rows(
        weights: Params, factor: Params | None, selection: list[Any], x1: Images, x2: Images
    ) -> jax.Array:
        mine = jax.lax.axis_index(axes) * share + jnp.arange(share)
        images = x1[jnp.minimum(mine, n - 1)]
        found = _compute(weights, factor, selection, images, x2, local, plan)
        return found if even else jax.lax.all_gather(found, axes, tiled=True)[:n]

    # Without the check of what differs between devices: the engines' loops begin with zeros, which
    # are the same on all, and end with values that are not.
    compute = jax.shard_map(
        rows,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(axes if even else None),
        check_vma=False,
    )
    return compute(weights, factor, selection, x1, x2)


def gather(kernel: Float[Array, "n1 n2 *outputs"]) -> np.ndarray:
    """The whole kernel on the host of every process.

    Args:
        kernel: a global array, from `empirical`; every process must make this call.

    Returns:
        The same numbers as a NumPy array, on every process.

    Example:
        >>> gather(jnp.ones((2, 2))).shape
        (2, 2)
    """
    return multihost_utils.process_allgather(kernel, tiled=True)
