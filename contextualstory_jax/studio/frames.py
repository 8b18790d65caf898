"""Frames that follow their sentences, and stories as they are saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from contextualstory_jax.sampling.pretrained import SHIPPED
from contextualstory_jax.sampling.prompts import Story, fit_image
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.studio.worker import BATCH, Model


def sources_of(old: Sequence[str], new: Sequence[str]) -> list[int | None]:
    """For each new sentence the frame that it had; a changed one has the frame in its place."""
    left = list(range(len(old)))
    found: list[int | None] = []
    for sentence in new:
        same = next((i for i in left if old[i] == sentence), None)
        found.append(same)
        if same is not None:
            left.remove(same)
    if len(old) == len(new):
        return [i if source is None and i in left else source for i, source in enumerate(found)]
    return found


def arranged(
    saved: SavedStory | None,
    story: Story,
    sources: Sequence[int | None],
    size: tuple[int, int],
    own: Mapping[int, np.ndarray],
) -> SavedStory:
    """A story with the frames that its sentences had, black ones where they had none."""
    images = np.zeros((len(sources), *size, 3), np.uint8)
    latents = None
    if saved is not None and saved.images.shape[1:3] == size:
        if saved.latents is not None and not own:
            latents = np.zeros((len(sources), *saved.latents.shape[1:]), np.float32)
        for i, source in enumerate(sources):
            if source is not None:
                images[i] = saved.images[source]
                if latents is not None and saved.latents is not None:
                    latents[i] = saved.latents[source]
    seeds = [None if i is None or saved is None else saved.seeds[i] for i in sources]
    for i, image in own.items():
        images[i], seeds[i] = fit_image(image, *size), None
    checkpoint = {} if saved is None else saved.checkpoint
    return SavedStory(story, images, latents, tuple(seeds), checkpoint, {})


def generated_story(
    model: Model,
    old: SavedStory,
    keep: Sequence[bool],
    seed: int,
    options: Mapping[str, Any],
    images: np.ndarray,
    latents: np.ndarray,
) -> SavedStory:
    """A generated story with all that `generate --from` needs to make it again."""
    pipeline = model.pipeline
    flow = options["storyflow"]
    settings = dataclasses.asdict(options["sampling"]) | {
        "negative_prompt": None,
        "storyflow": pipeline.storyflow.tolist() if flow is None else list(flow),
        "frameinit": None,
        "camera_motion": None,
        "window_overlap": options["window_overlap"],
        "height": options["size"][0],
        "width": options["size"][1],
        "dtype": "float32",
        "initial_latents": None,
        "kept": [i for i, kept in enumerate(keep) if kept],
        "shared_noise_seed": options["shared_noise_seed"],
        "batch_size": BATCH,
        "device": jax.local_devices()[0].device_kind,
        "seed": seed,
    }
    checkpoint = {
        "path": checkpoint_path(model),
        "step": pipeline.step,
        "weights": pipeline.weights,
    }
    seeds = tuple(old if stays else seed for old, stays in zip(old.seeds, keep, strict=True))
    return SavedStory(old.story, images, latents, seeds, checkpoint, settings)


def checkpoint_path(model: Model) -> str | None:
    """The checkpoint as `story.json` names it; None for the model that ships."""
    return None if model.folder == SHIPPED else str(model.folder.absolute())
