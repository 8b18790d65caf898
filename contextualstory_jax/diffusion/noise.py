"""The noise of one story, whose frames may share a part of it (PYoCo, arXiv 2305.10474)."""

from __future__ import annotations

import hashlib
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from contextualstory_jax.config.model_config import NoiseConfig


def story_key(seed: int, story_id: str) -> Key[Array, ""]:
    """The key of everything random about a story: of the seed and the story's id alone."""
    digest = hashlib.sha256(story_id.encode()).digest()
    key = jax.random.key(seed)
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "big"))
    return key


def story_noise(
    key: Key[Array, ""],
    shape: tuple[int, int, int, int],
    config: NoiseConfig,
    shared_from: Key[Array, ""] | None = None,
) -> Float[Array, "f h w c"]:
    """Sample noise of shape (f, h, w, c), standard normal in every entry.

    Mixed noise correlates any two frames by a^2 / (1 + a^2), with a = `config.alpha`; progressive
    noise correlates frames n apart by (a^2 / (1 + a^2))^(n/2). Map it over one key a story, so that
    a story's noise does not depend on its batch. Reference: train.py; pipeline `prepare_latents`.

    Args:
        key: of the story.
        shape: frames, height, width, channels.
        config: the correlation.
        shared_from: the key of another noise, whose shared part mixed noise then has.
    """
    own_key, shared_key = jax.random.split(key)
    if shared_from is not None:
        _, shared_key = jax.random.split(shared_from)
    own = jax.random.normal(own_key, shape)
    if config.kind == "vanilla":
        return own
    keep = math.sqrt(config.alpha**2 / (1 + config.alpha**2))
    renew = math.sqrt(1 / (1 + config.alpha**2))
    if config.kind == "pyoco_mixed":
        return keep * jax.random.normal(shared_key, (1, *shape[1:])) + renew * own
    frames = [own[0]]
    for frame in own[1:]:
        frames.append(keep * frames[-1] + renew * frame)
    return jnp.stack(frames)
