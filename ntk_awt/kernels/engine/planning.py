"""What a kernel will cost, in operations and bytes, and how it will be computed.

Every engine and every form of a layer's share (`forms.py`) gives the same kernel; which one is
cheapest depends on sizes and density alone, so it is decided before anything runs. Costs count
multiply-adds, weighted by how far each kind falls short of a large matrix product.
"""

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.errors import (
    InputError,
    check_count,
    check_number,
    check_same_tree,
    choose,
    leaf_name,
)
from ntk_awt.kernels.engine import program
from ntk_awt.kernels.engine.engines import ENGINES
from ntk_awt.kernels.engine.forms import EXPLICIT, FORMS, Cuts, row_counts
from ntk_awt.network import Network, check_network
from ntk_awt.types import ApplyFn, Images, Mask, Params, common_dtype, widened

OUTPUTS = ("full", "diagonal", "trace")
BUDGET = 2**30
"""Bytes that the images' features and all temporary arrays may take, unless told otherwise."""

CACHE = 3 * 2**23
"""Bytes of cotangents at a time on a CPU, where explicit Jacobians are made of them."""

# Time of one multiply-add of a kind over that of a large matrix product (measured on 2 CPU cores).
_SMALL_PRODUCT = 8.0  # batches of small matrix products: Gram matrices of single units
_ROW_PRODUCT = 2.5  # scaling by a Gram matrix, then a product with as many rows as classes
_SOFT_PRODUCT = 1.5  # product after a scaling of its right side
_GATHER = 8.0  # one entry gathered or written alone
_NETWORK = 4.0  # one multiply-add of a pass through the network


@dataclass(frozen=True)
class Layer:
    """How one weight (and its bias) enters the kernel.

    Attributes:
        name: of the weight's leaf, with `+bias` where its bias is part of it.
        positions, inputs, units: T, I, O of `forms.py`; the bias counts as an input, and so does
            each row where some are looked up.
        kept: entries that the mask keeps, bias included; None where the mask is not known.
        form: chosen.
        width: of the rows in the forms `packed` and `kept`, else 0.
        chunks: of the form `jacobian`.
        costs: weighted multiply-adds of each form that applies.
    """

    name: str
    positions: int
    inputs: int
    units: int
    kept: int | None = field(compare=False)
    form: str
    width: int
    chunks: int
    costs: tuple[tuple[str, float], ...] = field(compare=False)


