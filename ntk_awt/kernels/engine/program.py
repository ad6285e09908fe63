"""A network as a list of steps, and where each of its weights enters.

The layerwise engine needs to know, for each weight, the step in which it multiplies the data: of
y = a·W only the inputs a and the cotangents of y are needed for W's share of the kernel. `trace`
finds those steps in the jaxpr of any `ApplyFn`, so Flax, Equinox and hand-written networks are
treated alike; weights that enter in any other way are listed as `others`. Interpreting a jaxpr
follows JAX's own guide, "Writing custom Jaxpr interpreters in JAX".
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.kernels.engine.varying import along
from ntk_awt.types import ApplyFn, Params


class Constant(NamedTuple):
    """A literal operand of a step.

    Attributes:
        value: a number or an array.
        varies: whether it has to vary as the other operands do, inside `jax.shard_map`.
    """

    value: Any
    varies: bool = False


class Step(NamedTuple):
    """One primitive operation: numbers of the values that it takes and makes."""

    eqn: Any
    inputs: tuple[int | Constant, ...]
    outputs: tuple[int, ...]


class View(NamedTuple):
    """A value that is a leaf times a number, reshaped, transposed, broadcast or rounded.

    Casts between floating types are left out of the steps: rounding has the derivative 1.

    Attributes:
        leaf: position of the leaf.
        steps: what leads from the leaf to the value, in order.
    """

    leaf: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Site:
    """The step y = a·W of one weight, W possibly reshaped, with the bias added to it.

    Attributes:
        step: number of the step, `dot_general`, `conv_general_dilated` or `gather` (of rows).
        operand: which operand of the step is the weight, 0 or 1.
        leaf: position of the weight's leaf.
        view: how the operand is made of the leaf.
        tap: the value whose cotangents are taken: y, scaled, with the bias.
        scale: ∂tap/∂y, a number.
        bias: position of the bias's leaf, or None.
        bias_scale: ∂tap/∂bias, a number.
    """

    step: int
    operand: int
    leaf: int
    view: View
    tap: int
    scale: float
    bias: int | None
    bias_scale: float


@dataclass(frozen=True)
class Program:
    """A traced network: `(leaves, image[1, *shape]) -> logits[1, c]`.

    Attributes:
        constants: values that the function closes over, by number.
        leaves: numbers of the parameters' values, in the order of the pytree.
        image: number of the image's value.
        steps: in order.
        output: number of the logits' value.
        shapes: abstract value (shape, dtype) by number.
        sites: the weights that enter in one product with the data.
        others: positions of all leaves that are neither a site's weight nor its bias.
        activations: numbers in all values that depend on the image.
    """

    constants: dict[int, Any]
    leaves: tuple[int, ...]
    image: int
    steps: tuple[Step, ...]
    output: int
    shapes: dict[int, Any]
    sites: tuple[Site, ...]
    others: tuple[int, ...]
    activations: int


# ---------------------------------------------------------------- flattening

_CALLS = ("jit", "closed_call", "remat2")  # remat2: jax.checkpoint


_VARY = ("pvary", "pcast")
"""What JAX calls the steps that let an operand vary along mesh axes."""


def _body(eqn: Any) -> Any:
    """The jaxpr of a call whose steps are written out in place, or None.

    Of calls with a derivative rule of their own only a convolution (`convolution.convolve`) is: it
    has the derivative of its body. Others may not, as ReLU at 0.
    """
    if eqn.primitive.name in _CALLS:
        return eqn.params.get("jaxpr")
    if eqn.primitive.name == "custom_jvp_call":
        body = eqn.params["call_jaxpr"]
        if [inner.primitive.name for inner in body.jaxpr.eqns] == ["conv_general_dilated"]:
            return body
    return None


class _Flattener:
    """Numbers the values of a jaxpr, with the bodies of calls written out in place."""

    def __init__(self) -> None:
        self.shapes: dict[int, Any] = {}
        self.constants: dict[int, Any] = {}
        self.steps: list[Step] = []

    def new(self, aval: Any) -> int:
        number = len(self.shapes)
        self.shapes[number] = aval
        return number

    def constant(self, aval: Any, value: Any) -> int:
        number = self.new(aval)
        self.constants[number] = value
        return number

    def run(
        self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[int | Constant]
    ) -> list[int | Constant]:
        known: dict[Any, int | Constant] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, constants, strict=True):
            known[variable] = self.constant(variable.aval, value)

        def read(atom: Any) -> int | Constant:
            return Constant(atom.val) if hasattr(atom, "val") else known[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(map(read, eqn.invars))
            body = _body(eqn)
            if eqn.primitive.name in _VARY and isinstance(operands[0], Constant):
                value = np.asarray(operands[0].value, eqn.invars[0].aval.dtype)
                outputs = [Constant(value, True)]
            elif body is not None:
                inner = getattr(body, "jaxpr", body)  # closed, or open without constants
                outputs = self.run(inner, getattr(body, "consts", ()), operands)
            else:
                outputs = [self.new(variable.aval) for variable in eqn.outvars]
                self.steps.append(Step(eqn, operands, tuple(outputs)))
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


# ---------------------------------------------------------------- analysis

_STRUCTURAL = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "neg", "copy")


def _number(value: Any) -> bool:
    return isinstance(value, Constant) and np.size(value.value) == 1


def _is_cast(step: Step) -> bool:
    """Whether the step goes from one floating type to another."""
    (before,), (after,) = step.eqn.invars, step.eqn.outvars
    return all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (before, after))


def _is_view_step(step: Step, views: dict[int, View]) -> bool:
    """Whether the step only rescales, reshapes or broadcasts a view of one leaf."""
    name, inputs = step.eqn.primitive.name, step.inputs
    seen = [i for i in inputs if isinstance(i, int) and i in views]
    if len(seen) != 1:
        return False
    if name in (*_STRUCTURAL, *_VARY):
        return len(inputs) == 1
    if name == "convert_element_type":
        return _is_cast(step)
    if name == "mul":
        return any(map(_number, inputs))
    return name == "div" and _number(inputs[1])


def _operands(step: Step, values: Sequence[Any], dtype: Any = None) -> list[Any]:
    """The operands of a step.

    Args:
        step: whose they are.
        values: of its operands; where one is a literal, that takes their place.
        dtype: of the literals, where it is not that of the program.
    """
    others = [v for v, i in zip(values, step.inputs, strict=True) if not isinstance(i, Constant)]

    def literal(constant: Constant) -> Any:
        value = constant.value if dtype is None else np.asarray(constant.value, dtype)
        return along(value, others) if constant.varies else value

    return [
        literal(i) if isinstance(i, Constant) else v
        for v, i in zip(values, step.inputs, strict=True)
    ]


def evaluate(step: Step, values: Sequence[Any]) -> list[Any]:
    """The outputs of one step."""
    primitive = step.eqn.primitive
    found = primitive.bind(*values, **primitive.get_bind_params(step.eqn.params))
    return list(found) if primitive.multiple_results else [found]


def apply_view(view: View, leaf: Any) -> Any:
    """The value that a view makes of its leaf: linear, one leaf entry for each entry."""
    value = leaf
    for step in view.steps:
        (value,) = evaluate(step, _operands(step, [value] * len(step.inputs), value.dtype))
    return value


def _plain_product(step: Step, operand: int) -> bool:
    """Whether the step is a product that `normal` below knows, with the weight at `operand`."""
    params = step.eqn.params
    if step.eqn.primitive.name == "dot_general":
        _, batch = params["dimension_numbers"]
        return batch == ((), ()) or not any(map(len, batch))
    if step.eqn.primitive.name == "gather":
        return operand == 0 and _looks_up_rows(step)
    if step.eqn.primitive.name == "conv_general_dilated":
        groups = params["feature_group_count"] * params["batch_group_count"]
        return operand == 1 and groups == 1
    return False


def _looks_up_rows(step: Step) -> bool:
    """Whether a gather takes whole rows of its operand, W[ids]."""
    shape, numbers = step.eqn.invars[0].aval.shape, step.eqn.params["dimension_numbers"]
    return (
        step.eqn.params["slice_sizes"] == (1, *shape[1:])
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
    )


class _Analysis:
    """Finds the sites of a flattened program."""

    def __init__(self, flat: _Flattener, leaves: Sequence[int], image: int, output: int):
        self.flat, self.leaves = flat, leaves
        self.views = {value: View(i, ()) for i, value in enumerate(leaves)}
        self.from_data = {image}
        self.ends: Counter[int] = Counter()  # uses of a leaf that are not views of it
        self.users: dict[int, list[int]] = {output: [-1]}
        for number, step in enumerate(flat.steps):
            values = [i for i in step.inputs if isinstance(i, int)]
            for value in values:
                self.users.setdefault(value, []).append(number)
            if self.from_data.intersection(values):
                self.from_data.update(step.outputs)
            if _is_view_step(step, self.views):
                (source,) = (v for v in values if v in self.views)
                leaf, steps = self.views[source]
                # Weights vary already, and rounded numbers have no place in a Jacobian.
                left_out = step.eqn.primitive.name in (*_VARY, "convert_element_type")
                self.views[step.outputs[0]] = View(leaf, steps if left_out else (*steps, step))
            else:
                self.ends.update(self.views[v].leaf for v in values if v in self.views)
        if output in self.views:
            self.ends[self.views[output].leaf] += 1

    def sites(self) -> tuple[Site, ...]:
        found, taken = [], set()
        for number, step in enumerate(self.flat.steps):
            site = self._site(number, step, taken)
            if site is not None:
                found.append(site)
                taken |= {site.leaf} | ({site.bias} - {None})
        return tuple(found)

    def _site(self, number: int, step: Step, taken: set[int]) -> Site | None:
        for operand, value in enumerate(step.inputs):
            if not isinstance(value, int) or value not in self.views:
                continue
            if not _plain_product(step, operand):
                continue
            view = self.views[value]
            size = np.prod(self.flat.shapes[value].shape)
            single = self.ends[view.leaf] == 1 and view.leaf not in taken
            whole = size == np.prod(self.flat.shapes[self.leaves[view.leaf]].shape)
            data = step.inputs[1 - operand]
            if single and whole and isinstance(data, int) and data in self.from_data:
                return self._with_bias(number, operand, view)
        return None

    def _with_bias(self, number: int, operand: int, view: View) -> Site:
        """Follow the product through scalings to the addition of its bias."""
        step = self.flat.steps[number]
        tap, scale = step.outputs[0], 1.0
        if step.eqn.primitive.name == "gather":
            return Site(number, operand, view.leaf, view, tap, scale, None, 0.0)
        features = _feature_axes(step, operand, len(self.flat.shapes[tap].shape))
        while len(users := self.users.get(tap, [])) == 1 and users[0] >= 0:
            user = self.flat.steps[users[0]]
            name, inputs = user.eqn.primitive.name, user.inputs
            other = inputs[1 - inputs.index(tap)] if len(inputs) == 2 else None
            if name == "convert_element_type" and _is_cast(user):
                pass
            elif name == "mul" and _number(other):
                scale *= float(other.value)  # type: ignore[union-attr]
            elif name in ("add", "add_any") and isinstance(other, int) and other in self.views:
                bias_scale = self._bias_scale(self.views[other], user.outputs[0], features)
                if bias_scale is None:
                    break
                bias = self.views[other].leaf
                return Site(
                    number, operand, view.leaf, view, user.outputs[0], scale, bias, bias_scale
                )
            else:
                break
            tap = user.outputs[0]
        return Site(number, operand, view.leaf, view, tap, scale, None, 0.0)

    def _bias_scale(self, view: View, out: int, features: tuple[int, ...]) -> float | None:
        """The factor of a bias, one entry a feature, added to `out`; None if it is not one."""
        shape = self.flat.shapes[out].shape
        leaf = self.flat.shapes[self.leaves[view.leaf]]
        if self.ends[view.leaf] != 1 or leaf.size != np.prod([shape[a] for a in features]):
            return None
        index = np.arange(1, leaf.size + 1).astype(leaf.dtype).reshape(leaf.shape)
        with jax.ensure_compile_time_eval():
            ones = np.asarray(apply_view(view, jnp.ones(leaf.shape, leaf.dtype)))
            seen = np.asarray(apply_view(view, jnp.asarray(index)))
        scale = float(ones.flat[0])
        rows = np.moveaxis(np.broadcast_to(seen, shape), features, range(-len(features), 0))
        rows = rows.reshape(-1, leaf.size)
        right = scale != 0 and np.allclose(rows, scale * np.arange(1, leaf.size + 1), rtol=1e-5)
        return scale if right else None


def _feature_axes(step: Step, operand: int, rank: int) -> tuple[int, ...]:
    """The axes of a product's result that come from the weight."""
    params = step.eqn.params
    if step.eqn.primitive.name == "gather":
        return params["dimension_numbers"].offset_dims
    if step.eqn.primitive.name == "conv_general_dilated":
        return (params["dimension_numbers"].out_spec[1],)
    (contracted, _) = params["dimension_numbers"]
    free = len(step.eqn.invars[operand].aval.shape) - len(contracted[operand])
    return tuple(range(rank - free, rank)) if operand == 1 else tuple(range(free))


