"""UniPC of order 2: DPM-Solver++ (2M), and each step corrected by the prediction at its end."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float64

from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.diffusion.solvers.dpmpp import LogSNRSteps, log_snr_steps
from contextualstory_jax.diffusion.solvers.sampler import Latents, Sampler, weighted


class UniPCCoefficients(NamedTuple):
    """A UniPC step in numbers."""

    clean: Float[np.ndarray | Array, "*t 2"]  # of (x, prediction), in the clean latents
    # Of (x, the step before's corrected latents, the last three clean latents), in the corrected.
    correct: Float[np.ndarray | Array, "*t 5"]
    # Of (the corrected latents, the last two clean latents), in the next latents.
    predict: Float[np.ndarray | Array, "*t 3"]


def unipc(config: SchedulerConfig, steps: int) -> Sampler:
    """Correct the latents by the prediction just made at them, then step as DPM-Solver++ (2M).

    Raises `UserError` where there are no such timesteps. Source: arXiv 2302.04867, section 3,
    with B(h) = e^h - 1 and data prediction; diffusers UniPCMultistepScheduler with its defaults.
    """
    s = log_snr_steps(config, steps)
    coefficients = UniPCCoefficients(
        clean=s.clean,
        correct=_corrector(s),
        predict=np.column_stack([s.keep, s.weights]),
    )
    return Sampler(
        timesteps=s.timesteps,
        coefficients=jax.tree.map(np.float32, coefficients),
        init_noise_sigma=1.0,
        step=_step,
        memory=3,
    )


def _corrector(s: LogSNRSteps) -> Float64[np.ndarray, "t 5"]:
    """The step into each timestep, taken again with the clean latents predicted there."""
    h = np.diff(s.lambdas)[:-1]
    phi_1 = np.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    # The weights of the newest and the oldest of three clean latents. In the first step there are
    # two. Parity: theirs is 1/2 for the newest, and not phi_2 / phi_1.
    new, old = np.full(len(h), 0.5), np.zeros(len(h))
    r = -h[:-1] / h[1:]
    bend = ((phi_2 - 2 * phi_3) / phi_1)[1:] / (1 - r)
    new[1:] = (phi_2 / phi_1)[1:] - bend
    old[1:] = bend / r
    keep, gain = s.keep[:-1], s.gain[:-1]
    correct = np.zeros((len(s.timesteps), 5))
    correct[0, 0] = 1  # no step led here
    correct[1:, 1:] = np.stack([keep, gain * new, gain * (1 - new - old), gain * old], axis=-1)
    return correct


def _step(
    x: Latents,
    prediction: Latents,
    c: UniPCCoefficients,
    memory: tuple[Latents, Latents, Latents],
    noise: None,
) -> tuple[Latents, tuple[Latents, Latents, Latents]]:
    before, *earlier = memory
    clean = weighted(c.clean, (x, prediction))
    corrected = weighted(c.correct, (x, before, clean, *earlier))
    x_next = weighted(c.predict, (corrected, clean, earlier[0]))
    return x_next, (corrected, clean, earlier[0])
