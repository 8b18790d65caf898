"""Stories of your own: a folder with a `stories.jsonl`, one story per line, and images.

::

    {"id": "picnic", "sentences": ["Mia packs a basket.", ...five], "frames": ["1.png", ...five],
     "characters": [["mia"], ...five], "scene": "meadow", "split": "train"}

The last three may be left out. Paths are taken from the file's folder; `scene` is one for the
story, or a list of five; `split` is train (the default), val or test. Where no story names a split,
some are held out as the test split.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import types
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, SupportsIndex

from PIL import Image

from contextualstory_jax.data.example import FRAMES, FrameLabels
from contextualstory_jax.data.images import read_image
from contextualstory_jax.data.story_source import (
    SPLITS,
    Policy,
    StoryRecord,
    StorySource,
    file_name,
    held_out,
    held_out_note,
    numbered,
    require_files,
    require_stories,
    strict_windows,
)
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import read_json_lines

STORIES = "stories.jsonl"
FORM = (
    f'write {{"id": "...", "sentences": [{FRAMES}], "frames": [{FRAMES} paths]}}, with '
    f'"characters": [{FRAMES} lists], "scene" and "split" if need be'
)
KEYS = {"id", "sentences", "frames", "characters", "scene", "split"}


class FolderSource(StorySource):
    """One split of a folder of stories.

    Images of any shape are cropped to squares.

    Args:
        test_fraction: Fraction of the stories to hold out as the test split where none names a
            split.

    Raises:
        UserError: The folder has no `stories.jsonl`, or a line is broken; its number is given.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        size: int,
        *,
        policy: Policy = "published",
        test_fraction: float = 0.05,
    ):
        super().__init__(split, size, seed=0)
        require_files(root, "story", [STORIES])
        read = _read(root / STORIES)
        if all(named is None for named, _ in read):
            self.test_fraction = test_fraction
            test = held_out((record.story_id for _, record in read), test_fraction)
            read = [("test" if r.story_id in test else "train", r) for _, r in read]
        stories = [(named or "train", record) for named, record in read]
        if policy == "strict":
            stories = _strict(stories)
        counted = Counter(of_split for of_split, _ in stories)
        self.counts = {name: counted[name] for name in SPLITS}
        if self.test_fraction is not None:
            self.notes += (held_out_note(self.counts, self.test_fraction),)
        if shared := len(read) - len(stories):
            self.notes += (
                f"split_policy = strict: {shared} stories that share a frame with another split "
                "are left out",
            )
        self.records = [record for of_split, record in stories if of_split == split]
        require_stories(self)

    def __len__(self) -> int:
        return len(self.records)

    def story(self, index: SupportsIndex) -> StoryRecord:
        return self.records[self._number(index)]

    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        return read_image(path)


def _strict(stories: list[tuple[str, StoryRecord]]) -> list[tuple[str, StoryRecord]]:
    """The stories that the strict policy leaves; files with the same bytes are one frame."""
    frames = _contents(path for _, record in stories for path in record.paths)

    def window(record: StoryRecord) -> tuple[str, ...]:
        return tuple(frames[path] for path in record.paths)

    windows = {split: [window(r) for named, r in stories if named == split] for split in SPLITS}
    claims = {split: chain.from_iterable(of_split) for split, of_split in windows.items()}
    left = {split: set(of_split) for split, of_split in strict_windows(windows, claims).items()}
    return [(split, record) for split, record in stories if window(record) in left[split]]


def _contents(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for each file; files with the same bytes have the same name.

    Only files of equal size are read; a path that is no readable file keeps its own name.
    """
    sizes = {path: os.path.getsize(path) if os.path.isfile(path) else None for path in set(paths)}
    alike = Counter(sizes.values())
    names = {path: str(path) for path in sizes}
    for path, size in sizes.items():
        if size is not None and alike[size] > 1:
            with contextlib.suppress(OSError), path.open("rb") as file:
                names[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return names


def _read(path: Path) -> list[tuple[str | None, StoryRecord]]:
    """The stories of a file, each with the split that it names."""
    lines = read_json_lines(path, KEYS, FORM)
    return [_parse(values, where, path.parent) for where, values in lines]


def _parse(values: dict[str, Any], where: str, folder: Path) -> tuple[str | None, StoryRecord]:
    source_id, split = values["id"], values.get("split")
    require(
        "split" not in values or split in SPLITS,
        f"{where}: split must be one of {', '.join(SPLITS)}; got {split!r}",
    )
    story_id = file_name(source_id, where)
    frames = _five_texts(values, "frames", where)
    return split, StoryRecord(
        story_id=story_id,
        frame_ids=numbered(story_id),
        source_id=source_id,
        source_frame_ids=frames,
        sentences=_five_texts(values, "sentences", where),
        labels=_labels(values, where),
        paths=tuple(folder / frame for frame in frames),
    )


def _five_texts(values: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    texts = values.get(key)
    if texts is None or not _are(texts, str, FRAMES) or not all(map(str.strip, texts)):
        raise UserError(f"{where} needs {key}, a list of {FRAMES} strings that say something")
    # JSON can spell half characters, which no tokenizer reads.
    if any(text != text.encode(errors="replace").decode() for text in texts):
        raise UserError(f"{where}: {key} are not all Unicode text; write them in UTF-8")
    return tuple(map(str.strip, texts))


def _labels(values: dict[str, Any], where: str) -> tuple[FrameLabels, ...] | None:
    """Characters and scene of each frame. Without `characters` nothing is known, not: nobody."""
    characters, scenes = values.get("characters"), values.get("scene")
    if not isinstance(scenes, list):
        scenes = [scenes] * FRAMES
    if characters is None:
        require(scenes == [None] * FRAMES, f"{where} has a scene without characters; give both")
        return None
    if (
        not _are(characters, list, FRAMES)
        or not _are(scenes, str | None, FRAMES)
        or not all(_are(names, str, len(names)) for names in characters)
    ):
        raise UserError(
            f"{where}: characters must be {FRAMES} lists of names, and scene a name or {FRAMES}"
        )
    return tuple(
        FrameLabels(frozenset(names), scene)
        for names, scene in zip(characters, scenes, strict=True)
    )


def _are(values: Any, kind: type | types.UnionType, count: int) -> bool:
    """Whether `values` is a list of `count` values of type `kind`."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, kind) for value in values)
    )
