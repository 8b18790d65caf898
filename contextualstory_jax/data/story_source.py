"""Stories of a dataset on disk, before an image is read, and the splits they form.

Two policies say which stories a split has:

- `published`: what the original trains and evaluates on, whatever the splits share.
- `strict`: a frame belongs to one split, and a split has the stories all of whose five frames are
  its own. Where several splits claim a frame it is the test split's, else the training split's:
  evaluation keeps all its stories, training gives up what evaluation shows, and validation what
  either of them shows.

Where a dataset names no splits, some stories are held out as the test split (`held_out`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, SupportsIndex

import numpy as np
from PIL import Image

from contextualstory_jax.data.example import FRAMES, Example, FrameLabels
from contextualstory_jax.data.images import fit_square
from contextualstory_jax.utils.errors import UserError, require

Policy = Literal["published", "strict"]
Window = tuple[str, ...]  # the published ids of a story's five frames

SPLITS = ("train", "val", "test")
OWNERS = ("test", "train", "val")  # of a frame, under `strict`: the first that claims it


@dataclasses.dataclass(frozen=True)
class StoryRecord:
    """A dataset's story before its images are read.

    `story_id` and `frame_ids` are those of its `Example`. `source_id` and `source_frame_ids` are
    the dataset's own, and may hold slashes; overlapping stories share frames, and so the latter.
    """

    story_id: str
    frame_ids: tuple[str, ...]
    source_id: str
    source_frame_ids: tuple[str, ...]
    sentences: tuple[str, ...]
    labels: tuple[FrameLabels, ...] | None
    paths: tuple[Path, ...]


class StorySource(ABC):
    """The stories of one split of a dataset on disk, as a random-access source (grain's protocol).

    Where a frame has several images, `source[i]` and `example(i, epoch)` take one of them: in the
    training split by (seed, epoch, story, frame), in the others always the same. Images are
    squares of `size` pixels; pickling a source is cheap, so that workers can have their own.

    `counts` is the number of stories in each split of the dataset; `test_fraction` the fraction of
    them that is held out as the test split, None where the dataset names its splits; `notes` are
    sentences about the splits for the user.
    """

    counts: Mapping[str, int]
    test_fraction: float | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, split: str, size: int, seed: int):
        require(split in SPLITS, f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        require(size >= 1, f"images must be at least 1 pixel wide; got size = {size}")
        self.split, self.size, self.seed = split, size, seed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def story(self, index: SupportsIndex) -> StoryRecord:
        """Story `index` without reading its images. Raises IndexError past the last."""

    @abstractmethod
    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        """The image at `path`, or the one of several that a large number chooses, in RGB.

        Raises `UserError` where it is missing or broken.
        """

    def example(self, index: SupportsIndex, epoch: int = 0) -> Example:
        """Story `index` as training sees it in an epoch.

        Raises IndexError past the last story, `UserError` for an image that cannot be read.
        """
        record = self.story(index)
        choices = self.choices(record.frame_ids, epoch)
        images = [
            fit_square(self.picture(path, choice), self.size)
            for path, choice in zip(record.paths, choices, strict=True)
        ]
        return Example(
            np.stack(images), record.sentences, record.frame_ids, record.story_id, record.labels
        )

    def choices(self, frame_ids: Iterable[str], epoch: int = 0) -> list[int]:
        """The `choice` that `example` passes to `picture` for each frame, below 2**64."""
        draw = f"{self.seed}/{epoch}" if self.split == "train" else "fixed"
        return [_hash(f"{draw}/{frame_id}") for frame_id in frame_ids]

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self.example(index)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} stories of {self.split!r}, size={self.size})"

    def _number(self, index: SupportsIndex) -> int:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"story {number} of {len(self)}")
        return number


class WindowSource(StorySource):
    """A dataset whose stories are windows of five frames, named by the first."""

    def __init__(self, windows: Mapping[str, list[Window]], split: str, size: int, seed: int):
        super().__init__(split, size, seed)
        self.counts = {name: len(of_split) for name, of_split in windows.items()}
        self.windows = windows[split]
        require_stories(self)

    def __len__(self) -> int:
        return len(self.windows)

    @abstractmethod
    def frame(self, frame_id: str) -> tuple[str, FrameLabels | None, Path]:
        """Sentence, labels (of every frame or of none) and image path of a frame."""

    def story(self, index: SupportsIndex) -> StoryRecord:
        window = self.windows[self._number(index)]
        sentences, labels, paths = zip(*map(self.frame, window), strict=True)
        story_id = file_name(window[0], f"the {self.split} split")
        return StoryRecord(
            story_id=story_id,
            frame_ids=numbered(story_id),
            source_id=window[0],
            source_frame_ids=window,
            sentences=sentences,
            labels=None if None in labels else labels,
            paths=paths,
        )


def strict_windows(
    windows: Mapping[str, list[Window]], claims: Mapping[str, Iterable[str]]
) -> dict[str, list[Window]]:
    """The windows of each split that the `strict` policy leaves; `claims` are a split's frames."""
    owner: dict[str, str] = {}
    for split in OWNERS:
        for frame_id in claims[split]:
            owner.setdefault(frame_id, split)
    return {
        split: [window for window in of_split if {owner.get(f) for f in window} == {split}]
        for split, of_split in windows.items()
    }


class EmptySplit(UserError):
    """Error for a split without stories; others may have some."""


def require_stories(source: StorySource) -> None:
    """Raise `EmptySplit` where a split is empty."""
    there = ", ".join(f"{split} {count}" for split, count in source.counts.items())
    if len(source) == 0:
        raise EmptySplit(
            f"the split {source.split!r} has no stories; stories in each split are: {there}"
        )


def held_out(story_ids: Iterable[str], fraction: float) -> set[str]:
    """The stories that form the test split where a dataset names no splits.

    Those whose ids have the least hashes, whatever their order: a fraction of all, but at least
    one, and never all.
    """
    unique = set(story_ids)
    if fraction == 0 or len(unique) < 2:
        return set()
    count = min(max(round(fraction * len(unique)), 1), len(unique) - 1)
    return set(sorted(unique, key=_hash)[:count])


def held_out_note(counts: Mapping[str, int], fraction: float) -> str:
    """A sentence that says how many stories are held out."""
    return (
        f"the stories name no split: {counts.get('test', 0)} of {sum(counts.values())} are held "
        f"out as the test split (data.test_fraction = {fraction:g})"
    )


def require_files(root: Path, dataset: str, names: Sequence[str]) -> None:
    """Raise `UserError` with the names looked for and found unless a folder has all of them."""
    found = [name for name in names if os.path.exists(root / name)]
    require(
        len(found) == len(names),
        f"{root} is not a {dataset} folder: looked for {', '.join(names)}; "
        f"found {', '.join(found) or 'none of them'}",
    )


def file_name(source_id: str, where: str) -> str:
    """An id as the name of a file: `-` for slashes, `_` for all but letters, digits, `.`, `_`, `-`.

    Unlike `folder_name` of `sampling/prompts.py` it keeps the levels of a dataset's ids apart.

    Raises `UserError` where that names no file of its own.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source_id.replace("/", "-"))
    require(
        name not in ("", ".", "..") and len(name) <= 200,
        f"{where}: id {source_id[:40]!r} cannot name a file; choose another, of 200 characters at "
        "most",
    )
    return name


def check_inside(frame_id: str, where: Path | str) -> str:
    """A frame's id. Raises `UserError` where, as a path, it leads out of the dataset's folder."""
    leaves = frame_id.startswith("/") or "\\" in frame_id or ".." in frame_id.split("/")
    require(
        frame_id != "" and "\0" not in frame_id and not leaves,
        f"{where}: the id {frame_id[:80]!r} leads out of the dataset's folder",
    )
    return frame_id


def numbered(story_id: str) -> tuple[str, ...]:
    """Ids for the frames of a story that no other story's frames have."""
    return tuple(f"{story_id}-{position}" for position in range(FRAMES))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
