"""All steps of a solver, from standard-normal latents."""

from __future__ import annotations

import jax.numpy as jnp

from contextualstory_jax.diffusion.denoising import Sampler, denoise, initial_state


def sample(sampler: Sampler, predict, noise, keys, steps=None):
    """Args: `steps`, how many there are in a padded sampler."""
    state = initial_state(sampler, noise.astype(jnp.float32) * sampler.init_noise_sigma)
    last = len(sampler.timesteps) if steps is None else steps
    return denoise(sampler, predict, state, keys, 0, last).latents
