"""Scaled dot-product attention, rotary positions, and the modules around them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from contextualstory_jax.models.fused_attention import fused_attention, suits_cudnn
from contextualstory_jax.models.layers import linear, parameter

KeysValues = tuple[jax.Array, jax.Array]


def attention(
    q: Float[Array, "*batch q n k"],
    k: Float[Array, "*batch s n k"],
    v: Float[Array, "*batch s n k"],
    mask: Bool[Array, "q s"] | Bool[np.ndarray, "q s"] | None = None,
) -> Float[Array, "*batch q n k"]:
    """Scaled dot-product attention; logits and softmax in float32. True in the mask attends.

    Every query must see a key.
    """
    if mask is None and suits_cudnn(q):
        flat = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        return fused_attention(*flat).reshape(q.shape)
    # Heads first, and divided by the sum after the product with values, not before: scores are the
    # largest arrays. On a CPU this takes less time than jax.nn.dot_product_attention does.
    q, k, v = (jnp.swapaxes(x, -3, -2) for x in (q, k, v))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = einsum("... q k, ... s k -> ... q s", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    out = einsum("... q s, ... s k -> ... q k", weights.astype(v.dtype), v)
    out = out / weights.sum(axis=-1, keepdims=True)
    return jnp.swapaxes(out.astype(v.dtype), -3, -2)


def rotate(
    x: Float[Array, "b f *rest c"], freqs: Float[Array, " r"]
) -> Float[Array, "b f *rest c"]:
    """Rotary positions: rotate interleaved pairs of channels by frame index times frequency.

    The first 2r channels are rotated; the others keep their values.

    Reference: rotary_embedding.py apply_rotary_emb.
    """
    frames, turned = x.shape[1], 2 * freqs.shape[0]
    angles = jnp.arange(frames, dtype=jnp.float32)[:, None] * freqs.astype(jnp.float32)
    angles = angles.reshape(1, frames, *(1,) * (x.ndim - 3), -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., 0:turned:2].astype(jnp.float32), x[..., 1:turned:2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([pairs.reshape(*x.shape[:-1], turned), x[..., turned:]], axis=-1)


class RotaryEmbedding(nnx.Module):
    """Rotary positions with frequencies that are trained like any other weight.

    A checkpoint's are loaded, never recomputed.
    """

    def __init__(self, dim: int):
        self.freqs = parameter(
            (dim // 2,),
            lambda _, shape: (10000.0 ** -(np.arange(*shape) * 2 / dim)).astype(np.float32),
        )

    def __call__(self, x: Float[Array, "b f *rest c"]) -> Float[Array, "b f *rest c"]:
        return rotate(x, self.freqs[...])


class Attention(nnx.Module):
    """Multi-head attention with its projections.

    Queries, keys and values have no bias, the output has one.

    Reference: videoldm_attention.py ConditionalAttention; diffusers 0.21 Attention.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        self.heads = heads
        self.to_q = linear(dim, dim, bias=False)
        self.to_k = linear(context_dim or dim, dim, bias=False)
        self.to_v = linear(context_dim or dim, dim, bias=False)
        self.to_out = nnx.List([linear(dim, dim)])

    def split_heads(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch n k"]:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def merge_heads(self, x: Float[Array, "*batch n k"]) -> Float[Array, "*batch c"]:
        """Concatenate the heads and project them out."""
        return self.to_out[0](x.reshape(*x.shape[:-2], -1))

    def keys_values(self, context: Float[Array, "*batch s d"]) -> KeysValues:
        """Project keys and values, each `*batch s n k`."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def __call__(
        self, x: Float[Array, "*batch q c"], keys_values: KeysValues
    ) -> Float[Array, "*batch q c"]:
        return self.merge_heads(attention(self.split_heads(self.to_q(x)), *keys_values))


class GEGLU(nnx.Module):
    """A linear map to twice the width, one half gated by the exact gelu of the other."""

    def __init__(self, dim: int, inner_dim: int):
        self.proj = linear(dim, 2 * inner_dim)

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch m"]:
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU feed-forward of four times the width. Reference: diffusers 0.21 FeedForward."""

    def __init__(self, dim: int, *, zero: bool = False):
        # The original's net.1 is a dropout of rate 0; it keeps the numbering of the checkpoint.
        self.net = nnx.List(
            [GEGLU(dim, 4 * dim), nnx.Dropout(0.0), linear(4 * dim, dim, zero=zero)]
        )

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return self.net[2](self.net[0](x))
