"""FrameInit: the initial noise takes its low frequencies from a clip of the first frame.

The clip, the first frame held still or filmed by a moving camera, is brought to a noise level; a
low-pass filter over frames, height and width mixes it into the noise that sampling starts from.
Filters are float64 tables, made once. Source: arXiv 2402.04324; reference frameinit_utils.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from contextualstory_jax.config.model_config import FrameInitConfig, SchedulerConfig
from contextualstory_jax.diffusion.noise_schedules import noise_schedule
from contextualstory_jax.utils.errors import require


class FrameInit(NamedTuple):
    """One way of FrameInit at one size, as arrays: a compiled program serves them all."""

    low_pass: Float[np.ndarray | Array, "f p q"]  # of each frequency, in the order of the FFT
    signal: Float[np.ndarray | Array, ""]  # the factors of the clip and
    sigma: Float[np.ndarray | Array, ""]  # of the noise, at the level asked for


def make_frameinit(
    config: FrameInitConfig, scheduler: SchedulerConfig, shape: tuple[int, int, int]
) -> FrameInit:
    """FrameInit for latents of `shape` = (frames, height, width), in float32.

    Raises `UserError` where the schedule has no such level.
    """
    last = scheduler.num_train_timesteps - 1
    require(
        config.level <= last, f"frameinit: level must be a timestep, 0..{last}; got {config.level}"
    )
    schedule = noise_schedule(scheduler)
    return FrameInit(
        np.fft.ifftshift(low_pass_filter(config, shape)).astype(np.float32),
        np.asarray(schedule.signal[config.level], np.float32),
        np.asarray(schedule.sigma[config.level], np.float32),
    )


def low_pass_filter(
    config: FrameInitConfig, shape: tuple[int, int, int]
) -> Float64[np.ndarray, "f p q"]:
    """Share of each frequency that passes, 0 to 1, with frequency 0 at index n // 2 of an axis.

    `spatial` and `temporal` are stop frequencies, 1 being the highest; where either is 0 nothing
    passes. Source: reference frameinit_utils.py get_freq_filter.
    """
    if config.spatial == 0 or config.temporal == 0:
        return np.zeros(shape)
    if config.method == "box":
        return _box(config, shape)
    # Parity: along an odd number of frames the filter's centre lies half a frequency beyond 0.
    frame, row, column = np.ix_(*(2 * np.arange(n) / n - 1 for n in shape))
    distance = (config.spatial / config.temporal * frame) ** 2 + row**2 + column**2  # squared
    if config.method == "gaussian":
        return np.exp(-distance / (2 * config.spatial**2))
    if config.method == "butterworth":
        return 1 / (1 + (distance / config.spatial**2) ** config.order)
    # Parity: the radius of the ideal filter is sqrt(2 * spatial), not spatial.
    return (distance <= 2 * config.spatial).astype(float)


def _box(config: FrameInitConfig, shape: tuple[int, int, int]) -> Float64[np.ndarray, "f p q"]:
    # Parity: half widths are rounded to even, so that of 5 frames nothing passes up to
    # temporal = 0.25; and columns have the half width of rows.
    frames, rows, _ = shape
    halves = round(frames // 2 * config.temporal), *[round(rows // 2 * config.spatial)] * 2
    low_pass = np.zeros(shape)
    low_pass[
        tuple(
            slice(max(n // 2 - half, 0), n // 2 + half)
            for n, half in zip(shape, halves, strict=True)
        )
    ] = 1
    return low_pass


def mix(
    frameinit: FrameInit, clip: Float[Array, "b #f p q c"], noise: Float[Array, "b f p q c"]
) -> Float[Array, "b f p q c"]:
    """Standard-normal noise whose low frequencies are those of the noisy clip.

    `clip` holds scaled latents: a frame for each of the noise's, or one held still. The clip is
    made noisy with the noise itself. Source: reference frameinit_utils.py freq_mix_3d.
    """
    noisy_clip = frameinit.signal * clip + frameinit.sigma * noise
    axes = (1, 2, 3)
    # low * F(noisy clip) + (1 - low) * F(noise), with one transform less
    passed = frameinit.low_pass[..., None] * jnp.fft.fftn(noisy_clip - noise, axes=axes)
    # Parity: a filter off its centre leaves an imaginary part, which is dropped.
    return noise + jnp.fft.ifftn(passed, axes=axes).real
