"""Checks of a dataset's stories that find all problems, not only the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.utils.errors import UserError


class Finding(NamedTuple):
    """One problem: its kind, the first story (index in its source) that has it, and a message."""

    kind: Literal["duplicate id", "missing image", "unreadable image", "long caption"]
    story: int
    message: str


def problems(
    source: StorySource, token_count: Callable[[str], int], most: int = 77
) -> Iterator[Finding]:
    """Everything wrong with a source's stories, as it is found; every image is decoded once.

    Args:
        source: Stories to check.
        token_count: Number of tokens of a caption, start and end included.
        most: Number of tokens that the model reads, from the beginning of a caption.
    """
    places: dict[str, int] = {}
    pictures: set[Path] = set()
    captions: set[str] = set()
    for index in range(len(source)):
        record = source.story(index)
        first = places.setdefault(record.story_id, index)
        if first != index:
            yield Finding(
                "duplicate id", index, f"stories {first} and {index} are both {record.source_id!r}"
            )
        for path in record.paths:
            if path not in pictures:
                pictures.add(path)
                yield from _picture_problem(source, path, index)
        for sentence in record.sentences:
            if sentence not in captions:
                captions.add(sentence)
                tokens = token_count(sentence)
                if tokens > most:
                    message = f"{tokens} tokens, of which the model reads {most}: {sentence!r}"
                    yield Finding("long caption", index, message)


def _picture_problem(source: StorySource, path: Path, index: int) -> Iterator[Finding]:
    try:
        source.picture(path)
    except UserError as error:
        kind = "unreadable image" if os.path.exists(path) else "missing image"
        yield Finding(kind, index, str(error))
