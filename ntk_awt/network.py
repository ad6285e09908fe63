"""A network as one value: its function, parameters, mask and gain; and what one has to be.

`Network(apply, params)` takes any pure function. `Network.from_nnx`, `from_linen` and
`from_equinox` take modules: what is trained becomes parameters, and all else (batch statistics,
counters, random keys, tables of indices) is frozen inside the function. A leaf of `params` is
masked, counted, and part of every kernel, so nothing else may be there; that is checked once
wherever a network enters.

Weights that multiply (kernels, embeddings) are prunable; biases and what normalisation layers scale
and shift with are kept whole, with gain 1, also where they have two or more axes as in attention
[heads, dim] and in stacked layers [layers, dim]. `prunable_leaves` tells them apart by name and
shape; whatever makes or counts masks takes `prunable=`, a function `(name, leaf) -> bool`, to say
it otherwise. It has to be the same one everywhere, and may look at names and shapes only, since
scores and masks are asked too.
"""

import dataclasses
import functools
import re
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.errors import InputError, check_finite, leaf_name
from ntk_awt.types import ApplyFn, Gain, Images, Logits, Mask, Params

if TYPE_CHECKING:
    from flax import nnx

_HERE = str(Path(__file__).parent)

_SEEN: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()
"""Arrays found finite (JAX's never change), so that a second kernel of them costs no pass."""


