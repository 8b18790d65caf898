"""Prepared datasets that are damaged: training's reading names what is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data import preparation
from contextualstory_jax.data.loader import open_stories
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.testing.published_folders import write_story_folder
from contextualstory_jax.utils.errors import UserError
from tests.hostile.files import NO_FILES, Write, content, replaced

SIZE = 16
JSONS = [
    f"{folder}/{name}.json"
    for folder in ("stories", "pictures")
    for name in ("dataset_info", "features", "metadata")
]
TEXTS = {
    "empty": "",
    "cut": '{"a": ',
    "a list": "[]",
    "nothing": "null",
    "a number": "7",
    "other keys": '{"a": 1}',
    "no text": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
}


@dataclasses.dataclass(frozen=True)
class ShardCase:
    """A change to a file of a prepared dataset, by its start, and words of the refusal."""

    name: str
    file: str
    write: Write
    says: tuple[str, ...] = ("prepare",)


def every_shard(kind: str) -> str:
    return f"{kind}/*-{'train' if kind == 'stories' else kind}.array_record-*"


def cut(share: float) -> Write:
    """Keeps the beginning of a file."""
    return edited(lambda data: data[: int(share * len(data))])


def edited(change: Callable[[bytes], bytes]) -> Write:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def metadata(**values: Any) -> Write:
    """Other values in `metadata.json`; `...` leaves a key out."""

    def write(path: Path) -> None:
        changed = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))

    return write


def instead(write: Write) -> Write:
    return lambda path: replaced(path, write)


METADATA = "stories/metadata.json"
CASES = [
    *(
        ShardCase(f"{kind} for {file}", file, instead(write))
        for file in (*JSONS, every_shard("stories"), every_shard("pictures"))
        for kind, (write, _) in NO_FILES.items()
        # Without it the folder is one of stories, not prepared.
        if not (file == JSONS[0] and kind in ("missing", "dangling link", "link to itself"))
    ),
    *(
        ShardCase(f"{file}: {kind}", file, content(text))
        for file in JSONS
        for kind, text in TEXTS.items()
        # Training needs nothing of it.
        if file != "pictures/metadata.json"
    ),
    *(
        ShardCase(f"metadata without {key}", METADATA, metadata(**{key: ...}))
        for key in ("name", "split_policy", "captions", "size")
    ),
    *(
        ShardCase(f"metadata with {key} = {value!r}", METADATA, metadata(**{key: value}))
        for key, value in (("size", "16"), ("size", None), ("size", 32), ("name", 7), ("name", []))
    ),
    *(
        ShardCase(f"{share} of {kind}", every_shard(kind), cut(share))
        for kind in ("stories", "pictures")
        for share in (0, 0.1, 0.5, 0.9, 0.999)
    ),
    *(
        ShardCase(f"zeros for {kind}", every_shard(kind), edited(lambda data: bytes(len(data))))
        for kind in ("stories", "pictures")
    ),
    *(
        ShardCase(
            f"zeros in {kind}",
            every_shard(kind),
            edited(lambda data: data[:200] + bytes(len(data) - 400) + data[-200:]),
        )
        for kind in ("stories", "pictures")
    ),
    *(
        ShardCase(f"{kind} twice", every_shard(kind), edited(lambda data: data + data))
        for kind in ("stories", "pictures")
    ),
]


class Stop(Exception):
    pass


def stop(done: int, total: int) -> None:
    """Stop a run when it has written its second shard."""
    if done >= 8:
        raise Stop


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = write_story_folder(tmp_path_factory.mktemp("source"))
    return DataConfig(name="folder", root=str(root))


@pytest.fixture(scope="module")
def prepared(source: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset, to be copied."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert preparation.prepare(source, out, SIZE).complete
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_dataset_is_refused(case, prepared, tmp_path):
    root = shutil.copytree(prepared, tmp_path / "shards")
    path = sorted(root.glob(case.file))[0]
    case.write(path)

    with pytest.raises(UserError) as caught:
        source = open_stories(DataConfig(name="folder", root=str(root)), "train", SIZE)
        for index in range(len(source)):
            source[index]

    message = str(caught.value)
    assert "\n" not in message
    assert str(root) in message
    assert all(word in message for word in case.says)


STOPPED = {
    f"{name}: {kind}": (name, write)
    for name in ("plan.json", "notes/*.json", "dataset/pictures/*-of-*")
    for kind, write in (
        *((kind, content(text)) for kind, text in TEXTS.items()),
        ("missing", lambda path: path.unlink()),
    )
    if kind == "missing" or "pictures" not in name  # a shard that has its note is not read again
}


@pytest.mark.parametrize("case", STOPPED)
def test_a_stopped_run_that_was_damaged_is_begun_again(
    case, source, prepared, tmp_path, monkeypatch
):
    name, write = STOPPED[case]
    monkeypatch.setattr(preparation, "FILES_PER_SHARD", 4)
    with pytest.raises(Stop):
        preparation.prepare(source, tmp_path / "out", SIZE, progress=stop)
    found = list((tmp_path / "out.partial").glob(name))
    assert found
    for path in found:
        write(path)

    assert preparation.prepare(source, tmp_path / "out", SIZE).complete

    ours, theirs = (PreparedSource(root, "train", SIZE) for root in (tmp_path / "out", prepared))
    for index in range(len(theirs)):
        np.testing.assert_array_equal(ours[index].images, theirs[index].images)
