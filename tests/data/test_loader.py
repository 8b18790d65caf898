"""Batches: one order for a seed, whatever loads them, from whatever step, on however many hosts."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.example import Example
from contextualstory_jax.data.loader import (
    TokenizedStories,
    WaitMeter,
    batches,
    open_stories,
    process_rows,
)
from contextualstory_jax.data.loader import test_stories as first_stories
from contextualstory_jax.data.preparation import prepare
from contextualstory_jax.data.shapes import ShapesSource
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.testing.published_folders import (
    write_flintstones,
    write_story_folder,
)
from contextualstory_jax.utils.errors import UserError

SIZE = 16
ROOT = Path(__file__).parents[2]


def tokenize(sentences: Sequence[str]) -> np.ndarray:
    """Letters for tokens, four of each sentence: the last ones, which tell frames apart."""
    return np.array([[ord(letter) for letter in s.rjust(4)[-4:]] for s in sentences], np.int32)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """Three training stories, whose frames have two to four pictures."""
    root = write_flintstones(tmp_path_factory.mktemp("flintstones"))
    return DataConfig(name="flintstones", root=str(root), seed=3)


@pytest.fixture(scope="module")
def source(config) -> StorySource:
    opened = open_stories(config, "train", SIZE)
    assert isinstance(opened, StorySource)
    return opened


def take(count: int, source, tokenize, *order, **options) -> list[dict[str, np.ndarray]]:
    stories = TokenizedStories(source, tokenize)
    return list(itertools.islice(batches(stories, *order, **options), count))


def assert_same(some: list[dict[str, np.ndarray]], others: list[dict[str, np.ndarray]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


# ------------------------------------------------------------------------------ training


def test_a_batch_is_pictures_and_tokens(source):
    (batch,) = take(1, source, tokenize, 2, 0)

    assert batch["images"].shape == (2, 5, SIZE, SIZE, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["ids"].shape == (2, 5, 4)
    assert batch["ids"].dtype == np.int32


def test_every_story_comes_once_an_epoch_and_in_another_order_with_other_pictures(source):
    examples = {
        epoch: [source.example(i, epoch).images.tobytes() for i in range(len(source))]
        for epoch in range(8)
    }
    batch_size = 2  # which does not divide three stories: epochs meet inside a batch

    rows = [
        b["images"][i].tobytes() for b in take(12, source, tokenize, batch_size, 0) for i in (0, 1)
    ]

    epochs = [rows[i : i + len(source)] for i in range(0, len(rows), len(source))]
    assert [sorted(rows) for rows in epochs] == [sorted(examples[e]) for e in range(8)]
    orders = {tuple(examples[e].index(row) for row in rows) for e, rows in enumerate(epochs)}
    assert len(orders) > 1
    assert len(set(rows)) > 2 * len(source)


def test_a_batch_is_the_same_from_whatever_step_it_is_reached(source):
    whole = take(7, source, tokenize, 2, 0)

    assert_same(take(3, source, tokenize, 2, 0, 4), whole[4:])


def test_another_seed_is_another_order():
    drawn = ShapesSource(0, "train", 8)

    assert not np.array_equal(
        take(1, drawn, tokenize, 4, 0)[0]["images"], take(1, drawn, tokenize, 4, 1)[0]["images"]
    )


def test_hosts_together_read_what_one_reads_alone(source):
    alone = take(5, source, tokenize, 4, 0)
    hosts = [take(5, source, tokenize, 4, 0, rows=rows) for rows in ([0, 1], [2, 3])]

    together = [
        {name: np.concatenate([first[name], second[name]]) for name in first}
        for first, second in zip(*hosts, strict=True)
    ]

    assert_same(together, alone)


def test_a_process_reads_the_rows_of_its_devices():
    class TwoOfFourDevices:
        def addressable_devices_indices_map(self, shape: tuple[int]) -> dict[str, tuple[slice]]:
            return {"second": (slice(2, 4),), "fourth": (slice(6, None),)}

    assert process_rows(TwoOfFourDevices(), 8) == [2, 3, 6, 7]


def test_a_process_that_has_all_devices_reads_all_rows():
    import jax

    from contextualstory_jax.config.mesh_config import MeshConfig
    from contextualstory_jax.distributed.sharding import BATCH, make_mesh

    sharding = jax.sharding.NamedSharding(make_mesh(MeshConfig()), BATCH)

    assert process_rows(sharding, 8) == list(range(8))


WORKERS = """
import itertools, sys
import numpy as np
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.loader import TokenizedStories, batches, open_stories
from tests.data.test_loader import tokenize

