"""Layers across frames: temporal convolution and transformer, blended in by a learned alpha.

`alpha` is 1 at initialisation, where the temporal branch has no effect. The original clamps it, in
place and to [0, 1], before its use, so that the gradient is that of the clamped value and is not
cut: `clamp_alphas` does this to the parameters before they are used, and the modules do not clip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from contextualstory_jax.config.model_config import UNetConfig
from contextualstory_jax.models.attention import Attention, FeedForward, RotaryEmbedding, attention
from contextualstory_jax.models.embeddings import frame_position_table
from contextualstory_jax.models.layers import (
    conv1x1,
    group_norm,
    layer_norm,
    linear,
    ones,
    parameter,
    uniform,
)
from contextualstory_jax.models.network import Params
from contextualstory_jax.models.seta import seta_attention

TEMPORAL_CONV_GROUPS = 32  # fixed in the original, whatever norm_num_groups says


def clamp_alphas(params: Params) -> Params:
    """Project every temporal blend to [0, 1].

    Reference: TemporalResnetBlock.forward, Transformer2DConditionModel.forward.
    """
    return {name: jnp.clip(p, 0, 1) if name.endswith("alpha") else p for name, p in params.items()}


class TemporalConv(nnx.Module):
    """A (3, 1, 1) convolution over frames, computed as a 2-D one over the plane (frame, pixel)."""

    def __init__(self, channels: int):
        init = uniform(3 * channels)
        self.kernel = parameter((3, 1, channels, channels), init)
        self.bias = parameter((channels,), init)

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        plane = x.reshape(*x.shape[:2], -1, x.shape[-1])
        out = jax.lax.conv_general_dilated(
            plane,
            self.kernel[...],
            (1, 1),
            ((1, 1), (0, 0)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return (out + self.bias[...]).reshape(x.shape)


class TemporalResnetBlock(nnx.Module):
    """Norm, SiLU, convolution over frames, twice, residual, blended by alpha.

    No time embedding enters.

    Reference: videoldm_unet_blocks.py TemporalResnetBlock.
    """

    def __init__(self, channels: int):
        self.norm1 = group_norm(channels, TEMPORAL_CONV_GROUPS, 1e-6)
        self.conv1 = TemporalConv(channels)
        self.norm2 = group_norm(channels, TEMPORAL_CONV_GROUPS, 1e-6)
        self.conv2 = TemporalConv(channels)
        self.alpha = parameter((1,), ones)

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return self.alpha[...] * x + (1 - self.alpha[...]) * (x + h)


class TemporalAttention(Attention):
    """Attention of each position over its own frames or, with `seta`, their 3x3 neighbourhoods too.

    Rotary positions rotate the first half of the channels before the head split, so that half of
    the heads see no position; otherwise a fixed sinusoidal table is added to the tokens.

    Reference: videoldm_attention.py TemporalConditionalAttention, RotaryEmbAttnProcessor2_0.
    """

    def __init__(self, dim: int, heads: int, *, seta: bool, rotary: bool):
        super().__init__(dim, heads)
        self.seta = seta
        self.rotary_emb = RotaryEmbedding(dim // 2) if rotary else None

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:  # type: ignore[override]
        _, frames, height, width, dim = x.shape
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (project(x) for project in projections)
        own = None
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        else:
            table = jnp.asarray(frame_position_table(frames, dim), x.dtype)[None, :, None, None]
            position_q, position_k, position_v = (project(table) for project in projections)
            q, own = (
                q + position_q,
                (self.split_heads(k + position_k), self.split_heads(v + position_v)),
            )
            # Parity: a neighbour carries the entry of frame 0, whatever its own frame.
            k, v = k + position_k[:, :1], v + position_v[:, :1]
        q, k, v = (self.split_heads(a) for a in (q, k, v))
        if self.seta:
            return self.merge_heads(seta_attention(q, k, v, own))
        k, v = own or (k, v)
        q, k, v = (rearrange(a, "b f h w n k -> b (h w) f n k") for a in (q, k, v))
        out = rearrange(attention(q, k, v), "b (h w) f n k -> b f h w n k", h=height, w=width)
        return self.merge_heads(out)


class TemporalTransformerBlock(nnx.Module):
    """SETA, then attention over the frames of a position, then feed-forward; no text enters.

    Reference: videoldm_transformer_blocks.py BasicConditionalTransformerBlock with is_temporal.
    """

    def __init__(self, dim: int, heads: int, *, seta: bool, rotary: bool):
        self.norm1 = layer_norm(dim)
        self.attn1 = TemporalAttention(dim, heads, seta=seta, rotary=rotary)
        self.norm2 = layer_norm(dim)
        self.attn2 = TemporalAttention(dim, heads, seta=False, rotary=rotary)
        self.norm3 = layer_norm(dim)
        self.ff = FeedForward(dim)

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return x + self.ff(self.norm3(x))


class TemporalTransformer(nnx.Module):
    """Norm, projection, blocks, projection, residual, blended by alpha.

    Reference: videoldm_transformer_blocks.py Transformer2DConditionModel with is_temporal.
    """

    def __init__(self, config: UNetConfig, channels: int, heads: int, *, seta: bool, rotary: bool):
        project = linear if config.use_linear_projection else conv1x1
        self.norm = group_norm(channels, config.norm_num_groups, 1e-6)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nnx.List(
            TemporalTransformerBlock(channels, heads, seta=seta, rotary=rotary)
            for _ in range(config.transformer_layers_per_block)
        )
        self.proj_out = project(channels, channels)
        self.alpha = parameter((1,), ones)

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        h = self.proj_in(self.norm(x))
        for block in self.transformer_blocks:
            h = block(h)
        return self.alpha[...] * x + (1 - self.alpha[...]) * (x + self.proj_out(h))
