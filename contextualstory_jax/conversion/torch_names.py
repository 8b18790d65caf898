"""PyTorch's checkpoint keys and layouts <-> our names and layouts; no other file knows them.

A parameter's name is its PyTorch key but for the last word (`kernel`, `scale`, `embedding` for
`weight`), so the table holds layouts only. Conversion is numpy only: it needs neither a GPU nor the
PyTorch model class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from contextualstory_jax.models.network import Params
from contextualstory_jax.utils.errors import UserError

# (pattern of our name, last word of the PyTorch key, axes of the PyTorch tensor in our order, its
# number of axes)
LAYOUTS: tuple[tuple[str, str, tuple[int, ...] | None, int], ...] = (
    # (out, in, 3, 1, 1) -> (3, 1, in, out)
    (r".*\.conv3ds\.\d+\.conv[12]\.kernel", "weight", (2, 3, 1, 0), 5),
    # (out, in, t, h, w) -> (t, h, w, in, out)
    (r".*\.kernel", "weight", (2, 3, 4, 1, 0), 5),
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
    (r".*\.position_ids", "a buffer holding 0, 1, 2, ..."),
    (r".*\.num_batches_tracked", "counts the steps of a batch norm's training"),
    (r"logit_scale", "the temperature of CLIP's training loss"),
)

# What Stable Diffusion's UNet does not have, in PyTorch's names and in ours.
ADDED = (
    r"(.*\.)?(conv3ds|tempo_attns|first_frame_conv|text_adapter|msim_embedding"
    r"|frame_stride_embedding)\..*"
)

# Names that other versions of diffusers and transformers use -> those of the released folders.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"(.*\.mid_block\.attentions\.0)\.query\.(.*)", r"\1.to_q.\2"),
    (r"(.*\.mid_block\.attentions\.0)\.key\.(.*)", r"\1.to_k.\2"),
    (r"(.*\.mid_block\.attentions\.0)\.value\.(.*)", r"\1.to_v.\2"),
    (r"(.*\.mid_block\.attentions\.0)\.proj_attn\.(.*)", r"\1.to_out.0.\2"),
    (r"((embeddings|encoder\.layers|final_layer_norm)\..*)", r"text_model.\1"),
)


def canonical_key(key: str) -> str:
    """The released folders' name of a tensor."""
    for pattern, name in RENAMED:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    return key


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


class Match(NamedTuple):
    """The matching of a PyTorch checkpoint's tensors to a model's parameters."""

    keys: dict[str, str]  # of the tensor that fills a parameter, by the parameter's name
    dead: dict[str, str]  # of tensors that nothing reads, by their canonical keys
    missing: list[str]  # canonical keys of parameters that no tensor fills
    problems: list[str]


def match_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, Any]) -> Match:
    """Compare PyTorch tensors with the parameters of `shapes`, both name -> what has a shape."""
    names = {torch_key(name, len(s.shape)): name for name, s in shapes.items()}
    found = Match({}, {}, [], [])
    seen: dict[str, str] = {}
    for given, tensor in tensors.items():
        key = canonical_key(given)
        name = names.get(key)
        if key in seen:
            found.problems.append(f"{given}: the same tensor as {seen[key]}")
        elif name is not None:
            found.keys[name] = given
            expected = torch_shape(name, shapes[name].shape)
            if tuple(tensor.shape) != expected:
                found.problems.append(f"{given}: shape {tuple(tensor.shape)}, expected {expected}")
        elif any(re.fullmatch(pattern, key) for pattern, _ in DEAD):
            found.dead[key] = given
        else:
            found.problems.append(f"{given}: no such parameter in this model")
        seen[key] = given
    found.missing.extend(sorted(names.keys() - seen.keys()))
    return found


def convert(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> Params:
    """Parameters of `shapes` (name -> shape and dtype) from PyTorch tensors, complete or refused.

    Every tensor is used or on the list of dead names, every parameter filled, every shape checked.
    Raises `UserError` with all problems in one message.
    """
    found = match_tensors(tensors, shapes)
    problems = found.problems + [f"{key}: missing" for key in found.missing]
    if problems:
        raise UserError("weights do not fit this model: " + "; ".join(sorted(problems)))
    return {
        name: from_torch(name, tensors[key], len(shapes[name].shape))
        for name, key in found.keys.items()
    }


def dead_tensors(shapes: Mapping[str, Any], n_temp_heads: int) -> dict[str, np.ndarray]:
    """The original's tensors beside the parameters of `shapes`, by PyTorch key: all zeros.

    Only `position_ids` counts. Reference: videoldm_unet_blocks.py TemporalResnetBlock;
    videoldm_attention.py RelativePositionBias, PositionalEncoding; transformers CLIPTextEmbeddings.
    """
    dead: dict[str, np.ndarray] = {}
    for name, declared in shapes.items():
        if found := re.fullmatch(r"(.*\.conv3ds\.\d+)\.conv1\.kernel", name):
            channels = declared.shape[-1]
            # 512 whatever the width of the time embedding.
            dead[f"{found[1]}.time_emb_proj.weight"] = np.zeros((channels, 512), np.float32)
            dead[f"{found[1]}.time_emb_proj.bias"] = np.zeros(channels, np.float32)
        elif found := re.fullmatch(r"(.*\.tempo_attns\..*\.attn[12])\.to_q\.kernel", name):
            if f"{found[1]}.rotary_emb.freqs" in shapes:
                key = f"{found[1]}.rotary_bias.relative_attention_bias.weight"
                dead[key] = np.zeros((32, n_temp_heads), np.float32)
            else:
                dead[f"{found[1]}.pos_enc.dummy"] = np.zeros(1, np.float32)
        elif found := re.fullmatch(r"(.*)\.position_embedding\.embedding", name):
            dead[f"{found[1]}.position_ids"] = np.arange(declared.shape[0])[None]
    return dead
