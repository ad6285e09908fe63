"""The gap between two networks: trajectories, the identity, and the bounds, against oracles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from ntk_awt import masks
from ntk_awt.attacks import PGD
from ntk_awt.errors import InputError
from ntk_awt.masks import Ticket
from ntk_awt.theory.dynamics import preservation
from ntk_awt.theory.dynamics.preservation import (
    SMOOTHNESS,
    Frozen,
    Trajectory,
    attacked_path,
    gronwall_bound,
    identity_defect,
    pointwise_bound,
    posterior_bound,
    prior_bound,
    prior_gap,
    trajectory,
)
from ntk_awt.threats import L2, Linf

D, C, N, M, T = 5, 3, 4, 6, 3
STEP = 0.3


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def apply(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w["a"]) @ w["b"] + w["bias"]


def features(w: Any, x: Any) -> Any:
    """Linear in the parameters, not in x."""
    return jnp.concatenate([x, x**2], axis=1) @ w["a"]


def ticket(seed: int, shapes: dict[str, tuple[int, ...]], density: float = 0.5) -> Ticket:
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    mask = {
        name: rng.uniform(size=w.shape) < (density if w.ndim > 1 else 1)
        for name, w in params.items()
    }
    gain = {name: np.float64(1.4 if w.ndim > 1 else 1) for name, w in params.items()}
    return Ticket(params, mask, gain)


MLP = {"a": (D, 7), "b": (7, C), "bias": (C,)}
LINEAR = {"a": (2 * D, C)}


def images(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(n, D))


X, Z = images(0, N), images(1, M)
Y = np.array([0, 2, 1, 1])


def network(apply: Any, params: Any, start: Ticket, x: Any) -> Any:
    """f(x; γ⊙m⊙θ) written out."""
    return apply({k: start.gain[k] * start.mask[k] * w for k, w in params.items()}, x)


def loss_of(apply: Any, params: Any, start: Ticket, x: Any, loss: str) -> Any:
    f = network(apply, params, start, x)
    if loss == "squared":
        return jnp.mean(jnp.sum((f - jnp.eye(C)[Y]) ** 2, 1)) / 2
    return jnp.mean(jax.nn.logsumexp(f, 1) - f[jnp.arange(len(Y)), Y])


def descended(
    apply: Any, start: Ticket, points: np.ndarray, loss: str, step: float = STEP
) -> Ticket:
    """The path of gradient descent on points [T, n, d], step by step."""
    params, path = start.params, [start.params]
    gradient = jax.jit(jax.grad(lambda p, x: loss_of(apply, p, start, x, loss)))
    for x in points:
        params = jax.tree.map(lambda w, g: w - step * g, params, gradient(params, x))
        path.append(params)
    return start._replace(params=jax.tree.map(lambda *leaves: jnp.stack(leaves), *path))


def at(path: Ticket, k: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[k], path.params)


def follow(
    apply: Any, start: Ticket, points: np.ndarray, loss: str, z: Any = Z, step: float = STEP
) -> Trajectory:
    path = descended(apply, start, points, loss, step)
    return trajectory(apply, path, jnp.asarray(points), Y, jnp.asarray(z), loss=loss)


POINTS = np.stack([np.clip(X + 0.05 * k, 0, 1) for k in range(T)])


@pytest.fixture(scope="module")
def pair() -> tuple[Trajectory, Trajectory]:
    with jax.enable_x64(True):
        dense = follow(apply, ticket(0, MLP, 1.0), POINTS, "cross-entropy")
        sparse = follow(apply, ticket(1, MLP), POINTS + 0.01, "cross-entropy")
    return dense, sparse


# ---------------------------------------------------------------- trajectories


@pytest.mark.parametrize("loss", SMOOTHNESS)
def test_trajectory_by_single_gradients(loss: str):
    start = ticket(1, MLP)
    path = descended(apply, start, POINTS, loss)
    found = trajectory(apply, path, jnp.asarray(POINTS), Y, jnp.asarray(Z), loss=loss)
    jacobians = jax.jit(jax.jacrev(lambda w, x: network(apply, w, start, x)))
    shapes = [(T + 1, M, C), (T, N, C), (T, M, N, C, C), (T, M, C)]
    assert [a.shape for a in found[2:]] == shapes
    for k in range(T):
        params = at(path, k)

        def jacobian(x: Any, params: Any = params) -> np.ndarray:
            rows = jacobians(params, x)
            return np.concatenate([np.reshape(r, (len(x), C, -1)) for r in rows.values()], 2)

        rows, columns = jacobian(Z), jacobian(POINTS[k])
        kernel = np.einsum("iap,jbp->ijab", rows, columns)
        np.testing.assert_allclose(found.kernels[k], kernel, rtol=1e-11, atol=1e-12)
        outputs = network(apply, params, start, Z)
        np.testing.assert_allclose(found.outputs[k], outputs, rtol=1e-12)
        f = np.asarray(network(apply, params, start, POINTS[k]))
        p = np.exp(f) / np.exp(f).sum(1, keepdims=True) if loss == "cross-entropy" else f
        np.testing.assert_allclose(found.gradients[k], p - np.eye(C)[Y], rtol=1e-11, atol=1e-13)
        names = list(params)
        move = np.concatenate([np.ravel(at(path, k + 1)[n] - params[n]) for n in names])
        after = network(apply, at(path, k + 1), start, Z)
        rest = after - outputs - rows @ move
        np.testing.assert_allclose(found.remainders[k], rest, atol=1e-14)
    np.testing.assert_allclose(found.outputs[T], network(apply, at(path, T), start, Z), rtol=1e-12)


@pytest.mark.parametrize("loss", SMOOTHNESS)
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)])
def test_attacked_path(loss: str, threat: Any):
    """One step of a linear network: x ± ε sign of the loss's own gradient, or ε along it."""
    start = ticket(2, {"a": (D, C)}, 1.0)
    plain = lambda w, x: x @ w["a"]  # noqa: E731
    x = 0.4 + 0.2 * X
    path = descended(plain, start, np.stack([x] * 2), loss)
    attack = PGD(steps=1, step_ratio=1.0, random_start=False)
    found = attacked_path(plain, path, x, Y, threat=threat, attack=attack, loss=loss)
    assert found.shape == (2, N, D)
    for k in range(2):
        w = np.asarray(1.4 * at(path, k)["a"])
        f = x @ w
        p = np.exp(f) / np.exp(f).sum(1, keepdims=True) if loss == "cross-entropy" else f
        direction = (p - np.eye(C)[Y]) @ w.T
        scale = {Linf: np.sign, L2: lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)}
        wanted = x + float(threat.epsilon) * scale[type(threat)](direction)
        np.testing.assert_allclose(found[k], wanted, atol=2e-6)  # radii are rounded inwards


