"""Stories and first frames as users write them; what is wrong is named by file and line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from contextualstory_jax.utils.errors import UserError, brief, require
from contextualstory_jax.utils.files import read_json_lines, read_lines

KEYS = {"id", "sentences", "first_frame", "context"}
FORM = 'write {"id": "...", "sentences": ["...", ...]}, with "first_frame": "path" if need be'
MOST_SENTENCES, MOST_CHARACTERS = 100, 1000  # of a story, of a sentence
OVERLAP = 2  # frames that a window keeps of the one before (`windows.py`)


class Story(NamedTuple):
    """A story to generate; those of a dataset are an `Example` (`data/example.py`)."""

    sentences: Sequence[str]
    id: str = "story"  # with the seed it decides the noise
    # A path until it is read; then of the size to generate, or of any for a camera to move over.
    first_frame: UInt8[np.ndarray, "h w 3"] | Path | None = None
    # By a sentence's number, its words where a window begins with it (`windows.py`).
    context: Mapping[int, str] = MappingProxyType({})


class Kept(NamedTuple):
    """Frames of a story that are not generated; of `images` and `latents` only those are read."""

    images: UInt8[np.ndarray, "f h w 3"]
    latents: Float32[np.ndarray, "f p q c"] | None  # None: the VAE encodes the images
    keep: tuple[bool, ...]  # one for each frame


def folder_name(story_id: str) -> str:
    """The folder of a story's images: its id with `_` for all but letters, digits, `.`, `_`, `-`.

    Unlike `file_name` of `data/story_source.py`, whose names are in datasets prepared before, it
    writes `_` for a slash too, and leaves `stories.json` to the summary.

    Raises `UserError` where that names no folder of its own.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", story_id)
    require(
        name not in ("", ".", "..", "stories.json") and len(name) <= 200,
        f"id {story_id[:40]!r} cannot name a folder; choose another of at most 200 characters",
    )
    return name


def check_sentence(sentence: Any, where: str) -> str:
    """A sentence without the blanks around it. Raises `UserError` for anything else."""
    sentence = check_text(sentence, where)
    require(sentence != "", f"{where}: a sentence is blank; write what its image shows")
    return sentence


def check_text(sentence: Any, where: str) -> str:
    """A sentence that may be empty, as `check_sentence` gives it."""
    require(isinstance(sentence, str), f"{where}: a sentence must be a string; got {sentence!r}")
    # JSON can spell half characters, and a terminal hand over bytes, that are no text.
    require(
        sentence == sentence.encode(errors="replace").decode(),
        f"{where}: {sentence!r} is not Unicode text; write it in UTF-8",
    )
    return sentence.strip()


def check_story(story: Story) -> None:
    """Raise `UserError` for a story with too few, too many or too long sentences."""
    count, name = len(story.sentences), f"story {story.id!r}"
    require(count > 0, f"{name} has no sentences; write at least one")
    require(
        count <= MOST_SENTENCES, f"{name} has {count} sentences; write at most {MOST_SENTENCES}"
    )
    for i, sentence in enumerate(story.sentences):
        require(
            len(sentence) <= MOST_CHARACTERS,
            f"{name}: sentence {i} has {len(sentence)} characters; write at most {MOST_CHARACTERS}",
        )


def read_txt(path: Path) -> Story:
    """One story, a sentence a line; blank lines are skipped.

    Raises `UserError` where the file cannot be read or is empty.
    """
    lines = read_lines(path)
    _require_some(lines, path)
    return Story(tuple(check_sentence(line, where) for where, line in lines))


def read_jsonl(path: Path) -> list[Story]:
    """Stories, one a line: `{"id": ..., "sentences": [...], "first_frame": "path" (optional)}`.

    A first frame's path is taken from the file's folder; blank lines are skipped. A sentence may be
    empty: models know the empty one from guidance. Raises `UserError` where the file cannot be
    read or is empty, and for a broken line or an id whose folder is another story's.
    """
    stories: list[Story] = []
    places: dict[str, str] = {}
    for where, values in read_json_lines(path, KEYS, FORM):
        story = _parse(values, where, path.parent)
        try:
            name = folder_name(story.id)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        require(
            name not in places,
            f"{where}: id {story.id!r} would share the folder {name} with {places.get(name)}; "
            "give each story an id of its own",
        )
        places[name] = where
        stories.append(story)
    _require_some(stories, path)
    return stories


def _parse(values: dict[str, Any], where: str, folder: Path) -> Story:
    check_sentence(values["id"], f"{where}, id")
    sentences = values.get("sentences")
    if not isinstance(sentences, list):
        raise UserError(f"{where} needs sentences, a list; {FORM}")
    first_frame = values.get("first_frame")
    require(
        first_frame is None or isinstance(first_frame, str),
        f"{where}: first_frame must be the path of an image; got {first_frame!r}",
    )
    return Story(
        tuple(check_text(sentence, where) for sentence in sentences),
        values["id"],
        None if first_frame is None else folder / first_frame,
        read_context(values.get("context", {}), len(sentences), where),
    )


def read_context(context: Any, sentences: int, where: str) -> dict[int, str]:
    """A story's context, from JSON. Raises `UserError` for anything else."""
    fix = 'write {"3": "..."}, the words of sentence 3 where a window begins with it'
    require(isinstance(context, dict), f"{where}: context is {brief(context)}; {fix}")
    for number in context:
        require(
            number.isdecimal() and int(number) < sentences,
            f"{where}: context of {brief(number)}, which is no sentence's number; {fix}",
        )
    return {int(number): check_sentence(text, where) for number, text in context.items()}


def _require_some(stories: Sized, path: Path) -> None:
    require(len(stories) > 0, f"{path} is empty; write a story into it")


def fit_image(
    image: UInt8[np.ndarray, "r s 3"], height: int, width: int
) -> UInt8[np.ndarray, "h w 3"]:
    """An image cropped in the middle to the shape asked for and resized."""
    size = (width, height)
    return np.asarray(ImageOps.fit(Image.fromarray(image), size, Image.Resampling.BILINEAR))