def _kind(array: Any) -> Any:
    """Shape and dtype, and inside `jax.shard_map` the mesh axes along which it varies."""
    return array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)


_CACHE: WeakKeyDictionary[Any, dict[Any, Program]] = WeakKeyDictionary()


def trace(apply: ApplyFn, params: Params, x: Any) -> Program:
    """Trace a network at one image of the shape of those in x [n, *shape], and find its sites."""
    leaves, structure = jax.tree.flatten(params)
    image = jax.eval_shape(lambda x: x[:1], x)
    key = (jax.config.jax_enable_x64, structure, image, *map(_kind, leaves))  # type: ignore[attr-defined]
    try:
        cached = _CACHE.setdefault(apply, {})
    except TypeError:  # a callable without hash or weak reference
        cached = {}
    if key not in cached:
        shapes = jax.eval_shape(lambda w: w, params)
        with jax.default_matmul_precision("highest"):  # see `empirical`
            closed = jax.make_jaxpr(apply)(shapes, image)
        flat = _Flattener()
        inputs = [flat.new(variable.aval) for variable in closed.jaxpr.invars]
        (output,) = flat.run(closed.jaxpr, closed.consts, inputs)
        if isinstance(output, Constant):
            output = flat.constant(closed.jaxpr.outvars[0].aval, output.value)
        analysis = _Analysis(flat, inputs[:-1], inputs[-1], output)
        sites = analysis.sites()
        used = {leaf for site in sites for leaf in (site.leaf, site.bias)}
        cached[key] = Program(
            constants=flat.constants,
            leaves=tuple(inputs[:-1]),
            image=inputs[-1],
            steps=tuple(flat.steps),
            output=output,
            shapes=flat.shapes,
            sites=sites,
            others=tuple(i for i in range(len(leaves)) if i not in used),
            activations=sum(flat.shapes[v].size for v in analysis.from_data),
        )
    return cached[key]


