"""Checkpoints larger than memory: written from tensors in files, and read back a few at a time.

The layout is that of `checkpoints/layout.py`, which restores what is written here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import absl.logging
import numpy as np
import orbax.checkpoint as ocp

from contextualstory_jax.checkpoints.layout import choose_weights, contents
from contextualstory_jax.checkpoints.manager import Checkpoints, reading
from contextualstory_jax.conversion.tensor_files import Tensor
from contextualstory_jax.utils.errors import UserError
from contextualstory_jax.utils.interruption import check

T = TypeVar("T")

GROUP = 2**26  # bytes that are read, and written, together; larger groups take longer


class _TensorHandler(ocp.type_handlers.NumpyHandler):
    """Writes tensors that are in memory only while they are written: two groups at a time."""

    def __init__(self, wrote: Callable[[int], object]):
        super().__init__(deepcopy_host_arrays=False)
        self._wrote = wrote

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        order = sorted(range(len(values)), key=lambda i: values[i].place)
        pending: list[Any] = []
        with ThreadPoolExecutor(2) as pool:
            for group in groups(order, [values[i].nbytes for i in order]):
                arrays = list(pool.map(lambda i: values[i].read(), group))
                _finish(pending)  # the group before, written meanwhile
                pending = []
                for i, array in zip(group, arrays, strict=True):
                    # Alone, because of several orbax leaves off waiting at the first that fails.
                    pending += await super().serialize([array], [infos[i]], [args[i]])
                self._wrote(sum(array.nbytes for array in arrays))
                check()
        _finish(pending)
        return []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax, each of whose threads would log what is raised anyway, and wait for them."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax"):
                threading.Thread.join(thread)  # orbax's own method would raise the failure again
        absl.logging.set_verbosity(verbosity)


def _finish(pending: Sequence[Any]) -> None:
    """Wait for all writes, so that none continues when one has failed."""
    errors = []
    for commit in pending:
        try:
            commit.result()
        except Exception as error:  # raised below, when none is left
            errors.append(error)
    if errors:
        raise errors[0]


def groups(items: Sequence[T], sizes: Sequence[int], limit: int = GROUP) -> Iterator[list[T]]:
    """Split items, in order, into groups of at most `limit` bytes, or of one larger item."""
    group: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def stream_weights(
    folder: Path,
    items: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    meta: Mapping[str, Any],
    wrote: Callable[[int], object],
) -> None:
    """Write a checkpoint of tensors that are still in files, holding few of them at a time.

    Args:
        items: as in `write_weights`.
        meta: as in `write_weights`.
        wrote: called with the number of bytes written.

    Raises:
        OSError: where the disk is full; and what reading a tensor raises.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Tensor, _TensorHandler(wrote)))
    arguments = {name: ocp.args.PyTreeSave(dict(tree)) for name, tree in items.items()}
    try:
        with (
            _quiet(),
            ocp.CheckpointManager(
                (folder / "checkpoints").absolute(),
                options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
                item_handlers={
                    "meta": ocp.JsonCheckpointHandler(),
                    # Trained weights hardly shrink, and compressing them would take longest.
                    **{
                        name: ocp.PyTreeCheckpointHandler(
                            type_handler_registry=registry, use_compression=False
                        )
                        for name in items
                    },
                },
            ) as manager,
        ):
            described = ocp.args.JsonSave({**meta, "items": contents(items)})
            manager.save(meta["step"], args=ocp.args.Composite(meta=described, **arguments))
    except (UserError, OSError):
        raise
    except Exception as error:  # orbax raises whatever its storage does, which ends with the reason
        raise OSError(errno.EIO, str(error).rpartition(": ")[2]) from error


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of an array in a checkpoint, its shape and dtype."""

    item: str
    part: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class StoredWeights:
    """The newest checkpoint of a folder, read a few arrays at a time, as they are stored.

    `params` has all parameters by part and name, `dead` the dead tensors by part and PyTorch key.
    Arguments and errors are those of `load_weights`.
    """

    def __init__(self, folder: Path, weights: str | None, shapes: Mapping[str, Any]):
        self._folder = folder
        with Checkpoints(folder) as checkpoints:
            self._step, self.meta, names = choose_weights(checkpoints, weights, shapes)
        items = [*names, *(["dead"] if "dead" in self.meta["items"] else [])]
        self._manager = ocp.CheckpointManager(
            (folder / "checkpoints").absolute(),
            # That of `meta` only because orbax warns without it.
            item_handlers={
                "meta": ocp.JsonCheckpointHandler(),
                **{name: ocp.PyTreeCheckpointHandler() for name in items},
            },
        )
        self.params: dict[str, dict[str, StoredTensor]] = {part: {} for part in shapes}
        self.dead: dict[str, dict[str, StoredTensor]] = {}
        with reading(folder, self._step):
            found = self._manager.item_metadata(self._step)
            for item in items:
                for part, leaves in found[item].tree.items():
                    tensors = self.dead if item == "dead" else self.params
                    tensors.setdefault(part, {}).update(
                        (name, StoredTensor(item, part, name, tuple(a.shape), np.dtype(a.dtype)))
                        for name, a in leaves.items()
                    )

    def read(self, tensors: Sequence[StoredTensor]) -> list[np.ndarray]:
        """The values of some arrays. Raises `UserError` where the checkpoint is damaged."""
        items: dict[str, dict[str, dict[str, ocp.RestoreArgs]]] = {}
        for tensor in tensors:
            parts = items.setdefault(tensor.item, {})
            parts.setdefault(tensor.part, {})[tensor.name] = ocp.RestoreArgs(np.ndarray)
        wanted = {
            item: ocp.args.PyTreeRestore(tree, restore_args=tree, partial_restore=True)
            for item, tree in items.items()
        }
        with reading(self._folder, self._step):
            restored = self._manager.restore(self._step, args=ocp.args.Composite(**wanted))
        return [restored[tensor.item][tensor.part][tensor.name] for tensor in tensors]
