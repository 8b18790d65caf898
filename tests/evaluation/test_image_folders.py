"""Plain folders of images, and those that `evaluate` wrote; hostile ones are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.data import images
from contextualstory_jax.evaluation.image_folders import Frame, read_folder, read_rgb
from contextualstory_jax.utils.errors import UserError
from tests.helpers.results_folder import write_results
from tests.helpers.tiny_inception import write_images


@pytest.fixture(autouse=True)
def no_remarks(monkeypatch):
    monkeypatch.setattr(images, "remarks", {})


def test_the_images_of_a_plain_folder_in_order_of_names(tmp_path):
    write_images(tmp_path / "a", 3, 0)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "Z.JPEG").write_bytes((tmp_path / "a" / "000.png").read_bytes())

    folder = read_folder(tmp_path / "a", "generated")

    assert [frame.path.name for frame in folder.frames] == [
        "000.png",
        "001.png",
        "002.png",
        "Z.JPEG",
    ]
    assert [len(story) for story in folder.stories()] == [1, 1, 1, 1]
    assert folder.settings == {}


def test_the_frames_of_a_folder_that_evaluate_wrote(tmp_path):
    write_results(tmp_path, stories=2)

    generated, originals = (read_folder(tmp_path, role) for role in ("generated", "original"))

    assert generated.frames[6] == Frame(
        tmp_path / "stories" / "00001-s1" / "frame_1.png",
        "00001-s1",
        1,
        "Sentence 1 of s1.",
        frozenset({"mia", "otto"}),
    )
    assert originals.frames[6].path.name == "original_1.png"
    assert [len(story) for story in generated.stories()] == [5, 5]
    assert generated.settings["data"]["name"] == "folder"


def test_frames_that_were_given_are_left_out(tmp_path):
    write_results(tmp_path, stories=2, given=1)

    for role in ("generated", "original"):
        frames = read_folder(tmp_path, role).frames
        assert [frame.position for frame in frames] == [1, 2, 3, 4] * 2


def test_an_image_is_read_in_rgb(tmp_path, caplog):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")

    for _ in range(2):
        image = read_rgb(tmp_path / "grey.png")

    assert image.mode == "RGB" and image.getpixel((0, 0)) == (7, 7, 7)
    (record,) = caplog.records
    assert "is greyscale" in record.getMessage()


def test_one_image_of_a_column_or_an_array(tmp_path):
    column = np.repeat(np.arange(3, dtype=np.uint8), 4)[:, None, None] * np.ones((4, 3), np.uint8)
    Image.fromarray(column).save(tmp_path / "column.png")
    np.save(tmp_path / "array.npy", column.reshape(3, 4, 4, 3))

    for path in (tmp_path / "column.png", tmp_path / "array.npy"):
        assert read_rgb((path, 5)).size == (4, 4)
        assert read_rgb((path, 5)).getpixel((0, 0)) == (2, 2, 2)


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "settings.json").write_text("{}")
    (tmp_path / "lists" / "frames.jsonl").write_text("")

    for name, reason in (
        ("empty", "holds no images"),
        ("file", "is not a folder of images"),
        ("absent", "is not a folder of images"),
        ("lists", "lists no frames"),
    ):
        with pytest.raises(UserError, match=reason):
            read_folder(tmp_path / name, "generated")


def test_a_record_without_its_keys_is_refused(tmp_path):
    write_results(tmp_path, stories=1)
    (tmp_path / "frames.jsonl").write_text(json.dumps({"id": "a", "generated": "a.png"}) + "\n")

    with pytest.raises(UserError, match="frames.jsonl:1 is no record of a frame"):
        read_folder(tmp_path, "generated")


def test_broken_settings_are_refused(tmp_path):
    write_results(tmp_path, stories=1)
    (tmp_path / "settings.json").write_text("{")

    with pytest.raises(UserError, match="settings.json cannot be read"):
        read_folder(tmp_path, "generated")


def test_a_damaged_image_is_named(tmp_path):
    write_images(tmp_path / "a", 1, 0, side=64)
    path = tmp_path / "a" / "000.png"
    path.write_bytes(path.read_bytes()[:60])

    with pytest.raises(UserError, match="000.png .*; replace it"):
        read_rgb(path)
