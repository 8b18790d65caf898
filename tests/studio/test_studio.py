"""The studio's actions, and the same bytes and messages from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from contextualstory_jax import StoryPipeline, generate
from contextualstory_jax.studio.inputs import Settings
from contextualstory_jax.studio.projects import Projects
from contextualstory_jax.utils.errors import UserError
from tests.studio.conftest import SENTENCES

SETTINGS = Settings(seed=3, steps=2)


def made(studio, *arguments, link="", sentences=SENTENCES, settings=SETTINGS, **options):
    link, job = studio.generate(link, sentences, settings, **options)
    return link, done(studio, link, job)


def done(studio, link, job):
    assert job.done.wait(60) and not job.error, job.error
    return studio.projects.find(link).read()


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


def test_locked_frames_follow_their_sentences(studio):
    link, before = made(studio)
    for frame in (0, 3):
        studio.lock(link, frame, True)
    others = ["New.", SENTENCES[3], SENTENCES[1], "Newer.", SENTENCES[0], "Newest.", "Last."]

    _, after = made(studio, link=link, sentences=others, settings=Settings(9, 2))

    np.testing.assert_array_equal(after.images[[1, 4]], before.images[[3, 0]])
    assert after.seeds == (9, 3, 9, 9, 3, 9, 9)
    assert studio.projects.find(link).read_page()["locked"] == [1, 4]


def test_an_edited_sentence_leaves_its_frame_in_its_place(studio):
    link, before = made(studio)
    edited = [*SENTENCES[:2], "They jump.", *SENTENCES[3:]]

    _, after = made(studio, link=link, sentences=edited, keep=[2], settings=Settings(9, 2))

    np.testing.assert_array_equal(after.images[2], before.images[2])
    assert after.seeds == (9, 9, 3, 9, 9)


def test_an_image_of_ones_own_is_kept(studio, image_url):
    link, _ = made(studio)

    studio.replace(link, 1, image_url)

    saved = studio.projects.find(link).read()
    assert saved.seeds[1] is None and (saved.images[1] == (200, 10, 10)).all()
    _, after = made(studio, link=link, settings=Settings(5, 2))
    assert (after.images[1] == (200, 10, 10)).all() and after.seeds == (5, None, 5, 5, 5)
    studio.step(link, -1)
    studio.step(link, -1)
    assert studio.projects.find(link).read().seeds == (3,) * 5


def test_one_of_the_candidates_is_taken(studio):
    link, before = made(studio)
    job = studio.candidates(link, [2], 3, Settings(10, 2))
    assert done(studio, link, job).seeds == before.seeds  # nothing is taken yet
    found = studio.projects.find(link).read_candidates()
    assert [story.seeds[2] for story in found] == [10, 11, 12]

    studio.choose(link, 1)

    after = studio.projects.find(link).read()
    np.testing.assert_array_equal(after.images, found[1].images)
    assert not studio.projects.find(link).read_candidates()


def test_a_cancelled_story_stays_as_it_was(studio):
    link, before = made(studio)
    _, job = studio.generate(link, SENTENCES, Settings(4, 250))
    with pytest.raises(UserError, match="being generated"):
        studio.replace(link, 0, "")
    studio.cancel(link)

    assert job.done.wait(60) and job.error == "cancelled"
    np.testing.assert_array_equal(studio.projects.find(link).read().images, before.images)
    made(studio, link=link)


def test_a_story_that_finds_the_queue_full_leaves_nothing(studio, monkeypatch):
    monkeypatch.setattr("contextualstory_jax.studio.worker.MOST_WAITING", 0)

    with pytest.raises(UserError, match="the queue is full"):
        studio.generate("", SENTENCES, SETTINGS)

    assert not list(studio.projects.all())


def test_the_page_is_kept_before_the_first_frame_is_there(studio, worker):
    link, job = studio.generate("", SENTENCES, Settings(4, 250, storyflow=[1, 2, 3, 4]))
    again = Projects(studio.projects.folder).find(link)  # as after a kill

    assert again.read() is None
    page = again.read_page()
    assert page["sentences"] == SENTENCES and page["storyflow"] == [1, 2, 3, 4]
    worker.cancel(job)


@pytest.mark.parametrize("kind", ["png", "strip", "pdf", "gif", "json"])
def test_exports_are_the_files_of_generate(studio, tmp_path, kind):
    link, saved = made(studio)

    files = studio.export(link, kind, tmp_path / "export")

    assert [path.stat().st_size > 0 for path in files] == [True] * (5 if kind == "png" else 1)
    if kind == "json":
        assert json.loads(files[0].read_text())["seeds"] == list(saved.seeds)


def test_warnings_name_pronouns_at_the_beginning_of_a_window(studio, model):
    sentences = [*SENTENCES[:3], "They nap.", *SENTENCES]

    assert studio.notes(sentences, model) == [
        "sentence 4 begins a window: name who 'They' is",
    ]


LONG, MANY = ["a" * 10_000], ["a"] * 101


@pytest.mark.parametrize("sentences", [[], MANY, LONG], ids=["none", "101", "long"])
def test_sentences_are_refused_in_the_command_lines_words(studio, tmp_path, sentences):
    stories = tmp_path / "stories.jsonl"
    stories.write_text(json.dumps({"id": "story", "sentences": sentences}))
    with pytest.raises(UserError) as of_command:
        generate.main(["--stories", str(stories), "--out", str(tmp_path / "out")])

    with pytest.raises(UserError) as of_studio:
        studio.generate("", sentences, SETTINGS)

    assert str(of_studio.value) == str(of_command.value)
    assert not list(studio.projects.all())


@pytest.mark.parametrize(
    "option, action",
    [
        (["--keep", "7"], lambda s, link: s.generate(link, SENTENCES, SETTINGS, keep=[7])),
        (["--candidates", "0"], lambda s, link: s.candidates(link, [1], 0, SETTINGS)),
        (
            ["--keep", "0,1,2,3,4"],
            lambda s, link: s.generate(link, SENTENCES, SETTINGS, keep=[0, 1, 2, 3, 4]),
        ),
    ],
    ids=["keep 7", "candidates 0", "keep all"],
)
def test_frames_are_refused_in_the_command_lines_words(studio, tmp_path, option, action):
    link, _ = made(studio)
    folder = studio.projects.find(link).folder
    with pytest.raises(UserError) as of_command:
        generate.main(["--from", str(folder), "--out", str(tmp_path / "out"), *option])

    with pytest.raises(UserError) as of_studio:
        action(studio, link)

    assert str(of_studio.value) in str(of_command.value)


def test_a_story_of_a_newer_format_is_refused_in_the_command_lines_words(studio, tmp_path):
    link, _ = made(studio)
    path = studio.projects.find(link).folder / "story.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99") as of_command:
        generate.main(["--from", str(path.parent), "--out", str(tmp_path / "out")])

    with pytest.raises(UserError) as of_studio:
        studio.regenerate(link, [0], SETTINGS)

    assert str(of_studio.value) == str(of_command.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"settings": Settings(-1)}, "seed must be an integer"),
        ({"settings": Settings("1")}, "seed must be an integer"),
        ({"settings": Settings(0, 0)}, "steps must be an integer in 1..250; got 0"),
        ({"settings": Settings(0, 251)}, "steps must be an integer in 1..250; got 251"),
        ({"settings": Settings(0, 2, float("nan"))}, "guidance must be a number"),
        ({"settings": Settings(0, 2, None, [1.0])}, "storyflow must be 4 finite numbers"),
        ({"settings": Settings(0, 2, None, [1.0, 2.0, 3.0, -1.0])}, "storyflow must be"),
        ({"settings": Settings(0, 2, None, ["a"] * 4)}, "storyflow must be"),
        ({"sentences": "Mia sits."}, "sentences must be a list"),
        ({"sentences": ["Mia sits.", 5]}, "must be a string"),
        ({"sentences": ["Mia sits.", " "]}, "a sentence is blank"),
        ({"model": "another"}, "model must be one of"),
        ({"keep": "01"}, "keep must be a list"),
        ({"keep": [0]}, None),  # of a new story there is nothing to keep
        ({"images": ["x"]}, "images must be an object"),
        ({"images": {"9": "x"}}, "images: no frame '9'"),
        ({"images": {"0": "no base64"}}, "not base64"),
        ({"images": {"0": "bm8gaW1hZ2U="}}, "the upload is not an image"),
        ({"images": {"0": "A" * (28 * 2**20)}}, "over 20 MB"),
    ],
)
def test_what_is_not_right_is_refused_and_leaves_nothing(studio, options, message):
    values = {"sentences": SENTENCES, "settings": SETTINGS, **options}
    if message is None:
        made(studio, **values)
        return
    with pytest.raises(UserError, match=message):
        studio.generate("", **values)

    assert not [p for p in studio.projects.folder.iterdir() if p.name != ".key"]
