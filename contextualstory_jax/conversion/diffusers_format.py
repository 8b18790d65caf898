"""The released folder layout: which files it has, and their JSON <-> our config dataclasses.

::

    FOLDER/model_index.json            the pipeline's parts and their classes
    FOLDER/unet/, vae/, text_encoder/  config.json and weights
    FOLDER/unet_ema/                   in a training checkpoint: the averaged UNet
    FOLDER/tokenizer/                  CLIP tokenizer files
    FOLDER/scheduler/scheduler_config.json
    FOLDER/cumulative_motion.json      StoryFlow's mean, [[m1, m2, m3, m4]]

A key of a config.json either is a field of a dataclass, or may only have the value that says what
this model does. A key that is absent has its class's default, as in the original.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import (
    AutoencoderKLConfig,
    ModelConfig,
    SchedulerConfig,
    TextEncoderConfig,
    UNetConfig,
)
from contextualstory_jax.utils.errors import UserError, require

# Released pipelines and what they start from.
Kind = Literal["contextualstory", "stable_diffusion"]
UNET_CLASSES: dict[str, Kind] = {
    "VideoLDMUNet3DConditionModel": "contextualstory",
    "UNet2DConditionModel": "stable_diffusion",
}
PIPELINES: dict[str, Kind] = {
    "ConditionalAnimationPipeline": "contextualstory",
    "StableDiffusionPipeline": "stable_diffusion",
}
# Stem of the weights' file by its suffix, the safer first.
DIFFUSERS_WEIGHTS = {
    "safetensors": "diffusion_pytorch_model",
    "bin": "diffusion_pytorch_model",
}
WEIGHTS = {
    "unet": DIFFUSERS_WEIGHTS,
    "unet_ema": DIFFUSERS_WEIGHTS,
    "vae": DIFFUSERS_WEIGHTS,
    "text_encoder": {"safetensors": "model", "bin": "pytorch_model"},
}
SCHEDULER = "scheduler/scheduler_config.json"
STORYFLOW = "cumulative_motion.json"
INDEX = "model_index.json"
JSON_FILES = (
    INDEX,
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    SCHEDULER,
    STORYFLOW,
)

# Every key of a config.json with the default of its class, diffusers 0.21's and transformers
# 4.30's; those that are no field of our dataclass must have it. Source: reference videoldm_unet.py
# VideoLDMUNet3DConditionModel.__init__, diffusers AutoencoderKL and DDIMScheduler, transformers
# CLIPTextConfig.
SD_UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
UNET = SD_UNET | {
    "use_temporal": {"temporal_attn": True, "temporal_conv": True},
    "n_frames": 8,
    "n_temp_heads": 8,
    "first_frame_condition_mode": "none",
    "augment_temporal_attention": False,
    "temp_pos_embedding": "sinusoidal",
    "use_frame_stride_condition": False,
    "use_text_cross_attention": None,
    "use_motion_condition": False,
    "num_layers_FStext": 4,
    "zero_init_storyflow_adapter": True,
    "zero_init_FSText": True,
    "FStext_layer_depth": 2,
    "FStext_layer_temporal": [False, True],
    "FStext_layer_causal": [False, False],
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
DDIM: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "clip_sample_range": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
# Keys of later diffusers, which may have only this value, and are not written.
LATER: dict[str, Any] = {
    "reverse_transformer_layers_per_block": None,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Keys whose value changes nothing here, with what an export writes: where float16 would overflow,
# options of what is switched off, what only a tokenizer, an initialisation or training reads.
WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "unet": {"upcast_attention": False, "addition_embed_type_num_heads": 64},
    "vae": {"force_upcast": True},
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "pad_token_id": 1,
        "projection_dim": 512,
        "transformers_version": "4.30.2",
    },
    "scheduler": {"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0},
}
# What diffusers' EMAModel adds to unet_ema/config.json.
EMA_KEYS = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
DTYPE_KEYS = ("dtype", "torch_dtype")  # of text_encoder/config.json; the tensors know better


@contextlib.contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Append the message of a `UserError` to `problems` instead of raising it."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `UserError` where it is missing or damaged."""
    require(path.is_file(), f"{path} is missing")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON; copy it again") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON file with names and values. Raises `UserError` where it has none."""
    values = read_json(path)
    require(isinstance(values, dict), f"{path} holds no names and values; copy it again")
    return values


