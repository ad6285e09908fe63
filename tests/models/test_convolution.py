"""Convolutions by products against XLA's, with all derivatives, and in the kernel engine."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt.kernels.engine import program
from ntk_awt.models.convolution import convolve, patches
from tests.quick import quick

SLOW = ("test_values_and_derivatives case1",)

RNG = np.random.default_rng(0)
CASES = [((5, 6), (3, 3), "SAME"), ((5, 6), (2, 4), "SAME"), ((6, 5), (3, 2), "VALID")]


def reference(x: Any, kernel: Any, padding: str) -> Any:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arrays(size: tuple[int, int], window: tuple[int, int]) -> list[Any]:
    """Images and a kernel, and a direction of each."""
    shapes = [(2, *size, 3), (*window, 3, 4)] * 2
    return [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in shapes]


def derivatives(f: Any, x: Any, w: Any, dx: Any, dw: Any) -> list[Any]:
    """All that the package takes of a convolution: both modes, mixed, second order, batched."""

    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(jnp.sin(f(x, w)))

    gradient = jax.grad(loss, (0, 1))
    each = jax.vmap(lambda x, w: gradient(x[None], w), (0, None))
    return [
        f(x, w),
        jax.vmap(f, (None, 0))(x, jnp.stack([w, dw])),
        jax.jvp(f, (x, w), (dx, dw)),
        jax.jvp(lambda x: f(x, w), (x,), (dx,)),
        jax.jvp(lambda w: f(x, w), (w,), (dw,)),
        gradient(x, w),
        jax.grad(loss)(x, w),
        each(x, w),
        jax.jvp(gradient, (x, w), (dx, dw)),
        jax.grad(lambda x, w: jnp.vdot(gradient(x, w)[1], dw), (0, 1))(x, w),
    ]


def check(f: Any, case: tuple[Any, Any, str]) -> None:
    size, window, padding = case
    with jax.enable_x64(True):
        values = [a.astype(jnp.float64) for a in arrays(size, window)]
        found = quick(partial(derivatives, partial(f, padding=padding)))(*values)
        wanted = quick(partial(derivatives, partial(reference, padding=padding)))(*values)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: Any):
    check(lambda x, w, padding: convolve(x, w, padding), case)


def test_wrong_derivatives_are_rejected():
    @partial(jax.custom_jvp, nondiff_argnums=(2,))
    def wrong(x: Any, w: Any, padding: str) -> Any:
        return reference(x, w, padding)

    @wrong.defjvp
    def _(padding: str, primals: Any, tangents: Any) -> Any:
        (x, w), (dx, _) = primals, tangents
        return reference(x, w, padding), reference(dx, w, padding)

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(lambda x, w, padding: wrong(x, w, padding), CASES[0])


@pytest.mark.parametrize("case", CASES)
def test_patches_are_the_windows(case: Any):
    size, window, padding = case
    x = np.asarray(arrays(size, window)[0])
    found = np.asarray(patches(jnp.asarray(x), window, padding))
    low = [(w - 1) // 2 if padding == "SAME" else 0 for w in window]
    for row, column in np.ndindex(*found.shape[1:3]):
        wanted = np.zeros((len(x), *window, 3))
        for i, j in np.ndindex(*window):
            at = row + i - low[0], column + j - low[1]
            if 0 <= at[0] < size[0] and 0 <= at[1] < size[1]:
                wanted[:, i, j] = x[:, *at]
        np.testing.assert_array_equal(found[:, row, column], wanted.reshape(len(x), -1))


def test_gradients_have_no_convolution_on_a_cpu():
    x, w, _, _ = arrays((5, 6), (3, 3))
    loss = jax.grad(lambda x: convolve(x, w, "SAME").sum())
    on_cpu = jax.default_backend() == "cpu"
    assert ("conv_general_dilated" not in str(jax.make_jaxpr(loss)(x))) == on_cpu


def test_the_kernel_engine_sees_a_convolution():
    def apply(params: Any, x: Any) -> Any:
        return convolve(x, params["kernel"], "VALID").reshape(len(x), -1)

    x, w, _, _ = arrays((3, 3), (3, 3))
    (site,) = program.trace(apply, {"kernel": w}, x).sites
    assert program.trace(apply, {"kernel": w}, x).others == ()
    assert site.operand == 1


def test_elsewhere_the_rule_is_that_of_the_convolution(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    check(lambda x, w, padding: convolve(x, w, padding), ((5, 5), (3, 3), "SAME"))
