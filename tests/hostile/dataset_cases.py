"""Published folders with something wrong in them, and what preparing them says."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contextualstory_jax.testing.published_folders import FLINTSTONES_CLIPS, save_json, save_object
from tests.hostile.files import NO_FILES, content, npy_header, replaced, saved, turned

Change = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class DatasetCase:
    """A change to a dataset's folder, and words of what is then said; none where it is ready."""

    name: str
    change: Change
    says: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


def case(name: str, change: Change, *says: str, arguments: Sequence[str] = ()) -> DatasetCase:
    return DatasetCase(name, change, says, tuple(arguments))


def file(name: str, write: Callable[[Path], object]) -> Change:
    """The change that replaces a file, or the first that a pattern names."""

    def change(root: Path) -> None:
        found = sorted(root.glob(name))
        replaced(found[0] if found else root / name, write)

    return change


def no_files(name: str, *left_out: str) -> list[DatasetCase]:
    """Everything that is no file in place of one."""
    last = name.rpartition("/")[2]
    said = last if "*" not in last else "." + last.rpartition(".")[2]
    return [
        case(f"{kind} for {last}", file(name, write), said, word)
        for kind, (write, word) in NO_FILES.items()
        if kind not in left_out
    ]


def nothing(path: Path) -> None:
    """Writes no file."""


def array(value: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path, value)


def objects(*values: Any) -> np.ndarray:
    """A list of anything, as an array of objects."""
    made = np.empty(len(values), object)
    made[:] = values
    return made


# A list in a list, and so on, that Python's own functions take for endless.
DEEP = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
ABSURD = [(-1,), (2**62,), (2**40, 2**40), (-3, -4), (10**15,), (2**63,), (10**400,)]
HEADERS = {
    "empty": b"",
    "text": b"no array",
    "version 9": b"\x93NUMPY\x09\x00" + npy_header((4,))[8:],
    "a call for a shape": npy_header(0).replace(b"'shape': 0", b"'shape': f()"),
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "an unknown type": npy_header((4,), "|z9"),
    "a structure": npy_header((1,), "|V16"),
}

# ------------------------------------------------------------------------------ PororoSV

IDS, LABELS, CAPTIONS = "train_seen_unseen_ids.npy", "labels.npy", "descriptions_blip2.npy"
FIRST, NEXT = "img_cache4.npy", "following_cache4.npy"
IMAGE = "pororo_png_filtered_blip2/*/*/1.png"
COLUMN = "Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep1/1.png"
ORIGINAL = ("--captions", "original")


def of_frames(name: str, value: Any) -> Change:
    """The change by which a file says the same of every frame."""

    def change(root: Path) -> None:
        frames = np.load(root / name, allow_pickle=True).item()
        save_object(root / name, dict.fromkeys(frames, value))

    return change