# ---------------------------------------------------------------- the value


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "mask", "gain"),
    meta_fields=("apply",),
)
@dataclass(frozen=True)
class Network:
    """A network f(x; γ⊙m⊙θ): a function and its parameters, with a mask and a gain if it is sparse.

    A pytree: `apply` is static and the rest are leaves, so the dense network and all its tickets
    share one compilation once each has a mask (`with_mask`).

    Attributes:
        apply: `(params, x[n, *shape]) -> logits[n, c]`, hashable. The logits of an image depend on
            that image alone.
        params: θ, a pytree of float arrays.
        mask: m, booleans with the structure and shapes of θ; None keeps everything.
        gain: γ, scalars with the structure of θ; None is 1.

    Example:
        >>> dense = Network(lambda w, x: x @ w, jnp.array([[3.0], [5.0]]))
        >>> ticket = dense.replace(mask=jnp.array([[True], [False]]), gain=jnp.float32(2.0))
        >>> dense(jnp.ones((1, 2))).tolist(), ticket(jnp.ones((1, 2))).tolist()
        ([[8.0]], [[6.0]])
        >>> ticket.density
        0.5
    """

    apply: ApplyFn
    params: Params
    mask: Mask | None = None
    gain: Gain | None = None

    def __call__(self, x: Images) -> Logits:
        """The logits f(x; γ⊙m⊙θ), [n, c]."""
        return self.apply(self.weights, x)

    @property
    def weights(self) -> Params:
        """What the function is given: γ⊙m⊙θ, leaf by leaf, in the dtypes of θ."""
        factors = [part for part in (self.mask, self.gain) if part is not None]
        if not factors:
            return self.params

        def scale(w: Any, *factors: Any) -> jax.Array:
            dtype = jnp.result_type(w)
            scales = [jnp.asarray(factor).astype(dtype) for factor in factors]
            return jnp.asarray(w) * functools.reduce(jnp.multiply, scales)

        return jax.tree.map(scale, self.params, *factors)

    @property
    def density(self) -> float:
        """Kept share of all entries that a mask may prune (`prunable_leaves`); 1 without a mask."""
        return 1.0 if self.mask is None else density(self.mask)

    def replace(self, **changes: Any) -> "Network":
        """The same network with other fields."""
        return dataclasses.replace(self, **changes)

    def with_mask(self) -> "Network":
        """The same network with a mask and a gain: ones where it has none."""
        mask, gain = self.mask, self.gain
        if mask is None:
            mask = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), self.params)
        if gain is None:
            gain = jax.tree.map(lambda w: jnp.ones((), jnp.result_type(w)), self.params)
        return self.replace(mask=mask, gain=gain)

    def folded(self) -> "Network":
        """The same function of images without mask and gain: its parameters are γ⊙m⊙θ."""
        return Network(self.apply, self.weights)

    # ------------------------------------------------------------ from modules

    @classmethod
    def from_nnx(cls, module: "nnx.Module") -> "Network":
        """Split any NNX module once into a pure function and a nested dict of parameters.

        Args:
            module: maps images [n, *shape] to logits [n, c]. Its `nnx.Param` variables are the
                parameters; all else (statistics, counters, random keys, arrays) is frozen.

        Returns:
            The dense network. Modules alike that hold parameters only have one function, so that
            they share compilations.

        Raises:
            InputError: batch normalisation or dropout in training mode (adversarial training and
                kernels need logits that depend on one image and the parameters alone), or
                parameters that are none (`check_params`).

        Example:
            >>> from flax import nnx
            >>> network = Network.from_nnx(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
            >>> sorted(network.params)
            ['bias', 'kernel']
        """
        from flax import nnx  # heavy, and not needed by those who bring a function

        for path, part in nnx.iter_modules(module):
            for attribute in ("use_running_average", "deterministic"):
                if getattr(part, attribute, None) is False and _is_active(part, attribute):
                    name = "/".join(map(str, path)) or "the module"
                    raise InputError(
                        f"module: {name}",
                        expected="evaluation mode",
                        got=f"{type(part).__name__} with {attribute}=False",
                        fix="call module.eval() first",
                    )
        graph, weights, rest = nnx.split(module, nnx.Param, ...)
        params, state = nnx.to_pure_dict(weights), nnx.to_pure_dict(rest)
        check_params(params, "the module")
        if not jax.tree.leaves(state):
            return cls(_apply_of(graph), params)

        def call(params: Params, state: Any, x: Images) -> Logits:
            return nnx.merge(graph, nnx.State(params), nnx.State(state))(x)

        return cls(_Frozen(call, state), params)

    @classmethod
    def from_linen(cls, module: Any, variables: Mapping[str, Any], **options: Any) -> "Network":
        """The weights of a Flax (Linen) module, and its function with all other variables frozen.

        Args:
            module: a `flax.linen.Module` that maps images [n, *shape] to logits [n, c].
            variables: from `module.init`, or trained; "params" are the weights, the other
                collections (such as "batch_stats") are frozen.
            options: further arguments of the module's call or of its `apply`, e.g. `train=False`.

        Returns:
            The dense network.

        Raises:
            InputError: no "params", or some that are none (`check_params`). Batch normalisation in
                training mode is refused where the network is first used.

        Example:
            >>> from flax import linen
            >>> module, x = linen.BatchNorm(use_running_average=True), jnp.ones((2, 3))
            >>> network = Network.from_linen(module, module.init(jax.random.key(0), x))
            >>> sorted(network.params), network(x).shape
            (['bias', 'scale'], (2, 3))
        """
        if not isinstance(variables, Mapping) or "params" not in variables:
            names = ", ".join(map(str, variables)) if isinstance(variables, Mapping) else ""
            raise InputError(
                "variables",
                expected="a dict with 'params', as module.init gives",
                got=names or type(variables).__name__,
            )
        params = variables["params"]
        check_params(params, "the module")
        rest = {name: part for name, part in variables.items() if name != "params"}

        def call(params: Params, state: Any, x: Images) -> Logits:
            return module.apply({"params": params, **state}, x, **options)

        return cls(_Frozen(call, rest), params)

    @classmethod
    def from_equinox(cls, model: Any, state: Any = None) -> "Network":
        """Partition an Equinox model into its trained arrays and the rest, which is frozen.

        The same as `eqx.partition(model, eqx.is_inexact_array)` and `jax.vmap`; Equinox itself is
        not needed, and any other callable pytree will do.

        Args:
            model: maps one image [*shape] to logits [c]; its arrays of floats are the parameters.
            state: of `eqx.nn.make_with_state`, if the model is called with it; frozen.

        Returns:
            The dense network. Its parameters have the structure of the model, with None in place
            of what is frozen.

        Raises:
            InputError: dropout or batch normalisation in training mode, or no parameters.

        Example:
            >>> bias = jnp.ones(2)
            >>> network = Network.from_equinox(jax.tree_util.Partial(jnp.add, bias))
            >>> network(jnp.zeros((3, 2))).shape
            (3, 2)
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(model):
            if leaf is False and leaf_name(path).endswith("inference"):
                raise InputError(
                    f"model: {leaf_name(path)}",
                    expected="inference mode",
                    got="False",
                    fix="call equinox.nn.inference_mode(model) first",
                )

        def split(*, trained: bool) -> Any:
            return jax.tree.map(lambda leaf: leaf if _is_trained(leaf) == trained else None, model)

        def call(params: Params, frozen: Any, x: Images) -> Logits:
            rest, state = frozen
            whole = jax.tree.map(
                lambda p, r: r if p is None else p, params, rest, is_leaf=lambda a: a is None
            )
            if state is None:
                return jax.vmap(whole)(x)
            return jax.vmap(lambda image: whole(image, state)[0])(x)

        params = split(trained=True)
        check_params(params, "the model")
        return cls(_Frozen(call, (split(trained=False), state)), params)


class _Frozen:
    """A function of parameters and images that holds other state fixed; equal to itself only.

    State is a constant of what is compiled, so functions with different state must not be taken
    for one another.
    """

    def __init__(self, call: Callable[[Params, Any, Images], Logits], state: Any):
        self._call = call
        # Copies, since the user may change NumPy arrays; functions and numbers stay as they are.
        self._state = jax.tree.map(lambda a: jnp.array(a) if _is_array(a) else a, state)

    def __call__(self, params: Params, x: Images) -> Logits:
        return self._call(params, self._state, x)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _is_trained(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_active(part: "nnx.Module", attribute: str) -> bool:
    """Whether a part in training mode differs from one that is not: dropout at rate 0 does not."""
    rate = getattr(part, "rate", getattr(part, "dropout_rate", 1.0))
    return attribute != "deterministic" or rate != 0


@functools.lru_cache(maxsize=128)
def _apply_of(graph: "nnx.GraphDef") -> ApplyFn:
    """The pure function of a module; one for all modules alike, so that they share compilations."""

    from flax import nnx

    def apply(params: Params, x: Images) -> Logits:
        return nnx.merge(graph, nnx.State(params))(x)

    return apply


# ---------------------------------------------------------------- what a mask may prune

Prunable: TypeAlias = Callable[[str, Any], bool]
"""`(name, leaf) -> bool`: whether a mask may prune entries, e.g. of `dense1/kernel`."""

_KEPT = re.compile(r".*bias(es)?|(.*_)?(scale|offset|shift|beta|gamma|mean|var|variance)")
"""Names of leaves that are added, or that scale, shift or are statistics of a normalisation."""

_NORMALISATION = re.compile(r".*norm.*|(.*_)?(ln|bn)_?\d*")
"""Names of layers with such leaves, whatever those are called."""

_PERHAPS = re.compile(r"b.*|.*b")
"""Names of leaves that are biases if a leaf beside them has their axes and more."""


def prunable_leaves(tree: Any, prunable: Prunable | None = None) -> Any:
    """Which leaves a mask may prune, by role.

    A leaf is prunable if it has two or more axes and is neither named like a bias (`bias`,
    `in_proj_bias`) nor belongs to a normalisation (`scale`, `offset`, `batch_norm/weight`). One
    named `b…` or `…b`, and the second of a pair without names as in `(w, b)`, is a bias if the leaf
    beside it has its axes and more: [layers, dim] beside [layers, in, dim].

    Args:
        tree: parameters, or scores or a mask of their structure and shapes.
        prunable: `(name, leaf) -> bool` in place of that rule. Scalars and empty leaves are never
            prunable.

    Returns:
        Booleans of Python, the structure of `tree`.

    Raises:
        InputError: variables of a Flax (Linen) module that are not weights.

    Example:
        >>> import numpy as np
        >>> stacked = {"w": np.ones((3, 8, 5)), "b": np.ones((3, 5))}
        >>> prunable_leaves({"layers": stacked, "b": np.ones((5, 2))})
        {'b': True, 'layers': {'b': False, 'w': True}}
        >>> prunable_leaves(stacked, lambda name, leaf: name == "b")
        {'b': True, 'w': False}
    """
    check_weights_only(tree)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    beside = defaultdict(list)
    for path, leaf in leaves:
        beside[path[:-1]].append(np.shape(leaf))

    def by_role(path: Any, leaf: Any) -> bool:
        if np.ndim(leaf) < 2:
            return False
        siblings = beside[path[:-1]]
        parts = leaf_name(path).lower().split("/")
        if parts[-1] == "value":  # of a variable of Flax
            parts.pop()
        *layers, name = parts or [""]
        if _KEPT.fullmatch(name) or (layers and _NORMALISATION.fullmatch(layers[-1])):
            return False
        paired = name == "1" and len(siblings) == 2
        if not (paired or _PERHAPS.fullmatch(name)):
            return True
        return not any(_has_more(shape, np.shape(leaf)) for shape in siblings)

    def one(path: Any, leaf: Any) -> bool:
        if np.ndim(leaf) == 0 or np.size(leaf) == 0:
            return False
        return by_role(path, leaf) if prunable is None else bool(prunable(leaf_name(path), leaf))

    return structure.unflatten([one(path, leaf) for path, leaf in leaves])


def _has_more(shape: Sequence[int], part: Sequence[int]) -> bool:
    """Whether `shape` has all axes of `part` in their order, and others."""
    axes = iter(shape)
    return len(shape) > len(part) and all(size in axes for size in part)


def density(mask: Mask, prunable: Prunable | None = None) -> float:
    """Kept share of all prunable entries (see `prunable_leaves`); 1 if there are none."""
    chosen = jax.tree.leaves(prunable_leaves(mask, prunable))
    leaves = [np.ravel(m) for m, p in zip(jax.tree.leaves(mask), chosen, strict=True) if p]
    return float(np.concatenate(leaves).mean(dtype=np.float64)) if leaves else 1.0


# ---------------------------------------------------------------- checks


def _of(what: str) -> str:
    return f" of {what}" if what else ""


def in_one_line(error: BaseException, folder: str = "") -> str:
    """What code of the user's raised, and where: `TypeError: a text (file.py, line 3)`.

    Args:
        error: as it was caught.
        folder: where the user's own files are; else all but installed packages and ours.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last = [
        frame
        for frame in frames
        if frame.filename.startswith(folder)
        and "site-packages" not in frame.filename
        and not frame.filename.startswith((_HERE, "<frozen"))
    ] or frames
    where = f"{Path(last[-1].filename).name}, line {last[-1].lineno}"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text} ({where})"