# ---------------------------------------------------------------- P1, P2


def test_identity(pair: tuple[Trajectory, Trajectory]):
    dense, sparse = pair
    changes = np.diff(np.asarray(dense.outputs - sparse.outputs), axis=0)
    np.testing.assert_allclose(identity_defect(dense, sparse, STEP), 0 * changes, atol=1e-13)
    for k in range(T):  # what is left over without the kernels' part, by a slow loop
        moved = sum(
            -STEP / N * sign * path.kernels[k, i, j] @ path.gradients[k, j]
            for sign, path in ((1, dense), (-1, sparse))
            for i in [0]
            for j in range(N)
        )
        rest = dense.remainders[k, 0] - sparse.remainders[k, 0]
        np.testing.assert_allclose(changes[k, 0], moved + rest, atol=1e-13)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t._replace(kernels=1.01 * t.kernels),
        lambda t: t._replace(kernels=t.kernels[..., ::-1]),
        lambda t: t._replace(gradients=t.gradients[:, ::-1]),
        lambda t: t._replace(remainders=-t.remainders),
    ],
)
def test_identity_of_wrong_parts(pair: tuple[Trajectory, Trajectory], wrong: Any):
    assert np.abs(identity_defect(pair[0], wrong(pair[1]), STEP)).max() > 1e-6


def test_posterior_bound(pair: tuple[Trajectory, Trajectory]):
    dense, sparse = pair
    found = posterior_bound(dense, sparse, STEP)
    total = np.linalg.norm(dense.outputs[0] - sparse.outputs[0])
    wanted = [total]
    for k in range(T):
        driven, response = np.zeros((M, C)), np.zeros((M, C))
        for i in range(M):
            for j in range(N):
                g, h = dense.gradients[k, j], sparse.gradients[k, j]
                driven[i] += (dense.kernels[k, i, j] - sparse.kernels[k, i, j]) @ g
                response[i] += sparse.kernels[k, i, j] @ (g - h)
        total += STEP / N * (np.linalg.norm(driven) + np.linalg.norm(response))
        total += np.linalg.norm(dense.remainders[k] - sparse.remainders[k])
        wanted.append(total)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    gaps = np.linalg.norm(dense.outputs - sparse.outputs, axis=(1, 2))
    assert np.all(gaps <= found * (1 + 1e-12))


