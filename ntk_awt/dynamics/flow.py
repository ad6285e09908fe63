"""Gradient flow in function space: any kernel for an instant, a frozen kernel for all times.

Kernels are those of `kernels.empirical`: [m, n, c, c] with Θ[i, j, a, b] = ⟨∂f_a(x_i)/∂θ,
∂f_b(x̃_j)/∂θ⟩, or [m, n] for Θ ⊗ I (analytic kernels; one kernel for all outputs). Of a masked
network it must be the kernel of the masked Jacobian: pruned weights do not move (theory §0).
Every function keeps the dtype of its inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk_awt.errors import InputError, check_count, check_finite, check_number, choose
from ntk_awt.kernels.metrics import flatten
from ntk_awt.types import Logits

LOSS_GRADIENTS: dict[str, Callable[[Logits, Logits], Logits]] = {
    "cross-entropy": lambda logits, targets: jax.nn.softmax(logits) - targets,
    "squared": lambda logits, targets: logits - targets,
}
"""∇_f ℓ(f, y) of each loss, image by image."""


Values: TypeAlias = Array | np.ndarray
"""Arrays whose values are known: not traced."""


class Trajectories(NamedTuple):
    """Outputs along the training with a frozen kernel.

    Attributes:
        x: f_t(X̃) at the points trained on, [t, n, c].
        z: f_t(Z) at the other points, [t, m, c]; None if there are none.
    """

    x: Float[Array, "t n c"]
    z: Float[Array, "t m c"] | None


def loss_gradient(loss: str, logits: Logits, targets: Logits) -> Logits:
    """g = ∇_f ℓ(f, y) for each image.

    - "cross-entropy" −Σ_a y_a ln softmax(f)_a: softmax(f) − y;
    - "squared" ½‖f − y‖²: f − y.

    Args:
        loss: a name in `LOSS_GRADIENTS`.
        logits: f [n, c].
        targets: y [n, c]; for cross-entropy probabilities, e.g. one-hot labels.

    Returns:
        g [n, c].

    Raises:
        InputError: unknown loss, targets of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> f, y = jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])
        >>> loss_gradient("cross-entropy", f, y).tolist(), loss_gradient("squared", f, y).tolist()
        ([[-0.5, 0.5]], [[-1.0, 0.0]])
    """
    choose("loss", loss, LOSS_GRADIENTS)
    _check_shape("targets", targets, logits.shape)
    return LOSS_GRADIENTS[loss](logits, targets)


def output_change(
    kernel: Float[Array, "m n *c"], gradients: Float[Array, "n c"]
) -> Float[Array, "m c"]:
    """df_t(x)/dt = −(1/N) Σ_j Θ_t(x, x̃_j) g_j: how fast adversarial training moves the outputs.

    That is gradient flow on the adversarial risk (1/N) Σ_j ℓ(f(x̃_j), y_j) with the mixed tangent
    kernel Θ_t(X, X̃_t); a gradient step of size η changes f(x) by η times this, up to O(η²).

    Args:
        kernel: Θ(x_i, x̃_j), [m, n, c, c], or [m, n] for Θ ⊗ I; the points x are the rows, the
            adversarial inputs x̃ the columns (N = n).
        gradients: g_j = ∇_f ℓ(f(x̃_j), y_j), see `loss_gradient`.

    Returns:
        [m, c], logits per unit of time.

    Raises:
        InputError: a kernel that does not fit the gradients.

    Source: theory D1.

    Example:
        >>> import jax.numpy as jnp
        >>> output_change(jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()
        [[-1.0, -2.0]]
    """
    if gradients.ndim != 2:
        raise InputError("gradients", expected="axes [n, c]", got=f"shape {gradients.shape}")
    _check_kernel("kernel", kernel, (*kernel.shape[:1], *gradients.shape))
    sides = "ijab,jb->ia" if kernel.ndim == 4 else "ij,ja->ia"
    with jax.default_matmul_precision("highest"):
        return -jnp.einsum(sides, kernel, gradients) / gradients.shape[0]


# ---------------------------------------------------------------- frozen kernels


def frozen(
    kernel_xx: Float[Values, "n n *c"],
    f_x: Float[Values, "n c"],
    y: Float[Values, "n c"],
    times: Sequence[float] | Values,
    *,
    kernel_zx: Float[Values, "m n *c"] | None = None,
    f_z: Float[Values, "m c"] | None = None,
    n: int | None = None,
    step: float | None = None,
) -> Trajectories:
    """Training of the squared loss ½‖f − y‖² with a frozen kernel, fixed points X̃: closed form.

    With r_0 = f_0(X̃) − y, for gradient flow,

        f_t(X̃) = y + e^{−tΘ/N} r_0,    f_t(z) = f_0(z) − Θ(z, X̃) Θ⁻¹(I − e^{−tΘ/N}) r_0,

    and for k gradient steps of size η the same with (I − ηΘ/N)^k in place of the exponential. It is
    exact for a network linearised at its initialisation, and the limit of a wide one. All times
    together cost one eigendecomposition. Θ may be singular: what multiplies r_0 is computed as
    (1 − e^{−tλ/N})/λ, which tends to t/N for λ → 0, eigenvalue by eigenvalue.

    Args:
        kernel_xx: Θ(X̃, X̃), [n, n, c, c] or [n, n] for Θ ⊗ I; symmetric, positive semidefinite.
        f_x: f_0(X̃).
        y: targets.
        times: t ≥ 0, finite; with `step` the numbers of steps k, whole numbers.
        kernel_zx: Θ(Z, X̃), [m, n, c, c] or [m, n], to follow other points Z (e.g. the clean ones).
        f_z: f_0(Z), [m, c]; with `kernel_zx`.
        n: N that the risk is divided by, if it is not the number of points; 1 for a sum of
            losses, n·c for a mean over all entries (neural-tangents).
        step: η in (0, 2N/λ_max], for gradient steps; gradient flow if not given.

    Returns:
        f_t(X̃) and f_t(Z).

    Raises:
        InputError: arrays that do not fit each other or are not finite, a kernel that is not
            symmetric or has negative eigenvalues (both beyond rounding), negative times, numbers of
            steps that are not whole, a step that would diverge. Under jit: these checks need
            values.

    Source: theory D3; Lee et al., "Wide neural networks of any depth evolve as linear models"
    (2019).

    Example:
        >>> import jax.numpy as jnp
        >>> f, y, one = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1))
        >>> outputs = frozen(2 * one, f, y, [0.0, 0.5], kernel_zx=one, f_z=f)
        >>> print(outputs.x.ravel().round(3), outputs.z.ravel().round(3))
        [0.    0.632] [0.    0.316]
    """
    kernel_xx, f_x, y = jnp.asarray(kernel_xx), jnp.asarray(f_x), jnp.asarray(y)
    if f_x.ndim != 2 or not f_x.size:
        raise InputError("f_x", expected="axes [n, c], not empty", got=f"shape {f_x.shape}")
    _check_shape("y", y, f_x.shape)
    _check_kernel("kernel_xx", kernel_xx, (len(f_x), *f_x.shape))
    if (kernel_zx is None) != (f_z is None):
        raise InputError("other points", expected="kernel_zx and f_z", got="one of them")
    others = None
    if kernel_zx is not None and f_z is not None:
        kernel_zx, f_z = jnp.asarray(kernel_zx), jnp.asarray(f_z)
        _check_shape("f_z", f_z, (*f_z.shape[:1], f_x.shape[1]))
        _check_kernel("kernel_zx", kernel_zx, (len(f_z), *f_x.shape), like=kernel_xx)
        others = (kernel_zx, f_z)
    check_finite("frozen", {"kernel_xx": kernel_xx, "f_x": f_x, "y": y, "others": others})
    n = len(f_x) if n is None else n
    check_count("n", n, low=1)
    moments = _check_times(times, step)
    values, vectors, asymmetry = _decompose(kernel_xx)
    _check_spectrum(np.asarray(values), float(asymmetry), n, step)
    if step is None:
        return _evolve(values, vectors, f_x, y, others, jnp.asarray(moments / n), None)
    return _evolve(values, vectors, f_x, y, others, jnp.asarray(moments), step / n)


def _check_shape(what: str, array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(what, expected=f"shape {shape}", got=f"shape {array.shape}")


def _check_kernel(what: str, kernel: Any, sizes: tuple[int, ...], *, like: Any = None) -> None:
    """Raise unless it is [m, n, c, c] or [m, n] for sizes (m, n, c), with the axes of `like`."""
    forms = [sizes[:2], (*sizes, sizes[-1])]
    if like is not None:
        forms = [form for form in forms if len(form) == like.ndim]
    if kernel.shape not in forms:
        expected = "shape " + " or ".join(str(form) for form in forms)
        raise InputError(what, expected=expected, got=f"shape {kernel.shape}")


def _check_times(times: Any, step: float | None) -> np.ndarray:
    """The times as a float64 array, checked."""
    moments = np.asarray(times, np.float64)
    if moments.ndim != 1:
        raise InputError("times", expected="a list of numbers", got=f"shape {moments.shape}")
    good = np.isfinite(moments) & (moments >= 0)
    expected = "finite numbers ≥ 0"
    if step is not None:
        check_number("step", step, low=0, low_open=True)
        good &= moments == np.round(moments)
        expected = "numbers of steps: whole, ≥ 0"
    if not good.all():
        raise InputError("times", expected=expected, got=f"{moments[~good][0]:g}")
    return moments


def _check_spectrum(values: np.ndarray, asymmetry: float, n: int, step: float | None) -> None:
    """Raise unless the kernel is symmetric and PSD up to rounding, and the step does not diverge.

    Allowed are 10·m units of rounding of the largest eigenvalue, m the size of the matrix: a
    decomposition errs by about m of them, and computing the kernel by a few.
    """
    largest = float(np.abs(values).max())
    allowed = 10 * len(values) * float(np.finfo(values.dtype).eps) * largest
    if asymmetry > allowed:
        raise InputError(
            "kernel_xx",
            expected="a symmetric kernel of the points X̃ with themselves",
            got=f"entries that differ by {asymmetry:.2g}",
            fix="a mixed kernel Θ(X, X̃) belongs in kernel_zx",
        )
    if values.min() < -allowed:
        raise InputError(
            "kernel_xx",
            expected="a positive semidefinite kernel",
            got=f"eigenvalues from {values.min():.2g} to {values.max():.2g}",
            fix="compute it in float64 if this is rounding",
        )
    if step is not None and step * (largest - allowed) > 2 * n:
        raise InputError(
            "step", expected=f"at most 2N/λ_max = {2 * n / largest:.4g}", got=f"{step:g}"
        )


@jax.jit
def _decompose(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues, eigenvectors, and the largest difference between mirrored entries."""
    matrix = flatten(kernel)
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors, jnp.max(jnp.abs(matrix - matrix.T))