def check_weights_only(params: Any, what: str = "") -> None:
    """Raise where the pytree is that of a Flax (Linen) module with more than its weights."""
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
        raise InputError(
            f"params{_of(what)}",
            expected="trained weights alone",
            got=f"the collections {', '.join(sorted(map(str, params)))} of a Flax module",
            fix="use Network.from_linen(module, variables), which freezes the others",
        )


def check_params(params: Any, what: str = "", *, empty: bool = False) -> None:
    """Raise unless `params` is a pytree of finite float arrays; the error names the leaf.

    Args:
        params: the pytree; arrays, shapes (`jax.ShapeDtypeStruct`) or traced values. Only known
            values can be found to be NaN or infinite.
        what: whose they are, for the error.
        empty: whether there may be none; attacks need none, kernels and masks do.

    Raises:
        InputError: no leaves; a leaf that is a Python number, integer, boolean, complex, no array
            at all, NaN or infinite; more than the weights of a Flax module.

    Example:
        >>> check_params({"kernel": jnp.ones((2, 3)), "step": jnp.zeros((), int)})
        Traceback (most recent call last):
        ...
        ntk_awt.errors.InputError: params: step: expected an array of floats, got dtype int32; \
keep what is not trained out of params, e.g. equinox.partition(model, equinox.is_inexact_array)
    """
    check_weights_only(params, what)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves and not empty:
        raise InputError(
            f"params{_of(what)}", expected="at least one array of floats", got="no leaves"
        )
    for path, leaf in leaves:
        name = f"params{_of(what)}: {leaf_name(path)}".removesuffix(": ")
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            number = isinstance(leaf, float)
            raise InputError(
                name,
                expected="an array of floats",
                got=f"dtype {dtype}" if dtype is not None else f"a Python {type(leaf).__name__}",
                fix=f"make it jnp.asarray({leaf})"
                if number
                else "keep what is not trained out of params, e.g. "
                "equinox.partition(model, equinox.is_inexact_array)",
            )
        if (
            isinstance(leaf, jax.Array | np.ndarray | np.generic)
            and _SEEN.get(id(leaf)) is not leaf
        ):
            try:
                check_finite(name, np.asarray(leaf))
            except (jax.errors.TracerArrayConversionError, RuntimeError):
                continue  # traced, or on several machines: nobody knows its values here
            if isinstance(leaf, jax.Array):
                _SEEN[id(leaf)] = leaf


