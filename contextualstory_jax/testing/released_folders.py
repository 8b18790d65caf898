"""Checkpoint folders in the released layout, with weights that follow from their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from contextualstory_jax.conversion import diffusers_format
from contextualstory_jax.conversion.import_torch import parameter_shapes
from contextualstory_jax.conversion.tensor_files import write_safetensors
from contextualstory_jax.conversion.torch_names import dead_tensors, torch_key, torch_shape
from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.testing.parity_weights import torch_weight

# The file that holds each part's weights.
WEIGHT_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
PREFIXES = {"unet": "", "vae": "vae.", "text_encoder": "text_encoder."}  # of `parity_weights` names

Manifest = Mapping[str, Sequence[Any]]  # key -> shape and dtype, as JSON holds them


def tensor(part: str, key: str, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """A weight of a part. A posterior's sample is its mean, as in the parity cases."""
    if key.endswith("position_ids"):
        return np.arange(shape[-1]).reshape(shape)
    made = torch_weight(PREFIXES[part] + key, shape, seed)
    if part == "vae" and key.startswith("quant_conv."):
        made[len(made) // 2 :] = 0 if key.endswith("weight") else -60
    return made.astype(dtype, copy=False)


def write_weights(path: Path, part: str, manifest: Manifest, seed: int) -> None:
    """Write a part's weights, one at a time."""
    types = {
        key: np.dtype("int64" if "position_ids" in key else d) for key, (_, d) in manifest.items()
    }
    header = {key: (tuple(shape), types[key]) for key, (shape, _) in manifest.items()}
    arrays = (tensor(part, key, shape, str(dtype), seed) for key, (shape, dtype) in header.items())
    write_safetensors(path, header, arrays)


def write_folder(
    out: Path, skeleton: Path, manifests: Mapping[str, Manifest], seed: int = 0
) -> Path:
    """Copy a folder without weights, and add those that the manifests name, part by part."""
    for path in skeleton.rglob("*.*"):  # one by one: the skeleton's folders may be read-only
        copy = out / path.relative_to(skeleton)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for part, manifest in manifests.items():
        path = out / WEIGHT_FILES[part]
        path.parent.mkdir(exist_ok=True)
        write_weights(path, part, manifest, seed)
    return out


# The smallest model of the released classes: one level, a text width of 32, 24 text positions.
TINY: dict[str, Any] = {
    "model_index.json": {"_class_name": "ConditionalAnimationPipeline"},
    "unet/config.json": {
        "_class_name": "VideoLDMUNet3DConditionModel",
        "_diffusers_version": "0.21.2",
        "act_fn": "silu",
        "addition_embed_type_num_heads": 64,
        "attention_head_dim": 2,
        "augment_temporal_attention": True,
        "block_out_channels": [32],
        "cross_attention_dim": 32,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "freq_shift": 0,
        "layers_per_block": 1,
        "n_frames": 5,
        "n_temp_heads": 2,
        "num_layers_FStext": 1,
        "sample_size": 16,
        "temp_pos_embedding": "rotary",
        "up_block_types": ["CrossAttnUpBlock2D"],
        "use_linear_projection": True,
        "use_motion_condition": True,
        "use_text_cross_attention": "FSText",
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [32],
        "down_block_types": ["DownEncoderBlock2D"],
        "force_upcast": True,
        "layers_per_block": 1,
        "up_block_types": ["UpDecoderBlock2D"],
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "torch_dtype": "float32",
        "vocab_size": 261,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_start": 0.00085,
        "clip_sample": False,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "cumulative_motion.json": [[31.5, 3.9375, 32.25, 18.875]],
}
TEXT_ROWS = 24


def tiny_folder(out: Path, *, seed: int = 0, dtype: str = "float32", **unet: Any) -> Path:
    """A released folder of the tiny model; `unet` are values of its config.json."""
    for name, values in TINY.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(values))
    change_json(out / "unet/config.json", lambda values: values.update(unet))
    shutil.copytree(TOKENIZER_DIR, out / "tokenizer")
    parts = {part: out / part for part in ("unet", "vae", "text_encoder", "scheduler")}
    config = diffusers_format.read_config(parts, "contextualstory", TEXT_ROWS)
    for part, shapes in parameter_shapes(config).items():
        manifest: dict[str, tuple[tuple[int, ...], str]] = {
            torch_key(name, len(s.shape)): (torch_shape(name, s.shape), dtype)
            for name, s in shapes.items()
        }
        for key, array in dead_tensors(shapes, config.unet.n_temp_heads).items():
            manifest[key] = (array.shape, dtype)
        write_weights(out / WEIGHT_FILES[part], part, manifest, seed)
    return out


def stable_diffusion_folder(out: Path) -> Path:
    """A tiny Stable Diffusion, as its pipeline saves it."""
    tiny_folder(out)
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        (out / name).unlink()
    (out / "cumulative_motion.json").unlink()
    theirs = {
        key: v for key, v in TINY["unet/config.json"].items() if key in diffusers_format.SD_UNET
    }
    for name, values in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": theirs | {"_class_name": "UNet2DConditionModel"},
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    }.items():
        (out / name).write_text(json.dumps(values))
    added = ("conv3ds", "tempo_attns", "text_adapter", "msim_embedding")
    change_weights(
        out,
        "unet",
        lambda w: [w.pop(key) for key in list(w) if any(word in key for word in added)],
    )
    return out


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the values of a JSON file, in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def read_weights(folder: Path, part: str) -> dict[str, np.ndarray]:
    """A part's tensors by key."""
    return load_file(folder / WEIGHT_FILES[part])


def change_weights(
    folder: Path, part: str, change: Callable[[dict[str, np.ndarray]], object]
) -> None:
    """Change a part's tensors, in place."""
    weights = read_weights(folder, part)
    change(weights)
    save_file(weights, folder / WEIGHT_FILES[part], metadata={"format": "pt"})


def shard_weights(folder: Path, part: str) -> None:
    """Split a part's file in two, with an index."""
    weights, single = read_weights(folder, part), folder / WEIGHT_FILES[part]
    single.unlink()
    keys, index = sorted(weights), {}
    for number, chosen in enumerate((keys[::2], keys[1::2]), 1):
        name = f"{single.stem}-{number:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in chosen}, single.with_name(name))
        index |= dict.fromkeys(chosen, name)
    single.with_name(f"{single.name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
