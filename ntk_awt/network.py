"""What a network has to be, checked once wherever one enters.

A network is a function `(params, x[n, *shape]) -> logits[n, c]` and a pytree of float arrays, its
trained weights. Everything else that a function needs (statistics of batch normalisation, counters,
random keys, tables of indices) is closed over: a leaf of `params` is masked, counted, and part of
every kernel.
"""

import traceback
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.errors import InputError, check_finite, leaf_name

_HERE = str(Path(__file__).parent)

_SEEN: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()
"""Arrays found finite (JAX's never change), so that a second kernel of them costs no pass."""


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
            fix="use models.from_linen(module, variables), which keeps the others fixed",
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


def check_network(apply: Any, params: Any, x: Any, *, what: str = "", empty: bool = False) -> int:
    """Raise unless `apply` maps these parameters and images to logits; their number.

    The function is traced, not run, and once only for each shape.

    Args:
        apply: `(params, x[n, *shape]) -> logits[n, c]`.
        params, empty: see `check_params`.
        x: images [n, *shape], or their shape.
        what: the network's name, for the error.

    Returns:
        c.

    Raises:
        InputError: what is wrong with the parameters; `apply` is no function, raises, or returns
            anything but one array [n, c] of real floats, c ≥ 1.

    Example:
        >>> check_network(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((5, 3)))
        2
        >>> check_network(lambda w, x: (x @ w)[:, 0], jnp.ones((3, 2)), jnp.ones((5, 3)))
        Traceback (most recent call last):
        ...
        ntk_awt.errors.InputError: logits: expected shape (5, classes), got shape (5,); \
return one column for each class
    """
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
