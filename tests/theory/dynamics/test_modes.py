"""Dynamics and linear classifiers under JAX's strict modes: the values of the ordinary one."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt.attacks import PGD
from ntk_awt.masks import Ticket, ones, unit_gain
from ntk_awt.robustness.certified import intervals
from ntk_awt.theory import linear
from ntk_awt.theory.dynamics import flow, infinite, preservation
from ntk_awt.threats import L2, Linf
from tests.modes import mode  # noqa: F401

frozen: Any = flow.frozen
prior_gap: Any = preservation.prior_gap

KERNEL = np.array([[2.0, 1.0], [1.0, 2.0]], np.float32)
F, Y = np.zeros((2, 1), np.float32), np.array([[1.0], [-1.0]], np.float32)


def test_frozen_kernels(mode: str):  # noqa: F811
    """y is an eigenvector of the eigenvalue 1, so f_t = (1 − e^{−t/2})y."""
    share = 1 - np.exp(-1)
    for kernel in (KERNEL, KERNEL[..., None, None]):
        found = frozen(kernel, F, Y, [0.0, 2.0], kernel_zx=kernel[:1], f_z=F[:1])
        np.testing.assert_allclose(found.x, [0 * Y, share * Y], atol=1e-6)
        np.testing.assert_allclose(found.z, [0 * Y[:1], share * Y[:1]], atol=1e-6)
    steps = frozen(KERNEL, F, Y, [3], step=1.0).x
    np.testing.assert_allclose(steps[0], (1 - 0.5**3) * Y, atol=1e-6)
    mixed = frozen(KERNEL, F.astype(np.float16), Y.astype(int), [2.0]).x
    np.testing.assert_allclose(mixed[0], share * Y, atol=1e-6)
    np.testing.assert_allclose(flow.output_change(jnp.asarray(KERNEL), jnp.asarray(Y)), -Y / 2)
    gradient = flow.loss_gradient("cross-entropy", jnp.zeros((1, 2)), jnp.array([[1, 0]]))
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]])


def test_gaps_of_frozen_networks(mode: str):  # noqa: F811
    pair = preservation.Frozen(KERNEL, F), preservation.Frozen(KERNEL / 2, F)
    gap = (np.exp(-0.5) - np.exp(-1)) * Y
    np.testing.assert_allclose(prior_gap(*pair, Y, [2.0])[0], gap, atol=1e-6)
    assert np.linalg.norm(gap) / np.sqrt(2) <= preservation.prior_bound(*pair, Y, [2.0])[0]


def test_trajectories(mode: str):  # noqa: F811
    w = jnp.array([[[1.0, 0.0]], [[0.9, 0.1]]])
    paths = [Ticket(s * w, ones(w[0]), unit_gain(w[0])) for s in (1.0, 0.5)]
    x, y = jnp.ones((1, 1, 1)), np.array([1])

    def apply(w: Any, x: Any) -> Any:
        return x @ w

    dense, sparse = (preservation.trajectory(apply, path, x, y, 2 * x[0]) for path in paths)
    np.testing.assert_allclose(dense.outputs[1], [[1.8, 0.2]], rtol=1e-6)
    one, other = (t._replace(z=x[0]) for t in (dense, sparse))
    bounds = [
        preservation.posterior_bound(dense, sparse, 0.1),
        preservation.pointwise_bound(one, other, 0.1, 0.5),
        preservation.gronwall_bound(one, other, 0.1, 0.5),
    ]
    assert np.isfinite(bounds).all()
    assert np.isfinite(preservation.identity_defect(dense, sparse, 0.1)).all()


def _linear_kernel(x1: Any, x2: Any = None) -> Any:
    return SimpleNamespace(ntk=x1 @ (x1 if x2 is None else x2).T)


def test_infinitely_wide_training(mode: str):  # noqa: F811
    """f(x) = ⟨w, x⟩ on two orthogonal points, ε = 0: w = (1 − e^{−t/2})y."""
    x = jnp.eye(2)
    training = infinite.adversarial_training(
        _linear_kernel, x, jnp.asarray(Y), threat=Linf(0.0),
        attack=PGD(steps=1, random_start=False),
        key=jax.random.key(0), phases=1, phase_time=2.0,
    )  # fmt: skip
    found = infinite.predict(_linear_kernel, training, x)
    np.testing.assert_allclose(found[1], (1 - np.exp(-1)) * Y, atol=1e-6)


def test_interval_bounds(mode: str):  # noqa: F811
    """|x − y| of two pixels, and a softmax, whose bounds hold whatever is traced."""
    x, w = np.array([[0.25, 0.75]], np.float32), np.array([[1.0], [-1.0]], np.float32)

    def apply(w: Any, x: Any) -> Any:
        h = jax.nn.leaky_relu(x @ w) + jax.nn.softplus(x @ w)
        return jnp.concatenate([jnp.abs(x @ w), jax.nn.softmax(x, axis=1), h / (1 + h**2)], axis=1)

    for threat in (Linf(0.125), L2(0.125)):
        lower, upper = intervals.output_bounds(apply, w, x, threat)
        values = np.asarray(apply(jnp.asarray(w), jnp.asarray(x)))
        assert (lower <= values).all()
        assert (values <= upper).all()
        reach = 0.25 if isinstance(threat, Linf) else 0.125 * np.sqrt(2)
        np.testing.assert_allclose(
            [lower[0, 0], upper[0, 0]], [0.5 - reach, 0.5 + reach], rtol=1e-4
        )
        gap = intervals.sup_gap(apply, w, 2 * w, x, threat)
        assert np.isfinite(gap).all()
    loss = intervals.loss_bounds(apply, w, x, np.array([1]), Linf(0.125))
    assert float(loss.lower[0]) < float(loss.upper[0])


def test_linear_classifiers(mode: str):  # noqa: F811
    model, classes = linear.LinearClassifier([1.0, 0.0]), linear.symmetric([1.0, 0.0])
    threat = L2(0.5, (-np.inf, np.inf))
    np.testing.assert_allclose(linear.rates(model, classes, threat).robust, 0.308538, atol=1e-6)
    basis = linear.discriminant_basis(np.eye(4)[:, :2], [0, 1, 1, 0])
    assert basis.shape == (2, 1)
