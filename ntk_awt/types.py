"""Shared names for arrays and functions. Imports nothing of ours.

A network is a pure function `ApplyFn = (params, x) -> logits` and a pytree of parameters; every
part of the package accepts any such pair, whoever wrote it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float, Int

Key: TypeAlias = jax.Array
"""A typed JAX random key, from `jax.random.key(seed)`."""

Params: TypeAlias = Any
"""A pytree of float arrays."""

Mask: TypeAlias = Any
"""A pytree with the structure of the parameters and boolean leaves; `True` keeps an entry."""

Gain: TypeAlias = Any
"""A pytree with the structure of the parameters and scalar leaves: γ of each leaf."""

Images: TypeAlias = Float[Array, "n *shape"]
Labels: TypeAlias = Int[Array, "n"]
Logits: TypeAlias = Float[Array, "n c"]
PerExample: TypeAlias = Float[Array, "n"]

Box: TypeAlias = tuple[Any, Any]
"""The lowest and the highest value of a pixel, in pixel units.

Each one is a number, ∓∞ where there is no limit, or an array that broadcasts to one image: [c] for
images [h, w, c], [c, 1, 1] for images [c, h, w].
"""

ApplyFn: TypeAlias = Callable[[Params, Images], Logits]


class Network(NamedTuple):
    """A pure network: its function and its parameters.

    Attributes:
        apply: `(params, x[n, *shape]) -> logits[n, c]`.
        params: the pytree of parameters that `apply` takes.
    """

    apply: ApplyFn
    params: Params
