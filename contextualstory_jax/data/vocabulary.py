"""Words of the stories that a model was trained on, kept beside its weights.

Training writes `vocabulary.json` into its workdir; `generate` warns of words that are not in it.
Converted models have none: it was not recorded.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from contextualstory_jax.data import shapes
from contextualstory_jax.data.shapes_figures import CAST
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.utils.atomic import write_json
from contextualstory_jax.utils.errors import UserError

FILE = "vocabulary.json"
MAX_WARNINGS = 5
MAX_NAMES = 12  # of characters in a warning


class Vocabulary(NamedTuple):
    """Lower-case words of the training stories."""

    dataset: str  # data.name of the config
    names: tuple[str, ...]  # of characters, where the dataset labels them
    words: frozenset[str]


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without numbers and punctuation."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def vocabulary_of(dataset: str, source: StorySource | shapes.ShapesSource) -> Vocabulary:
    """The vocabulary of a training split, read story by story; no image is read."""
    if isinstance(source, shapes.ShapesSource):
        return Vocabulary(
            dataset, tuple(CAST), frozenset(split_words(" ".join(shapes.vocabulary())))
        )
    words: set[str] = set()
    names: set[str] = set()
    for number in range(len(source)):
        record = source.story(number)
        words.update(*map(split_words, record.sentences))
        names.update(*(labels.characters for labels in record.labels or ()))
    return Vocabulary(dataset, tuple(sorted(names)), frozenset(words))


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write `vocabulary.json`. Raises `UserError` where the folder cannot be written."""
    write_json(folder / FILE, {**vocabulary._asdict(), "words": sorted(vocabulary.words)})


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary beside a model's weights, None where there is none.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Vocabulary(values["dataset"], tuple(values["names"]), frozenset(values["words"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it to generate without its warnings") from error


def warnings(sentences: Iterable[str], vocabulary: Vocabulary) -> list[str]:
    """One line for each word that is unknown to a model, with the closest known word if any."""
    unknown = dict.fromkeys(
        word
        for sentence in sentences
        for word in split_words(sentence)
        if word not in vocabulary.words
    )
    names = ", ".join(vocabulary.names[:MAX_NAMES])
    if len(vocabulary.names) > MAX_NAMES:
        names += ", ..."
    lines = []
    for word in list(unknown)[:MAX_WARNINGS]:
        closest = difflib.get_close_matches(word, sorted(vocabulary.words), n=1)
        hints = [f"closest known word: {closest[0]}"] if closest else []
        hints += [f"known names: {names}"] if names and not closest else []
        lines.append("; ".join([f"'{word}' is unknown to this model", *hints]))
    if len(unknown) > MAX_WARNINGS:
        lines.append(f"{len(unknown) - MAX_WARNINGS} more words are unknown to this model")
    return lines