if __name__ == "__main__":
    root, out, workers = sys.argv[1:]
    config = DataConfig(name="flintstones", root=root, seed=3, workers=int(workers))
    source = open_stories(config, "train", 16)
    order = batches(TokenizedStories(source, tokenize), 2, 0, 1, workers=config.workers)
    taken = list(itertools.islice(order, 9))
    np.savez(out, **{f"{k}{i}": a for i, batch in enumerate(taken) for k, a in batch.items()})
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_worker_processes_keep_the_order(config, source, tmp_path, workers):
    # In a process of its own, because workers are started by importing the main module again.
    (tmp_path / "main.py").write_text(WORKERS)
    command = [sys.executable, str(tmp_path / "main.py"), str(config.root)]
    subprocess.run(
        [*command, str(tmp_path / "taken.npz"), str(workers)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
        timeout=300,
    )

    taken = np.load(tmp_path / "taken.npz")

    expected = take(9, source, tokenize, 2, 0, 1)
    for number, batch in enumerate(expected):
        for name in batch:
            np.testing.assert_array_equal(taken[f"{name}{number}"], batch[name])


@pytest.mark.parametrize("prepared", [False, True], ids=["published", "prepared"])
def test_memory_stays_flat_over_many_epochs(config, tmp_path, prepared):
    size, epochs = 128, 24
    if prepared:
        prepare(config, tmp_path / "out", size)
        config = dataclasses.replace(config, root=str(tmp_path / "out"))
    source = open_stories(config, "train", size)
    an_epoch_each = batches(TokenizedStories(source, tokenize), len(source), 0)
    for _ in range(8):  # what is made once is made
        next(an_epoch_each)
    before = psutil.Process().memory_info().rss

    read = sum(next(an_epoch_each)["images"].nbytes for _ in range(epochs))

    assert read == epochs * len(source) * source[0].images.nbytes
    assert psutil.Process().memory_info().rss - before < read / 4


# ------------------------------------------------------------------------------ sources


def test_as_many_test_stories_as_there_are_or_are_asked_for(tmp_path):
    root = write_story_folder(tmp_path, counts={"train": 1, "test": 2})
    config = DataConfig(name="folder", root=str(root))

    stories = first_stories(config, SIZE, 5)

    assert [story.story_id for story in stories] == ["test-0", "test-1"]
    assert len(first_stories(config, SIZE, 1)) == 1
    assert all(isinstance(story, Example) for story in first_stories(DataConfig(), SIZE, 2))


def test_a_dataset_on_disk_needs_its_folder():
    with pytest.raises(UserError, match="^data.name = 'pororo' needs data.root, the folder"):
        open_stories(DataConfig(name="pororo"), "train", SIZE)


def test_drawn_stories_have_no_folder(tmp_path):
    with pytest.raises(UserError, match="^data.root = .* is for stories on disk"):
        DataConfig(root=str(tmp_path))


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a FlintstonesSV folder: looked for"):
        open_stories(DataConfig(name="flintstones", root=str(tmp_path)), "train", SIZE)


def test_a_missing_tensorflow_datasets_is_named(config, tmp_path, monkeypatch):
    prepare(config, tmp_path / "out", SIZE)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)

    with pytest.raises(UserError, match=r"tensorflow-datasets .*: pip install .*\[data\]"):
        open_stories(dataclasses.replace(config, root=str(tmp_path / "out")), "train", SIZE)
    with pytest.raises(UserError, match=r"tensorflow-datasets .*: pip install .*\[data\]"):
        prepare(config, tmp_path / "again", SIZE)


def test_waiting_is_measured():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    meter = WaitMeter(slow())

    assert [next(meter), next(meter)] == [0, 1]
    assert 0.04 <= meter.take() < 1
    time.sleep(0.05)
    assert meter.take() == 0
    assert list(meter) == [2]
    assert 0.02 <= meter.take() < 1