def test_float32_in_float32_out(pair: tuple[Trajectory, Trajectory]):
    narrow: Any = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), pair)
    dense, sparse = narrow
    for function in (posterior_bound, identity_defect):
        assert function(dense, sparse, STEP).dtype == np.float32
    one = Frozen(np.eye(2, dtype=np.float32), np.ones((2, 1), np.float32))
    for function in (prior_bound, prior_gap):
        assert function(one, one, 0 * one.outputs, [1.0]).dtype == np.float32


# ---------------------------------------------------------------- P3 (a)


def psd(rng: np.random.Generator, n: int, c: int | None) -> np.ndarray:
    size = n * (c or 1)
    a = rng.normal(size=(size, size))
    if c is None:
        return a @ a.T
    return (a @ a.T).reshape(n, c, n, c).transpose(0, 2, 1, 3)


def frozen_pair(seed: int, form: str) -> tuple[Frozen, Frozen, np.ndarray]:
    rng = np.random.default_rng(seed)
    kernels = [psd(rng, N, C if form == "full" else None) for _ in range(2)]
    f, h, y = rng.normal(size=(3, N, C))
    return Frozen(kernels[0], f), Frozen(kernels[1], h), y


def applied(kernel: Any, f: np.ndarray) -> np.ndarray:
    return np.einsum("ijab,jb->ia", kernel, f) if kernel.ndim == 4 else kernel @ f


@pytest.mark.parametrize("form", ["full", "one for all outputs"])
def test_prior_gap_by_an_integrator(form: str):
    dense, sparse, y = frozen_pair(0, form)
    times = [0.0, 0.05, 0.4, 3.0]

    def outputs(network: Frozen) -> np.ndarray:
        def slope(t: float, f: np.ndarray) -> np.ndarray:
            return -applied(network.kernel, f.reshape(N, C) - y).ravel() / N

        start = np.ravel(network.outputs)
        found = scipy.integrate.solve_ivp(
            slope, (0, 3.0), start, "LSODA", times, rtol=1e-10, atol=1e-12
        )
        return found.y.T.reshape(-1, N, C)

    wanted = outputs(dense) - outputs(sparse)
    found = prior_gap(dense, sparse, y, times)
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    gaps = np.linalg.norm(wanted, axis=(1, 2)) / np.sqrt(N)
    assert np.all(gaps <= prior_bound(dense, sparse, y, times) + 1e-8)


def test_prior_gap_of_close_kernels_keeps_its_digits():
    """Equal eigenvalues, and kernels so close that a difference of predictions has lost them."""
    rng = np.random.default_rng(3)
    q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    values, r = np.array([1.0, 1.0, 2.0, 5.0]), rng.normal(size=(N, 1))
    for delta in (0.0, 1e-13):
        dense, sparse = (Frozen((q * v) @ q.T, r) for v in (values, values * (1 - delta)))
        found = np.asarray(prior_gap(dense, sparse, 0 * r, [2.0]))[0]
        # d/dδ of e^{−tλ(1−δ)/N}; the difference of the rounded kernels has two digits less.
        slope = (q * (2.0 * values / N * np.exp(-2.0 * values / N))) @ q.T @ r
        np.testing.assert_allclose(found, -delta * slope, rtol=0.02, atol=1e-18)


@pytest.mark.parametrize("form", ["full", "one for all outputs"])
def test_prior_bound_by_its_formula(form: str):
    dense, sparse, y = frozen_pair(1, form)
    matrices = [
        k.transpose(0, 2, 1, 3).reshape(N * C, -1) if k.ndim == 4 else k
        for k in (dense.kernel, sparse.kernel)
    ]
    smallest, largest = np.linalg.eigvalsh(matrices[0])[[0, -1]]
    alpha = np.linalg.norm(matrices[0] - matrices[1]) / N
    beta = np.linalg.norm(dense.outputs - sparse.outputs) / 2
    residual = np.linalg.norm(dense.outputs - y) / 2
    times = np.array([0.0, 0.3, 1e9])
    wanted = beta + np.minimum(times, N / smallest) * alpha * residual
    np.testing.assert_allclose(prior_bound(dense, sparse, y, times), wanted, rtol=1e-9)
    step = N / max(largest, np.linalg.eigvalsh(matrices[1])[-1])
    wanted = beta + np.minimum(step * np.array([0, 2]), N / smallest) * alpha * residual
    np.testing.assert_allclose(prior_bound(dense, sparse, y, [0, 2], step=step), wanted, rtol=1e-9)
    singular = dense._replace(kernel=np.zeros_like(dense.kernel))
    assert np.isfinite(prior_bound(singular, sparse, y, times, step=None)).all()
    assert np.isfinite(prior_bound(singular, singular, y, [1, 2], step=1.0)).all()


