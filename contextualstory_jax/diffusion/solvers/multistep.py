"""The step that Euler, LMS and DPM-Solver++ share: linear in the predictions so far."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float64

from contextualstory_jax.diffusion.solvers.sampler import Latents, Pairs, Sampler, weighted


class MultistepCoefficients(NamedTuple):
    """A linear multistep update in numbers; pairs are the factors of (x, prediction)."""

    scale: Float[np.ndarray | Array, "*t"]  # of x, for the network
    next: Float[np.ndarray | Array, "*t 2"]  # that make this step's part of the next latents
    output: Float[np.ndarray | Array, "*t 2"]  # that make what later steps remember of this one
    earlier: Float[np.ndarray | Array, "*t k"]  # of what the steps before left, latest first
    fresh: Float[np.ndarray | Array, "*t"]  # of the fresh noise


def multistep(
    timesteps: np.ndarray,
    *,
    output: Pairs,
    keep: Float64[np.ndarray, "t"],
    weights: Float64[np.ndarray, "t order"],
    scale: Float64[np.ndarray, "t"] | None = None,
    init_noise_sigma: float = 1.0,
    fresh: Float64[np.ndarray, "t"] | None = None,
) -> Sampler:
    """The solver `x_next = keep * x + weights . outputs + fresh * noise`, latest output first.

    An output is what `output` makes of (x, prediction) at one timestep: a derivative, say, or the
    clean latents.
    """
    zero, one = np.zeros(len(timesteps)), np.ones(len(timesteps))
    # Summed here in float64: x and the latest output can be thousands and nearly cancel.
    latest = np.stack([keep, zero], axis=-1) + weights[:, :1] * output
    coefficients = MultistepCoefficients(
        scale=one if scale is None else scale,
        next=latest,
        output=output,
        earlier=weights[:, 1:],
        fresh=zero if fresh is None else fresh,
    )
    return Sampler(
        timesteps=timesteps,
        coefficients=jax.tree.map(np.float32, coefficients),
        init_noise_sigma=init_noise_sigma,
        step=_step,
        memory=weights.shape[1] - 1,
        scale_input=_scale_input,
        stochastic=fresh is not None,
    )


def _step(
    x: Latents,
    prediction: Latents,
    c: MultistepCoefficients,
    earlier: tuple[Latents, ...],
    noise: Latents | None,
) -> tuple[Latents, tuple[Latents, ...]]:
    x_next = weighted((*c.next, *c.earlier), (x, prediction, *earlier))
    if noise is not None:
        x_next = x_next + noise * c.fresh
    output = weighted(c.output, (x, prediction))
    return x_next, (output, *earlier)[: len(earlier)]


def _scale_input(x: Latents, c: MultistepCoefficients) -> Latents:
    return x * c.scale
