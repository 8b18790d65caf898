"""Every solver beside DDIM: led to the picture, of its order, and one program a number of steps."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import SamplingConfig, SchedulerConfig
from contextualstory_jax.diffusion.denoising import (
    SOLVERS,
    KeptFrames,
    Sampler,
    State,
    clean_estimate,
    denoise,
    initial_state,
    level_steps,
    make_sampler,
    padded,
)
from contextualstory_jax.diffusion.noise_schedules import noise_schedule, noise_to_signal
from contextualstory_jax.utils.errors import UserError
from tests.helpers.sampling import sample

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 5, 4, 4, 3)
KEYS = jax.random.split(jax.random.key(2), 2)


def solver(name: str, config: SchedulerConfig, steps: int) -> Sampler:
    return make_sampler(config, SamplingConfig(scheduler=name, steps=steps))


def normal(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), SHAPE)


# The distribution that the network below knows is N(MEAN, DEVIATION^2) in every latent, or with
# deviation 0 the one picture MEAN.


@jax.jit
def draw(sampler, steps, noise, mean, deviation, tables, kind):
    def predict(x, t):
        signal, sigma = (jnp.interp(t, jnp.arange(len(table)), table) for table in tables)
        gain = signal * deviation**2 / (signal**2 * deviation**2 + sigma**2)
        clean = mean + gain * (x - signal * mean)
        fresh = (x - signal * clean) / sigma
        return jnp.stack([fresh, clean, signal * fresh - sigma * clean])[kind]

    return sample(sampler, predict, noise, KEYS, steps)


def draw_knowing(sampler, noise, mean, deviation, config: SchedulerConfig):
    schedule = noise_schedule(config)
    tables = np.float32([schedule.signal, schedule.sigma])
    kind = PREDICTION_TYPES.index(config.prediction_type)
    steps = len(sampler.timesteps)
    return draw(padded(sampler), steps, noise, mean, deviation, tables, kind)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_network_that_knows_the_picture_is_led_to_it(name):
    picture = normal(0)
    cases = [*itertools.product(SPACINGS, PREDICTION_TYPES, (False,))]
    cases += itertools.product(SPACINGS, PREDICTION_TYPES[1:], (True,))
    for spacing, prediction_type, zero_snr in cases:
        # Parity: pndm blends velocities of several timesteps as if they were of one, and strides
        # over fewer timesteps than linspace does.
        if name == "pndm" and (prediction_type == "v_prediction" or spacing == "linspace"):
            continue
        config = SchedulerConfig(
            timestep_spacing=spacing,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_snr,
        )
        x = draw_knowing(solver(name, config, 5), normal(1), picture, 0.0, config)
        message = f"{spacing}, {prediction_type}, zero SNR {zero_snr}"
        np.testing.assert_allclose(x, picture, atol=1e-4, err_msg=message)


def gaussian_error(name: str, steps: int) -> float:
    """How far from the solution a solver ends, relative to it, for a Gaussian distribution."""
    config, mean, deviation = SchedulerConfig(), 0.3, 0.5
    sampler, noise = solver(name, config, steps), normal(1)
    x = draw_knowing(sampler, noise, mean, deviation, config)
    # Along a solution, x is as many deviations from its mean at every timestep.
    alpha = noise_schedule(config).alphas_cumprod[int(sampler.timesteps[0])]
    deviation_first = np.sqrt(alpha * deviation**2 + 1 - alpha)
    exact = mean + deviation * (noise - np.sqrt(alpha) * mean) / deviation_first
    return float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))


def test_euler_is_of_order_one():
    twenty, forty = (gaussian_error("euler", steps) for steps in (20, 40))
    assert twenty < 0.15
    assert 1.7 < twenty / forty < 2.3


def test_ddim_and_euler_are_the_same_solver():
    assert gaussian_error("ddim", 20) == pytest.approx(gaussian_error("euler", 20), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "share"),
    # DPM-Solver++ and UniPC take their last step, into clean latents, at order 1.
    [("lms", 0.05), ("pndm", 0.05), ("dpmpp_2m", 0.8), ("unipc", 0.8)],
)
def test_solvers_of_higher_order_are_nearer_in_as_many_steps(name, share):
    assert gaussian_error(name, 20) < share * gaussian_error("euler", 20)


def test_unipc_corrects_exactly_where_clean_latents_are_a_parabola_in_log_snr():
    config = SchedulerConfig(prediction_type="sample")
    sampler = solver("unipc", config, 5)
    logs = -np.log(noise_to_signal(config, sampler.timesteps[:3].astype(np.float64)))

    def clean(log):
        return jnp.full(SHAPE, 0.3 + 0.2 * log - 0.1 * log**2)

    def latents(log):
        # Solves d(x / sigma) / dlog = e^log * clean: arXiv 2211.01095, proposition 4.1.
        signal = 1 / np.sqrt(1 + np.exp(-2 * log))
        return signal * (clean(log) - (0.2 - 0.2 * log) - 0.2)

    coefficients = jax.tree.map(lambda values: jnp.asarray(values[2]), sampler.coefficients)
    carry = (latents(logs[1]), clean(logs[1]), clean(logs[0]))
    _, (corrected, *_) = sampler.step(normal(0), clean(logs[2]), coefficients, carry, None)

    np.testing.assert_allclose(corrected, latents(logs[2]), rtol=1e-5)


def test_euler_ancestral_draws_from_the_distribution_by_fresh_noise():
    config = SchedulerConfig()
    sampler = solver("euler_ancestral", config, 400)

    first, second = (draw_knowing(sampler, normal(s), 0.3, 0.5, config) for s in (0, 1))

    # 480 latents: 3 standard errors
    assert float(jnp.mean(first)) == pytest.approx(0.3, abs=0.07)
    assert float(jnp.std(first)) == pytest.approx(0.5, abs=0.05)
    # Hundreds of fresh noises, the same in both, have replaced the first.
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("name", SOLVERS)
def test_padded_samplers_of_any_number_of_steps_share_one_compiled_loop(name):
    def compiled_for(spacing, prediction_type, steps):
        config = SchedulerConfig(timestep_spacing=spacing, prediction_type=prediction_type)
        leaves, structure = jax.tree.flatten(padded(solver(name, config, steps)))
        return structure, [jax.typeof(jnp.asarray(leaf)) for leaf in leaves]

    cases = itertools.product(SPACINGS, PREDICTION_TYPES, (4, 5, 7, 50, 998))
    first, *others = [compiled_for(*case) for case in cases]
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", [*SOLVERS, "ddim"])
def test_neither_padding_nor_a_split_of_the_loop_changes_a_bit(name):
    sampling = SamplingConfig(scheduler=name, steps=9, eta=0.5 * (name == "ddim"))
    sampler, noise = make_sampler(SchedulerConfig(), sampling), normal(0)

    @jax.jit
    def steps(sampler: Sampler, state: State, first, last) -> State:
        return denoise(sampler, lambda x, t: jnp.tanh(x + t / 500 - 1), state, KEYS, first, last)

    count = len(sampler.timesteps)
    expected = steps(sampler, initial_state(sampler, noise), 0, count).latents
    for size in (count, 4, 1):
        state = initial_state(sampler, noise)
        for first in range(0, count, size):
            state = steps(padded(sampler), state, first, min(first + size, count))
        np.testing.assert_array_equal(state.latents, expected)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_coefficients_are_finite_at_every_number_of_steps(name, zero_snr):
    for spacing, steps in itertools.product(SPACINGS, (4, 5, 61, 500, 998)):
        config = SchedulerConfig(
            timestep_spacing=spacing, prediction_type="sample", rescale_betas_zero_snr=zero_snr
        )
        sampler = solver(name, config, steps)
        for values in jax.tree.leaves(sampler.coefficients):
            assert len(values) == len(sampler.timesteps)
            assert np.isfinite(values).all(), (spacing, steps)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "pndm"])
def test_one_step_takes_the_clean_latents_as_they_are(name):
    config = SchedulerConfig(timestep_spacing="trailing", prediction_type="sample")
    x = sample(solver(name, config, 1), lambda x, t: jnp.full_like(x, 0.7), normal(0), KEYS)
    np.testing.assert_allclose(x, 0.7, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "lms"])
def test_solvers_in_sigma_show_the_network_latents_of_its_own_scale(name):
    for spacing in SPACINGS:
        config = SchedulerConfig(timestep_spacing=spacing)
        sampler = solver(name, config, 10)
        first = jax.tree.map(lambda values: values[0], sampler.coefficients)
        assert sampler.init_noise_sigma > 10
        seen = sampler.scale_input(normal(0) * sampler.init_noise_sigma, first)
        np.testing.assert_allclose(seen, normal(0), rtol=2e-3)


def test_solvers_in_sigma_do_not_round_timesteps():
    config = SchedulerConfig(timestep_spacing="linspace")
    sampler = solver("euler", config, 5)
    assert sampler.timesteps.tolist() == [999, 749.25, 499.5, 249.75, 0]
    assert sampler.timesteps.dtype == np.float32


def test_pndm_begins_with_runge_kutta_steps():
    timesteps = solver("pndm", SchedulerConfig(), 5).timesteps
    first_three_steps = [801, 701, 701, 601, 601, 501, 501, 401, 401, 301, 301, 201]
    assert timesteps.tolist() == [*first_three_steps, 201, 1]


def test_pndm_without_runge_kutta_steps_takes_the_first_step_twice():
    config = SchedulerConfig(skip_prk_steps=True)
    assert solver("pndm", config, 5).timesteps.tolist() == [801, 601, 601, 401, 201, 1]
    assert solver("pndm", config, 1).timesteps.tolist() == [1]


def test_pndm_needs_steps_to_begin_with():
    with pytest.raises(UserError, match="pndm needs at least 4 steps; got 3"):
        solver("pndm", SchedulerConfig(), 3)


@pytest.mark.parametrize("name", SOLVERS)
def test_eta_is_ddims_alone(name):
    assert make_sampler(SchedulerConfig(), SamplingConfig(eta=0.5)).stochastic
    with pytest.raises(UserError, match=f"eta = 0.5 is for scheduler ddim, not {name}"):
        SamplingConfig(scheduler=name, eta=0.5)


@jax.jit
def steps_with(sampler: Sampler, state: State, first, last, kept: KeptFrames) -> State:
    return denoise(sampler, lambda x, t: x, state, KEYS, first, last, kept)


@pytest.mark.parametrize("kept_frames", [None, "clean"])
@pytest.mark.parametrize("name", [*SOLVERS, "ddim"])
def test_the_network_sees_kept_frames_at_its_timesteps_noise_level(name, kept_frames):
    config = SchedulerConfig(timestep_spacing="linspace", prediction_type="v_prediction")
    sampler = make_sampler(config, SamplingConfig(scheduler=name, steps=5), kept_frames)
    looking = dataclasses.replace(sampler, step=_remember, memory=1)
    keep = np.arange(10).reshape(2, 5) % 3 == 0  # other frames in each story
    kept = KeptFrames(jnp.asarray(keep), normal(0), normal(1))
    schedule, start = noise_schedule(config), normal(2) * sampler.init_noise_sigma
    for step, t in enumerate(sampler.timesteps):
        state = steps_with(looking, initial_state(looking, start), step, step + 1, kept)
        (seen,) = state.memory

        signal, sigma = (np.interp(t, range(1000), s) for s in (schedule.signal, schedule.sigma))
        expected = kept.clean if kept_frames else signal * kept.clean + sigma * kept.noise
        np.testing.assert_allclose(seen[keep], expected[keep], atol=1e-3)  # of interpolation
        table = jax.tree.map(lambda x, step=step: x[step], sampler.coefficients)
        np.testing.assert_allclose(
            seen[~keep], sampler.scale_input(start, table)[~keep], rtol=1e-5, atol=1e-6
        )

    count = len(sampler.timesteps)
    latents = steps_with(sampler, initial_state(sampler, start), 0, count, kept).latents
    np.testing.assert_array_equal(latents[keep], kept.clean[keep])
    assert np.isfinite(latents).all()


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "lms", "unipc"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_two_latents_tell_the_clean_ones_that_the_network_predicted(name, zero_snr):
    config = SchedulerConfig(
        timestep_spacing="trailing", prediction_type="sample", rescale_betas_zero_snr=zero_snr
    )
    sampler = solver(name, config, 5)
    levels, clean = level_steps(config, sampler), normal(1)
    before = normal(0) * sampler.init_noise_sigma
    state = initial_state(sampler, before)
    for step in range(5):
        bounds = step, step + 1
        state = denoise(sampler, lambda x, t: clean, state, KEYS, *bounds)
        if step > 0:
            found = clean_estimate(before, state.latents, levels[step : step + 2])
            np.testing.assert_allclose(found, clean, atol=2e-3)
            assert np.abs(state.latents - clean).max() > 0.1 or step == 4
        before = state.latents


def test_kept_frames_are_clean_in_the_estimate_too():
    levels = np.array([[0.6, 0.8], [0.8, 0.6]])
    kept, others = normal(0)[:, :1], normal(1)[:, 1:]
    before = jnp.concatenate([kept, 0.6 * others + 0.8], 1)
    after = jnp.concatenate([kept, 0.8 * others + 0.6], 1)

    found = clean_estimate(before, after, levels)

    np.testing.assert_array_equal(found[:, :1], kept)
    np.testing.assert_allclose(found[:, 1:], others, atol=1e-5)
    assert clean_estimate(before, after, levels[[1, 1]]) is None  # as in steps of pndm


def _remember(x, prediction, coefficients, memory, noise):
    return x, (prediction,)
