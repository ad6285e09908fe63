"""Masks as pytrees beside the parameters: scores, allocation of density, selection, gains, files.

A masked network computes f(x; γ⊙m⊙θ) (theory §0): `m` is a pytree of booleans with the structure of
the parameters, `γ` a pytree of scalars. Making a mask takes three separate steps: *scores* say
which weights matter, *allocation* says how many each layer keeps, *selection* keeps exactly that
many.

What a mask may prune is said by `network.prunable_leaves`; whatever makes or counts masks takes
`prunable=`, a function `(name, leaf) -> bool`, to say it otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ntk_awt import files
from ntk_awt.errors import (
    InputError,
    check_finite,
    check_number,
    check_same_tree,
    choose,
    leaf_name,
)
from ntk_awt.network import Network, Prunable, prunable_leaves
from ntk_awt.types import ApplyFn, Gain, Images, Key, Logits, Mask, Params, wide, widened

Scores: TypeAlias = Any
"""A pytree with the structure of the parameters and real leaves; higher is kept first."""

Counts: TypeAlias = Any
"""A pytree with the structure of the parameters and integer leaves: entries kept in each."""


class Ticket(NamedTuple):
    """A sparse network at initialisation: f(x; γ⊙m⊙θ).

    Attributes:
        params: θ, the values before masking.
        mask: m, `True` where an entry is kept.
        gain: γ, one scalar a leaf.
    """

    params: Params
    mask: Mask
    gain: Gain


# ---------------------------------------------------------------- masked networks


def masked(apply: ApplyFn, mask: Mask, gain: Gain) -> ApplyFn:
    """The network x ↦ f(x; γ⊙m⊙θ) as another `ApplyFn` of θ (theory §0).

    Its gradient with respect to θ carries the factor γ⊙m, so pruned weights never move.

    Args:
        apply: `(params, x[n, *shape]) -> logits[n, c]`.
        mask: booleans, the structure and shapes of the parameters.
        gain: scalars, the structure of the parameters.

    Returns:
        `(params, x) -> logits`.

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: x @ w
        >>> f = masked(apply, jnp.array([[True], [False]]), jnp.float32(2.0))
        >>> float(f(jnp.array([[3.0], [5.0]]), jnp.ones((1, 2)))[0, 0])
        6.0
    """

    def masked_apply(params: Params, x: Images) -> Logits:
        return apply(effective(params, mask, gain), x)

    return masked_apply


def effective(params: Params, mask: Mask, gain: Gain) -> Params:
    """The weights that the masked network uses, γ⊙m⊙θ, leaf by leaf."""
    return Network(None, params, mask, gain).weights  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- scores


def random_scores(key: Key, params: Params) -> Scores:
    """Independent uniform scores: `top_k` of them is a uniformly random mask."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.uniform(k, jnp.shape(w)) for k, w in zip(keys, leaves, strict=True)]
    )


def magnitude_scores(params: Params) -> Scores:
    """Absolute values of the weights."""
    return jax.tree.map(jnp.abs, params)


# ---------------------------------------------------------------- allocation


