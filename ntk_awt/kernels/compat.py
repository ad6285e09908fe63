"""neural-tangents 0.6.5 on current JAX.

The last release of neural-tangents (0.6.5) does not import on JAX 0.6 or later, since names it
takes from JAX have moved, and it imports TensorFlow for one experimental function. Importing this
module imports neural-tangents with the missing names lent to JAX's modules, takes them back, and
re-exports the public functions. It is the only module of this package that touches such JAX names.

Lent only while neural-tangents is being imported, and only where JAX lacks them:

- ``jax.core``: ``Jaxpr``, ``JaxprEqn``, ``Literal``, ``Primitive``, ``Var`` (they moved to
  ``jax.extend.core``) and ``Value`` (only used in annotations);
- ``jax.util``: ``safe_map`` and ``safe_zip`` (the module is gone; own versions);
- ``jax.interpreters.ad``: ``zeros_like_p`` (gone; it is only a key in a table of rules).

Changed in neural-tangents itself:

- ``experimental`` is replaced by an empty module, so neither ``tf2jax`` nor TensorFlow is imported;
- the helpers of ``NTK_VECTOR_PRODUCTS`` that call ``jnp.size`` on shapes (deprecated by JAX) are
  replaced by own ones;
- ``predict.max_learning_rate`` asks SciPy for ``eigvals=``, which SciPy 1.14 took away, and gets a
  function that still knows it;
- ``NtkImplementation.STRUCTURED_DERIVATIVES`` and ``AUTO`` raise `NotImplementedError`: they run on
  JAX internals of 2023. ``JACOBIAN_CONTRACTION`` (the default) and ``NTK_VECTOR_PRODUCTS`` work.

Tested with JAX 0.10.2 (Python 3.11) and JAX 0.11.2 (Python 3.12). Where a JAX lacks something else,
the import fails with one line that names the versions.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.metadata
import inspect
import itertools
import math
import platform
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import scipy.linalg

__all__ = [
    "NtkImplementation",
    "batch",
    "empirical_kernel_fn",
    "empirical_nngp_fn",
    "empirical_ntk_fn",
    "linearize",
    "monte_carlo_kernel_fn",
    "neural_tangents",
    "predict",
    "stax",
    "taylor_expand",
]

_TESTED = "works with JAX 0.10 and 0.11"
_EXPERIMENTAL = "neural_tangents.experimental"
_NO_TENSORFLOW = (
    "neural_tangents.experimental needs TensorFlow and is left out; the rest of neural-tangents "
    "works without it"
)


def _safe_map(f: Any, *args: Any) -> list[Any]:
    """`map` as a list, for arguments of equal length."""
    return [f(*xs) for xs in zip(*map(list, args), strict=True)]


def _safe_zip(*args: Any) -> list[tuple[Any, ...]]:
    """`zip` as a list, for arguments of equal length."""
    return list(zip(*map(list, args), strict=True))


def _lent_names() -> dict[str, dict[str, Any]]:
    """The names that neural-tangents asks of JAX, by the module it asks."""
    from jax.extend import core as jex

    return {
        "jax.core": {
            "Jaxpr": jex.Jaxpr,
            "JaxprEqn": jex.JaxprEqn,
            "Literal": jex.Literal,
            "Primitive": jex.Primitive,
            "Var": jex.Var,
            "Value": Any,
        },
        "jax.util": {"safe_map": _safe_map, "safe_zip": _safe_zip},
        "jax.interpreters.ad": {"zeros_like_p": jex.Primitive("zeros_like")},
    }


class _NoTensorFlow(importlib.abc.MetaPathFinder):
    """Refuses TensorFlow and tf2jax to the thread that made it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        top = fullname.partition(".")[0]
        if top in ("tensorflow", "tf2jax") and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(_NO_TENSORFLOW, name=fullname)


def _left_out(name: str) -> NoReturn:
    raise AttributeError(f"{name}: {_NO_TENSORFLOW}")


