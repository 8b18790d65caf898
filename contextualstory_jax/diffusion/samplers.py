"""From noise to latents: solvers of the reverse process as data for one loop.

A solver is a `Sampler`: the timesteps to visit, its coefficients for each (worked out beforehand in
float64), and a step function that holds no state but the carry it is handed. `denoise` walks any of
them in one `lax.scan`. Samplers are pytrees, so a compiled loop takes one as an argument and serves
every schedule, eta and spacing with the same number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Key, Num

from contextualstory_jax.config import SchedulerConfig, require
from contextualstory_jax.diffusion.schedules import noise_schedule, sampling_timesteps

Latents = Float[Array, "b f h w c"]


def _same_input(x: Latents, coefficients: Any) -> Latents:
    return x


def _no_carry(x: Latents) -> tuple[()]:
    return ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """One solver at one number of steps.

    `step(x, prediction, coefficients, carry, noise)` gives the next latents and carry;
    `coefficients` is one entry of the field's leading axis t, and `noise` is standard normal, or
    None unless `stochastic`. `init_carry(x)` gives the first carry, for solvers that remember
    earlier steps; `scale_input(x, coefficients)` gives what the network is to see. The functions
    are module-level ones: a compiled loop is found again by their identity.
    """

    # Any, because JAX rebuilds a pytree with placeholders for its arrays.
    timesteps: Any  # Num[Array, "t"]: what the network is told, noisiest first
    coefficients: Any  # a pytree of float32 arrays with leading axis t
    init_noise_sigma: Any  # Float[Array, ""]: the standard deviation of the first latents
    step: Callable = dataclasses.field(metadata={"static": True})
    init_carry: Callable = dataclasses.field(default=_no_carry, metadata={"static": True})
    scale_input: Callable = dataclasses.field(default=_same_input, metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})


def denoise(
    sampler: Sampler,
    predict: Callable[[Latents, Num[Array, ""]], Latents],
    noise: Latents,
    keys: Key[Array, "b"],
) -> Latents:
    """Turn standard-normal latents into clean ones, in float32.

    `predict(x, t)` is the network with its conditions and guidance in it; `t` is one timestep for
    all stories. `keys`, one a story, seed the noise of stochastic solvers; they must not be those
    that `noise` was drawn from, whose children JAX's `split` and `fold_in` share.
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
        jnp.asarray(sampler.timesteps),
        sampler.coefficients,
    )
    (x, _), _ = jax.lax.scan(body, (x, sampler.init_carry(x)), steps)
    return x


def step_noise(
    keys: Key[Array, "b"], index: Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "b ..."]:
    """The noise a stochastic solver adds at step `index`: a function of each story's key alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


class DDIMCoefficients(NamedTuple):
    """A DDIM step in numbers; pairs are the factors of (x, prediction)."""

    x0: Float[np.ndarray | Array, "*t 2"]  # that make the predicted clean latents
    noise: Float[np.ndarray | Array, "*t 2"]  # that make the predicted noise
    clip: Float[np.ndarray | Array, "*t"]  # the clean latents' largest magnitude
    signal_next: Float[np.ndarray | Array, "*t"]
    sigma_next: Float[np.ndarray | Array, "*t"]  # of the predicted noise
    sigma_fresh: Float[np.ndarray | Array, "*t"]  # of the noise drawn anew


def ddim(config: SchedulerConfig, steps: int, eta: float = 0.0) -> Sampler:
    """Deterministic at `eta` = 0, ancestral at 1.

    Raises `UserError` where eta is outside [0, 1] or there are no such timesteps. Source: arXiv
    2010.02502, equations 12 and 16; diffusers DDIMScheduler.
    """
    require(0 <= eta <= 1, f"eta must be in [0, 1]; got {eta}")
    schedule = noise_schedule(config)
    table, timesteps = schedule.alphas_cumprod, sampling_timesteps(config, steps)
    # Parity: diffusers takes one stride at every step, also where the spacing's own strides differ.
    following = timesteps - config.num_train_timesteps // steps
    alpha = table[timesteps]
    alpha_next = np.where(
        following >= 0, table[following], 1.0 if config.set_alpha_to_one else table[0]
    )
    variance = eta**2 * (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    x0, noise = _clean_and_noise(schedule.prediction_type, alpha)
    coefficients = DDIMCoefficients(
        x0=x0,
        noise=noise,
        clip=np.full(steps, config.clip_sample_range if config.clip_sample else np.inf),
        signal_next=np.sqrt(alpha_next),
        # At eta = 1 out of zero SNR this is 0, or a rounding below it.
        sigma_next=np.sqrt(np.maximum(1 - alpha_next - variance, 0)),
        sigma_fresh=np.sqrt(variance),
    )
    return Sampler(
        timesteps=timesteps.astype(np.int32),
        coefficients=jax.tree.map(np.float32, coefficients),
        init_noise_sigma=1.0,
        step=_ddim_step,
        stochastic=eta > 0,
    )


def _ddim_step(
    x: Latents, prediction: Latents, c: DDIMCoefficients, carry: tuple[()], noise: Latents | None
) -> tuple[Latents, tuple[()]]:
    clean = jnp.clip(x * c.x0[0] + prediction * c.x0[1], -c.clip, c.clip)
    # Parity: the noise is not worked out again from the clipped latents.
    x_next = clean * c.signal_next + (x * c.noise[0] + prediction * c.noise[1]) * c.sigma_next
    return (x_next if noise is None else x_next + noise * c.sigma_fresh), carry


def _clean_and_noise(
    prediction_type: str, alpha: Float64[np.ndarray, "t"]
) -> tuple[Float64[np.ndarray, "t 2"], Float64[np.ndarray, "t 2"]]:
    """The factors of (x, prediction) in the clean latents and in the noise, at each alpha-bar."""
    signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "epsilon":
        clean, noise = (1 / signal, -sigma / signal), (zero, one)
    elif prediction_type == "v_prediction":
        clean, noise = (signal, -sigma), (sigma, signal)
    else:
        clean, noise = (zero, one), (1 / sigma, -signal / sigma)
    return np.stack(clean, axis=-1), np.stack(noise, axis=-1)
