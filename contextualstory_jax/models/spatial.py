"""Layers over one frame at a time: Stable Diffusion's resnet blocks and transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from contextualstory_jax.config.model_config import UNetConfig
from contextualstory_jax.models.attention import Attention, FeedForward, KeysValues
from contextualstory_jax.models.layers import (
    conv,
    conv1x1,
    conv3x3,
    group_norm,
    layer_norm,
    linear,
    upsample_nearest,
)


def per_branch(
    x: Float[Array, "b *rest"], other: Float[Array, "bn *others"]
) -> Float[Array, "bn *rest"]:
    """Repeat each story for the branches of guidance that `other` holds of it, one or more.

    Branches differ by their text alone, so what lies before the first text is computed once.
    """
    return jnp.repeat(x, other.shape[0] // x.shape[0], axis=0)


class ResnetBlock2D(nnx.Module):
    """Norm, SiLU, convolution, twice, the time embedding added between; residual.

    Reference: diffusers 0.21 resnet.py ResnetBlock2D.
    """

    def __init__(self, config: UNetConfig, channels_in: int, channels_out: int, time_dim: int):
        self.norm1 = group_norm(channels_in, config.norm_num_groups, config.norm_eps)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.time_emb_proj = linear(time_dim, channels_out)
        self.norm2 = group_norm(channels_out, config.norm_num_groups, config.norm_eps)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.conv_shortcut = (
            None if channels_in == channels_out else conv1x1(channels_in, channels_out)
        )

    def time_shift(self, temb: Float[Array, "b f t"]) -> Float[Array, "b f c"]:
        """Shift that the time embedding adds to every pixel."""
        return self.time_emb_proj(jax.nn.silu(temb))

    def __call__(
        self, x: Float[Array, "b f h w i"], shift: Float[Array, "#b f c"]
    ) -> Float[Array, "b f h w c"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = h + per_branch(shift, h)[:, :, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Halve height and width, rounding up, by a strided convolution with padding on all sides."""

    def __init__(self, channels: int):
        self.conv = conv(channels, channels, (3, 3), padding=((1, 1), (1, 1)), stride=2)

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f (h+1)//2 (w+1)//2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Double height and width by repetition, less the last row or column of an odd skip's size.

    Cropping what was doubled is nearest interpolation to a size one less, as the original's.
    A convolution follows.
    """

    def __init__(self, channels: int):
        self.conv = conv3x3(channels, channels)

    def __call__(
        self, x: Float[Array, "b f h w c"], height: int, width: int
    ) -> Float[Array, "b f {height} {width} c"]:
        return self.conv(upsample_nearest(x)[:, :, :height, :width])


class SpatialTransformerBlock(nnx.Module):
    """Self-attention within a frame, cross-attention to the frame's sentence, feed-forward.

    Reference: videoldm_transformer_blocks.py BasicConditionalTransformerBlock.
    """

    def __init__(self, dim: int, heads: int, text_dim: int):
        self.norm1 = layer_norm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = layer_norm(dim)
        self.attn2 = Attention(dim, heads, text_dim)
        self.norm3 = layer_norm(dim)
        self.ff = FeedForward(dim)

    def __call__(
        self, x: Float[Array, "b f s c"], text: KeysValues, see_first_frame: bool
    ) -> Float[Array, "bn f s c"]:
        y = self.norm1(x)
        k, v = self.attn1.keys_values(y)
        if see_first_frame:  # frame 0 sees its own tokens twice, as in the original
            k, v = (
                jnp.concatenate([a, jnp.broadcast_to(a[:, :1], a.shape)], axis=2) for a in (k, v)
            )
        x = per_branch(x + self.attn1(y, (k, v)), text[0])
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """Norm, projection, blocks, projection, residual. Reference: Transformer2DConditionModel."""

    def __init__(self, config: UNetConfig, channels: int, heads: int):
        project = linear if config.use_linear_projection else conv1x1
        self.norm = group_norm(channels, config.norm_num_groups, 1e-6)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nnx.List(
            SpatialTransformerBlock(channels, heads, config.cross_attention_dim)
            for _ in range(config.transformer_layers_per_block)
        )
        self.proj_out = project(channels, channels)

    def text_keys_values(self, text: Float[Array, "b f l d"]) -> list[KeysValues]:
        """Each block's cross-attention keys and values: independent of the denoising step."""
        return [block.attn2.keys_values(text) for block in self.transformer_blocks]

    def __call__(
        self, x: Float[Array, "b f h w c"], text: list[KeysValues], see_first_frame: bool
    ) -> Float[Array, "bn f h w c"]:
        b, f, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, f, h * w, c)
        for block, keys_values in zip(self.transformer_blocks, text, strict=True):
            y = block(y, keys_values, see_first_frame)
        return per_branch(x, y) + self.proj_out(y.reshape(-1, f, h, w, c))
