"""Image codecs, between images in [-1, 1] and latents: a KL autoencoder, or space-to-depth.

An image codec works on unscaled latents. `sample_latents` multiplies by the config's
`scaling_factor` and `decode_latents` divides by it, so that all other code sees scaled latents
only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Real, UInt8

from contextualstory_jax.config.model_config import AutoencoderKLConfig, SpaceToDepthConfig
from contextualstory_jax.models.attention import attention
from contextualstory_jax.models.layers import (
    conv,
    conv1x1,
    conv3x3,
    group_norm,
    linear,
    upsample_nearest,
)

NORM_EPSILON = 1e-6  # of every norm in the autoencoder; diffusers vae.py resnet_eps


class Moments(NamedTuple):
    """A normal distribution over latents, one variance a value."""

    mean: Float[Array, "*n h w c"]
    logvar: Float[Array, "*n h w c"]  # -inf where the latent is the mean for certain


class ResnetBlock(nnx.Module):
    """Norm, SiLU, convolution, twice; residual.

    Reference: diffusers resnet.py ResnetBlock2D, without time embedding.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        self.norm1 = group_norm(channels_in, groups, NORM_EPSILON)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm2 = group_norm(channels_out, groups, NORM_EPSILON)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.conv_shortcut = (
            None if channels_in == channels_out else conv1x1(channels_in, channels_out)
        )

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h w c"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Halve height and width by a strided convolution.

    Parity: pads below and to the right only, unlike the UNet's.

    Reference: diffusers downsampling.py Downsample2D with padding=0.
    """

    def __init__(self, channels: int):
        self.conv = conv(channels, channels, (3, 3), padding=((0, 1), (0, 1)), stride=2)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Double height and width by repetition, then a convolution.

    Reference: diffusers upsampling.py Upsample2D.
    """

    def __init__(self, channels: int):
        self.conv = conv3x3(channels, channels)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n 2*h 2*w c"]:
        return self.conv(upsample_nearest(x))


class PixelAttention(nnx.Module):
    """Single-head self-attention over all positions; residual.

    Reference: diffusers attention_processor.py Attention as vae.py's mid blocks build it.
    """

    def __init__(self, channels: int, groups: int):
        self.group_norm = group_norm(channels, groups, NORM_EPSILON)
        self.to_q = linear(channels, channels)
        self.to_k = linear(channels, channels)
        self.to_v = linear(channels, channels)
        self.to_out = nnx.List([linear(channels, channels)])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        y = rearrange(self.group_norm(x), "n h w c -> n (h w) 1 c")  # one head
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).reshape(x.shape)


