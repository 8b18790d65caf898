"""What guidance, FrameInit and decoding make of a model's predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import FrameInitConfig
from contextualstory_jax.diffusion.denoising import Sampler, initial_state
from contextualstory_jax.diffusion.frameinit import make_frameinit, mix
from contextualstory_jax.models.spatial import per_branch
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.sampling.sample import Inputs, Scales, decode, prepare, take_steps


class PlainModel(StoryModel):
    """Predicts the sum of what it is given: text, first frame, StoryFlow and noisy latents."""

    def encode_text(self, params, ids):
        return ids[..., None].astype(jnp.float32)

    def contextualize(self, params, text):
        return 10 * text

    def text_keys_values(self, params, storyline):
        return storyline[..., 0, 0]

    def time_shifts(self, params, timesteps, motion):
        return motion.mean() + timesteps

    def encode_images(self, params, images, keys):
        return images[:, :, ::4, ::4, :1].astype(jnp.float32)

    def decode(self, params, latents):
        return latents.astype(jnp.uint8)

    def predict(self, params, noisy, shifts, text, first_frame):
        noisy = per_branch(noisy, text)
        given = 0 if first_frame is None else per_branch(first_frame, text)[:, None]
        text = text[:, -noisy.shape[1] :]
        return text[..., None, None, None] + shifts + noisy + given


# One step that hands the prediction on, from latents of three times the usual size
HANDING_ON = Sampler(
    timesteps=np.zeros(1, np.int32),
    coefficients=(),
    init_noise_sigma=3.0,
    step=lambda x, prediction, coefficients, memory, noise: (prediction, memory),
    levels=np.zeros((1, 2), np.float32),
)


def nothing_kept(noise):
    """`keep` and `clean` of inputs."""
    return jnp.zeros(noise.shape[:2], bool), jnp.zeros_like(noise)


def hand_on(model, branches, inputs, null_ids, motion, scales, frameinit=None):
    """The latents after that step, and those of the first frame before them."""
    sigma, (first, last) = jnp.float32(HANDING_ON.init_noise_sigma), jnp.arange(2)
    inputs = (inputs, null_ids, motion, scales, sigma, frameinit)
    given, latents = prepare(model, branches, {}, *inputs)
    state = initial_state(HANDING_ON, latents)
    latents = take_steps(model, branches, {}, given, HANDING_ON, state, first, last).latents
    frames = (given.clean_first, latents)
    return np.concatenate([frame for frame in frames if frame is not None], axis=1)


@pytest.mark.parametrize(
    ("branches", "given"), [(1, False), (1, True), (2, False), (2, True), (3, True)]
)
def test_guidance_joins_predictions_with_less_and_more_of_the_condition(
    tiny_model_config, branches, given
):
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((2, 5, 4, 4, 1), np.float32)
    picture = generator.integers(0, 256, (2, 1, 16, 16, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), 2)
    ids = jnp.broadcast_to(jnp.array([2, 4])[:, None, None], (2, 5, 7))
    first_frame = jnp.asarray(picture) if given else None
    inputs = Inputs(ids, jnp.asarray(noise), keys, keys, first_frame, *nothing_kept(noise))
    scales = Scales(jnp.float32(2), jnp.float32(1.5), jnp.float32(0))
    null_ids = jnp.broadcast_to(jnp.arange(3, 8)[:, None], (5, 7))  # another for each frame
    model = PlainModel(tiny_model_config)

    latents = hand_on(model, branches, inputs, null_ids, jnp.full(4, 0.5), scales)

    # The null text has not read the others; the first frame of noise has the size of the latents.
    text, null_text = (
        np.reshape([20.0, 40.0], (2, 1, 1, 1, 1)),
        np.reshape(range(3, 8), (5, 1, 1, 1)),
    )
    x, clean = 3 * noise + 0.5, picture[:, :, ::4, ::4, :1].astype(np.float32)
    first, noisy = (clean, 3 * noise[:, :1]) if given else (0, 0)
    x, null_text = (x[:, 1:], null_text[1:]) if given else (x, null_text)
    expected = {
        1: x + text + first,
        2: x + first + null_text + 2 * (text - null_text),
        3: x + noisy + null_text + 1.5 * (first - noisy) + 2 * (text - null_text),
    }[branches]
    expected = np.concatenate([clean, expected], axis=1) if given else expected
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-4)


def test_frameinit_mixes_the_whole_clip_whose_first_view_is_the_first_frame(tiny_model_config):
    generator = np.random.default_rng(0)
    noise = jnp.asarray(generator.standard_normal((1, 5, 4, 4, 1), np.float32))
    clip = jnp.asarray(generator.uniform(0, 9, (1, 5, 16, 16, 3)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 1)
    ids = jnp.zeros((1, 5, 7), int)
    inputs = Inputs(ids, noise, keys, keys, clip, *nothing_kept(noise))
    scales = Scales(*jnp.zeros(3))
    way = make_frameinit(FrameInitConfig(level=300), tiny_model_config.scheduler, (5, 4, 4))

    model = PlainModel(tiny_model_config)
    latents = hand_on(model, 1, inputs, jnp.zeros((1, 7), int), jnp.zeros(4), scales, way)

    seen = clip[:, :, ::4, ::4, :1]
    mixed = jax.jit(mix)(way, seen, noise)
    np.testing.assert_array_equal(latents[:, :1], seen[:, :1])
    np.testing.assert_allclose(latents[:, 1:], 3 * mixed[:, 1:] + seen[:, :1], rtol=1e-4)


def test_a_device_decodes_a_few_stories_at_a_time(tiny_model_config):
    # 12 stories on 2 devices: 6 on each, of which 2 in each of 3 turns.
    model = PlainModel(tiny_model_config)
    latents = jnp.arange(12.0)[:, None, None, None, None] * jnp.ones((12, 5, 2, 2, 3))
    program = jax.make_jaxpr(lambda latents: decode(model, {}, latents, 2))(latents)

    np.testing.assert_array_equal(decode(model, {}, latents, 2), latents)
    (loop,) = (e for e in program.eqns if e.primitive.name == "scan")
    assert loop.params["length"] == 3
