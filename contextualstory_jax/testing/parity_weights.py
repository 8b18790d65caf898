"""Weights that follow from their PyTorch names: those the parity cases were computed with."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from contextualstory_jax.models.network import Network, Params


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
    if last in ("bias", "dummy", "running_mean"):
        return 0.02 * n
    if last == "running_var":  # what a ReLU leaves, so that features do not vanish with depth
        return 0.5 * (1 + 0.1 * np.abs(n))
    if len(shape) == 1:
        return 1 + 0.1 * n
    if last == "pos_embed":
        return 0.02 * n
    return n / np.sqrt(np.float32(np.prod(shape[1:])))


def torch_tensors(network: Network, seed: int) -> dict[str, np.ndarray]:
    """All parameters of a network as PyTorch has them, by key."""
    from contextualstory_jax.conversion import torch_names

    shapes = {
        torch_names.torch_key(name, len(declared.shape)): torch_names.torch_shape(
            name, declared.shape
        )
        for name, declared in network.shapes.items()
    }
    return {key: torch_weight(key, shape, seed) for key, shape in shapes.items()}


def params(network: Network, seed: int, prefix: str = "") -> Params:
    """All parameters of a network, through the converter; `prefix` is the part's.

    One by one, so that a network of the published size is in memory once.
    """
    # Only here: the original's side of a benchmark makes its weights without JAX.
    import jax
    import jax.numpy as jnp

    from contextualstory_jax.conversion import torch_names

    made: Params = {}
    for name, declared in network.shapes.items():
        key = torch_names.torch_key(name, len(declared.shape))
        tensor = torch_weight(prefix + key, torch_names.torch_shape(name, declared.shape), seed)
        made |= jax.tree.map(jnp.asarray, torch_names.convert({key: tensor}, {name: declared}))
    return made
