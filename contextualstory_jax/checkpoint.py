"""Checkpoint folders: what a run leaves, what drawing loads; the only file that imports orbax.

    FOLDER/model.json        the ModelConfig, and where the weights come from
    FOLDER/tokenizer/        CLIP tokenizer files
    FOLDER/checkpoints/STEP/ orbax, one sub-folder an item:
        params, ema_params, frozen   {part: {name: array}}
        progress                     optimizer state and counters, for going on
        meta                         JSON: step, StoryFlow mean

A step's folder is written whole or not at all. Shapes and dtypes are checked before anything is read, because orbax
casts a wrong dtype without a word.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from contextualstory_jax.config import ModelConfig, build, require
from contextualstory_jax.errors import UserError

FORMAT = 1
Weights = Literal["ema", "raw"]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    os.replace(file.name, path)


def write_model(folder: Path, config: ModelConfig, tokenizer_folder: Path) -> None:
    """Make `folder` a checkpoint folder for a model; refuses one that holds another architecture.

    Raises `UserError` where the folder cannot be written or belongs to another model.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model.json").exists():
            _refuse_another(folder, _read_json(folder / "model.json")["model"], values)
            return
        shutil.copytree(tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)
        write_text(folder / "model.json", json.dumps({"format": FORMAT, "model": values}, indent=2))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error


def _refuse_another(folder: Path, theirs: Any, ours: Any, name: str = "model") -> None:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted({*theirs, *ours}):
            _refuse_another(folder, theirs.get(key), ours.get(key), f"{name}.{key}")
    else:
        require(
            theirs == ours,
            f"{folder} holds a model with {name} = {theirs!r}, but the config says {ours!r}; "
            "use another workdir or that value",
        )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); the checkpoint folder is damaged"
        ) from error


def read_model(folder: Path) -> ModelConfig:
    """The model of a checkpoint folder. Raises `UserError` where there is none."""
    require(
        folder.is_dir(),
        f"no checkpoint folder {folder}; give one that training or conversion wrote",
    )
    require(
        (folder / "model.json").is_file(),
        f"{folder} is not a checkpoint folder: model.json is missing; "
        "give a training workdir or what convert_weights.py wrote",
    )
    values = _read_json(folder / "model.json")
    require(
        values.get("format") == FORMAT and isinstance(values.get("model"), dict),
        f"{folder}/model.json has format {values.get('format')!r}; this version reads format {FORMAT}",
    )
    return build(ModelConfig, values["model"], "model.")


class Checkpoints:
    """The numbered checkpoints of a folder. Use as a context manager: leaving it waits for writes."""

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            (folder / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=keep is not None, read_only=keep is None
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Write trees of arrays by name, and JSON, in the background."""
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
        )

    def meta(self, step: int) -> dict:
        """The JSON of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Read items by name into trees of ShapeDtypeStructs (with shardings, where not on one device).

        Raises `UserError` where an item is missing, damaged, or has other names, shapes or dtypes.
        """
        wanted = {name: tree for name, tree in targets.items() if jax.tree.leaves(tree)}
        where = f"checkpoint {step} of {self.folder}"
        try:
            found = {name: self._manager.item_metadata(step)[name] for name in wanted}
            for name, tree in wanted.items():
                require(found[name] is not None, f"{where} has no {name}")
                _check(
                    where,
                    name,
                    tree,
                    found[name].tree if hasattr(found[name], "tree") else found[name],
                )
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
                ),
            )
        except UserError:
            raise
        except Exception as error:  # orbax raises whatever its storage does
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"{where} is damaged or incomplete: {reason}") from error
        return {name: restored[name] if name in wanted else tree for name, tree in targets.items()}


def _check(where: str, item: str, wanted: Any, found: Any) -> None:
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
    require(not problems, f"{where}, {item}: {shown}")


def load_weights(folder: Path, weights: Weights, shapes: Mapping[str, Any]) -> tuple[dict, dict]:
    """All parameters of the newest checkpoint, as stored, and its meta.

    `weights` chooses the average of the trained parameters or the last values. Raises `UserError` where there is no
    checkpoint, or none with these weights, or it does not fit `shapes`.
    """
    require(
        (folder / "checkpoints").is_dir(),
        f"{folder} has no checkpoints yet; train it, or name another",
    )
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest
        if step is None:
            raise UserError(f"{folder} has no whole checkpoint yet; train it, or name another")
        meta = checkpoints.meta(step)
        item = "ema_params" if weights == "ema" else "params"
        require(
            item in meta["items"],
            f"checkpoint {step} of {folder} holds no {weights} weights; "
            f"give --weights {'raw' if weights == 'ema' else 'ema'}",
        )
        # Which parameter is in which item, and its dtype, is the checkpoint's to say.
        names = [item, *(["frozen"] if "frozen" in meta["items"] else [])]
        targets: dict[str, dict] = {}
        for name in names:
            targets[name] = {
                part: {
                    leaf: jax.ShapeDtypeStruct(shapes[part][leaf].shape, np.dtype(dtype))
                    for leaf, dtype in leaves.items()
                    if leaf in shapes.get(part, {})
                }
                for part, leaves in meta["items"][name].items()
            }
        restored = checkpoints.restore(step, targets)
    params = {part: {} for part in shapes}
    for name in names:
        for part, leaves in restored[name].items():
            params[part].update(leaves)
    missing = [
        f"{part}.{leaf}" for part in shapes for leaf in shapes[part] if leaf not in params[part]
    ]
    require(
        not missing,
        f"checkpoint {step} of {folder} lacks {len(missing)} parameters, {missing[:1]} first",
    )
    return params, meta


def contents(items: Mapping[str, Any]) -> dict[str, dict]:
    """What `meta["items"]` says: the dtype of every parameter of every item."""
    return {
        name: {
            part: {leaf: str(a.dtype) for leaf, a in leaves.items()}
            for part, leaves in tree.items()
            if leaves
        }
        for name, tree in items.items()
        if jax.tree.leaves(tree)
    }


def write_weights(
    folder: Path,
    config: ModelConfig,
    tokenizer_folder: Path,
    items: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    """Make a checkpoint folder for drawing: `items` any of params, ema_params and frozen, as NumPy or JAX arrays.

    `meta` needs `step` and `storyflow`, the mean scene changes. `model.json` is written last, so that a folder that was
    interrupted is not taken for whole. Raises `UserError` where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(meta["step"], items, {**meta, "items": contents(items)})
    write_model(folder, config, tokenizer_folder)