def check_network(network: Network, x: Any, *, what: str = "", empty: bool = False) -> int:
    """Raise unless the network maps these images to logits; their number.

    The function is traced, not run, and once only for each shape.

    Args:
        network: its mask and gain are not looked at.
        empty: see `check_params`.
        x: images [n, *shape], or their shape.
        what: the network's name, for the error.

    Returns:
        c.

    Raises:
        InputError: what is wrong with the parameters; `apply` is no function, raises, or gives
            anything but one array [n, c] of real floats, c ≥ 1.

    Example:
        >>> check_network(Network(lambda w, x: x @ w, jnp.ones((3, 2))), jnp.ones((5, 3)))
        2
        >>> check_network(Network(lambda w, x: (x @ w)[:, 0], jnp.ones((3, 2))), jnp.ones((5, 3)))
        Traceback (most recent call last):
        ...
        ntk_awt.errors.InputError: logits: expected shape (5, classes), got shape (5,); \
return one column for each class
    """
    apply, params = network.apply, network.params
    if not callable(apply):
        raise InputError(
            f"network{_of(what)}",
            expected="a function (params, x[n, *shape]) -> logits[n, c]",
            got=type(apply).__name__,
        )
    check_params(params, what, empty=empty)
    shapes, image = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(a.dtype)), (params, x)
    )
    try:
        logits: Any = jax.eval_shape(_referable(apply), shapes, image)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"network{_of(what)}",
            expected=f"a function that takes images {list(image.shape)} and its parameters",
            got=in_one_line(error),
        ) from error
    return _check_logits(logits, image.shape[0], f"logits{_of(what)}")


def _referable(apply: Any) -> Any:
    """The function itself, of which JAX keeps traces by a weak reference, where it allows one."""
    try:
        weakref.ref(apply)
    except TypeError:
        return lambda params, x: apply(params, x)
    return apply


def _check_logits(logits: Any, n: int, name: str) -> int:
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    expected = f"shape ({n}, classes)"
    if shape is None or dtype is None:
        found = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(logits)]
        raise InputError(
            name,
            expected=f"one array of {expected}",
            got=f"a {type(logits).__name__} of {', '.join(found) or 'nothing'}",
            fix="return the logits alone",
        )
    if len(shape) != 2 or shape[0] != n or shape[1] == 0:
        fix = "return one column for each class" if shape == (n,) else ""
        raise InputError(name, expected=expected, got=f"shape {shape}", fix=fix)
    if not jnp.issubdtype(dtype, jnp.floating):
        fix = "return their real part, or a modulus" if dtype.kind == "c" else ""
        raise InputError(
            name, expected="real floating-point numbers", got=f"dtype {dtype}", fix=fix
        )
    return shape[1]