# ---------------------------------------------------------------- running


def run(
    program: Program, leaves: Sequence[Any], image: Any, taps: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """Run a program with something added to each site's tap.

    Args:
        program: from `trace`.
        leaves: the parameters' leaves.
        image: [1, *shape].
        taps: what is added to the tap of each site, of the tap's shape.

    Returns:
        The logits [1, c] and, for each site, the data operand of its product.
    """
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.leaves, leaves, strict=True))
    values[program.image] = image
    added = {site.tap: tap for site, tap in zip(program.sites, taps, strict=True)}
    by_offsets = {site.step for site in program.sites} if jax.default_backend() == "cpu" else set()
    for position, step in enumerate(program.steps):
        inputs = [None if isinstance(i, Constant) else values[i] for i in step.inputs]
        inputs = _operands(step, inputs)
        if position in by_offsets and step.eqn.primitive.name == "conv_general_dilated":
            found = [_convolve(step, *inputs)]
        else:
            found = evaluate(step, inputs)
        for number, value in zip(step.outputs, found, strict=True):
            values[number] = value + added[number] if number in added else value
    data = [values[_data_operand(program, site)] for site in program.sites]
    return values[program.output], data


def looked_up(program: Program, site: Site) -> int:
    """Of how many rows of its weight the site looks some up; 0 where it is a product."""
    eqn = program.steps[site.step].eqn
    return eqn.invars[0].aval.shape[0] if eqn.primitive.name == "gather" else 0


