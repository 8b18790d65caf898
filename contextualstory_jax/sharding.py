"""Where arrays lie: a named mesh, and rules from a parameter's path to its axes.

Rules are pairs (path regex, axes of the last dimensions); the first match wins and no match means a
copy on every device. An axis that does not divide its dimension is dropped. Optimizer and EMA
follow the parameter they belong to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from contextualstory_jax.config import MeshConfig, require

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*\.kernel", ("fsdp",)),  # output features
    (r".*\.embedding", ("fsdp",)),
    (r".*\.pos_embed", ("fsdp",)),
)
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over some devices, by default over all of all processes.

    Raises `UserError` where the axes do not make up their number.
    """
    chosen = jax.devices() if devices is None else devices
    count = len(chosen)
    axes = {"data": config.data, "fsdp": config.fsdp}
    fixed = math.prod(size for size in axes.values() if size != -1)
    free = [name for name, size in axes.items() if size == -1]
    require(
        len(free) <= 1 and all(size == -1 or size >= 1 for size in axes.values()),
        f"mesh: axes must be at least 1, at most one of them -1; got {axes}",
    )
    require(
        count % fixed == 0 if free else count == fixed,
        f"mesh: {axes} does not make up the {count} devices there are",
    )
    for name in free:
        axes[name] = count // fixed
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        # Explicit axes are make_mesh's default in this JAX; ours are for the compiler to propagate.
        axis_types=(AxisType.Auto,) * len(axes),
        devices=chosen,
    )


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one array by the rules."""
    for pattern, last_axes in RULES:
        if re.fullmatch(pattern, path):
            axes = (None,) * (len(shape) - len(last_axes)) + last_axes
            return PartitionSpec(
                *(
                    a if a and n % mesh.shape[a] == 0 else None
                    for a, n in zip(axes, shape, strict=True)
                )
            )
    return PartitionSpec()


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of every array of a tree, by the dict keys on the way to it."""

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        return NamedSharding(mesh, spec(".".join(keys), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)
