"""A ResNet-18 for 32×32 images with group normalisation, as any user would write it in Flax."""

import jax
from flax import nnx

GROUPS = 8


class Block(nnx.Module):
    """Two 3×3 convolutions with normalisation, and the skip connection around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), strides=stride, **options)
        self.norm1 = nnx.GroupNorm(outputs, num_groups=GROUPS, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), **options)
        self.norm2 = nnx.GroupNorm(outputs, num_groups=GROUPS, rngs=rngs)
        self.straight = inputs == outputs and stride == 1
        if not self.straight:
            self.skip = nnx.Conv(inputs, outputs, (1, 1), strides=stride, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return jax.nn.relu(y + (x if self.straight else self.skip(x)))


class ResNet18(nnx.Module):
    """After He et al., "Deep residual learning for image recognition" (2016), for small images."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(64, num_groups=GROUPS, rngs=rngs)
        self.names = []
        channels = 64
        for stage, width in enumerate((64, 128, 256, 512)):
            for part in range(2):
                stride = 2 if stage > 0 and part == 0 else 1
                self.names.append(f"block{stage + 1}_{part + 1}")
                setattr(self, self.names[-1], Block(channels, width, stride, rngs=rngs))
                channels = width
        self.names = tuple(self.names)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.stem(x)))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(x.mean((1, 2)))
