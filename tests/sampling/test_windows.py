"""Stories of any length: windows that overlap, one noise, context, and padding."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from contextualstory_jax import Kept, Story, UserError
from contextualstory_jax.config.model_config import NoiseConfig
from contextualstory_jax.diffusion.noise import story_key, story_noise
from contextualstory_jax.sampling.windows import Window, unclear_starts, windows
from scripts.benchmarks.generation import CompilationCount

NUMBERS = "no one two three four five six ten".split()
SENTENCES = tuple(f"A cat has {number} hats." for number in NUMBERS)
STORY = Story(SENTENCES, "a")


@pytest.mark.parametrize("overlap", range(1, 5))
def test_windows_cover_a_story_once_and_in_order(overlap):
    for sentences in range(1, 101):
        found = windows(sentences, 5, overlap)

        new = [
            i
            for window in found
            for i in range(window.start + window.kept, min(window.start + 5, sentences))
        ]
        assert new == list(range(sentences))
        assert all(window.start + 5 <= sentences for window in found[1:])
        assert all(overlap <= window.kept < 5 for window in found[1:])


def test_the_last_window_ends_with_the_story():
    assert windows(9, 5, 2) == [Window(0, 0), Window(3, 2), Window(4, 4)]


@pytest.mark.parametrize("kind", ["vanilla", "pyoco_mixed", "pyoco_progressive"])
def test_a_long_storys_noise_begins_with_a_short_ones(kind):
    key, config = jax.random.key(3), NoiseConfig(kind=kind)

    long, short = (story_noise(key, (frames, 4, 4, 3), config) for frames in (100, 5))

    np.testing.assert_array_equal(long[:5], short)


@pytest.fixture(scope="module")
def eight(pipeline):
    return pipeline.draw([STORY], seed=1)


def test_eight_sentences_give_eight_images_of_which_the_first_five_are_the_short_storys(
    pipeline, eight
):
    short = pipeline.draw([STORY._replace(sentences=SENTENCES[:5])], seed=1)

    assert (eight.images.shape, eight.latents.shape) == ((1, 8, 16, 16, 3), (1, 8, 4, 4, 48))
    np.testing.assert_array_equal(eight.images[:, :5], short.images)
    np.testing.assert_array_equal(pipeline(SENTENCES[:8], seed=1).shape, (8, 16, 16, 3))


def test_each_window_keeps_the_frames_before_and_takes_its_part_of_the_noise(pipeline, eight):
    noise = story_noise(
        jax.random.split(story_key(1, "a"), 3)[0], (8, 4, 4, 48), pipeline.model.config.noise
    )
    keep = (True, True, False, False, False)

    second = pipeline.draw(
        [Story(SENTENCES[3:], "a, from 3")],
        kept=[Kept(eight.images[0, 3:], eight.latents[0, 3:], keep)],
        initial_latents=np.asarray(noise)[None, 3:],
        seed=1,
    )

    np.testing.assert_array_equal(second.images, eight.images[:, 3:])


def test_fewer_sentences_give_as_many_images(pipeline):
    padded = pipeline.draw([STORY._replace(sentences=(*SENTENCES[:3], *[SENTENCES[2]] * 2))])

    short = pipeline.draw([STORY._replace(sentences=SENTENCES[:3])])

    np.testing.assert_array_equal(short.images, padded.images[:, :3])
    assert pipeline(SENTENCES[:1]).shape == (1, 16, 16, 3)


def test_stories_of_several_lengths_come_in_order_and_do_not_depend_on_their_batch(pipeline, eight):
    counts = (8, 8, 2, 5, 5, 5)
    stories = [Story(SENTENCES[:count], f"s{i}") for i, count in enumerate(counts)]
    stories[1] = STORY

    batches = list(pipeline.draw_batches(stories, seed=1, batch_size=2))

    assert [batch.images.shape[:2] for batch in batches] == [(2, 8), (1, 2), (2, 5), (1, 5)]
    assert np.max(np.abs(batches[0].images[1].astype(int) - eight.images[0])) <= 1
    with pytest.raises(UserError, match="of one length"):
        pipeline.draw(stories)


def test_a_story_of_another_length_compiles_nothing(pipeline, eight):
    with CompilationCount() as counter:
        pipeline.draw([Story(SENTENCES[:7] * 2, "b")], seed=2)

    assert counter.count == 0


def test_kept_frames_of_a_long_story_stay_and_change_the_others(pipeline, eight):
    keep = tuple(i != 6 for i in range(8))
    own = eight.images[0].copy()
    own[7] = 255 - own[7]

    kept = [Kept(own, None, keep)]
    again = pipeline.draw([STORY], seed=5, kept=kept).images[0]

    np.testing.assert_array_equal(again[np.array(keep)], own[np.array(keep)])
    assert not np.array_equal(again[6], eight.images[0, 6])


@pytest.mark.slow
def test_a_continuations_windows_begin_from_a_frame_before(continuation):
    first = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)

    images = continuation.draw([STORY._replace(first_frame=first)], seed=1).images[0]

    assert np.max(np.abs(images[0].astype(int) - first)) <= 1  # the VAE's
    assert images.shape == (8, 16, 16, 3)


def test_context_is_read_where_a_window_begins_and_nowhere_else(pipeline, eight):
    def drawn(**context):
        numbered = {int(name[1:]): words for name, words in context.items()}
        return pipeline.draw([STORY._replace(context=numbered)], seed=1).images[0]

    restated = drawn(_3="Two dogs sleep in the snow.")

    np.testing.assert_array_equal(restated[:5], eight.images[0, :5])
    assert not np.array_equal(restated[5:], eight.images[0, 5:])
    np.testing.assert_array_equal(drawn(_4="Two dogs sleep in the snow."), eight.images[0])


def test_windows_that_begin_with_a_pronoun_are_named():
    story = Story(("Mia walks.", *["She walks."] * 8))

    assert unclear_starts(story, 5, 2) == [3, 4]
    assert unclear_starts(story._replace(context={3: "Mia walks."}), 5, 2) == [4]


def test_a_callback_that_interrupts_a_long_story_ends_it_within_a_step(pipeline):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe.interrupt = True

    assert list(pipeline.draw_batches([STORY], callback_on_step_end=stop)) == []
    assert steps == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storyflow": [1.0] * 6}, "storyflow must be 4 finite numbers"),
        ({"camera_motion": "zoom_in"}, "camera_motion is for up to 5 sentences"),
        ({"initial_latents": np.zeros((1, 5, 4, 4, 48), np.float32)}, r"\(1, 8, 4, 4, 48\)"),
        ({"window_overlap": 0}, "window_overlap must be an integer in 1..4; got 0"),
    ],
)
def test_what_does_not_fit_a_long_story_is_refused(pipeline, options, message):
    with pytest.raises(UserError, match=message):
        pipeline.draw([STORY], **options)


def test_a_storyflow_for_each_transition_is_sliced(pipeline, eight):
    mean = pipeline.storyflow.tolist()[:4]
    calm, cut = ([*mean, 0.0, 0.0, value] for value in (0.0, 90.0))

    one, other = (pipeline.draw([STORY], seed=1, storyflow=flow).images[0] for flow in (calm, cut))

    np.testing.assert_array_equal(one[:5], other[:5])
    assert not np.array_equal(one[5:], other[5:])
