"""One training step, on a model of three parameters whose answers can be worked out by hand.

The original's own numbers are in tests/parity; the real network's gradients in test_trainer.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.config.train_config import OptimizerConfig, TrainConfig
from contextualstory_jax.diffusion.noise_schedules import add_noise, noise_schedule
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.models.vae import Moments
from contextualstory_jax.training.optimizer import learning_rate
from contextualstory_jax.training.train_step import (
    Batch,
    RandomInputs,
    TrainState,
    ema_decay,
    encode,
    init_state,
    loss,
    sample_inputs,
    sample_kept,
    train_step,
)
from contextualstory_jax.training.trainable import split_trainable
from contextualstory_jax.utils.errors import UserError

NULL_IDS = jnp.array([0])
ONE_DEVICE = Placement(make_mesh(MeshConfig(), jax.devices()[:1]))


class LinearModel(StoryModel):
    """Predicts alpha * (noisy latents + first frame) + bias + text; latents are the pictures."""

    def image_moments(self, params, images):
        latents = images.astype(jnp.float32) / 255
        return Moments(latents, jnp.full_like(latents, -jnp.inf))

    def encode_text(self, params, ids):
        return params["text_encoder"]["embedding"][ids]

    def contextualize(self, params, text):
        return 10 * text

    def text_keys_values(self, params, storyline):
        return storyline

    def time_shifts(self, params, timesteps, motion):
        return None

    def predict(self, params, noisy, shifts, text, first_frame):
        unet = params["unet"]
        given = 0 if first_frame is None else first_frame[:, None]
        text = text.mean(axis=(2, 3))[:, -noisy.shape[1] :, None, None, None]
        return unet["block.alpha"] * (noisy + given) + unet["block.bias"] + text


def parameters(alpha: float = 0.5) -> dict[str, dict[str, np.ndarray]]:
    return {
        "unet": {
            "block.alpha": np.array(alpha, np.float32),
            "block.bias": np.array(0.25, np.float32),
        },
        "text_encoder": {"embedding": np.linspace(-1, 1, 10, dtype=np.float32)[:, None]},
        "vae": {},
    }


@pytest.fixture(scope="module")
def model(tiny_model_config: ModelConfig) -> LinearModel:
    return LinearModel(tiny_model_config)


@pytest.fixture(scope="module")
def recipe(tiny_model_config: ModelConfig) -> TrainConfig:
    """Four stories a step, everything trained, no drops."""
    return TrainConfig(
        model=tiny_model_config,
        optimizer=OptimizerConfig(learning_rate=0.1),
        steps=8,
        batch_size=4,
        trainable=(".*",),
        text_drop=0.0,
    )


def stories(seed: int, count: int = 4) -> Batch:
    """Stories of one-pixel pictures and one-token sentences."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 5, 1, 1, 3), dtype=np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(1, 10, (count, 5, 1))))


@functools.cache
def compiled_step(model: StoryModel, recipe: TrainConfig) -> Callable:
    return jax.jit(functools.partial(train_step, model, recipe, ONE_DEVICE, NULL_IDS, None))


def train(
    model: StoryModel, recipe: TrainConfig, params: dict, batches: list[Batch]
) -> tuple[list[TrainState], list[dict]]:
    """The states before the first and after every step, and the metrics of each."""
    step = compiled_step(model, recipe)
    states, metrics = [init_state(params, recipe)], []
    for batch in batches:
        state, values = step(states[-1], batch)
        states.append(state)
        metrics.append(values)
    return states, metrics


def test_the_average_copies_first_and_then_lengthens():
    decays = [float(ema_decay(jnp.array(n), 0.9999)) for n in (0, 1, 2, 8, 10**6)]

    np.testing.assert_allclose(decays, [0, 2 / 11, 3 / 12, 9 / 18, 0.9999], rtol=1e-6)