@contextlib.contextmanager
def _lend(names: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Add the missing names to JAX's modules and take them back at the end."""
    with contextlib.ExitStack() as undo:
        for path, attributes in names.items():
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as error:
                if error.name != path:
                    raise
                module = types.ModuleType(path)
                sys.modules[path] = module
                undo.callback(sys.modules.pop, path, None)
            for name, value in attributes.items():
                if not hasattr(module, name):
                    setattr(module, name, value)
                    undo.callback(delattr, module, name)
        yield


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Stand in for the TensorFlow part; gone from `sys.modules` at the end."""
    if _EXPERIMENTAL in sys.modules:
        yield
        return
    stand_in = types.ModuleType(_EXPERIMENTAL, _NO_TENSORFLOW)
    stand_in.__getattr__ = _left_out  # type: ignore[method-assign]
    finder = _NoTensorFlow()
    sys.modules[_EXPERIMENTAL] = stand_in
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        # A user who has TensorFlow can still import the real one by its name.
        sys.modules.pop(_EXPERIMENTAL, None)


def _refuse(implementation: str) -> Any:
    """What stands in for an implementation of the empirical NTK that cannot work."""

    def ntk_fn(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"NtkImplementation.{implementation} of neural-tangents relies on JAX internals that "
            "current JAX no longer has. Use NtkImplementation.JACOBIAN_CONTRACTION (the default) "
            "or NtkImplementation.NTK_VECTOR_PRODUCTS."
        )

    return ntk_fn


def _unravel(pytree: Any, axis: int, array: Any) -> Any:
    """Split axis `axis` of `array` into parts of the shapes of the leaves of `pytree`."""
    leaves, treedef = jax.tree_util.tree_flatten(pytree)
    axis %= array.ndim
    ends = list(itertools.accumulate(math.prod(leaf.shape) for leaf in leaves))
    parts = jnp.split(array, ends[:-1], axis)
    head, tail = array.shape[:axis], array.shape[axis + 1 :]
    return treedef.unflatten(
        [
            part.reshape(head + tuple(leaf.shape) + tail)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )


def _basis(pytree: Any) -> Any:
    """The unit vectors of the space of `pytree`, along a new leading axis of each leaf."""
    leaves = jax.tree_util.tree_leaves(pytree)
    size = sum(math.prod(leaf.shape) for leaf in leaves)
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    return _unravel(pytree, 1, jnp.eye(size, dtype=dtype))


def _eigvalsh(a: Any, eigvals: tuple[int, int] | None = None, **kwargs: Any) -> Any:
    """`scipy.linalg.eigvalsh` with the old name of `subset_by_index`."""
    return scipy.linalg.eigvalsh(a, subset_by_index=eigvals, **kwargs)


def _replace(module: types.ModuleType, name: str, value: Any) -> None:
    """Replace an attribute that must be there."""
    getattr(module, name)
    setattr(module, name, value)


def _adapt(nt: types.ModuleType) -> None:
    """Change in neural-tangents what fails, or warns, at run time."""
    empirical = importlib.import_module("neural_tangents._src.empirical")
    _replace(empirical, "_std_basis", _basis)
    _replace(empirical, "_unravel_array_into_pytree", _unravel)
    table = empirical._implementation_to_ntk_fn
    for name in ("AUTO", "STRUCTURED_DERIVATIVES"):
        key = nt.NtkImplementation[name]
        if key not in table:
            raise AttributeError(f"no NtkImplementation.{name}")
        table[key] = _refuse(name)
    predict = importlib.import_module("neural_tangents._src.predict")
    if "eigvals" not in inspect.signature(scipy.linalg.eigvalsh).parameters:
        linalg = types.SimpleNamespace(eigvalsh=_eigvalsh)
        _replace(predict, "sp", types.SimpleNamespace(linalg=linalg))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _load() -> types.ModuleType:
    """Import neural-tangents and adapt it, or say why it cannot be done."""
    before = set(sys.modules)
    try:
        # Its own import-time warnings (old escapes, old names) are nothing a user can act on.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _lend(_lent_names()), _without_tensorflow():
                nt = importlib.import_module("neural_tangents")
            _adapt(nt)
        return nt
    except Exception as error:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "neural_tangents":
                del sys.modules[name]
        missing = " ".join(str(error).split()) or type(error).__name__
        raise ImportError(
            f"neural-tangents {_version('neural-tangents')} cannot be used with jax "
            f"{_version('jax')}, jaxlib {_version('jaxlib')}, Python "
            f"{platform.python_version()}: {missing} ({_TESTED})"
        ) from error


neural_tangents = _load()

NtkImplementation = neural_tangents.NtkImplementation
batch = neural_tangents.batch
empirical_kernel_fn = neural_tangents.empirical_kernel_fn
empirical_nngp_fn = neural_tangents.empirical_nngp_fn
empirical_ntk_fn = neural_tangents.empirical_ntk_fn
linearize = neural_tangents.linearize
monte_carlo_kernel_fn = neural_tangents.monte_carlo_kernel_fn
predict = neural_tangents.predict
stax = neural_tangents.stax
taylor_expand = neural_tangents.taylor_expand
