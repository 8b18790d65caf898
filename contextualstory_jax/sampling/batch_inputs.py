"""Arrays of a batch of stories: token ids, noise, first frames and kept frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.diffusion.noise import story_key, story_noise
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.sampling.camera_motion import film
from contextualstory_jax.sampling.prompts import Kept, Story
from contextualstory_jax.sampling.sample import Generated, Inputs, fill

Encode = Callable[[np.ndarray, Array], Array]  # of one story's images and a key: its latents


def batch_inputs(
    config: ModelConfig,
    tokenizer: Tokenizer,
    stories: Sequence[Story],
    seeds: Sequence[int],
    kept: Sequence[Kept | None],
    shape: tuple[int, int, int, int],
    encode: Encode,
    shared_noise_seed: int | None = None,
    camera_motion: str | None = None,
) -> Inputs:
    """The inputs of one batch.

    Args:
        config: the model.
        tokenizer: the model's.
        stories: all stories of the batch.
        seeds: one for each story.
        kept: the frames that the first stories keep; the last of them fills the batch.
        shape: of a story's latents.
        encode: the VAE, for kept images without latents.
        shared_noise_seed: of the shared part of the noise, where it is another.
        camera_motion: over the first frames.
    """
    ids = jnp.stack([tokenizer(story.sentences) for story in stories])
    noise_keys, step_keys, frame_keys = _keys(seeds, stories)
    shared_keys = noise_keys
    if shared_noise_seed is not None:
        shared_keys, *_ = _keys([shared_noise_seed] * len(stories), stories)
    noise = jax.vmap(lambda key, shared: story_noise(key, shape, config.noise, shared))(
        noise_keys, shared_keys
    )
    given = [np.asarray(story.first_frame) for story in stories if story.first_frame is not None]
    if camera_motion is None:
        clips = [frame[None] for frame in given]
    else:
        f, *sides = shape[:3]
        height, width = (side * config.vae.factor for side in sides)
        clips = [film(frame, camera_motion, f, height, width) for frame in given]
    first_frames = jnp.stack(clips) if clips else None
    arrays = [_kept_arrays(*one, shape, encode) for one in zip(kept, frame_keys, strict=False)]
    keep, clean = map(np.stack, zip(*fill(arrays, len(stories)), strict=True))
    return Inputs(ids, noise, step_keys, frame_keys, first_frames, keep, clean)


def _keys(seeds: Sequence[int], stories: Sequence[Story]) -> Key[Array, "3 b"]:
    """Keys of each story's noise, of its steps and of its first frame's posterior."""
    keys = jnp.stack(
        [story_key(seed, story.id) for seed, story in zip(seeds, stories, strict=True)]
    )
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
