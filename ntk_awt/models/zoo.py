"""Flax (NNX) networks, each in NTK and in standard parametrisation, and Flax modules of the user's.

A layer with n its fan-in (or, as Glorot's, the average of fan-in and fan-out) computes, with W, b ~
N(0, 1) at initialisation (or W cut off at two standard deviations, of the same variance),

    ntk:       y = (σ_w / √n) · W x + σ_b · b        (the scale is in the forward pass)
    standard:  y = W' x + b',  W' = (σ_w / √n) W,  b' = σ_b b   (the scale is in the weights)

so both draw the same functions; only their gradients, and so their tangent kernels, differ. Source
of the two names: Lee et al., "Wide neural networks of any depth evolve as linear models" (2019),
and Jacot et al., "Neural tangent kernel" (2018).

`build(config, …)` gives a `Network`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ntk_awt.app.config import ModelConfig
from ntk_awt.errors import InputError, choose
from ntk_awt.models.convolution import convolve
from ntk_awt.network import Network
from ntk_awt.types import Key

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "erf": jax.scipy.special.erf,
    "tanh": jnp.tanh,
}
"""Activations by name. GELU is the exact one, as in neural-tangents."""


_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""Standard deviation of N(0, 1) cut off at ±2: the square root of 1 − 4φ(2)/(2Φ(2) − 1)."""

DISTRIBUTIONS: dict[str, Callable[[Key, tuple[int, ...]], Array]] = {
    "normal": jax.random.normal,
    "truncated": jax.nn.initializers.truncated_normal(1 / _TRUNCATED_STD),
}
"""Of initial weights, with variance 1, by name."""


class Affine(nnx.Module):
    """What a dense and a convolutional layer share: two parameters and their scales.

    Args:
        kernel_shape: [*window, in, out], Flax's order.
        config: parametrisation, σ_w and σ_b.
        rngs: source of the initial values.
    """

    def __init__(self, kernel_shape: Sequence[int], config: ModelConfig, *, rngs: nnx.Rngs):
        *window, inputs, outputs = kernel_shape
        fan = inputs if config.fan == "in" else (inputs + outputs) / 2
        weight_scale = config.weight_std / math.sqrt(math.prod(window) * fan)
        scales = (weight_scale, config.bias_std)
        stored, self.scales = (
            ((1.0, 1.0), scales) if config.parametrization == "ntk" else (scales, (1.0, 1.0))
        )
        draw = DISTRIBUTIONS[config.distribution]
        self.kernel = nnx.Param(stored[0] * draw(rngs.params(), tuple(kernel_shape)))
        self.bias = nnx.Param(stored[1] * jax.random.normal(rngs.params(), (kernel_shape[-1],)))

    def linear(self, x: Array, kernel: Array) -> Array:
        """The layer without scale and bias."""
        return x @ kernel

    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        weight_scale, bias_scale = self.scales
        y = self.linear(x, self.kernel[...])
        y = y if weight_scale == 1.0 else weight_scale * y
        return y + (self.bias[...] if bias_scale == 1.0 else bias_scale * self.bias[...])


class Dense(Affine):
    """Fully connected layer: [n, in] → [n, out]."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__((inputs, outputs), config, rngs=rngs)


class Conv(Affine):
    """Square convolution with stride 1: [n, height, width, in] → [n, height', width', out]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: int,
        config: ModelConfig,
        *,
        padding: str,
        rngs: nnx.Rngs,
    ):
        super().__init__((window, window, inputs, outputs), config, rngs=rngs)
        self.padding = padding

    def linear(self, x: Array, kernel: Array) -> Array:
        """The convolution without scale and bias."""
        return convolve(x, kernel, self.padding)


