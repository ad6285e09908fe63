"""Analytic kernels of infinitely wide networks, dense and masked (theory E2, E4).

A masked layer computes y = σ_w·γ/√n · (m⊙W) x + σ_b·b with W, b ~ N(0, 1), fan-in n, a mask that
keeps the share p = E m of the weights and the share s = E m·w² of their energy, and the
energy-preserving gain γ = 1/√s. As n → ∞, with T and Ṫ the expectations of φφ' and φ̇φ̇' under the
covariance NNGP of the layer below,

    NNGP' = σ_w²·A(T) + σ_b²,
    NTK'  = (p/s)·σ_w²·A(T) + σ_b² + σ_w²·A(Ṫ·NTK),

where A is the identity in a dense layer and the average over the window in a convolution. A random
mask has s = p: its NTK is the dense one. A magnitude mask has s > p: its NTK is smaller.

Everything here is in NTK parametrisation (the scale is in the forward pass). In the standard one
the tangent kernel grows with the width and has no such limit.

Importing this module imports neural-tangents, which takes seconds; `ntk_awt.kernels` does not.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import scipy.special
from jaxtyping import Array, Float

from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError, check_count, check_finite, check_number, choose
from ntk_awt.kernels.compat import stax
from ntk_awt.types import Images, Key, widened

Layer: TypeAlias = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
"""A layer of neural-tangents: `(init_fn, apply_fn, kernel_fn)`."""

KINDS = ("random", "magnitude")

TANH_DEGREE = 64
"""Gauss–Hermite nodes an axis for tanh, the one activation without a closed form.

