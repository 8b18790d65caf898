"""InceptionV3 in the two variants that metrics use: torchvision's, and that of FID.

FID's is the network of TensorFlow's 2015 graph in torchvision's names. It differs in three poolings
of the blocks A, C and E: averages leave padding out, and the last block takes the maximum.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from contextualstory_jax.models.layers import BatchNorm, conv, linear

SIDE = 299  # pixels of an input image
FEATURES = 2048
FID_CLASSES = 1008  # logits of TensorFlow's graph


class BasicConv2d(nnx.Module):
    """Convolution without bias, batch norm, ReLU. Reference: torchvision BasicConv2d."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        same: bool = False,
    ):
        padding = tuple((size // 2, size // 2) if same else (0, 0) for size in kernel_size)
        self.conv = conv(
            channels_in, channels_out, kernel_size, stride=stride, padding=padding, bias=False
        )
        self.bn = BatchNorm(channels_out, epsilon=1e-3)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        return jax.nn.relu(self.bn(self.conv(x)))


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """Halve the size: maxima of 3 x 3 windows that lie inside."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


_POOL_SAME = {"window_shape": (3, 3), "strides": (1, 1), "padding": ((1, 1), (1, 1))}
max_pool_same = functools.partial(nnx.max_pool, **_POOL_SAME)
average_padded = functools.partial(nnx.avg_pool, **_POOL_SAME, count_include_pad=True)
average_inside = functools.partial(nnx.avg_pool, **_POOL_SAME, count_include_pad=False)


def join(*branches: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
    """Concatenate channels."""
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nnx.Module):
    """Branches of 1x1, 5x5 and two 3x3. Reference: torchvision InceptionA; pytorch-fid's patch."""

    def __init__(self, channels: int, pool_features: int, *, fid: bool):
        self.pool = average_inside if fid else average_padded
        self.branch1x1 = BasicConv2d(channels, 64)
        self.branch5x5_1 = BasicConv2d(channels, 48)
        self.branch5x5_2 = BasicConv2d(48, 64, (5, 5), same=True)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, (3, 3), same=True)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, (3, 3), same=True)
        self.branch_pool = BasicConv2d(channels, pool_features)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        return join(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(self.pool(x)),
        )


class InceptionB(nnx.Module):
    """Halves the size, 288 to 768 channels. Reference: torchvision InceptionB."""

    def __init__(self, channels: int):
        self.branch3x3 = BasicConv2d(channels, 384, (3, 3), stride=2)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, (3, 3), same=True)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, (3, 3), stride=2)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        return join(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            max_pool(x),
        )


class InceptionC(nnx.Module):
    """Branches of 1x7 and 7x1. Reference: torchvision InceptionC; pytorch-fid's patch."""

    def __init__(self, channels: int, channels_7x7: int, *, fid: bool):
        self.pool = average_inside if fid else average_padded
        c7 = channels_7x7
        self.branch1x1 = BasicConv2d(channels, 192)
        self.branch7x7_1 = BasicConv2d(channels, c7)
        self.branch7x7_2 = BasicConv2d(c7, c7, (1, 7), same=True)
        self.branch7x7_3 = BasicConv2d(c7, 192, (7, 1), same=True)
        self.branch7x7dbl_1 = BasicConv2d(channels, c7)
        self.branch7x7dbl_2 = BasicConv2d(c7, c7, (7, 1), same=True)
        self.branch7x7dbl_3 = BasicConv2d(c7, c7, (1, 7), same=True)
        self.branch7x7dbl_4 = BasicConv2d(c7, c7, (7, 1), same=True)
        self.branch7x7dbl_5 = BasicConv2d(c7, 192, (1, 7), same=True)
        self.branch_pool = BasicConv2d(channels, 192)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return join(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(self.pool(x)),
        )


class InceptionD(nnx.Module):
    """Halves the size, 768 to 1280 channels. Reference: torchvision InceptionD."""

    def __init__(self, channels: int):
        self.branch3x3_1 = BasicConv2d(channels, 192)
        self.branch3x3_2 = BasicConv2d(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1 = BasicConv2d(channels, 192)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), same=True)
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), same=True)
        self.branch7x7x3_4 = BasicConv2d(192, 192, (3, 3), stride=2)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        long = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return join(self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(long), max_pool(x))


class InceptionE(nnx.Module):
    """Branches that split into 1x3 and 3x1. Reference: torchvision InceptionE; pytorch-fid's two.

    Args:
        channels: of the input.
        pool: pooling of the last branch.
    """

    def __init__(self, channels: int, pool: functools.partial):
        self.pool = pool
        self.branch1x1 = BasicConv2d(channels, 320)
        self.branch3x3_1 = BasicConv2d(channels, 384)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), same=True)
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), same=True)
        self.branch3x3dbl_1 = BasicConv2d(channels, 448)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, (3, 3), same=True)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), same=True)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), same=True)
        self.branch_pool = BasicConv2d(channels, 192)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return join(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )


class InceptionAux(nnx.Module):
    """The auxiliary classifier, for training alone. Reference: torchvision InceptionAux."""

    def __init__(self, channels: int, classes: int):
        self.conv0 = BasicConv2d(channels, 128)
        self.conv1 = BasicConv2d(128, 768, (5, 5))
        self.fc = linear(768, classes)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
        x = nnx.avg_pool(x, (5, 5), strides=(3, 3))
        return self.fc(self.conv1(self.conv0(x)).mean(axis=(1, 2)))


class InceptionV3(nnx.Module):
    """InceptionV3 in evaluation: no dropout, running statistics, no auxiliary classifier.

    Inputs are images of 299 x 299 pixels, scaled as in the training of the weights.

    Args:
        classes: number of logits.
        fid: FID's pooling instead of torchvision's.
        aux: whether the weights hold an auxiliary classifier.

    Reference: torchvision Inception3; pytorch-fid inception.py.
    """

    def __init__(self, classes: int, *, fid: bool = False, aux: bool = False):
        average = average_inside if fid else average_padded
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, (3, 3), same=True)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, (3, 3))
        self.Mixed_5b = InceptionA(192, 32, fid=fid)
        self.Mixed_5c = InceptionA(256, 64, fid=fid)
        self.Mixed_5d = InceptionA(288, 64, fid=fid)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128, fid=fid)
        self.Mixed_6c = InceptionC(768, 160, fid=fid)
        self.Mixed_6d = InceptionC(768, 160, fid=fid)
        self.Mixed_6e = InceptionC(768, 192, fid=fid)
        if aux:
            self.AuxLogits = InceptionAux(768, classes)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average)
        self.Mixed_7c = InceptionE(FEATURES, max_pool_same if fid else average)
        self.fc = linear(FEATURES, classes)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b n"]:
        """Logits."""
        return self.fc(self.features(x))

    def features(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Means over all positions of the last block's outputs."""
        return self.top(self.middle(x))

    def top(self, x: Float[Array, "b p q 768"]) -> Float[Array, "b 2048"]:
        """The features, of what `middle` returned."""
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(axis=(1, 2))

    def middle(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b p q 768"]:
        """Features that the auxiliary classifier takes."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        return self.Mixed_6e(x)
