"""The worker: batches, their bytes and the command line's, the queue, cancelling and failures."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest

from contextualstory_jax import StoryPipeline, generate
from contextualstory_jax.sampling.arguments import read_sampling
from contextualstory_jax.sampling.prompts import Kept, Story
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.studio import worker as module
from contextualstory_jax.studio.forms import Draft, notes
from contextualstory_jax.studio.inputs import Settings
from contextualstory_jax.studio.studio import Studio
from contextualstory_jax.studio.worker import Job, Model
from contextualstory_jax.utils.errors import UserError
from tests.helpers.studio import SENTENCES, done, made

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
def held(worker, quick_model):
    """The worker kept busy until the event is set."""
    running, free = threading.Event(), threading.Event()

    def finish(_):
        running.set()
        free.wait(WAIT)

    worker.submit(job(quick_model, finish=finish))
    assert running.wait(WAIT)
    yield free
    free.set()


def test_a_batch_has_the_bytes_of_its_stories_alone(worker, model, held, monkeypatch):
    kept = Kept(np.full((5, 16, 16, 3), 99, np.uint8), None, (True, False, True, True, False))
    others = [sentence + " Again." for sentence in SENTENCES]
    wanted = [
        {"seeds": (1,)},
        {"seeds": (5, 6), "sentences": others},
        {"seeds": (1,), "kept": kept},
        {"seeds": (2,), "sentences": SENTENCES[:3]},  # of another length, so of another batch
    ]
    batches, take = [], worker._take

    def counted():
        batches.append(take())
        return batches[-1]

    monkeypatch.setattr(worker, "_take", counted)
    jobs = [job(model, client=i, **values) for i, values in enumerate(wanted)]
    for one in jobs:
        worker.submit(one)
    assert worker.position(jobs[0]) == 1 and worker.position(jobs[3]) == 4
    held.set()
    for one in jobs:
        assert one.done.wait(WAIT) and not one.error, one.error
        assert one.step == one.steps
    assert [len(batch) for batch in batches] == [4, 1]
    assert len({slot[0] for slot in batches[0]}) == 3

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


def test_cancelling_ends_within_a_step(worker, quick_model):
    one = job(quick_model, steps=250)
    worker.submit(one)
    while one.step < 3:
        time.sleep(0.001)

    worker.cancel(one)
    step = one.step
    (found,) = run(worker, [job(quick_model, seeds=(3,))])

    assert one.done.is_set() and one.error == "cancelled" and not one.found
    assert one.step <= step + 1
    assert found.images.shape == (1, 5, 16, 16, 3)
    assert not worker._running


def test_cancelling_one_of_a_batch_leaves_the_others(worker, quick_model, held):
    first, second = job(quick_model, seeds=(1,), client=1), job(quick_model, seeds=(2,), client=2)
    worker.submit(first)
    worker.submit(second)
    first.__dict__["finish"] = pytest.fail
    held.set()
    while not second.step and not second.done.is_set():
        time.sleep(0.001)
    worker.cancel(first)

    assert second.done.wait(WAIT) and not second.error and second.found


def test_a_job_in_the_queue_is_cancelled_at_once(worker, quick_model, held):
    waiting = job(quick_model, client=1)
    worker.submit(waiting)

    worker.cancel(waiting)

    assert waiting.done.is_set() and not worker._queue


def test_a_story_that_fails_leaves_the_others_of_its_batch(worker, quick_model, held, caplog):
    pipeline = quick_model.pipeline
    draw = pipeline.draw_batches

    def failing(stories, **options):
        if any(story.sentences[0] == "Bad." for story in stories):
            raise RuntimeError("no")
        return draw(stories, **options)

    good, bad = (
        job(quick_model, client=1),
        job(quick_model, sentences=["Bad.", *SENTENCES[1:]], client=2),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "draw_batches", failing)
        worker.submit(good)
        worker.submit(bad)
        held.set()
        assert good.done.wait(WAIT) and bad.done.wait(WAIT)

    assert good.found and not good.error
    assert not bad.found and "the server's log" in bad.error and "no" in caplog.text


def test_a_story_that_cannot_be_saved_says_why(worker, quick_model):
    def full(_):
        raise UserError("the disk is full")

    one = job(quick_model, finish=full)
    worker.submit(one)

    assert one.done.wait(WAIT) and one.error == "the disk is full"
    run(worker, [job(quick_model)])  # and the worker goes on


def test_the_queue_is_bounded(worker, quick_model, held, monkeypatch):
    for _ in range(module.MOST_OF_CLIENT):
        worker.submit(job(quick_model, client="a"))
    with pytest.raises(UserError, match=f"you have {module.MOST_OF_CLIENT} stories waiting"):
        worker.submit(job(quick_model, client="a"))
    worker.submit(job(quick_model, client="b"))

    monkeypatch.setattr(module, "MOST_WAITING", len(worker._queue) + 1)
    with pytest.raises(UserError, match="the queue is full"):
        worker.submit(job(quick_model, client="c"))


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


@pytest.fixture
def studio(model, worker, projects):
    """A studio with the tiny model."""
    return Studio([model], projects, worker)


@pytest.fixture
def loaded(model, monkeypatch):
    """The command line with the model that the studio has loaded."""
    pipeline = model.pipeline
    monkeypatch.setattr(StoryPipeline, "load", lambda *_, **__: pipeline)


def test_command_line_and_studio_take_each_others_stories(studio, loaded):
    flow = [1.0, 9.0, 2.0, 0.0]
    link, saved = made(studio, settings=Settings(3, 2, 1.5, flow))
    job = studio.regenerate(link, [2], Settings(8, 2, 1.5, flow))
    changed = done(studio, link, job)
    assert changed.seeds == (3, 3, 8, 3, 3)
    np.testing.assert_array_equal(np.delete(changed.images, 2, 0), np.delete(saved.images, 2, 0))
    assert (changed.images[2] != saved.images[2]).any()

    folder = studio.projects.find(link).folder
    generate.main(["--from", str(folder), "--out", str(studio.projects.folder)])

    (project,) = [p for p in studio.projects.all() if p.folder.name == "story"]
    again = project.read()
    np.testing.assert_array_equal(again.images, changed.images)
    np.testing.assert_array_equal(again.latents, changed.latents)

    job = studio.regenerate(project.link, [0], Settings(4, 2))
    after = done(studio, project.link, job)
    assert after.seeds == (4, 3, 8, 3, 3)
    np.testing.assert_array_equal(after.images[1:], again.images[1:])
    studio.step(project.link, -1)
    np.testing.assert_array_equal(project.read().images, again.images)


@pytest.mark.slow
def test_an_exported_json_and_its_files_generate_the_same_bytes(studio, loaded, tmp_path):
    link, _ = made(studio)
    after = done(studio, link, studio.regenerate(link, [2], Settings(8, 2)))

    files = studio.export(link, "json", tmp_path / "export")

    folder = tmp_path / "downloads"
    folder.mkdir()
    for path in files:
        shutil.copy(path, folder / path.name)
    generate.main(["--from", str(folder), "--out", str(tmp_path / "out")])
    again = SavedStory.read(tmp_path / "out" / "story")
    assert files[0].name == "story.json"
    np.testing.assert_array_equal(again.images, after.images)
    np.testing.assert_array_equal(again.latents, after.latents)


@pytest.mark.slow
def test_context_is_what_a_window_reads(studio, loaded):
    sentences = [*SENTENCES[:3], "They nap.", *SENTENCES[:4]]  # the second window begins there
    link, plain = made(studio, sentences=sentences)
    _, after = made(studio, link=link, sentences=sentences, context={"3": "Mia and Otto nap."})

    np.testing.assert_array_equal(after.images[:5], plain.images[:5])  # the first window's
    assert (after.images[5] != plain.images[5]).any()
    generate.main(["--from", str(studio.projects.find(link).folder)])  # which reads it too
    np.testing.assert_array_equal(studio.projects.find(link).read().images, after.images)


@pytest.mark.slow  # compiles the second model
def test_several_models_one_of_them_for_continuation(
    studio, tiny_continuation_checkpoint, model, image_url
):
    continuation = Model(str(tiny_continuation_checkpoint))
    studio.models[continuation.name] = continuation
    link, first = made(studio, images={"0": image_url}, model=continuation.name)
    assert (first.images[0] == (200, 10, 10)).all() and first.seeds == (None, 3, 3, 3, 3)
    with pytest.raises(UserError, match=r"frames\[0\] must be an integer in 1..4; got 0"):
        studio.regenerate(link, [0], Settings(3, 2))
    with pytest.raises(UserError, match="leave it the first"):
        studio.move(link, 0, "later")
    job = studio.regenerate(link, [2], Settings(4, 2))  # with the model that it is of
    after = done(studio, link, job)
    assert job.model is continuation and after.seeds == (None, 3, 4, 3, 3)
    studio.move(link, 1, "later")

    # The frames are kept by the other model too, which encodes them.
    _, other = made(studio, link=link, sentences=list(SENTENCES), keep=[0], model=model.name)
    np.testing.assert_array_equal(other.images[0], first.images[0])
    assert other.checkpoint["path"] == str(model.folder) and other.story.first_frame is None
    project = studio.projects.find(link)
    assert studio.model_of(project, other) is model
    assert any("another model" in line for line in notes(Draft(), continuation, other))