def _cap(rates: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """Fractional counts sizes·min(1, s·rates), with s such that they sum to `total`."""
    full = np.zeros(len(sizes), bool)
    while True:
        free = ~full
        scale = (total - sizes[full].sum()) / max((rates * sizes)[free].sum(), 1e-300)
        over = free & (scale * rates > 1)
        if not over.any():
            return np.where(full, sizes, scale * rates * sizes)
        full |= over


def _round(counts: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """Integers in [1, sizes] that sum to `total`, by largest remainder (first layer on ties)."""
    whole = np.clip(np.floor(counts), 1, sizes).astype(int)
    while (missing := total - whole.sum()) != 0:
        room = whole < sizes if missing > 0 else whole > 1
        gap = np.where(room, (counts - whole) * np.sign(missing), -np.inf)
        whole[int(np.argmax(gap))] += int(np.sign(missing))
    return whole


def _uniform(scores: list[np.ndarray], sizes: np.ndarray, total: int) -> np.ndarray:
    return _round(_cap(np.ones(len(sizes)), sizes, total), sizes, total)


def _erk(scores: list[np.ndarray], sizes: np.ndarray, total: int) -> np.ndarray:
    rates = np.array([sum(s.shape) / s.size for s in scores])
    return _round(_cap(rates, sizes, total), sizes, total)


def _global(scores: list[np.ndarray], sizes: np.ndarray, total: int) -> np.ndarray:
    flat = np.concatenate([s.ravel() for s in scores])
    kept = np.zeros(len(flat), bool)
    kept[np.argsort(-flat, kind="stable")[:total]] = True
    return np.array([part.sum() for part in np.split(kept, np.cumsum(sizes)[:-1])])


ALLOCATIONS: dict[str, Callable[[list[np.ndarray], np.ndarray, int], np.ndarray]] = {
    "uniform": _uniform,
    "erk": _erk,
    "global": _global,
}
"""Allocations by name: `(scores, sizes, total) -> kept entries of each prunable leaf`."""


def allocate(
    scores: Scores, density: float, method: str, prunable: Prunable | None = None
) -> Counts:
    """How many entries each leaf keeps; the total over prunable leaves is round(density·size).

    - `uniform`: every layer has the same density;
    - `erk`: density ∝ (sum of the kernel's axes) / (their product), i.e. (fan-in + fan-out [+
      window]) / (their product), capped at 1 (Erdős–Rényi-kernel: Evci et al., "Rigging the
      lottery", 2020, after Mocanu et al., 2018);
    - `global`: the highest scores over all layers together.

    Uniform and ERK keep at least one weight a layer, since an empty layer cuts the network.

    Args:
        scores: the structure and shapes of the parameters; only `global` reads the values.
        density: kept share of all prunable entries, in (0, 1].
        method: a name in `ALLOCATIONS`.
        prunable: see `prunable_leaves`.

    Returns:
        Integers, the structure of the parameters; a leaf that is not prunable keeps all.

    Raises:
        InputError: density outside (0, 1] or fewer kept weights than layers, unknown method.

    Example:
        >>> import numpy as np
        >>> scores = {"a": np.ones((100, 10)), "b": np.ones((10, 10)), "bias": np.ones(10)}
        >>> allocate(scores, 0.1, "uniform")
        {'a': 100, 'b': 10, 'bias': 10}
        >>> allocate(scores, 0.1, "erk")
        {'a': 93, 'b': 17, 'bias': 10}
    """
    check_number("density", density, low=0, high=1, low_open=True)
    choose("allocation", method, ALLOCATIONS)
    leaves, structure = jax.tree.flatten(scores)
    chosen = jax.tree.leaves(prunable_leaves(scores, prunable))
    layers = [np.asarray(s) for s, p in zip(leaves, chosen, strict=True) if p]
    if not layers:
        return structure.unflatten([np.size(s) for s in leaves])
    sizes = np.array([s.size for s in layers])
    total = round(density * int(sizes.sum()))
    if total < len(sizes):
        least = np.ceil(1e4 * len(sizes) / sizes.sum()) / 1e4
        raise InputError(
            "density",
            expected=f"at least {least:g} (one weight in each layer)",
            got=f"{density:g}",
        )
    counts = iter(ALLOCATIONS[method](layers, sizes, total))
    return structure.unflatten(
        [int(next(counts)) if p else np.size(s) for s, p in zip(leaves, chosen, strict=True)]
    )


# ---------------------------------------------------------------- selection


@jax.jit
def _highest(scores: jax.Array, count: Any) -> jax.Array:
    """Which of scores [n] are the `count` highest, the first ones among equals.

    The bits of a non-negative float, read as an integer, are ordered as the floats are, and those
    of a negative one with all bits but the sign flipped; so the lowest kept score is found bit by
    bit, in as many passes as it has bits, where sorting takes some ten times as long.
    """
    scores = scores.astype(wide(scores.dtype))
    kind = jnp.int64 if scores.dtype == jnp.float64 else jnp.int32
    bits = jnp.iinfo(kind).bits
    ordered = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), kind)
    ordered = jnp.where(ordered < 0, ordered ^ jnp.iinfo(kind).max, ordered)
    count = jnp.asarray(count, jnp.int32)

    def step(i: jax.Array, lowest: jax.Array) -> jax.Array:
        higher = lowest + (jnp.ones((), kind) << jnp.asarray(bits - 2 - i).astype(kind))
        return jnp.where(jnp.sum(ordered >= higher, dtype=jnp.int32) >= count, higher, lowest)

    positive = jnp.sum(ordered >= 0, dtype=jnp.int32) >= count
    lowest = jnp.where(positive, jnp.zeros((), kind), jnp.iinfo(kind).min)
    lowest = jax.lax.fori_loop(0, bits - 1, step, lowest)
    above, equal = ordered > lowest, ordered == lowest
    missing = count - jnp.sum(above, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= missing))


