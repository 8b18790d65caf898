"""The numbered checkpoints of a folder, in orbax: named items, each a tree of arrays, and JSON.

A step's folder is written atomically. Shapes and dtypes are checked before anything is
read, because orbax casts a wrong dtype without a word.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from contextualstory_jax.distributed.multihost import is_first
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.interruption import removing

ITEMS = ("params", "ema_params", "frozen", "progress", "dead")


def _loss(metrics: Any) -> float:
    return metrics["loss"]


class Damaged(UserError):
    """A checkpoint that cannot be read, although it has the name of a complete one."""


class Checkpoints:
    """The numbered checkpoints of a folder; as a context manager, it waits for writes at the end.

    Args:
        keep: how many of the newest there may be; without it nothing is to be saved. Others stay
            too: those at multiples of `keep_every` steps, and the `keep_best` with the least loss.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None = None,
        keep_every: int | None = None,
        keep_best: int = 0,
    ):
        self.folder = folder
        self._saves = keep is not None
        self._cleaning = contextlib.ExitStack()
        # By name, because a new manager does not know what an item it has not saved consists of.
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        if keep_best:
            # Sorted from the largest loss down, of which the last stay.
            kept.append(policies.BestN(get_metric_fn=_loss, n=keep_best, reverse=True))
        self._manager = ocp.CheckpointManager(
            (folder / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                create=self._saves,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=_loss if keep_best else None,
                best_mode="min",
            ),
            item_handlers={"meta": ocp.JsonCheckpointHandler(), **handlers},
        )

    def __enter__(self) -> Checkpoints:
        if self._saves and is_first():
            unfinished = "*.orbax-checkpoint-tmp*"
            self._cleaning.enter_context(removing(self.folder / "checkpoints", unfinished))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:  # else the error that ended the run is raised, perhaps this one
                raise
        finally:
            self._manager.close()
            self._cleaning.close()

    def wait(self) -> None:
        """Wait until all is written. Raises `UserError` where it cannot be."""
        with self._writing():
            self._manager.wait_until_finished()

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All complete checkpoints' steps, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        meta: Mapping[str, Any],
        loss: float | None = None,
    ) -> None:
        """Write trees of arrays by name, and JSON, in the background; `loss` for `keep_best`.

        Raises `UserError` where this or an earlier one cannot be written.
        """
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(dict(meta)),
                    **{
                        name: ocp.args.StandardSave(tree)
                        for name, tree in items.items()
                        if jax.tree.leaves(tree)
                    },
                ),
                metrics=None if loss is None else {"loss": loss},
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises whatever its storage does
            raise UserError(
                f"cannot write a checkpoint to {self.folder / 'checkpoints'} ({reason(error)}); "
                "make room there and start again: earlier checkpoints are as they were"
            ) from error

    def set_aside(self, step: int) -> None:
        """Rename a checkpoint's folder, so that it counts no more; by the first process alone."""
        folder = self.folder / "checkpoints" / str(step)
        shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
        folder.rename(folder.with_suffix(".damaged"))

    def reload(self) -> None:
        """Look again which checkpoints there are."""
        self._manager.reload()

    def meta(self, step: int) -> dict:
        """The JSON of a checkpoint. Raises `UserError` where it is missing or damaged."""
        with reading(self.folder, step):
            wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=wanted)["meta"]

    def restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Read items by name into trees of ShapeDtypeStructs, with shardings if not for one device.

        Raises `UserError` where an item is missing, damaged, or has other names, shapes or dtypes.
        """
        wanted = {name: tree for name, tree in targets.items() if jax.tree.leaves(tree)}
        with reading(self.folder, step):
            found = self._manager.item_metadata(step)
            for name, tree in wanted.items():
                where = f"checkpoint {step} of {self.folder}, {name}"
                if found[name] is None:
                    raise Damaged(f"{where}: missing or damaged")
                _check(where, tree, found[name].tree)
            arguments = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: restored[name] if name in wanted else tree for name, tree in targets.items()}


@contextlib.contextmanager
def reading(folder: Path, step: int) -> Iterator[None]:
    """Turn what orbax raises for a damaged checkpoint into `Damaged`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # orbax raises whatever its storage does
        raise Damaged(
            f"checkpoint {step} of {folder} is damaged or incomplete ({reason(error)}); "
            "remove it or copy it again"
        ) from error


def reason(error: Exception) -> str:
    """The message of an error of the storage, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _check(where: str, wanted: Any, found: Any) -> None:
    def table(tree: Any) -> dict[str, tuple]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: hasattr(x, "shape")
        )
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                tuple(leaf.shape),
                np.dtype(leaf.dtype),
            )
            for path, leaf in leaves
        }

    ours, theirs = table(wanted), table(found)
    problems = [f"{name} is missing" for name in ours.keys() - theirs.keys()]
    problems += [f"{name} is not of this model" for name in theirs.keys() - ours.keys()]
    problems += [
        f"{name} is {theirs[name]}, expected {ours[name]}"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    shown = "; ".join(sorted(problems)[:3]) + (
        f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    )
    require(not problems, f"{where} does not fit this model: {shown}")


def latest_step(folder: Path) -> int | None:
    """The newest complete checkpoint's step, None where there is none, or no folder."""
    if not (folder / "checkpoints").is_dir():
        return None
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest
