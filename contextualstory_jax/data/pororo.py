"""PororoSV as it is published: a folder of images, and numpy files that say which form a story.

- `train_seen_unseen_ids.npy`: three arrays (training, validation, test) of numbers of stories;
- `img_cache4.npy`, `following_cache4.npy`: each story's first frame, and the next four. Where
  either is missing both are computed from the images, whose numbering must then have no gap:
  the splits count stories in the order of this list;
- `descriptions_blip2.npy` and `pororo_png_filtered_blip2/ID.png`, or `descriptions.npy` and
  `ID.png`: captions, and the one image that BLIP-2 found to fit the caption, or a column of
  images of which one is sampled;
- `labels.npy`: whether each of nine characters is in a frame. Nothing else in the folder
  says so; without the file stories have no labels.

Published, the training split holds the validation split too, some of whose stories overlap with the
test split's; strict, training leaves validation out.

Source: reference `pororo.py` PororoDataset. Where the caches are missing the original stops; their
rule is StoryGAN's, after torchvision's ImageFolder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from contextualstory_jax.data.example import FRAMES, FrameLabels
from contextualstory_jax.data.images import read_column, read_image
from contextualstory_jax.data.safe_pickle import load_npy
from contextualstory_jax.data.story_source import (
    SPLITS,
    Policy,
    Window,
    WindowSource,
    check_inside,
    require_files,
    strict_windows,
)
from contextualstory_jax.utils.errors import UserError, brief, require
from contextualstory_jax.utils.files import has_file

CHARACTERS = (
    "Pororo",
    "Loopy",
    "Crong",
    "Eddy",
    "Poby",
    "Petty",
    "Tongtong",
    "Rody",
    "Harry",
)  # in the order of labels.npy
IDS, FIRST, NEXT = "train_seen_unseen_ids.npy", "img_cache4.npy", "following_cache4.npy"
LABELS = "labels.npy"
FILTERED = "pororo_png_filtered_blip2"
SUFFIX = ".png"

Captions = Literal["blip2", "original"]
DESCRIPTIONS: dict[Captions, str] = {
    "blip2": "descriptions_blip2.npy",
    "original": "descriptions.npy",
}


class PororoSource(WindowSource):
    """One split of PororoSV.

    Sentences are the first captions, in lower case. Raises `UserError` for a folder that is not
    PororoSV's, and for files in it that are broken or contradict one another.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        size: int,
        *,
        policy: Policy = "published",
        captions: Captions = "blip2",
        seed: int = 0,
    ):
        self.pictures = root / FILTERED if captions == "blip2" else root
        needed = [IDS, DESCRIPTIONS[captions], *([FILTERED] if captions == "blip2" else [])]
        require_files(root, "PororoSV", needed)
        self.captions: Captions = captions
        listed = _listed_windows(root, self.pictures)
        super().__init__(_windows(root / IDS, listed, policy), split, size, seed)
        shown = set(chain.from_iterable(self.windows))
        self._sentences = _sentences(root / DESCRIPTIONS[captions], shown)
        self._labels = _labels(root / LABELS, shown) if has_file(root / LABELS) else {}

    def frame(self, frame_id: str) -> tuple[str, FrameLabels | None, Path]:
        path = self.pictures / (frame_id + SUFFIX)
        return self._sentences[frame_id], self._labels.get(frame_id), path

    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        if self.captions == "blip2":
            return read_image(path)
        images = read_column(path)
        return images[choice % len(images)]


def _windows(ids: Path, listed: list[Window], policy: Policy) -> dict[str, list[Window]]:
    """The windows of each split, in the order of the list."""
    parts = load_npy(ids)
    require(
        parts.ndim >= 1 and len(parts) == len(SPLITS),
        f"{ids} must hold three arrays of numbers (train, val, test)",
    )
    numbers: dict[str, np.ndarray] = {}
    for split, part in zip(SPLITS, parts, strict=True):
        chosen = _numbers(part)
        require(
            chosen.ndim == 1 and (chosen.dtype.kind in "iu" or len(chosen) == 0),
            f"{ids}: the {split} part is no list of numbers of stories",
        )
        for outside in chosen[(chosen < 0) | (chosen >= len(listed))]:
            raise UserError(
                f"{ids}: the {split} part has story {outside}, but the stories are 0 to "
                f"{len(listed) - 1}; fetch {FIRST} and {NEXT}, or the images, again"
            )
        numbers[split] = chosen.astype(np.int64)
    if policy == "published":
        numbers["train"] = np.concatenate([numbers["train"], numbers["val"]])
    windows = {split: [listed[n] for n in np.sort(numbers[split])] for split in SPLITS}
    if policy == "published":
        return windows
    claims = {split: chain.from_iterable(windows[split]) for split in SPLITS}
    return strict_windows(windows, claims)