def _windows(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 2 w2 2 c"]:
    """The 2×2 squares of each image, side by side; an odd last row or column is dropped."""
    n, height, width, channels = x.shape
    height, width = height // 2, width // 2
    return x[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels)


_Entry = tuple[Array, Array, Array]
"""Values, their tangents, and how many entries they stand for."""


@jax.custom_jvp
def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """2×2 max pooling with stride 2; an odd last row or column is dropped.

    Where several entries of a square are the largest, each gets an equal share of the gradient, as
    in any JAX maximum (a pooling primitive gives all of it to the first). Such a gradient is made
    of elementwise masks, which on a CPU are several times faster than the scatter of the primitive.
    """
    return _windows(x).max((2, 4))


@max_pool.defjvp
def _max_pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Entries are compared with each other, as in a tournament.

    JAX's own rule looks for those that equal the result. XLA may compute `x` anew for that and
    round it otherwise (jax-ml/jax#40564); then none does, and the derivative is 0/0.
    """
    (x,), (dx,) = primals, tangents
    values, moved = _windows(x), _windows(dx)
    corners = [(slice(None), slice(None), i, slice(None), j) for i in (0, 1) for j in (0, 1)]
    entries = [(values[at], moved[at], jnp.ones_like(values[at])) for at in corners]
    _, total, winners = functools.reduce(_larger, entries)
    return max_pool(x), total / winners


def _larger(one: _Entry, other: _Entry) -> _Entry:
    """The one with the larger value; where they are equal, both together."""
    (a, da, n), (b, db, m) = one, other
    tangent = jnp.where(a > b, da, jnp.where(b > a, db, da + db))
    return jnp.where(a > b, a, b), tangent, jnp.where(a > b, n, jnp.where(b > a, m, n + m))


def average_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """2×2 average pooling with stride 2; an odd last row or column is dropped."""
    return _windows(x).mean((2, 4))


POOLINGS: dict[str, Callable[[Array], Array]] = {"max": max_pool, "average": average_pool}
"""Poolings by name."""


class Classifier(nnx.Module):
    """Convolutions with pooling, then fully connected layers; an MLP has no convolutions.

    The first layer sees (x − input_mean)/input_std.

    Args:
        shape: of one input, [height, width, channels] or [features].
        num_classes: number of logits.
        blocks: one tuple of convolution widths a block; every block ends with 2×2 pooling.
        hidden: widths of the hidden fully connected layers.
        config: scale of the inputs, activation, pooling, parametrisation, σ_w and σ_b.
        window, padding: of every convolution.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        config: ModelConfig,
        *,
        blocks: Sequence[Sequence[int]] = (),
        hidden: Sequence[int],
        window: int = 3,
        padding: str = "SAME",
        rngs: nnx.Rngs,
    ):
        self.activation = ACTIVATIONS[config.activation]
        self.pool = POOLINGS[config.pooling]
        self.input_scale = (config.input_mean, config.input_std)
        self.conv_names: tuple[tuple[str, ...], ...] = ()
        side, channels = tuple(shape[:2]), shape[-1]
        count = 0
        for block in blocks:
            names = []
            for width in block:
                count += 1
                names.append(f"conv{count}")
                layer = Conv(channels, width, window, config, padding=padding, rngs=rngs)
                setattr(self, names[-1], layer)
                channels = width
                if padding == "VALID":
                    side = tuple(s - window + 1 for s in side)
            side = tuple(s // 2 for s in side)
            self.conv_names += (tuple(names),)
        features = math.prod(side) * channels if blocks else math.prod(shape)
        widths = (features, *hidden, num_classes)
        self.dense_names = tuple(f"dense{i}" for i in range(1, len(widths)))
        for name, inputs, outputs in zip(self.dense_names, widths[:-1], widths[1:], strict=True):
            setattr(self, name, Dense(inputs, outputs, config, rngs=rngs))

    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n c"]:
        mean, std = self.input_scale
        x = x if self.input_scale == (0.0, 1.0) else (x - mean) / std
        for block in self.conv_names:
            for name in block:
                x = self.activation(getattr(self, name)(x))
            x = self.pool(x)
        x = x.reshape(x.shape[0], -1)
        for name in self.dense_names[:-1]:
            x = self.activation(getattr(self, name)(x))
        return getattr(self, self.dense_names[-1])(x)


def mlp(
    shape: Sequence[int], num_classes: int, config: ModelConfig, *, rngs: nnx.Rngs
) -> Classifier:
    """Multi-layer perceptron with hidden widths `config.widths`; images are flattened."""
    return Classifier(shape, num_classes, config, hidden=config.widths, rngs=rngs)


def lenet5(
    shape: Sequence[int], num_classes: int, config: ModelConfig, *, rngs: nnx.Rngs
) -> Classifier:
    """LeNet-5 in Caffe's form: 5×5 convolutions of 20 and 50 channels, then 500 units.

    Source: LeCun et al., "Gradient-based learning applied to document recognition" (1998), with
    the widths of Caffe's `lenet` example, which the pruning literature uses.
    """
    _check_images("lenet5", shape, 16)
    return Classifier(
        shape,
        num_classes,
        config,
        blocks=((20,), (50,)),
        hidden=(500,),
        window=5,
        padding="VALID",
        rngs=rngs,
    )


def conv4(
    shape: Sequence[int], num_classes: int, config: ModelConfig, *, rngs: nnx.Rngs
) -> Classifier:
    """Conv-4: two blocks of 3×3 convolutions (64, 64), (128, 128), then 256 and 256 units.

    Source: Frankle & Carbin, "The lottery ticket hypothesis" (2019), figure 2.
    """
    _check_images("conv4", shape, 4)
    return Classifier(
        shape, num_classes, config, blocks=((64, 64), (128, 128)), hidden=(256, 256), rngs=rngs
    )


MODELS: dict[str, Callable[..., Classifier]] = {"mlp": mlp, "lenet5": lenet5, "conv4": conv4}
"""Models by name: `(shape, num_classes, config, *, rngs) -> nnx.Module`."""


def _check_images(model: str, shape: Sequence[int], smallest: int) -> None:
    if len(shape) != 3 or min(shape[:2]) < smallest:
        raise InputError(
            f"input of {model}",
            expected=f"images of at least {smallest}×{smallest} pixels with a channel axis",
            got=f"shape {tuple(shape)}",
            fix="choose --model mlp or larger images",
        )


def check(config: ModelConfig) -> None:
    """Raise unless the model and the activation of `config` are known."""
    choose("model", config.name, MODELS)
    choose("activation", config.activation, ACTIVATIONS)


def build(config: ModelConfig, shape: Sequence[int], num_classes: int, key: Key) -> Network:
    """The network that `config` describes, as a pure function and its parameters.

    Args:
        config: model, widths, activation, pooling and parametrisation.
        shape: of one input, e.g. (28, 28, 1).
        num_classes: number of logits.
        key: of the initial values.

    Returns:
        `Network(apply, params)`; `params` is a nested dict of float32 arrays such as
        `params["dense1"]["kernel"]` [in, out].

    Raises:
        InputError: unknown model or activation, or images too small for the model.

    Example:
        >>> import jax
        >>> network = build(ModelConfig(widths=(16,)), (8, 8, 1), 10, jax.random.key(0))
        >>> network.apply(network.params, jax.numpy.zeros((3, 8, 8, 1))).shape
        (3, 10)
    """
    check(config)
    return Network.from_nnx(
        MODELS[config.name](shape, num_classes, config, rngs=nnx.Rngs(params=key))
    )
