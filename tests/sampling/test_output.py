"""Drawn stories on disk: whole or not at all, and the same bytes each time."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.sampling.export_formats import GRID_GAP
from contextualstory_jax.sampling.output import write_latents, write_story
from contextualstory_jax.utils.atomic import atomic_path, check_writable, write_json
from contextualstory_jax.utils.errors import UserError

SENTENCES = ("A cat.", "Ein Bär.", "熊。", "It sits.", "It sleeps.")
NAMES = {*(f"frame_{i}.png" for i in range(5)), "grid.png", "story.gif"}


def pictures(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (5, 8, 6, 3), np.uint8)


def test_a_story_is_frames_a_grid_and_an_animation(tmp_path):
    write_story(tmp_path / "out" / "a", pictures(), SENTENCES, seed=7)

    folder = tmp_path / "out" / "a"
    assert {path.name for path in folder.iterdir()} == NAMES
    for i, picture in enumerate(pictures()):
        with Image.open(folder / f"frame_{i}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), picture)
            assert image.text == {"seed": "7", "sentence": SENTENCES[i]}
    with Image.open(folder / "grid.png") as grid:
        assert grid.width == 5 * 32 * 6 + 4 * GRID_GAP
        assert grid.text["sentence"].split("\n") == list(SENTENCES)
        pixels = np.asarray(grid)
    for i, picture in enumerate(pictures()):  # enlarged 32 times, to 256 pixels
        column = pixels[:256, i * (6 * 32 + GRID_GAP) :][:, : 6 * 32]
        np.testing.assert_array_equal(column, picture.repeat(32, 0).repeat(32, 1))
    with Image.open(folder / "story.gif") as animation:
        assert animation.n_frames == 5
        assert animation.size == (6 * 32, grid.height)


def test_the_same_story_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_story(tmp_path / name, pictures(), SENTENCES, seed=7)

    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_story_drawn_again_takes_the_place_of_the_first_and_of_nothing_else(tmp_path):
    write_story(tmp_path / "a", pictures(0), SENTENCES, seed=0)
    (tmp_path / "a" / "notes.txt").write_text("mine")

    write_story(tmp_path / "a", pictures(1), SENTENCES, seed=1)

    with Image.open(tmp_path / "a" / "frame_3.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pictures(1)[3])
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_fails_on_the_way_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as temporary:
        temporary.mkdir()
        (temporary / "frame_0.png").write_text("half")
        raise ZeroDivisionError

    assert list(tmp_path.iterdir()) == []


def test_json_and_latents_come_back(tmp_path):
    latents = np.ones((1, 5, 2, 2, 3), np.float32)

    write_json(tmp_path / "stories.json", {"sentence": "Ein Bär."})
    write_latents(tmp_path / "latents", latents)

    assert json.loads((tmp_path / "stories.json").read_text("utf-8")) == {"sentence": "Ein Bär."}
    np.testing.assert_array_equal(np.load(tmp_path / "latents"), latents)


def test_files_have_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    write_json(tmp_path / "stories.json", {})

    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}

    assert len(modes) == 1


def test_a_place_that_cannot_be_written_is_named_and_nothing_made(tmp_path):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UserError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot write .*out"):
        write_json(tmp_path / "file" / "out", {})
    with pytest.raises(UserError, match="cannot write .*file"):
        write_story(tmp_path / "file", pictures(), SENTENCES, seed=0)
    check_writable(tmp_path / "not" / "yet")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