def top_k(scores: Scores, counts: Counts) -> Mask:
    """Keep exactly the `counts` highest scores of each leaf.

    Among equal scores the one that comes first in the leaf's memory order is kept, so the number
    kept is exact also with ties, and the result is the same eagerly and under jit.

    Args:
        scores: floating, the structure and shapes of the parameters, without NaN.
        counts: integers (or traced integer scalars), the same structure.

    Returns:
        Booleans, the structure and shapes of the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> top_k(jnp.array([[1.0, 3.0, 3.0, 3.0]]), 2).tolist()
        [[False, True, True, False]]
    """

    def select(score: Any, count: Any) -> jax.Array:
        return _highest(jnp.ravel(score), count).reshape(jnp.shape(score))

    return jax.tree.map(select, scores, counts)


def make(scores: Scores, density: float, method: str, prunable: Prunable | None = None) -> Mask:
    """Allocation, then selection: a mask of exactly that density.

    Args:
        scores, density, method, prunable: see `allocate`.

    Raises:
        InputError: scores that are NaN or infinite, or what `allocate` raises.
    """
    check_finite("scores", scores)
    return top_k(scores, allocate(scores, density, method, prunable))


def ones(params: Params) -> Mask:
    """The mask that keeps everything."""
    return jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params)


def dense(params: Params) -> Ticket:
    """The dense network as a ticket: nothing pruned, gain 1."""
    return Ticket(params, ones(params), unit_gain(params))


def sparse(params: Params, mask: Mask, gain: str, prunable: Prunable | None = None) -> Ticket:
    """The ticket of a mask: pruned weights at zero, the gain of that name in `GAINS`."""
    kept = jax.tree.map(lambda w, m: w * jnp.asarray(m).astype(w.dtype), params, mask)
    return Ticket(kept, mask, GAINS[gain](params, mask, prunable))


# ---------------------------------------------------------------- gains


def unit_gain(params: Params) -> Gain:
    """γ = 1 for every leaf."""
    return jax.tree.map(lambda w: jnp.ones((), jnp.result_type(w)), params)


def _is_zero(norm: jax.Array) -> bool:
    try:
        return not norm > 0
    except jax.errors.TracerBoolConversionError:  # under jit nobody knows yet
        return False


def energy_gain(params: Params, mask: Mask, prunable: Prunable | None = None) -> Gain:
    """Energy-preserving gain γ_l = ‖w_l‖ / ‖m_l⊙w_l‖ of prunable leaves, 1 elsewhere (theory §0).

    The norms are summed in float32 at least, and γ has the dtype of the weights.

    For a random mask of density p it is about 1/√p; for a magnitude mask it is not.

    Args:
        params: weights.
        mask: booleans (or real numbers), the same structure and shapes.
        prunable: see `prunable_leaves`.

    Returns:
        Scalars, the structure of the parameters.

    Raises:
        InputError: a prunable leaf whose kept weights are all zero; under jit its gain is infinite,
            or NaN where all of its weights are zero.
    """

    def gain(path: Any, w: jax.Array, m: jax.Array, p: bool) -> jax.Array:
        if not p:
            return jnp.ones((), w.dtype)
        values = widened(jnp.ravel(w))
        kept = jnp.linalg.norm(values * jnp.ravel(m).astype(values.dtype))
        if _is_zero(kept):
            raise _no_energy(leaf_name(path), w, m)
        return (jnp.linalg.norm(values) / kept).astype(w.dtype)

    chosen = prunable_leaves(params, prunable)
    return jax.tree_util.tree_map_with_path(gain, params, mask, chosen)


def _no_energy(name: str, w: Any, m: Any) -> InputError:
    """Why a leaf has no energy-preserving gain."""
    w, m = np.asarray(w), np.asarray(m)
    if not np.isfinite(w).all():
        return InputError(f"weights {name}", expected="finite values", got="NaN or infinite ones")
    if not w.any():
        return InputError(
            f"weights {name}",
            expected="some that are not zero, whose energy the gain is to preserve",
            got="zeros alone",
            fix="take the gain 'none', or keep the leaf whole (prunable=)",
        )
    if not m.any():
        got, fix = f"none of {m.size}", "raise the density, or use another allocation"
    else:
        got, fix = "zeros alone", "choose another mask: its other weights are not zero"
    return InputError(
        f"mask {name}", expected="at least one kept weight that is not zero", got=got, fix=fix
    )


GAINS: dict[str, Callable[[Params, Mask, Prunable | None], Gain]] = {
    "energy": energy_gain,
    "none": lambda params, mask, prunable: unit_gain(params),
}
"""Gains by name: `(params, mask, prunable) -> gain`."""


# ---------------------------------------------------------------- statistics


