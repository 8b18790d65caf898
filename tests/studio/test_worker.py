"""The worker: batches, their bytes, the queue, cancelling and failures."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from contextualstory_jax.sampling.arguments import read_sampling
from contextualstory_jax.sampling.prompts import Kept, Story
from contextualstory_jax.studio import worker as module
from contextualstory_jax.studio.worker import Job
from contextualstory_jax.utils.errors import UserError
from tests.studio.conftest import SENTENCES

WAIT = 60  # seconds


def job(model, seeds=(0,), sentences=SENTENCES, kept=None, steps=2, finish=None, client=None):
    """A job whose results are in its `found`."""
    found = []
    options = {
        "sampling": read_sampling(model.config, None, num_inference_steps=steps),
        "size": (16, 16),
        "storyflow": None,
        "negative_prompt": None,
        "shared_noise_seed": None,
        "window_overlap": 2,
    }
    new = Job(model, Story(sentences), list(seeds), kept, options, finish or found.append, client)
    new.__dict__["found"] = found
    return new


def run(worker, jobs):
    for one in jobs:
        worker.submit(one)
    for one in jobs:
        assert one.done.wait(WAIT) and not one.error, one.error
    return [one.found[0] for one in jobs]


@pytest.fixture
def held(worker, model):
    """The worker kept busy until the event is set."""
    running, free = threading.Event(), threading.Event()

    def finish(_):
        running.set()
        free.wait(WAIT)

    worker.submit(job(model, finish=finish))
    assert running.wait(WAIT)
    yield free
    free.set()


def test_a_batch_has_the_bytes_of_its_stories_alone(worker, model, held, monkeypatch):
    kept = Kept(np.full((5, 16, 16, 3), 99, np.uint8), None, (True, False, True, True, False))
    others = [sentence + " Again." for sentence in SENTENCES]
    wanted = [
        {"seeds": (1,)},
        {"seeds": (5, 6, 7), "sentences": others},
        {"seeds": (1,), "kept": kept},
        {"seeds": (2,), "sentences": SENTENCES[:3]},  # of another length, so of another batch
        {"seeds": (8,), "sentences": others[::-1]},
    ]
    batches, take = [], worker._take

    def counted():
        batches.append(take())
        return batches[-1]

    monkeypatch.setattr(worker, "_take", counted)
    jobs = [job(model, client=i, **values) for i, values in enumerate(wanted)]
    for one in jobs:
        worker.submit(one)
    assert worker.position(jobs[0]) == 1 and worker.position(jobs[4]) == 5
    held.set()
    for one in jobs:
        assert one.done.wait(WAIT) and not one.error, one.error
        assert one.step == one.steps
    assert [len(batch) for batch in batches] == [4, 2, 1]
    assert len({slot[0] for slot in batches[0]}) == 2

    for together, values in zip(jobs, wanted, strict=True):
        alone = [run(worker, [job(model, **{**values, "seeds": (s,)})])[0] for s in together.seeds]
        for name in ("images", "latents"):
            single = np.concatenate([getattr(one, name) for one in alone])
            np.testing.assert_array_equal(getattr(together.found[0], name), single)
    (images,) = jobs[2].found[0].images
    assert (images[[0, 2, 3]] == 99).all() and not (images[[1, 4]] == 99).all()


def test_stories_of_several_windows_count_all_steps(worker, model):
    one = job(model, sentences=SENTENCES * 2)

    (found,) = run(worker, [one])

    assert found.images.shape == (1, 10, 16, 16, 3)
    assert one.step == one.steps == 3 * 2  # windows of 5 with an overlap of 2


def test_cancelling_ends_within_a_step(worker, model):
    one = job(model, steps=250)
    worker.submit(one)
    while one.step < 3:
        time.sleep(0.001)

    worker.cancel(one)
    step = one.step
    (found,) = run(worker, [job(model, seeds=(3,))])

    assert one.done.is_set() and one.error == "cancelled" and not one.found
    assert one.step <= step + 1
    assert found.images.shape == (1, 5, 16, 16, 3)
    assert not worker._running


def test_cancelling_one_of_a_batch_leaves_the_others(worker, model, held):
    first, second = job(model, seeds=(1,), client=1), job(model, seeds=(2,), client=2)
    worker.submit(first)
    worker.submit(second)
    first.__dict__["finish"] = pytest.fail
    held.set()
    while not second.step and not second.done.is_set():
        time.sleep(0.001)
    worker.cancel(first)

    assert second.done.wait(WAIT) and not second.error and second.found


def test_a_job_in_the_queue_is_cancelled_at_once(worker, model, held):
    waiting = job(model, client=1)
    worker.submit(waiting)

    worker.cancel(waiting)

    assert waiting.done.is_set() and not worker._queue


def test_a_story_that_fails_leaves_the_others_of_its_batch(worker, model, held, caplog):
    pipeline = model.pipeline
    draw = pipeline.draw_batches

    def failing(stories, **options):
        if any(story.sentences[0] == "Bad." for story in stories):
            raise RuntimeError("no")
        return draw(stories, **options)

    good, bad = job(model, client=1), job(model, sentences=["Bad.", *SENTENCES[1:]], client=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "draw_batches", failing)
        worker.submit(good)
        worker.submit(bad)
        held.set()
        assert good.done.wait(WAIT) and bad.done.wait(WAIT)

    assert good.found and not good.error
    assert not bad.found and "the server's log" in bad.error and "no" in caplog.text


def test_a_story_that_cannot_be_saved_says_why(worker, model):
    def full(_):
        raise UserError("the disk is full")

    one = job(model, finish=full)
    worker.submit(one)

    assert one.done.wait(WAIT) and one.error == "the disk is full"
    run(worker, [job(model)])  # and the worker goes on


def test_the_queue_is_bounded(worker, model, held, monkeypatch):
    for _ in range(module.MOST_OF_CLIENT):
        worker.submit(job(model, client="a"))
    with pytest.raises(UserError, match=f"you have {module.MOST_OF_CLIENT} stories waiting"):
        worker.submit(job(model, client="a"))
    worker.submit(job(model, client="b"))

    monkeypatch.setattr(module, "MOST_WAITING", len(worker._queue) + 1)
    with pytest.raises(UserError, match="the queue is full"):
        worker.submit(job(model, client="c"))


def test_previews_change_no_byte_and_show_what_is_being_generated(worker, model, monkeypatch):
    (without,) = run(worker, [job(model, steps=3)])
    monkeypatch.setattr(module, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(module, "PREVIEW_SHARE", 0)
    shown, preview = [], model.pipeline.preview
    monkeypatch.setattr(model.pipeline, "preview", lambda x: shown.append(x) or preview(x))
    one = job(model, sentences=SENTENCES[:3], steps=3)

    short, again = run(worker, [one, job(model, steps=3)])

    np.testing.assert_array_equal(again.images, without.images)
    np.testing.assert_array_equal(again.latents, without.latents)
    assert len(shown) == 2  # of three steps each, neither the first nor the last
    assert one.preview.shape == (3, 16, 16, 3)
    # The prediction of clean latents, which is nearer to the result than noise is.
    distance = np.abs(np.asarray(shown[0][0, :3]) - short.latents[0]).mean()
    assert distance < 0.7 * np.abs(short.latents[0]).mean()
