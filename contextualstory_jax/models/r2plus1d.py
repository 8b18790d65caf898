"""R(2+1)D-18, whose features of a story's frames the Frechet story distance compares.

Modules nest and are named as in torchvision's `r2plus1d_18`. Lists take the place of its instances
of `Sequential`, with the same numbers.
"""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from contextualstory_jax.models.layers import BatchNorm, conv, linear

FEATURES = 512
CLASSES = 400  # of Kinetics


def spatial(channels_in: int, channels_out: int, size: int, stride: int) -> nnx.Conv:
    """A convolution over height and width."""
    half = size // 2
    padding = ((0, 0), (half, half), (half, half))
    kernel, strides = (1, size, size), (1, stride, stride)
    return conv(channels_in, channels_out, kernel, padding=padding, stride=strides, bias=False)


def temporal(channels_in: int, channels_out: int, stride: int) -> nnx.Conv:
    """A convolution over three frames."""
    padding, strides = ((1, 1), (0, 0), (0, 0)), (stride, 1, 1)
    return conv(channels_in, channels_out, (3, 1, 1), padding=padding, stride=strides, bias=False)


class Sequential(nnx.Module):
    """torch.nn.Sequential: layers by their numbers; a number without a layer is a ReLU."""

    def __init__(self, *layers: nnx.Module | None):
        self.count = len(layers)
        for number, layer in enumerate(layers):
            if layer is not None:
                setattr(self, str(number), layer)

    def __call__(self, x: Float[Array, "b _ _ _ _"]) -> Float[Array, "b _ _ _ _"]:
        for number in range(self.count):
            x = getattr(self, str(number), jax.nn.relu)(x)
        return x


def conv_2plus1d(channels_in: int, channels_out: int, middle: int, stride: int) -> Sequential:
    """A spatial, then a temporal convolution. Reference: torchvision Conv2Plus1D."""
    first = spatial(channels_in, middle, 3, stride)
    return Sequential(first, BatchNorm(middle), None, temporal(middle, channels_out, stride))


class BasicBlock(nnx.Module):
    """Two (2+1)D convolutions around a residual. Reference: torchvision BasicBlock."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        # As many parameters as a 3 x 3 x 3 convolution; Parity: the first one's, for both.
        middle = channels_in * channels * 27 // (channels_in * 9 + 3 * channels)
        self.conv1 = Sequential(
            conv_2plus1d(channels_in, channels, middle, stride), BatchNorm(channels), None
        )
        self.conv2 = Sequential(conv_2plus1d(channels, channels, middle, 1), BatchNorm(channels))
        if stride != 1:
            padding, strides = ((0, 0),) * 3, (stride,) * 3
            project = conv(
                channels_in, channels, (1, 1, 1), padding=padding, stride=strides, bias=False
            )
            self.downsample = Sequential(project, BatchNorm(channels))

    def __call__(self, x: Float[Array, "b _ _ _ _"]) -> Float[Array, "b _ _ _ _"]:
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return jax.nn.relu(self.conv2(self.conv1(x)) + shortcut)


class R2Plus1D(nnx.Module):
    """torchvision's r2plus1d_18: a clip to 512 features, the means over its frames and pixels.

    The classes of Kinetics (`fc`) are there to take a published file as it is; nothing reads them.

    Source: Tran et al., A Closer Look at Spatiotemporal Convolutions for Action Recognition;
    torchvision models/video/resnet.py VideoResNet.
    """

    def __init__(self):
        self.stem = Sequential(
            spatial(3, 45, 7, 2), BatchNorm(45), None, temporal(45, 64, 1), BatchNorm(64), None
        )
        self.layer1 = nnx.List([BasicBlock(64, 64, 1), BasicBlock(64, 64, 1)])
        self.layer2 = nnx.List([BasicBlock(64, 128, 2), BasicBlock(128, 128, 1)])
        self.layer3 = nnx.List([BasicBlock(128, 256, 2), BasicBlock(256, 256, 1)])
        self.layer4 = nnx.List([BasicBlock(256, 512, 2), BasicBlock(512, FEATURES, 1)])
        self.fc = linear(FEATURES, CLASSES)

    def __call__(self, clip: Float[Array, "b f h w 3"]) -> Float[Array, "b c"]:
        x = self.stem(clip)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = block(x)
        return x.mean(axis=(1, 2, 3))
