"""The gap between a dense and a sparse network along their trainings, and bounds on it.

D_k = f^d_k − f^s_k at points Z; superscripts d dense, s sparse. `trajectory` gathers what decides
the gap from the parameters that a training loop went through; `identity_defect` says how exactly
kernels, gradients and remainders account for it (P1). `posterior_bound` bounds it by what was
measured on the way (P2); `prior_bound`, `prior_gap`, `gronwall_bound` and `pointwise_bound` by what
is known of the kernels and the dense network alone (P3). Gradient descent is that of the risk
(1/N) Σ_j ℓ(f(x̃_j), y_j) with a constant step η. Every function computes and answers in the dtype of
its inputs, in float32 if that is narrower.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk_awt.attacks import CRITERIA, Attack, NetworkLoss, check_examples, example_keys
from ntk_awt.errors import InputError, check_finite, check_labels, check_number, choose
from ntk_awt.kernels import empirical, flatten, target_distance
from ntk_awt.masks import Ticket, effective, masked
from ntk_awt.network import Network
from ntk_awt.theory.dynamics.flow import (
    Spectrum,
    check_spectrum,
    check_times,
    decompose,
    floats,
    loss_gradient,
    output_change,
    unit_roundoff,
)
from ntk_awt.threats import Threat
from ntk_awt.types import ApplyFn, Images, Key, Labels, Params

SMOOTHNESS = {"cross-entropy": 0.5, "squared": 1.0}
"""L of each criterion: ‖∇ℓ(f, y) − ∇ℓ(f', y)‖ ≤ L‖f − f'‖ in the logits.

The Hessian of cross-entropy, diag(p) − ppᵀ, has no eigenvalue above ½.
"""


class Trajectory(NamedTuple):
    """One network along T steps of gradient descent.

    Attributes:
        z: points Z at which the outputs are followed, [m, *shape].
        x: points X̃_k that each step is taken on, [T, n, *shape].
        outputs: f_k(Z) before each step and after the last, [T + 1, m, c].
        gradients: g_k = ∇_f ℓ at X̃_k, [T, n, c].
        kernels: K_k = Θ_k(Z, X̃_k), [T, m, n, c, c].
        remainders: ρ_k = f_{k+1}(Z) − f_k(Z) − J_k(Z)(θ_{k+1} − θ_k), [T, m, c].
    """

    z: Images
    x: Float[Array, "t n *shape"]
    outputs: Float[Array, "t1 m c"]
    gradients: Float[Array, "t n c"]
    kernels: Float[Array, "t m n c c"]
    remainders: Float[Array, "t m c"]


# ---------------------------------------------------------------- from a training's parameters


@partial(jax.jit, static_argnames=("apply", "attack", "name"))
def _attacked(
    path: Ticket,
    x: Images,
    y: Labels,
    keys: Key,
    threat: Threat,
    apply: ApplyFn,
    attack: Attack,
    name: str,
) -> jax.Array:
    def attacked(params: Params) -> Images:
        weights = effective(params, path.mask, path.gain)
        return attack.run(NetworkLoss(Network(apply, weights), y, CRITERIA[name]), x, threat, keys)[
            0
        ]

    return jax.lax.map(attacked, jax.tree.map(lambda leaf: leaf[:-1], path.params))


def attacked_path(
    apply: ApplyFn,
    path: Ticket,
    x: Images | np.ndarray,
    y: Labels | np.ndarray,
    *,
    threat: Threat,
    attack: Attack,
    loss: str = "cross-entropy",
) -> Float[Array, "t n *shape"]:
    """The adversarial points X̃_k of every step, from the parameters before it.

    Args:
        apply: the dense network's function.
        path: as for `trajectory`.
        x: clean images [n, *shape], all in each step's batch.
        y: labels [n].
        threat, attack: as in the training; without random starts, so that they give the same
            points again.
        loss: criterion that the attack maximises, in `attacks.CRITERIA`.

    Returns:
        [T, n, *shape].

    Raises:
        InputError: a random attack, an unknown loss, bad images or labels.
    """
    choose("loss", loss, CRITERIA)
    if getattr(attack, "random_start", False):
        raise InputError(
            "attack",
            expected="one without random starts",
            got=f"{attack}",
            fix="set random_start=False in the training as well",
        )
    first = jax.tree.map(lambda leaf: leaf[0], path.params)
    images, labels = check_examples(Network(apply, first), x, y, threat)
    keys = example_keys(jax.random.key(0), jnp.arange(len(images)))
    return _attacked(
        path, jnp.asarray(images), jnp.asarray(labels), keys, threat, apply, attack, loss
    )


@partial(jax.jit, static_argnames=("apply", "loss"))
def _trajectory(
    path: Ticket, x: jax.Array, y: Labels, z: Images, apply: ApplyFn, loss: str
) -> tuple[jax.Array, ...]:
    mask, gain = path.mask, path.gain
    network = masked(apply, mask, gain)

    def step(arguments: tuple[Params, Params, Images]) -> tuple[jax.Array, ...]:
        params, after, points = arguments
        move = jax.tree.map(jnp.subtract, after, params)
        outputs, slope = jax.jvp(lambda p: network(p, z), (params,), (move,))
        following = network(after, z)
        logits = network(params, points)
        targets = jax.nn.one_hot(y, logits.shape[1], dtype=logits.dtype)
        kernel = empirical(apply, params, z, points, mask=mask, gain=gain)
        gradients = loss_gradient(loss, logits, targets)
        outputs, following, slope, kernel = floats(
            outputs=outputs, following=following, slope=slope, kernel=kernel
        )
        return outputs, following, gradients, kernel, following - outputs - slope

    before, after = (
        jax.tree.map(lambda leaf, part=part: leaf[part], path.params)
        for part in (slice(None, -1), slice(1, None))
    )
    outputs, following, *rest = jax.lax.map(step, (before, after, x))
    return jnp.concatenate([outputs, following[-1:]]), *rest


def trajectory(
    apply: ApplyFn,
    path: Ticket,
    x: Images,
    y: Labels | np.ndarray,
    z: Images,
    *,
    loss: str = "cross-entropy",
) -> Trajectory:
    """Outputs, gradients, kernels and remainders along a training, all in one compiled loop.

    A training records its parameters itself: `training.fit(…, observe=lambda ticket:
    ticket.params)` with all images in one batch, the optimiser "sgd" and a constant schedule. The
    remainder is taken along the step that the loop really made, so it knows nothing of the kernel.

    Args:
        apply: the dense network's function, `(weights, x) -> logits`.
        path: the network, with T + 1 values of each parameter on a leading axis.
        x: X̃_k that step k is taken on, [T, n, *shape], e.g. from `attacked_path`; another
            network's for a shared attack.
        y: labels [n].
        z: Z [m, *shape].
        loss: criterion of the training, in `attacks.CRITERIA`.

    Returns:
        `Trajectory`; its kernels take T·m·n·c² numbers.

    Raises:
        InputError: an unknown loss, a number of steps that does not fit, labels that are no
            classes, points that are not finite.

    Source: theory P1.

    Example:
        >>> import jax.numpy as jnp
        >>> from ntk_awt import masks
        >>> w = jnp.array([[[1.0, 0.0]], [[0.9, 0.1]]])           # two values of a weight [1, 2]
        >>> path = Ticket(w, masks.ones(w[0]), masks.unit_gain(w[0]))
        >>> x, y = jnp.ones((1, 1, 1)), jnp.array([1])
        >>> found = trajectory(lambda w, x: x @ w, path, x, y, 2 * x[0], loss="squared")
        >>> print(found.outputs[1], found.gradients[0], found.kernels[0, 0, 0, 0])
        [[1.8 0.2]] [[ 1. -1.]] [2. 0.]
    """
    choose("loss", loss, CRITERIA)
    steps = len(jax.tree.leaves(path.params)[0]) - 1
    if steps < 1 or len(x) != steps:
        raise InputError(
            "path",
            expected=f"{len(x) + 1} values of each parameter, for points of {len(x)} steps",
            got=f"{steps + 1}",
        )
    check_finite("trajectory", {"x": x, "z": z})
    logits = jax.eval_shape(apply, jax.tree.map(lambda leaf: leaf[0], path.params), x[0])
    check_labels("labels", y, x.shape[1], logits.shape[1])
    found = _trajectory(path, jnp.asarray(x), jnp.asarray(y), z, apply, loss)
    return Trajectory(z, x, *found)


# ---------------------------------------------------------------- P1, P2


def _pair(dense: Trajectory, sparse: Trajectory, step: float) -> tuple[Trajectory, Trajectory]:
    """Both in one dtype; raise unless followed at the same points through as many steps."""
    check_number("step", step, low=0, low_open=True)
    if (
        dense.outputs.shape != sparse.outputs.shape
        or dense.gradients.shape[1:] != (sparse.gradients.shape[1:])
    ):
        shapes = [
            f"outputs {t.outputs.shape}, gradients {t.gradients.shape}" for t in (dense, sparse)
        ]
        raise InputError("trajectories", expected=shapes[0], got=shapes[1])
    if not np.array_equal(dense.z, sparse.z):
        raise InputError("trajectories", expected="the same points Z", got="different ones")
    followed = [f"{name} {part}" for name in ("dense", "sparse") for part in Trajectory._fields]
    arrays = floats(**dict(zip(followed, (*dense, *sparse), strict=True)))
    check_finite("trajectories", dict(zip(followed, arrays, strict=True)))
    return Trajectory(*arrays[: len(dense)]), Trajectory(*arrays[len(dense) :])


_changes = jax.vmap(output_change)  # −K_k g_k/N of each step


class _Terms(NamedTuple):
    """What the bounds are made of: ‖D_0‖, and norms over Z and outputs of each step, [T]."""

    start: jax.Array
    driven: jax.Array  # (K^d − K^s) g^d/N
    response: jax.Array  # K^s(g^d − g^s)/N
    rest: jax.Array  # ρ^d − ρ^s


@jax.jit
def _terms(dense: Trajectory, sparse: Trajectory) -> _Terms:
    driven = _changes(dense.kernels - sparse.kernels, dense.gradients)
    response = _changes(sparse.kernels, dense.gradients - sparse.gradients)
    rest = dense.remainders - sparse.remainders
    norms = (jnp.linalg.norm(a.reshape(len(a), -1), axis=1) for a in (driven, response, rest))
    return _Terms(jnp.linalg.norm(dense.outputs[0] - sparse.outputs[0]), *norms)


def _recursion(start: Any, growth: Any, added: Any) -> np.ndarray:
    """b_{k+1} = growth_k·b_k + added_k from b_0 = start: [T + 1]."""
    bounds = [np.asarray(start)]
    for factor, more in zip(np.asarray(growth), np.asarray(added), strict=True):
        bounds.append(factor * bounds[-1] + more)
    return np.stack(bounds)


@jax.jit
def _defect(dense: Trajectory, sparse: Trajectory, step: Any) -> jax.Array:
    gap = dense.outputs - sparse.outputs
    change = _changes(dense.kernels, dense.gradients) - _changes(sparse.kernels, sparse.gradients)
    return gap[1:] - (gap[:-1] + step * change + dense.remainders - sparse.remainders)


def identity_defect(dense: Trajectory, sparse: Trajectory, step: float) -> Float[Array, "t m c"]:
    """What the identity of the gap leaves over, step by step; 0 up to rounding.

    D_{k+1} − [D_k − (η/N)(K^d_k g^d_k − K^s_k g^s_k) + ρ^d_k − ρ^s_k]

    Each network has its own points X̃_k. It holds for gradient descent with the step η on any two
    networks; other optimisers break it.

    Args:
        dense, sparse: of the two networks at the same Z.
        step: η.

    Returns:
        [T, m, c].

    Raises:
        InputError: trajectories of other lengths, at other points Z or not finite, a step that is
            not positive.

    Source: theory P1.
    """
    dense, sparse = _pair(dense, sparse, step)
    return _defect(dense, sparse, step)


def posterior_bound(dense: Trajectory, sparse: Trajectory, step: float) -> Float[np.ndarray, "t1"]:
    """P2: the gap is at most what kernels, responses and remainders have added up to.

    ‖D_k‖ ≤ ‖D_0‖ + Σ_{i<k} { (η/N)[‖(K^d_i − K^s_i) g^d_i‖ + ‖K^s_i(g^d_i − g^s_i)‖] + ‖ρ_i‖ }

    with ρ = ρ^d − ρ^s. Each network may have its own points X̃_i.

    Args:
        dense, sparse: of the two networks at the same Z.
        step: η of gradient descent.

    Returns:
        Bounds on ‖D_0‖ … ‖D_T‖ (norms over Z and outputs, in logits), [T + 1].

    Raises:
        InputError: as `identity_defect`.

    Source: theory P2.
    """
    dense, sparse = _pair(dense, sparse, step)
    start, driven, response, rest = map(np.asarray, _terms(dense, sparse))
    return _recursion(start, np.ones_like(rest), step * (driven + response) + rest)


# ---------------------------------------------------------------- P3: frozen kernels, squared loss


class Frozen(NamedTuple):
    """A network with a frozen kernel at N training points X̃, before the first step.

    Attributes:
        kernel: Θ(X̃, X̃), [N, N, c, c], or [N, N] for Θ ⊗ I; symmetric, positive semidefinite.
        outputs: f_0(X̃), [N, c].
    """

    kernel: Float[Array, "n n *c"] | np.ndarray
    outputs: Float[Array, "n c"] | np.ndarray


class _Problem(NamedTuple):
    """Kernels and outputs of the dense and the sparse network, targets, and both spectra."""

    kernels: tuple[jax.Array, jax.Array]
    outputs: tuple[jax.Array, jax.Array]
    targets: jax.Array
    spectra: tuple[Spectrum, Spectrum]
    largest: tuple[float, float]


def _problem(dense: Frozen, sparse: Frozen, targets: Any) -> _Problem:
    """The problem in one dtype; raise unless its arrays fit and the kernels are symmetric, PSD."""
    named = {f"{name} {part}": value for name, network in (("dense", dense), ("sparse", sparse))
             for part, value in network._asdict().items()}  # fmt: skip
    arrays = dict(zip([*named, "targets"], floats(**named, targets=targets), strict=True))
    outputs = arrays["dense outputs"]
    if outputs.ndim != 2 or not outputs.size:
        expected = "axes [N, c], not empty"
        raise InputError("dense outputs", expected=expected, got=f"shape {outputs.shape}")
    shape = (len(outputs), *outputs.shape)
    for what in ("sparse outputs", "targets"):
        if arrays[what].shape != outputs.shape:
            got = f"shape {arrays[what].shape}"
            raise InputError(what, expected=f"shape {outputs.shape}", got=got)
    for what in ("dense kernel", "sparse kernel"):
        if arrays[what].shape not in (shape[:2], (*shape, shape[-1])):
            raise InputError(
                what,
                expected=f"shape {shape[:2]} or {(*shape, shape[-1])}",
                got=f"shape {arrays[what].shape}",
            )
    if arrays["dense kernel"].shape != arrays["sparse kernel"].shape:
        expected, got = (f"{arrays[what].shape}" for what in ("dense kernel", "sparse kernel"))
        raise InputError("sparse kernel", expected=expected, got=got)
    for what, array in arrays.items():
        check_finite(what, array)
    spectra, largest = [], []
    for what, kernel in (("dense kernel", dense.kernel), ("sparse kernel", sparse.kernel)):
        unit = unit_roundoff(kernel)
        spectra.append(decompose(arrays[what], unit))
        largest.append(
            check_spectrum(what, spectra[-1], unit, "needs posterior_bound or pointwise_bound")
        )
    return _Problem(
        (arrays["dense kernel"], arrays["sparse kernel"]),
        (outputs, arrays["sparse outputs"]),
        arrays["targets"],
        (spectra[0], spectra[1]),
        (largest[0], largest[1]),
    )


def _check_step(problem: _Problem, step: float) -> None:
    """Raise if gradient descent might leave the bound: see `prior_bound`."""
    (dense, _), (of_dense, of_sparse) = problem.spectra, problem.largest
    n, values = len(problem.targets), dense.values
    sums = {
        "(λ_min + λ_max) of the dense": float(values[0]) + of_dense,
        "λ_max of the sparse": of_sparse,
    }
    for what, total in sums.items():
        # Eigenvalues are known up to rounding.
        if step * total > 2 * n * (1 + 10 * len(values) * float(jnp.finfo(values.dtype).eps)):
            raise InputError(
                "step",
                expected=f"at most 2N/{what} kernel, {2 * n / total:.4g}",
                got=f"{step:g}",
                fix="the bound is not valid for larger steps",
            )


def _distance(dense: jax.Array, sparse: jax.Array) -> jax.Array:
    """‖Θ^d − Θ^s‖_F/N, of k for Θ = k ⊗ I: N times that is no less than the operator norm."""
    return jnp.linalg.norm(flatten(dense - sparse)) / len(dense)


def prior_bound(
    dense: Frozen,
    sparse: Frozen,
    targets: Float[Array, "n c"] | np.ndarray,
    times: Sequence[float] | Float[Array, "t"] | np.ndarray,
    *,
    step: float | None = None,
) -> Float[np.ndarray, "t"]:
    """P3 (a): a bound on the gap at every time, from the start alone; squared loss.

    ‖D_t‖/√N ≤ β + min(t, N/λ_min(Θ^d))·α·r_0,    r_0 = ‖f^d_0 − y‖/√N

    with β = ‖D_0‖/√N, α = ‖Θ^d − Θ^s‖_F/N (‖k^d − k^s‖_F/N for Θ = k ⊗ I), and λ_min = 0 where it
    counts as 0 (see `flow.frozen`). It follows from D' = −(1/N)(ΔΘ r^d + Θ^s D), in which
    Θ^s ⪰ 0 cannot enlarge D, and ‖r^d_t‖ ≤ e^{−tλ_min/N}‖r_0‖. Gradient descent: t = kη and
    D_{k+1} = (I − ηΘ^s/N)D_k − (η/N)ΔΘ r^d_k, where nothing grows if η ≤ 2N/λ_max(Θ^s), and
    η Σ‖r^d_k‖ ≤ min(t, N/λ_min)‖r_0‖ if |1 − ηλ_max/N| ≤ 1 − ηλ_min/N, that is
    η ≤ 2N/(λ_min + λ_max)(Θ^d). Both are weaker than η ≤ N/λ_max of both kernels, and with a larger
    step the bound can fail: for one image, Θ^d = 1, Θ^s = 1 − δ, η = 1.9 the gap reaches 7δ r_0.

    Args:
        dense, sparse: the two networks at the same points.
        targets: y [N, c].
        times: t ≥ 0; with `step` the numbers of steps k, whole numbers.
        step: η, for gradient descent; gradient flow if not given.

    Returns:
        [t], in logits: root mean square over images of the norm over outputs.

    Raises:
        InputError: kernels that are not symmetric or have negative eigenvalues (beyond rounding),
            a step that is too large, bad times, shapes that do not fit.

    Source: theory P3 (a), with the weaker condition on the step derived here.

    Example:
        >>> one = np.ones((1, 1))
        >>> pair = Frozen(one, 0 * one), Frozen(0.5 * one, 0 * one)
        >>> prior_bound(*pair, one, [0.0, 0.5, 9.0]).tolist()          # α = ½, r_0 = 1, N/λ = 1
        [0.0, 0.25, 0.5]
    """
    moments = check_times(times, step)
    problem = _problem(dense, sparse, targets)
    if step is not None:
        _check_step(problem, step)
    n, smallest = len(problem.targets), float(problem.spectra[0].values[0])
    reach = np.minimum(
        moments * (1 if step is None else step), n / smallest if smallest else np.inf
    )
    alpha = _distance(*problem.kernels)
    beta = target_distance(*problem.outputs)
    residual = target_distance(problem.outputs[0], problem.targets)
    return (float(beta) + reach * float(alpha * residual)).astype(problem.targets.dtype)


@jax.jit
def _gaps(
    values: tuple[jax.Array, jax.Array],
    vectors: tuple[jax.Array, jax.Array],
    difference: jax.Array,
    start: jax.Array,
    residual: jax.Array,
    moments: jax.Array,
) -> jax.Array:
    """D_t for t/N = `moments`: the integral of P3 (a) in the eigenbases of both kernels.

    Null vectors u of Θ^s and v of Θ^d have uᵀ(Θ^d − Θ^s)v = 0.
    """
    of_dense, of_sparse = values[0][None, :], values[1][:, None]
    moving = (of_dense > 0) | (of_sparse > 0)
    v, u = vectors
    mixed = jnp.where(moving, u.T @ difference @ v, 0)
    initial, r = u.T @ start, v.T @ residual

    def gap(t: jax.Array) -> jax.Array:
        # ∫_0^t e^{−(t−s)a} e^{−sb} ds = t·e^{−t·min(a, b)}·(1 − e^{−x})/x with x = t|a − b|.
        x = t * jnp.abs(of_dense - of_sparse)
        spread = jnp.where(x > 0, -jnp.expm1(-x) / jnp.where(x > 0, x, 1), 1)
        weights = t * jnp.exp(-t * jnp.minimum(of_dense, of_sparse)) * spread
        return u @ (jnp.exp(-t * of_sparse) * initial - (weights * mixed) @ r)

    return jax.lax.map(gap, moments)


def prior_gap(
    dense: Frozen,
    sparse: Frozen,
    targets: Float[Array, "n c"] | np.ndarray,
    times: Sequence[float] | Float[Array, "t"] | np.ndarray,
) -> Float[Array, "t n c"]:
    """P3 (a): the gap itself under gradient flow with frozen kernels and the squared loss.

    D_t = e^{−tΘ^s/N} D_0 − (1/N) ∫_0^t e^{−(t−s)Θ^s/N} (Θ^d − Θ^s) e^{−sΘ^d/N} r^d_0 ds

    The integral is exact: in the eigenbases of the two kernels it is entry by entry a divided
    difference of exponentials. Unlike the difference of two predictions it loses no digits where
    the kernels are close.

    Args:
        dense, sparse: the two networks at the same points.
        targets: y [N, c].
        times: t ≥ 0.

    Returns:
        D_t [t, N, c], in logits.

    Raises:
        InputError: as `prior_bound`.

    Source: theory P3 (a).

    Example:
        >>> one = np.ones((1, 1))
        >>> pair = Frozen(2 * one, 0 * one), Frozen(one, 0 * one)
        >>> f"{float(prior_gap(*pair, one, [0.5])[0, 0, 0]):.4f}"      # e^{−½} − e^{−1}
        '0.2387'
    """
    moments = check_times(times, None)
    problem = _problem(dense, sparse, targets)
    (of_dense, of_sparse), shape = problem.spectra, problem.targets.shape
    size = len(of_dense.values)
    with jax.default_matmul_precision("highest"):
        gaps = _gaps(
            (of_dense.values, of_sparse.values),
            (of_dense.vectors, of_sparse.vectors),
            flatten(problem.kernels[0] - problem.kernels[1]),
            (problem.outputs[0] - problem.outputs[1]).reshape(size, -1),
            (problem.outputs[0] - problem.targets).reshape(size, -1),
            jnp.asarray(moments / shape[0], problem.targets.dtype),
        )
    return gaps.reshape(-1, *shape)


# ---------------------------------------------------------------- P3: any smooth loss


def _check_shared(dense: Trajectory, sparse: Trajectory) -> None:
    if not np.array_equal(dense.x, sparse.x):
        raise InputError(
            "trajectories",
            expected="both networks trained on the same points X̃_k",
            got="different ones",
            fix="train the sparse network on the dense one's points, or use posterior_bound",
        )


def gronwall_bound(
    dense: Trajectory, sparse: Trajectory, step: float, smoothness: float
) -> Float[np.ndarray, "t1"]:
    """P3 (b): a bound on the gap at fixed shared points, for a loss with L-Lipschitz gradient.

    b_{k+1} = (1 + ηL‖Θ^s_k‖/N) b_k + (η/N)‖(Θ^d_k − Θ^s_k) g^d_k‖ + ‖ρ_k‖,    b_0 = ‖D_0‖

    bounds ‖D_k‖, since ‖g^d − g^s‖ ≤ L‖D‖ at shared points. Of the sparse network only the kernels
    and remainders enter, not its outputs. The kernels may vary; for linearised networks ρ = 0.

    Args:
        dense, sparse: of the two networks, both trained on Z itself in every step.
        step: η.
        smoothness: L, see `SMOOTHNESS`.

    Returns:
        Bounds on ‖D_0‖ … ‖D_T‖ (norms over points and outputs, in logits), [T + 1].

    Raises:
        InputError: as `identity_defect`, or other points than Z.

    Source: theory P3 (b); the remainder makes it hold for networks that are not linear.
    """
    dense, sparse = _pair(dense, sparse, step)
    check_number("smoothness", smoothness, low=0, low_open=True)
    _check_shared(dense, sparse)
    if dense.x.shape[1:] != dense.z.shape or not np.array_equal(
        dense.x, np.broadcast_to(dense.z, dense.x.shape)
    ):
        raise InputError(
            "trajectories",
            expected="Z as the training points of every step",
            got="other points",
            fix="use pointwise_bound for points that move",
        )
    start, driven, _, rest = map(np.asarray, _terms(dense, sparse))
    growth = 1 + step * smoothness * np.asarray(_operator_norms(sparse.kernels)) / len(dense.z)
    return _recursion(start, growth, step * driven + rest)


@jax.jit
def _operator_norms(kernels: jax.Array) -> jax.Array:
    """‖Θ_k‖ of each step, [T]; symmetric kernels."""
    return jax.lax.map(lambda k: jnp.abs(jnp.linalg.eigvalsh(flatten(k))).max(), kernels)


def pointwise_bound(
    dense: Trajectory, sparse: Trajectory, step: float, smoothness: float
) -> Float[np.ndarray, "t1"]:
    """P3 (c): a bound on the largest gap over Z at shared points that move.

    δ_{k+1} = (1 + ηLκ_k)δ_k + max_z [(η/N) Σ_j ‖ΔΘ_k(z, x̃_j)‖‖g^d_j‖ + ‖ρ_k(z)‖],
    κ_k = max_z (1/N) Σ_j ‖Θ^s_k(z, x̃_j)‖,    δ_0 = max_z ‖D_0(z)‖

    bounds max_z ‖D_k(z)‖ (norms over outputs, operator norms of the c×c blocks), if Z holds every
    point that a step was taken on.

    Args:
        dense, sparse: of the two networks, both trained on the same points, e.g. the dense
            network's adversarial ones.
        step: η.
        smoothness: L, see `SMOOTHNESS`.

    Returns:
        Bounds for k = 0 … T, in logits, [T + 1].

    Raises:
        InputError: as `identity_defect`, different points, or one that is not in Z.

    Source: theory P3 (c); the remainder makes it hold for networks that are not linear.
    """
    dense, sparse = _pair(dense, sparse, step)
    check_number("smoothness", smoothness, low=0, low_open=True)
    _check_shared(dense, sparse)
    known = {point.tobytes() for point in np.asarray(dense.z)}
    flat = np.asarray(dense.x).reshape(-1, *dense.x.shape[2:])
    if missing := sum(point.tobytes() not in known for point in flat):
        raise InputError(
            "Z", expected="every training point in it", got=f"{missing} of {len(flat)} missing"
        )
    start, driven, kappa, rest = map(np.asarray, _pointwise_terms(dense, sparse))
    return _recursion(start, 1 + step * smoothness * kappa, (step * driven + rest).max(1))


@jax.jit
def _pointwise_terms(dense: Trajectory, sparse: Trajectory) -> tuple[jax.Array, ...]:
    """δ_0; (1/N) Σ_j ‖ΔΘ_k(z, x̃_j)‖‖g^d_j‖ [T, m]; κ_k [T]; ‖ρ_k(z)‖ [T, m]."""

    def step(values: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        wide, narrow, gradients = values
        norms = partial(jnp.linalg.norm, ord=2, axis=(2, 3))  # of the blocks: [m, n]
        lengths = jnp.linalg.norm(gradients, axis=1)
        return norms(wide - narrow) @ lengths / len(lengths), norms(narrow).mean(1).max()

    driven, kappa = jax.lax.map(step, (dense.kernels, sparse.kernels, dense.gradients))
    start = jnp.linalg.norm(dense.outputs[0] - sparse.outputs[0], axis=1).max()
    return start, driven, kappa, jnp.linalg.norm(dense.remainders - sparse.remainders, axis=2)