def _data_operand(program: Program, site: Site) -> int:
    operand = program.steps[site.step].inputs[1 - site.operand]
    assert isinstance(operand, int)  # checked by the analysis: it depends on the image
    return operand


# ---------------------------------------------------------------- normal forms


def normal_data(program: Program, site: Site, data: Any) -> jax.Array:
    """The data operand of a product as rows: [positions, inputs].

    An image is one position for a dense layer; a convolution has one for each output pixel, with
    the pixels under the window (and zeros at the border) as inputs. Where rows are looked up it is
    their numbers [positions, 1], −1 where there is no such row.
    """
    step = program.steps[site.step]
    params = step.eqn.params
    if step.eqn.primitive.name == "gather":
        ids, count = data.reshape(-1, 1), step.eqn.invars[0].aval.shape[0]
        if params["mode"] == jax.lax.GatherScatterMode.CLIP:
            return jnp.clip(ids, 0, count - 1)
        return jnp.where((ids >= 0) & (ids < count), ids, -1)
    if step.eqn.primitive.name == "dot_general":
        contracted = params["dimension_numbers"][0][1 - site.operand]
        free = [axis for axis in range(data.ndim) if axis not in contracted]
        inputs = int(np.prod([data.shape[axis] for axis in contracted]))
        return data.transpose(*free, *contracted).reshape(-1, inputs)
    return _patches(data, step)


