"""The Python API: what decides the pictures, what does not, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from contextualstory_jax import Story, StoryPipeline, UserError
from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import FrameInitConfig, ModelConfig, SamplingConfig
from contextualstory_jax.diffusion.frameinit import make_frameinit, mix
from contextualstory_jax.diffusion.noise import story_key
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.sampling.camera_motion import film
from scripts.benchmarks.generation import CompilationCount
from tests.helpers.devices import environment

SENTENCES = ("A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps.")
STORIES = [
    Story(SENTENCES, "a"),
    Story(SENTENCES[::-1], "b"),
    Story(("A dog.",) * 5, "c"),
]
FIRST_FRAME = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
TEXT = SamplingConfig(steps=2, guidance_scale=2.0)
TEXT_LONG = SamplingConfig(steps=9, guidance_scale=2.0)


def noise_of(pipeline: StoryPipeline, stories: list[Story], seed: int) -> np.ndarray:
    request = pipeline.request(stories, seed=seed)
    return np.asarray(request.inputs.noise)[: len(stories)]


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two sets of pictures."""
    return int(np.max(np.abs(a.astype(int) - b)))


def test_five_sentences_give_five_pictures_that_follow_from_the_seed(pipeline):
    first, again, other = (pipeline(SENTENCES, seed=seed) for seed in (1, 1, 2))

    assert (first.shape, first.dtype) == ((5, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(first, again)
    assert levels_apart(first, other) > 20


def test_sentences_and_storyflow_have_a_say(pipeline):
    drawn = pipeline(SENTENCES)

    assert levels_apart(drawn, pipeline(("A dog.", *SENTENCES[1:]))) > 1
    assert levels_apart(drawn, pipeline(SENTENCES, storyflow=[50.0, 1.0, 1.0, 1.0])) > 1


def test_without_more_words_the_checkpoints_own_values_are_taken(pipeline):
    said = pipeline(SENTENCES, sampling=TEXT, size=(16, 16), storyflow=[5.0] * 4)

    np.testing.assert_array_equal(pipeline(SENTENCES), said)
    assert pipeline.step == 0


def test_arguments_have_the_names_of_the_field(pipeline):
    values = {"scheduler": "euler", "guidance_scale": 3.0, "guidance_rescale": 0.5}
    noise = noise_of(pipeline, STORIES[:1], 4)

    generated = pipeline(
        SENTENCES, num_inference_steps=3, height=16, width=16, latents=noise[0], **values
    )

    sampling = SamplingConfig(steps=3, **values)
    said = pipeline(SENTENCES, sampling=sampling, size=(16, 16), initial_latents=noise)
    np.testing.assert_array_equal(generated, said)


def test_a_negative_prompt_stands_in_for_the_empty_text(pipeline):
    none, one, each, other = (
        pipeline(SENTENCES, negative_prompt=prompt)
        for prompt in ("", "A dog.", ["A dog."] * 5, ["A dog.", *[""] * 4])
    )

    np.testing.assert_array_equal(none, pipeline(SENTENCES))
    assert levels_apart(one, each) <= 1  # programs of two shapes round apart
    assert levels_apart(one, none) > 1
    assert levels_apart(one, other) > 1


def test_output_comes_as_arrays_images_or_latents(pipeline):
    expected = pipeline.draw([Story(SENTENCES)], seed=1)

    images = pipeline(SENTENCES, seed=1, output_type="pil")
    batch = pipeline([Story(SENTENCES)], seed=1, output_type="pil")
    latents = pipeline(Story(SENTENCES), seed=1, output_type="latent")

    assert all(isinstance(image, Image.Image) for image in (*images, *batch[0]))
    np.testing.assert_array_equal(np.stack(images), expected.images[0])
    np.testing.assert_array_equal(np.stack(batch[0]), expected.images[0])
    np.testing.assert_array_equal(latents, expected.latents[0])


def test_a_story_is_the_same_in_any_batch(pipeline):
    told: list[int] = []
    alone = [pipeline.draw([story], seed=3).images[0] for story in STORIES]

    # The second batch is filled up; what fills it is left out.
    batch = pipeline.draw(STORIES, seed=3, batch_size=2, progress=told.append)
    turned = pipeline.draw(STORIES[::-1], seed=3, batch_size=2).images[::-1]

    assert batch.images.shape == (3, 5, 16, 16, 3)
    assert batch.latents.shape == (3, 5, 4, 4, 48)
    assert told == [2, 1]
    assert levels_apart(batch.images, np.stack(alone)) <= 1  # programs of two sizes round apart
    assert levels_apart(batch.images, turned) <= 1
    assert levels_apart(batch.images[0], batch.images[1]) > 20


def test_ten_numbers_of_steps_are_one_compilation(pipeline):
    pipeline(SENTENCES, sampling=TEXT)  # and with it everything but the loop

    with CompilationCount() as counter:
        for steps in (1, 2, 3, 4, 5, 8, 10, 12, 15, 20):
            ancestral = SamplingConfig(steps=steps, guidance_scale=2.0, scheduler="euler_ancestral")
            drawn = pipeline(SENTENCES, sampling=ancestral)

    assert counter.count == 1
    assert np.ptp(drawn) > 20


def test_a_callback_reads_every_step_and_changes_no_bit(pipeline):
    seen: list[tuple] = []
    four = SamplingConfig(steps=4, guidance_scale=2.0)

    def read(pipe, step: int, timestep: float, given: dict) -> dict:
        seen.append((pipe, step, timestep, given["latents"]))
        return given

    plain = pipeline.draw(STORIES, sampling=four, batch_size=2)
    drawn = pipeline.draw(STORIES, sampling=four, batch_size=2, callback_on_step_end=read)

    np.testing.assert_array_equal(drawn.latents, plain.latents)
    np.testing.assert_array_equal(drawn.images, plain.images)
    pipes, steps, timesteps, latents = zip(*seen, strict=True)
    assert set(pipes) == {pipeline} and steps == (0, 1, 2, 3) * 2
    assert timesteps == (999, 749, 499, 249) * 2
    # Without what fills the second batch
    assert [len(x) for x in latents] == [2] * 4 + [1] * 4
    np.testing.assert_array_equal(np.concatenate([latents[3], latents[7]]), plain.latents)


def test_a_callback_replaces_latents_and_interrupts(pipeline):
    steps: list[int] = []

    def stop(pipe, step: int, timestep: float, given: dict) -> dict:
        steps.append(step)
        pipe.interrupt = step == 1
        return {"latents": np.full_like(given["latents"], step)}

    drawn = pipeline.draw(STORIES, sampling=TEXT_LONG, batch_size=2, callback_on_step_end=stop)

    assert steps == [0, 1]
    np.testing.assert_array_equal(drawn.latents, np.ones((2, 5, 4, 4, 48)))  # of the first batch
    again = pipeline.draw(STORIES[:1])  # an interruption is of one request
    np.testing.assert_array_equal(again.images, pipeline.draw(STORIES[:1]).images)


def test_latents_of_another_shape_are_refused(pipeline):
    def replace(*_) -> dict:
        return {"latents": np.zeros((1, 4))}

    with pytest.raises(UserError, match=r"must return latents of shape \(1, 5, 4, 4, 48\); got"):
        pipeline(SENTENCES, callback_on_step_end=replace)


def test_compiling_ahead_leaves_nothing_to_compile(tiny_checkpoint):
    pipeline = StoryPipeline.load(tiny_checkpoint)
    pipeline.compile(batch_size=2, height=16, width=16, num_inference_steps=9)

    with CompilationCount() as counter:
        drawn = pipeline(STORIES[:2], sampling=TEXT)

    assert counter.count == 0
    assert drawn.shape == (2, 5, 16, 16, 3)


@pytest.mark.slow  # compiles for three sizes of batch
def test_a_hundred_mixed_requests_compile_nothing(pipeline):
    generator = np.random.default_rng(0)

    def draw(stories: int, **options) -> None:
        names = (f"story {i}" for i in range(stories))
        list(pipeline.draw_batches([Story(SENTENCES, n) for n in names], batch_size=4, **options))

    def mixed() -> dict[str, object]:
        scale, eta, rescale = generator.uniform((1.5, 0, 0), (9, 1, 1)).tolist()
        sampling = SamplingConfig(steps=2, guidance_scale=scale, eta=eta, guidance_rescale=rescale)
        motion = generator.uniform(0, 40, 4).tolist()
        return {"seed": int(generator.integers(99)), "sampling": sampling, "storyflow": motion}

    for bucket in (1, 2, 4):
        draw(bucket, **mixed())
    with CompilationCount() as counter:
        for _ in range(100):
            draw(int(generator.integers(1, 10)), **mixed())
        seen = counter.count
        jax.jit(lambda x: x + 1)(generator.random())

    assert seen == 0
    assert counter.count == 1  # or it would not have been heard


def test_noise_is_a_function_of_the_seed_and_the_id_alone(pipeline):
    drawn = noise_of(pipeline, STORIES, 0)

    np.testing.assert_array_equal(drawn[::-1], noise_of(pipeline, STORIES[::-1], 0))
    np.testing.assert_array_equal(drawn[:1], noise_of(pipeline, [Story(("x",) * 5, "a")], 0))
    assert not np.array_equal(drawn, noise_of(pipeline, STORIES, 1))
    assert not np.array_equal(drawn[0], drawn[1])


def test_lists_of_sentences_have_ids_by_their_place(pipeline):
    drawn = pipeline([SENTENCES, SENTENCES], seed=5)

    named = [Story(SENTENCES, "story_0"), Story(SENTENCES, "story_1")]
    np.testing.assert_array_equal(drawn, pipeline(named, seed=5))
    assert levels_apart(drawn[0], drawn[1]) > 20


def test_initial_latents_take_the_place_of_the_noise(pipeline):
    noise = noise_of(pipeline, STORIES[:1], 4)

    given = pipeline.draw([STORIES[0]], seed=9, initial_latents=noise)

    np.testing.assert_array_equal(given.images, pipeline.draw([STORIES[0]], seed=4).images)


def test_scales_and_values_are_arguments_of_one_program(pipeline):
    pipeline(SENTENCES)
    programs = pipeline._programs.steps._cache_size()

    strong = SamplingConfig(steps=2, guidance_scale=5.0, guidance_rescale=0.5)
    drawn = pipeline(SENTENCES, sampling=strong, storyflow=[1.0, 2.0, 3.0, 4.0], seed=8)

    assert pipeline._programs.steps._cache_size() == programs
    assert levels_apart(drawn, pipeline(SENTENCES, seed=8)) > 1


def test_a_guidance_scale_up_to_1_asks_for_none(pipeline):
    one, half = (
        pipeline(SENTENCES, sampling=SamplingConfig(steps=2, guidance_scale=scale))
        for scale in (1.0, 0.5)
    )

    np.testing.assert_array_equal(one, half)
    assert levels_apart(one, pipeline(SENTENCES)) > 1


@pytest.mark.slow
def test_other_sizes_and_dtypes_are_drawn(tiny_checkpoint):
    pipeline = StoryPipeline.load(tiny_checkpoint, dtype="bfloat16")

    generated = pipeline.draw(STORIES[:1], size=(16, 32))

    assert {p.dtype for p in jax.tree.leaves(pipeline.params)} == {jnp.dtype("bfloat16")}
    assert generated.images.shape == (1, 5, 16, 32, 3)
    assert np.isfinite(generated.latents).all()


def test_continuation_goes_on_from_its_first_frame(continuation):
    drawn = continuation(SENTENCES, first_frame=FIRST_FRAME)
    other = continuation(SENTENCES, first_frame=255 - FIRST_FRAME)

    assert levels_apart(drawn[0], FIRST_FRAME) <= 1  # what the codec makes of it
    assert np.any(drawn[1:] != other[1:], axis=(1, 2, 3)).all()


def test_a_first_frame_may_be_an_array_an_image_or_a_path(continuation, tmp_path):
    Image.fromarray(FIRST_FRAME).save(tmp_path / "first.png")
    expected = continuation([Story(SENTENCES, "story", FIRST_FRAME)])[0]

    for image in (FIRST_FRAME, Image.fromarray(FIRST_FRAME), str(tmp_path / "first.png")):
        np.testing.assert_array_equal(continuation(SENTENCES, image=image), expected)
    wide = np.pad(FIRST_FRAME, ((0, 0), (4, 4), (0, 0)))  # cropped in the middle
    batch = continuation([SENTENCES, SENTENCES], image=[FIRST_FRAME, wide])
    assert levels_apart(batch[0, 0], batch[1, 0]) <= 1


@pytest.mark.slow
def test_image_guidance_strengthens_the_first_frame(continuation):
    both = SamplingConfig(steps=2, guidance_scale=2.0, image_guidance_scale=3.0)

    drawn = continuation(SENTENCES, first_frame=FIRST_FRAME, sampling=both)

    assert levels_apart(drawn[0], FIRST_FRAME) <= 1
    assert levels_apart(drawn, continuation(SENTENCES, first_frame=FIRST_FRAME)) > 1


def test_frameinit_gives_the_noise_low_frequencies_of_the_first_frame(continuation):
    story, config = Story(SENTENCES, "a", FIRST_FRAME), continuation.model.config
    plain = continuation.draw([story])
    noise = noise_of(continuation, [story], 0)
    way = make_frameinit(FrameInitConfig("ideal"), config.scheduler, plain.latents.shape[1:4])
    mixed = jax.jit(mix)(way, jnp.asarray(plain.latents[:, :1]), noise)

    drawn = continuation.draw([story], frameinit=FrameInitConfig("ideal")).images

    expected = continuation.draw([story], initial_latents=np.asarray(mixed)).images
    assert levels_apart(drawn, expected) <= 1
    assert levels_apart(drawn, plain.images) > 1
    programs = continuation._programs.prepare._cache_size()
    continuation.draw([story], frameinit=FrameInitConfig("gaussian", level=500))
    assert continuation._programs.prepare._cache_size() == programs


def test_a_moving_camera_films_the_clip_that_frameinit_starts_from(continuation):
    wide = np.random.default_rng(1).integers(0, 256, (20, 40, 3), np.uint8)

    options = {"frameinit": FrameInitConfig(), "camera_motion": "pan_left"}
    request = continuation.request([Story(SENTENCES, "a", wide)], **options)

    np.testing.assert_array_equal(request.inputs.first_frame[0], film(wide, "pan_left", 5, 16, 16))


def test_the_first_frames_posterior_follows_from_the_seed_and_the_id(tiny_model_config):
    vae = {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    values = dataclasses.asdict(tiny_model_config)
    values["unet"].update(in_channels=4, out_channels=4)
    model = StoryModel(build(ModelConfig, {**values, "vae": {"kind": "kl", **vae}}))
    params = {"vae": jax.tree.map(jnp.asarray, model.vae.init(0))}
    pictures = jnp.broadcast_to(FIRST_FRAME, (3, 1, 16, 16, 3))
    keys = [story_key(seed, name) for seed, name in ((0, "a"), (0, "b"), (1, "a"))]

    encode = jax.jit(model.encode_images)
    latents, again = (
        np.asarray(encode(params, pictures, jnp.stack(order))) for order in (keys, keys[::-1])
    )

    np.testing.assert_array_equal(latents, again[::-1])
    assert all(np.abs(latents[i] - latents[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2)))


@pytest.mark.multiprocess
def test_pictures_are_the_same_on_several_devices(pipeline, tiny_checkpoint, tmp_path):
    script = """
import sys, numpy as np
from contextualstory_jax import Story, StoryPipeline, UserError
pipeline = StoryPipeline.load(sys.argv[1])
assert pipeline.mesh.size == 2
sentences = ("A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps.")
np.save(sys.argv[2], pipeline([Story(sentences, id) for id in "xyz"], seed=3))
"""
    subprocess.run(
        [sys.executable, "-c", script, tiny_checkpoint, tmp_path / "drawn.npy"],
        env=environment(devices=2),
        check=True,
    )

    drawn = np.load(tmp_path / "drawn.npy")
    assert levels_apart(drawn, pipeline([Story(SENTENCES, id) for id in "xyz"], seed=3)) <= 1
