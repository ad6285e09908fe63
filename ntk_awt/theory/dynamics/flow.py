"""Gradient flow in function space: any kernel for an instant, a frozen kernel for all times.

Kernels are those of `kernels.empirical`: [m, n, c, c] with Θ[i, j, a, b] = ⟨∂f_a(x_i)/∂θ,
∂f_b(x̃_j)/∂θ⟩, or [m, n] for Θ ⊗ I (analytic kernels; one kernel for all outputs). Of a masked
network it must be the kernel of the masked Jacobian: pruned weights do not move (theory §0).
Every function computes and answers in the dtype of its inputs, in float32 if that is narrower.
"""

import warnings
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


def floats(**arrays: Any) -> tuple[jax.Array, ...]:
    """The arrays in one floating dtype: the widest of theirs, float32 at least.

    Args:
        arrays: real numbers, by the names that an error calls them; traced ones too.

    Raises:
        InputError: something that is no array of real numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> half, whole = floats(f=jnp.ones(2, jnp.float16), y=[0, 1])
        >>> print(half.dtype, whole.dtype)
        float32 float32
    """
    found = []
    for name, value in arrays.items():
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            got = f"{type(value).__name__}"
            raise InputError(name, expected="an array of numbers", got=got) from error
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise InputError(name, expected="real numbers", got=f"dtype {array.dtype}")
        found.append(array)
    widest = jnp.float64 if any(array.dtype == jnp.float64 for array in found) else jnp.float32
    return tuple(array.astype(widest) for array in found)


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
        InputError: unknown loss, logits that are not [n, c], targets of another shape, complex
            numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> f, y = jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])
        >>> loss_gradient("cross-entropy", f, y).tolist(), loss_gradient("squared", f, y).tolist()
        ([[-0.5, 0.5]], [[-1.0, 0.0]])
    """
    choose("loss", loss, LOSS_GRADIENTS)
    logits, targets = floats(logits=logits, targets=targets)
    if logits.ndim != 2:
        raise InputError("logits", expected="axes [n, c]", got=f"shape {logits.shape}")
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
        InputError: a kernel that does not fit the gradients, complex numbers.

    Source: theory D1.

    Example:
        >>> import jax.numpy as jnp
        >>> output_change(jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()
        [[-1.0, -2.0]]
    """
    kernel, gradients = floats(kernel=kernel, gradients=gradients)
    if gradients.ndim != 2 or not gradients.size:
        expected = "axes [n, c], not empty"
        raise InputError("gradients", expected=expected, got=f"shape {gradients.shape}")
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
    together cost one eigendecomposition.

    **Singular kernels.** Θ⁻¹(I − e^{−tΘ/N}) is taken on the range of Θ alone: a null vector v of
    Θ(X̃, X̃) is one of Θ(z, X̃) too, since |Θ(z, X̃)v|² ≤ Θ(z, z)·vᵀΘ(X̃, X̃)v, and f_t(X̃) stays along
    it. An eigenvalue counts as 0 up to 2e, where e = max(N·u·λ_max, −λ_min) estimates how far any
    of them may be off (Weyl): N values rounded to the kernel's unit roundoff u, or what the most
    negative one, which can only be an error, shows. Above 2e half of the eigenvalue is certain. So
    along a direction whose true eigenvalue is below 2e the prediction stands still: where that
    matters, compute the kernel in float64.

    Args:
        kernel_xx: Θ(X̃, X̃), [n, n, c, c] or [n, n] for Θ ⊗ I; symmetric, positive semidefinite.
        f_x: f_0(X̃).
        y: targets.
        times: t ≥ 0, ∞ for the limit; with `step` the numbers of steps k, whole numbers or ∞.
        kernel_zx: Θ(Z, X̃), [m, n, c, c] or [m, n], to follow other points Z (e.g. the clean ones).
        f_z: f_0(Z), [m, c]; with `kernel_zx`.
        n: N that the risk is divided by, if it is not the number of points; 1 for a sum of
            losses, n·c for a mean over all entries (neural-tangents).
        step: η in (0, 2N/λ_max], for gradient steps; gradient flow if not given.

    Returns:
        f_t(X̃) and f_t(Z).

    Raises:
        InputError: arrays that do not fit each other, are complex or not finite, a kernel that is
            not symmetric or has negative eigenvalues (both beyond 20·N·u·λ_max; from 2·N·u·λ_max
            on negative ones are a warning), negative times, numbers of steps that are not whole, a
            step that would diverge. Under jit: these checks need values.

    Source: theory D3; Lee et al., "Wide neural networks of any depth evolve as linear models"
    (2019).

    Example:
        >>> import jax.numpy as jnp
        >>> f, y, one = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1))
        >>> outputs = frozen(2 * one, f, y, [0.0, 0.5], kernel_zx=one, f_z=f)
        >>> print(outputs.x.ravel().round(3), outputs.z.ravel().round(3))
        [0.    0.632] [0.    0.316]
    """
    given = {"kernel_xx": kernel_xx, "f_x": f_x, "y": y}
    if (kernel_zx is None) != (f_z is None):
        raise InputError("other points", expected="kernel_zx and f_z", got="one of them")
    if kernel_zx is not None:
        given |= {"kernel_zx": kernel_zx, "f_z": f_z}
    kernel_xx, f_x, y, *others = floats(**given)
    unit = unit_roundoff(given["kernel_xx"])
    if f_x.ndim != 2 or not f_x.size:
        raise InputError("f_x", expected="axes [n, c], not empty", got=f"shape {f_x.shape}")
    _check_shape("y", y, f_x.shape)
    _check_kernel("kernel_xx", kernel_xx, (len(f_x), *f_x.shape))
    if others:
        _check_shape("f_z", others[1], (*others[1].shape[:1], f_x.shape[1]))
        _check_kernel("kernel_zx", others[0], (len(others[1]), *f_x.shape), like=kernel_xx)
    check_finite("frozen", {"kernel_xx": kernel_xx, "f_x": f_x, "y": y, "others": others})
    n = len(f_x) if n is None else n
    check_count("n", n, low=1)
    moments = check_times(times, step, endless=True)
    spectrum = decompose(kernel_xx, unit)
    largest = check_spectrum("kernel_xx", spectrum, unit, "belongs in kernel_zx")
    rate = None
    if step is not None:
        _check_step(
            step, largest, n, unit * len(spectrum.values), endless=bool(np.isinf(moments).any())
        )
        rate, moments = step / n, moments * n
    return evolve(spectrum, f_x, y, tuple(others), jnp.asarray(moments / n, f_x.dtype), rate)


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


def check_times(times: Any, step: float | None, *, endless: bool = False) -> np.ndarray:
    """The times as a float64 array, checked; with `endless`, ∞ is one."""
    try:
        moments = np.asarray(times, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("times", expected="a list of numbers", got=f"{times}") from error
    if moments.ndim != 1:
        raise InputError("times", expected="a list of numbers", got=f"shape {moments.shape}")
    good = (np.isfinite(moments) | (endless & np.isinf(moments))) & (moments >= 0)
    expected = f"{'' if endless else 'finite '}numbers ≥ 0"
    if step is not None:
        check_number("step", step, low=0, low_open=True)
        good &= moments == np.round(moments)
        expected = "numbers of steps: whole, ≥ 0"
    if not good.all():
        raise InputError("times", expected=expected, got=f"{moments[~good][0]:g}")
    return moments


# ---------------------------------------------------------------- spectra


class Spectrum(NamedTuple):
    """The eigendecomposition of a symmetric kernel of m rows, as a matrix.

    Attributes:
        values: eigenvalues [m], growing; those that count as 0 are 0.
        vectors: eigenvectors as columns [m, m].
        lowest, largest: the least eigenvalue as computed, and the largest |eigenvalue|.
        asymmetry: the largest difference between mirrored entries.
    """

    values: Array
    vectors: Array
    lowest: Array
    largest: Array
    asymmetry: Array


def unit_roundoff(kernel: Any) -> float:
    """u of the dtype of a kernel: its entries are off by u of their size, or more."""
    dtype = jnp.asarray(kernel).dtype
    return float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32).eps) / 2


@jax.jit
def decompose(kernel: jax.Array, unit: float) -> Spectrum:
    """Eigenvalues, 0 up to 2·max(m·u·λ_max, −λ_min) (see `frozen`), and eigenvectors.

    Args:
        kernel: [n, n, c, c] or [n, n], float32 or float64.
        unit: u, see `unit_roundoff`.
    """
    matrix = flatten(kernel)
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    largest = jnp.max(jnp.abs(values))
    error = jnp.maximum(len(values) * unit * largest, -values[0])
    kept = jnp.where(values > 2 * error, values, 0)
    return Spectrum(kept, vectors, values[0], largest, jnp.max(jnp.abs(matrix - matrix.T)))


def check_spectrum(what: str, found: Spectrum, unit: float, mixed: str) -> float:
    """λ_max; raise unless the kernel is symmetric and PSD up to rounding.

    Allowed are 20·m·u·λ_max for a matrix of size m: a decomposition errs by about m·u of it, and
    computing the kernel by a few. From a tenth of that on negative eigenvalues are a warning.

    Args:
        what: the kernel, as the user knows it.
        found, unit: see `decompose`.
        mixed: what to do with a mixed kernel.
    """
    lowest, largest, asymmetry = (
        float(value) for value in (found.lowest, found.largest, found.asymmetry)
    )
    rounding = 2 * len(found.values) * unit * largest
    if asymmetry > 10 * rounding:
        raise InputError(
            what,
            expected="a symmetric kernel of the points X̃ with themselves",
            got=f"entries that differ by {asymmetry:.2g}",
            fix=f"a mixed kernel Θ(X, X̃) {mixed}",
        )
    spread = f"a least eigenvalue of {lowest:.2g}, the largest in size {largest:.2g}"
    if lowest < -10 * rounding:
        raise InputError(
            what,
            expected="a positive semidefinite kernel",
            got=spread,
            fix="compute it in float64 if this is rounding",
        )
    if lowest < -rounding:
        warnings.warn(
            f"{what}: {spread}; those up to {-2 * lowest:.2g} count as 0; "
            "compute it in float64 for more",
            stacklevel=3,
        )
    return largest


def _check_step(step: float, largest: float, n: int, rounding: float, *, endless: bool) -> None:
    """Raise if the steps diverge, or for endless ones if they have no limit."""
    over = step * largest * (1 - 20 * rounding) > 2 * n
    if over or (endless and step * largest >= 2 * n):
        raise InputError(
            "step",
            expected=f"{'less than' if endless else 'at most'} 2N/λ_max = {2 * n / largest:.4g}",
            got=f"{step:g}",
        )


@jax.jit
def evolve(
    spectrum: Spectrum,
    f_x: jax.Array,
    y: jax.Array,
    others: tuple[jax.Array, ...],
    moments: jax.Array,
    rate: float | None,
) -> Trajectories:
    """The outputs at t/N = `moments`, or after `moments` steps with η/N = `rate`; see `frozen`.

    Args:
        spectrum: of Θ(X̃, X̃).
        f_x, y: f_0(X̃) and targets, [n, c].
        others: Θ(Z, X̃) and f_0(Z), or empty.
        moments: [t].
        rate: for steps.
    """
    positive = spectrum.values[None, :, None] > 0
    values = jnp.where(positive, spectrum.values[None, :, None], 1)
    moments = moments[:, None, None]
    if rate is None:
        left, gone = jnp.exp(-values * moments), -jnp.expm1(-values * moments)
    else:
        reach = rate * values
        left = jnp.power(1 - reach, moments)
        # Near 0 the power has lost the digits of what is gone.
        small = jnp.minimum(reach, 0.5)
        gone = jnp.where(reach < 0.5, -jnp.expm1(moments * jnp.log1p(-small)), 1 - left)
    left, weights = jnp.where(positive, left, 1), jnp.where(positive, gone / values, 0)
    with jax.default_matmul_precision("highest"):
        residual = (f_x - y).reshape(len(spectrum.vectors), -1)
        coordinates = (spectrum.vectors.T @ residual)[None]
        x = y[None] + (spectrum.vectors @ (left * coordinates)).reshape(-1, *y.shape)
        if not others:
            return Trajectories(x, None)
        kernel, f_z = others
        moved = flatten(kernel) @ (spectrum.vectors @ (weights * coordinates))
        return Trajectories(x, f_z[None] - moved.reshape(-1, *f_z.shape))
