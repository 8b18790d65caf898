"""The device mesh, and how parameters are sharded over it. See `distributed/sharding.py`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from contextualstory_jax.config.build import check_pattern
from contextualstory_jax.utils.errors import require


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """The mesh axes over which the last dimensions of some parameters are sharded."""

    pattern: str  # regex on `part.path`
    axes: tuple[Literal["fsdp", "tensor"] | None, ...]  # of the last dimensions, in order

    def __post_init__(self) -> None:
        check_pattern("mesh.rules", self.pattern)
        named = [axis for axis in self.axes if axis is not None]
        require(
            len(set(named)) == len(named) > 0,
            f"mesh.rules: the axes of {self.pattern!r} must be fsdp or tensor, each once at most, "
            f"or null; got {self.axes}",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes what is left. See `distributed/sharding.py`."""

    data: int = -1  # copies of the parameters; each sees stories of its own
    fsdp: int = 1  # parts that each parameter is kept in; each sees stories of its own
    tensor: int = 1  # parts that each matrix product is split in
    rules: tuple[ShardingRule, ...] = ()  # before the project's own: the first match wins
