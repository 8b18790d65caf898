"""Writes small PororoSV and FlintstonesSV folders in the published layout, and folders of stories.

Contents are made up, the layout is the real one, and the same arguments write the same files. A
test changes afterwards what it needs: every file is small enough to be written again.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# Episodes and their frames. Files of 14 frames are not in the order of their numbers.
PORORO_EPISODES = {
    "Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep1": 6,
    "Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep10": 5,
    "Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep2": 14,
    "Pororo_ENGLISH1_2/Pororo_ENGLISH1_2_ep1": 8,
}
# Stories of each split: numbers in the list of all, unsorted as published. As there, validation
# overlaps with training (0 with 1, and 5 with 3), and here 15 of it with the test split.
PORORO_IDS = {"train": (8, 3, 1, 10), "val": (5, 2, 0, 15), "test": (16, 13, 14)}
PORORO_CHARACTERS = (
    "Pororo",
    "Loopy",
    "Crong",
    "Eddy",
    "Poby",
    "Petty",
    "Tongtong",
    "Rody",
    "Harry",
)
FLINTSTONES_CHARACTERS = ("Wilma", "Fred", "Betty", "Barney", "Dino", "Pebbles", "Mr Slate")
FLINTSTONES_SETTINGS = ("living room", "kitchen", "quarry")


def picture(name: str, size: int) -> np.ndarray:
    """An image, uint8 (size, size, 3), of 4 x 4 flat fields, like no other name's."""
    fields = np.frombuffer(hashlib.sha384(name.encode()).digest(), np.uint8).reshape(4, 4, 3)
    return np.repeat(np.repeat(fields, size // 4, axis=0), size // 4, axis=1)


def bits(name: str, count: int) -> list[int]:
    """Which of `count` characters are in the frame of a name."""
    return [int(byte % 3 == 0) for byte in hashlib.sha256(name.encode()).digest()[:count]]


def write_pororo(
    root: Path,
    *,
    episodes: Mapping[str, int] = PORORO_EPISODES,
    ids: Mapping[str, Sequence[int]] = PORORO_IDS,
    caches: bool = True,
    filtered: bool = True,
    strips: bool = False,
    labels: bool = True,
    missing: Iterable[str] = (),
    size: int = 16,
) -> Path:
    """A PororoSV folder of `size` x `size` images.

    `filtered` writes what BLIP-2 left, `strips` the original columns of two or three images (a
    frame's second has the name `ID/1`). Of frames named in `missing` there are no images.
    """
    root.mkdir(parents=True, exist_ok=True)
    frames = [f"{name}/{n}" for name, count in episodes.items() for n in range(1, count + 1)]
    for frame in set(frames) - set(missing):
        if filtered:
            save_png(root / "pororo_png_filtered_blip2" / f"{frame}.png", picture(frame, size))
        if strips:
            column = [picture(f"{frame}/{k}", size) for k in range(2 + len(frame) % 2)]
            save_png(root / f"{frame}.png", np.concatenate(column))
    parts = np.empty(3, object)
    for place, split in enumerate(("train", "val", "test")):
        parts[place] = np.array(ids[split], np.int64)
    np.save(root / "train_seen_unseen_ids.npy", parts)
    for name, word in {"descriptions": "Long ago", "descriptions_blip2": "Now"}.items():
        captions = {f: [f"{word} Pororo is in {f}.", "Another caption."] for f in frames}
        save_object(root / f"{name}.npy", captions)
    if labels:
        save_object(root / "labels.npy", {frame: np.array(bits(frame, 9)) for frame in frames})
    if caches:
        windows = pororo_windows(episodes)
        np.save(root / "img_cache4.npy", np.array([f"{w[0]}.png".encode() for w in windows]))
        following = [[f"{frame}.png".encode() for frame in w[1:]] for w in windows]
        np.save(root / "following_cache4.npy", np.array(following))
    return root


def pororo_windows(episodes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """All stories in the order of the published list, that of files' names."""
    return [
        tuple(f"{name}/{first + later}" for later in range(5))
        for name, count in sorted(episodes.items())
        for first in sorted(range(1, count + 1), key=str)
        if first + 4 <= count
    ]


# Clips of each split in the order of the file. Season 1 episode 1 crosses from train to val.
FLINTSTONES_CLIPS = {
    "train": [
        "s_01_e_01_shot_000300_000374",
        "s_01_e_01_shot_000100_000174",
        "s_01_e_01_shot_000200_000274",
        "s_01_e_01_shot_000400_000474",
        "s_01_e_01_shot_000500_000574",
        "s_01_e_01_shot_000600_000674",
    ],
    "val": [
        "s_01_e_01_shot_000700_000774",
        "s_01_e_02_shot_000400_000474",
        "s_01_e_02_shot_000100_000174",
        "s_01_e_02_shot_000200_000274",
        "s_01_e_02_shot_000300_000374",
        "s_01_e_02_shot_000500_000574",
    ],
    "test": [
        "s_02_e_01_shot_000200_000274",
        "s_02_e_01_shot_000100_000174",
        "s_02_e_01_shot_000300_000374",
        "s_02_e_01_shot_000400_000474",
        "s_02_e_01_shot_000500_000574",
        "s_02_e_01_shot_000600_000674",
        "s_02_e_02_shot_000100_000174",
    ],
}


def write_flintstones(
    root: Path,
    *,
    clips: Mapping[str, Sequence[str]] = FLINTSTONES_CLIPS,
    caches: bool = True,
    missing: Iterable[str] = (),
    size: int = 16,
) -> Path:
    """A FlintstonesSV folder whose clips have two to four images of `size` x `size`.

    A clip's second image has the name `ID/1`. Of clips named in `missing` there are no images.
    """
    (root / "video_frames_sampled").mkdir(parents=True, exist_ok=True)
    every = sorted(clip for of_split in clips.values() for clip in of_split)
    for clip in set(every) - set(missing):
        count = 2 + bits(clip, 7).count(1) % 3
        pictures = np.stack([picture(f"{clip}/{k}", size) for k in range(count)])
        np.save(root / "video_frames_sampled" / f"{clip}.npy", pictures)
    save_json(root / "train-val-test_split.json", dict(clips))
    annotations = [
        {
            "globalID": clip,
            "description": f"They are in {clip.upper()}.",
            "setting": FLINTSTONES_SETTINGS[sum(clip.encode()) % 3],
            "characters": [{"entityLabel": f"{name} ".lower()} for name in _names(clip)],
            "objects": [],
        }
        for clip in every
    ]
    save_json(root / "flintstones_annotations_v1-0.json", annotations)
    if caches:
        # As the original writes them: lists of fewer than four at the end of all clips.
        following = {
            clip: every[i + 1 : i + 5]
            for i, clip in enumerate(every)
            if all(after[:9] == clip[:9] for after in every[i + 1 : i + 5])
        }
        (root / "following_cache4.pkl").write_bytes(pickle.dumps(following))
        labels = {clip: bits(clip, 7) for clip in every}
        (root / "labels.pkl").write_bytes(pickle.dumps(labels))
    return root


def _names(clip: str) -> list[str]:
    present = zip(FLINTSTONES_CHARACTERS, bits(clip, 7), strict=True)
    return [*(name for name, bit in present if bit), "a Policeman"]


def write_story_folder(
    root: Path,
    *,
    counts: Mapping[str, int] | None = None,
    labels: bool = True,
    splits: bool = True,
    size: int = 16,
) -> Path:
    """A folder with a `stories.jsonl`: `counts` stories of each split, three and one of test.

    Without `splits` no story says which it is of.
    """
    lines = []
    for split, count in (counts or {"train": 3, "test": 1}).items():
        for story in range(count):
            name = f"{split}-{story}"
            frames = [f"pictures/{name}-{k}.png" for k in range(5)]
            for frame in frames:
                save_png(root / frame, picture(frame, size))
            line = {
                "id": name,
                "sentences": [f"In {name} Mia counts to {k}." for k in range(5)],
                "frames": frames,
            }
            if splits:
                line["split"] = split
            if labels:
                line |= {"characters": [["mia"]] * 5, "scene": "meadow"}
            lines.append(json.dumps(line))
    (root / "stories.jsonl").write_text("\n".join(lines) + "\n")
    return root


class Hostile:
    """Pickled, it writes `marker` when a trusting reader opens it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def write_hostile(path: Path, marker: Path) -> Path:
    """A `.npy` or `.pkl` file that runs code when a trusting reader opens it."""
    if path.suffix == ".npy":
        save_object(path, {"frame": Hostile(marker)})
    else:
        path.write_bytes(pickle.dumps({"frame": Hostile(marker)}))
    return path


def save_object(path: Path, value: object) -> None:
    """An object as numpy saves it: in an array of no dimensions."""
    array = np.empty((), object)
    array[()] = value
    np.save(path, array)


def save_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value))


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image, and the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
