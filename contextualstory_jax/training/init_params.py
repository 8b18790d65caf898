"""Initial parameters: fresh ones, or those of another checkpoint folder."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from contextualstory_jax.checkpoints.layout import (
    held_parts,
    load_weights,
    read_model,
    refuse_another,
)
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.conversion.diffusers_format import SD_UNET
from contextualstory_jax.conversion.torch_names import ADDED
from contextualstory_jax.data.loader import TOKENIZER_DIR
from contextualstory_jax.distributed.multihost import say
from contextualstory_jax.distributed.sharding import Placement
from contextualstory_jax.models.story_model import Parts, StoryModel

# Fields that may differ from the model that training begins with: sizes and first values, and
# whether a first frame is given, which adds layers.
FREE = {
    "sample_size",
    "first_frame_condition_mode",
    "zero_init_storyflow_adapter",
    "zero_init_FSText",
}
# Fields of the scheduler that decide what the UNet predicts.
PREDICTION = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
}


def tokenizer_folder(config: TrainConfig, workdir: Path) -> Path:
    """The tokenizer's files: the workdir's own, those of the text encoder, or the stories'."""
    own = workdir / "tokenizer"
    if own.is_dir():
        return own
    if config.init_from is None or "text_encoder" not in config.init_parts:
        return TOKENIZER_DIR
    return Path(config.init_from) / "tokenizer"


def with_scaling_factor(config: TrainConfig, workdir: Path) -> TrainConfig:
    """The config with the scaling factor measured for the VAE that the run continues with.

    That is the workdir's own or that of `config.init_from`.
    """
    own = (workdir / "model.json").is_file()
    if not own and (config.init_from is None or "vae" not in config.init_parts):
        return config
    theirs = read_model(workdir if own else Path(config.init_from or "")).vae
    vae = dataclasses.replace(config.model.vae, scaling_factor=theirs.scaling_factor)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vae=vae))


def initial_params(model: StoryModel, config: TrainConfig, placement: Placement) -> Parts:
    """Float32 parameters before the first step, each where it is kept; says where they are from.

    Those of `config.init_from` are its averaged ones where it has such. Only what Stable Diffusion
    does not have may be fresh, and a part that is not in `config.init_parts` or that the folder
    does not hold, as a VAE's the others. At most one fresh one is unsharded in memory at any time.

    Raises `UserError` where `config.init_from` is another model.
    """
    placed = placement.shardings(model.shapes)
    given: Parts = {}
    if config.init_from is not None:
        given, source = stored_params(model, Path(config.init_from), placement, config.init_parts)
    params: Parts = {part: {} for part in model.shapes}
    fresh = Counter[str]()
    for part, network in model.networks.items():
        for name in network.shapes:
            if name in given.get(part, {}):
                params[part][name] = given[part].pop(name)
                continue
            drawn = network.draw(config.seed, name)
            params[part][name] = jax.make_array_from_callback(
                drawn.shape, placed[part][name], drawn.__getitem__
            )
            if part not in given:
                fresh[part] += 1
            elif layer := re.fullmatch(ADDED, name):
                fresh[layer[2]] += 1
    if config.init_from is not None:
        listed = ", ".join(f"{count} of {layer}" for layer, count in fresh.items())
        say(f"{source}; fresh: {listed or 'none'}")
    return params


def stored_params(
    model: StoryModel, folder: Path, placement: Placement, parts: Sequence[str]
) -> tuple[Parts, str]:
    """The parameters of those `parts` that a checkpoint folder holds, float32, placed; their name.

    Raises `UserError` where they are another model's.
    """
    theirs, held = read_model(folder), held_parts(folder)
    compared = [part for part in model.shapes if part in held and part in parts]
    ours, stored = (
        {part: values for part, values in spatial(config).items() if part in compared}
        for config in (model.config, theirs)
    )
    refuse_another(folder, stored, ours, "init_from")
    # A checkpoint's item is read as it is, so that all of its parts are.
    shapes = StoryModel(theirs).shapes
    shapes = {part: (model.shapes if part in compared else shapes)[part] for part in held}
    shapes = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        placement.shardings(shapes),
    )
    params, meta = load_weights(folder, None, shapes, may_lack=ADDED)
    if "unet" in compared and not meta.get("absent"):  # which Stable Diffusion leaves to the config
        refuse_another(folder, temporal(theirs), temporal(model.config), "init_from")
    params = {part: params[part] for part in compared}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return params, f"{meta['weights']} parameters of {folder}"


def spatial(config: ModelConfig) -> dict[str, Any]:
    """The values that decide the meaning of the weights that Stable Diffusion has too."""
    values = dataclasses.asdict(config)
    unet = {k: v for k, v in values["unet"].items() if k in SD_UNET and k not in FREE}
    vae = {k: v for k, v in values["vae"].items() if k not in FREE}
    return {"unet": unet, "vae": vae, "text_encoder": values["text_encoder"]}


def temporal(config: ModelConfig) -> dict[str, Any]:
    """The values that decide the meaning of all others."""
    values = dataclasses.asdict(config)
    unet = {k: v for k, v in values["unet"].items() if k not in {*SD_UNET, *FREE}}
    scheduler = {k: v for k, v in values["scheduler"].items() if k in PREDICTION}
    return {"unet": unet, "scheduler": scheduler}
