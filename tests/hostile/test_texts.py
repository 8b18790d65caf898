"""Stories as users write them, and arrays of latents: what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from contextualstory_jax import generate
from contextualstory_jax.commands import prepare
from contextualstory_jax.testing.published_folders import write_hostile, write_story_folder
from contextualstory_jax.utils.errors import UserError
from tests.hostile.dataset_cases import ABSURD, HEADERS
from tests.hostile.files import NO_FILES, Write, content, npy_header

SENTENCES = [f"Mia counts to {k}." for k in range(5)]

TEXTS: dict[str, Write] = {
    **{kind: write for kind, (write, _) in NO_FILES.items()},
    "empty": content(""),
    "blank": content(" \n\t\n\n"),
    "no text": content(b"\xff\xfe\x00"),
    "an image": content(b"\x89PNG\r\n\x1a\n"),
    "utf-16": content("Mia counts.".encode("utf-16")),
    "half a character": content("é".encode()[:1]),
}


def line(**values: Any) -> str:
    """A story of a folder; a value of `...` leaves a key out."""
    story = {"id": "a", "sentences": SENTENCES, "frames": ["pictures/train-0-0.png"] * 5} | values
    return json.dumps({key: value for key, value in story.items() if value is not ...})


def sentences(last: Any) -> list[Any]:
    return [*SENTENCES[:4], last]


LINES = {
    "no json": "Mia counts.",
    "a python dictionary": str({"id": "a"}),
    "cut": line()[:-9],
    "two objects": line() + line(),
    "a number": "7",
    "infinity": "Infinity",
    "nothing": "null",
    "a list": f"[{line()}]",
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "a long number": "9" * 10_000,
    "a comma too many": line()[:-1] + ",}",
    "another key": line(caption="x"),
    "no id": line(id=...),
    "id of a number": line(id=7),
    "id of a list": line(id=["a"]),
    "empty id": line(id=""),
    "long id": line(id="x" * 201),
    "id of dots": line(id=".."),
    "no sentences": line(sentences=...),
    "sentences of text": line(sentences="Mia counts."),
    "four sentences": line(sentences=SENTENCES[:4]),
    "six sentences": line(sentences=[*SENTENCES, "More."]),
    "a blank sentence": line(sentences=sentences(" \t")),
    "a sentence of a number": line(sentences=sentences(7)),
    "a sentence of a list": line(sentences=sentences(["x"])),
    "half a character": line(sentences=sentences("\ud800")),
    "no frames": line(frames=...),
    "four frames": line(frames=["a.png"] * 4),
    "frames of numbers": line(frames=[1, 2, 3, 4, 5]),
    "a blank frame": line(frames=["a.png"] * 4 + [""]),
    "frame of half a character": line(frames=["\udc80.png"] * 5),
    "split of a number": line(split=7),
    "split of a list": line(split=["train"]),
    "another split": line(split="dev"),
    "no split": line(split=None),
    "characters of text": line(characters="mia"),
    "characters of four": line(characters=[["mia"]] * 4),
    "characters of numbers": line(characters=[[1]] * 5),
    "characters of lists": line(characters=[[["mia"]]] * 5),
    "scene of a number": line(characters=[[]] * 5, scene=7),
    "scenes of four": line(characters=[[]] * 5, scene=["x"] * 4),
    "scenes of numbers": line(characters=[[]] * 5, scene=[1] * 5),
    "scene alone": line(scene="meadow"),
}
FRAMES = {
    "not there": "none.png",
    "a zero byte": "a\0b.png",
    "too long": "x" * 300,
    "much too long": "x/" * 3000 + "x",
    "in a file": "stories.jsonl/a.png",
    "the folder": "pictures",
    "the root": "/",
    "a device": "/dev/zero",
    "the file itself": "stories.jsonl",
    "memory": "/proc/self/mem",
}
KEPT = {
    "as it is": line(),
    "marked by windows": "\ufeff" + line(),
    "blank lines": f"\n \r\n{line()}\r\n\n",
    "a separator of lines": line(sentences=sentences("a\u2028b\u0085c")),
    "other scripts": line(id="ピクニック", sentences=sentences("ミアは五まで数える。")),
    "over 77 tokens": line(sentences=sentences("mia " * 100)),
    "a megabyte": line(sentences=sentences("mia " * 250_000)),
    "the other way": line(frames=["./pictures/../pictures/train-0-0.png"] * 5),
}


def prepared(tmp_path: Path, write: Write, *more: str) -> None:
    root = write_story_folder(tmp_path / "source", counts={"train": 1})
    (root / "stories.jsonl").unlink()
    write(root / "stories.jsonl")
    options = ["--source", str(root), "--out", str(tmp_path / "out"), "--size", "16"]
    prepare.main(["folder", *options, "--workers", "1", *more])


def assert_named(caught: pytest.ExceptionInfo[UserError], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("name", TEXTS)
def test_a_folder_s_text_is_refused(name, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, TEXTS[name])

    empty = name in ("empty", "blank")
    assert_named(caught, "has no stories" if empty else "stories.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", LINES)
def test_a_folder_s_line_is_refused(name, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, content(line(id="first") + "\n" + LINES[name]))

    assert_named(caught, "stories.jsonl:2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["published", "strict"])
@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_no_image_is_reported(name, policy, tmp_path, capsys):
    frames = [FRAMES[name], *["pictures/train-0-0.png"] * 4]
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, content(line(frames=frames)), "--split-policy", policy)

    assert_named(caught, "1 problems")
    assert FRAMES[name].split("\0")[0] in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", KEPT)
def test_unusual_text_is_read(name, tmp_path):
    prepared(tmp_path, content(KEPT[name]))

    assert (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("option", ["--story", "--stories"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_to_generate_from_is_refused(name, option, tmp_path):
    path = tmp_path / "stories.txt"
    TEXTS[name](path)

    with pytest.raises(UserError) as caught:
        generate.main([option, str(path), "--out", str(tmp_path / "out")])

    assert_named(caught, str(path))
    assert not (tmp_path / "out").exists()


LATENTS: dict[str, Write] = {
    **{kind: write for kind, (write, _) in NO_FILES.items()},
    **{kind: content(data) for kind, data in HEADERS.items()},
    **{f"shape {str(shape)[:12]}": content(npy_header(shape, "<f4")) for shape in ABSURD},
    "zip": content(b"PK\x03\x04" + bytes(40)),
    "objects": lambda path: write_hostile(path, path.with_name("it ran")),
}


@pytest.mark.parametrize("name", LATENTS)
def test_initial_latents_are_refused(name, tmp_path):
    path = tmp_path / "latents.npy"
    LATENTS[name](path)
    arguments = ["--sentence", *SENTENCES, "--out", str(tmp_path / "out")]

    with pytest.raises(UserError) as caught:
        generate.main([*arguments, "--initial-latents", str(path)])

    assert_named(caught, "latents")
    assert not (tmp_path / "it ran").exists()
    assert not (tmp_path / "out").exists()
