"""Stories of your own: a folder with a `stories.jsonl`, a story a line, and pictures.

    {"id": "picnic", "sentences": ["Mia packs a basket.", ...five], "frames": ["1.png", ...five],
     "characters": [["mia"], ...five], "scene": "meadow", "split": "train"}

The last three may be left out. Paths are taken from the file's folder; `scene` is one for the
story, or a list of five; `split` is train, val or test, and train unless told.
"""

from __future__ import annotations

import json
import types
from collections import Counter
from pathlib import Path
from typing import Any, SupportsIndex

from PIL import Image

from contextualstory_jax.config import require
from contextualstory_jax.data.example import FRAMES, FrameLabels
from contextualstory_jax.data.index import (
    SPLITS,
    StoryRecord,
    StorySource,
    file_name,
    numbered,
    require_files,
    require_stories,
)
from contextualstory_jax.data.pictures import read_image
from contextualstory_jax.errors import UserError
from contextualstory_jax.files import read_lines

STORIES = "stories.jsonl"
FORM = (
    f'write {{"id": "...", "sentences": [{FRAMES}], "frames": [{FRAMES} paths]}}, with '
    f'"characters": [{FRAMES} lists], "scene" and "split" if need be'
)
KEYS = {"id", "sentences", "frames", "characters", "scene", "split"}


class FolderSource(StorySource):
    """One split of a folder of stories.

    Pictures of any shape are cut to squares. Raises `UserError` for a folder without
    `stories.jsonl`, and for a broken line, by its number.
    """

    def __init__(self, root: Path, split: str, size: int):
        super().__init__(split, size, seed=0)
        require_files(root, "story", [STORIES])
        stories = _read(root / STORIES)
        counted = Counter(of_split for of_split, _ in stories)
        self.counts = {name: counted[name] for name in SPLITS}
        self.records = [record for of_split, record in stories if of_split == split]
        require_stories(self)

    def __len__(self) -> int:
        return len(self.records)

    def story(self, index: SupportsIndex) -> StoryRecord:
        return self.records[self._number(index)]

    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        return read_image(path)


def _read(path: Path) -> list[tuple[str, StoryRecord]]:
    """The stories of a file, each with its split."""
    return [_parse(line, where, path.parent) for where, line in read_lines(path)]


def _parse(line: str, where: str, folder: Path) -> tuple[str, StoryRecord]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON; {FORM}") from error
    require(isinstance(values, dict), f"{where} is not a JSON object; {FORM}")
    unknown = sorted(values.keys() - KEYS)
    require(not unknown, f"{where} has an unknown key {unknown[:1]}; {FORM}")

    source_id, split = values.get("id"), values.get("split", "train")
    require(isinstance(source_id, str), f"{where} needs an id, a string; {FORM}")
    require(split in SPLITS, f"{where}: split must be one of {', '.join(SPLITS)}; got {split!r}")
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
    """Whom each frame shows, and where. Without `characters` nothing is known, not: nobody."""
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
    """Whether `values` is a list of `count` things of a kind."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, kind) for value in values)
    )
