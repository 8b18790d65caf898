"""The rows of `scripts/parity_report.py`: relative errors of one checkpoint in several dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.loader import test_stories as held_out
from contextualstory_jax.diffusion.noise_schedules import add_noise, noise_schedule
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.models.vae import decode_latents
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.testing.parity_cases import (
    COMPARE,
    Case,
    compare,
    compare_pipeline,
    relative_error,
)
from contextualstory_jax.utils.errors import UserError

Arrays = dict[str, jax.Array]
Module = Callable[[StoryModel, Parts, Arrays], jax.Array | None]

TIMESTEP = 500  # whose noise the UNet is given


class Row(NamedTuple):
    """A line of the report: an error a dtype, and the largest that float32 may have on a CPU."""

    name: str
    errors: list[float]
    tolerance: float | None = None


def case_rows(
    cases: Mapping[Path, Mapping[str, Any]], checkpoint: Path, pipelines: Sequence[StoryPipeline]
) -> Iterator[Row]:
    """Cases against the original, a row an output; `pipelines` are `checkpoint` in each dtype.

    Raises `UserError` for a case that is incomplete or damaged.
    """
    for path, info in cases.items():
        try:
            if info["kind"] in COMPARE:
                outputs = [list(compare(Case(path, p.model.dtype))) for p in pipelines]
            elif info["kind"] == "pipeline" and is_shell_of(path.parent / "checkpoint", checkpoint):
                outputs = [list(compare_pipeline(path, pipeline)) for pipeline in pipelines]
            else:
                continue
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} is no parity case ({error!r}); copy it again") from error
        name = path.parent.name if path.name == "case.json" else path.stem
        for same in zip(*outputs, strict=True):
            errors = [relative_error(output.ours, output.theirs) for output in same]
            yield Row(f"{name} {same[0].what}".strip(), errors, same[0].tolerance)


def is_shell_of(shell: Path, checkpoint: Path) -> bool:
    """Whether a released folder without weights is configured as what a checkpoint came from."""
    ours = checkpoint / "released"
    return all(
        (ours / name).is_file()
        and json.loads((ours / name).read_text()) == json.loads((shell / name).read_text())
        for name in (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
    )


def module_rows(pipelines: Sequence[StoryPipeline]) -> Iterator[Row]:
    """A checkpoint's modules against themselves in float32 on the CPU.

    Each is given the outputs of those before it.

    Args:
        pipelines: the checkpoint in each dtype, float32 first.
    """
    model, cpu = StoryModel(pipelines[0].model.config), jax.devices("cpu")[0]
    params = jax.device_put(pipelines[0].params, cpu)
    arrays = jax.device_put(story_arrays(pipelines[0]), cpu)
    everywhere = NamedSharding(pipelines[0].mesh, PartitionSpec())
    for title, output, function in MODULES:
        if output == "storyflow" and not model.config.unet.use_motion_condition:
            continue
        with jax.default_matmul_precision("highest"):
            theirs = compute(function, model, params, arrays)
        given = jax.device_put(arrays, everywhere)
        ours = [compute(function, p.model, p.params, given) for p in pipelines]
        yield Row(title, [relative_error(x, theirs) for x in ours])
        arrays[output] = jax.device_put(theirs, cpu)


def compute(function: Module, model: StoryModel, params: Parts, arrays: Arrays) -> np.ndarray:
    """The output of a module, computed where its arguments lie."""
    program = jax.jit(lambda params, arrays: function(model, params, arrays))
    return np.asarray(program(params, arrays), np.float32)


def story_arrays(pipeline: StoryPipeline) -> Arrays:
    """The first inputs of the modules: a synthetic story, StoryFlow's mean and seeded noise."""
    config = pipeline.model.config
    (story,) = held_out(DataConfig(), config.height, 1)
    sides = config.latent_size(config.height, config.height)
    shape = (1, config.unet.n_frames, *sides, config.unet.in_channels)
    return {
        "ids": jnp.asarray(pipeline.tokenizer(story.sentences))[None],
        "images": jnp.asarray(story.images)[None],
        "motion": jnp.asarray(pipeline.storyflow)[None],
        "noise": jax.random.normal(jax.random.key(0), shape),
    }


def storyflow(model: StoryModel, params: Parts, x: Arrays) -> jax.Array | None:
    """The embedding of the story's scene changes."""
    return model.unet.bind(params["unet"], model.dtype).storyflow(x["motion"])


def predict(model: StoryModel, params: Parts, x: Arrays) -> jax.Array:
    """The UNet's prediction for the story, half-way noisy."""
    t = jnp.array([TIMESTEP])
    noisy = add_noise(noise_schedule(model.config.scheduler), x["latents"], x["noise"], t)
    shifts = model.time_shifts(params, t, x["motion"])
    text, first_frame = model.text_keys_values(params, x["storyline"]), None
    if model.config.unet.is_continuation:
        noisy, first_frame = noisy[:, 1:], x["latents"][:, 0]
    return model.predict(params, noisy, shifts, text, first_frame)


def encode(model: StoryModel, params: Parts, x: Arrays) -> jax.Array:
    """Latents of the story's images, sampled with the same noise in every dtype."""
    return model.encode_images(params, x["images"], jax.random.key(0)[None])


def decode(model: StoryModel, params: Parts, x: Arrays) -> jax.Array:
    """Images of the latents, before they are cut to 8 bits."""
    vae = model.vae.bind(params["vae"], model.dtype)
    return decode_latents(vae, x["latents"][0], model.config.vae.scaling_factor)


# In the order of a story's way: a row's name, the array that the module adds, and the module.
MODULES: tuple[tuple[str, str, Module], ...] = (
    ("text encoder", "text", lambda m, p, x: m.encode_text(p, x["ids"])),
    ("Storyline Contextualizer", "storyline", lambda m, p, x: m.contextualize(p, x["text"])),
    ("StoryFlow Adapter", "storyflow", storyflow),
    ("VAE encoder", "latents", encode),
    ("UNet", "prediction", predict),
    ("VAE decoder", "pictures", decode),
)
