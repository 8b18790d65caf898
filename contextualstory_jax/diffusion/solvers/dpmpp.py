"""DPM-Solver++ (2M): an exponential integrator of the clean latents, over the log of the SNR."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32

from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.diffusion.noise_schedules import noise_to_signal, sampling_timesteps
from contextualstory_jax.diffusion.solvers.multistep import multistep
from contextualstory_jax.diffusion.solvers.sampler import Pairs, Sampler, clean_and_noise


class LogSNRSteps(NamedTuple):
    """Steps of a solver in the log of the SNR, and its factors of a prediction at each.

    A step is `x_next = keep * x + gain * clean`, where the clean latents stay as they are. Here
    they continue along a line: `keep * x + weights . (clean, clean one timestep before)`.
    """

    timesteps: Int32[np.ndarray, "t"]
    lambdas: Float64[np.ndarray, "s"]  # log(signal / sigma) at each timestep and the end: infinity
    clean: Pairs  # factors of (x, prediction) in the clean latents
    keep: Float64[np.ndarray, "t"]
    gain: Float64[np.ndarray, "t"]
    weights: Float64[np.ndarray, "t 2"]  # (gain, 0) in the first step and the last


def log_snr_steps(config: SchedulerConfig, steps: int) -> LogSNRSteps:
    """The steps from the noisiest timestep to clean latents.

    Raises `UserError` where there are no such timesteps. Source: diffusers
    DPMSolverMultistepScheduler with its default options.
    """
    timesteps = sampling_timesteps(config, steps, ends_clean=True)
    ratio = np.append(noise_to_signal(config, timesteps), 0.0)
    signal = 1 / np.sqrt(ratio**2 + 1)
    sigma = ratio * signal
    with np.errstate(divide="ignore"):
        lambdas = -np.log(ratio)
    h = np.diff(lambdas)
    gain = -signal[1:] * np.expm1(-h)
    half = np.zeros(steps)
    half[1:-1] = h[1:-1] / h[:-2] / 2  # to the middle of the step, where the line is read
    clean, _ = clean_and_noise(config.prediction_type, signal[:-1] ** 2)
    return LogSNRSteps(
        timesteps=timesteps.astype(np.int32),
        lambdas=lambdas,
        clean=clean,
        keep=sigma[1:] / sigma[:-1],
        gain=gain,
        weights=np.stack([gain * (1 + half), -gain * half], axis=-1),
    )


def dpmpp_2m(config: SchedulerConfig, steps: int) -> Sampler:
    """The clean latents continued along the line through this step's and the one's before.

    Raises `UserError` where there are no such timesteps. Source: arXiv 2211.01095, algorithm 2;
    diffusers DPMSolverMultistepScheduler with its default options.
    """
    s = log_snr_steps(config, steps)
    return multistep(s.timesteps, output=s.clean, keep=s.keep, weights=s.weights)
