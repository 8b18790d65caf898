"""Stories of any length with a model of a few frames: windows that overlap.

A window is as many frames as the model generates together. The first one is generated as any story;
each further one keeps the last frames of the one before, which the network sees at each step's
noise level, and generates those that follow. The noise is one for the entire story, and each window
takes its slice, so that scenery does not jump where windows meet. A shorter story repeats its last
sentence, and the frames of that padding are dropped.

The text encoder does not read what stands before a window: who "she" is, or where. A story's
`context` restates the sentence that a window begins with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Bool, Float32, Int, UInt8

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.diffusion.noise import story_noise
from contextualstory_jax.distributed.sharding import batch_ways
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.sampling.arguments import (
    check_integer,
    check_shared_noise,
    check_stories,
    read_kept,
    read_latents,
    read_seeds,
    read_size,
    shown,
)
from contextualstory_jax.sampling.batch_inputs import random_keys
from contextualstory_jax.sampling.prompts import MOST_SENTENCES, Kept, Story
from contextualstory_jax.sampling.sample import Generated, bucket
from contextualstory_jax.utils.errors import require

BATCH_SIZE = 8  # stories at once, where nothing else is said
PRONOUNS = {"she", "he", "they", "it", "her", "his", "their", "its"}


@runtime_checkable
class WindowPipeline(Protocol):
    """The part of a `StoryPipeline` that generates one window of a batch."""

    model: StoryModel
    mesh: Mesh | AbstractMesh
    interrupt: bool

    def draw_window(
        self, stories: Sequence[Story], *, kept: Sequence[Kept | None], **options: Any
    ) -> Generated:
        """Generate stories of as many sentences as the model has frames."""
        ...


class Window(NamedTuple):
    """Frames that are generated together."""

    start: int
    kept: int  # of its first frames, which an earlier window generated


def windows(sentences: int, length: int, overlap: int) -> list[Window]:
    """The windows of a story; the last one ends with it, and may overlap more.

    Args:
        sentences: of the story.
        length: of a window.
        overlap: frames that a window keeps of the one before, fewer than `length`.
    """
    found = [Window(0, 0)]
    while (end := found[-1].start + length) < sentences:
        start = min(end - overlap, sentences - length)
        found.append(Window(start, end - start))
    return found


def unclear_starts(story: Story, length: int, overlap: int) -> list[int]:
    """Sentences that a window begins with, by a pronoun and without a context to say whose."""
    starts = [window.start for window in windows(len(story.sentences), length, overlap)[1:]]
    return [
        start
        for start in starts
        if start not in story.context
        and PRONOUNS.intersection(story.sentences[start].lower().split()[:1])
    ]


def draw_any_length(
    pipeline: WindowPipeline, stories: Sequence[Story], overlap: Any, options: dict[str, Any]
) -> Iterator[Generated]:
    """Generate stories in batches; see `StoryPipeline.draw_batches`."""
    config, count = pipeline.model.config, len(stories)
    callback, motion = (options.get(name) for name in ("callback_on_step_end", "camera_motion"))
    require(
        callback is None or callable(callback),
        f"callback_on_step_end must be a function; got {shown(callback)}",
    )
    overlap = check_integer("window_overlap", overlap, 1, config.unet.n_frames - 1)
    size = read_size(config, *(options.get("size") or (None, None)))
    check_stories(stories, config.unet, None if motion else size)
    longest = max(len(story.sentences) for story in stories)
    require(
        motion is None or longest <= config.unet.n_frames,
        f"camera_motion is for up to {config.unet.n_frames} sentences; leave it out",
    )
    batch_size = check_integer("batch_size", options.get("batch_size", BATCH_SIZE), 1)
    batch_size = bucket(count, batch_size, batch_ways(pipeline.mesh))
    seeds = read_seeds(options.get("seed", 0), count)
    kept = read_kept(options.get("kept"), stories, latent_shape(config, size), size)
    latents = options.get("initial_latents")
    if latents is not None:
        frames = {len(story.sentences) for story in stories}
        require(len(frames) == 1, "initial latents are for stories of one length; call once each")
        latents = read_latents(latents, (count, *frames, *latent_shape(config, size)))
    pipeline.interrupt = False
    for batch in _batches(stories, batch_size):
        own = {
            "seed": seeds[batch],
            "kept": kept[batch],
            "initial_latents": None if latents is None else latents[batch],
            "batch_size": batch_size,
            "size": size,
        }
        generated = _draw_batch(pipeline, stories[batch], overlap, {**options, **own})
        if generated is not None:
            yield generated
        if pipeline.interrupt:
            return


def _batches(stories: Sequence[Story], size: int) -> Iterator[slice]:
    """Stories that follow one another and have as many sentences, at most `size` of them."""
    first = 0
    for _, run in itertools.groupby(stories, lambda story: len(story.sentences)):
        last = first + len(list(run))
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))
        first = last


def _draw_batch(
    pipeline: WindowPipeline, stories: Sequence[Story], overlap: int, options: dict[str, Any]
) -> Generated | None:
    """Generate stories of one length; None where a callback ended it before the last window."""
    config = pipeline.model.config
    length, count = config.unet.n_frames, len(stories[0].sentences)
    shape = latent_shape(config, options["size"])
    noise, kept = options.pop("initial_latents"), options.pop("kept")
    if count > length and noise is None:
        shared = options.pop("shared_noise_seed", None)
        noise = long_noise(config, stories, options["seed"], shape, shared)
    storyflow, negative = (options.pop(name, None) for name in ("storyflow", "negative_prompt"))
    images = np.zeros((len(stories), count, *options["size"], 3), np.uint8)
    latents = np.zeros((len(stories), count, *shape), np.float32)
    known, encoded = np.zeros((2, len(stories), count), bool)  # frames with images, with latents
    for i, one in enumerate(kept):
        if one is not None:
            known[i], images[i] = one.keep, one.images
            if one.latents is not None:
                encoded[i], latents[i] = one.keep, one.latents
    for start, _ in windows(count, length, overlap):
        if pipeline.interrupt:
            return None
        # Those beyond the end of a short story are padding.
        frames = np.minimum(np.arange(start, start + length), count - 1)
        if known[:, frames].all():
            continue
        generated = pipeline.draw_window(
            [_story_of_window(config, *one, frames) for one in zip(stories, images, strict=True)],
            kept=[
                _kept(*(array[frames] for array in arrays))
                for arrays in zip(images, latents, known, encoded, strict=True)
            ],
            initial_latents=None if noise is None else noise[:, frames],
            storyflow=_of_frames(storyflow, frames[:-1], count - 1),
            negative_prompt=_of_frames(negative, frames, count),
            **options,
        )
        ours, real = slice(start, start + length), slice(count - start)
        for all_frames, of_window, done in (
            (images, generated.images, known),
            (latents, generated.latents, encoded),
        ):
            all_frames[:, ours][~done[:, ours]] = of_window[:, real][~done[:, ours]]
            done[:, ours] = True
    return Generated(images, latents)


def latent_shape(config: ModelConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """Height, width and channels of a frame's latents."""
    return (*config.latent_size(*size), config.unet.in_channels)