class _Windows(NamedTuple):
    """The windows of a convolution, on an input of shape [n, *pixels, channels] with its border.

    Attributes:
        image: the input.
        shape: of a window, [pixels].
        sizes: of the output, [pixels].
        strides, dilations: of the windows, and of the pixels in one.
    """

    image: jax.Array
    shape: list[int]
    sizes: list[int]
    strides: Sequence[int]
    dilations: Sequence[int]

    def cut(self, offset: Sequence[int], axes: slice = slice(None)) -> jax.Array:
        """The pixel at `offset` of every window; of some axes only, with the others as they are."""
        image = self.image
        for axis, o in zip(range(1, image.ndim - 1)[axes], offset, strict=True):
            stride, start = self.strides[axis - 1], o * self.dilations[axis - 1]
            stop = start + (self.sizes[axis - 1] - 1) * stride + 1
            image = jax.lax.slice_in_dim(image, start, stop, stride, axis)
        return image


def _windows(data: Any, step: Step) -> _Windows:
    params = step.eqn.params
    numbers = params["dimension_numbers"]
    kernel = step.eqn.invars[1].aval.shape
    shape = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    batch, channel, *spatial = numbers.lhs_spec
    borders = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    image = data.transpose(batch, *spatial, channel)
    image = jax.lax.pad(image, jnp.zeros((), data.dtype), [(0, 0, 0), *borders, (0, 0, 0)])
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    sizes = [
        (size - (w - 1) * dilation - 1) // stride + 1
        for size, w, dilation, stride in zip(
            image.shape[1:-1], shape, dilations, strides, strict=True
        )
    ]
    return _Windows(image, shape, sizes, strides, dilations)


