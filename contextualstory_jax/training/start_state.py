"""The state that training starts from: fresh, or that of a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Protocol, runtime_checkable

import jax

from contextualstory_jax.checkpoints.manager import Checkpoints, Damaged
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.distributed.multihost import all_succeed, by_first, say
from contextualstory_jax.distributed.sharding import Placement
from contextualstory_jax.models.story_model import Parts
from contextualstory_jax.training.train_step import TrainState, init_state
from contextualstory_jax.utils.errors import require


@runtime_checkable
class Declared(Protocol):
    """A model that declares its parameters."""

    @property
    def shapes(self) -> dict[str, dict]:
        """Shape and dtype of every parameter, by part and name."""
        ...


def abstract_state(model: Declared, config: TrainConfig, placement: Placement) -> TrainState:
    """The shape, dtype and sharding of everything in the state.

    Raises `UserError` where `config.trainable` names no parameter.
    """
    state = jax.eval_shape(functools.partial(init_state, config=config), model.shapes)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        state,
        placement.shardings(state),
    )


def start_state(
    abstract: TrainState, params: Parts | None, config: TrainConfig, checkpoints: Checkpoints
) -> TrainState:
    """The state to resume from: that before the first step, or the last intact checkpoint's.

    `params` are used up. A checkpoint that is damaged is set aside, and logged. Raises `UserError`
    where none is left, or they are of another model.
    """
    if params is not None:
        placed = jax.tree.map(lambda s: s.sharding, abstract)
        begin = functools.partial(init_state, config=config)
        return jax.jit(begin, out_shardings=placed, donate_argnums=0)(params)
    steps = checkpoints.steps
    for step, older in itertools.zip_longest(steps, steps[1:]):
        restored: list[TrainState] = []

        def restore(step: int = step, restored: list[TrainState] = restored) -> None:
            items = checkpoints.restore(step, to_items(abstract))
            restored.append(from_items(abstract, items))

        problem = all_succeed(restore, Damaged)
        if problem is None:
            return restored[0]
        require(older is not None, f"{problem}; no older checkpoint is intact")
        say(f"{problem}; resuming from checkpoint {older}")
        by_first(lambda step=step: checkpoints.set_aside(step))
        checkpoints.reload()
    raise AssertionError("without a checkpoint there are parameters to begin with")


def to_items(state: TrainState) -> dict[str, Any]:
    """The state as checkpoint items: weights by name, and all else, flat, under `progress`."""
    rest = dataclasses.replace(state, params={}, ema_params={}, frozen={})
    leaves, _ = jax.tree_util.tree_flatten_with_path(rest)
    progress = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    return {
        "params": state.params,
        "ema_params": state.ema_params,
        "frozen": state.frozen,
        "progress": progress,
    }


def from_items(like: TrainState, items: dict[str, Any]) -> TrainState:
    """The inverse of `to_items`, for a state of the same structure as `like`."""
    rest = dataclasses.replace(like, params={}, ema_params={}, frozen={})
    _, structure = jax.tree_util.tree_flatten(rest)
    names = to_items(like)["progress"]
    state = jax.tree_util.tree_unflatten(structure, [items["progress"][name] for name in names])
    weights = {name: items[name] for name in ("params", "ema_params", "frozen")}
    return dataclasses.replace(state, **weights)
