"""Splits of folders of stories: held out by ids, strict by the frames' content, or empty."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.folder import FolderSource
from contextualstory_jax.data.loader import (
    TOKENIZER_DIR,
    held_out_source,
    open_stories,
    story_notes,
)
from contextualstory_jax.data.loader import test_stories as first_stories
from contextualstory_jax.data.preparation import Report, prepare
from contextualstory_jax.data.shapes import ShapesSource
from contextualstory_jax.data.story_source import StorySource, held_out
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.testing.published_folders import picture, save_png, write_story_folder
from contextualstory_jax.utils.errors import UserError

SIZE = 16


def without_splits(root: Path, stories: int) -> DataConfig:
    """A folder none of whose stories names a split."""
    root = write_story_folder(root, counts={"train": stories}, splits=False)
    return DataConfig(name="folder", root=str(root))


def stories_of(config: DataConfig, split: str) -> list[str]:
    source = open_stories(config, split, SIZE)
    assert isinstance(source, StorySource)
    return [source.story(number).story_id for number in range(len(source))]


def prepared(config: DataConfig, out: Path, **options) -> tuple[DataConfig, Report]:
    report = prepare(config, out, SIZE, **options)
    return dataclasses.replace(config, root=str(out)), report


def notes_of(config: DataConfig, split: str = "train", length: int = 77) -> list[str]:
    source = open_stories(config, split, SIZE)
    return story_notes(source, Tokenizer(TOKENIZER_DIR, length).truncation_note)


@pytest.mark.parametrize(
    ("stories", "fraction", "count"),
    [(0, 0.05, 0), (1, 0.05, 0), (2, 0.05, 1), (20, 0.05, 1), (100, 0.05, 5), (100, 0.2, 20)]
    + [(3, 1.0, 2), (5, 0.0, 0), (30, 0.001, 1)],
)
def test_a_fraction_is_held_out_but_never_all(stories, fraction, count):
    assert len(held_out(map(str, range(stories)), fraction)) == count


def test_what_is_held_out_follows_from_the_ids_alone():
    ids = [f"story-{number}" for number in range(40)]

    assert held_out(ids, 0.1) == held_out(reversed(ids), 0.1)
    assert held_out(ids, 0.1) <= held_out(ids, 0.2)
    assert held_out(ids, 0.1) == {"story-4", "story-14", "story-19", "story-33"}


def test_a_folder_and_its_shards_hold_out_the_same_stories(tmp_path):
    config = without_splits(tmp_path / "source", 20)

    shards, report = prepared(config, tmp_path / "out")

    test, train = stories_of(config, "test"), stories_of(config, "train")
    assert len(test) == 1 and len(train) == 19 and not set(test) & set(train)
    assert stories_of(shards, "test") == test and stories_of(shards, "train") == train
    note = (
        "the stories name no split: 1 of 20 are held out as the test split "
        "(data.test_fraction = 0.05)"
    )
    assert notes_of(config) == notes_of(shards) == [note]
    assert note in str(report).splitlines()


def test_the_fraction_is_the_user_s_and_shards_keep_theirs(tmp_path):
    config = without_splits(tmp_path / "source", 20)
    half = dataclasses.replace(config, test_fraction=0.5)

    shards, _ = prepared(half, tmp_path / "out")

    assert len(stories_of(half, "test")) == 10
    assert stories_of(shards, "test") == stories_of(half, "test")
    with pytest.raises(UserError, match="prepared with test_fraction = 0.5, and data.test_frac"):
        open_stories(dataclasses.replace(shards, test_fraction=0.05), "train", SIZE)
    with pytest.raises(UserError, match=r"data.test_fraction must be in \[0, 1\]; got 1.5"):
        dataclasses.replace(config, test_fraction=1.5)


def test_a_broken_story_does_not_move_the_others_between_splits(tmp_path):
    config = without_splits(tmp_path / "source", 20)
    broken = stories_of(config, "train")[3]
    Path(config.root or "", f"pictures/{broken}-2.png").unlink()

    shards, _ = prepared(config, tmp_path / "out", skip_broken=True)

    assert stories_of(shards, "test") == stories_of(config, "test")
    assert stories_of(shards, "train") == [s for s in stories_of(config, "train") if s != broken]


def test_where_a_split_is_named_nothing_is_held_out(tmp_path):
    config = without_splits(tmp_path / "source", 20)
    path = Path(config.root or "", "stories.jsonl")
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"split": "val"}), *others]))

    source = FolderSource(path.parent, "train", SIZE)

    assert source.counts == {"train": 19, "val": 1, "test": 0}
    assert source.test_fraction is None and source.notes == ()


@pytest.mark.parametrize("shards", [False, True], ids=["folder", "shards"])
def test_without_a_test_story_training_stories_are_used(tmp_path, shards):
    root = write_story_folder(tmp_path / "source", counts={"train": 3})
    config = DataConfig(name="folder", root=str(root))
    if shards:
        config, _ = prepared(config, tmp_path / "out")

    assert held_out_source(config, SIZE).split == "train"
    assert [story.story_id for story in first_stories(config, SIZE, 2)] == ["train-0", "train-1"]
    assert notes_of(config) == [
        "the test split has no stories: training stories are used in its place"
    ]


def test_embedded_stories_need_no_notes():
    assert story_notes(ShapesSource(0, "train", SIZE), lambda sentences: None) == []


def test_truncated_sentences_of_a_folder_are_named_once(tmp_path):
    config = DataConfig(name="folder", root=str(write_story_folder(tmp_path / "source")))

    (note,) = notes_of(config, length=8)

    assert note.startswith("warning: 15 of 15 sentences have more than 8 tokens and are truncated")


# ------------------------------------------------------------------------------ strict


def sharing(root: Path) -> DataConfig:
    """Three training, one validation and one test story, two frames of them copies.

    train-1 has a copy of the test story's frame, and val-0 one of train-2's.
    """
    write_story_folder(root, counts={"train": 3, "val": 1, "test": 1})
    pictures = root / "pictures"
    shutil.copy(pictures / "test-0-2.png", pictures / "train-1-4.png")
    shutil.copy(pictures / "train-2-0.png", pictures / "val-0-0.png")
    return DataConfig(name="folder", root=str(root), split_policy="strict")


def test_strict_leaves_out_stories_that_share_a_frame_with_another_split(tmp_path):
    config = sharing(tmp_path / "source")

    shards, report = prepared(config, tmp_path / "out")

    for data in (config, shards):
        assert stories_of(data, "train") == ["train-0", "train-2"]
        assert stories_of(data, "test") == ["test-0"]
        with pytest.raises(UserError, match="'val' has no stories"):
            open_stories(data, "val", SIZE)
    note = "split_policy = strict: 2 stories that share a frame with another split are left out"
    assert notes_of(config) == [note] and note in str(report).splitlines()
    published = dataclasses.replace(config, split_policy="published")
    assert stories_of(published, "train") == ["train-0", "train-1", "train-2"]


def test_strict_holds_out_and_then_leaves_out(tmp_path):
    config = without_splits(tmp_path / "source", 20)
    (test,), train = stories_of(config, "test"), stories_of(config, "train")
    pictures = Path(config.root or "", "pictures")
    shutil.copy(pictures / f"{test}-0.png", pictures / f"{train[5]}-3.png")

    strict = dataclasses.replace(config, split_policy="strict")

    assert stories_of(strict, "test") == [test]
    assert stories_of(strict, "train") == [*train[:5], *train[6:]]


def test_strict_reads_past_what_is_no_file(tmp_path):
    config = sharing(tmp_path / "source")
    pictures, path = tmp_path / "source/pictures", tmp_path / "source/stories.jsonl"
    for number in range(3):
        (pictures / f"train-0-{number}.png").unlink()
    os.mkfifo(pictures / "train-0-0.png")
    (pictures / "train-0-1.png").mkdir()
    path.write_text(path.read_text().replace("train-0-3.png", "x" * 5000))

    assert stories_of(config, "train") == ["train-0", "train-2"]


def test_frames_that_only_weigh_the_same_are_not_shared(tmp_path):
    root = write_story_folder(tmp_path / "source")
    for number, path in enumerate(sorted((root / "pictures").iterdir())):
        shades = np.full((SIZE, SIZE, 3), number, np.uint8)
        save_png(path.with_suffix(".bmp"), shades)
        path.with_suffix(".bmp").rename(path)
    assert len({path.stat().st_size for path in (root / "pictures").iterdir()}) == 1

    source = FolderSource(root, "train", SIZE, policy="strict")

    assert source.counts == {"train": 3, "val": 0, "test": 1}
    assert picture("x", SIZE).shape == source[0].images[0].shape
