"""The studio's actions, and the same bytes and messages from the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from contextualstory_jax import generate
from contextualstory_jax.sampling.export_formats import FORMATS, gif
from contextualstory_jax.studio.forms import Draft, locked_frames, notes
from contextualstory_jax.studio.inputs import Settings
from contextualstory_jax.studio.projects import Projects
from contextualstory_jax.studio.worker import Model
from contextualstory_jax.utils.errors import UserError
from tests.helpers.studio import SENTENCES, SETTINGS, done, made


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
    with pytest.raises(UserError, match="one's own has no noise to stay near to"):
        studio.regenerate(link, [1], SETTINGS, near=True)
    studio.step(link, -1)
    studio.step(link, -1)
    assert studio.projects.find(link).read().seeds == (3,) * 5


def test_one_of_the_candidates_is_taken(studio):
    link, before = made(studio)
    edited = [*SENTENCES[:2], "They run.", *SENTENCES[3:]]
    job = studio.candidates(link, [2], 3, Settings(10, 2), sentences=edited)
    assert done(studio, link, job).seeds == before.seeds  # nothing is taken yet
    found = studio.projects.find(link).read_candidates()
    assert [story.seeds[2] for story in found] == [10, 11, 12]

    studio.choose(link, 1)

    after = studio.projects.find(link).read()
    np.testing.assert_array_equal(after.images, found[1].images)
    assert list(after.story.sentences) == edited
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


@pytest.mark.parametrize("kind", ["png", "strip", "pdf", "gif"])
def test_exports_are_the_files_of_generate(shared_studio, link, tmp_path, kind, monkeypatch):
    monkeypatch.setitem(FORMATS, "gif", ("story.gif", gif))  # not the quick one
    files = shared_studio.export(link, kind, tmp_path / "export")

    assert [path.stat().st_size > 60 for path in files] == [True] * (5 if kind == "png" else 1)


def test_warnings_name_pronouns_that_nothing_explains(quick_model):
    sentences = [*SENTENCES[:3], "They nap.", *SENTENCES[:4]]

    assert notes(Draft(sentences), quick_model) == [
        "sentence 4 begins a window: say below who 'They' is"
    ]
    assert notes(Draft(sentences, None, {"3": "Mia and Otto nap."}), quick_model) == []


def test_context_follows_its_sentence(studio):
    link, before = made(studio, context={"3": "Mia sleeps."})
    assert before.story.context == {3: "Mia sleeps."}
    job = studio.regenerate(link, [2], Settings(4, 2), context={"2": "x"})
    assert done(studio, link, job).story.context == {2: "x"}
    studio.step(link, -1)
    assert studio.form(studio.projects.find(link)).draft.context == {"3": "Mia sleeps."}

    _, moved = made(studio, link=link, sentences=["New.", *SENTENCES])
    assert moved.story.context == {4: "Mia sleeps."}
    edited = ["New.", *SENTENCES[:3], "Mia sits.", SENTENCES[4]]
    assert made(studio, link=link, sentences=edited)[1].story.context == {}


def test_frames_are_moved_and_removed_with_all_that_is_theirs(studio, tmp_path):
    flow = [1.0, 2.0, 3.0, 4.0]
    link, before = made(studio, settings=Settings(3, 2, None, flow), context={"3": "Mia sleeps."})
    studio.lock(link, 3, True)

    studio.move(link, 3, "earlier")
    studio.move(link, 0, "remove")
    studio.move(link, 0, "earlier")  # where it is already

    project, order = studio.projects.find(link), [1, 3, 2, 4]
    after, form = project.read(), studio.form(project)
    np.testing.assert_array_equal(after.images, before.images[order])
    np.testing.assert_array_equal(after.latents, before.latents[order])
    assert form.draft.sentences == [SENTENCES[i] for i in order] == list(after.story.sentences)
    assert after.story.context == {1: "Mia sleeps."} and form.draft.context == {"1": "Mia sleeps."}
    assert locked_frames(project) == [1] and form.draft.storyflow == [3.0, 2.0, 4.0]
    with pytest.raises(UserError, match="all 4 frames are kept"):  # nothing is left to generate
        generate.main(["--from", str(project.folder), "--out", str(tmp_path / "out")])

    for _ in range(3):
        studio.step(link, -1)
    np.testing.assert_array_equal(project.read().images, before.images)
    assert locked_frames(project) == [3]


@pytest.mark.parametrize("frames", [[], [0, 0], [5], "01", [True], None])
def test_orders_that_are_none_are_refused(shared_studio, link, frames):
    with pytest.raises(UserError, match="frames"):
        shared_studio.arrange(link, frames)


def test_a_continuation_needs_a_first_frame(studio, tiny_continuation_checkpoint, quick_model):
    continuation = Model(str(tiny_continuation_checkpoint))
    studio.models[continuation.name] = continuation
    with pytest.raises(UserError, match="give a first frame"):
        studio.generate("", SENTENCES, SETTINGS, model=continuation.name)

    assert not list(studio.projects.all())
    assert "continuation" in continuation.about and continuation.storyflow == [5.0] * 4
    assert studio.model("") is quick_model and studio.model(continuation.name) is continuation


def test_a_story_of_generate_opens_with_its_own_settings(shared_studio, link, studio):
    saved = shared_studio.projects.find(link).read()
    of_command = {"seed": 6, "steps": 3, "guidance_scale": 1.5, "storyflow": [1.0, 2.0, 3.0, 4.0]}
    of_command |= {"guidance_rescale": 0.3, "negative_prompt": "dark"}
    dataclasses.replace(
        saved,
        story=saved.story._replace(sentences=SENTENCES[:3]),
        images=saved.images[:3],
        latents=saved.latents[:3],
        seeds=(6, None, 6),  # with an image of one's own
        settings=saved.settings | of_command,
    ).write(studio.projects.folder / "of_command")
    (project,) = studio.projects.all()

    form = studio.form(project)
    assert (form.seed, form.steps, form.guidance, form.draft.storyflow) == (6, 3, 1.5, [1.0, 2.0])
    assert form.draft.sentences == SENTENCES[:3] and locked_frames(project) == [1]
    settings = studio.settings(project.link, 7)
    after = done(studio, project.link, studio.regenerate(project.link, [2], settings))

    assert after.seeds == (6, None, 7) and after.settings["guidance_rescale"] == 0.3
    assert after.settings["negative_prompt"] == "dark" and after.settings["steps"] == 3


def test_what_is_written_is_kept_before_it_is_generated(shared_studio):
    studio = shared_studio
    link, before = made(studio, sentences=["Zoe jumps.", *SENTENCES[1:]])
    project, draft = studio.projects.find(link), Draft(["New.", "Newer."], [7.0], {"1": "x"})

    studio.save_draft(link, draft)

    assert studio.form(project).draft == draft
    np.testing.assert_array_equal(project.read().images, before.images)
    assert studio.settings(link, 3) == Settings(3, 2, None, None)  # those of the frames' number
    mean = [5.0, 6.0]
    assert draft.with_sentences(["Newer.", "A.", "B.", "C."], mean) == (
        *(["Newer.", "A.", "B.", "C."], [7.0, 6.0, 6.0], {"0": "x"}),
    )
    assert draft.with_sentences(["New."], mean) == (["New."], None, {})


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
def test_frames_are_refused_in_the_command_lines_words(
    shared_studio, link, tmp_path, option, action
):
    studio = shared_studio
    folder = studio.projects.find(link).folder
    with pytest.raises(UserError) as of_command:
        generate.main(["--from", str(folder), "--out", str(tmp_path / "out"), *option])

    with pytest.raises(UserError) as of_studio:
        action(studio, link)

    assert str(of_studio.value) in str(of_command.value)


def test_a_story_of_a_newer_format_is_refused_in_the_command_lines_words(
    shared_studio, link, studio, tmp_path
):
    folder = shared_studio.projects.find(link).folder
    shutil.copytree(folder, studio.projects.folder / "newer")
    ((link, path),) = [(p.link, p.folder / "story.json") for p in studio.projects.all()]
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
        ({"images": {"0": "A" * (27 * 2**20)}}, "an upload may have 20 MB"),
        ({"context": {"9": "x"}}, "context of '9', which is no sentence's number"),
        ({"context": ["x"]}, "context: context is"),
        ({"context": {"1": "a" * 1001}}, "context of sentence 1 has 1001 characters"),
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


def test_frames_of_other_weights_are_encoded_again(studio):
    link, saved = made(studio)
    job = studio.regenerate(link, [2], SETTINGS)
    assert job.kept.latents is not None
    done(studio, link, job)

    other = {**saved.checkpoint, "step": saved.checkpoint["step"] + 1}
    studio.projects.find(link).save(dataclasses.replace(saved, checkpoint=other))
    job = studio.regenerate(link, [2], SETTINGS)

    assert job.kept.latents is None
    again = done(studio, link, job)
    np.testing.assert_array_equal(again.images[:2], saved.images[:2])
