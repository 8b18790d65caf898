"""SETA as the paper gives it: each query attends over tokens gathered for it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def ring(y: int, x: int, height: int, width: int) -> list[tuple[int, int]]:
    """The 8 neighbours of a position; beyond a border, the border again."""
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    return [(np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)) for dy, dx in steps]


@jax.jit
def gathered_attention(q, k, v, own_k, own_v):
    """SETA as the paper gives it: tokens gathered for each query. All are `b f h w n k`."""
    _, frames, height, width, _, dim = q.shape
    near = [[ring(y, x, height, width) for x in range(width)] for y in range(height)]
    rows, columns = np.moveaxis(np.array(near), -1, 0)  # h w 8

    def visible(own, others, i):
        seen_in = np.array([j for j in range(frames) if j != i])  # not its own frame's
        around = jnp.asarray(others)[:, seen_in][:, :, rows, columns]
        around = rearrange(around, "b f h w s n k -> b h w (f s) n k")
        return jnp.concatenate([rearrange(own, "b f h w n k -> b h w f n k"), around], axis=3)

    out = []
    for i in range(frames):
        keys, values = visible(own_k, k, i), visible(own_v, v, i)
        logits = jnp.einsum("bhwnk,bhwsnk->bhwns", q[:, i], keys) / math.sqrt(dim)
        out.append(jnp.einsum("bhwns,bhwsnk->bhwnk", jax.nn.softmax(logits), values))
        assert keys.shape[3] == 9 * frames - 8
    return jnp.stack(out, axis=1)
