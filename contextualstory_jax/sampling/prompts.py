"""Stories and first frames as users write them; what is wrong is named by file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import read_lines


class StoryText(NamedTuple):
    """One story as it was written down."""

    sentences: tuple[str, ...]
    id: str = "story"
    first_frame: Path | None = None


def folder_name(story_id: str) -> str:
    """The folder of a story's images: its id with `_` for all but letters, digits, `.`, `_`, `-`.

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


def read_txt(path: Path) -> StoryText:
    """One story, a sentence a line; blank lines are skipped.

    Raises `UserError` where the file cannot be read or is empty.
    """
    return StoryText(tuple(check_sentence(line, where) for where, line in _lines(path)))


def read_jsonl(path: Path) -> list[StoryText]:
    """Stories, one a line: `{"id": ..., "sentences": [...], "first_frame": "path" (optional)}`.

    A first frame's path is taken from the file's folder; blank lines are skipped. A sentence may be
    empty: models know the empty one from guidance. Raises `UserError` where the file cannot be
    read or is empty, and for a broken line or an id whose folder is another story's.
    """
    stories: list[StoryText] = []
    places: dict[str, str] = {}
    for where, line in _lines(path):
        story = _parse(line, where, path.parent)
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
    return stories


def _parse(line: str, where: str, folder: Path) -> StoryText:
    form = 'write {"id": "...", "sentences": ["...", ...]}, with "first_frame": "path" if need be'
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); {form}"
        ) from error
    require(isinstance(values, dict), f"{where} is not a JSON object; {form}")
    unknown = sorted(values.keys() - {"id", "sentences", "first_frame"})
    require(not unknown, f"{where} has an unknown key {unknown[:1]}; {form}")
    require(isinstance(values.get("id"), str), f"{where} needs an id, a string; {form}")
    check_sentence(values["id"], f"{where}, id")
    sentences = values.get("sentences")
    require(isinstance(sentences, list), f"{where} needs sentences, a list; {form}")
    first_frame = values.get("first_frame")
    require(
        first_frame is None or isinstance(first_frame, str),
        f"{where}: first_frame must be the path of an image; got {first_frame!r}",
    )
    return StoryText(
        tuple(check_text(sentence, where) for sentence in sentences),
        values["id"],
        None if first_frame is None else folder / first_frame,
    )


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines that are not blank, each with its place; at least one."""
    lines = read_lines(path)
    require(len(lines) > 0, f"{path} is empty; write a story into it")
    return lines


def fit_image(
    image: UInt8[np.ndarray, "r s 3"], height: int, width: int
) -> UInt8[np.ndarray, "h w 3"]:
    """An image cropped in the middle to the shape asked for and resized."""
    size = (width, height)
    return np.asarray(ImageOps.fit(Image.fromarray(image), size, Image.Resampling.BILINEAR))
