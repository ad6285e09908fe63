"""Random keys, made when they are first asked for: nothing is computed while tests are imported."""

from functools import cache

import jax
import jax.numpy as jnp

from ntk_awt.attacks import example_keys
from ntk_awt.types import Key


@cache
def key_of(seed: int) -> Key:
    """The key of a seed; concrete even where a trace asks for it first."""
    with jax.ensure_compile_time_eval():
        return jax.random.key(seed)


@cache
def keys_of(seed: int, n: int) -> Key:
    """Keys of n examples, [n]."""
    with jax.ensure_compile_time_eval():
        return example_keys(jax.random.key(seed), jnp.arange(n))
