"""PNDM: DDIM's step on a blend of the network's last outputs, Runge-Kutta's or Adams-Bashforth's.

Source: arXiv 2202.09778, algorithm 2.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.diffusion.noise_schedules import noise_schedule, sampling_timesteps
from contextualstory_jax.diffusion.solvers.sampler import (
    Latents,
    Sampler,
    clean_and_noise,
    weighted,
)
from contextualstory_jax.utils.errors import require

# Weights of outputs: of one step's four, in order; and of as many timesteps', latest first.
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class Evaluation(NamedTuple):
    """One call of the network, and the DDIM step taken on it."""

    timestep: int  # that conditions the network
    start: int  # timesteps the step leads from and to; below 0 are clean latents
    end: int
    from_x: bool  # whether it starts from the latents at hand, or where the one before did
    blend: dict[int, float]  # weights of outputs, by the number of their evaluation


class PNDMCoefficients(NamedTuple):
    """The step after one evaluation in numbers."""

    from_x: Bool[np.ndarray | Array, "*t"]
    start: Float[np.ndarray | Array, "*t"]  # factor of the latents it starts from
    outputs: Float[np.ndarray | Array, "*t k"]  # factors of the network's outputs, latest first


def pndm(config: SchedulerConfig, steps: int) -> Sampler:
    """Runge-Kutta over the first three steps, four evaluations each; then one evaluation a step.

    With `config.skip_prk_steps` the order rises step by step instead, and the first step takes two
    evaluations. Raises `UserError` where there are no such timesteps, and below 4 steps unless they
    are skipped. Source: diffusers PNDMScheduler, which leaves out `prediction_type` sample and
    ignores `rescale_betas_zero_snr`.
    """
    timesteps = sampling_timesteps(config, steps).tolist()
    stride = config.num_train_timesteps // steps
    if config.skip_prk_steps:
        evaluations = _warm_up(timesteps, stride)
    else:
        require(
            steps >= 4,
            f"scheduler pndm needs at least 4 steps; got {steps}; take more, or another scheduler",
        )
        evaluations = _runge_kutta(timesteps, stride)
    # As far back as a blend reaches at any number of steps.
    outputs = 5 if config.skip_prk_steps else 13
    return Sampler(
        timesteps=np.array([e.timestep for e in evaluations], np.int32),
        coefficients=_coefficients(config, evaluations, outputs),
        init_noise_sigma=1.0,
        step=_step,
        memory=outputs,  # the latents that the step starts from, and all outputs but the latest
    )


def _runge_kutta(timesteps: list[int], stride: int) -> list[Evaluation]:
    evaluations, half = [], stride // 2
    for start, end in itertools.pairwise(timesteps[:4]):
        n, middle = len(evaluations), end + half
        blend = dict(zip(range(n, n + 4), RUNGE_KUTTA, strict=True))
        evaluations += [
            Evaluation(start, start, start - half, True, {n: 1}),
            Evaluation(middle, start, middle, False, {n + 1: 1}),
            Evaluation(middle, start, middle - half, False, {n + 2: 1}),
            Evaluation(end, start, end, False, blend),
        ]
    return evaluations + _adams_bashforth(timesteps[3:], stride, (8, 4, 0), len(evaluations))


def _warm_up(timesteps: list[int], stride: int) -> list[Evaluation]:
    first, *rest = timesteps
    evaluations = [Evaluation(first, first, first - stride, True, {0: 1})]
    if rest:
        # The first step again, by the mean of its two ends.
        again = Evaluation(rest[0], rest[0] + stride, rest[0], False, {0: 1 / 2, 1: 1 / 2})
        evaluations += [again, *_adams_bashforth(rest, stride, (0,), 2)]
    return evaluations


def _adams_bashforth(
    timesteps: list[int], stride: int, known: tuple[int, ...], first: int
) -> list[Evaluation]:
    """One evaluation a timestep, numbered from `first`, on the outputs `known`, latest first."""
    evaluations = []
    for number, t in enumerate(timesteps, start=first):
        known = (number, *known)[:4]
        blend = dict(zip(known, ADAMS_BASHFORTH[len(known) - 1], strict=True))
        evaluations.append(Evaluation(t, t, t - stride, True, blend))
    return evaluations


def _coefficients(
    config: SchedulerConfig, evaluations: list[Evaluation], k: int
) -> PNDMCoefficients:
    table = noise_schedule(config).alphas_cumprod
    final = 1.0 if config.set_alpha_to_one else table[0]
    alpha = table[[e.start for e in evaluations]]
    alpha_next = np.array([table[e.end] if e.end >= 0 else final for e in evaluations])
    clean, noise = clean_and_noise(config.prediction_type, alpha)
    # Parity: outputs are blended as they are, and made clean latents and noise at the start.
    step = np.sqrt(alpha_next)[:, None] * clean + np.sqrt(1 - alpha_next)[:, None] * noise
    outputs = np.zeros((len(evaluations), k))
    for number, evaluation in enumerate(evaluations):
        for used, weight in evaluation.blend.items():
            outputs[number, number - used] = weight * step[number, 1]
    return PNDMCoefficients(
        from_x=np.array([e.from_x for e in evaluations]),
        start=step[:, 0].astype(np.float32),
        outputs=outputs.astype(np.float32),
    )


def _step(
    x: Latents,
    prediction: Latents,
    c: PNDMCoefficients,
    memory: tuple[Latents, ...],
    noise: None,
) -> tuple[Latents, tuple[Latents, ...]]:
    start, *earlier = memory
    start = jnp.where(c.from_x, x, start)
    outputs = (prediction, *earlier)
    return start * c.start + weighted(c.outputs, outputs), (start, *outputs[:-1])