Largest relative error of T and Ṫ by the variance of the pre-activations, reached at equal inputs:
3e-7 at 1, 7e-5 at 2 (the default σ_w² with inputs of mean square 1), 4e-3 at 4.
"""


class Kernels(NamedTuple):
    """Both kernels of an infinitely wide network with scalar output, without unit.

    With C outputs the kernels are ntk ⊗ I_C and nngp ⊗ I_C: different outputs are uncorrelated.

    Attributes:
        ntk: Θ [n1, n2], the limit of the empirical tangent kernel at initialisation.
        nngp: [n1, n2], the covariance of the outputs at initialisation.
    """

    ntk: Float[Array, "n1 n2"]
    nngp: Float[Array, "n1 n2"]


class Analytic(NamedTuple):
    """An infinitely wide network.

    Attributes:
        kernel_fn: `(x1[n1, *shape], x2[n2, *shape] | None) -> Kernels`, compiled, differentiable;
            x2 = x1 if not given. float32, or float64 under `jax.enable_x64`. Raises `InputError`
            without an image, and where a value is NaN or too large for the dtype.
        layer: the same network as a layer of neural-tangents, for its other functions; its
            parameters hold (W, b, mask) of each layer, at the widths of the config.
    """

    kernel_fn: Callable[..., Kernels]
    layer: Layer


class Mixture(NamedTuple):
    """Kernels of a network whose first layer is masked, averaged over drawn masks.

    Attributes:
        mean: the kernels.
        error: their Monte-Carlo standard errors, entry by entry.
    """

    mean: Kernels
    error: Kernels


# ---------------------------------------------------------------- masked layers


def _cut(density: float) -> float:
    """c with P(|w| > c) = density for w ~ N(0, 1)."""
    return -float(scipy.special.ndtri(density / 2))


def moment(density: float, kind: str) -> float:
    """Second moment s = E m·w² that a mask keeps of a weight w ~ N(0, 1) (theory E4).

    A random mask keeps s = p. A magnitude mask keeps |w| > c with p = 2Φ(−c), so
    s = 2[c·φ(c) + Φ(−c)], where φ and Φ are the density and the distribution function of N(0, 1).

    Args:
        density: p in (0, 1].
        kind: "random" or "magnitude".

    Returns:
        s in (0, 1], without unit; 1 at p = 1.

    Raises:
        InputError: density outside (0, 1], unknown kind.

    Example:
        >>> round(moment(0.05, "random"), 4), round(moment(0.05, "magnitude"), 4)
        (0.05, 0.2791)
    """
    check_number("density", density, low=0, high=1, low_open=True)
    choose("kind of mask", kind, KINDS)
    if kind == "random":
        return float(density)
    cut = _cut(density)
    return density + 2 * cut * math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)


@stax.layer
def _masked(layer: Layer, density: float, kind: str, bias_std: float) -> Layer:
    """A dense or convolutional layer of neural-tangents with a mask and the gain 1/√s."""
    init, apply, kernel = layer
    second = moment(density, kind)

    def init_fn(key: Key, shape: Sequence[int]) -> tuple[Any, Any]:
        layer_key, mask_key = jax.random.split(key)
        shape, (w, b) = init(layer_key, shape)
        if kind == "random":
            mask = jax.random.bernoulli(mask_key, density, w.shape)
        else:
            mask = jnp.abs(w) > _cut(density)
        return shape, (w, b, mask.astype(w.dtype))  # not boolean: it sits among the parameters

    def apply_fn(params: Any, x: Any, **kwargs: Any) -> Any:
        w, b, mask = params
        return apply((second**-0.5 * jax.lax.stop_gradient(mask) * w, b), x, **kwargs)

    @stax.requires(**kernel.input_req)  # type: ignore[attr-defined]
    def kernel_fn(k: Any, **kwargs: Any) -> Any:
        out = kernel(k, **kwargs)
        if out.ntk is None:
            return out
        weights = out.nngp - bias_std**2
        ntk = out.ntk + (density / second - 1) * weights
        return out.replace(ntk=ntk).mask(out.mask1, out.mask2)  # masked pixels have no bias either

    return init_fn, apply_fn, kernel_fn


def _window_average(k: Any, window: int, padding: str, batch_ndim: int, step: int) -> Any:
    """A: the mean of K(y + d, y' + d) over the offsets d of a window, axis after axis.

    Args:
        k: [*batch, height, height, width, width], or [*batch, height, width] where `step` is 1.
        batch_ndim: number of batch axes.
        step: 2, or 1 if only the covariances within a pixel are kept.
    """
    for first in range(batch_ndim, k.ndim, step):
        axes = range(first, first + step)
        if padding != "VALID":
            sides = ((window - 1) // 2, window // 2)
            widths = [sides if axis in axes else (0, 0) for axis in range(k.ndim)]
            k = jnp.pad(k, widths, mode="wrap" if padding == "CIRCULAR" else "constant")
        sizes = {axis: k.shape[axis] - window + 1 for axis in axes}
        index = [
            tuple(slice(d, d + sizes[a]) if a in axes else slice(None) for a in range(k.ndim))
            for d in range(window)
        ]
        k = sum(k[shifted] for shifted in index) / window
    return k


def _conv(width: int, window: int, padding: str, weight_std: float, bias_std: float) -> Layer:
    """neural-tangents' Conv, with the average over the window as a sum of slices.

    neural-tangents' own average is a convolution with a diagonal kernel: many times slower on a
    CPU, and in float64 with padding XLA's code for it can crash (jaxlib 0.10, sides of 16 or 32).
    """
    init, apply, plain = stax.Conv(width, (window, window), None, padding, weight_std, bias_std)

    @stax.requires(**plain.input_req)
    def kernel_fn(k: Any, **kwargs: Any) -> Any:
        if k.mask1 is not None or k.mask2 is not None:  # missing pixels: rare, and it knows them
            return plain(k, **kwargs)

        def mean(covariance: Any, batch_ndim: int) -> Any:
            if covariance.ndim == 0:  # the tangent kernel of the input, 0
                return covariance
            step = 1 if k.diagonal_spatial else 2
            return weight_std**2 * _window_average(covariance, window, padding, batch_ndim, step)

        batch_ndim, bias = 1 if k.diagonal_batch else 2, bias_std**2
        nngp = mean(k.nngp, 2) + bias
        return k.replace(
            nngp=nngp,
            ntk=None if k.ntk is None else nngp + mean(k.ntk, 2),
            cov1=mean(k.cov1, batch_ndim) + bias,
            cov2=None if k.cov2 is None else mean(k.cov2, batch_ndim) + bias,
            is_gaussian=True,
            is_input=False,
        )

    return init, apply, kernel_fn


def masked_dense(
    width: int,
    density: float = 1.0,
    *,
    kind: str = "random",
    weight_std: float = 1.0,
    bias_std: float = 0.0,
) -> Layer:
    """Fully connected layer with a mask, for `neural_tangents.stax` (theory E4).

    NNGP' = σ_w²·T + σ_b² and NTK' = (p/s)·σ_w²·T + σ_b² + σ_w²·Ṫ·NTK with s = `moment(p, kind)`.
    Density 1 gives neural-tangents' Dense. The mask and its gain 1/√s are in the forward pass of
    the finite layer too, so neural-tangents' empirical kernels tend to this limit.

    Args:
        width: number of outputs of the finite layer.
        density: p in (0, 1]; the fan-in must be large against 1/p.
        kind: "random" (each weight is kept with probability p) or "magnitude" (kept if |w| > c).
        weight_std, bias_std: σ_w and σ_b.

    Returns:
        `(init_fn, apply_fn, kernel_fn)`; parameters (W, b, mask), the mask without gradient.

    Raises:
        InputError: density outside (0, 1], unknown kind.

    Source: theory E4; layer: Novak et al., "Neural tangents" (2020).

    Example:
        >>> import jax.numpy as jnp
        >>> _, _, kernel_fn = masked_dense(1, 0.05, kind="magnitude")
        >>> kernels = kernel_fn(jnp.ones((1, 4)), None, ("nngp", "ntk"))
        >>> round(float(kernels.nngp[0, 0]), 4), round(float(kernels.ntk[0, 0]), 4)  # ntk = p/s
        (1.0, 0.1791)
    """
    return _masked(stax.Dense(width, weight_std, bias_std), density, kind, bias_std)


def masked_conv(
    width: int,
    window: int,
    density: float = 1.0,
    *,
    kind: str = "random",
    weight_std: float = 1.0,
    bias_std: float = 0.0,
    padding: str = "SAME",
) -> Layer:
    """Square convolution with stride 1 and a mask, for `neural_tangents.stax` (theory E4).

    NNGP' = σ_w²·A(T) + σ_b² and NTK' = (p/s)·σ_w²·A(T) + σ_b² + σ_w²·A(Ṫ·NTK), where A averages
    over the window (padding counts as zeros). Density 1 gives the kernels of neural-tangents' Conv.

    Args:
        width: number of output channels of the finite layer.
        window: side of the window, in pixels.
        padding: "SAME", "VALID" or "CIRCULAR".
        density, kind, weight_std, bias_std: as in `masked_dense`.

    Returns:
        `(init_fn, apply_fn, kernel_fn)`; parameters (W, b, mask), the mask without gradient.

    Raises:
        InputError: density outside (0, 1], unknown kind or padding.

    Source: theory E4; layer: Novak et al., "Neural tangents" (2020).

    Example:
        >>> import jax.numpy as jnp
        >>> _, _, kernel_fn = masked_conv(1, 3, 0.05, kind="magnitude", padding="CIRCULAR")
        >>> kernel = kernel_fn(jnp.ones((1, 4, 4, 2)), None, "ntk")
        >>> kernel.shape, round(float(kernel.min()), 4)  # all pairs of pixels of a constant image
        ((1, 1, 4, 4, 4, 4), 0.1791)
    """
    choose("padding", padding, ("SAME", "VALID", "CIRCULAR"))
    conv = _conv(width, window, padding, weight_std, bias_std)
    return _masked(conv, density, kind, bias_std)


# ---------------------------------------------------------------- networks


class _Shape(NamedTuple):
    """Convolution widths of each block, then hidden widths of the fully connected layers."""

    blocks: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]
    window: int = 3
    padding: str = "SAME"


_CONVOLUTIONAL = {
    "lenet5": _Shape(((20,), (50,)), (500,), 5, "VALID"),
    "conv4": _Shape(((64, 64), (128, 128)), (256, 256)),
}


def _tanh() -> Layer:
    with warnings.catch_warnings():  # it warns that the quadrature has an error, given above
        warnings.simplefilter("ignore", UserWarning)
        return stax.ElementwiseNumerical(
            jnp.tanh, TANH_DEGREE, lambda x: 1 - jnp.square(jnp.tanh(x))
        )


def _relu() -> Layer:
    """neural-tangents' ReLU on covariances divided by a power of two, and multiplied by it after.

    ReLU is homogeneous: T(c·Σ) = c·T(Σ), Ṫ(c·Σ) = Ṫ(Σ). The closed form squares variances, which
    in float32 is infinite from 1.8e19 on. Dividing by powers of two is exact.
    """
    init, apply, plain = stax.Relu()

    @stax.requires(**plain.input_req)
    def kernel_fn(k: Any, **kwargs: Any) -> Any:
        parts = {name: getattr(k, name) for name in ("nngp", "cov1", "cov2")}
        parts = {name: part for name, part in parts.items() if part is not None}
        variances = [jnp.max(part) for name, part in parts.items() if name != "nngp"]
        largest = jax.lax.stop_gradient(jnp.max(jnp.stack(variances)))
        usual = jnp.isfinite(largest) & (largest > 0)
        _, exponent = jnp.frexp(jnp.where(usual, largest, 1))
        scale = jnp.ldexp(jnp.ones_like(largest), exponent - 1)
        out = plain(k.replace(**{name: part / scale for name, part in parts.items()}), **kwargs)
        return out.replace(**{name: scale * getattr(out, name) for name in parts})

    return init, apply, kernel_fn


_ACTIVATIONS: dict[str, Callable[[], Layer]] = {
    "relu": _relu,
    "gelu": stax.Gelu,
    "erf": stax.Erf,
    "tanh": _tanh,
}


def _check(config: ModelConfig, shape: Sequence[int]) -> None:
    """Raise unless the limit of `config` exists and is known."""
    choose("model", config.name, ("mlp", *_CONVOLUTIONAL))
    choose("activation", config.activation, _ACTIVATIONS)
    if config.parametrization != "ntk":
        raise InputError(
            "parametrization of an analytic kernel",
            expected="ntk",
            got=config.parametrization,
            fix="the kernel of the standard one grows with the width: set parametrization='ntk'",
        )
    plain = {"fan": "in", "distribution": "normal", "input_mean": 0.0, "input_std": 1.0}
    for name, wanted in plain.items():
        if (found := getattr(config, name)) != wanted:
            what = f"{name} of an analytic kernel"
            raise InputError(what, expected=f"{wanted}", got=f"{found}")
    if config.activation == "tanh" and config.bias_std == 0:
        raise InputError(
            "bias_std of an analytic kernel with tanh",
            expected="a number > 0",
            got="0",
            fix="its quadrature divides by variances, which are 0 on black pixels without a bias",
        )
    if config.name == "mlp":
        return
    if config.pooling != "average":
        raise InputError(
            "pooling of an analytic kernel",
            expected="average",
            got=config.pooling,
            fix="a maximum has no closed form: set pooling='average'",
        )
    smallest = {"lenet5": 16, "conv4": 4}[config.name]
    if len(shape) != 3 or min(shape[:2]) < smallest:
        raise InputError(
            f"input of {config.name}",
            expected=f"images of at least {smallest}×{smallest} pixels with a channel axis",
            got=f"shape {tuple(shape)}",
        )


def _per_layer(what: str, value: Any, count: int) -> Sequence[Any]:
    """One value a layer; a single value holds for all of them."""
    values = (value,) * count if isinstance(value, float | int | str) else tuple(value)
    if len(values) != count:
        raise InputError(
            what, expected=f"one value, or one for each of {count} layers", got=f"{len(values)}"
        )
    return values


def _architecture(config: ModelConfig) -> _Shape:
    return _CONVOLUTIONAL.get(config.name) or _Shape((), config.widths)


def _masks(
    config: ModelConfig, density: float | Sequence[float], kind: str | Sequence[str]
) -> list[tuple[float, str]]:
    """Density and kind of each layer's mask."""
    blocks, hidden, *_ = _architecture(config)
    count = sum(map(len, blocks)) + len(hidden) + 1
    densities = _per_layer("density", density, count)
    kinds = _per_layer("kind of mask", kind, count)
    for p, name in zip(densities, kinds, strict=True):
        check_number("density", p, low=0, high=1, low_open=True)
        choose("kind of mask", name, KINDS)
    return [(float(p), name) for p, name in zip(densities, kinds, strict=True)]


def _layers(config: ModelConfig, num_classes: int, masks: list[tuple[float, str]]) -> list[Layer]:
    """The layers of `config`, as in `ntk_awt.models`."""
    blocks, hidden, window, padding = _architecture(config)
    stds = {"weight_std": config.weight_std, "bias_std": config.bias_std}
    rest = iter(masks)

    def dense(width: int) -> Layer:
        density, kind = next(rest)
        return masked_dense(width, density, kind=kind, **stds)

    def conv(width: int) -> Layer:
        density, kind = next(rest)
        return masked_conv(width, window, density, kind=kind, padding=padding, **stds)

    activation = _ACTIVATIONS[config.activation]
    layers = []
    for block in blocks:
        for width in block:
            layers += [conv(width), activation()]
        layers.append(stax.AvgPool((2, 2), (2, 2), "VALID"))
    layers.append(stax.Flatten())
    for width in hidden:
        layers += [dense(width), activation()]
    return [*layers, dense(num_classes)]


def _checked(shape: Sequence[int], *batches: Images | None) -> Any:
    """The images, half precision in float32; raise unless there are some, of that shape."""
    for x in batches:
        if x is not None and tuple(x.shape[1:]) != tuple(shape):
            raise InputError(
                "input of an analytic kernel",
                expected=f"images [n, {', '.join(map(str, shape))}]",
                got=f"shape {tuple(x.shape)}",
            )
        if x is not None:
            check_count("number of images of an analytic kernel", x.shape[0], low=1)
    return widened(batches)


def _finite(kernels: Any, *batches: Images | None) -> Any:
    """The kernels; raise if they are not finite and can be read now (not traced)."""
    leaves = jax.tree.leaves(kernels)
    try:
        finite = all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    except jax.errors.TracerBoolConversionError:
        return kernels
    if not finite:
        check_finite("images", batches)
        dtype = leaves[0].dtype
        larger = ", or compute in float64 (jax.enable_x64)" if dtype == jnp.float32 else ""
        raise InputError(
            "analytic kernel",
            expected=f"values, and squares of variances, that {dtype} can hold",
            got="NaN or infinite ones",
            fix="lower weight_std or the number of layers" + larger,
        )
    return kernels


def network(
    config: ModelConfig,
    shape: Sequence[int],
    num_classes: int,
    *,
    density: float | Sequence[float] = 1.0,
    kind: str | Sequence[str] = "random",
) -> Analytic:
    """The infinitely wide network that `config` describes, dense or masked (theory E2, E4).

    The limit of `models.build(config, …)` in NTK parametrisation as all its hidden widths grow,
    with masks of the given densities and energy-preserving gains. It takes the fan-in of every
    masked layer as infinite. The first layer's is not: leave it dense, with `density=(1.0, p, …)`,
    or accept an error O(1/(dp)) at d inputs a unit, or compute it exactly with `mixture`.

    Convolutional kernels go through covariances between all pairs of pixels: (height·width)²
    numbers a pair of images (and `TANH_DEGREE`² times as many with tanh), so compute a large kernel
    in blocks of images. In float32 the NTK of equal or nearly equal images has a relative error of
    a few 1e-4 with relu, from the square root in its closed form; use float64 where that matters.

    Args:
        config: model, activation, σ_w and σ_b; `parametrization="ntk"`, and `pooling="average"` for
            convolutions. Widths matter only to the finite network `layer`.
        shape: of one input, e.g. (28, 28, 1).
        num_classes: C, number of logits of the finite network; its kernel is Θ ⊗ I_C.
        density: p in (0, 1], one value or one a layer from the input on.
        kind: "random" or "magnitude", one value or one a layer.

    Returns:
        `Analytic(kernel_fn, layer)`.

    Raises:
        InputError: unknown model or activation, standard parametrisation, another fan or
            distribution, scaled inputs, max pooling, tanh without bias, images too small, densities
            or kinds that do not fit.

    Source: theory E2, E4; Jacot et al., "Neural tangent kernel" (2018); Arora et al., "On exact
        computation with an infinitely wide neural net" (2019).

    Example:
        >>> import jax.numpy as jnp
        >>> config = ModelConfig(parametrization="ntk", activation="erf", bias_std=0.0)
        >>> dense = network(config, (4,), 1).kernel_fn(jnp.ones((1, 4)))
        >>> sparse = network(config, (4,), 1, density=0.05, kind="magnitude")
        >>> sparse.kernel_fn(jnp.ones((1, 4))).ntk.item() < 0.5 * dense.ntk.item()
        True
    """
    _check(config, shape)
    masks = _masks(config, density, kind)

    def layer() -> Layer:
        return stax.serial(*_layers(config, num_classes, masks))

    @jax.jit
    def compiled(x1: Images, x2: Images | None) -> Kernels:
        # Made anew for each trace: tanh's nodes would keep the precision of their first use.
        return Kernels(*layer()[2](x1, x2, ("ntk", "nngp")))

    def kernel_fn(x1: Images, x2: Images | None = None) -> Kernels:
        x1, x2 = _checked(shape, x1, x2)
        with jax.default_matmul_precision("highest"):
            return _finite(compiled(x1, x2), x1, x2)

    return Analytic(kernel_fn, layer())


# ---------------------------------------------------------------- masked first layer


def mixture(
    config: ModelConfig,
    shape: Sequence[int],
    *,
    density: float | Sequence[float],
    kind: str | Sequence[str] = "random",
    samples: int = 1024,
    groups: int = 16,
) -> Callable[..., Mixture]:
    """The infinitely wide network whose first layer is masked as well (theory E2).

    Unit j of the first layer keeps its own inputs, m_j ~ Bernoulli(p)^d, and so has its own
    covariance

        Σ_j(x, x') = σ_w²·(1/d) Σ_i (m_ji/p)·x_i·x'_i + σ_b²,

    over the d inputs of a dense unit or the d = window²·channels inputs of a convolution's. As the
    width grows, the kernels behind the activation are the averages over masks of T(Σ_j) for the
    NNGP and of Ṫ(Σ_j)·Σ_j for the NTK; the other layers are analytic. The limit differs from the
    one of a dense first layer by O(1/(dp)). The average is taken over drawn masks, each shared by
    all images; its standard error is the jackknife's over groups of masks.

    Memory: one kernel a group, and the work of one mask at a time.

    Args:
        config, shape: as in `network`; at least one hidden layer.
        density: p in (0, 1], one value or one a layer.
        kind: of the masks, one value or one a layer; the first must be "random" (weights above a
            threshold are not Gaussian, so their units have no Gaussian covariance).
        samples: number of masks, a multiple of `groups`.
        groups: of masks, for the standard error.

    Returns:
        `(key, x1[n1, *shape], x2[n2, *shape] | None) -> Mixture`, compiled.

    Raises:
        InputError: as in `network`; no hidden layer, a first layer that is not random, samples not
            a multiple of groups.

    Source: theory E2; jackknife: Efron & Stein, "The jackknife estimate of variance" (1981).

    Example:
        >>> import jax
        >>> config = ModelConfig(parametrization="ntk")
        >>> kernels = mixture(config, (4,), density=(0.5, 1.0, 1.0), samples=64)
        >>> result = kernels(jax.random.key(0), jax.numpy.ones((2, 4)))
        >>> result.mean.ntk.shape, bool(result.error.ntk[0, 0] < result.mean.ntk[0, 0])
        ((2, 2), True)
    """
    _check(config, shape)
    check_count("groups", groups, low=2)
    if samples < groups or samples % groups:
        raise InputError("samples", expected=f"a multiple of {groups} groups", got=f"{samples}")
    masks = _masks(config, density, kind)
    if len(masks) < 2:
        raise InputError("widths", expected="at least one hidden layer", got="none")
    keep, first = masks[0]
    if first != "random":
        raise InputError("kind of the first layer's mask", expected="'random'", got=repr(first))
    blocks, _, window, padding = _architecture(config)

    def inputs(x: Images) -> Array:
        """What each unit sees: [n, height, width, d], or [n, d]."""
        if not blocks:
            return x.reshape(len(x), -1)
        if padding == "SAME":
            sides = ((window - 1) // 2, window // 2)
            x = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
        height, width = (side - window + 1 for side in x.shape[1:3])
        offsets = itertools.product(range(window), repeat=2)
        return jnp.concatenate([x[:, d : d + height, e : e + width] for d, e in offsets], axis=-1)

    @jax.jit
    def compiled(key: Key, x1: Images, x2: Images | None) -> Mixture:
        dense = stax.Dense(1, config.weight_std, config.bias_std)
        head = stax.serial(dense, _ACTIVATIONS[config.activation]())[2]
        tail = stax.serial(*_layers(config, 1, masks)[2 if blocks else 3 :])[2]
        x1, x2 = jax.tree.map(inputs, (x1, x2))

        def unit(key: Key) -> Any:
            """One unit and its mask: a dense unit on the inputs x·m/√p, at every position alike."""
            scale = jax.random.bernoulli(key, keep, x1.shape[-1:]).astype(x1.dtype) / keep**0.5
            masked = jax.tree.map(lambda x: x * scale, (x1, x2))
            return head(*masked, diagonal_batch=True, diagonal_spatial=False)

        def arrays(kernel: Any) -> dict[str, Array | None]:
            return {name: getattr(kernel, name) for name in ("nngp", "ntk", "cov1", "cov2")}

        template = unit(key)
        zeros = jax.tree.map(jnp.zeros_like, arrays(template))

        def group(key: Key) -> dict[str, Array | None]:
            """Mean over the masks of one group."""

            def add(total: Any, key: Key) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, arrays(unit(key))), None

            keys = jax.random.split(key, samples // groups)
            total, _ = jax.lax.scan(add, zeros, keys)
            return jax.tree.map(lambda a: a / len(keys), total)

        def finish(means: dict[str, Array | None]) -> Kernels:
            return Kernels(*tail(template.replace(**means), None, ("ntk", "nngp")))

        means = jax.lax.map(group, jax.random.split(key, groups))
        mean = jax.tree.map(lambda a: a.mean(0), means)

        def without(group: dict[str, Array | None]) -> Kernels:
            """The kernels from all other groups."""
            rest = jax.tree.map(lambda m, g: (groups * m - g) / (groups - 1), mean, group)
            return finish(rest)

        error = jax.tree.map(
            lambda a: jnp.sqrt((groups - 1) * a.var(0)), jax.lax.map(without, means)
        )
        return Mixture(finish(mean), error)

    def kernel_fn(key: Key, x1: Images, x2: Images | None = None) -> Mixture:
        x1, x2 = _checked(shape, x1, x2)
        with jax.default_matmul_precision("highest"):
            return _finite(compiled(key, x1, x2), x1, x2)

    return kernel_fn
