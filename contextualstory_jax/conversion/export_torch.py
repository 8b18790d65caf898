"""Checkpoint folders to the released layout, which the original's `from_pretrained` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contextualstory_jax.checkpoints.layout import read_model
from contextualstory_jax.config.model_config import AutoencoderKLConfig
from contextualstory_jax.conversion import diffusers_format
from contextualstory_jax.conversion.import_torch import (
    Dtype,
    check_free,
    copy_json,
    count,
    parameter_shapes,
    staged,
    target_dtype,
)
from contextualstory_jax.conversion.streaming import StoredTensor, StoredWeights, groups
from contextualstory_jax.conversion.tensor_files import write_safetensors
from contextualstory_jax.conversion.torch_names import (
    dead_tensors,
    to_torch,
    torch_key,
    torch_shape,
)
from contextualstory_jax.utils.errors import require
from contextualstory_jax.utils.interruption import check
from contextualstory_jax.utils.progress import bytes_bar


def export_released(
    checkpoint: Path, output: Path, weights: str | None = None, dtype: Dtype = "keep"
) -> dict[str, Any]:
    """Write a checkpoint in the released layout.

    A model that was converted gets its own JSON and dead tensors back; one that was trained here
    gets the released models' JSON, with its values, and zeros for dead tensors.

    Args:
        output: a folder that is not there or empty.
        weights: `ema` or `raw`, by default `ema` where there is one.
        dtype: that of all weights, or `keep`.

    Returns:
        A summary of what was written.

    Raises:
        UserError: where the checkpoint is incomplete or damaged; `output` is then as it was.
    """
    check_free(output)
    config = read_model(checkpoint)
    require(
        isinstance(config.vae, AutoencoderKLConfig),
        f"{checkpoint} cannot be exported: "
        f"the released layout has no {config.vae.kind} image codec",
    )
    shapes = parameter_shapes(config)
    stored = StoredWeights(checkpoint, weights, shapes)
    tensors = {part: held(stored, part) for part in shapes}
    size = sum(tensor.nbytes for found in tensors.values() for tensor in found.values())
    parts = {}
    with staged(output, size) as folder, bytes_bar(size, output.name) as bar:
        for name, values in diffusers_format.json_files(config, stored.meta["storyflow"]).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
        kept = checkpoint / "released"  # of what was converted
        copy_json({name: kept / name for name in diffusers_format.JSON_FILES}, folder)
        shutil.copytree(checkpoint / "tokenizer", folder / "tokenizer")
        for part, declared in shapes.items():
            made = {} if stored.dead else dead_tensors(declared, config.unet.n_temp_heads)
            path = folder / part / f"{diffusers_format.WEIGHTS[part]['safetensors']}.safetensors"
            header = write_part(path, stored, tensors[part], made, dtype, bar.update)
            parts[part] = count(header.values())
    origin = {"checkpoint": str(checkpoint), "weights": stored.meta["weights"]}
    return {"origin": origin, "parts": parts}


def held(stored: StoredWeights, part: str) -> dict[str, StoredTensor]:
    """A part's tensors in a checkpoint, dead ones included, by PyTorch key."""
    tensors = {torch_key(t.name, len(t.shape)): t for t in stored.params[part].values()}
    averaged = stored.meta["weights"] == "ema" and f"{part}_ema" in stored.dead
    return tensors | stored.dead.get(f"{part}_ema" if averaged else part, {})


def write_part(
    path: Path,
    stored: StoredWeights,
    tensors: Mapping[str, StoredTensor],
    made: Mapping[str, np.ndarray],
    dtype: Dtype,
    wrote: Callable[[int], object],
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Write a part's weights; returns shape and dtype by key.

    Args:
        made: tensors that are not stored.
        wrote: called with the number of bytes written.
    """
    header = {
        key: (torch_shape(t.name, t.shape), target_dtype(t.dtype, dtype))
        for key, t in tensors.items()
    }
    header |= {key: (array.shape, array.dtype) for key, array in made.items()}

    def arrays() -> Iterator[np.ndarray]:
        for tensor, array in read_all(stored, list(tensors.values())):
            yield to_torch(tensor.name, array).astype(target_dtype(array.dtype, dtype), copy=False)
            wrote(tensor.nbytes)
        yield from made.values()

    write_safetensors(path, header, arrays())
    return header


def read_all(
    stored: StoredWeights, tensors: Sequence[StoredTensor]
) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """Tensors with their values, of which few are in memory at a time."""
    for group in groups(tensors, [tensor.nbytes for tensor in tensors]):
        check()
        yield from zip(group, stored.read(group), strict=True)
