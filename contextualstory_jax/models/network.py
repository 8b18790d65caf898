"""A module class as pure functions of a flat dict; NNX is not visible outside `models/`.

A parameter's name is its path with dots, `down_blocks.0.resnets.0.conv1.kernel`: the checkpoint key
of the PyTorch model but for the last word. Flat dicts make path rules (sharding, freezing, weight
tables) plain string matching.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from contextualstory_jax.models.layers import Declaration

Params = dict[str, jax.Array | np.ndarray]
M = TypeVar("M", bound=nnx.Module)


class Network(Generic[M]):
    """One architecture at one size.

    `shapes` maps each parameter's name to its shape and dtype; `init` initialises parameters;
    `bind` gives the module with parameters in it, ready to be called inside a jitted function.
    """

    def __init__(self, make: Callable[[], M]):
        self._graphdef, state = nnx.split(make())
        leaves = {
            ".".join(map(str, path)): (path, leaf.get_value())
            for path, leaf in nnx.to_flat_state(state)
        }
        self._paths = {name: path for name, (path, _) in sorted(leaves.items())}
        self.shapes: dict[str, Declaration] = {name: leaves[name][1] for name in self._paths}

    def init(self, seed: int) -> Params:
        """Initialise all parameters."""
        return {name: self.draw(seed, name) for name in self.shapes}

    def draw(self, seed: int, name: str) -> np.ndarray:
        """One parameter's initial values, float32: a function of the seed and its name."""
        declared = self.shapes[name]
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return declared.initialiser(generator, declared.shape)

    def bind(self, params: Mapping[str, jax.Array | np.ndarray], dtype: Any = None) -> M:
        """The module holding `params`, cast to `dtype` where one is given."""
        leaves = {
            path: nnx.Param(jnp.asarray(params[name], dtype)) for name, path in self._paths.items()
        }
        return nnx.merge(self._graphdef, nnx.from_flat_state(leaves))

    def values(self, module: M) -> Params:
        """The parameters in a bound module, after calls that changed some of them."""
        leaves = dict(nnx.to_flat_state(nnx.split(module)[1]))
        return {name: leaves[path].get_value() for name, path in self._paths.items()}