def _numbers(part: Any) -> np.ndarray:
    try:
        return np.asarray(part)
    except ValueError:  # lists of different lengths
        return np.empty((0, 0))


def _listed_windows(root: Path, pictures: Path) -> list[Window]:
    """All windows in the order that the splits count in."""
    if not (has_file(root / FIRST) and has_file(root / NEXT)):
        return list(_computed_windows(root, pictures))
    first, following = load_npy(root / FIRST), load_npy(root / NEXT)
    require(
        first.ndim == 1 and following.shape == (len(first), FRAMES - 1),
        f"{root / FIRST} and {NEXT} must name one and {FRAMES - 1} images per story; they have "
        f"the shapes {first.shape} and {following.shape}",
    )

    def frame_id(name: Any, where: Path) -> str:
        return check_inside(_text(name, where).removesuffix(SUFFIX), where)

    return [
        (frame_id(one, root / FIRST), *(frame_id(name, root / NEXT) for name in four))
        for one, four in zip(first, following, strict=True)
    ]


def _computed_windows(root: Path, pictures: Path) -> Iterator[Window]:
    """A window for each image whose episode has the next four, in ImageFolder's order."""
    for episode, numbers in _episodes(pictures):
        last = max(numbers)
        gaps = set(range(min(numbers), last)).difference(numbers)
        require(
            not gaps,
            f"{root / FIRST} or {NEXT} is missing, and cannot be worked out, because "
            f"{pictures / episode} has no {', '.join(f'{n}{SUFFIX}' for n in sorted(gaps)[:1])}",
        )
        for number in numbers:
            if number + FRAMES - 1 <= last:
                yield tuple(f"{episode}/{number + later}" for later in range(FRAMES))


def _episodes(pictures: Path) -> Iterator[tuple[str, list[int]]]:
    """Each folder that has images, and their numbers, both in the order of their names."""
    for top in sorted(entry.name for entry in os.scandir(pictures) if entry.is_dir()):
        if top == FILTERED:
            continue
        for folder, _, names in sorted(os.walk(pictures / top)):
            numbered = [name for name in sorted(names) if name.endswith(SUFFIX)]
            for name in numbered:
                require(
                    re.fullmatch(r"(0|[1-9]\d{0,8})\.png", name, re.ASCII) is not None,
                    f"{FIRST} or {NEXT} is missing, and cannot be worked out, because "
                    f"{Path(folder, name)} has no number for a name",
                )
            if numbered:
                episode = Path(folder).relative_to(pictures).as_posix()
                yield episode, [int(name.removesuffix(SUFFIX)) for name in numbered]


def _sentences(path: Path, shown: set[str]) -> dict[str, str]:
    def first(captions: Any) -> str:
        if not isinstance(captions, list | tuple | np.ndarray) or len(captions) == 0:
            raise UserError("it has no list of captions")
        return _text(captions[0], path).lower()

    return _of_frames(path, shown, first)


def _labels(path: Path, shown: set[str]) -> dict[str, FrameLabels]:
    def named(label: Any) -> FrameLabels:
        bits = list(label) if isinstance(label, list | tuple | np.ndarray) else []
        require(
            len(bits) == len(CHARACTERS) and all(np.isscalar(b) and b in (0, 1) for b in bits),
            f"its label is not {len(CHARACTERS)} zeros and ones",
        )
        return FrameLabels(frozenset(c for c, bit in zip(CHARACTERS, bits, strict=True) if bit))

    return _of_frames(path, shown, named)


def _of_frames(path: Path, shown: set[str], read: Callable[[Any], Any]) -> dict[str, Any]:
    """Values for the frames shown, from a file with a dictionary in a `.npy` array."""
    content = load_npy(path)
    values = content.item() if content.shape == () else None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no dictionary of frames; fetch it again")
    found = {}
    for frame_id in sorted(shown):
        try:
            require(frame_id in values, "it is not there")
            found[frame_id] = read(values[frame_id])
        except UserError as error:
            raise UserError(f"{path}, frame {frame_id}: {error}") from error
    return found


def _text(value: Any, where: Path) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise UserError(f"{where} has {brief(value)} where text belongs")
    return str(value)  # numpy's strings too
