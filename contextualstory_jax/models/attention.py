"""Attention: plain, over every frame's neighbourhood (SETA), and the modules around them.

SETA projects keys and values once per pixel. Queries are then taken in tiles of up to 4x4 pixels,
all frames together; the keys of a tile are the tile and a halo of one pixel, cut so that a border
pixel repeats beyond the border (which counts a replicated neighbour as often as it occurs), and one
constant mask serves all tiles. An odd side is padded to full tiles and the result cropped.
`scripts/benchmark_seta.py` compares this with other ways.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from contextualstory_jax.models.fused_attention import fused_attention, suits_cudnn
from contextualstory_jax.models.layers import linear, parameter

KeysValues = tuple[jax.Array, jax.Array]
SETA_TILE = 4  # pixels a side


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


def with_halo(x: Array, axis: int, tile: int) -> Array:
    """Split an axis into tiles, each with one neighbour before and after; the borders repeat.

    Returns an array whose `axis` is the number of tiles and `axis + 1` is `tile + 2`.
    """
    x = jnp.moveaxis(x, axis, 0)
    tiles = x.reshape(-1, tile, *x.shape[1:])
    before = jnp.concatenate([tiles[:1, 0], tiles[:-1, -1]])[:, None]
    after = jnp.concatenate([tiles[1:, 0], tiles[-1:, -1]])[:, None]
    return jnp.moveaxis(jnp.concatenate([before, tiles, after], axis=1), (0, 1), (axis, axis + 1))


def seta_tile(side: int) -> int:
    """Pixels along one side of a tile: 4 or 2 where that divides the side, else up to 4."""
    return min(side, SETA_TILE) if side % 2 else math.gcd(side, SETA_TILE)


def pad_to_tiles(x: Float[Array, "b f h w n k"]) -> Float[Array, "b f p q n k"]:
    """Repeat the lower and the right border until both sides hold full tiles."""
    height, width = x.shape[2:4]
    rows, columns = (
        np.minimum(np.arange(-(-side // seta_tile(side)) * seta_tile(side)), side - 1)
        for side in (height, width)
    )
    # In one step for both sides: XLA keeps fewer copies for the gradient than with jnp.pad.
    return x if x.shape[2:4] == (len(rows), len(columns)) else x[:, :, rows[:, None], columns]


@functools.cache
def seta_mask(frames: int, tile_h: int, tile_w: int, *, ring_only: bool) -> Bool[np.ndarray, "q s"]:
    """Mask of the keys of a tile with its halo that each query of the tile sees.

    A query sees its own position in every frame and the 8 ring neighbours in every frame but its
    own: 37 of the 45 tokens that the paper gathers. `ring_only` leaves out the own position.
    """
    i, y, x = np.indices((frames, tile_h, tile_w)).reshape(3, -1, 1)
    j, key_y, key_x = np.indices((frames, tile_h + 2, tile_w + 2)).reshape(3, 1, -1)
    distance = np.maximum(abs(key_y - 1 - y), abs(key_x - 1 - x))
    ring = (distance == 1) & (i != j)
    return ring if ring_only else ring | (distance == 0)


def seta_attention(
    q: Float[Array, "b f h w n k"],
    k: Float[Array, "b f h w n k"],
    v: Float[Array, "b f h w n k"],
    own: tuple[Float[Array, "b f h w n k"], Float[Array, "b f h w n k"]] | None = None,
) -> Float[Array, "b f h w n k"]:
    """Spatially-Enhanced Temporal Attention.

    `own` gives keys and values of the own position where they differ from those that neighbours see
    (with sinusoidal positions a neighbour carries frame 0's entry whatever its frame).

    Reference: videoldm_attention.py TemporalConditionalAttention; paper section
    "Spatially-Enhanced Temporal Attention".
    """
    _, frames, height, width, _, _ = q.shape
    tile_h, tile_w = seta_tile(height), seta_tile(width)
    tiles = {"th": tile_h, "tw": tile_w}
    # What lies beyond a border is the border again: padding holds what the halo would.
    q, k, v, own = jax.tree.map(pad_to_tiles, (q, k, v, own))
    halo = [with_halo(with_halo(x, 2, tile_h), 4, tile_w) for x in (k, v)]
    k, v = (rearrange(x, "b f h y w x n k -> (b h w) (f y x) n k") for x in halo)
    q = rearrange(q, "b f (h th) (w tw) n k -> (b h w) (f th tw) n k", **tiles)
    if own is None:
        out = attention(q, k, v, seta_mask(frames, tile_h, tile_w, ring_only=False))
    else:
        own_k, own_v = (
            rearrange(x, "b f (h th) (w tw) n k -> (b h w) f (th tw) n k", **tiles) for x in own
        )
        positions = rearrange(q, "b (f p) n k -> b f p n k", f=frames)
        logits = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        ring = logits("b q n k, b s n k -> b n q s", q, k)
        ring = jnp.where(seta_mask(frames, tile_h, tile_w, ring_only=True), ring, -jnp.inf)
        same = logits("b f p n k, b g p n k -> b n f p g", positions, own_k)
        same = rearrange(same, "b n f p g -> b n (f p) g")
        weights = jax.nn.softmax(
            jnp.concatenate([same, ring], axis=-1) * q.shape[-1] ** -0.5, axis=-1
        ).astype(v.dtype)
        same = rearrange(weights[..., :frames], "b n (f p) g -> b n f p g", f=frames)
        out = rearrange(
            jnp.einsum("b n f p g, b g p n k -> b f p n k", same, own_v), "b f p n k -> b (f p) n k"
        )
        out = out + jnp.einsum("b n q s, b s n k -> b q n k", weights[..., frames:], v)
    out = rearrange(
        out,
        "(b h w) (f th tw) n k -> b f (h th) (w tw) n k",
        h=-(-height // tile_h),
        w=-(-width // tile_w),
        **tiles,
    )
    return out[:, :, :height, :width]


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
