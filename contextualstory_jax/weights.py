"""PyTorch's checkpoint keys and layouts <-> our names and layouts; no other file knows them.

A parameter's name is its PyTorch key but for the last word (`kernel`, `scale`, `embedding` for
`weight`), so the table holds layouts only. Conversion is numpy only: it needs neither a GPU nor the
PyTorch model class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from contextualstory_jax.errors import UserError
from contextualstory_jax.models.network import Params

# (pattern of our name, last word of the PyTorch key, axes of the PyTorch tensor in our order, its
# number of axes)
LAYOUTS: tuple[tuple[str, str, tuple[int, ...] | None, int], ...] = (
    # (out, in, 3, 1, 1) -> (3, 1, in, out)
    (r".*\.conv3ds\.\d+\.conv[12]\.kernel", "weight", (2, 3, 1, 0), 5),
    # (out, in, h, w) -> (h, w, in, out)
    (r".*\.kernel", "weight", (2, 3, 1, 0), 4),
    # (out, in) -> (in, out)
    (r".*\.kernel", "weight", (1, 0), 2),
    (r".*\.(scale|embedding)", "weight", None, 0),
    (r".*", "", None, 0),
)

# Tensors of PyTorch checkpoints that no computation reads, each with the reason.
DEAD: tuple[tuple[str, str], ...] = (
    (r".*\.conv3ds\.\d+\.time_emb_proj\.(weight|bias)", "given no time embedding"),
    (r".*\.rotary_bias\.relative_attention_bias\.weight", "the original comments its use out"),
    (r".*\.pos_enc\.dummy", "remembers a device"),
    (r".*\.position_ids", "a buffer holding 0..76"),
)


def _layout(name: str, ndim: int) -> tuple[str, tuple[int, ...] | None, int]:
    for pattern, word, axes, torch_ndim in LAYOUTS:
        if re.fullmatch(pattern, name) and (axes is None or len(axes) == ndim):
            return word, axes, torch_ndim
    raise AssertionError("the last row matches everything")


def torch_key(name: str, ndim: int) -> str:
    """The PyTorch key of our parameter `name`, which has `ndim` axes."""
    word, _, _ = _layout(name, ndim)
    head, _, last = name.rpartition(".")
    return f"{head}.{word or last}" if head else word or last


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of our parameter `name` in the PyTorch layout."""
    _, axes, torch_ndim = _layout(name, len(shape))
    if axes is None:
        return shape
    return tuple(shape[i] for i in np.argsort(axes)) + (1,) * (torch_ndim - len(axes))


def from_torch(name: str, tensor: np.ndarray, ndim: int) -> np.ndarray:
    """A PyTorch tensor in the layout of our parameter `name`, which has `ndim` axes."""
    _, axes, _ = _layout(name, ndim)
    if axes is None:
        return tensor
    return np.ascontiguousarray(tensor.reshape(tensor.shape[: len(axes)]).transpose(axes))


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Our parameter `name` in the PyTorch layout."""
    _, axes, _ = _layout(name, array.ndim)
    if axes is None:
        return array
    return np.ascontiguousarray(array.transpose(np.argsort(axes))).reshape(
        torch_shape(name, array.shape)
    )


def convert(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> Params:
    """Parameters of `shapes` (name -> shape and dtype) from PyTorch tensors, complete or refused.

    Every tensor is used or on the list of dead names, every parameter filled, every shape checked.
    Raises `UserError` with all problems in one message.
    """
    keys = {torch_key(name, len(s.shape)): name for name, s in shapes.items()}
    params, problems = {}, []
    for key, tensor in tensors.items():
        name = keys.pop(key, None)
        if name is None:
            if not any(re.fullmatch(pattern, key) for pattern, _ in DEAD):
                problems.append(f"{key}: no such parameter in this model")
            continue
        expected = torch_shape(name, shapes[name].shape)
        if tuple(tensor.shape) != expected:
            problems.append(f"{key}: shape {tuple(tensor.shape)}, expected {expected}")
            continue
        params[name] = from_torch(name, tensor, len(shapes[name].shape))
    problems += [f"{key}: missing" for key in keys]
    if problems:
        raise UserError("weights do not fit this model: " + "; ".join(sorted(problems)))
    return params