def read_kind(folder: Path) -> Kind:
    """Whose UNet a folder holds. Raises `UserError` where its JSON names another class."""
    kind = _choose(folder / "unet/config.json", UNET_CLASSES)
    if (folder / INDEX).exists():
        require(
            _choose(folder / INDEX, PIPELINES) == kind,
            f"{folder / INDEX} is of another pipeline than {folder / 'unet/config.json'}",
        )
    return kind


def _choose(path: Path, classes: Mapping[str, Kind]) -> Kind:
    name = str(read_mapping(path).get("_class_name"))
    require(name in classes, f"{path} is of class {name}; this reads {' and '.join(classes)}")
    return classes[name]


def find_parts(source: Path, kind: Kind) -> dict[str, Path]:
    """The folder of each part.

    A training checkpoint of the original, RUN/checkpoints/checkpoint-N, holds UNets alone; the rest
    is then taken from RUN/final_checkpoint, as the original's eval.py does.
    Raises `UserError` where a part is nowhere.
    """
    final = source.absolute().parent.parent / "final_checkpoint"
    trained = (source / "unet_ema").is_dir()
    folders = {part: source / part for part in ("unet", "unet_ema") if (source / part).is_dir()}
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        places = (source, final) if trained else (source,)
        found = next((place / part for place in places if (place / part).is_dir()), None)
        if found is not None:
            folders[part] = found
    needed = ["unet", "vae", "text_encoder", "tokenizer"]
    if kind == "contextualstory" and not trained:
        needed.append("scheduler")
    missing = [part for part in needed if part not in folders]
    mend = (
        f"copy {final}'s, or Stable Diffusion 2.1-base's, into it"
        if trained
        else "give a complete pipeline folder"
    )
    require(not missing, f"{source} has no {', '.join(missing)}; {mend}")
    return folders


def read_config(parts: Mapping[str, Path], kind: Kind, text_length: int | None) -> ModelConfig:
    """The model that the JSON files of a folder describe.

    Stable Diffusion's own scheduler is passed over: its UNet is trained on with ContextualStory's.

    Args:
        parts: the folder of each part.
        text_length: rows of the contextualizer's position table, which no file records.

    Raises:
        UserError: with all that this model cannot be.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    with collected(problems):
        values["unet"] = read_unet(parts["unet"] / "config.json", kind)
        if "unet_ema" in parts:
            path = parts["unet_ema"] / "config.json"
            for key, value in read_unet(path, kind).items():
                raw = values["unet"].get(key)
                require(value == raw, f"{path}: {key} = {value!r}, but {raw!r} in unet/config.json")
        if text_length is not None:
            values["unet"]["max_text_length"] = text_length
    with collected(problems):
        path = parts["vae"] / "config.json"
        channels = read_mapping(path).get("block_out_channels")
        known = VAE | vae_blocks(len(channels) if isinstance(channels, list) else 1)
        values["vae"] = _read(
            path, "AutoencoderKL", known, WITHOUT_EFFECT["vae"], AutoencoderKLConfig
        )
    with collected(problems):
        path = parts["text_encoder"] / "config.json"
        free = WITHOUT_EFFECT["text_encoder"] | dict.fromkeys(DTYPE_KEYS)
        values["text_encoder"] = _read(path, None, TEXT_ENCODER, free, TextEncoderConfig)
    # A training checkpoint has no scheduler: the original's configs say it, and so do our defaults.
    if kind == "contextualstory" and "scheduler" in parts:
        with collected(problems):
            path = parts["scheduler"] / "scheduler_config.json"
            free = WITHOUT_EFFECT["scheduler"]
            values["scheduler"] = _read(path, "DDIMScheduler", DDIM, free, SchedulerConfig)
    require(not problems, "; ".join(problems))
    return build(ModelConfig, values)


def vae_blocks(levels: int) -> dict[str, list[str]]:
    """Keys of the VAE's config.json that follow from its number of levels."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def read_unet(path: Path, kind: Kind) -> dict[str, Any]:
    """The fields of `UNetConfig` that a config.json gives. Raises `UserError` for other models."""
    known = UNET if kind == "contextualstory" else SD_UNET
    free = WITHOUT_EFFECT["unet"] | dict.fromkeys(EMA_KEYS)
    name = next(name for name, of in UNET_CLASSES.items() if of == kind)
    values = _read(path, name, known, free, UNetConfig)
    return {key: value for key, value in values.items() if (key, value) != ("sample_size", None)}