ONE = np.ones((1, 1))


def scalar(theta: float) -> Frozen:
    return Frozen(theta * ONE, 0 * ONE)


@pytest.mark.parametrize(
    ("dense", "sparse", "edge"), [(1.0, 0.5, 1.0), (0.5, 2.0, 1.0), (1.0, 1.0, 1.0)]
)
def test_prior_bound_at_the_largest_step(dense: float, sparse: float, edge: float):
    """N = 1: η ≤ 1/Θ^d and η ≤ 2/Θ^s; at the edge it holds, a little above it is refused."""
    counts = np.arange(30)
    gap = np.abs((1 - edge * dense) ** counts - (1 - edge * sparse) ** counts)
    bound = prior_bound(scalar(dense), scalar(sparse), ONE, counts, step=edge)
    assert np.all(gap <= bound + 1e-12)
    with pytest.raises(InputError, match="step: expected at most 2N/"):
        prior_bound(scalar(dense), scalar(sparse), ONE, counts, step=edge * 1.001)


def test_the_condition_on_the_step_cannot_be_left_out():
    """Between 2N/(λ_min + λ_max) and 2N/λ_max both descents converge, and the bound fails."""
    counts, step, delta = np.arange(1, 30), 1.9, 0.01
    gap = np.abs((1 - step) ** counts - (1 - step * (1 - delta)) ** counts)
    assert (gap / (delta * np.minimum(step * counts, 1))).max() > 6


# ---------------------------------------------------------------- P3 (b), (c)


@pytest.mark.parametrize("loss", SMOOTHNESS)
@pytest.mark.parametrize("step", [0.3, 5.0])
def test_bounds_of_linear_networks(loss: str, step: float):
    """Networks that are linear in θ have no remainder, and any step is allowed."""
    smooth, points = SMOOTHNESS[loss], np.stack([X] * T)
    dense, sparse = (
        follow(features, ticket(s, LINEAR, d), points, loss, X, step)
        for s, d in ((0, 1.0), (1, 0.5))
    )
    gaps = np.linalg.norm(dense.outputs - sparse.outputs, axis=(1, 2))
    scale = float(np.abs(np.asarray(dense.outputs)).max())
    assert np.abs(dense.remainders).max() <= 1e-14 * max(scale, 1)
    found = gronwall_bound(dense, sparse, step, smooth)
    total = gaps[0]
    for k in range(T):
        matrices = [
            np.asarray(t.kernels[k]).transpose(0, 2, 1, 3).reshape(N * C, -1)
            for t in (dense, sparse)
        ]
        total *= 1 + step * smooth * np.linalg.norm(matrices[1], 2) / N
        total += step / N * np.linalg.norm((matrices[0] - matrices[1]) @ dense.gradients[k].ravel())
        np.testing.assert_allclose(found[k + 1], total, rtol=1e-9)
    assert np.all(gaps <= found * (1 + 1e-9))
    found = pointwise_bound(dense, sparse, step, smooth)
    largest = np.linalg.norm(dense.outputs - sparse.outputs, axis=2).max(1)
    assert np.all(largest <= found * (1 + 1e-9))


def test_pointwise_bound_by_a_loop():
    """Points that move, a network with a remainder, Z with more points than were visited."""
    z = np.concatenate([POINTS.reshape(-1, D), Z])
    dense, sparse = (
        follow(apply, ticket(s, MLP, d), POINTS, "squared", z) for s, d in ((0, 1.0), (1, 0.5))
    )
    found = pointwise_bound(dense, sparse, STEP, 1.0)
    gaps = np.linalg.norm(dense.outputs - sparse.outputs, axis=2).max(1)
    total = gaps[0]
    for k in range(T):
        added, kappa = [], []
        for i in range(len(z)):
            blocks = [np.asarray(t.kernels[k, i]) for t in (dense, sparse)]
            norms = [np.linalg.norm(b, 2) for b in blocks[0] - blocks[1]]
            rest = np.linalg.norm(dense.remainders[k, i] - sparse.remainders[k, i])
            lengths = np.linalg.norm(dense.gradients[k], axis=1)
            added.append(STEP / N * np.dot(norms, lengths) + rest)
            kappa.append(sum(np.linalg.norm(b, 2) for b in blocks[1]) / N)
        total = (1 + STEP * max(kappa)) * total + max(added)
        np.testing.assert_allclose(found[k + 1], total, rtol=1e-9)
    assert np.all(gaps <= found * (1 + 1e-9))