def long_noise(
    config: ModelConfig,
    stories: Sequence[Story],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    shared_noise_seed: int | None,
) -> Float32[np.ndarray, "b f p q c"]:
    """Noise of stories of any length, which begins as a short story's does.

    Args:
        config: the model.
        stories: whose ids, with their seeds, decide the noise.
        seeds: one for each story.
        shape: of a frame's latents.
        shared_noise_seed: of the part that frames share; None for that of `seeds`.

    Raises:
        UserError: where the model's noise has no shared part, and a seed of one is given.
    """
    check_shared_noise(shared_noise_seed, None, config.noise)
    ids = [story.id for story in stories]
    shared = seeds if shared_noise_seed is None else [shared_noise_seed] * len(stories)
    keys, *_ = random_keys(list(zip(ids, seeds, strict=True)))
    shared_keys, *_ = random_keys(list(zip(ids, shared, strict=True)))
    # Always of the same number of frames, so that all stories share the compiled sampling.
    frames = (MOST_SENTENCES, *shape)
    noise = jax.vmap(lambda key, shared: story_noise(key, frames, config.noise, shared))
    return np.asarray(noise(keys, shared_keys))


def _story_of_window(
    config: ModelConfig,
    story: Story,
    images: UInt8[np.ndarray, "f h w 3"],
    frames: Int[np.ndarray, " n"],
) -> Story:
    """The story of some frames, of which the first, in continuation, is given."""
    start = int(frames[0])
    sentences = [str(story.sentences[i]) for i in frames.tolist()]
    if start == 0:
        return story._replace(sentences=sentences)
    first_frame = images[start] if config.unet.is_continuation else None
    sentences[0] = story.context.get(start, sentences[0])
    # The id seeds what solvers add in each step, and is another in each window.
    return Story(sentences, f"{story.id}, from {start}", first_frame)


def _kept(
    images: UInt8[np.ndarray, "f h w 3"],
    latents: Float32[np.ndarray, "f p q c"],
    known: Bool[np.ndarray, " f"],
    encoded: Bool[np.ndarray, " f"],
) -> Kept | None:
    """Frames of a window that are there already; None where all are or none is."""
    if known.all() or not known.any():
        return None
    return Kept(images, latents if encoded[known].all() else None, tuple(known.tolist()))


def _of_frames(values: Any, frames: Int[np.ndarray, " n"], count: int) -> Any:
    """Values of some frames, where there is one for each of a story's."""
    if not isinstance(values, list | tuple | np.ndarray) or len(values) != count:
        return values  # the same for all windows
    return [values[i] for i in frames]
