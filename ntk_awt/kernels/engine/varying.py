"""Inside `jax.shard_map`: which arrays have to differ between devices.

JAX keeps track of the mesh axes along which an array varies. A loop has to end with the axes that
it began with, so it must not begin with plain zeros; and a derivative by an array that is the same
on all devices is summed over them. Here an array is made to vary by adding the sum of an empty part
of one that does: 0, whatever the values.
"""

from typing import Any

import jax
import jax.numpy as jnp


def along(tree: Any, like: Any) -> Any:
    """The same values, varying along the mesh axes of all leaves of `like` as well.

    Example:
        >>> along(jnp.ones(2), jnp.array([jnp.nan])).tolist()
        [1.0, 1.0]
    """
    zero = jnp.zeros((), jnp.float32)
    nothing = zero
    for leaf in jax.tree.leaves(like):
        nothing = nothing + jnp.sum(jnp.ravel(leaf)[:0]).astype(zero.dtype)
    if jax.typeof(nothing) == jax.typeof(zero):  # not inside shard_map, or nothing varies
        return tree

    def vary(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if leaf.dtype == bool:
            return leaf ^ nothing.astype(bool)
        return leaf + nothing.astype(leaf.dtype)

    return jax.tree.map(vary, tree)
