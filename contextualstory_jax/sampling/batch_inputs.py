"""Arrays of a batch of stories: token ids, noise, first frames and kept frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.diffusion.noise import story_key, story_noise
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.sampling.arguments import (
    check_shared_noise,
    read_kept,
    read_latents,
    read_seeds,
)
from contextualstory_jax.sampling.camera_motion import film
from contextualstory_jax.sampling.prompts import Kept, Story
from contextualstory_jax.sampling.sample import Generated, Inputs, fill

Encode = Callable[[np.ndarray, Array], Array]  # of one story's images and a key: its latents


class Asked(NamedTuple):
    """A story to generate, and everything that its arrays come from."""

    story: Story
    seed: int
    shared_seed: int  # of the part of the noise that its frames share
    kept: Kept | None
    noise: Float32[np.ndarray, "f p q c"] | None  # None: of the seeds


def read_asked(
    config: ModelConfig,
    shape: tuple[int, int, int, int],
    stories: Sequence[Story],
    seed: Any,
    shared_noise_seed: Any,
    kept: Any,
    initial_latents: Any,
) -> list[Asked]:
    """The arguments of a call, story by story; see `StoryPipeline.request`.

    Args:
        shape: of a story's latents.

    Raises:
        UserError: for arguments that do not fit each other or the model.
    """
    count, (height, width) = len(stories), (side * config.vae.factor for side in shape[1:3])
    seeds = read_seeds(seed, count)
    check_shared_noise(shared_noise_seed, initial_latents, config.noise)
    shared = seeds if shared_noise_seed is None else [shared_noise_seed] * count
    all_kept = read_kept(kept, stories, shape[1:], (height, width))
    noise: list[Any] = [None] * count
    if initial_latents is not None:
        noise = list(read_latents(initial_latents, (count, *shape)))
    return [Asked(*one) for one in zip(stories, seeds, shared, all_kept, noise, strict=True)]


def batch_inputs(
    config: ModelConfig,
    tokenizer: Tokenizer,
    encode: Encode,
    shape: tuple[int, int, int, int],
    camera_motion: str | None,
    batch: Sequence[Asked],
    batch_size: int,
) -> Inputs:
    """The inputs of one batch, in which the last story is repeated up to its size.

    Args:
        encode: the VAE, for kept images without latents.
        shape: of a story's latents.
        camera_motion: over the first frames.
    """
    full = fill(batch, batch_size)
    ids = jnp.stack([tokenizer(asked.story.sentences) for asked in full])
    noise_keys, step_keys, frame_keys = random_keys([(one.story.id, one.seed) for one in full])
    shared_keys, *_ = random_keys([(one.story.id, one.shared_seed) for one in full])
    given = [one.noise for one in full if one.noise is not None]
    if given:
        noise = np.stack(given)
    else:
        noise = jax.vmap(lambda key, shared: story_noise(key, shape, config.noise, shared))(
            noise_keys, shared_keys
        )
    frames = [
        np.asarray(one.story.first_frame) for one in full if one.story.first_frame is not None
    ]
    if camera_motion is None:
        clips = [frame[None] for frame in frames]
    else:
        f, *sides = shape[:3]
        height, width = (side * config.vae.factor for side in sides)
        clips = [film(frame, camera_motion, f, height, width) for frame in frames]
    first_frames = jnp.stack(clips) if clips else None
    arrays = [
        _kept_arrays(one.kept, key, shape, encode)
        for one, key in zip(batch, frame_keys, strict=False)
    ]
    keep, clean = map(np.stack, zip(*fill(arrays, batch_size), strict=True))
    return Inputs(ids, noise, step_keys, frame_keys, first_frames, keep, clean)


def random_keys(stories: Sequence[tuple[str, int]]) -> Key[Array, "3 b"]:
    """Keys of the noise, the steps and the first frame's posterior, of stories' ids and seeds."""
    keys = jnp.stack([story_key(seed, name) for name, seed in stories])
    return jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)


def _kept_arrays(
    kept: Kept | None, key: Key[Array, ""], shape: tuple[int, ...], encode: Encode
) -> tuple[Bool[np.ndarray, " f"], Float[np.ndarray, "f p q c"]]:
    """Which frames a story keeps, and their latents."""
    if kept is None:
        return np.zeros(shape[0], bool), np.zeros(shape, np.float32)
    latents = encode(kept.images, key) if kept.latents is None else kept.latents
    return np.array(kept.keep), np.asarray(latents)


def with_kept_images(generated: Generated, kept: Sequence[Kept | None]) -> Generated:
    """Generated stories with the very bytes of the images that they keep."""
    if not any(kept):
        return generated
    images = np.array(generated.images)  # a copy that may be written to
    for story, one in zip(images, kept, strict=True):
        if one is not None:
            keep = np.array(one.keep)
            story[keep] = one.images[keep]
    return generated._replace(images=images)
