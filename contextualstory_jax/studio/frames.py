"""Frames that follow their sentences, and stories as they are saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from contextualstory_jax.sampling.arguments import SEEDS
from contextualstory_jax.sampling.pretrained import SHIPPED
from contextualstory_jax.sampling.prompts import Story, fit_image
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.studio.worker import BATCH, Model

MOVES = ("earlier", "later", "remove")  # of a frame among the others


def order_after(move: str, frame: int, count: int) -> list[int]:
    """Numbers of `count` frames after one of them was moved or removed."""
    others = [i for i in range(count) if i != frame]
    if move == "remove":
        return others
    place = min(max(frame + (1 if move == "later" else -1), 0), count - 1)
    return [*others[:place], frame, *others[place:]]


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


def next_seed(saved: SavedStory | None, frame: Any, seed: int) -> int:
    """The seed, or one that is no frame's where it is this frame's, so that the frame changes."""
    seeds = () if saved is None else saved.seeds
    if frame not in range(len(seeds)) or seeds[frame] != seed:
        return seed
    return (max(other for other in seeds if other is not None) + 1) % (SEEDS[1] + 1)


def moved_context(
    context: Mapping[int, str],
    old: Sequence[str],
    new: Sequence[str],
    sources: Sequence[int | None],
) -> dict[int, str]:
    """Words of a story's context, by the numbers of the sentences that are the same."""
    return {
        i: context[source]
        for i, source in enumerate(sources)
        if source is not None and source in context and old[source] == new[i]
    }


def moved_storyflow(values: Sequence[float], order: Sequence[int]) -> list[float]:
    """Values of the transitions into frames that are in another order."""
    return [values[max(frame - 1, 0)] for frame in order[1:]]


def by_hand(saved: SavedStory, **changes: Any) -> SavedStory:
    """A story with changes that no generation made; all of its frames are kept ones."""
    changed = dataclasses.replace(saved, **changes)
    kept = {"kept": list(range(len(changed.seeds))), "initial_latents": None}
    return dataclasses.replace(changed, settings={**changed.settings, **kept})


def reordered(saved: SavedStory, order: Sequence[int], frames: int) -> SavedStory:
    """A story with its frames in another order, of which some may be left out.

    Args:
        saved: the story.
        order: frame numbers of it.
        frames: the model's, at once.
    """
    old, story = saved.story.sentences, saved.story
    new = [old[i] for i in order]
    settings, flow = dict(saved.settings), saved.settings.get("storyflow")
    if isinstance(flow, list) and len(flow) > frames - 1:  # one of each transition
        settings["storyflow"] = moved_storyflow(flow, order) if len(order) > frames else None
    chosen = np.asarray(order)
    return by_hand(
        saved,
        story=story._replace(
            sentences=tuple(new), context=moved_context(story.context, old, new, order)
        ),
        images=saved.images[chosen],
        latents=None if saved.latents is None else saved.latents[chosen],
        seeds=tuple(saved.seeds[i] for i in order),
        settings=settings,
    )


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
        "negative_prompt": options["negative_prompt"],
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


def is_of(saved: SavedStory, model: Model) -> bool:
    """Whether frames are of this model, of the same weights, so that it takes their latents."""
    theirs = saved.checkpoint.get("path", ""), saved.checkpoint.get("step")
    return theirs == (checkpoint_path(model), model.step)


def checkpoint_path(model: Model) -> str | None:
    """The checkpoint as `story.json` names it; None for the model that ships."""
    return None if model.folder == SHIPPED else str(model.folder.absolute())
