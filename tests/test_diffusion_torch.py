"""Schedules and DDIM, number for number against diffusers' PyTorch scheduler."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config import SchedulerConfig
from contextualstory_jax.diffusion.samplers import ddim, denoise, step_noise
from contextualstory_jax.diffusion.schedules import (
    add_noise,
    noise_schedule,
    sampling_timesteps,
    velocity,
)

pytestmark = pytest.mark.torch

SHAPE = (2, 5, 4, 4, 3)
CONFIGS = {
    "released": {},
    "stable diffusion": {"beta_schedule": "scaled_linear", "set_alpha_to_one": False},
    "cosine, clipped": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
    "short": {"num_train_timesteps": 100, "steps_offset": 0},
}


def oracle(config: SchedulerConfig):
    """diffusers' scheduler of the same config, which has the same field names."""
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers").DDIMScheduler(**dataclasses.asdict(config))


def cases():
    for name, changes in CONFIGS.items():
        for prediction_type in ("epsilon", "v_prediction", "sample"):
            yield f"{name}, {prediction_type}", changes | {"prediction_type": prediction_type}
    for prediction_type in ("v_prediction", "sample"):
        changes = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
        yield f"zero SNR, {prediction_type}", changes


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in cases()])
def test_noisy_latents_and_velocity(changes):
    torch = pytest.importorskip("torch")
    config = SchedulerConfig(**changes)
    rng, last = np.random.default_rng(0), config.num_train_timesteps - 1
    x0, noise = rng.standard_normal((2, 4, *SHAPE[1:]), dtype=np.float32)
    t = np.array([0, last // 3, last // 2, last])
    theirs = oracle(config)
    torch_arguments = [torch.from_numpy(a) for a in (x0, noise, t)]

    noisy = add_noise(noise_schedule(config), *map(jnp.asarray, (x0, noise, t)))
    v = velocity(noise_schedule(config), *map(jnp.asarray, (x0, noise, t)))

    # theirs is a float32 product of up to 1000 factors
    assert relative_error(noisy, theirs.add_noise(*torch_arguments)) < 1e-5
    assert relative_error(v, theirs.get_velocity(*torch_arguments)) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_of_every_number_of_steps(spacing):
    config = SchedulerConfig(timestep_spacing=spacing)
    theirs = oracle(config)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        # [:steps]: at some numbers of steps, trailing adds a timestep -1 in diffusers.
        expected = theirs.timesteps.tolist()[:steps]
        assert sampling_timesteps(config, steps).tolist() == expected, steps


def network(sin, x, t):
    """Some smooth function of latents and timestep, in the framework of `sin`."""
    return 0.8 * sin(2 * x + t / 100)


@jax.jit
def draw(sampler, noise, keys):
    return denoise(sampler, partial(network, jnp.sin), noise, keys)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in cases()])
def test_ddim_trajectory(changes, spacing, steps, eta):
    torch = pytest.importorskip("torch")
    config = SchedulerConfig(**changes, timestep_spacing=spacing)
    noise = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    keys = jax.random.split(jax.random.key(0), SHAPE[0])

    x = draw(ddim(config, steps, eta), jnp.asarray(noise), keys)

    theirs = oracle(config)
    theirs.set_timesteps(steps)
    expected = torch.from_numpy(noise) * theirs.init_noise_sigma
    for index, t in enumerate(theirs.timesteps):
        prediction = network(torch.sin, expected, t)
        fresh = torch.from_numpy(np.array(step_noise(keys, jnp.array(index), SHAPE[1:])))
        expected = theirs.step(prediction, t, expected, eta=eta, variance_noise=fresh).prev_sample
    assert relative_error(x, expected) < 1e-5
