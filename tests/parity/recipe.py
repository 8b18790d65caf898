"""Weights that follow from their PyTorch names: those the parity cases were computed with."""

from __future__ import annotations

import zlib

import numpy as np

from contextualstory_jax import weights
from contextualstory_jax.models.network import Network


def randn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal float32 values that follow from a name."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    return generator.standard_normal(shape, dtype=np.float32)


def torch_weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The weight of a PyTorch key."""
    n = randn(key, shape, seed)
    last = key.rpartition(".")[2]
    if last == "freqs":
        return 0.5 * np.abs(n)
    if last == "alpha":
        return 0.5 + 0.5 * n  # some fall outside [0, 1], on purpose
    if last in ("bias", "dummy"):
        return 0.02 * n
    if len(shape) == 1:
        return 1 + 0.1 * n
    if last == "pos_embed":
        return 0.02 * n
    return n / np.sqrt(np.float32(np.prod(shape[1:])))


def params(network: Network, seed: int, prefix: str = "") -> dict[str, np.ndarray]:
    """All parameters of a network by the recipe, through the converter."""
    tensors = {}
    for name, shape in network.shapes.items():
        key = weights.torch_key(name, len(shape.shape))
        tensors[key] = torch_weight(prefix + key, weights.torch_shape(name, shape.shape), seed)
    return weights.convert(tensors, network.shapes)