def _patches(data: Any, step: Step) -> jax.Array:
    """All windows of a convolution's input: [output pixels, window pixels · channels]."""
    windows = _windows(data, step)
    stacked = jnp.stack([windows.cut(o) for o in np.ndindex(*windows.shape)], axis=-2)
    return stacked.reshape(len(windows.image) * int(np.prod(windows.sizes)), -1)


def _convolve(step: Step, data: Any, kernel: Any) -> jax.Array:
    """A convolution as a sum of matrix products, one for each pixel of the window.

    XLA's convolutions on CPUs are slow when transposed (a border of zeros is multiplied as well)
    and several times slower inside loops; this one is neither. The first axis of the window is a
    loop, or all of its terms would be fused into one slow sum.
    """
    params, out = step.eqn.params, step.eqn.outvars[0].aval
    numbers = params["dimension_numbers"]
    windows = _windows(data, step)
    kernel = kernel.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    stride, dilation = windows.strides[0], windows.dilations[0]
    length = (windows.sizes[0] - 1) * stride + 1
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    shape = (len(windows.image), *windows.sizes, kernel.shape[-1])

    def add(total: jax.Array, term: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        first, weights = term
        rows = jax.lax.dynamic_slice_in_dim(windows.image, first * dilation, length, axis=1)
        part = windows._replace(image=rows[:, ::stride])
        for offset in np.ndindex(*windows.shape[1:]):
            pixels = part.cut(offset, slice(1, None))
            total = total + jnp.matmul(pixels, weights[offset], preferred_element_type=dtype)
        return total, None

    terms = (jnp.arange(windows.shape[0]), kernel)
    zeros = along(jnp.zeros(shape, dtype), (data, kernel))
    found = jax.lax.scan(add, zeros, terms)[0].astype(out.dtype)
    batch, channel, *spatial = numbers.out_spec
    return found.transpose(np.argsort([batch, *spatial, channel]))


def normal_output(program: Program, site: Site, value: Any) -> jax.Array:
    """A tap, or its cotangent, as rows: [positions, units]."""
    step = program.steps[site.step]
    features = _feature_axes(step, site.operand, value.ndim)
    units = int(np.prod([value.shape[axis] for axis in features]))
    positions = [axis for axis in range(value.ndim) if axis not in features]
    if step.eqn.primitive.name == "conv_general_dilated":  # in the order of the input's axes
        batch, _, *spatial = step.eqn.params["dimension_numbers"].out_spec
        positions = [batch, *spatial]
    return value.transpose(*positions, *features).reshape(-1, units)


def normal_weight(program: Program, site: Site, leaf: Any) -> jax.Array:
    """What belongs to the entries of a weight's leaf, as a matrix [inputs, units], unscaled.

    The rows are in the order of `normal_data`'s inputs, the columns in that of `normal_output`.
    """
    step = program.steps[site.step]
    value = apply_view(site.view._replace(steps=_unscaled(site.view.steps)), leaf)
    params = step.eqn.params
    if step.eqn.primitive.name == "gather":
        return value.reshape(len(value), -1)
    if step.eqn.primitive.name == "conv_general_dilated":
        out, into, *spatial = params["dimension_numbers"].rhs_spec
        value = value.transpose(*spatial, into, out)
        return value.reshape(-1, value.shape[-1])
    contracted = params["dimension_numbers"][0][site.operand]
    free = [axis for axis in range(value.ndim) if axis not in contracted]
    inputs = int(np.prod([value.shape[axis] for axis in contracted]))
    return value.transpose(*contracted, *free).reshape(inputs, -1)


def _unscaled(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    return tuple(step for step in steps if step.eqn.primitive.name not in ("mul", "div", "neg"))


def weight_scale(site: Site) -> float:
    """∂tap/∂(leaf entry · input): the scale behind the product times that inside the view."""
    scale = site.scale
    for step in site.view.steps:
        name = step.eqn.primitive.name
        numbers = [float(np.ravel(i.value)[0]) for i in step.inputs if isinstance(i, Constant)]
        if name == "mul":
            scale *= numbers[0]
        elif name == "div":
            scale /= numbers[0]
        elif name == "neg":
            scale = -scale
    return scale