def test_ema_parameters_follow_the_updated_ones(model, recipe):
    (_, first, second), _ = train(model, recipe, parameters(), [stories(0), stories(1)])

    ours, new = (state["unet"]["block.bias"] for state in (second.ema_params, second.params))
    assert first.ema_params["unet"]["block.bias"] == first.params["unet"]["block.bias"]
    expected = 2 / 11 * first.params["unet"]["block.bias"] + 9 / 11 * new
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [2, 2, 2, 2, 2, 2, 2, 2, 2]),
        ("constant", 4, [0, 0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        ("cosine", 4, [0, 0.5, 1, 1.5, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
        ("cosine", 0, [1 + np.cos(np.pi * step / 8) for step in range(9)]),
    ],
)
def test_the_learning_rate_warms_up_and_a_cosine_ends_at_zero(schedule, warmup, expected):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
    rate = learning_rate(config, steps=8)

    np.testing.assert_allclose([rate(step) for step in range(9)], expected, atol=1e-6)


def test_the_first_step_is_adamws(model, recipe):
    # Adam's first update has the length of the learning rate, whatever the gradient's; the decay of
    # 1 % a step, times the learning rate, is on every tensor, biases and alphas too.
    (_, state), (metrics,) = train(model, recipe, parameters(), [stories(0)])

    for name, before in parameters()["unet"].items():
        moved = state.params["unet"][name] - before * (1 - 0.1 * 0.01)
        assert abs(moved) == pytest.approx(0.1, rel=1e-4), name
    assert metrics["learning_rate"] == pytest.approx(0.1)
    assert int(state.step) == 1


def test_what_is_not_trainable_stays_as_it_is(model, recipe):
    config = dataclasses.replace(recipe, trainable=(r"unet\..*\.bias",))
    states, _ = train(model, config, parameters(), [stories(0), stories(1)])

    assert states[0].params == {"unet": {"block.bias": 0.25}, "text_encoder": {}, "vae": {}}
    assert states[2].params["unet"]["block.bias"] != 0.25
    assert states[2].frozen["unet"]["block.alpha"] == 0.5
    embedding = states[2].frozen["text_encoder"]["embedding"]
    np.testing.assert_array_equal(embedding, parameters()["text_encoder"]["embedding"])


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(UserError, match=r"no parameter's path matches 'unet\\\\.lost'; .* like"):
        split_trainable(parameters(), (r"unet\..*", r"unet\.lost"))


@pytest.mark.parametrize(("alpha", "clamped"), [(1.7, 1.0), (-0.6, 0.0)])
def test_alpha_is_projected_before_the_step_and_its_gradient_is_not_cut(
    model, recipe, alpha, clamped
):
    (_, outside), (outside_metrics,) = train(model, recipe, parameters(alpha), [stories(0)])
    (_, inside), (inside_metrics,) = train(model, recipe, parameters(clamped), [stories(0)])

    moved = outside.params["unet"]["block.alpha"] - clamped
    assert abs(moved) == pytest.approx(0.1, rel=0.02)
    assert outside.params["unet"]["block.alpha"] == inside.params["unet"]["block.alpha"]
    assert outside_metrics == inside_metrics


def test_storyflows_mean_is_of_all_stories_seen(model, recipe):
    batches = [stories(0), stories(1), stories(2)]
    states, _ = train(model, recipe, parameters(), batches)

    pictures = np.concatenate([batch.images for batch in batches]) / 255.0
    flows = np.sqrt((np.diff(pictures, axis=1) ** 2).sum(axis=(2, 3, 4)))
    assert states[-1].stories == 12
    np.testing.assert_allclose(states[-1].storyflow_sum / 12, flows.mean(axis=0), rtol=1e-6)


def test_a_step_on_encoded_stories_is_that_on_the_stories(model, recipe):
    config = dataclasses.replace(recipe, trainable=(r"unet\..*",), text_drop=0.5)
    batch, params = stories(0), jax.tree.map(jnp.asarray, parameters())
    encoded, null_text = encode(model, params, batch, NULL_IDS)

    # Optimised as for users, whatever XLA_FLAGS: the two programs' rounding differs more without.
    step = jax.jit(
        functools.partial(train_step, model, config, ONE_DEVICE, NULL_IDS),
        compiler_options={"xla_backend_optimization_level": 3},
    )
    state, metrics = step(None, init_state(params, config), batch)
    ours, our_metrics = step(null_text, init_state(params, config), encoded)

    for a, b in zip(*map(jax.tree.leaves, ((ours, our_metrics), (state, metrics))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulated_micro_batches_are_one_batch(model, recipe, parts):
    batches = [stories(0), stories(1)]
    accumulated = dataclasses.replace(recipe, accumulation_steps=parts)

    whole, whole_metrics = train(model, recipe, parameters(), batches)
    pieces, pieces_metrics = train(model, accumulated, parameters(), batches)

    for ours, theirs in zip(pieces_metrics, whole_metrics, strict=True):
        for name in ("loss", "grad_norm", "update_norm"):
            assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-5), name
    for ours, theirs in zip(*map(jax.tree.leaves, (pieces[-1], whole[-1])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_randomness_is_new_each_step_and_the_same_each_run(model, recipe):
    batches = [stories(0), stories(0)]
    still = dataclasses.replace(recipe, optimizer=OptimizerConfig(learning_rate=1e-30))

    _, first = train(model, still, parameters(), batches)
    _, again = train(model, still, parameters(), batches)
    _, other = train(model, dataclasses.replace(still, seed=7), parameters(), batches)

    assert first == again
    assert first[0]["loss"] != first[1]["loss"]
    assert first[0]["loss"] != other[0]["loss"]


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_dropped_text_has_no_say(model, recipe, drop):
    config = dataclasses.replace(recipe, text_drop=drop)
    batch = stories(0)
    other = batch._replace(ids=stories(1).ids)

    _, (metrics,) = train(model, config, parameters(), [batch])
    _, (other_metrics,) = train(model, config, parameters(), [other])

    assert (metrics["loss"] == other_metrics["loss"]) == (drop == 1)


class Recorder(LinearModel):
    """Keeps what it was called with."""

    def text_keys_values(self, params, storyline):
        self.storyline = storyline
        return super().text_keys_values(params, storyline)

    def time_shifts(self, params, timesteps, motion):
        self.motion = motion
        return super().time_shifts(params, timesteps, motion)

    def predict(self, params, noisy, shifts, text, first_frame):
        self.noisy, self.first_frame = noisy, first_frame
        return super().predict(params, noisy, shifts, text, first_frame)


@pytest.fixture
def sampled() -> RandomInputs:
    """Two stories, of which the second loses text and first frame."""
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 2, 5, 1, 1, 3)).astype(np.float32) * 2
    dropped = jnp.array([False, True])
    return RandomInputs(
        jnp.asarray(latents), jnp.asarray(noise), jnp.array([10, 700]), dropped, dropped
    )


TEXT, NULL_TEXT = jnp.full((2, 5, 1, 1), 0.3), jnp.full((1, 1, 1, 1), 7.0)


def test_the_null_text_bypasses_the_contextualizer(tiny_model_config, sampled):
    model = Recorder(tiny_model_config)

    loss(model, parameters(), sampled, TEXT, NULL_TEXT, None)

    np.testing.assert_allclose(model.storyline[:, 0, 0, 0], [3.0, 7.0], rtol=1e-6)


def test_storyflow_is_truncated_in_training(tiny_model_config, sampled):
    model = Recorder(tiny_model_config)

    loss(model, parameters(), sampled, TEXT, NULL_TEXT, None)

    flows = np.sqrt((np.diff(sampled.latents, axis=1) ** 2).sum(axis=(2, 3, 4)))
    assert (flows % 1 > 0).all()  # else there is nothing to see
    np.testing.assert_array_equal(model.motion, np.floor(flows))


def test_in_continuation_the_first_frame_is_given_clean_or_noisy_and_not_predicted(
    tiny_model_config, sampled
):
    unet = dataclasses.replace(tiny_model_config.unet, first_frame_condition_mode="conv2d")
    model = Recorder(dataclasses.replace(tiny_model_config, unet=unet))

    loss(model, parameters(), sampled, TEXT, NULL_TEXT, None)

    schedule = noise_schedule(tiny_model_config.scheduler)
    noisy = add_noise(schedule, sampled.latents, sampled.noise, sampled.timesteps)
    np.testing.assert_array_equal(model.noisy, noisy[:, 1:])
    np.testing.assert_array_equal(model.first_frame[0], sampled.latents[0, 0])
    np.testing.assert_array_equal(model.first_frame[1], noisy[1, 0])


def test_in_visualization_no_frame_is_given(tiny_model_config, sampled):
    model = Recorder(tiny_model_config)

    loss(model, parameters(), sampled, TEXT, NULL_TEXT, None)

    assert model.first_frame is None
    assert model.noisy.shape[1] == 5


def test_kept_frames_are_given_clean_and_their_predictions_count_for_nothing(
    tiny_model_config, sampled
):
    schedule = noise_schedule(tiny_model_config.scheduler)
    noisy = add_noise(schedule, sampled.latents, sampled.noise, sampled.timesteps)
    keep = np.array([[False, True, True, False, False], [False] * 5])
    model = Recorder(tiny_model_config)

    def value(latents: np.ndarray, **fields) -> float:
        inputs = sampled._replace(latents=jnp.asarray(latents), **fields)
        return float(loss(model, parameters(0.0), inputs, TEXT, NULL_TEXT, None))

    latents = np.array(sampled.latents)
    kept = value(latents, keep=jnp.asarray(keep))

    np.testing.assert_array_equal(model.noisy[keep], latents[keep])
    np.testing.assert_array_equal(model.noisy[~keep], noisy[~keep])
    # With alpha 0 the prediction does not depend on what is seen: the mean is over the new frames.
    moved = np.where(keep[..., None, None, None], latents + 1, latents)
    assert kept == pytest.approx(value(moved, keep=jnp.asarray(keep)), rel=1e-6)
    assert value(latents) != pytest.approx(value(moved), rel=1e-3)
    assert value(latents, keep=jnp.zeros((2, 5), bool)) == pytest.approx(value(latents), rel=1e-6)


def test_in_continuation_the_first_frame_is_none_of_the_kept_ones(tiny_model_config, sampled):
    unet = dataclasses.replace(tiny_model_config.unet, first_frame_condition_mode="conv2d")
    model = Recorder(dataclasses.replace(tiny_model_config, unet=unet))
    keep = jnp.array([[True, False, False, False], [False, False, False, True]])

    loss(model, parameters(), sampled._replace(keep=keep), TEXT, NULL_TEXT, None)

    np.testing.assert_array_equal(model.noisy[keep], sampled.latents[:, 1:][keep])
    assert model.first_frame.shape == (2, 1, 1, 3)


def test_some_stories_keep_any_number_of_frames_but_never_all():
    keys = jax.random.split(jax.random.key(0), 2000)

    keep = np.asarray(jax.vmap(lambda key: sample_kept(key, 5, 0.5))(keys))

    shares = np.bincount(keep.sum(axis=1), minlength=6) / len(keep)
    np.testing.assert_allclose(shares, [1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 0], atol=0.04)
    np.testing.assert_allclose(keep.mean(axis=0), np.full(5, 0.25), atol=0.04)


def test_without_the_probability_nothing_else_is_sampled_otherwise(model, recipe):
    moments = model.image_moments({}, stories(0).images)
    keys = jax.random.split(jax.random.key(0), 4)
    clean = dataclasses.replace(recipe.model, kept_frames="clean")
    keeping = dataclasses.replace(recipe, model=clean, keep_frames_probability=0.9)

    plain, kept = (sample_inputs(model, moments, keys, config) for config in (recipe, keeping))

    assert plain.keep is None and kept.keep.shape == (4, 5) and kept.keep.any()
    for ours, theirs in zip(plain[:-1], kept[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_model_must_say_that_it_sees_kept_frames_clean(recipe):
    with pytest.raises(UserError, match="set model.kept_frames = 'clean' too"):
        dataclasses.replace(recipe, keep_frames_probability=0.5)
    with pytest.raises(UserError, match=r"keep_frames_probability must be in \[0, 1\]"):
        dataclasses.replace(recipe, keep_frames_probability=1.5)
