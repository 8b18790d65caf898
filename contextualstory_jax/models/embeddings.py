"""Sinusoidal embeddings of diffusion steps, scene changes and frame positions; an MLP over them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from contextualstory_jax.models.layers import linear


def sinusoidal_embedding(
    x: Float[Array, "*batch"] | Int[Array, "*batch"],
    dim: int,
    *,
    cos_first: bool = True,
    freq_shift: float = 0.0,
) -> Float[Array, "*batch dim"]:
    """Embed numbers as cosines and sines of falling frequencies; float32.

    The cosines fill one half and the sines the other; frequencies fall geometrically.

    Reference: diffusers 0.21 embeddings.py get_timestep_embedding; videoldm_unet.py
    sinusoidal_embedding.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / (half - freq_shift)).astype(
        np.float32
    )
    angles = x[..., None].astype(jnp.float32) * frequencies
    halves = (jnp.cos(angles), jnp.sin(angles)) if cos_first else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate([*halves, jnp.zeros((*x.shape, dim % 2))], axis=-1)


def frame_position_table(frames: int, dim: int) -> Float[np.ndarray, "f c"]:
    """Positions of frames as interleaved (sin, cos) of p / 10000^(i/dim), i < dim/2.

    Parity: the exponent is i/dim, not the usual 2i/dim.

    Reference: videoldm_attention.py PositionalEncoding.
    """
    angles = np.arange(frames)[:, None] / 10000.0 ** (np.arange(dim // 2) / dim)
    return (
        np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(frames, -1).astype(np.float32)
    )


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, linear. Reference: diffusers 0.21 embeddings.py TimestepEmbedding."""

    def __init__(self, dim_in: int, dim: int, *, zero: bool = False):
        self.linear_1 = linear(dim_in, dim)
        self.linear_2 = linear(dim, dim, zero=zero)

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch c"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))
