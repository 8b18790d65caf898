"""Stories and first frames as users write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.sampling.prompts import (
    Story,
    fit_image,
    folder_name,
    read_jsonl,
    read_txt,
)
from contextualstory_jax.utils.errors import UserError


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def line(**values: object) -> str:
    return json.dumps({"id": "a", "sentences": ["One.", "Two."], **values}) + "\n"


def test_a_text_file_holds_one_sentence_a_line(tmp_path):
    path = write(tmp_path / "story.txt", "\ufeffA café.\r\nTwo.\n\n \n")

    assert read_txt(path) == Story(("A café.", "Two."), "story", None)


def test_a_jsonl_line_holds_a_story(tmp_path):
    text = line(first_frame="first.png") + "\n" + line(id="Pororo_1/2", sentences=["\u2028x"])

    first, second = read_jsonl(write(tmp_path / "stories.jsonl", text))

    assert first == Story(("One.", "Two."), "a", tmp_path / "first.png")
    assert second == Story(("x",), "Pororo_1/2", None)
    assert folder_name(second.id) == "Pororo_1_2"


def test_a_jsonl_sentence_may_be_empty(tmp_path):
    path = write(tmp_path / "stories.jsonl", line(sentences=["", " \t", "Two."]))

    assert read_jsonl(path)[0].sentences == ("", "", "Two.")


def test_an_absolute_first_frame_stays_where_it_is(tmp_path):
    path = write(tmp_path / "stories.jsonl", line(first_frame="/pictures/first.png"))

    assert read_jsonl(path)[0].first_frame == Path("/pictures/first.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_text_file_without_text_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_txt(write(tmp_path / "story.txt", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'id': 1}", ":2 is not JSON"),
        ('{"id": "b", ', ":2 is not JSON"),
        ("[" * 100_000, ":2 is not JSON"),
        ('{"id": ' + "1" * 5000 + "}", ":2 is not JSON"),
        ("[]", ":2 is not a JSON object"),
        ("{}", ":2 needs an id"),
        (line(id=3), ":2 needs an id"),
        (line(id=""), ":2, id: "),
        (line(id=".."), ":2: id '..' cannot name a folder"),
        (line(id="stories.json"), ":2: .* cannot name a folder"),
        (line(id="b" * 300), ":2: .* cannot name a folder"),
        (line(id="a"), r":2: id 'a' would share the folder a with .*:1;"),
        (line(id="b", sentences="One."), ":2 needs sentences"),
        (line(id="b", sentences=[1]), ":2: a sentence must be a string"),
        (line(id="b", sentences=["\ud800"]), ":2: .* is not Unicode text"),
        (line(id="b", first_frame=7), ":2: first_frame must be the path"),
        (line(id="b", firstframe="x.png"), r":2 has an unknown key \['firstframe'\]"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=f"stories.jsonl{message}"):
        read_jsonl(write(tmp_path / "stories.jsonl", line() + text))


def test_ids_that_would_share_a_folder_are_refused(tmp_path):
    path = write(tmp_path / "stories.jsonl", line(id="a/b") + line(id="a b"))

    with pytest.raises(UserError, match="id 'a b' would share the folder a_b"):
        read_jsonl(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.txt"):
        read_txt(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_jsonl(tmp_path)


def test_an_image_of_the_right_size_stays_as_it_is():
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)

    np.testing.assert_array_equal(fit_image(picture, 16, 24), picture)


def test_a_picture_of_another_shape_is_cropped_in_the_middle():
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, 32:64] = 200  # the middle third

    cropped = fit_image(picture, 16, 16)

    # Resizing comes before cropping, so the outermost pixels see a little of what is cut away.
    np.testing.assert_array_equal(cropped[:, 1:-1], 200)
    assert np.all(cropped > 150)
