"""Checkpoint folders: what a run leaves, what generation loads.

::

    FOLDER/model.json        the ModelConfig, and where the weights come from
    FOLDER/tokenizer/        CLIP tokenizer files
    FOLDER/checkpoints/STEP/ orbax, one sub-folder an item:
        params, ema_params, frozen   {part: {name: array}}
        progress                     optimizer state and counters, for resuming
        dead                         {part: {PyTorch key: array}}, for `conversion/export_torch.py`
        meta                         JSON: step, StoryFlow mean
    FOLDER/released/         JSON files of the folder that was converted, for going back

`checkpoints/manager.py` writes and reads the numbered ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from contextualstory_jax.checkpoints.manager import Checkpoints, latest_step
from contextualstory_jax.config.build import as_json, build
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.distributed.multihost import by_first
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.interruption import removing

FORMAT = 1


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with removing(temporary):
        temporary.write_text(text)
        temporary.replace(path)


def write_model(
    folder: Path,
    config: ModelConfig,
    tokenizer_folder: Path,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Make `folder` a checkpoint folder for a model; refuses one that holds another architecture.

    Args:
        source: where the weights come from, as JSON, if not from training here.

    Raises:
        UserError: where the folder cannot be written or belongs to another model.
    """
    values = as_json(dataclasses.asdict(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model.json").exists():
            # How the user samples is no part of what the weights mean.
            stored = {**_model_values(folder), "sampling": values["sampling"]}
            refuse_another(folder, stored, values)
        else:
            shutil.copytree(tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)
        description = {"format": FORMAT, "model": values} | ({"source": source} if source else {})
        write_text(folder / "model.json", json.dumps(description, indent=2))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error


def refuse_another(
    folder: Path, theirs: Any, ours: Any, other: str = "workdir", name: str = "model"
) -> None:
    """Raise `UserError` where a folder's model has other values than the config says.

    Args:
        other: what to change if not the value.
    """
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted({*theirs, *ours}):
            refuse_another(folder, theirs.get(key), ours.get(key), other, f"{name}.{key}")
    else:
        require(
            theirs == ours,
            f"{folder} holds a model with {name} = {theirs!r}, but the config says {ours!r}; "
            f"use another {other} or that value",
        )


def _model_values(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); the checkpoint folder is damaged"
        ) from error
    require(
        isinstance(values, dict)
        and values.get("format") == FORMAT
        and isinstance(values.get("model"), dict),
        f"{path} does not describe a model in format {FORMAT}, which this version reads",
    )
    return values["model"]


def read_model(folder: Path) -> ModelConfig:
    """The model of a checkpoint folder. Raises `UserError` where there is none."""
    require(
        folder.is_dir(),
        f"no checkpoint folder {folder}; give one that training or conversion wrote",
    )
    require(
        (folder / "model.json").is_file(),
        f"{folder} is not a checkpoint folder: model.json is missing; "
        "give a training workdir or what `contextualstory-jax convert` wrote",
    )
    values = _model_values(folder)
    try:
        return build(ModelConfig, values, "model.")
    except UserError as error:
        raise UserError(f"{folder / 'model.json'}: {error}") from error


def load_weights(
    folder: Path,
    weights: str | None,
    shapes: Mapping[str, Any],
    may_lack: str = "",
    parts: Collection[str] | None = None,
) -> tuple[dict, dict]:
    """All parameters of the newest checkpoint, as stored, and its meta, with `weights` in it.

    Args:
        weights: `ema`, the average of the trained parameters, or `raw`, their last values; by
            default `ema` where there is one.
        shapes: with shardings if not for one device.
        may_lack: a regex of names that need not be there.
        parts: which are wanted, if not all; others may still be among what is returned.

    Raises:
        UserError: where there is no checkpoint, none with these weights, or it does not fit
            `shapes`.
    """
    with Checkpoints(folder) as checkpoints:
        step, meta, names = choose_weights(checkpoints, weights, shapes, may_lack)
        if parts is not None:
            names = [n for n in names if any(meta["items"][n].get(part) for part in parts)]
        targets: dict[str, dict] = {}
        for name in names:
            # Which parameter is in which item, and its dtype, is the checkpoint's to say.
            targets[name] = {
                part: {
                    leaf: jax.ShapeDtypeStruct(
                        shapes[part][leaf].shape,
                        np.dtype(dtype),
                        sharding=shapes[part][leaf].sharding,
                    )
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
    return params, meta


def choose_weights(
    checkpoints: Checkpoints, weights: str | None, shapes: Mapping[str, Any], may_lack: str = ""
) -> tuple[int, dict, list[str]]:
    """The newest step, its meta with `weights` in it, and the items that hold these weights.

    Arguments and errors are those of `load_weights`.
    """
    folder = checkpoints.folder
    require(weights in ("ema", "raw", None), f"weights must be ema or raw; got {weights!r}")
    step, meta = newest(checkpoints)
    weights = weights or ("ema" if "ema_params" in meta["items"] else "raw")
    item = "ema_params" if weights == "ema" else "params"
    require(
        item in meta["items"],
        f"checkpoint {step} of {folder} holds no {weights} weights; "
        f"give --weights {'raw' if weights == 'ema' else 'ema'}",
    )
    names = [item, *(["frozen"] if "frozen" in meta["items"] else [])]
    held: dict[str, set[str]] = {part: set() for part in shapes}
    for name in names:
        for part, leaves in meta["items"][name].items():
            held.setdefault(part, set()).update(leaves)
    lacking = [
        f"{part}.{leaf}"
        for part in shapes
        for leaf in shapes[part]
        if leaf not in held[part] and not re.fullmatch(may_lack, leaf)
    ]
    vae_alone = {part for part, leaves in held.items() if leaves} == {"vae"}
    require(
        not lacking or not (meta.get("absent") or vae_alone),
        f"{folder} holds {'a VAE alone' if vae_alone else 'Stable Diffusion'}, which generates no "
        f"stories: train from it, with train --config.init_from={folder}",
    )
    require(
        not lacking,
        f"checkpoint {step} of {folder} is missing {len(lacking)} parameters: "
        + ", ".join(lacking[:3]),
    )
    return step, {**meta, "weights": weights}, names


def newest(checkpoints: Checkpoints) -> tuple[int, dict]:
    """The newest checkpoint's step and meta. Raises `UserError` where there is none."""
    folder = checkpoints.folder
    require(
        (folder / "checkpoints").is_dir(),
        f"{folder} has no checkpoints yet; train it, or name another",
    )
    step = checkpoints.latest
    if step is None:
        raise UserError(f"{folder} has no complete checkpoint yet; train it, or name another")
    return step, checkpoints.meta(step)


def held_parts(folder: Path) -> list[str]:
    """The parts of the model that a folder has parameters of: of a VAE's workdir the VAE alone.

    Raises `UserError` where it has no checkpoint.
    """
    with Checkpoints(folder) as checkpoints:
        _, meta = newest(checkpoints)
    items = (meta["items"].get(name, {}) for name in ("params", "ema_params", "frozen"))
    return list(dict.fromkeys(part for item in items for part in item))


def write_storyflow(folder: Path, storyflow: Sequence[float]) -> int:
    """Give the newest checkpoint other mean scene changes, atomically; returns its step.

    All processes call it, and the first writes. Raises `UserError` in all of them where there is no
    checkpoint, and where it cannot be written.
    """
    step = latest_step(folder)
    if step is None:
        raise UserError(f"{folder} has no complete checkpoint yet; train it, or name another")
    with Checkpoints(folder) as checkpoints:
        meta = checkpoints.meta(step)
    path = folder / "checkpoints" / str(step) / "meta" / "metadata"  # as orbax names it

    def write() -> None:
        try:
            write_text(path, json.dumps({**meta, "storyflow": list(storyflow)}))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error

    by_first(write)
    return step


def write_scaling_factor(folder: Path, scaling_factor: float) -> None:
    """Give a folder's VAE another scaling factor, atomically; all processes call it.

    Raises `UserError` in all of them where it cannot be written.
    """

    def write() -> None:
        path = folder / "model.json"
        description = json.loads(path.read_text())
        description["model"]["vae"]["scaling_factor"] = scaling_factor
        try:
            write_text(path, json.dumps(description, indent=2))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error

    by_first(write)


def contents(items: Mapping[str, Any]) -> dict[str, dict]:
    """The value of `meta["items"]`: the dtype of every parameter of every item."""
    return {
        name: {
            part: {leaf: str(a.dtype) for leaf, a in leaves.items()}
            for part, leaves in tree.items()
        }
        for name, tree in items.items()
        if jax.tree.leaves(tree)
    }


def weights_digest(leaves: Mapping[str, Any]) -> str:
    """The SHA-256 of arrays, as float32, and their names; all processes are to call it."""
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        array = process_allgather(leaf, tiled=True) if spread else np.asarray(leaf)
        array = np.asarray(array, np.float32, order="C")
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def write_weights(
    folder: Path,
    config: ModelConfig,
    tokenizer_folder: Path,
    items: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    """Make a checkpoint folder for generation.

    Args:
        items: any of params, ema_params and frozen, as NumPy or JAX arrays.
        meta: with `step` and `storyflow`, the mean scene changes.

    Raises:
        UserError: where the folder cannot be written or has a checkpoint.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error
    require(not (folder / "model.json").exists(), f"{folder} holds a model; choose another folder")
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(meta["step"], items, {**meta, "items": contents(items)})
    # Last, so that a folder whose writing was interrupted is not taken for complete.
    write_model(folder, config, tokenizer_folder)
