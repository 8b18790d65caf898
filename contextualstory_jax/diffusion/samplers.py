"""From noise to latents: solvers of the reverse process as data for one loop.

A solver is a `Sampler`: the timesteps to visit, its coefficients for each (worked out beforehand in
float64), and a step function that holds no state but the carry it is handed. `denoise` walks any of
them in one `lax.scan`. Samplers are pytrees, so a compiled loop takes one as an argument and serves
every schedule, eta and spacing with the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from contextualstory_jax.config import SamplingConfig, SchedulerConfig
from contextualstory_jax.diffusion.solvers.ddim import ddim
from contextualstory_jax.diffusion.solvers.dpmpp import dpmpp_2m
from contextualstory_jax.diffusion.solvers.euler import euler, euler_ancestral
from contextualstory_jax.diffusion.solvers.lms import lms
from contextualstory_jax.diffusion.solvers.pndm import pndm
from contextualstory_jax.diffusion.solvers.sampler import Latents, Sampler
from contextualstory_jax.diffusion.solvers.unipc import unipc

# By the names of `SamplingConfig.scheduler`. DDIM alone takes an eta.
SOLVERS = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "pndm": pndm,
    "lms": lms,
    "unipc": unipc,
}


def make_sampler(config: SchedulerConfig, sampling: SamplingConfig) -> Sampler:
    """The solver that `sampling` names, at its number of steps.

    Raises `UserError` where the solver or the schedule has no such number of steps.
    """
    if sampling.scheduler == "ddim":
        return ddim(config, sampling.steps, sampling.eta)
    return SOLVERS[sampling.scheduler](config, sampling.steps)


def denoise(
    sampler: Sampler,
    predict: Callable[[Latents, Any], Latents],
    noise: Latents,
    keys: Key[Array, "b"],
    told: Any = None,
) -> Latents:
    """Turn standard-normal latents into clean ones, in float32.

    `predict(x, t)` is the network with its conditions and guidance in it; `t` is one timestep for
    all stories, whole or not, or that step's share of `told`, arrays that hold something for each
    of `sampler.timesteps`. `keys`, one a story, seed the noise of stochastic solvers; they must not
    be those that `noise` was drawn from, whose children JAX's `split` and `fold_in` share.
    """

    def body(state, step):
        x, carry = state
        index, t, coefficients = step
        prediction = predict(sampler.scale_input(x, coefficients), t).astype(jnp.float32)
        fresh = step_noise(keys, index, x.shape[1:]) if sampler.stochastic else None
        return sampler.step(x, prediction, coefficients, carry, fresh), None

    x = noise.astype(jnp.float32) * sampler.init_noise_sigma
    steps = (
        jnp.arange(len(sampler.timesteps)),
        jnp.asarray(sampler.timesteps) if told is None else told,
        sampler.coefficients,
    )
    (x, _), _ = jax.lax.scan(body, (x, sampler.init_carry(x, sampler.coefficients)), steps)
    return x


def step_noise(
    keys: Key[Array, "b"], index: Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "b ..."]:
    """The noise a stochastic solver adds at step `index`: a function of each story's key alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)
