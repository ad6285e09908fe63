"""Adversarial training of an infinitely wide network, dense or masked (theory D4).

The tangent kernel Θ of an infinitely wide network does not move, so squared-loss training is the
flow D3, f_t = −Θ(·, X̃)(f_t(X̃) − y)/N, of which every phase with fixed adversarial points X̃_k has a
closed form. Attack and flow alternate:

    1. X̃_k = attack of z ↦ ½‖f_k(z) − y‖², whose gradient runs through Θ(z, X̃_j), j < k;
    2. f_{k+1}(z) = f_k(z) + Θ(z, X̃_k) a_k,
       a_k = Θ_k^{-1}(I − e^{−Δt·Θ_k/N})(y − f_k(X̃_k)),  Θ_k = Θ(X̃_k, X̃_k).

So f_K(z) = f_0(z) + Σ_k Θ(z, X̃_k) a_k: a kernel machine with all the points ever attacked as
anchors. Nothing is approximated but the maximiser. One phase costs one eigendecomposition [n, n]
and, for each step of the attack, a kernel [n, K·n] forward and backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk_awt.attacks import PGD, example_keys
from ntk_awt.errors import InputError, check_count, check_finite, check_images, check_number
from ntk_awt.theory.dynamics import flow
from ntk_awt.threats import Threat, check_kind, check_threat
from ntk_awt.types import Images, Key, Logits

KernelFn: TypeAlias = Callable[..., Any]
"""`(x1[n1, *shape], x2[n2, *shape] | None) -> kernels` with `.ntk` [n1, n2], e.g. the `kernel_fn`
of `kernels.analytic.network`; Θ ⊗ I_C is the kernel of C outputs."""

Function: TypeAlias = Callable[[Images], Logits | float]
"""A predictor `z[m, *shape] -> outputs[m, c]`, or one number for all."""


class InfiniteTraining(NamedTuple):
    """Adversarial training of an infinitely wide network, K phases on n points with c outputs.

    Attributes:
        points: X̃_k, the attacked points of every phase [K, n, *shape].
        coefficients: a_k [K, n, c].
        outputs: f_k(X̃_k) [K, n, c], before the flow of the phase moves them.
    """

    points: Float[Array, "k n *shape"]
    coefficients: Float[Array, "k n c"]
    outputs: Float[Array, "k n c"]


def zero(z: Images) -> float:
    """f_0 = 0: the mean over initialisations, and what a network minus itself starts from."""
    return 0.0


def _value(
    kernel_fn: KernelFn, initial: Function, z: Images, points: Images, coefficients: Array
) -> Logits:
    """f_0(z) + Σ_k Θ(z, X̃_k) a_k, [m, c]."""
    anchors = points.reshape(-1, *points.shape[2:])
    kernel = kernel_fn(z, anchors).ntk
    return initial(z) + kernel @ coefficients.reshape(len(anchors), -1)


def _step(kernel: Array, outputs: Array, targets: Array, time: Any) -> tuple[Array, flow.Spectrum]:
    """Θ^{-1}(I − e^{−tΘ/N})(y − f): what D3 multiplies Θ(z, X̃) by, and gives for Θ(z, X̃) = I."""
    spectrum = flow.decompose(kernel, flow.unit_roundoff(kernel))
    unit = jnp.eye(len(kernel), dtype=kernel.dtype), jnp.zeros_like(outputs)
    moments = jnp.reshape(time / len(kernel), 1).astype(kernel.dtype)
    steps = flow.evolve(spectrum, outputs, targets, unit, moments, None).z
    assert steps is not None
    return steps[0], spectrum


@partial(jax.jit, static_argnames=("kernel_fn", "attack", "initial", "phases"))
def _train(
    x: Images,
    y: Array,
    threat: Threat,
    key: Key,
    phase_time: Any,
    kernel_fn: KernelFn,
    attack: PGD,
    initial: Function,
    phases: int,
) -> tuple[InfiniteTraining, flow.Spectrum]:
    """The training, and the spectrum of each phase without its vectors."""
    n = len(x)

    def phase(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Any]:
        points, coefficients = carry

        def predictor(z: Images) -> Logits:
            return _value(kernel_fn, initial, z, points, coefficients)

        def loss(z: Images) -> Array:
            return jnp.sum((predictor(z) - y) ** 2, -1) / 2

        keys = example_keys(jax.random.fold_in(key, k), jnp.arange(n))
        attacked, _ = attack.run(loss, x, threat, keys)
        outputs = predictor(attacked)
        step, spectrum = _step(kernel_fn(attacked, None).ntk, outputs, y, phase_time)
        seen = spectrum._replace(vectors=spectrum.vectors[:0])
        return (points.at[k].set(attacked), coefficients.at[k].set(step)), (outputs, seen)

    # Phases to come have coefficients 0, and stand at x, where every kernel is defined.
    start = (jnp.broadcast_to(x, (phases, *x.shape)), jnp.zeros((phases, *y.shape), y.dtype))
    with jax.default_matmul_precision("highest"):
        carry, (outputs, spectra) = jax.lax.scan(phase, start, jnp.arange(phases))
    return InfiniteTraining(*carry, outputs), spectra


def adversarial_training(
    kernel_fn: KernelFn,
    x: Images,
    y: Logits,
    *,
    threat: Threat,
    attack: PGD,
    key: Key,
    phases: int,
    phase_time: float,
    initial: Function = zero,
) -> InfiniteTraining:
    """Train an infinitely wide network adversarially with the loss ½‖f − y‖² (theory D4).

    f_K(z) = f_0(z) + Σ_{k<K} Θ(z, X̃_k) a_k, where X̃_k attacks f_k and
    a_k = Θ_k^{-1}(I − e^{−Δt·Θ_k/N})(y − f_k(X̃_k)). Between two attacks this is exact (D3), in
    continuous time; the limit of finite networks of NTK parametrisation whose attack also moves
    every Δt only, with error O(width^{-1/2}). With f_0 = 0 the network to compare with is the
    centred one, f − f_0. The first attack of f_0 = 0 has no gradient and leaves a start at x there.

    Args:
        kernel_fn: the kernel Θ, e.g. `kernels.analytic.network(…).kernel_fn`, dense or masked; its
            gradient must be finite where two points coincide, as that of every network there is.
        x: training images [n, *shape], float32 or (under `jax.enable_x64`) float64, inside
            `threat.bounds` (pixel units). All results have their dtype, or float32 if wider.
        y: targets [n, c].
        threat: the allowed set of each image.
        attack: e.g. `PGD(random_start=False)`; there are no classes, so attacks that look for
            misclassified points don't apply.
        key: of the attack, another one each phase.
        phases: K, number of attacks; all K·n points are anchors of the predictor.
        phase_time: Δt of the flow between two attacks, in units of 1/(learning rate of the mean
            loss): K·Δt = T corresponds to T/η steps of gradient descent.
        initial: f_0, `z[m, *shape] -> outputs[m, c]`, differentiable; 0 if not given. It and
            `kernel_fn` are compiled in: a new function object is compiled anew.

    Returns:
        `InfiniteTraining(points, coefficients, outputs)`; see `predict`.

    Raises:
        InputError: images that are not floating, not finite or out of bounds, targets of another
            length or complex ones, a negative radius, no phase, a time ≤ 0, a result that is not
            finite, a kernel of the attacked points that is not symmetric or not PSD (as in
            `flow.frozen`, with the same treatment of singular kernels).

    Source: theory D3, D4; flow: Jacot et al., "Neural tangent kernel" (2018), Lee et al., "Wide
        neural networks of any depth evolve as linear models" (2019).

    Example:
        >>> from types import SimpleNamespace
        >>> from ntk_awt.attacks import PGD
        >>> from ntk_awt.threats import Linf
        >>> def linear(x1, x2=None):  # the kernel of f(x) = ⟨w, x⟩
        ...     return SimpleNamespace(ntk=x1 @ (x1 if x2 is None else x2).T)
        >>> x, y = jnp.array([[0.5, 0.0], [0.0, 0.5]]), jnp.array([[1.0], [-1.0]])
        >>> training = adversarial_training(linear, x, y, threat=Linf(0.1, (-1.0, 1.0)),
        ...     attack=PGD(random_start=False), key=jax.random.key(0), phases=2, phase_time=1.0)
        >>> print(training.points[1].round(3))  # f_1 = w·(1, −1): the attack lowers the margins
        [[0.4 0.1]
         [0.1 0.4]]
    """
    check_kind(threat)
    if not hasattr(attack, "run"):
        raise InputError("attack", expected="PGD or the like", got=type(attack).__name__)
    check_images("images", x, threat.bounds)
    check_count("phases", phases, low=1)
    check_number("phase_time", phase_time, low=0, low_open=True)
    if np.ndim(y) != 2 or len(y) != len(x) or not np.size(y):
        raise InputError(
            "targets",
            expected=f"an array [{len(x)}, c] for at least one image",
            got=f"shape {np.shape(y)}",
        )
    check_finite("targets", y)
    images, targets = flow.floats(images=x, targets=y)
    check_threat(threat, np.asarray(images))
    training, spectra = _train(
        images, targets, threat, key, phase_time, kernel_fn, attack, initial, int(phases)
    )
    check_finite("infinitely wide training:", training._asdict())
    unit = flow.unit_roundoff(images)
    for k in range(phases):
        spectrum = jax.tree.map(lambda leaf, k=k: leaf[k], spectra)
        flow.check_spectrum(f"kernel of phase {k}", spectrum, unit, "is none of the points alone")
    return training


@partial(jax.jit, static_argnames=("kernel_fn", "initial"))
def _predict(
    training: InfiniteTraining, z: Images, kernel_fn: KernelFn, initial: Function
) -> Array:
    k, n = training.points.shape[:2]
    with jax.default_matmul_precision("highest"):
        anchors = training.points.reshape(k * n, *z.shape[1:])
        kernel = kernel_fn(z, anchors).ntk.reshape(len(z), k, n)
        steps = jnp.einsum("mkn,knc->kmc", kernel, training.coefficients)
        start = initial(z) + jnp.zeros_like(steps[:1])
    return jnp.cumsum(jnp.concatenate([start, steps]), 0)


def predict(
    kernel_fn: KernelFn, training: InfiniteTraining, z: Images, *, initial: Function = zero
) -> Float[Array, "phases m c"]:
    """Outputs of an infinitely wide network in the course of its training (theory D4).

    f_k(z) = f_0(z) + Σ_{j<k} Θ(z, X̃_j) a_j, at time k·Δt.

    Args:
        kernel_fn, initial: as in `adversarial_training`.
        training: what that returned, K phases.
        z: points [m, *shape].

    Returns:
        f_0(z), f_1(z), …, f_K(z): [K + 1, m, c]. Differentiable in z.

    Raises:
        InputError: points of another shape than the training images.

    Source: theory D4.

    Example:
        >>> from types import SimpleNamespace
        >>> def linear(x1, x2=None):
        ...     return SimpleNamespace(ntk=x1 @ (x1 if x2 is None else x2).T)
        >>> point, half = jnp.ones((1, 1, 2)), jnp.full((1, 1, 1), 0.5)
        >>> training = InfiniteTraining(point, half, jnp.zeros((1, 1, 1)))
        >>> predict(linear, training, jnp.array([[1.0, 3.0]]))[:, 0, 0].tolist()
        [0.0, 2.0]
    """
    z, shape = jnp.asarray(z), training.points.shape[2:]
    if z.shape[1:] != shape:
        expected = f"points [m, {', '.join(map(str, shape))}]"
        raise InputError("z", expected=expected, got=f"shape {z.shape}")
    return _predict(training, z, kernel_fn, initial)
