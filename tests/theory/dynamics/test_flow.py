"""Flow of outputs and frozen kernels: against loops, SciPy, and the limits of the times."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ntk_awt.errors import InputError
from ntk_awt.theory.dynamics import flow

# Any: NumPy's arrays are taken as well.
frozen: Any = flow.frozen
loss_gradient: Any = flow.loss_gradient
output_change: Any = flow.output_change


def kernel(seed, n, c, rank=None):
    """A random kernel [n, n, c, c] of that rank, and its matrix [n·c, n·c]."""
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((n, c, rank or 2 * n * c)) / np.sqrt(n)
    return np.einsum("iap,jbp->ijab", j, j), j.reshape(n * c, -1)


@pytest.mark.parametrize("loss", flow.LOSS_GRADIENTS)
def test_loss_gradients_are_derivatives(loss):
    rng = np.random.default_rng(0)
    f, y = rng.standard_normal((5, 4)), np.eye(4)[rng.integers(0, 4, 5)]
    with jax.enable_x64(True):

        def total(f):
            if loss == "squared":
                return jnp.sum((f - y) ** 2) / 2
            return -jnp.sum(y * (f - jax.nn.logsumexp(f, axis=1, keepdims=True)))

        found = loss_gradient(loss, jnp.asarray(f), jnp.asarray(y))
        np.testing.assert_allclose(found, jax.grad(total)(jnp.asarray(f)), atol=1e-14)


@pytest.mark.parametrize("scalar", [False, True])
def test_output_change_is_a_loop(scalar):
    rng = np.random.default_rng(1)
    g = rng.standard_normal((4, 3)).astype(np.float32)
    theta = rng.standard_normal((5, 4) if scalar else (5, 4, 3, 3)).astype(np.float32)
    expected = np.zeros((5, 3))
    for i in range(5):
        for j in range(4):
            block = theta[i, j] * np.eye(3) if scalar else theta[i, j]
            expected[i] -= block @ g[j] / 4
    found = output_change(jnp.asarray(theta), jnp.asarray(g))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, expected * 4, rtol=1e-3)


@pytest.mark.parametrize("rank", [None, 3])
def test_flow_is_the_matrix_exponential_of_the_parameters(rank):
    """exp of the linear system of the parameters, which knows no kernel; regular and singular."""
    n, c, times = 4, 2, np.array([0.0, 0.3, 2.0, 40.0])
    rng = np.random.default_rng(2)
    theta, j = kernel(3, n, c, rank)
    other = rng.standard_normal((3 * c, j.shape[1]))
    theta_zx = (other @ j.T).reshape(3, c, n, c).transpose(0, 2, 1, 3)
    f_x, y, f_z = rng.standard_normal((n, c)), rng.standard_normal((n, c)), np.ones((3, c))
    p = j.shape[1]
    # d(w, 1)/dt of the weights' change w, as one linear system.
    system = np.zeros((p + 1, p + 1))
    system[:p, :p] = -j.T @ j / n
    system[:p, p] = -j.T @ (f_x - y).ravel() / n
    start = np.eye(p + 1)[p]
    w = np.stack([(scipy.linalg.expm(t * system) @ start)[:p] for t in times])
    with jax.enable_x64(True):
        found = frozen(theta, f_x, y, times, kernel_zx=theta_zx, f_z=f_z)
    assert found.z is not None
    np.testing.assert_allclose(found.x, f_x + (w @ j.T).reshape(-1, n, c), atol=1e-9)
    np.testing.assert_allclose(found.z, f_z + (w @ other.T).reshape(-1, 3, c), atol=1e-9)
    assert found.x.dtype == jnp.float64


def test_gradient_steps_are_a_loop():
    n, c, eta = 3, 2, 0.4
    theta, j = kernel(4, n, c)
    rng = np.random.default_rng(5)
    f, y = rng.standard_normal((2, n * c))
    counts, outputs, now = [0, 1, 7], [], f.copy()
    for k in range(8):
        if k in counts:
            outputs.append(now.copy())
        now = now - eta / n * (j @ j.T) @ (now - y)
    with jax.enable_x64(True):
        found = frozen(theta, f.reshape(n, c), y.reshape(n, c), counts, step=eta)
    np.testing.assert_allclose(found.x, np.reshape(outputs, (3, n, c)), atol=1e-12)
    assert found.z is None


def test_limits_in_time():
    theta, _ = kernel(6, 3, 1)
    f, y = np.ones((3, 1)), np.zeros((3, 1))
    with jax.enable_x64(True):
        found = frozen(theta, f, y, [0.0, 1e9], kernel_zx=theta[:1], f_z=f[:1])
    assert found.z is not None
    np.testing.assert_allclose(found.x[0], f, rtol=1e-13)
    np.testing.assert_allclose(found.x[1], y, atol=1e-9)  # every point is fitted
    np.testing.assert_allclose(found.z[1], y[:1], atol=1e-9)


def test_small_steps_tend_to_the_flow():
    theta, _ = kernel(7, 3, 2)
    f, y = np.ones((3, 2)), np.zeros((3, 2))
    with jax.enable_x64(True):
        exact = frozen(theta, f, y, [1.0]).x
        errors = [
            float(jnp.abs(frozen(theta, f, y, [k], step=1 / k).x - exact).max())
            for k in (100, 200, 400)
        ]
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, 2, rtol=0.02)  # first order


def test_float32_stays_float32():
    theta, _ = kernel(8, 3, 2)
    f = np.ones((3, 2), np.float32)
    found = frozen(theta.astype(np.float32), f, 0 * f, [0.5])
    assert found.x.dtype == jnp.float32


THETA, F = np.eye(2, dtype=np.float32), np.ones((2, 1), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_gradient("hinge", F, F), "loss: expected one of"),
        (lambda: loss_gradient("squared", F, F[:1]), "targets: expected shape"),
        (lambda: output_change(THETA[:, :1], F), "kernel: expected shape"),
        (lambda: output_change(THETA, F[:, 0]), "gradients: expected axes"),
        (lambda: frozen(THETA, F, F[:1], [1.0]), "y: expected shape"),
        (lambda: frozen(THETA, F, F, [-1.0]), "times: expected numbers ≥ 0, got -1"),
        (lambda: frozen(THETA, F, F, [np.nan]), "times: expected numbers"),
        (lambda: frozen(THETA, F, F, [0.5], step=1.0), "numbers of steps: whole"),
        (lambda: frozen(THETA, F, F, [1], step=5.0), "step: expected at most 2N/λ_max = 4"),
        (lambda: frozen(-THETA, F, F, [1.0]), "positive semidefinite"),
        (lambda: frozen(np.triu(np.ones((2, 2))), F, F, [1.0]), "a symmetric kernel"),
        (lambda: frozen(THETA, F, F, [1.0], kernel_zx=THETA), "kernel_zx and f_z"),
        (lambda: frozen(np.nan * THETA, F, F, [1.0]), "finite values"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
