"""Square: random search over squares of pixels; sees logits only, no gradient.

Source: Andriushchenko, Croce, Flammarion and Hein, "Square attack: a query-efficient black-box
adversarial attack via random search" (2020), algorithms 1 to 3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.attacks.base import NetworkLoss, run_keys
from ntk_awt.attacks.found import Found, keep, nothing, seen
from ntk_awt.attacks.losses import margin
from ntk_awt.errors import InputError, check_count, check_number
from ntk_awt.threats import Linf, Threat
from ntk_awt.types import Images, Key, PerExample

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The share of pixels is halved after each of those many queries of 10,000."""

_TILES = 5
"""An L2 start has that many tiles along each side."""


def shares(queries: int, first: float) -> np.ndarray:
    """The share of pixels that each query changes, [queries].

    Example:
        >>> print(shares(10_000, 0.8)[[0, 10, 11, 51, 9_999]])
        [0.8       0.8       0.4       0.2       0.0015625]
    """
    at = np.arange(queries) * 10_000 // queries
    return first / 2.0 ** np.searchsorted(_HALVINGS, at)


def _bump(height: int, width: int) -> np.ndarray:
    """A pyramid of unit norm: Σ 1/(k + 1)² over all k not below the distance from the middle."""
    rows, columns = (abs(np.arange(size) - size // 2) for size in (height, width))
    distance = np.maximum(rows[:, None], columns)
    terms = 1.0 / (1.0 + np.arange(max(height, width) // 2 + 1)) ** 2
    bump = terms[::-1].cumsum()[::-1][distance]
    return bump / np.linalg.norm(bump)


def _two_bumps(height: int, width: int) -> np.ndarray:
    """Two pyramids of different sign, one above the other, of unit norm in all."""
    upper = height // 2
    parts = [-_bump(height - upper, width)]
    if upper:
        parts.insert(0, _bump(upper, width))
    both = np.concatenate(parts)
    return both / np.linalg.norm(both)


class _Windows(NamedTuple):
    """Patterns in the top left corner of an image, for each query.

    Attributes:
        heights, widths: of the windows, in pixels, [queries].
        kinds: which of the patterns a query takes, [queries].
        patterns: [kinds, 2, h, w], upright and transposed.
    """

    heights: np.ndarray
    widths: np.ndarray
    kinds: np.ndarray
    patterns: np.ndarray


def _windows(shape: tuple[int, int, int], wanted: np.ndarray, norm_ball: bool) -> _Windows:
    h, w, _ = shape
    if w == 1:  # not a picture: pieces of a vector
        heights, widths = np.round(wanted * h), np.ones(len(wanted))
    else:
        heights = widths = np.round(np.sqrt(wanted * h * w))
    if norm_ball:  # odd, and large enough for two bumps
        heights = np.maximum(heights, 3)
        heights += heights % 2 == 0
        widths = heights if w > 1 else widths
    heights, widths = (
        np.clip(sizes, 1, size).astype(np.int32) for sizes, size in ((heights, h), (widths, w))
    )
    sizes, kinds = np.unique(np.stack([heights, widths]), axis=1, return_inverse=True)
    patterns = np.zeros((sizes.shape[1], 2, h, w), np.float32)
    for pattern, (rows, columns) in zip(patterns, sizes.T, strict=True):
        pattern[0, :rows, :columns] = _two_bumps(rows, columns)
        turned = rows <= w and columns <= h and w > 1
        pattern[1, :rows, :columns] = (
            _two_bumps(columns, rows).T if turned else pattern[0, :rows, :columns]
        )
    return _Windows(heights, widths, kinds.reshape(-1).astype(np.int32), patterns)


def _tiles(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The pattern of an L2 start [h, w], and which tile each pixel belongs to [h, w]."""
    h, w, _ = shape
    rows, columns = max(h // _TILES, 1), max(w // _TILES, 1)
    tile = _two_bumps(rows, columns)
    pattern = np.tile(tile, (h // rows + 1, w // columns + 1))[:h, :w]
    across = -(-w // columns)
    number = np.arange(h)[:, None] // rows * across + np.arange(w) // columns
    return pattern.astype(np.float32), number.astype(np.int32)


_MOST_CHANNELS = 4
"""An axis of at most that many entries holds channels rather than rows or columns."""


def channel_axis(shape: tuple[int, ...]) -> int:
    """Where the channels of an image are: last, or first if only the first axis can be theirs.

    Example:
        >>> [channel_axis(shape) for shape in [(32, 32, 3), (3, 32, 32), (4, 4, 4), (9, 9, 9)]]
        [-1, 0, -1, -1]
    """
    first, *rest = shape
    return 0 if first <= _MOST_CHANNELS < min(rest) else -1


def _normalised(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return v / (jnp.sqrt(jnp.sum(v**2, axes, keepdims=True)) + 1e-12)


class _State(NamedTuple):
    """The search in progress.

    Attributes:
        query: how many have been made.
        found: the best point, and whether it is misclassified.
        margin: max_{i≠y} z_i − z_y there, [n].
    """

    query: jax.Array
    found: Found
    margin: PerExample


@dataclass(frozen=True)
class Square:
    """Random squares (L∞) or bumps (L2) put on the best perturbation so far, kept if they help.

    L∞: a start of vertical stripes ±ε; each query puts ±2ε on a square, one sign a channel, and
    projects. L2: a start of bumps on a grid; each query moves the norm inside a second window, and
    what is left of ε², to two bumps in the first one; other sets take the L2 moves and project. A
    query counts if the margin grows; an image that is misclassified is done. Images that are no
    pictures, of three axes with the channels last or first, are cut into pieces instead of squares.

    One run costs at most `steps` + 1 forward passes; it ends when all images are misclassified.

    Attributes:
        steps: queries.
        share: p, the share of pixels that the first queries change, in (0, 1].
        channels: the axis of a picture's channels, -1 in [h, w, c] and 0 in [c, h, w]; None finds
            it by the shape, see `channel_axis`.

    Returns (of `run`): the first misclassified point, and where there is none the one of the
    largest margin.

    Raises:
        InputError: steps that are no whole number ≥ 0, a share outside (0, 1], or channels that
            are no axis of an image.
    """

    steps: int = 5000
    share: float = 0.8
    channels: int | None = None

    def __post_init__(self):
        check_count("Square steps", self.steps, low=0)
        check_number("Square share", self.share, low=0, high=1, low_open=True)
        if self.channels not in (None, -3, -2, -1, 0, 1, 2):
            raise InputError(
                "Square channels", expected="an axis of a picture, or None", got=f"{self.channels}"
            )

    def run(
        self, loss: NetworkLoss, x: Images, threat: Threat, keys: Key
    ) -> tuple[Images, PerExample]:
        """See `Attack.run`."""
        if x.ndim == 4:
            axis = channel_axis(x.shape[1:]) if self.channels is None else self.channels
            place = axis if axis < 0 else axis + 1  # in the batch

            def pictures(z: Images) -> Images:
                return jnp.moveaxis(z, place, -1)

            def as_given(z: Images) -> Images:
                return jnp.moveaxis(z, -1, place)
        else:

            def pictures(z: Images) -> Images:
                return z.reshape(len(z), -1, 1, 1)

            def as_given(z: Images) -> Images:
                return z.reshape(x.shape)

        images = pictures(x)
        h, w, c = images.shape[1:]
        shape = (h, w, c)
        square = isinstance(threat, Linf)
        windows = _windows(shape, shares(max(self.steps, 1), self.share), norm_ball=not square)
        heights, widths, kinds, patterns = map(jnp.asarray, windows)
        patterns, radius = patterns.astype(x.dtype), jnp.asarray(threat.epsilon).astype(x.dtype)
        pattern, tile = map(jnp.asarray, _tiles(shape))
        pattern = pattern.astype(x.dtype)

        def look(state: _State, proposed: jax.Array) -> _State:
            z = threat.project(as_given(proposed), x).astype(x.dtype)
            logits = loss.logits(z)
            new, ahead = seen(loss, z, logits), margin(logits, loss.labels)
            better = ~state.found.fooled & (new.fooled | (ahead > state.margin))
            return _State(
                state.query + 1,
                keep(better, new, state.found),
                jnp.where(better, ahead, state.margin),
            )

        def stripes(key: Key, image: jax.Array) -> jax.Array:
            if square:
                return radius * jax.random.rademacher(key, (1, *shape[1:]), x.dtype)
            flips = jax.random.rademacher(key, (tile.size, shape[2]), x.dtype)[tile]
            return radius * _normalised(pattern[..., None] * flips, (0, 1, 2))

        def propose(key: Key, v: jax.Array, query: jax.Array) -> jax.Array:
            """A perturbation [h, w, c] from the best one so far."""
            where, elsewhere, sign, turn = jax.random.split(key, 4)
            size = jnp.stack([heights[query], widths[query]])
            free = jnp.asarray(shape[:2]) - size + 1
            signs = jax.random.rademacher(sign, (1, 1, shape[2]), x.dtype)

            def window(key: Key) -> tuple[jax.Array, jax.Array]:
                corner = jax.random.randint(key, (2,), 0, free)
                inside = [
                    (jnp.arange(n) >= c) & (jnp.arange(n) < c + s)
                    for n, c, s in zip(shape[:2], corner, size, strict=True)
                ]
                return corner, (inside[0][:, None] & inside[1][None])[..., None]

            corner, here = window(where)
            if square:
                return v + jnp.where(here, 2 * radius * signs, 0.0)
            _, there = window(elsewhere)
            bumps = patterns[kinds[query], jax.random.bernoulli(turn).astype(int)]
            bumps = jnp.roll(bumps, corner, (0, 1))[..., None] * signs
            old = jnp.where(here, v, 0.0)
            inside = jnp.sum(jnp.where(here | there, v, 0.0) ** 2, (0, 1), keepdims=True)
            unused = jnp.maximum(radius**2 - jnp.sum(v**2), 0.0) / shape[2]
            new = _normalised(bumps + _normalised(old, (0, 1)), (0, 1))
            v = jnp.where(here, new * jnp.sqrt(inside + unused), jnp.where(there, 0.0, v))
            return radius * _normalised(v, (0, 1, 2))

        def step(state: _State) -> _State:
            best = pictures(state.found.images)
            moves = jax.vmap(propose, (0, 0, None))(
                run_keys(keys, state.query + 1), best - images, state.query
            )
            return look(state, images + moves)

        lowest = jnp.full(x.shape[:1], -jnp.inf, x.dtype)
        start = jax.vmap(stripes)(run_keys(keys, jnp.zeros((), int)), images)
        first = look(_State(jnp.full((), -1), nothing(x), lowest), images + start)
        state = jax.lax.while_loop(
            lambda s: (s.query < self.steps) & ~s.found.fooled.all(), step, first
        )
        return state.found.images, state.found.loss