NESTED = {
    "a list in a list": [[0] * 9],
    "nine lists": [[0]] * 9,
    "one list among numbers": [0] * 8 + [[1]],
    "an array of arrays": np.zeros((9, 9), int),
    "nine arrays": [np.zeros(3)] * 9,
    "one array among numbers": [0] * 8 + [np.ones(2)],
    "text": "100000000",
    "texts": ["0"] * 9,
    "halves": [0.5] * 9,
    "nothing": None,
    "eight": [0] * 8,
    "a dictionary": {"Pororo": 1},
}
PORORO = [
    case("pororo as it is", lambda root: None),
    *no_files(IDS, "missing"),
    *no_files(CAPTIONS, "missing"),
    *(case(f"no {n}", file(n, nothing), "looked for", n) for n in (IDS, CAPTIONS)),
    *no_files(LABELS, "missing"),
    *no_files(FIRST, "missing"),
    *no_files(NEXT, "missing"),
    *no_files(IMAGE),
    case("no labels", lambda root: (root / LABELS).unlink()),
    case("no caches", lambda root: [(root / name).unlink() for name in (FIRST, NEXT)]),
    *(
        case(f"label: {k}", of_frames(LABELS, v), LABELS, "zeros and ones")
        for k, v in NESTED.items()
    ),
    case("labels of floats", of_frames(LABELS, [0.0, 1.0] * 4 + [0.0])),
    case("labels of truths", of_frames(LABELS, np.array([True] * 9))),
    *(
        case(f"caption: {name}", of_frames(CAPTIONS, value), CAPTIONS)
        for name, value in {
            "a number": 7,
            "none": None,
            "text": "text",
            "an empty list": [],
            "numbers": [7],
            "lists": [["A."]],
            "arrays": [np.zeros((3, 1))],
            "a dictionary": {"a": 1},
        }.items()
    ),
    case("captions of bytes", of_frames(CAPTIONS, [b"Pororo naps."])),
    case("captions of numpy", of_frames(CAPTIONS, np.array(["Pororo naps."]))),
    *(
        case(f"{name}: deep lists", file(name, content(npy_header((), "|O")[:-16] + DEEP)), name)
        for name in (IDS, LABELS, CAPTIONS, FIRST)
    ),
    *(
        case(f"ids of shape {str(shape)[:12]}", file(IDS, content(npy_header(shape, "<i8"))), IDS)
        for shape in ABSURD
    ),
    *(case(f"ids: {k}", file(IDS, content(v)), IDS) for k, v in HEADERS.items()),
    *(
        case(f"ids: {name}", file(IDS, array(value)), IDS)
        for name, value in {
            "two": objects(*[np.arange(1)] * 2),
            "lists of lists": objects([[1], [2, 3]], [0], [1]),
            "arrays of arrays": objects(objects(np.zeros(2), np.zeros(3)), [0], [1]),
            "texts": objects(["a"], [0], [1]),
            "floats": objects([0.5], [0], [1]),
            "one that is none": objects(None, [0], [1]),
            "one below 0": objects([-1], [0], [1]),
            "one too large": objects([2**70], [0], [1]),
            "a number": np.array(3),
        }.items()
    ),
    *(
        case(f"first frames: {name}", file(FIRST, array(value)), FIRST)
        for name, value in {
            "out of the folder": np.array([b"../../etc/passwd"] * 17),
            "a zero byte": np.array(["a\0b.png"] * 17),
            "numbers": np.arange(17),
            "arrays": objects(*[np.zeros((3, 1))] * 17),
            "too few": np.array([b"a.png"]),
            "nameless": np.array([b""] * 17),
        }.items()
    ),
    case("a name too long", file(FIRST, array(np.array(["x" * 300] * 17))), "x" * 300),
    case("16-bit image", file(IMAGE, saved(Image.new("I;16", (8, 8), 999)))),
    case("turned image", file(IMAGE, saved(Image.new("RGB", (8, 12)), exif=turned(6)))),
    case("clear image", file(IMAGE, saved(Image.new("RGBA", (8, 8))))),
    case("narrow image", file(IMAGE, saved(Image.new("1", (1, 60000)))), "1:20", "1.png"),
    case("a column", lambda root: None, arguments=ORIGINAL),
    case(
        "narrow column",
        file(COLUMN, saved(Image.new("1", (1, 60000)))),
        "over 500",
        arguments=ORIGINAL,
    ),
    case("long column", file(COLUMN, saved(Image.new("RGBA", (4, 400)))), arguments=ORIGINAL),
    case("16-bit column", file(COLUMN, saved(Image.new("I;16", (4, 40)))), arguments=ORIGINAL),
    *(
        case(f"{kind} for a column", file(COLUMN, write), "1.png", word, arguments=ORIGINAL)
        for kind, (write, word) in NO_FILES.items()
    ),
]

# ------------------------------------------------------------------------------ FlintstonesSV

SPLITS, ANNOTATIONS = "train-val-test_split.json", "flintstones_annotations_v1-0.json"
CLIP = FLINTSTONES_CLIPS["test"][1]
VIDEO = f"video_frames_sampled/{CLIP}.npy"
FOLLOWING, LABELS_PKL = "following_cache4.pkl", "labels.pkl"


def annotated(**values: Any) -> Change:
    """The change of one clip's annotation; a value of `...` leaves the key out."""

    def change(root: Path) -> None:
        samples = json.loads((root / ANNOTATIONS).read_text())
        for sample in samples:
            if sample["globalID"] == CLIP:
                sample |= values
                for key in [key for key, value in values.items() if value is ...]:
                    del sample[key]
        save_json(root / ANNOTATIONS, samples)

    return change


