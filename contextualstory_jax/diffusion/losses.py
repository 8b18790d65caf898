"""Training targets, loss weights and losses."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from contextualstory_jax.diffusion.noise_schedules import NoiseSchedule, snr, velocity


def training_target(
    schedule: NoiseSchedule,
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """The target for the noisy latents of timesteps `t`: noise, velocity or clean latents."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return x0
    return velocity(schedule, x0, noise, t)


def min_snr_weight(
    schedule: NoiseSchedule, t: Int[Array, "b"], gamma: float | None
) -> Float[Array, "b"]:
    """The loss weight of each story's timestep; 1 where `gamma` is None.

    The squared error of the clean latents weighs min(snr, gamma); that of noise is snr times as
    large, that of velocity snr + 1 times. At zero SNR the weight of both clean latents and velocity
    is 0. Source: arXiv 2303.09556, section 3.4; reference train.py.
    """
    ratio = snr(schedule, t)
    if gamma is None:
        return jnp.ones_like(ratio)
    if schedule.prediction_type == "epsilon":
        return gamma / jnp.maximum(ratio, gamma)  # min(snr, gamma) / snr, finite at snr = 0
    weight = jnp.minimum(ratio, gamma)
    return weight if schedule.prediction_type == "sample" else weight / (ratio + 1)


def story_losses(
    prediction: Float[Array, "b ..."],
    target: Float[Array, "b ..."],
    weight: Float[Array, "b"],
    keep: Bool[Array, "b f"] | None = None,
) -> Float[Array, "b"]:
    """The weighted mean squared error of each story, over the frames not kept, in float32."""
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    if keep is None:
        return weight * jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
    of_frames = jnp.mean(error**2, axis=tuple(range(2, error.ndim)))
    return weight * jnp.mean(of_frames, axis=1, where=~keep)