@jax.jit
def _evolve(
    values: jax.Array,
    vectors: jax.Array,
    f_x: jax.Array,
    y: jax.Array,
    others: tuple[jax.Array, jax.Array] | None,
    moments: jax.Array,
    rate: float | None,
) -> Trajectories:
    """The outputs at t/N = `moments`, or after `moments` steps with η/N = `rate`."""
    values = jnp.maximum(values, 0)[:, None]
    moments = moments.astype(values.dtype)[:, None, None]
    if rate is None:
        left, slope = jnp.exp(-values * moments), moments
        gone = -jnp.expm1(-values * moments)
    else:
        reach = rate * values
        left, slope = jnp.power(1 - reach, moments), rate * moments
        # Near 0 the power has lost the digits of what is gone.
        small = jnp.minimum(reach, 0.5)
        gone = jnp.where(reach < 0.5, -jnp.expm1(moments * jnp.log1p(-small)), 1 - left)
    positive = values > 0
    weights = jnp.where(positive, gone / jnp.where(positive, values, 1), slope)
    with jax.default_matmul_precision("highest"):
        residual = (f_x - y).reshape(len(vectors), -1)
        coordinates = vectors.T @ residual
        x = y + (vectors @ (left * coordinates)).reshape(-1, *y.shape)
        if others is None:
            return Trajectories(x, None)
        kernel, f_z = others
        moved = flatten(kernel) @ (vectors @ (weights * coordinates))
        return Trajectories(x, f_z - moved.reshape(-1, *f_z.shape))
