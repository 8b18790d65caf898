"""From noise to latents: solvers of the reverse process as data for one loop.

A solver is a `Sampler`: the timesteps to visit, its coefficients for each (worked out beforehand in
float64), and a step function whose only state is the memory that it is handed. `denoise` takes any
of them through a part of its steps, whose bounds are inputs. Samplers are pytrees, so a compiled
loop takes a `padded` one as an argument and serves every schedule, eta, spacing and number of
steps, and where the loop is split changes no bit of the result. `KeptFrames` stay as they are: the
solver's own latents of them are replaced before each call of the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, Key, Num

from contextualstory_jax.config.model_config import SamplingConfig, SchedulerConfig
from contextualstory_jax.diffusion.noise_schedules import signal_and_sigma
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
CAPACITY = 1024  # evaluations; PNDM takes up to 9 more than its steps


class State(NamedTuple):
    """A solver between two steps."""

    latents: Latents  # in the solver's scale
    memory: tuple[Latents, ...]  # of earlier steps


class KeptFrames(NamedTuple):
    """Frames of a batch that are not generated."""

    keep: Bool[Array, "b f"]
    clean: Latents  # read where `keep` is true
    noise: Latents  # standard normal, the same at every step

    def frames(self, first: int, last: int | None = None) -> KeptFrames:
        """Those of the frames from `first` up to, and without, `last`."""
        return jax.tree.map(lambda x: x[:, first:last], self)

    def put_clean(self, x: Latents) -> Latents:
        """`x` with the kept frames in it."""
        return self._put(self.clean, x)

    def put_noisy(self, x: Latents, level: Float[Array, "2"]) -> Latents:
        """`x` with the kept frames in it, at a noise level: factors of latents and noise."""
        return self._put(level[0] * self.clean + level[1] * self.noise, x)

    def _put(self, values: Latents, x: Latents) -> Latents:
        return jnp.where(self.keep[..., None, None, None], values, x)


def make_sampler(
    config: SchedulerConfig, sampling: SamplingConfig, kept_frames: Literal["clean"] | None = None
) -> Sampler:
    """The solver that `sampling` names, at its number of steps.

    Args:
        kept_frames: how the network was trained to see those; see `ModelConfig`.

    Raises:
        UserError: where the solver or the schedule has no such number of steps.
    """
    if sampling.scheduler == "ddim":
        sampler = ddim(config, sampling.steps, sampling.eta)
    else:
        sampler = SOLVERS[sampling.scheduler](config, sampling.steps)
    levels = signal_and_sigma(config, sampler.timesteps)
    if kept_frames == "clean":
        levels = np.broadcast_to([1.0, 0.0], levels.shape)
    return dataclasses.replace(sampler, levels=np.float32(levels))


def padded(sampler: Sampler) -> Sampler:
    """The same solver with tables of one length, so that a program serves any number of steps."""
    missing = -len(sampler.timesteps) % CAPACITY
    timesteps, coefficients, levels = jax.tree.map(
        lambda table: np.pad(table, [(0, missing)] + [(0, 0)] * (table.ndim - 1)),
        (sampler.timesteps, sampler.coefficients, sampler.levels),
    )
    return dataclasses.replace(
        sampler, timesteps=timesteps, coefficients=coefficients, levels=levels
    )


def level_steps(config: SchedulerConfig, sampler: Sampler) -> Float64[np.ndarray, "n 2"]:
    """Factors of clean latents and of noise in a solver's latents before each step and at the end.

    Args:
        config: the schedule.
        sampler: not a `padded` one.
    """
    levels = signal_and_sigma(config, sampler.timesteps)
    # The network sees signal and noise at those levels, a solver perhaps multiples of them.
    ones = np.ones((len(levels), 1, 1, 1, 1, 1))
    scale = np.asarray(jax.vmap(sampler.scale_input)(ones, sampler.coefficients))
    return np.append(levels / scale.reshape(-1, 1), [[1.0, 0.0]], axis=0)


def clean_estimate(
    before: Latents, after: Latents, levels: Float64[np.ndarray, "2 2"]
) -> Latents | None:
    """The clean latents that a step went towards; None where it did not lower the noise.

    A step of DDIM, Euler and DPM-Solver++ lies on the line from the noise to the network's
    prediction of them; it is close to that of other solvers, fresh noise aside.

    Args:
        before: latents before the step.
        after: latents after it, where frames that are kept are the same.
        levels: two rows of `level_steps`.
    """
    (signal, sigma), (next_signal, next_sigma) = levels
    share = next_signal * sigma - signal * next_sigma
    if share <= 0:
        return None
    clean = (sigma / share) * after - (next_sigma / share) * before
    return jnp.where(before == after, after, clean)


def initial_state(sampler: Sampler, latents: Latents) -> State:
    """The state before the first step, of float32 noise of `init_noise_sigma`."""
    return State(latents, tuple(jnp.zeros_like(latents) for _ in range(sampler.memory)))


def denoise(
    sampler: Sampler,
    predict: Callable[[Latents, Num[Array, ""]], Latents],
    state: State,
    keys: Key[Array, "b"],
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    kept: KeptFrames | None = None,
) -> State:
    """Take the solver's steps from `first` up to, and without, `last`.

    `predict(x, t)` is the network with its conditions and guidance in it; `t` is one timestep for
    all stories, rounded or not. `keys`, one a story, seed the noise of stochastic solvers; they
    must not be those that the first latents were sampled with, whose children JAX's `split` and
    `fold_in` share. The network sees `kept` frames at the sampler's `levels`; they are clean in the
    latents that are returned.
    """
    tables = jax.tree.map(jnp.asarray, (sampler.timesteps, sampler.coefficients, sampler.levels))

    def body(index: Int[Array, ""], state: State) -> State:
        x, memory = state
        t, coefficients, level = jax.tree.map(lambda table: table[index], tables)
        seen = sampler.scale_input(x, coefficients)
        if kept is not None:
            # Before the call, not after the step: a solver's next level is not always that of the
            # next timestep.
            seen = kept.put_noisy(seen, level)
        prediction = predict(seen, t).astype(jnp.float32)
        fresh = step_noise(keys, index, x.shape[1:]) if sampler.stochastic else None
        return State(*sampler.step(x, prediction, coefficients, memory, fresh))

    latents, memory = jax.lax.fori_loop(first, last, body, state)
    return State(latents if kept is None else kept.put_clean(latents), memory)


def step_noise(
    keys: Key[Array, "b"], index: Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "b ..."]:
    """The noise a stochastic solver adds at step `index`: a function of each story's key alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)