class MidBlock(nnx.Module):
    """Resnet, attention, resnet. Reference: diffusers unet_2d_blocks.py UNetMidBlock2D."""

    def __init__(self, channels: int, groups: int):
        self.resnets = nnx.List(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nnx.List([PixelAttention(channels, groups)])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nnx.Module):
    """Resnets, then half the size but for the last level.

    Reference: diffusers unet_2d_blocks.py DownEncoderBlock2D.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        config: AutoencoderKLConfig,
        last: bool,
    ):
        self.resnets = nnx.List(
            ResnetBlock(channels if i else channels_in, channels, config.norm_num_groups)
            for i in range(config.layers_per_block)
        )
        self.downsamplers = nnx.List([] if last else [Downsample(channels)])

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n p q c"]:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """One resnet more than a down block, then twice the size but for the last level.

    Reference: diffusers unet_2d_blocks.py UpDecoderBlock2D.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        config: AutoencoderKLConfig,
        last: bool,
    ):
        self.resnets = nnx.List(
            ResnetBlock(channels if i else channels_in, channels, config.norm_num_groups)
            for i in range(config.layers_per_block + 1)
        )
        self.upsamplers = nnx.List([] if last else [Upsample(channels)])

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n p q c"]:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Images to the features that `quant_conv` reads moments from.

    Reference: diffusers vae.py Encoder.
    """

    def __init__(self, config: AutoencoderKLConfig):
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv3x3(config.in_channels, channels[0])
        self.down_blocks = nnx.List(
            DownBlock(channels[max(i - 1, 0)], c, config, last=i == len(channels) - 1)
            for i, c in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = group_norm(channels[-1], groups, NORM_EPSILON)
        self.conv_out = conv3x3(channels[-1], 2 * config.latent_channels)

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n p q c"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Output of `post_quant_conv` to images. Reference: diffusers vae.py Decoder."""

    def __init__(self, config: AutoencoderKLConfig):
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv3x3(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nnx.List(
            UpBlock(channels[max(i - 1, 0)], c, config, last=i == len(channels) - 1)
            for i, c in enumerate(channels)
        )
        self.conv_norm_out = group_norm(channels[-1], groups, NORM_EPSILON)
        self.conv_out = conv3x3(channels[-1], config.out_channels)

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n p q c"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Stable Diffusion's autoencoder. Reference: diffusers autoencoder_kl.py AutoencoderKL."""

    def __init__(self, config: AutoencoderKLConfig):
        self.encoder = Encoder(config)
        self.quant_conv = conv1x1(2 * config.latent_channels, 2 * config.latent_channels)
        self.post_quant_conv = conv1x1(config.latent_channels, config.latent_channels)
        self.decoder = Decoder(config)

    def encode(self, pictures: Float[Array, "n h w i"]) -> Moments:
        """The posterior over unscaled latents of images in [-1, 1]."""
        x = pictures.astype(self.quant_conv.kernel[...].dtype)
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "n h w c"]) -> Float[Array, "n p q o"]:
        """Images of unscaled latents, about [-1, 1] but not clipped."""
        x = latents.astype(self.post_quant_conv.kernel[...].dtype)
        return self.decoder(self.post_quant_conv(x))


class SpaceToDepth(nnx.Module):
    """Image codec without parameters or loss: a pixel patch is the channels of a latent position.

    Channel (y * patch + x) * 3 + colour is the pixel in row y and column x of the patch.
    """

    def __init__(self, config: SpaceToDepthConfig):
        self.patch = config.patch

    def encode(self, pictures: Float[Array, "n h w 3"]) -> Moments:
        """The latents themselves, with variance 0, so that every sample is the mean exactly."""
        patch = {"y": self.patch, "x": self.patch}
        mean = rearrange(pictures, "n (h y) (w x) colour -> n h w (y x colour)", **patch)
        return Moments(mean, jnp.full_like(mean, -jnp.inf))

    def decode(self, latents: Float[Array, "n h w c"]) -> Float[Array, "n p q 3"]:
        """The inverse of `encode`."""
        patch = {"y": self.patch, "x": self.patch}
        return rearrange(latents, "n h w (y x colour) -> n (h y) (w x) colour", **patch)


VAE = AutoencoderKL | SpaceToDepth


def make_vae(config: AutoencoderKLConfig | SpaceToDepthConfig) -> VAE:
    """Build the VAE, or the image codec without weights, that a config describes."""
    if isinstance(config, AutoencoderKLConfig):
        return AutoencoderKL(config)
    return SpaceToDepth(config)


def sample_latents(
    moments: Moments, noise: Float[Array, "*n h w c"], scaling_factor: float
) -> Float[Array, "*n h w c"]:
    """Scaled latents sampled from a posterior; zero noise gives its mode."""
    return (moments.mean + jnp.exp(0.5 * moments.logvar) * noise) * scaling_factor


def decode_latents(
    vae: VAE, latents: Float[Array, "n h w c"], scaling_factor: float
) -> Float[Array, "n p q o"]:
    """Images of scaled latents, about [-1, 1] but not clipped."""
    return vae.decode(latents / scaling_factor)


def images_to_float(images: Real[Array, "*batch h w c"]) -> Float[Array, "*batch h w c"]:
    """Levels 0..255 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def images_to_uint8(images: Float[Array, "*batch h w c"]) -> UInt8[Array, "*batch h w c"]:
    """Images in [-1, 1] to levels 0..255, clipped.

    Parity: truncated, not rounded, so that going to float and back may lower a level by one.
    """
    return (jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
