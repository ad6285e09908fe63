"""Networks: layers, convolution, a zoo of them, and Flax modules of the user's."""

from ntk_awt.models.zoo import (
    ACTIVATIONS,
    DISTRIBUTIONS,
    MODELS,
    POOLINGS,
    Affine,
    Classifier,
    Conv,
    Dense,
    average_pool,
    build,
    check,
    conv4,
    lenet5,
    max_pool,
    mlp,
)

__all__ = [
    "ACTIVATIONS",
    "DISTRIBUTIONS",
    "MODELS",
    "POOLINGS",
    "Affine",
    "Classifier",
    "Conv",
    "Dense",
    "average_pool",
    "build",
    "check",
    "conv4",
    "lenet5",
    "max_pool",
    "mlp",
]
