"""Where arrays lie: a named mesh, and rules from a parameter's path to its axes.

The mesh has three axes. Stories are split over `data` and `fsdp`; `fsdp` also splits what is kept
of each large parameter, its moments and its average; `tensor` splits the matrix products. Rules are
pairs (path regex, axes of the last dimensions); the first match wins and no match means a copy on
every device. An axis that does not divide its dimension is dropped. Optimizer and EMA follow the
parameter they belong to.

A step computes with a copy of the parameters that is gathered along `fsdp` (`gathered`), and its
gradient is brought back to where the parameters are kept (`sharded`): the collectives of a step are
those gathers and scatters, and no activation moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from contextualstory_jax.config.mesh_config import MeshConfig, ShardingRule
from contextualstory_jax.utils.errors import require

RULES = (
    # The first of two layers by the features, or heads, that it makes, ...
    ShardingRule(
        r".*\.(to_q|to_k|to_v|q_proj|k_proj|v_proj|net\.0\.proj|fc1|conv1|time_emb_proj)\.kernel",
        ("fsdp", "tensor"),
    ),
    # ... the second by those it takes.
    ShardingRule(r".*\.(to_out\.0|out_proj|net\.2|fc2|conv2)\.kernel", ("tensor", "fsdp")),
    ShardingRule(r".*\.(kernel|embedding|pos_embed)", ("fsdp",)),  # output features
)
BATCH = PartitionSpec(("data", "fsdp"))
HEADS = PartitionSpec(*BATCH, None, "tensor")  # of queries, keys and values, `b s n k`
LARGE = 2**20  # values; a parameter of at least this size that no rule splits is refused


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over some devices, by default over all of all processes.

    Raises `UserError` where the axes do not make up their number.
    """
    chosen = jax.devices() if devices is None else devices
    count = len(chosen)
    axes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
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


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Placement:
    """A mesh with the rules for what lies on it: `rules` of a config before the project's own."""

    def __init__(self, mesh: Mesh | AbstractMesh, rules: Sequence[ShardingRule] = ()):
        self.mesh = mesh
        self.rules = (*rules, *RULES)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of one array by the rules."""
        rule = self._rule(path)
        if rule is None:
            return PartitionSpec()
        axes = (None,) * (len(shape) - len(rule.axes)) + rule.axes
        sizes = zip(axes[-len(shape) :], shape, strict=True)
        return PartitionSpec(*(a if a and n % self.mesh.shape[a] == 0 else None for a, n in sizes))

    def shardings(self, tree: Any) -> Any:
        """Where every array of a tree is kept, by the dict keys on the way to it."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(self.mesh, self.spec(_dotted(path), leaf.shape)), tree
        )

    def sharded(self, tree: Any) -> Any:
        """Inside a compiled function: the arrays, brought to where they are kept."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def gathered(self, tree: Any) -> Any:
        """Inside a compiled function: the arrays, gathered along all axes but `tensor`."""

        def gathered(sharding: NamedSharding) -> NamedSharding:
            spec = (a if a == "tensor" else None for a in sharding.spec)
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        placed = jax.tree.map(gathered, self.shardings(tree))
        return jax.lax.with_sharding_constraint(tree, placed)

    def split(self, tree: Any) -> Any:
        """Inside a compiled function: the arrays, split by story along their first axis."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, BATCH))

    def check(self, shapes: Mapping[str, Mapping[str, Any]]) -> str:
        """The arrays that each rule splits, as a table; `shapes` are the model's, by part and name.

        Raises `UserError` for a rule that matches nothing and, where there is an axis to split it
        over, for a large parameter that none splits.
        """
        found: dict[ShardingRule | None, list[tuple[int, int]]] = {
            rule: [] for rule in (*self.rules, None)
        }
        for part, leaves in shapes.items():
            for name, leaf in leaves.items():
                path = f"{part}.{name}"
                sharding = NamedSharding(self.mesh, self.spec(path, leaf.shape))
                size, held = math.prod(leaf.shape), math.prod(sharding.shard_shape(leaf.shape))
                found[self._rule(path)].append((size, held))
                require(
                    self.mesh.shape["fsdp"] == 1 or size < LARGE or held < size,
                    f"mesh: no rule splits {path} {leaf.shape} over "
                    f"fsdp = {self.mesh.shape['fsdp']}; add one to mesh.rules, or change fsdp",
                )
        lines = [f"{'parameters':>14} {'on a device':>14}  rule"]
        for rule, sizes in found.items():
            require(
                rule is None or bool(sizes),
                f"mesh.rules: no parameter's path matches {rule and rule.pattern!r}; take it out",
            )
            size, held = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
            shown = "copied everywhere" if rule is None else f"{rule.pattern} -> {rule.axes}"
            lines.append(f"{size:>14,} {held:>14,}  {shown}")
        return "\n".join(lines)

    def _rule(self, path: str) -> ShardingRule | None:
        return next((r for r in self.rules if re.fullmatch(r.pattern, path)), None)


def _dotted(path: tuple) -> str:
    return ".".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
