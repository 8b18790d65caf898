"""LMS: the derivatives of the last four steps, joined by a polynomial."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.diffusion.solvers.euler import sigma_steps
from contextualstory_jax.diffusion.solvers.multistep import multistep
from contextualstory_jax.diffusion.solvers.sampler import Sampler

ORDER = 4


def lms(config: SchedulerConfig, steps: int) -> Sampler:
    """A linear multistep method of order 4 in sigma, of lower order in its first three steps.

    Raises `UserError` where there are no such timesteps. Source: k-diffusion sample_lms; diffusers
    LMSDiscreteScheduler, which ignores `rescale_betas_zero_snr`.
    """
    s = sigma_steps(config, steps)
    return multistep(
        s.timesteps,
        output=s.derivative,
        keep=np.ones(steps),
        weights=_weights(np.append(s.sigma, 0.0)),
        scale=s.scale,
        init_noise_sigma=s.init_noise_sigma,
    )


def _weights(sigma: Float64[np.ndarray, "s"]) -> Float64[np.ndarray, "t order"]:
    """The integral of each step's Lagrange polynomials up to the next sigma, latest first."""
    weights = np.zeros((len(sigma) - 1, ORDER))
    points, point_weights = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    for step in range(len(weights)):
        half = (sigma[step + 1] - sigma[step]) / 2
        taus = sigma[step] + half * (points + 1)
        nodes = sigma[max(step - ORDER + 1, 0) : step + 1][::-1]
        for k, node in enumerate(nodes):
            others = np.delete(nodes, k)[:, None]
            values = np.prod((taus - others) / (node - others), axis=0)
            weights[step, k] = half * np.sum(point_weights * values)
    return weights
