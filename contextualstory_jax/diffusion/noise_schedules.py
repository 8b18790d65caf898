"""Noise schedules, and the timesteps that sampling visits.

Tables are float64 numpy, made once from a `SchedulerConfig`; functions of arrays use them in
float32. With alpha-bar the product of the (1 - beta) up to timestep t, a noisy latent is
`x_t = sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64, Num

from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.utils.errors import require


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise level of every training timestep, and what the network predicts at each.

    `alphas_cumprod` falls from nearly 1, at timestep 0, to nearly 0; with zero terminal SNR, to 0.
    """

    alphas_cumprod: Float64[np.ndarray, "t"]
    prediction_type: Literal["epsilon", "v_prediction", "sample"]

    @property
    def signal(self) -> Float64[np.ndarray, "t"]:
        """The factor of the clean latent in a noisy one."""
        return np.sqrt(self.alphas_cumprod)

    @property
    def sigma(self) -> Float64[np.ndarray, "t"]:
        """The factor of the noise in a noisy latent."""
        return np.sqrt(1 - self.alphas_cumprod)


def noise_schedule(config: SchedulerConfig) -> NoiseSchedule:
    """Build the tables a scheduler config describes. Source: diffusers DDIMScheduler.__init__."""
    signal = np.sqrt(np.cumprod(1 - _betas(config)))
    if config.rescale_betas_zero_snr:
        # arXiv 2305.08891, algorithm 1: shift the last value to zero, keep the first.
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return NoiseSchedule(signal**2, config.prediction_type)


def _betas(config: SchedulerConfig) -> Float64[np.ndarray, "t"]:
    steps, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return np.linspace(start, end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    # squaredcos_cap_v2: arXiv 2102.09672, equation 17, with betas capped.
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def sampling_timesteps(
    config: SchedulerConfig, steps: int, *, ends_clean: bool = False
) -> Int64[np.ndarray, "t"]:
    """The `steps` timesteps that sampling visits, noisiest first.

    With `ends_clean` the cleanest timestep of the spacings leading and linspace, one more than
    `steps`, is not among them. Raises `UserError` where there are no such timesteps. Source: arXiv
    2305.08891, table 2; set_timesteps of diffusers DDIMScheduler, and with `ends_clean` of
    DPMSolverMultistepScheduler.
    """
    last = config.num_train_timesteps - 1
    points = steps + (ends_clean and config.timestep_spacing != "trailing")
    most = last + 1 - (points - steps)
    require(1 <= steps <= most, f"steps must be in 1..{most}; got {steps}")
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, last, points).round()[::-1]
    elif config.timestep_spacing == "leading":
        ratio = (last + 1) // points
        timesteps = np.arange(points)[::-1] * ratio + config.steps_offset
    else:
        # Parity: np.arange's own rounding decides where a timestep lies halfway between two. With
        # 61 steps of 1000, say, it gives one too many, which diffusers visits as timestep -1.
        timesteps = np.arange(last + 1, 0, -(last + 1) / steps).round() - 1
    first = int(timesteps[0])
    require(
        first <= last,
        f"steps = {steps} with scheduler.steps_offset = {config.steps_offset} starts at timestep "
        f"{first}, past the last, {last}; take fewer steps",
    )
    return timesteps[:steps].astype(np.int64)


def noise_to_signal(
    config: SchedulerConfig, timesteps: Num[np.ndarray, "t"]
) -> Float64[np.ndarray, "t"]:
    """The ratio sigma / signal at each timestep, interpolated linearly between integer ones.

    Source: diffusers EulerDiscreteScheduler.set_timesteps.
    """
    alpha = noise_schedule(config).alphas_cumprod
    if config.rescale_betas_zero_snr:
        # Parity: float16's smallest number in place of 0, so that the ratio stays finite.
        alpha[-1] = 2.0**-24
    return np.interp(timesteps, np.arange(len(alpha)), np.sqrt((1 - alpha) / alpha))


def signal_and_sigma(
    config: SchedulerConfig, timesteps: Num[np.ndarray, "t"]
) -> Float64[np.ndarray, "t 2"]:
    """The factors of clean latents and of noise at timesteps that need not be integers."""
    ratio = noise_to_signal(config, timesteps)
    signal = 1 / np.sqrt(ratio**2 + 1)
    return np.stack([signal, ratio * signal], axis=-1)


def add_noise(
    schedule: NoiseSchedule,
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """The noisy latents of timesteps `t`, one a story."""
    return _at(schedule.signal, t, x0) * x0 + _at(schedule.sigma, t, x0) * noise


def velocity(
    schedule: NoiseSchedule,
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """Target of v-prediction: signal * noise - sigma * x0. Source: arXiv 2202.00512."""
    return _at(schedule.signal, t, x0) * noise - _at(schedule.sigma, t, x0) * x0


def snr(schedule: NoiseSchedule, t: Int[Array, "b"]) -> Float[Array, "b"]:
    """The signal-to-noise ratio at each story's timestep."""
    ratio = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    return jnp.asarray(ratio, jnp.float32)[t]


def _at(table: Float64[np.ndarray, "t"], t: Int[Array, "b"], like: Float[Array, "b ..."]) -> Array:
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(-1, *(1,) * (like.ndim - 1))  # b 1 ... 1