def _read(
    path: Path, class_name: str | None, known: Mapping[str, Any], free: Mapping[str, Any], cls: type
) -> dict[str, Any]:
    """The values of a config.json that are fields of `cls`, defaults of the original's class in."""
    values = read_mapping(path)
    found = values.get("_class_name")
    require(found == class_name, f"{path} is of class {found}; this reads {class_name or 'CLIP'}")
    fields = {field.name for field in dataclasses.fields(cls)}
    only = {key: value for key, value in {**known, **LATER}.items() if key not in fields}
    problems = [
        f"{path}: {key} = {value!r}; this model only has {only[key]!r}"
        for key, value in values.items()
        if key in only and value != only[key]
    ]
    problems += [
        f"{path}: unknown key {key}"
        for key in values
        if not key.startswith("_") and key not in {*known, *LATER, *free}
    ]
    chosen = {key: values.get(key, default) for key, default in known.items() if key in fields}
    with collected(problems):
        build(cls, chosen, f"{path}: ")
    require(not problems, "; ".join(problems))
    return chosen


def read_storyflow(path: Path, config: UNetConfig, kind: Kind) -> list[float]:
    """StoryFlow's mean scene changes; zeros for a model that has none, or is still to be trained.

    Raises `UserError` where the file is missing or holds other than that.
    """
    if kind == "stable_diffusion" or not config.use_motion_condition:
        return [0.0] * (config.n_frames - 1)
    values = read_json(path)
    row: Any = values[0] if isinstance(values, list) and len(values) == 1 else None
    require(
        isinstance(row, list)
        and len(row) in (config.n_frames - 1, config.n_frames)
        and all(type(m) in (int, float) and 0 <= m < math.inf for m in row),
        f"{path} must be [[...]] with {config.n_frames - 1} finite numbers, at least 0; "
        f"got {values!r}"[:300],
    )
    return [float(m) for m in row or []]


def json_files(config: ModelConfig, storyflow: Sequence[float]) -> dict[str, Any]:
    """The JSON of a released folder, by file name, for a model that was trained here."""
    modules = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["contextualstory.models.videoldm_unet", "VideoLDMUNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    assert isinstance(config.vae, AutoencoderKLConfig), "no other codec is in the layout"
    blocks = vae_blocks(len(config.vae.block_out_channels))

    def values(part: str, known: Mapping[str, Any], fields: Any) -> dict[str, Any]:
        given = {key: v for key, v in dataclasses.asdict(fields).items() if key in known}
        named = {} if part == "text_encoder" else _class(modules[part][1])
        return dict(sorted({**named, **known, **WITHOUT_EFFECT[part], **given}.items()))

    return {
        INDEX: _class("ConditionalAnimationPipeline") | modules,
        "unet/config.json": values("unet", UNET, config.unet),
        "vae/config.json": values("vae", VAE, config.vae) | blocks,
        "text_encoder/config.json": values("text_encoder", TEXT_ENCODER, config.text_encoder),
        SCHEDULER: values("scheduler", DDIM, config.scheduler),
        STORYFLOW: [list(storyflow)],
    }


def _class(name: str) -> dict[str, str]:
    return {"_class_name": name, "_diffusers_version": "0.21.2"}