@dataclass(frozen=True)
class Plan:
    """How a kernel is computed; printed as a table. From `plan`, for `empirical(plan=…)`.

    Plans are equal if they compute the same, whatever it costs: masks share a compiled function.

    Attributes:
        engine: "layerwise", "contraction" or "products".
        outputs: "full", "diagonal", "trace" or the number of one logit.
        shape: of the kernel.
        symmetric: whether only half of it is computed.
        masked: whether it is for a masked network.
        tile: images of each side at a time.
        cuts: row blocks of a tile on the diagonal of a symmetric kernel.
        images: images at a time whose cotangents are computed together.
        rows: images at a time in row-wise forms.
        stored: whether what is needed of the images is kept for all tiles (else computed again).
        layers: of the layerwise engine.
        others: leaves that the layerwise engine treats by explicit Jacobian.
        costs: weighted multiply-adds of each engine.
        bytes: of the kernel, and of features and temporary arrays at the most.
        memory: bytes that the latter should not exceed; they do where one image takes more.
    """

    engine: str
    outputs: str | int
    shape: tuple[int, ...]
    symmetric: bool
    masked: bool
    tile: int
    cuts: Cuts
    images: int
    rows: int
    stored: bool
    layers: tuple[Layer, ...]
    others: tuple[str, ...]
    costs: tuple[tuple[str, float], ...] = field(compare=False)
    bytes: tuple[int, int] = field(compare=False)
    memory: int = field(compare=False)

    @property
    def seconds(self) -> float:
        """About how long it takes once compiled, at the `rate` of this device's matrix products.

        The weights of the multiply-adds are those of two CPU cores; other devices have others, so
        that is the order of magnitude there.
        """
        return dict(self.costs)[self.engine] / rate()

    def __str__(self) -> str:
        speed = f"{2 * rate() / 1e9:.3g} GFLOP/s, as measured on this {jax.default_backend()}"
        engines = ", ".join(f"{name} {cost:.3g}" for name, cost in self.costs)
        kernel = "masked kernel" if self.masked else "kernel"
        half = ", upper half only" if self.symmetric else ""
        lines = [
            f"{kernel} {list(self.shape)}, outputs {self.outputs}{half}: {size(self.bytes[0])}",
            f"engine {self.engine}, about {self.seconds:.2g} s at {speed} (weighted multiply-adds: "
            f"{engines})",
            f"tiles of {self.tile} images, {self.images} at a time backwards, features "
            f"{'kept' if self.stored else 'computed again for each pair of tiles'}: "
            f"at most {size(self.bytes[1])}"
            + (f", above the {size(self.memory)} asked for" if self.bytes[1] > self.memory else ""),
        ]
        if self.engine == "layerwise":
            rows: list[tuple[str, ...]] = [
                ("layer", "T × I × O", "kept", "form", "weighted multiply-adds of each form")
            ]
            for layer in self.layers:
                sizes = f"{layer.positions} × {layer.inputs} × {layer.units}"
                form = layer.form + (f" (width {layer.width})" if layer.width else "")
                form += f" ({layer.chunks} chunks)" if layer.chunks > 1 else ""
                kept = "?" if layer.kept is None else str(layer.kept)
                costs = ", ".join(f"{name} {cost:.3g}" for name, cost in layer.costs)
                rows.append((layer.name, sizes, kept, form, costs))
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += [
                "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ]
            if self.others:
                lines.append("by explicit Jacobian: " + ", ".join(self.others))
        return "\n".join(lines)


@cache
def rate() -> float:
    """Multiply-adds a second of a matrix product [512, 512] × [512, 512] in float32, measured once.

    The best of three on the default device; it takes some milliseconds and its compilation.
    """
    matrix = np.ones((512, 512), np.float32)
    with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
        product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
        factor = jax.device_put(matrix)
        seconds = []
        for _ in range(4):  # the first one also moves the program to the device
            start = time.perf_counter()
            jax.block_until_ready(product(factor, factor))
            seconds.append(time.perf_counter() - start)
    return 512**3 / min(seconds[1:])


def size(count: float) -> str:
    """Bytes as people read them."""
    unit = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**unit:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def free_memory() -> int:
    """Bytes that are free on the default device, or in the machine's memory."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = {line.split(":")[0]: line.split()[1] for line in file}
        return 1024 * int(found["MemAvailable"])
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def known(mask: Mask | None) -> list[np.ndarray] | None:
    """The leaves of a boolean mask whose values can be read now (not traced), else None."""
    if mask is None:
        return None
    leaves = jax.tree.leaves(mask)
    try:
        arrays = [np.asarray(leaf) for leaf in leaves]
    except jax.errors.TracerArrayConversionError:
        return None
    return arrays if all(a.dtype == bool for a in arrays) else None


def matrix(traced: program.Program, site: program.Site, leaves: Sequence[np.ndarray]) -> np.ndarray:
    """A site's mask [inputs, units], its bias (if any) as the last input."""
    with jax.ensure_compile_time_eval():
        found = np.asarray(program.normal_weight(traced, site, leaves[site.leaf]))
    if site.bias is not None:
        found = np.concatenate([found, leaves[site.bias].reshape(1, -1)])
    return found


class _Sizes:
    """Numbers of images, outputs and pairs, and what a pair of Jacobian columns costs."""

    def __init__(self, n1: int, n2: int, q: int, outputs: str | int, symmetric: bool):
        self.images = n1 if symmetric else n1 + n2
        self.pairs = n1 * (n1 + 1) / 2 if symmetric else n1 * n2
        self.q = q
        self.per_pair = q * q if outputs == "full" else q


def _best_width(mask: np.ndarray, per_pair: int) -> int:
    """Width of the rows at which Gram matrices and row products together cost least."""
    largest = max(int(np.count_nonzero(mask, axis=0).max(initial=1)), 1)
    widths = sorted(
        {w for w in (4, 8, 12, 16, 24, 32, 48, 64, 128, 256) if w < largest} | {largest}
    )

    def cost(width: int) -> float:
        rows = row_counts(mask, width).sum()
        return rows * (_SMALL_PRODUCT * width + _ROW_PRODUCT * per_pair)

    return min(widths, key=cost)


def _layer_costs(
    s: _Sizes,
    t: int,
    i: int,
    o: int,
    mask: np.ndarray | None,
    masked: bool,
    width: int,
    table: bool,
) -> dict[str, float]:
    """Weighted multiply-adds of each form that applies to a layer."""
    columns = {"jacobian": i * o}
    costs = {}
    if mask is not None and not table:
        rows = int(row_counts(mask, width).sum())
        columns["kept"] = rows * width
        if t == 1:
            costs["packed"] = s.pairs * rows * (
                _SMALL_PRODUCT * width + _ROW_PRODUCT * s.per_pair
            ) + s.images * rows * (_GATHER * width / 4 + s.q)
    if table:
        costs["lookup"] = _ROW_PRODUCT * s.pairs * t * o * (t * s.q + s.per_pair)
    elif masked:
        if t == 1:
            costs["soft"] = s.pairs * (_SOFT_PRODUCT * i * o + _ROW_PRODUCT * s.per_pair * o)
    else:
        factor = 1.0 if t == 1 else _ROW_PRODUCT
        costs["gram"] = s.pairs * t * t * (i + factor * s.per_pair * o)
    for form, count in columns.items():
        build = 3 * t + 1 if form == "kept" else t + 1  # from rows, or one large product
        costs[form] = s.images * s.q * count * build + s.pairs * s.per_pair * count
    return costs


def make(
    apply: ApplyFn | Network,
    params: Params,
    x1: Images,
    x2: Images | None = None,
    *,
    mask: Mask | None = None,
    outputs: str | int = "full",
    engine: str = "auto",
    forms: Mapping[str, str] | None = None,
    batch: int | None = None,
    memory: int = BUDGET,
) -> Plan:
    """Choose how to compute a kernel. Exported as `kernels.plan`.

    Args:
        apply, params, x1, x2: as of `empirical`; only shapes are looked at.
        mask: as of `empirical`; where its booleans can be read they decide the forms.
        outputs: "full", "diagonal", "trace" or the number of one logit.
        engine: "auto" or one of "layerwise", "contraction", "products".
        forms: form of a layer by the name of its weight, in place of the cheapest one; the engine
            is then "layerwise".
        batch: images a tile; chosen from `memory` if not given.
        memory: bytes for features and temporary arrays.

    Returns:
        A `Plan`; `print` it to see the costs of all choices.

    Raises:
        InputError: unknown names, a form that does not apply to a layer or to the engine, no
            images, a mask that does not fit the parameters, a kernel that would not fit into the
            free memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
        >>> apply = lambda w, x: x @ w["kernel"] + w["bias"]
        >>> found = make(apply, params, jnp.ones((4, 3)))
        >>> found.engine, found.shape, [(layer.name, layer.form) for layer in found.layers]
        ('layerwise', (4, 4, 2, 2), [('kernel +bias', 'gram')])
    """
    apply = cast(ApplyFn, getattr(apply, "apply", apply))
    choose("engine", engine, ("auto", *ENGINES))
    if forms:
        if engine not in ("auto", "layerwise"):
            raise InputError("forms", expected="the engine 'layerwise'", got=repr(engine))
        engine = "layerwise"
    check_number("memory", memory, low=1)
    if batch is not None:
        check_count("batch", batch, low=1)
    params, x1, x2 = widened((params, x1, x2))
    symmetric = x2 is None
    n1, n2 = x1.shape[0], x1.shape[0] if x2 is None else x2.shape[0]
    check_count("number of images x1", n1, low=1)
    check_count("number of images x2", n2, low=1)
    if mask is not None:
        check_same_tree("mask", mask, params)
    classes = check_network(Network(apply, params), x1)
    traced = program.trace(apply, params, x1)
    check_outputs(outputs, classes)
    outputs = outputs if isinstance(outputs, str) else int(outputs)
    q = 1 if isinstance(outputs, int) else classes
    shape = (n1, n2, *{"full": (q, q), "diagonal": (q,)}.get(str(outputs), ()))
    itemsize = common_dtype(*jax.tree.leaves(params)).itemsize
    whole = itemsize * math.prod(shape)
    _check_fits(f"kernel {list(shape)}", whole, 2, outputs)
    memory = min(memory, free_memory() - whole)
    s = _Sizes(n1, n2, q, outputs, symmetric)

    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaves = [jnp.shape(w) for w in jax.tree.leaves(params)]
    masks = known(mask)
    sites = [
        _layer(traced, site, names, masks, mask is not None, s, dict(forms or {}), memory, itemsize)
        for site in traced.sites
    ]
    if unknown := set(forms or {}) - {names[site.leaf] for site in traced.sites}:
        known_names = [names[site.leaf] for site in traced.sites]
        raise InputError(
            "forms", expected=f"layers among {', '.join(known_names)}", got=sorted(unknown)[0]
        )
    others = sum(math.prod(leaves[i]) for i in traced.others)
    total = sum(map(math.prod, leaves))
    kept = total if masks is None else sum(int(m.sum()) for m in masks)
    passes = sum(map(_pass, sites)) + others
    backward = s.images * (1 + s.q) * _NETWORK * passes
    n_products = n1 * n2 if symmetric else s.pairs
    costs = {
        "layerwise": backward
        + sum(dict(layer.costs)[layer.form] for layer in sites)
        + (s.images * s.q + s.pairs * s.per_pair) * others,
        "contraction": 2 * backward
        + s.images * s.q * (total + (_GATHER * kept if kept < total else 0))
        + s.pairs * s.per_pair * kept,
        # Its directions are as large as θ, also where a pass meets few rows of a table.
        "products": (n2 * (1 + s.q) + n_products * s.q) * _NETWORK * passes
        + 2 * n2 * s.q * max(total - passes, 0),
    }

    # What one image needs: activations while going backwards, then what its pairs need.
    windows = sum(layer.positions * layer.inputs for layer in sites if layer.form != "lookup")
    forwards = itemsize * (2 * traced.activations + windows)
    steps = itemsize * s.q * (traced.activations + others)
    sides = itemsize * (s.q * others + sum(_side_size(layer, s.q) for layer in sites))
    features = {
        "layerwise": sides,
        "contraction": itemsize * s.q * kept,
        "products": itemsize * (math.prod(x1.shape[1:]) + s.q * traced.activations),
    }
    if engine == "auto":
        fitting = [name for name in ENGINES if 2 * features[name] <= memory] or ["products"]
        engine = min(fitting, key=costs.__getitem__)
    backwards = {"layerwise": steps, "contraction": steps + itemsize * s.q * total, "products": 0}
    wide = jax.default_backend() != "cpu"
    explicit = engine == "contraction" or any(
        layer.form in EXPLICIT and layer.chunks == 1 for layer in sites
    )
    room = memory // 2 if wide or not explicit else min(memory // 2, CACHE)
    images = int(min(max(n1, n2), max(1, room // max(backwards[engine], 1))))
    images = math.ceil(max(n1, n2) / math.ceil(max(n1, n2) / images))  # of about equal size
    pair = 3 * itemsize * (s.per_pair if outputs == "full" else max(shape[2:], default=1))
    tile = batch or _tile(max(n1, n2), features[engine], pair, memory)
    tile = min(tile, max(n1, n2))
    stored = features[engine] * s.images <= memory
    halves = symmetric and engine != "products"

    def scratch(tile: int) -> int:
        cuts = _cuts(min(tile, n1), halves, wide)
        if tile < max(n1, n2):  # a pair of tiles, and one that is being made
            held = 3 * tile + (s.images + tile if stored else 0)
        else:  # blocks of rows are copies of parts of both sides
            parts = sum(stop - start + n1 - first for start, stop, first in cuts)
            held = s.images + (parts if len(cuts) > 1 else 0)
        directions = itemsize * s.q * total if engine == "products" else 0
        steps = min(images, tile) * (forwards + backwards[engine])
        return int(directions + steps + tile * tile * pair + held * features[engine])

    if batch is None:  # where one image takes too much, smaller tiles would only take longer
        cuts = range(math.ceil(max(n1, n2) / tile), max(n1, n2) + 1)
        tiles = [math.ceil(max(n1, n2) / count) for count in cuts]
        tile = next((size for size in tiles if scratch(size) <= memory), tile)
    even = tile >= max(n1, n2) or n1 % tile == n2 % tile == 0
    padded = 0 if even else whole + itemsize * math.prod(shape[2:]) * tile * (n1 + n2 + tile)
    bytes_ = (whole, scratch(tile) + padded)
    _check_fits(f"temporary arrays of a kernel {list(shape)}", bytes_[1], 1, outputs)
    return Plan(
        engine=engine,
        outputs=outputs,
        shape=shape,
        symmetric=symmetric,
        masked=mask is not None,
        tile=tile,
        cuts=_cuts(min(tile, n1), halves, wide),
        images=images,
        rows=max(1, min(tile, 2**27 // (itemsize * q * tile * 1024))) if wide else 1,
        stored=stored,
        layers=tuple(sites),
        others=tuple(names[i] for i in traced.others),
        costs=tuple(costs.items()),
        bytes=bytes_,
        memory=int(memory),
    )


def check_outputs(outputs: str | int, classes: int) -> None:
    """Raise unless `outputs` is one of the names or the number of a logit."""
    if isinstance(outputs, str):
        choose("outputs", outputs, OUTPUTS)
    elif (
        isinstance(outputs, bool)
        or not isinstance(outputs, int | np.integer)
        or not 0 <= outputs < classes
    ):
        raise InputError(
            "outputs",
            expected=f"{', '.join(OUTPUTS)} or the number of a logit, 0…{classes - 1}",
            got=repr(outputs),
        )


def sizes(traced: program.Program, site: program.Site) -> tuple[int, int, int]:
    """Positions, inputs (the bias among them) and units of a site."""
    weight = jax.eval_shape(
        lambda w: program.normal_weight(traced, site, w), traced.shapes[traced.leaves[site.leaf]]
    )
    inputs, units = weight.shape[0] + (site.bias is not None), weight.shape[1]
    return traced.shapes[site.tap].size // units, inputs, units


def _layer(
    traced: program.Program,
    site: program.Site,
    names: list[str],
    masks: list[np.ndarray] | None,
    masked: bool,
    s: _Sizes,
    forced: dict[str, str],
    memory: int,
    itemsize: int,
) -> Layer:
    t, i, o = sizes(traced, site)
    mask = None if masks is None else matrix(traced, site, masks)
    table = program.looked_up(traced, site) > 0
    width = 0 if mask is None or table else _best_width(mask, s.per_pair)
    costs = _layer_costs(s, t, i, o, mask, masked, width, table)
    name = names[site.leaf]
    form = forced.get(name) or min(costs, key=costs.__getitem__)
    choose(f"form of {name}", form, FORMS)
    if form not in costs:
        raise InputError(f"form of {name}", expected=f"one of {', '.join(costs)}", got=form)
    # Explicit Jacobians of a few hundred images at once, and their copies, stay within a quarter.
    whole = itemsize * 2 * min(s.images, 64) * s.q * i * o
    chunks = min(o, math.ceil(whole / (memory / 4))) if form == "jacobian" else 1
    return Layer(
        name=name + (" +bias" if site.bias is not None else ""),
        positions=t,
        inputs=i,
        units=o,
        kept=i * o if not masked else None if mask is None else int(mask.sum()),
        form=form,
        width=width if form in ("packed", "kept") else 0,
        chunks=chunks,
        costs=tuple(costs.items()),
    )


def _pass(layer: Layer) -> int:
    """Multiply-adds of one image's pass through a layer."""
    inputs = 1 if "lookup" in dict(layer.costs) else layer.inputs
    return layer.positions * inputs * layer.units


def _side_size(layer: Layer, q: int) -> int:
    """Numbers that a form keeps of one image."""
    t, i, o = layer.positions, layer.inputs, layer.units
    if layer.form == "lookup":
        return t * (1 + q * o)
    if layer.form == "kept" and layer.kept is not None:
        return q * layer.kept + t * i
    if layer.form == "jacobian" and layer.chunks == 1:
        return q * i * o + t * i
    return t * (i + q * o)


def _tile(n: int, feature: float, pair: float, memory: float) -> int:
    """Images a tile: as many as memory allows, no more than stay in the cache, evenly cut."""
    most = 128 if jax.default_backend() == "cpu" else 1024
    while most > 1 and 2 * most * feature + most * most * pair > memory:
        most -= max(1, most // 8)
    return math.ceil(n / math.ceil(n / most))


def _cuts(n: int, symmetric: bool, wide: bool) -> Cuts:
    """Row blocks of a tile on the diagonal: each from its own first image on to the right."""
    if not symmetric:
        return ((0, n, 0),)
    count = 2 if wide and n >= 32 else 4 if n >= 64 else 2 if n >= 16 else 1
    edges = [n * k // count for k in range(count + 1)]
    return tuple((start, stop, start) for start, stop in itertools.pairwise(edges))


def _check_fits(what: str, bytes_: int, copies: int, outputs: str | int) -> None:
    free = free_memory()
    if copies * bytes_ > free:
        part = "half of the" if copies == 2 else "the"
        smaller = "outputs='trace'" if outputs in ("full", "diagonal") else "fewer images"
        raise InputError(
            what,
            expected=f"at most {size(free / copies)} ({part} free memory)",
            got=size(bytes_),
            fix=f"use {smaller}, or estimate what you need with kernels.probes",
        )
