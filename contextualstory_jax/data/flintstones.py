"""FlintstonesSV as it is published: clips of a few frames, annotations and splits.

- `train-val-test_split.json`: the clips of each split, by id (`s_01_e_02_shot_003784_003858`);
- `flintstones_annotations_v1-0.json`: what a clip shows, its setting and its characters;
- `video_frames_sampled/ID.npy`: its frames, uint8 (n, 128, 128, 3), of which one is sampled;
- `following_cache4.pkl`: the next four clips of each; where it is missing, the next four in the
  order of ids over all splits, if they are of the same season and episode;
- `labels.pkl`: whether each of seven characters is in a clip; where it is missing, the annotations
  say so.

A clip begins a story in its own split. Published, the other four may be of other splits; strict,
all five are of one. (In the published split no episode is divided, so the two are the same.)

Source: reference `flintstones_data.py` FlintstonesDataset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contextualstory_jax.data.example import FRAMES, FrameLabels
from contextualstory_jax.data.images import read_from_array
from contextualstory_jax.data.safe_pickle import load_pickle
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
from contextualstory_jax.utils.files import check_file, has_file

CHARACTERS = ("Wilma", "Fred", "Betty", "Barney", "Dino", "Pebbles", "Mr Slate")  # as in labels.pkl
CLIPS, ANNOTATIONS = "train-val-test_split.json", "flintstones_annotations_v1-0.json"
PICTURES, NEXT, LABELS = "video_frames_sampled", "following_cache4.pkl", "labels.pkl"


class FlintstonesSource(WindowSource):
    """One split of FlintstonesSV.

    Sentences are the descriptions, in lower case; a clip's scene is its setting. Raises `UserError`
    for a folder that is not FlintstonesSV's, and for files in it that are broken or contradict one
    another.
    """

    def __init__(
        self, root: Path, split: str, size: int, *, policy: Policy = "published", seed: int = 0
    ):
        require_files(root, "FlintstonesSV", [CLIPS, ANNOTATIONS, PICTURES])
        clips = _clips(root / CLIPS)
        windows = _windows(root, clips)
        if policy == "strict":
            windows = strict_windows(windows, clips)
        super().__init__(windows, split, size, seed)
        self.pictures = root / PICTURES
        shown = set(chain.from_iterable(self.windows))
        self._frames = _annotated(root / ANNOTATIONS, shown)
        if has_file(root / LABELS):
            _check_labels(root / LABELS, self._frames)

    def frame(self, frame_id: str) -> tuple[str, FrameLabels | None, Path]:
        return *self._frames[frame_id], self.pictures / f"{frame_id}.npy"

    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        return read_from_array(path, choice)


def _clips(path: Path) -> dict[str, list[str]]:
    """The ids of each split's clips, in the order of the file."""
    splits = _json(path)
    seen: dict[str, str] = {}
    for split in SPLITS:
        if not isinstance(splits, dict) or split not in splits:
            raise UserError(f"{path} has no list of clips named {split!r}; fetch it again")
        for clip in _ids(splits[split], path):
            if clip in seen:
                raise UserError(f"{path} has the clip {clip} in {seen[clip]} and in {split}")
            seen[clip] = split
    return {split: splits[split] for split in SPLITS}


def _windows(root: Path, clips: Mapping[str, list[str]]) -> dict[str, list[Window]]:
    """The windows that begin with a clip of each split, in the order of its clips."""
    if has_file(root / NEXT):
        following = load_pickle(root / NEXT)
        if not isinstance(following, dict):
            raise UserError(f"{root / NEXT} is no dictionary of clips; delete it or fetch it again")
    else:
        following = _following(sorted(chain.from_iterable(clips.values())), root / CLIPS)
    return {
        split: [
            (clip, *after)
            for clip in of_split
            # Parity: the original's list may hold clips with fewer than four after them.
            if clip in following and len(after := _ids(following[clip], root / NEXT)) == FRAMES - 1
        ]
        for split, of_split in clips.items()
    }


def _ids(clips: Any, where: Path) -> list[str]:
    if not isinstance(clips, list | tuple) or not all(isinstance(clip, str) for clip in clips):
        raise UserError(f"{where} has {brief(clips)} where a list of clips belongs")
    return [check_inside(clip, where) for clip in clips]


def _following(clips: list[str], where: Path) -> dict[str, list[str]]:
    """The next four of each clip whose next four are of its episode; `clips` are sorted."""
    episodes = []
    for clip in clips:
        found = re.match(r"s_(\d+)_e_(\d+)_", clip)
        if found is None:
            raise UserError(f"{where} has the clip {clip!r:.80}; an id begins as s_01_e_02_ does")
        episodes.append(tuple(map(int, found.groups())))
    windows = len(clips) - FRAMES + 1
    return {
        clips[i]: clips[i + 1 : i + FRAMES]
        for i in range(windows)
        if set(episodes[i : i + FRAMES]) == {episodes[i]}
    }


def _annotated(path: Path, shown: set[str]) -> dict[str, tuple[str, FrameLabels]]:
    """Sentence and labels of each clip shown."""
    found: dict[str, tuple[str, FrameLabels]] = {}
    try:
        for sample in _json(path):
            clip = sample["globalID"]
            if clip in shown:
                setting = sample["setting"]
                require(
                    isinstance(setting, str),
                    f"{path}: the setting of {clip} is {brief(setting)}, not text; fetch it again",
                )
                entities = {c["entityLabel"].strip().lower() for c in sample["characters"]}
                characters = frozenset(c for c in CHARACTERS if c.lower() in entities)
                labels = FrameLabels(characters, scene=setting)
                found[clip] = (sample["description"].lower(), labels)
    except (TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no list of annotated clips ({reason})") from error
    for clip in sorted(shown - found.keys()):
        raise UserError(f"{path} does not annotate the clip {clip}; fetch it again")
    return found


def _check_labels(path: Path, frames: Mapping[str, tuple[str, FrameLabels]]) -> None:
    """Raise `UserError` unless the labels are those of the annotations."""
    labels = load_pickle(path)
    for clip, (_, annotated) in frames.items():
        expected = [int(character in annotated.characters) for character in CHARACTERS]
        label = labels.get(clip) if isinstance(labels, dict) else None
        stated = list(label) if isinstance(label, list | tuple | np.ndarray) else []
        if not all(map(np.isscalar, stated)) or stated != expected:
            raise UserError(
                f"{path} disagrees with {ANNOTATIONS}: {clip} has {brief(label)} and should have "
                f"{expected}; delete it to have labels worked out"
            )


def _json(path: Path) -> Any:
    check_file(path, "fetch it again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON; fetch it again") from error