class LayerStatistics(NamedTuple):
    """One prunable leaf of a mask.

    Attributes:
        name: e.g. `dense1/kernel`.
        shape: [*window, in, out].
        size: number of entries.
        kept: number of kept entries.
        density: kept / size.
        gain: γ of the leaf.
        dead_inputs: inputs with no kept weight.
        dead_outputs: outputs (units or channels) with no kept weight.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int
    density: float
    gain: float
    dead_inputs: int
    dead_outputs: int


def statistics(mask: Mask, gain: Gain, prunable: Prunable | None = None) -> list[LayerStatistics]:
    """One row for each prunable leaf (see `prunable_leaves`), in the order of the pytree."""

    def row(path: Any, m: Any, g: Any) -> LayerStatistics:
        m = np.asarray(m)
        axes = tuple(range(m.ndim))
        return LayerStatistics(
            leaf_name(path),
            m.shape,
            m.size,
            int(np.count_nonzero(m)),
            np.count_nonzero(m) / m.size,
            float(g),
            int((~m.any(axis=(*axes[:-2], axes[-1]))).sum()),
            int((~m.any(axis=axes[:-1])).sum()),
        )

    leaves = jax.tree_util.tree_leaves_with_path(mask)
    others = (jax.tree.leaves(gain), jax.tree.leaves(prunable_leaves(mask, prunable)))
    return [row(path, m, g) for (path, m), g, p in zip(leaves, *others, strict=True) if p]


# ---------------------------------------------------------------- files


def save_ticket(ticket: Ticket, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a ticket as safetensors; an interrupted write leaves the old file as it was."""
    arrays = {
        f"{part}/{leaf_name(leaf_path)}": np.asarray(leaf, order="C")  # safetensors writes memory
        for part, tree in ticket._asdict().items()
        for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    # Not `save_file`, whose error on a full disk is no OSError.
    content = safetensors.numpy.save(arrays, metadata=metadata)
    files.replace(path, lambda partial: partial.write_bytes(content))


def load_metadata(path: Path) -> dict[str, str]:
    """What `save_ticket` was told to write into a ticket's file; nothing if that was nothing.

    Raises:
        InputError: no such file, or not a safetensors file.
    """
    with _reading(path), safetensors.safe_open(path, "numpy") as file:
        return file.metadata() or {}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a bad file raises one of many kinds
        text = str(error).strip().partition("\n")[0]
        raise InputError(
            f"ticket {path}", expected="a safetensors file", got=text or type(error).__name__
        ) from None


def load_ticket(path: Path, like: Params) -> Ticket:
    """Read a ticket for the network whose parameters are `like`.

    Args:
        path: a file that `save_ticket` wrote.
        like: parameters (or shapes) of the dense network that the ticket belongs to.

    Returns:
        The ticket, with the structure of `like`.

    Raises:
        InputError: no such file, not a ticket, a leaf missing, unknown or of another shape, weights
            that are not finite, a mask that is not boolean.
    """
    with _reading(path):
        arrays = safetensors.numpy.load_file(path)
    if extra := sorted(key for key in arrays if key.split("/")[0] not in Ticket._fields):
        raise InputError(
            f"ticket {path}: {extra[0]}",
            expected=f"only {', '.join(Ticket._fields)}",
            got="one more",
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [leaf_name(leaf_path) for leaf_path, _ in leaves]

    def part(name: str, *, scalars: bool = False) -> Any:
        found = {
            key.removeprefix(f"{name}/"): value
            for key, value in arrays.items()
            if key.startswith(f"{name}/")
        }
        wanted = {n: w for n, (_, w) in zip(names, leaves, strict=True)}
        check_same_tree(f"ticket {path}: {name}", found, wanted, scalars=scalars)
        return structure.unflatten([jnp.asarray(found[n]) for n in names])

    ticket = Ticket(part("params"), part("mask"), part("gain", scalars=True))
    for kind in ("params", "gain"):
        for name, w in zip(names, jax.tree.leaves(getattr(ticket, kind)), strict=True):
            if not jnp.issubdtype(w.dtype, jnp.floating):
                raise InputError(
                    f"ticket {path}: {kind} {name}", expected="floats", got=f"dtype {w.dtype}"
                )
    check_finite(f"ticket {path}: params", ticket.params)
    check_finite(f"ticket {path}: gain", ticket.gain)
    for name, m in zip(names, jax.tree.leaves(ticket.mask), strict=True):
        if m.dtype != bool:
            raise InputError(
                f"ticket {path}: mask {name}", expected="booleans", got=f"dtype {m.dtype}"
            )
    return ticket
