"""Schedules, noise, losses, guidance and sampling, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import NoiseConfig, SchedulerConfig
from contextualstory_jax.diffusion.denoising import padded, step_noise
from contextualstory_jax.diffusion.guidance import guide, num_branches
from contextualstory_jax.diffusion.losses import min_snr_weight, story_losses, training_target
from contextualstory_jax.diffusion.noise import story_noise
from contextualstory_jax.diffusion.noise_schedules import (
    add_noise,
    noise_schedule,
    noise_to_signal,
    sampling_timesteps,
    snr,
    velocity,
)
from contextualstory_jax.diffusion.solvers.ddim import ddim
from contextualstory_jax.utils.errors import UserError
from tests.helpers.sampling import sample

SPACINGS = ("leading", "trailing", "linspace")
# Betas 0.1, 0.3, 0.5: alpha-bars 0.9, 0.63, 0.315.
SHORT = {"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.5}


def config(**changes) -> SchedulerConfig:
    """A config whose default can have zero SNR."""
    return SchedulerConfig(**{"prediction_type": "v_prediction"} | changes)


def normal(seed: int, shape: tuple[int, ...] = (2, 5, 4, 4, 3)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# Schedules


def test_released_schedule_is_linear_in_beta():
    table = noise_schedule(SchedulerConfig()).alphas_cumprod
    assert table.shape == (1000,) and table.dtype == np.float64
    assert table[0] == pytest.approx(1 - 0.00085)
    assert table[-1] / table[-2] == pytest.approx(1 - 0.012)
    middle = 0.00085 + 499 / 999 * (0.012 - 0.00085)
    assert table[499] / table[498] == pytest.approx(1 - middle)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.9, 0.63, 0.315]),
        # Betas 0.2^2, 0.4^2, 0.6^2.
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.04, "beta_end": 0.36},
            [0.96, 0.8064, 0.516096],
        ),
        # cos^2 of (t / 3 + 0.008) / 1.008 quarter turns, over that at 0; the last beta is 0.999.
        ({"beta_schedule": "squaredcos_cap_v2"}, [0.7428836, 0.2464482, 0.0002464482]),
        # sqrt: 0.948683, 0.793725, 0.561249; minus the last; times 0.948683 / 0.387434; squared.
        ({"rescale_betas_zero_snr": True}, [0.9, 0.324044, 0.0]),
    ],
)
def test_alpha_bars(changes, expected):
    table = noise_schedule(config(**SHORT | changes)).alphas_cumprod
    np.testing.assert_allclose(table, expected, rtol=2e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_first_level(beta_schedule):
    plain = noise_schedule(config(beta_schedule=beta_schedule)).alphas_cumprod
    rescaled = noise_schedule(config(beta_schedule=beta_schedule, rescale_betas_zero_snr=True))
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain[0], rel=1e-12)
    assert (np.diff(rescaled.alphas_cumprod) < 0).all()


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("leading", 5, [801, 601, 401, 201, 1]),
        ("trailing", 5, [999, 799, 599, 399, 199]),
        ("linspace", 5, [999, 749, 500, 250, 0]),
        ("leading", 3, [667, 334, 1]),
        ("trailing", 3, [999, 666, 332]),
        ("linspace", 3, [999, 500, 0]),
    ],
)
def test_sampling_timesteps(spacing, steps, expected):
    assert sampling_timesteps(config(timestep_spacing=spacing), steps).tolist() == expected


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [751, 501, 251]),
        ("trailing", [999, 666, 332]),
        ("linspace", [999, 666, 333]),
    ],
)
def test_timesteps_that_end_clean_leave_the_cleanest_out(spacing, expected):
    timesteps = sampling_timesteps(config(timestep_spacing=spacing), 3, ends_clean=True)
    assert timesteps.tolist() == expected


@pytest.mark.parametrize("ends_clean", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_has_that_many_falling_timesteps(spacing, ends_clean):
    for steps in range(1, 999):
        timesteps = sampling_timesteps(
            config(timestep_spacing=spacing), steps, ends_clean=ends_clean
        )
        assert len(timesteps) == steps
        assert (np.diff(timesteps) < 0).all()
        assert timesteps[0] <= 999 and timesteps[-1] >= 0


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, r"steps must be in 1\.\.1000; got 0"),
        (1001, r"steps must be in 1\.\.1000; got 1001"),
        (1000, "steps_offset = 1 starts at timestep 1000, past the last, 999"),
    ],
)
def test_steps_that_do_not_fit_are_refused(steps, message):
    with pytest.raises(UserError, match=message):
        sampling_timesteps(SchedulerConfig(), steps)


def test_steps_that_end_clean_are_at_most_one_fewer():
    linspace = config(timestep_spacing="linspace")
    assert len(sampling_timesteps(linspace, 999, ends_clean=True)) == 999
    with pytest.raises(UserError, match=r"steps must be in 1\.\.999; got 1000"):
        sampling_timesteps(linspace, 1000, ends_clean=True)


def test_noise_to_signal_lies_on_a_line_between_timesteps():
    # sqrt(0.1 / 0.9), sqrt(0.37 / 0.63), sqrt(0.685 / 0.315), and the middle of the last two
    ratios = noise_to_signal(config(**SHORT), np.array([0.0, 1.0, 1.5, 2.0]))
    np.testing.assert_allclose(ratios, [1 / 3, 0.7663560, 1.1205055, 1.4746550], rtol=1e-6)


def test_noise_to_signal_is_finite_where_there_is_no_signal():
    ratio = noise_to_signal(config(rescale_betas_zero_snr=True), np.array([999]))
    np.testing.assert_allclose(ratio, [math.sqrt(2**24 - 1)], rtol=1e-12)


def test_each_story_is_noised_at_its_own_timestep():
    schedule, t = noise_schedule(config(**SHORT)), jnp.array([0, 2])
    x0, noise = jnp.ones((2, 5, 1, 1, 1)), jnp.full((2, 5, 1, 1, 1), 3.0)

    noisy = add_noise(schedule, x0, noise, t)
    v = velocity(schedule, x0, noise, t)

    # sqrt(0.9) + 3 sqrt(0.1); sqrt(0.315) + 3 sqrt(0.685)
    np.testing.assert_allclose(noisy[:, 0].ravel(), [1.8973666, 3.0441897], rtol=1e-6)
    # 3 sqrt(0.9) - sqrt(0.1); 3 sqrt(0.315) - sqrt(0.685)
    np.testing.assert_allclose(v[:, 0].ravel(), [2.5298221, 0.8560991], rtol=1e-6)
    np.testing.assert_allclose(snr(schedule, t), [9.0, 0.315 / 0.685], rtol=1e-6)
    assert noisy.dtype == v.dtype == jnp.float32


# The noise of a story


@pytest.mark.parametrize(
    ("kind", "correlation"),
    [
        # By the distance between two frames; a = 1.5, a^2 / (1 + a^2) = 9/13.
        ("vanilla", [1, 0, 0, 0, 0]),
        ("pyoco_mixed", [1, 9 / 13, 9 / 13, 9 / 13, 9 / 13]),
        ("pyoco_progressive", [1, 0.8320503, 9 / 13, 0.5760348, 0.4792899]),
    ],
)
def test_frames_share_their_noise(kind, correlation):
    shape = (5, 128, 128, 4)

    noise = story_noise(jax.random.key(0), shape, NoiseConfig(kind=kind, alpha=1.5))

    covariance = np.cov(np.asarray(noise).reshape(5, -1), ddof=0)
    expected = [[correlation[abs(i - j)] for j in range(5)] for i in range(5)]
    np.testing.assert_allclose(covariance, expected, atol=0.03)  # 65536 samples: 5 sigma
    assert noise.shape == shape and noise.dtype == jnp.float32


def test_noise_is_independent_within_a_frame():
    noise = story_noise(jax.random.key(0), (5, 128, 128, 4), NoiseConfig())
    pixels = np.asarray(noise[2]).reshape(-1, 4)
    np.testing.assert_allclose(np.corrcoef(pixels.T), np.eye(4), atol=0.04)
    rows = np.asarray(noise[2, :, :, 0])
    assert abs(np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]) < 0.04


@pytest.mark.parametrize("kind", ["vanilla", "pyoco_mixed", "pyoco_progressive"])
def test_noise_of_a_story_does_not_depend_on_its_batch(kind):
    keys = jax.random.split(jax.random.key(0), 6)

    def draw(key):
        return story_noise(key, (5, 4, 4, 3), NoiseConfig(kind=kind))

    batch = jax.vmap(draw)(keys)
    np.testing.assert_array_equal(batch[4], draw(keys[4]))
    assert not np.array_equal(batch[4], batch[5])


# Losses


def test_training_target_is_what_the_network_predicts():
    x0, noise, t = normal(0), normal(1), jnp.array([0, 2])
    targets = {
        kind: training_target(noise_schedule(config(**SHORT, prediction_type=kind)), x0, noise, t)
        for kind in ("epsilon", "sample", "v_prediction")
    }
    assert targets["epsilon"] is noise
    assert targets["sample"] is x0
    by_hand = math.sqrt(0.315) * noise[1] - math.sqrt(0.685) * x0[1]
    np.testing.assert_allclose(targets["v_prediction"][1], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        # SNR 9, 0.63 / 0.37, 0.315 / 0.685; snr / (snr + 1) is alpha-bar.
        ("epsilon", [5 / 9, 1, 1]),
        ("v_prediction", [5 / 10, 0.63, 0.315]),
        ("sample", [5, 0.63 / 0.37, 0.315 / 0.685]),
    ],
)
def test_min_snr_weight(prediction_type, expected):
    schedule = noise_schedule(config(**SHORT, prediction_type=prediction_type))
    np.testing.assert_allclose(min_snr_weight(schedule, jnp.arange(3), 5.0), expected, rtol=1e-6)
    assert min_snr_weight(schedule, jnp.arange(3), None).tolist() == [1, 1, 1]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_min_snr_weight_at_zero_snr_is_zero(prediction_type):
    schedule = noise_schedule(config(prediction_type=prediction_type, rescale_betas_zero_snr=True))
    assert min_snr_weight(schedule, jnp.array([999]), 5.0).tolist() == [0]


def test_story_losses_are_weighted_means_in_float32():
    target = jnp.zeros((2, 5, 2, 2, 1), jnp.bfloat16)
    prediction = target.at[0, 0].set(2).at[1].set(3)  # one frame of five off by 2; all off by 3

    losses = story_losses(prediction, target, jnp.array([1.0, 0.5]))

    np.testing.assert_allclose(losses, [4 / 5, 9 / 2], rtol=1e-6)
    assert losses.dtype == jnp.float32


# Guidance


@pytest.mark.parametrize(
    ("scales", "branches"),
    [((1.0, 1.0), 1), ((7.5, 1.0), 2), ((7.5, 2.0), 3), ((1.0, 2.0), 3), ((0.0, 0.0), 1)],
)
def test_scales_up_to_one_ask_for_no_guidance(scales, branches):
    assert num_branches(*scales) == branches


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        ([2.0], 2.0),
        ([2.0, 3.0], 2 + 7.5 * 1),
        ([2.0, 3.0, 5.0], 2 + 1.5 * 1 + 7.5 * 2),
    ],
)
def test_guidance_extrapolates_from_less_condition_to_more(branches, expected):
    ramp = jnp.arange(1.0, 11.0).reshape(1, 5, 2, 1, 1)
    predictions = jnp.stack([ramp * value for value in branches])
    guided = guide(predictions, 7.5, 1.5, 0.0)
    np.testing.assert_allclose(guided, ramp * expected, rtol=1e-6)


@pytest.mark.parametrize("branches", [2, 3])
def test_full_rescale_gives_each_story_the_deviation_of_its_conditional_branch(branches):
    predictions = (
        normal(0, (branches, 2, 5, 4, 4, 3)) * jnp.array([1.0, 3.0])[:, None, None, None, None]
    )

    plain = guide(predictions, 7.5, 2.0, 0.0)
    full = guide(predictions, 7.5, 2.0, 1.0)
    part = guide(predictions, 7.5, 2.0, 0.7)

    for story in range(2):
        assert jnp.std(full[story]) == pytest.approx(
            float(jnp.std(predictions[-1, story])), rel=1e-5
        )
    np.testing.assert_allclose(part, 0.7 * full + 0.3 * plain, rtol=1e-4, atol=1e-5)


def test_guidance_is_computed_in_float32():
    assert guide(jnp.ones((1, 1, 5, 2, 2, 3), jnp.bfloat16), 7.5, 1.0, 0.0).dtype == jnp.float32


# Sampling


def draw_knowing(x0: jax.Array, scheduler: SchedulerConfig, eta: float = 0.0) -> jax.Array:
    """Draw in 5 steps by a network whose prediction is exact for the clean latents `x0`."""
    schedule = noise_schedule(scheduler)
    tables = np.float32([schedule.signal, schedule.sigma])
    sampler = ddim(scheduler, 5, eta)
    return _draw_knowing(x0, sampler, tables, prediction_type=scheduler.prediction_type)


@partial(jax.jit, static_argnames="prediction_type")
def _draw_knowing(x0, sampler, tables, *, prediction_type):
    def predict(x, t):
        signal, sigma = tables[:, t]
        noise = (x - signal * x0) / sigma
        return {"epsilon": noise, "sample": x0, "v_prediction": signal * noise - sigma * x0}[
            prediction_type
        ]

    return sample(sampler, predict, normal(1), jax.random.split(jax.random.key(2), 2))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("spacing", "prediction_type", "zero_snr"),
    [
        *itertools.product(SPACINGS, ("epsilon", "v_prediction", "sample"), (False,)),
        *itertools.product(SPACINGS, ("v_prediction", "sample"), (True,)),
    ],
)
def test_a_network_that_knows_the_picture_is_led_to_it(spacing, prediction_type, zero_snr, eta):
    scheduler = config(
        timestep_spacing=spacing, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )
    x0 = normal(0)
    np.testing.assert_allclose(draw_knowing(x0, scheduler, eta), x0, atol=2e-5)


def test_without_set_alpha_to_one_the_noise_of_timestep_zero_is_left():
    scheduler = config(set_alpha_to_one=False)
    x0, noise = normal(0), normal(1)
    schedule = noise_schedule(scheduler)
    x = add_noise(schedule, x0, noise, jnp.array([801, 801]))

    def predict(x, t):
        return velocity(schedule, x0, noise, jnp.full(2, t))

    x = sample(ddim(scheduler, 5), predict, x, jax.random.split(jax.random.key(2), 2))

    expected = math.sqrt(1 - 0.00085) * x0 + math.sqrt(0.00085) * noise
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_clip_sample_bounds_the_clean_latents():
    scheduler = config(clip_sample=True, clip_sample_range=0.5)
    x0 = 3 * normal(0)
    x = draw_knowing(x0, scheduler)
    np.testing.assert_allclose(x, jnp.clip(x0, -0.5, 0.5), atol=2e-5)


def test_eta_one_is_ancestral_sampling():
    # The posterior q(x_{t-1} | x_t, x0) of DDPM, arXiv 2006.11239, equations 6 and 7.
    betas = np.linspace(0.1, 0.5, 3)
    bars = np.array([0.9, 0.63, 0.315])
    scheduler = config(**SHORT, prediction_type="sample", steps_offset=0)
    x, x0, noise = normal(0), normal(1), normal(2)
    sampler = ddim(scheduler, 3, eta=1.0)

    for step, t in enumerate([2, 1]):
        coefficients = jax.tree.map(lambda values, i=step: values[i], sampler.coefficients)
        x_next, _ = sampler.step(x, x0, coefficients, (), noise)

        bar, bar_next, beta = bars[t], bars[t - 1], betas[t]
        mean = (
            math.sqrt(bar_next) * beta / (1 - bar) * x0
            + math.sqrt(1 - beta) * (1 - bar_next) / (1 - bar) * x
        )
        variance = (1 - bar_next) / (1 - bar) * beta
        np.testing.assert_allclose(x_next, mean + math.sqrt(variance) * noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(UserError, match=r"eta must be in \[0, 1\]"):
        ddim(SchedulerConfig(), 10, eta)


def test_a_story_is_drawn_alike_in_any_batch():
    keys = jax.random.split(jax.random.key(0), 3)
    sampler, noise = ddim(SchedulerConfig(), 10, eta=1.0), normal(1, (3, 5, 4, 4, 3))

    def draw(noise, keys):
        return sample(sampler, lambda x, t: 0.5 * x, noise, keys)

    together = draw(noise, keys)
    order = jnp.array([2, 0])
    np.testing.assert_allclose(draw(noise[order], keys[order]), together[order], rtol=1e-6)
    assert not np.array_equal(
        step_noise(keys, jnp.array(0), (5, 4, 4, 3)), step_noise(keys, jnp.array(1), (5, 4, 4, 3))
    )


def test_one_compiled_loop_serves_every_schedule_and_number_of_steps():
    traces = []

    @jax.jit
    def compiled(sampler, steps, noise, keys):
        traces.append(None)
        return sample(sampler, lambda x, t: 0.1 * x, noise, keys, steps)

    def draw(config: SchedulerConfig, steps: int, eta: float = 0.0) -> None:
        keys = jax.random.split(jax.random.key(0), 2)
        compiled(padded(ddim(config, steps, eta)), steps, normal(0), keys)

    draw(SchedulerConfig(), 10)
    draw(config(timestep_spacing="trailing", rescale_betas_zero_snr=True), 10)
    draw(SchedulerConfig(), 50)
    assert len(traces) == 1
    draw(SchedulerConfig(), 10, eta=0.5)
    draw(SchedulerConfig(), 20, eta=1.0)
    assert len(traces) == 2


def test_the_network_computes_as_it_likes_and_latents_stay_float32():
    seen = []

    def predict(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return x.astype(jnp.bfloat16)

    x = sample(
        ddim(SchedulerConfig(), 3), predict, normal(0), jax.random.split(jax.random.key(0), 2)
    )

    assert seen == [(jnp.float32, jnp.int32, ())]
    assert x.dtype == jnp.float32
