"""Story folders: what is written is read again, and what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.sampling.export_formats import GRID_GAP
from contextualstory_jax.sampling.prompts import Story
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.utils import atomic
from contextualstory_jax.utils.atomic import PENDING
from contextualstory_jax.utils.errors import UserError

SENTENCES = ("A cat.", "Ein Bär.", "熊。", "It sits.", "It sleeps.")
NAMES = {*(f"frame_{i}.png" for i in range(5)), "grid.png", "story.gif", "story.json"}


def saved_story(seed: int = 7, frames: int = 5) -> SavedStory:
    rng = np.random.default_rng(seed)
    return SavedStory(
        Story(SENTENCES[:frames], "a"),
        rng.integers(0, 256, (frames, 8, 6, 3), np.uint8),
        rng.normal(size=(frames, 2, 2, 3)).astype(np.float32),
        (seed,) * frames,
        {"path": None, "step": 3, "weights": "ema"},
        {"seed": seed, "steps": 2},
    )


def assert_equal(found: SavedStory, expected: SavedStory) -> None:
    for field in dataclasses.fields(SavedStory):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_story_is_frames_a_grid_and_an_animation(tmp_path):
    saved = saved_story()

    saved.write(tmp_path / "out" / "a")

    folder = tmp_path / "out" / "a"
    assert {path.name for path in folder.iterdir()} == NAMES | {"latents.npy"}
    for i, frame in enumerate(saved.images):
        with Image.open(folder / f"frame_{i}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), frame)
            assert image.text == {"seed": "7", "sentence": SENTENCES[i]}
    with Image.open(folder / "grid.png") as grid:
        assert grid.width == 5 * 32 * 6 + 4 * GRID_GAP
        assert grid.text == {"seed": "7", "sentence": "\n".join(SENTENCES)}
        pixels = np.asarray(grid)
    for i, frame in enumerate(saved.images):  # enlarged 32 times, to 256 pixels
        column = pixels[:256, i * (6 * 32 + GRID_GAP) :][:, : 6 * 32]
        np.testing.assert_array_equal(column, frame.repeat(32, 0).repeat(32, 1))
    with Image.open(folder / "story.gif") as animation:
        assert animation.n_frames == 5
        assert animation.size == (6 * 32, grid.height)


@pytest.mark.parametrize("latents", [True, False])
def test_a_story_comes_back(tmp_path, latents):
    first = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    saved = dataclasses.replace(saved_story(), seeds=(7, None, 5, 7, 7))
    saved = dataclasses.replace(saved, latents=saved.latents if latents else None)
    saved.write(tmp_path / "a")
    assert_equal(SavedStory.read(tmp_path / "a"), saved)

    saved = dataclasses.replace(saved, story=saved.story._replace(first_frame=first))
    saved.write(tmp_path / "b")

    found = SavedStory.read(tmp_path / "b")
    np.testing.assert_array_equal(found.story.first_frame, first)
    with Image.open(tmp_path / "b" / "frame_1.png") as own:
        assert own.text == {"sentence": SENTENCES[1]}
    with Image.open(tmp_path / "b" / "grid.png") as grid:
        assert grid.text["seed"] == "7, 5"


def test_the_same_story_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        saved_story().write(tmp_path / name, formats=["pdf"])

    files = [path.name for path in (tmp_path / "a").iterdir()]
    assert len(files) == len(NAMES) + 2
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_story_takes_the_place_of_the_first_and_of_nothing_else(tmp_path):
    saved_story(0).write(tmp_path / "a", formats=["pdf"])
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "frame_of_mine.png").write_text("mine")

    saved_story(1, frames=3).write(tmp_path / "a")

    assert_equal(SavedStory.read(tmp_path / "a"), saved_story(1, frames=3))
    left = {path.name for path in (tmp_path / "a").iterdir()}
    gone = {"frame_3.png", "frame_4.png", "story.pdf"}
    assert left == (NAMES | {"latents.npy", "notes.txt", "frame_of_mine.png"}) - gone
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("moved", (0, 4, 8))
def test_a_story_whose_writer_was_killed_is_the_old_or_the_new_one(tmp_path, monkeypatch, moved):
    saved_story(0).write(tmp_path / "a")
    count = 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count > moved:
            raise KeyboardInterrupt
        return rename(path, target)

    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        # Not story.json, which is written before, inside of the folder that is then moved.
        patch.setattr(
            "contextualstory_jax.sampling.saved_story.write_json",
            lambda path, values: path.write_text(json.dumps(values)),
        )
        saved_story(1).write(tmp_path / "a")

    assert (tmp_path / "a" / PENDING).exists()
    assert_equal(SavedStory.read(tmp_path / "a"), saved_story(1))
    assert not (tmp_path / "a" / PENDING).exists()


def test_a_kill_before_all_files_are_there_leaves_the_old_story(tmp_path, monkeypatch):
    saved_story(0).write(tmp_path / "a")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "finish_replacing", interrupt)
        saved_story(1).write(tmp_path / "a")

    assert_equal(SavedStory.read(tmp_path / "a"), saved_story(0))


def test_who_reads_while_stories_are_written_never_sees_two_of_them(tmp_path):
    stories = [saved_story(seed) for seed in range(2)]
    stories[0].write(tmp_path / "a")
    done = threading.Event()

    def write() -> None:
        for i in range(12):
            stories[i % 2].write(tmp_path / "a")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seeds = set()
    while not done.is_set():
        found = SavedStory.read(tmp_path / "a")
        seeds.add(found.seeds[0])
        assert_equal(found, stories[found.seeds[0]])
    writer.join()

    assert seeds == {0, 1}


def test_a_read_only_folder_is_read(tmp_path, monkeypatch):
    saved_story().write(tmp_path / "a")

    def refuse(folder: Path) -> None:
        raise PermissionError

    monkeypatch.setattr("contextualstory_jax.sampling.saved_story.finish_replacing", refuse)

    assert_equal(SavedStory.read(tmp_path / "a"), saved_story())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "is in format 2, and this version reads up to 1; update"),
        ({"format": None}, "describes no story"),
        ({"sentences": "A cat."}, "sentences is 'A cat.', not a list"),
        ({"sentences": [1] * 5}, "a sentence must be a string"),
        ({"sentences": [], "seeds": []}, "has 0 sentences and 0 seeds"),
        ({"seeds": [1]}, "has 5 sentences and 1 seeds"),
        ({"seeds": [1, 2, True, 4, 5]}, "a seed is True, not an integer of 32 bits"),
        ({"seeds": [1, 2, 2**32, 4, 5]}, "a seed is 4294967296, not an integer of 32 bits"),
        ({"id": "../.."}, None),
        ({"id": ".."}, "cannot name a folder"),
        ({"files": {}}, "frame_0.png is not the file that story.json describes"),
        ({"checkpoint": []}, r"checkpoint is \[\], not a dict"),
    ],
)
def test_a_story_json_that_is_wrong_is_named(tmp_path, values, message):
    saved_story().write(tmp_path / "a")
    edit(tmp_path / "a" / "story.json", **values)

    if message is None:
        assert SavedStory.read(tmp_path / "a").story.id == "../.."
        return
    with pytest.raises(UserError, match=message) as caught:
        SavedStory.read(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b"1" * 5000])
def test_a_story_json_that_is_none_is_named(tmp_path, text):
    saved_story().write(tmp_path / "a")
    (tmp_path / "a" / "story.json").write_bytes(text)

    with pytest.raises(UserError, match=r"story\.json (is not JSON|describes no story)"):
        SavedStory.read(tmp_path / "a")


@pytest.mark.parametrize("name", ["frame_3.png", "latents.npy"])
def test_a_damaged_file_is_named(tmp_path, name):
    saved_story().write(tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(UserError, match=f"{name} is not the file that story.json describes"):
        SavedStory.read(tmp_path / "a")


def test_a_missing_file_is_named(tmp_path):
    saved_story().write(tmp_path / "a")
    (tmp_path / "a" / "frame_3.png").unlink()

    with pytest.raises(UserError, match=r"cannot read .*frame_3\.png"):
        SavedStory.read(tmp_path / "a")
    with pytest.raises(UserError, match="name a story folder"):
        SavedStory.read(tmp_path)


def test_latents_may_be_deleted_and_must_be_finite(tmp_path):
    saved = saved_story()
    dataclasses.replace(saved, latents=saved.latents * np.float32("nan")).write(tmp_path / "a")
    with pytest.raises(UserError, match="not finite float32 latents of 5 frames; delete it"):
        SavedStory.read(tmp_path / "a")

    (tmp_path / "a" / "latents.npy").unlink()

    assert SavedStory.read(tmp_path / "a").latents is None


def test_frames_of_several_sizes_are_refused(tmp_path):
    saved_story().write(tmp_path / "a")
    larger = saved_story(frames=3)
    dataclasses.replace(larger, images=larger.images.repeat(2, axis=1)).write(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "frame_1.png", tmp_path / "a" / "frame_1.png")
    one, other = (json.loads((tmp_path / name / "story.json").read_text()) for name in "ab")
    files = one["files"] | {"frame_1.png": other["files"]["frame_1.png"]}
    edit(tmp_path / "a" / "story.json", files=files)

    with pytest.raises(UserError, match="has frames of different sizes, 16 x 6 and 8 x 6; "):
        SavedStory.read(tmp_path / "a")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UserError, match="cannot write .*file"):
        saved_story().write(tmp_path / "file")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