def pickled(name: str, value: Any) -> Change:
    """The change by which a pickle says something else of one clip."""

    def change(root: Path) -> None:
        values = pickle.loads((root / name).read_bytes())
        (root / name).write_bytes(pickle.dumps(values | {CLIP: value}))

    return change


def video(shape: tuple[int, ...], kind: str = "|u1") -> Change:
    """The change by which a clip's array only claims a shape."""
    return file(VIDEO, content(npy_header(shape, kind)))


FLINTSTONES = [
    case("flintstones as it is", lambda root: None),
    *(one for name in (SPLITS, ANNOTATIONS) for one in no_files(name, "missing")),
    *(case(f"no {n}", file(n, nothing), "looked for", n) for n in (SPLITS, ANNOTATIONS)),
    *no_files(VIDEO),
    *no_files(FOLLOWING, "missing"),
    *no_files(LABELS_PKL, "missing"),
    *(
        case(f"setting: {name}", annotated(setting=value), CLIP, "setting")
        for name, value in {
            "a number": 7, "a list": ["quarry"], "none": None, "a dictionary": {}, "true": True,
        }.items()
    ),
    *(
        case(f"annotation {name}", annotated(**values), ANNOTATIONS)
        for name, values in {
            "without setting": {"setting": ...},
            "without description": {"description": ...},
            "described by a number": {"description": 7},
            "described by a list": {"description": ["They talk."]},
            "of no characters": {"characters": None},
            "of numbers": {"characters": [7]},
            "of numbered characters": {"characters": [{"entityLabel": 7}]},
            "of a list": {"globalID": [CLIP]},
            "of no clip": {"globalID": ...},
        }.items()
    ),
    *(
        case(f"{name}: {text[:9]!r}", file(name, content(text)), name)
        for name in (SPLITS, ANNOTATIONS)
        for text in ("", "[", "7", "null", '"text"', "[7]", "{}", "[" * 100_000, b"\xff\xfe", "NaN")
    ),
    *(
        case(f"label: {name}", pickled(LABELS_PKL, value), LABELS_PKL, CLIP)
        for name, value in {
            "none": None, "a number": 3, "a list in a list": [[0] * 7], "arrays": [np.zeros(2)] * 7,
            "an array of arrays": np.zeros((7, 7)), "text": "0000000", "two": [0, 1],
        }.items()
    ),
    *(
        case(f"next clips: {name}", pickled(FOLLOWING, value), FOLLOWING)
        for name, value in {
            "a number": 4, "numbers": [1, 2, 3, 4], "arrays": [np.zeros((3, 1))] * 4, "none": None,
            "out of the folder": ["/etc/passwd"] * 4, "text": "four",
        }.items()
    ),
    *(
        case(f"{name}: {kind}", file(name, content(data)), name)
        for name in (FOLLOWING, LABELS_PKL)
        for kind, data in {"empty": b"", "text": b"text", "deep": DEEP, "list": b"]."}.items()
    ),
    *(
        case(f"video of shape {str(shape)[:20]}", video(shape), f"{CLIP}.npy", "replace")
        for shape in (
            (-1, 16, 16, 3), (2**62, 16, 16, 3), (10**9, 16, 16, 3), (-2, -2, 16, 3), (2, 16, 16),
            (2, 16, 16, 4), (0, 16, 16, 3), (2, 0, 16, 3), (2, 16, 16, 3, 3), (1, 60000, 60000, 3),
            (10**400, 16, 16, 3), (2**63, 1, 1, 3), (1, -1, -16, 3), (3,), (),
        )
    ),
    *(case(f"video: {k}", file(VIDEO, content(v)), f"{CLIP}.npy") for k, v in HEADERS.items()),
    *(
        case(f"video of {kind}", file(VIDEO, array(np.zeros((2, 8, 8, 3), kind))), CLIP)
        for kind in ("float", "int16", "bool", "object")
    ),
    case("video of many", file(VIDEO, array(np.zeros((501, 1, 1, 3), np.uint8))), CLIP, "over 500"),
    case("video of 500", file(VIDEO, array(np.zeros((500, 1, 1, 3), np.uint8)))),
    case("narrow video", file(VIDEO, array(np.zeros((1, 1, 60, 3), np.uint8))), CLIP, "1:20"),
]  # fmt: skip
