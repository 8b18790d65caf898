"""Shards of an earlier run: what has changed since is written again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data import preparation
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.testing.published_folders import picture, save_png, write_story_folder

SIZE = 16


class Stop(Exception):
    pass


def stop(done: int, total: int) -> None:
    """Stop a run when it has written its second shard."""
    if done >= 8:
        raise Stop


@pytest.fixture
def interrupted(tmp_path, monkeypatch) -> DataConfig:
    """A folder whose preparation, in `tmp_path / "out"`, was stopped."""
    monkeypatch.setattr(preparation, "FILES_PER_SHARD", 4)
    root = write_story_folder(tmp_path / "source")
    config = DataConfig(name="folder", root=str(root))
    with pytest.raises(Stop):
        preparation.prepare(config, tmp_path / "out", SIZE, progress=stop)
    return config


def shards(folder: Path) -> dict[str, int]:
    """When each shard of pictures was written."""
    return {
        path.name: path.stat().st_mtime_ns for path in folder.rglob("*.array_record-*-of-?????")
    }


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_picture_replaced_meanwhile_is_in_its_shard(interrupted, tmp_path, change):
    frame, new = tmp_path / "source/pictures/train-0-1.png", picture("another", SIZE)
    before = frame.stat()
    save_png(frame, new)
    if change == "size":
        frame.write_bytes(frame.read_bytes() + bytes(9))
        os.utime(frame, ns=(before.st_atime_ns, before.st_mtime_ns))
    earlier = shards(tmp_path / "out.partial")

    preparation.prepare(interrupted, tmp_path / "out", SIZE)

    images = PreparedSource(tmp_path / "out", "train", SIZE)[0].images
    np.testing.assert_array_equal(images[1], new)
    later = shards(tmp_path / "out")
    first, second = sorted(earlier)[:2]
    assert later[first] != earlier[first]
    assert later[second] == earlier[second]


def test_a_picture_that_disappears_meanwhile_is_missing(interrupted, tmp_path):
    (tmp_path / "source/pictures/train-0-1.png").unlink()

    report = preparation.prepare(interrupted, tmp_path / "out", SIZE)

    assert [finding.kind for finding in report.findings] == ["missing image"]
    assert not (tmp_path / "out").exists()


def test_a_build_leaves_no_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    root = write_story_folder(tmp_path / "source")
    config = DataConfig(name="folder", root=str(root))

    with pytest.raises(Stop):
        preparation.prepare(config, tmp_path / "out", SIZE, progress=stop)
    preparation.prepare(config, tmp_path / "out", SIZE)

    assert list((tmp_path / "temporary").iterdir()) == []
