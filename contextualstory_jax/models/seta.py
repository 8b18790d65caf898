"""Spatially-Enhanced Temporal Attention (SETA): over every frame's neighbourhood of each pixel.

Keys and values are projected once per pixel. Queries are then taken in tiles of up to 4x4 pixels,
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
from jaxtyping import Array, Bool, Float

from contextualstory_jax.models.attention import attention

SETA_TILE = 4  # pixels a side


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
