"""Empirical tangent kernels of any network: clean, mixed, masked.

Θ(x, x') = J(x) J(x')ᵀ with J = ∂f/∂θ [classes, parameters]. Of a masked network f(x; γ⊙m⊙θ) the
Jacobian is J_m = J(γ⊙m⊙θ)·diag(γ⊙m): pruned weights contribute nothing, since they never move
(theory §0). With x clean and x' adversarial Θ(X, X̃) is the mixed tangent kernel of adversarial
training; it is not symmetric.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntk_awt.errors import InputError, check_same_tree, choose
from ntk_awt.masks import effective, masked
from ntk_awt.types import ApplyFn, Gain, Images, Mask, Params

JACOBIANS = ("masked", "full")
ENGINES = ("products", "contraction")


def _neural_tangents(apply: ApplyFn, engine: str):
    """neural-tangents' kernel function of `apply`: axes [n1, n2, c, c], nothing traced out."""
    from ntk_awt.kernels import compat  # it costs seconds: only when a kernel is wanted

    implementation = {
        "products": compat.NtkImplementation.NTK_VECTOR_PRODUCTS,
        "contraction": compat.NtkImplementation.JACOBIAN_CONTRACTION,
    }[engine]
    return compat.empirical_ntk_fn(apply, trace_axes=(), vmap_axes=0, implementation=implementation)


def empirical(
    apply: ApplyFn,
    params: Params,
    x1: Images,
    x2: Images | None = None,
    *,
    mask: Mask | None = None,
    gain: Gain | None = None,
    jacobian: str = "masked",
    engine: str = "products",
) -> Float[Array, "n1 n2 c c"]:
    """Empirical tangent kernel Θ(x1, x2) of a dense or masked network, all pairs of outputs.

    Traceable and differentiable in `params`, the inputs and the gain; jit it with `apply`,
    `jacobian` and `engine` static.

    Args:
        apply: `(params, x[n, *shape]) -> logits[n, c]`; image by image (no batch statistics).
        params: θ, a pytree of float arrays.
        x1: [n1, *shape].
        x2: [n2, *shape]; x1 if not given.
        mask: m, booleans with the structure and shapes of θ; everything kept if not given.
        gain: γ, scalars with the structure of θ; 1 if not given.
        jacobian: "masked" for J·diag(γ⊙m), the gradient with respect to θ; "full" for the gradient
            with respect to the effective weights γ⊙m⊙θ, pruned ones included (the convention of
            Neural Tangent Transfer, Liu & Zenke, 2020).
        engine: "products" (vector products; less memory, fewer operations) or "contraction"
            (explicit Jacobians), both neural-tangents'.

    Returns:
        Θ [n1, n2, c, c], the dtype of the parameters: entry [i, j, a, b] is
        ⟨∂f_a(x1_i)/∂θ, ∂f_b(x2_j)/∂θ⟩.

    Raises:
        InputError: a mask or gain that does not fit the parameters (the leaf is named), a gain
            without a mask, images of different shapes, an unknown option.

    Source: theory §0; engines: Novak et al., "Fast finite width neural tangent kernel" (2022).

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: x @ w                 # Θ = ⟨x, x'⟩·I
        >>> kernel = empirical(apply, jnp.ones((2, 2)), jnp.array([[1.0, 2.0]]))
        >>> kernel.shape, kernel[0, 0].tolist()
        ((1, 1, 2, 2), [[5.0, 0.0], [0.0, 5.0]])
    """
    choose("jacobian", jacobian, JACOBIANS)
    choose("engine", engine, ENGINES)
    if x2 is not None and x1.shape[1:] != x2.shape[1:]:
        raise InputError("x2", expected=f"images of shape {x1.shape[1:]}", got=f"{x2.shape[1:]}")
    if mask is not None:
        check_same_tree("mask", mask, params)
        gain = jax.tree.map(lambda w: jnp.ones((), w.dtype), params) if gain is None else gain
        check_same_tree("gain", gain, params, scalars=True)
        if jacobian == "masked":
            apply = masked(apply, mask, gain)
        else:
            params = effective(params, mask, gain)
    elif gain is not None:
        raise InputError("gain", expected="a mask with it", got="no mask")
    return _neural_tangents(apply, engine)(x1, x2, params)
