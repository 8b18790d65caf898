"""Files of PyTorch tensors: safetensors, read and written one tensor at a time, and pickles.

A safetensors header is checked before any value is read, so that a model of many gigabytes is
refused, or planned, at once. The library `safetensors` reads it. Values it maps into memory, where
they stay until the file is closed, and to write it takes all of them at once; both are done here,
one tensor at a time. Only this file imports PyTorch, for pickles alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from contextualstory_jax.utils.errors import UserError, require

# Safetensors' names of NumPy's types.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory; `read` brings it there, in PyTorch's layout."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    place: tuple[str, int] = ("", 0)  # file and offset: reading is fastest in this order

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def find_weights(folder: Path, stems: Mapping[str, str]) -> tuple[list[Path], dict[str, str]]:
    """The files that hold a model's weights, and an index's word on which holds what, if any.

    Full precision comes before the `fp16` variant, one file before shards.

    Args:
        stems: file name by suffix, in order of preference.

    Raises:
        UserError: where there are none or the index is damaged.
    """
    for suffix, stem in stems.items():
        for variant in ("", ".fp16"):
            single = folder / f"{stem}{variant}.{suffix}"
            if single.is_file():
                return [single], {}
            index = folder / f"{stem}.{suffix}.index{variant}.json"
            if index.is_file():
                shard_of = _read_index(index)
                return [folder / name for name in sorted(set(shard_of.values()))], shard_of
    expected = " or ".join(f"{stem}.{suffix}" for suffix, stem in stems.items())
    raise UserError(f"{folder} holds no weights: {expected} is missing")


def _read_index(path: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(path.read_text())["weight_map"]
        # A name with a folder in it would lead out of this one.
        whole = bool(shard_of) and all(Path(name).name == name for name in shard_of.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole, shard_of = False, {}
    require(whole, f"{path} is no index of shards; copy it again")
    return shard_of


def open_weights(paths: Iterable[Path], shard_of: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a model's files by their keys, read when asked for.

    Raises `UserError` with all that is wrong: files missing or damaged, a tensor in two files, or
    one that is not where the index says.
    """
    tensors: dict[str, Tensor] = {}
    problems = []
    for path in paths:
        try:
            found = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        except UserError as error:
            problems.append(str(error))
            continue
        problems += [f"{key} is in {path} and in another file" for key in found if key in tensors]
        problems += [
            f"{key} is not in {path}, where the index has it"
            for key, shard in shard_of.items()
            if shard == path.name and key not in found
        ]
        tensors.update(found)
    require(not problems, "; ".join(problems))
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by their keys; only the header is read.

    Raises `UserError` where the file is missing, truncated or corrupt.
    """
    try:
        size = path.stat().st_size
        with safe_open(path, "np") as file:
            entries = {key: file.get_slice(key) for key in file.offset_keys()}
            kinds = {key: (e.get_dtype(), tuple(e.get_shape())) for key, e in entries.items()}
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}; copy it again"
        ) from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{path} is no intact safetensors file: {reason}; copy it again") from error
    for key, (dtype, _) in kinds.items():
        require(
            dtype in DTYPES,
            f"{path}: {key} is of dtype {dtype}; convert it to one of {', '.join(DTYPES)}",
        )
    # The library has checked that they lie one after the other, up to the end of the file.
    tensors = {}
    position = size - sum(math.prod(shape) * DTYPES[d].itemsize for d, shape in kinds.values())
    for key, (name, shape) in kinds.items():
        dtype = DTYPES[name]
        read = functools.partial(_read_values, path, position, shape, dtype)
        tensors[key] = Tensor(shape, dtype, read, (str(path), position))
        position += tensors[key].nbytes
    return tensors


def _read_values(path: Path, position: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    values = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    try:
        with path.open("rb") as file:
            file.seek(position)
            whole = file.readinto(values.data) == values.nbytes
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    require(whole, f"{path} became shorter while it was read")
    return values.view(dtype).reshape(shape)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, without running code that it may hold.

    Raises `UserError` where it holds anything but tensors, is damaged, or PyTorch is missing.
    """
    require(path.is_file(), f"{path} cannot be read: it is missing")
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path} is a pickle, which needs PyTorch: pip install 'contextualstory-jax[torch]', "
            "or take the model's safetensors"
        ) from error
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path} is refused: it is damaged or holds more than tensors, which may be code that "
            "would run; take the model's safetensors"
        ) from error
    require(
        isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values()),
        f"{path} is refused: it is no table of tensors by name",
    )

    def values(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # unknown to NumPy
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def dtype(tensor: torch.Tensor) -> np.dtype:
        return values(tensor.new_empty(0)).dtype

    return {
        key: Tensor(tuple(t.shape), dtype(t), functools.partial(values, t), (str(path), i))
        for i, (key, t) in enumerate(state.items())
    }


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Write tensors, given by shape and dtype, whose arrays come one after the other.

    Raises `OSError` where the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which the original asks for
    position = 0
    for key, (shape, dtype) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (shape, dtype), array in zip(tensors.values(), arrays, strict=True):
            assert (array.shape, array.dtype) == (shape, dtype)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