def test_smoothness():
    """No pair of logits is steeper than L, and L is nearly reached."""
    rng = np.random.default_rng(0)
    for loss, smooth in SMOOTHNESS.items():
        f = rng.normal(size=(2000, 2)) * 10.0 ** rng.uniform(-3, 1, (2000, 1))
        h = f + rng.normal(size=f.shape) * 10.0 ** rng.uniform(-4, 1, (2000, 1))
        y = jnp.eye(2)[rng.integers(0, 2, 2000)]
        gradients = [preservation.loss_gradient(loss, jnp.asarray(v), y) for v in (f, h)]
        steepness = np.linalg.norm(gradients[0] - gradients[1], axis=1)
        steepness /= np.linalg.norm(f - h, axis=1)
        assert 0.98 * smooth < steepness.max() <= smooth * (1 + 1e-9)


# ---------------------------------------------------------------- bad input


def test_bad_paths():
    path = descended(apply, ticket(1, MLP), POINTS, "squared")
    points, z = jnp.asarray(POINTS), jnp.asarray(Z)
    with pytest.raises(InputError, match=r"path: expected 3 values of each parameter.*got 4"):
        trajectory(apply, path, points[:2], Y, z)
    with pytest.raises(InputError, match=r"labels: expected shape \(4,\)"):
        trajectory(apply, path, points, Y[:2], z)
    with pytest.raises(InputError, match="loss: expected one of cross-entropy, squared"):
        trajectory(apply, path, points, Y, z, loss="hinge")
    options: Any = {"threat": Linf(0.1), "attack": PGD(steps=2, random_start=False)}
    with pytest.raises(InputError, match="loss: expected one of"):
        attacked_path(apply, path, X, Y, **options, loss="hinge")
    with pytest.raises(InputError, match="images: expected values in"):
        attacked_path(apply, path, X + 2, Y, **options)
    with pytest.raises(InputError, match="attack: expected one without random starts"):
        attacked_path(apply, path, X, Y, **options | {"attack": PGD()})


def test_bad_pairs(pair: tuple[Trajectory, Trajectory]):
    dense, sparse = pair
    for function in (identity_defect, posterior_bound):
        with pytest.raises(InputError, match="step: expected a number in"):
            function(dense, sparse, 0.0)
        with pytest.raises(InputError, match="the same points Z, got different"):
            function(dense, sparse._replace(z=sparse.z + 1), STEP)
        with pytest.raises(InputError, match="trajectories: expected outputs"):
            function(dense, sparse._replace(outputs=sparse.outputs[1:]), STEP)
    for function in (gronwall_bound, pointwise_bound):
        with pytest.raises(InputError, match="trained on the same points"):
            function(dense, sparse, STEP, 1.0)
        with pytest.raises(InputError, match="smoothness: expected a number in"):
            function(dense, dense, STEP, 0.0)
    with pytest.raises(InputError, match="expected Z as the training points of every step"):
        gronwall_bound(dense, dense, STEP, 1.0)
    with pytest.raises(InputError, match=rf"every training point in it, got {N * T} of {N * T}"):
        pointwise_bound(dense, dense, STEP, 1.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kernel": -np.eye(N)}, "dense kernel: expected a positive semidefinite kernel"),
        ({"kernel": np.eye(N) + np.eye(N, k=1)}, "dense kernel: expected a symmetric kernel"),
        ({"kernel": np.eye(N) * np.nan}, "dense kernel: expected finite values"),
        ({"kernel": np.eye(2)}, "dense kernel: expected shape"),
        ({"outputs": np.ones((N, 2))}, r"sparse outputs: expected shape \(4, 2\)"),
    ],
)
def test_bad_frozen_networks(change: Any, match: str):
    good = Frozen(np.eye(N), np.ones((N, 1)))
    for function in (prior_bound, prior_gap):
        with pytest.raises(InputError, match=match):
            function(good._replace(**change), good, np.ones((N, 1)), [1.0])
    with pytest.raises(InputError, match="dense kernel: expected shape"):
        prior_bound(
            good._replace(kernel=np.eye(2)), good._replace(kernel=np.eye(2)), np.ones((N, 1)), [1.0]
        )
    with pytest.raises(InputError, match="times"):
        prior_gap(good, good, np.ones((N, 1)), [-1.0])


def test_masks_are_those_of_the_package():
    start = ticket(1, MLP)
    mine = network(apply, start.params, start, X)
    theirs = masks.masked(apply, start.mask, start.gain)(start.params, jnp.asarray(X))
    np.testing.assert_allclose(mine, theirs, rtol=1e-12)
