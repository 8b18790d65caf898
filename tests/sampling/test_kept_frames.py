"""Frames that stay: byte for byte, seen by the others, and an input of the compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from contextualstory_jax import Story, StoryPipeline, UserError
from contextualstory_jax.config.model_config import SamplingConfig
from contextualstory_jax.diffusion.denoising import initial_state, padded
from contextualstory_jax.sampling.prompts import Kept
from scripts.benchmarks.generation import CompilationCount

SENTENCES = ("A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps.")
STORY = Story(SENTENCES, "a")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
LATENTS = np.random.default_rng(1).standard_normal((5, 4, 4, 48), np.float32)
ALL_BUT_2 = (True, True, False, True, True)


@dataclasses.dataclass(frozen=True)
class Saved:
    """The part of a story folder that frames are generated again from."""

    story: Story
    images: np.ndarray
    latents: np.ndarray | None
    seeds: tuple[int | None, ...]


@contextlib.contextmanager
def blended(pipeline: StoryPipeline) -> Iterator[StoryPipeline]:
    """The model with its temporal layers half in; untrained, they have no effect."""
    unet = {
        name: leaf / 2 if name.endswith("alpha") else leaf
        for name, leaf in pipeline.params["unet"].items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "params", {**pipeline.params, "unet": unet})
        yield pipeline


@pytest.fixture(scope="module", name="pipeline")
def blended_pipeline(pipeline):
    with blended(pipeline) as model:
        yield model


@pytest.fixture(scope="module", name="continuation")
def blended_continuation(continuation):
    with blended(continuation) as model:
        yield model


@pytest.fixture(scope="module")
def saved(pipeline) -> Saved:
    generated = pipeline.draw([STORY], seed=3)
    return Saved(STORY, generated.images[0], generated.latents[0], (3,) * 5)


def same(a: np.ndarray, b: np.ndarray) -> list[bool]:
    """Whether each frame is the same, byte for byte."""
    return [np.array_equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("frames", [[2], [0, 4], range(5)])
def test_the_frames_that_are_not_named_stay_byte_for_byte(pipeline, saved, frames):
    new = pipeline.regenerate(saved, frames, seed=5)

    expected = [i not in frames for i in range(5)]
    assert same(new.images, saved.images) == expected
    assert same(new.latents, saved.latents) == expected
    assert new.seeds == tuple(3 if kept else 5 for kept in expected)
    assert new.story == STORY


def test_ones_own_images_stay_in_a_visualization_model(pipeline):
    kept = Kept(IMAGES, None, ALL_BUT_2)

    images, latents = pipeline.draw([STORY], kept=[kept])

    assert same(images[0], IMAGES) == list(ALL_BUT_2)
    # This model's VAE loses nothing, and so latents and images are worth the same.
    encoded = np.asarray(pipeline._programs.encode(pipeline.params, IMAGES, jax.random.key(0)))
    given = pipeline.draw([STORY], kept=[kept._replace(latents=encoded)])
    np.testing.assert_array_equal(given.images, images)
    np.testing.assert_array_equal(latents[0][np.array(ALL_BUT_2)], encoded[np.array(ALL_BUT_2)])


def test_new_frames_follow_from_the_kept_ones_and_from_nothing_else_that_is_handed_over(pipeline):
    def frame_2(images: np.ndarray, latents: np.ndarray) -> np.ndarray:
        kept = [Kept(images, latents, ALL_BUT_2)]
        return pipeline.draw([STORY], kept=kept).latents[0, 2]

    other, unread = LATENTS.copy(), LATENTS.copy()
    other[1] += 1
    unread[2] = np.nan

    expected = frame_2(IMAGES, LATENTS)
    assert np.abs(expected - frame_2(IMAGES, other)).max() > 1e-3
    np.testing.assert_array_equal(frame_2(255 - IMAGES, unread), expected)


def test_nothing_kept_is_bit_for_bit_the_program_without_kept_frames(pipeline):
    request = pipeline.request([STORY], seed=1)
    branches, inputs, null_ids, motion, sampler, scales, frameinit = request
    given, latents = pipeline._programs.prepare(
        branches, pipeline.params, inputs, null_ids, motion, scales, 1.0, frameinit
    )
    without = given._replace(kept=None)
    state = initial_state(sampler, latents)
    steps = np.int32(0), np.int32(len(sampler.timesteps))

    state = pipeline._programs.steps(
        branches, pipeline.params, without, padded(sampler), state, *steps
    )

    np.testing.assert_array_equal(state.latents, pipeline.draw([STORY], seed=1).latents)
    none = [Kept(IMAGES, LATENTS, (False,) * 5)]
    drawn = pipeline.draw([STORY], seed=1, kept=none)
    np.testing.assert_array_equal(drawn.latents, state.latents)


def test_which_frames_are_kept_compiles_nothing(pipeline):
    pipeline.draw([STORY])
    keeps = [ALL_BUT_2, (True, False, False, False, False), (False, False, True, True, False)]

    with CompilationCount() as counter:
        for seed, keep in enumerate(keeps):
            drawn = pipeline.draw([STORY], seed=seed, kept=[Kept(IMAGES, LATENTS, keep)])
            assert same(drawn.images[0], IMAGES) == list(keep)

    assert counter.count == 0


def test_stories_of_one_batch_keep_different_frames(pipeline):
    stories = [STORY, Story(SENTENCES, "b"), Story(SENTENCES, "c")]
    kept = [Kept(IMAGES, LATENTS, ALL_BUT_2), None, Kept(IMAGES[::-1], None, ALL_BUT_2[::-1])]

    batch = pipeline.draw(stories, kept=kept, batch_size=2)

    for i, (story, one) in enumerate(zip(stories, kept, strict=True)):
        alone = pipeline.draw([story], kept=[one])
        np.testing.assert_allclose(batch.latents[i], alone.latents[0], atol=1e-4)  # other programs
    turned = pipeline.draw(stories[::-1], kept=kept[::-1], batch_size=2)
    np.testing.assert_allclose(batch.latents[::-1], turned.latents, atol=1e-4)
    assert same(batch.images[2], IMAGES[::-1]) == list(ALL_BUT_2)


def test_candidates_are_one_story_with_several_seeds(pipeline):
    candidates = pipeline.draw([STORY] * 2, seed=[7, 3]).latents

    for latents, seed in zip(candidates, (7, 3), strict=True):
        alone = pipeline.draw([STORY], seed=seed).latents[0]
        np.testing.assert_allclose(latents, alone, atol=1e-4)  # programs of two sizes round apart
    assert np.abs(candidates[0] - candidates[1]).max() > 0.1


def test_near_keeps_the_shared_part_of_the_noise(pipeline, saved):
    def noise(**seeds) -> np.ndarray:
        request = pipeline.request([STORY], **seeds)
        return np.asarray(request.inputs.noise[0])

    old, new, near = noise(seed=3), noise(seed=5), noise(seed=5, shared_noise_seed=3)

    def likeness(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    # a^2 / (1 + a^2) with a = 1.5; 3840 values
    assert likeness(old, near) == pytest.approx(9 / 13, abs=0.05)
    assert likeness(old, new) == pytest.approx(0, abs=0.15)  # 768 of them are independent
    np.testing.assert_array_equal(noise(seed=5, shared_noise_seed=5), new)
    # Of another frame's shared part nothing but the own part is left.
    np.testing.assert_allclose(np.diff(near, axis=0), np.diff(new, axis=0), atol=1e-5)
    regenerated = pipeline.regenerate(saved, [2], seed=5, near=True)
    kept = [Kept(saved.images, saved.latents, ALL_BUT_2)]
    expected = pipeline.draw([STORY], seed=5, shared_noise_seed=3, kept=kept)
    np.testing.assert_array_equal(regenerated.images, expected.images[0])


def test_a_callback_sees_kept_frames_clean_and_changes_no_bit(pipeline):
    keep, seen = np.array(ALL_BUT_2), []
    options = {
        "kept": [Kept(IMAGES, LATENTS, ALL_BUT_2)],
        "sampling": SamplingConfig(steps=4, guidance_scale=2.0),
    }

    def read(pipe, step: int, timestep: float, given: dict) -> None:
        seen.append(np.asarray(given["latents"])[0])

    drawn = pipeline.draw([STORY], callback_on_step_end=read, **options)

    plain = pipeline.draw([STORY], **options)
    np.testing.assert_array_equal(drawn.images, plain.images)
    np.testing.assert_array_equal(drawn.latents, plain.latents)
    assert len(seen) == 4
    for latents in seen:
        np.testing.assert_array_equal(latents[keep], LATENTS[keep])
    np.testing.assert_array_equal(seen[-1], drawn.latents[0])


def test_continuation_keeps_its_first_frame_and_others(continuation):
    first = continuation.draw([STORY._replace(first_frame=IMAGES[0])], seed=3)
    saved = Saved(STORY, first.images[0], first.latents[0], (3,) * 5)

    new = continuation.regenerate(saved, [2], seed=5)

    assert same(new.images, saved.images) == list(ALL_BUT_2)
    assert same(new.latents, saved.latents) == list(ALL_BUT_2)
    # Its kept latents, not what the VAE makes of its image, are what the others are generated from.
    moved = dataclasses.replace(saved, latents=saved.latents + np.float32([[[[0.5]]]]))
    other = continuation.regenerate(moved, [1, 2, 3, 4], seed=5)
    plain = continuation.regenerate(saved, [1, 2, 3, 4], seed=5)
    assert not any(same(other.latents, plain.latents))
    np.testing.assert_array_equal(other.latents[0], moved.latents[0])


def test_frames_of_ones_own_are_encoded_where_latents_are_missing(continuation):
    saved = Saved(STORY, IMAGES, None, (None,) * 5)

    new = continuation.regenerate(saved, [4], seed=5)

    assert same(new.images, IMAGES) == [True] * 4 + [False]
    assert new.seeds == (None, None, None, None, 5)
    assert new.latents.shape == LATENTS.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": IMAGES[:, :8]}, r"kept\[0\]: images must be uint8 of shape \(5, 16, 16, 3\)"),
        ({"images": IMAGES[:4]}, r"images must be uint8 of shape .* got uint8 of shape \(4, 16"),
        ({"latents": LATENTS[..., :4]}, r"latents must be float32 of shape \(5, 4, 4, 48\)"),
        ({"latents": LATENTS * np.float32(np.nan)}, "latents must be finite; give None"),
        ({"keep": (True,) * 5}, "keeps every frame, and nothing is generated"),
        ({"keep": (True,) * 4}, "keep must be 5 booleans, one a frame"),
    ],
)
def test_kept_frames_that_do_not_fit_are_refused(pipeline, options, message):
    kept = Kept(IMAGES, LATENTS, ALL_BUT_2)._replace(**options)

    with pytest.raises(UserError, match=message):
        pipeline.draw([STORY], kept=[kept])


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], r"frames must be a list of the frames to generate again, in 0..4; got \[\]"),
        ([5], r"frames\[0\] must be an integer in 0..4; got 5"),
        ([1, -1], r"frames\[1\] must be an integer in 0..4; got -1"),
    ],
)
def test_frames_that_a_story_does_not_have_are_refused(pipeline, saved, frames, message):
    with pytest.raises(UserError, match=message):
        pipeline.regenerate(saved, frames)


def test_what_else_cannot_be_is_refused(pipeline, continuation, saved):
    frameless = dataclasses.replace(saved, seeds=(None, 3, 4, 3, 3))

    for call, message in (
        (lambda: pipeline.draw([STORY], kept=[]), "kept must be a list of 1"),
        (lambda: pipeline.draw([STORY], seed=[1, 2]), "seed must be an integer or 1, one a story"),
        (lambda: continuation.regenerate(saved, [0]), "must be an integer in 1..4; got 0"),
        (lambda: pipeline.regenerate(frameless, [0], near=True), "no noise to stay near to"),
        (lambda: pipeline.regenerate(frameless, [1, 2], near=True), "several seeds, 3, 4"),
        (
            lambda: pipeline.draw([STORY], shared_noise_seed=1, initial_latents=LATENTS),
            "latents are given; leave one out",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            call()


def test_noise_without_a_shared_part_is_refused(pipeline, monkeypatch):
    config = pipeline.model.config
    vanilla = dataclasses.replace(config, noise=dataclasses.replace(config.noise, kind="vanilla"))
    monkeypatch.setattr(pipeline.model, "config", vanilla)

    with pytest.raises(UserError, match="this model's is vanilla; leave it out"):
        pipeline.draw([STORY], shared_noise_seed=1)
