"""Every image file of the table through every door: a first frame, a folder of stories, shards."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax import generate
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data import images, preparation
from contextualstory_jax.data.folder import FolderSource
from contextualstory_jax.data.images import fit_square, read_image
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.testing.published_folders import write_story_folder
from contextualstory_jax.utils.errors import UserError
from tests.hostile.files import encoded, turned
from tests.hostile.image_cases import BOMBS, CASES, ImageCase

SIZE = 16
SENTENCES = [f"Mia counts to {k}." for k in range(5)]
GOOD = [case for case in CASES if case.pixels is not None]
BAD = [case for case in CASES if case.pixels is None]


def of(cases: list[ImageCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stories, one for each case, all of whose frames are the case's file."""
    root = tmp_path_factory.mktemp("hostile")
    lines = []
    for case in CASES:
        case.write(root / case.file)
        story = {"id": case.name, "sentences": SENTENCES, "frames": [case.file] * 5}
        lines.append(json.dumps(story | {"split": "train"}))
    (root / "stories.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def stories(folder: Path) -> FolderSource:
    return FolderSource(folder, "train", SIZE)


@pytest.fixture(scope="module")
def findings(folder: Path) -> dict[str, str]:
    """By the names of files, what preparing the folder says of them."""
    report = preparation.prepare(
        DataConfig(name="folder", root=str(folder)), folder / "out", SIZE, skip_broken=True
    )
    assert report.complete
    return {CASES[finding.story].file: finding.message for finding in report.findings}


def assert_shows(image: np.ndarray, case: ImageCase) -> None:
    """The pixels of the case, grey or in colour, at the size of the image."""
    assert case.pixels is not None
    height, width, _ = case.pixels.shape
    expected = np.broadcast_to(case.pixels, (height, width, 3)).astype(np.uint8)
    if image.shape != expected.shape:
        expected = fit_square(Image.fromarray(expected), SIZE)
    difference = np.abs(image.astype(int) - expected.astype(int))
    assert difference.max() <= case.within


def assert_refuses(message: str, case: ImageCase) -> None:
    assert "\n" not in message
    assert all(word in message for word in (case.file, *case.refused))


# ------------------------------------------------------------------------------ first frames


@of(GOOD)
def test_a_first_frame_is_read(case, folder, monkeypatch, caplog):
    monkeypatch.setattr(images, "remarks", {})

    image = read_image(folder / case.file)
    read_image(folder / case.file)

    assert_shows(np.asarray(image), case)
    assert len(caplog.messages) == bool(case.remark) + (case.name == "animated and transparent")
    assert case.remark in " ".join(caplog.messages)


@pytest.fixture(scope="module")
def loaded():
    """Loads each model once."""
    return functools.cache(StoryPipeline.load)


@of(BAD)
def test_a_first_frame_is_refused(
    case, folder, tmp_path, monkeypatch, loaded, tiny_continuation_checkpoint
):
    monkeypatch.setattr(StoryPipeline, "load", loaded)
    arguments = ["--checkpoint", str(tiny_continuation_checkpoint), "--sentence", *SENTENCES]
    arguments += ["--out", str(tmp_path / "out")]

    with pytest.raises(UserError) as caught:
        generate.main(
            [*arguments, "--sentence", *SENTENCES, "--first-frame", str(folder / case.file)]
        )

    assert_refuses(str(caught.value), case)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ folders


@of(GOOD)
def test_a_folder_s_image_is_read(case, stories):
    example = stories[CASES.index(case)]

    assert example.images.shape == (5, SIZE, SIZE, 3)
    assert_shows(example.images[0], case)


@of(BAD)
def test_a_folder_s_image_is_refused(case, stories):
    with pytest.raises(UserError) as caught:
        stories[CASES.index(case)]

    assert_refuses(str(caught.value), case)


# ------------------------------------------------------------------------------ shards


@of(GOOD)
def test_a_prepared_image_is_the_folder_s(case, folder, stories, findings):
    assert case.file not in findings
    prepared = PreparedSource(folder / "out", "train", SIZE)
    index = GOOD.index(case)
    assert prepared.story(index).source_id == case.name

    np.testing.assert_array_equal(prepared[index].images, stories[CASES.index(case)].images)


@of(BAD)
def test_preparing_names_a_bad_image(case, findings):
    assert_refuses(findings[case.file], case)


@pytest.mark.slow
def test_several_processes_say_it_once(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(images, "remarks", {})
    monkeypatch.setattr(preparation, "FILES_PER_SHARD", 1)
    root = write_story_folder(tmp_path / "source", counts={"train": 1})
    for path in (root / "pictures").iterdir():
        Image.new("RGBA", (8, 8)).save(path)

    config = DataConfig(name="folder", root=str(root))
    preparation.prepare(config, tmp_path / "out", SIZE, workers=2)

    (message,) = caplog.messages
    assert "transparent pixels" in message
    assert "transparent" not in capfd.readouterr().err


# ------------------------------------------------------------------------------ memory


MOST_BYTES = 10**9
READ = """
import re, sys
from pathlib import Path
from contextualstory_jax.data.images import fit_square, read_image
from contextualstory_jax.utils.errors import UserError
for name in sys.argv[1:]:
    try:
        fit_square(read_image(Path(name)), 256)
    except UserError as error:
        print("refused", error)
    else:
        print("read", name)
# The peak of this process alone: getrusage's begins at the size of the one that started it.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def read_apart(*paths: Path) -> list[str]:
    """What becomes of images in a process of their own, and at last its most bytes."""
    command = [sys.executable, "-c", READ, *map(str, paths)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_bombs_take_little_memory(folder):
    *outcomes, memory = read_apart(*(folder / case.file for case in BOMBS))

    assert len(outcomes) == len(BOMBS)
    assert all(outcome.startswith("refused") for outcome in outcomes)
    assert int(memory) < MOST_BYTES


@pytest.mark.slow
def test_the_largest_image_is_read_within_the_memory(tmp_path):
    image = Image.new("LA", (8192, 8192))  # the kind that takes most
    path = tmp_path / "large.png"
    path.write_bytes(encoded(image, "PNG", compress_level=1, exif=turned(6)))

    read, memory = read_apart(path)

    assert read.startswith("read")
    assert int(memory) < MOST_BYTES
