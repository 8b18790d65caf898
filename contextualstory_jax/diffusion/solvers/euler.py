"""Euler and Euler ancestral, in latents that grow with the noise instead of shrinking the signal.

There `x = x0 + sigma * noise`, and the reverse process is the ordinary differential equation
`dx / dsigma = noise`. Source: arXiv 2206.00364, section 3, and k-diffusion's samplers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.diffusion.noise_schedules import noise_to_signal, sampling_timesteps
from contextualstory_jax.diffusion.solvers.multistep import multistep
from contextualstory_jax.diffusion.solvers.sampler import Pairs, Sampler, clean_and_noise


class SigmaSteps(NamedTuple):
    """Steps of a solver in sigma, and its factors of a prediction at each."""

    timesteps: Float32[np.ndarray, "t"]
    sigma: Float64[np.ndarray, "t"]
    sigma_next: Float64[np.ndarray, "t"]
    scale: Float64[np.ndarray, "t"]  # of the latents, for the network
    derivative: Pairs  # factors of (x, prediction) in dx / dsigma
    init_noise_sigma: float


def sigma_steps(config: SchedulerConfig, steps: int) -> SigmaSteps:
    """The sigmas from the noisiest timestep to 0.

    Raises `UserError` where there are no such timesteps. Source: diffusers EulerDiscreteScheduler.
    """
    timesteps = sampling_timesteps(config, steps)
    if config.timestep_spacing == "linspace":
        # Parity: these solvers do not round. Elsewhere timesteps are integers anyway.
        timesteps = np.linspace(0, config.num_train_timesteps - 1, steps)[::-1]
    sigma = noise_to_signal(config, timesteps)
    scale = 1 / np.sqrt(sigma**2 + 1)
    _, noise = clean_and_noise(config.prediction_type, scale**2)
    return SigmaSteps(
        timesteps=timesteps.astype(np.float32),
        sigma=sigma,
        sigma_next=np.append(sigma[1:], 0.0),
        scale=scale,
        derivative=noise * np.stack([scale, np.ones(steps)], axis=-1),
        # Parity: only where the spacing starts below the noisiest timestep does the signal count.
        init_noise_sigma=float(
            np.sqrt(sigma[0] ** 2 + 1) if config.timestep_spacing == "leading" else sigma[0]
        ),
    )


def euler(config: SchedulerConfig, steps: int) -> Sampler:
    """Straight on along the derivative.

    Raises `UserError` where there are no such timesteps. Source: arXiv 2206.00364, algorithm 1
    without its correction; diffusers EulerDiscreteScheduler.
    """
    s = sigma_steps(config, steps)
    return multistep(
        s.timesteps,
        output=s.derivative,
        keep=np.ones(steps),
        weights=(s.sigma_next - s.sigma)[:, None],
        scale=s.scale,
        init_noise_sigma=s.init_noise_sigma,
    )


def euler_ancestral(config: SchedulerConfig, steps: int) -> Sampler:
    """Euler past the next sigma, and back up to it with fresh noise.

    Raises `UserError` where there are no such timesteps. Source: k-diffusion
    sample_euler_ancestral; diffusers EulerAncestralDiscreteScheduler, which leaves out
    `prediction_type` sample.
    """
    s = sigma_steps(config, steps)
    down = s.sigma_next**2 / s.sigma
    return multistep(
        s.timesteps,
        output=s.derivative,
        keep=np.ones(steps),
        weights=(down - s.sigma)[:, None],
        scale=s.scale,
        init_noise_sigma=s.init_noise_sigma,
        fresh=np.sqrt(s.sigma_next**2 - down**2),
    )
