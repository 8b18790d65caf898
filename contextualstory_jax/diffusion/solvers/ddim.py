"""DDIM: the solver of the released models."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.diffusion.noise_schedules import noise_schedule, sampling_timesteps
from contextualstory_jax.diffusion.solvers.sampler import Latents, Sampler, clean_and_noise
from contextualstory_jax.utils.errors import require


class DDIMCoefficients(NamedTuple):
    """A DDIM step in numbers; pairs are the factors of (x, prediction)."""

    x0: Float[np.ndarray | Array, "*t 2"]  # that make the predicted clean latents
    noise: Float[np.ndarray | Array, "*t 2"]  # that make the predicted noise
    clip: Float[np.ndarray | Array, "*t"]  # the clean latents' largest magnitude
    signal_next: Float[np.ndarray | Array, "*t"]
    sigma_next: Float[np.ndarray | Array, "*t"]  # of the predicted noise
    sigma_fresh: Float[np.ndarray | Array, "*t"]  # of the fresh noise


def ddim(config: SchedulerConfig, steps: int, eta: float = 0.0) -> Sampler:
    """Deterministic at `eta` = 0, ancestral at 1.

    Raises `UserError` where eta is outside [0, 1] or there are no such timesteps. Source: arXiv
    2010.02502, equations 12 and 16; diffusers DDIMScheduler.
    """
    require(0 <= eta <= 1, f"eta must be in [0, 1]; got {eta}")
    schedule = noise_schedule(config)
    table, timesteps = schedule.alphas_cumprod, sampling_timesteps(config, steps)
    # Parity: diffusers takes one stride at every step, also where the spacing's own strides differ.
    following = timesteps - config.num_train_timesteps // steps
    alpha = table[timesteps]
    alpha_next = np.where(
        following >= 0, table[following], 1.0 if config.set_alpha_to_one else table[0]
    )
    variance = eta**2 * (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    x0, noise = clean_and_noise(schedule.prediction_type, alpha)
    coefficients = DDIMCoefficients(
        x0=x0,
        noise=noise,
        clip=np.full(steps, config.clip_sample_range if config.clip_sample else np.inf),
        signal_next=np.sqrt(alpha_next),
        # At eta = 1 out of zero SNR this is 0, or a rounding below it.
        sigma_next=np.sqrt(np.maximum(1 - alpha_next - variance, 0)),
        sigma_fresh=np.sqrt(variance),
    )
    return Sampler(
        timesteps=timesteps.astype(np.int32),
        coefficients=jax.tree.map(np.float32, coefficients),
        init_noise_sigma=1.0,
        step=_step,
        stochastic=eta > 0,
    )


def _step(
    x: Latents, prediction: Latents, c: DDIMCoefficients, memory: tuple[()], noise: Latents | None
) -> tuple[Latents, tuple[()]]:
    clean = jnp.clip(x * c.x0[0] + prediction * c.x0[1], -c.clip, c.clip)
    # Parity: the noise is not worked out again from the clipped latents.
    x_next = clean * c.signal_next + (x * c.noise[0] + prediction * c.noise[1]) * c.sigma_next
    return (x_next if noise is None else x_next + noise * c.sigma_fresh), memory
