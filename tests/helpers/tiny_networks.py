"""UNets and modules as small as can be, with parameters that have a say."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from contextualstory_jax.config.model_config import UNetConfig
from contextualstory_jax.models.network import Network

FRAMES, TEXT, WIDTH = 3, 2, 16


def tiny(**changes) -> UNetConfig:
    """Two levels, the first without attention; `changes` to it."""
    values = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "n_frames": FRAMES,
        "n_temp_heads": 2,
        "num_layers_FStext": 1,
        "max_text_length": 4,
    }
    return UNetConfig(**values | changes)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def draw(network: Network) -> dict[str, np.ndarray]:
    """Parameters of which none is zero, one or silent."""
    rng = np.random.default_rng(0)
    return {
        name: np.float32(0.5)
        if name.endswith("alpha")
        else (rng.standard_normal(s.shape) / math.sqrt(math.prod(s.shape[:-1]))).astype(np.float32)
        for name, s in network.shapes.items()
    }


def drawn(make):
    """A module with such parameters."""
    network = Network(make)
    return network.bind(draw(network))


def differ(a, b, axis) -> np.ndarray:
    """Along an axis, where two arrays are not the same number for number."""
    rest = tuple(i for i in range(a.ndim) if i != axis)
    return np.any(np.asarray(a) != np.asarray(b), axis=rest)
