"""Stories to batches, tokenised and stacked on the host, in an order set by (seed, step)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import Integer

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.example import Example
from contextualstory_jax.data.folder import FolderSource
from contextualstory_jax.data.prepared import PreparedSource, is_prepared, require_settings
from contextualstory_jax.data.remote import local_copy
from contextualstory_jax.data.shapes import TOKENIZER_DIR, ShapesSource
from contextualstory_jax.data.sources import open_source
from contextualstory_jax.data.story_source import EmptySplit, StorySource
from contextualstory_jax.utils.errors import require
from contextualstory_jax.utils.interruption import before_processes

if TYPE_CHECKING:
    from jax.sharding import Sharding

__all__ = [
    "TOKENIZER_DIR",
    "Readable",
    "Splits",
    "TokenizedStories",
    "WaitMeter",
    "batches",
    "first_stories",
    "held_out_source",
    "open_splits",
    "open_stories",
    "process_rows",
    "require_square",
    "story_notes",
    "test_stories",
    "training_source",
]

T = TypeVar("T")
Source = StorySource | ShapesSource | Sequence[Example]
Tokenize = Callable[[Sequence[str]], np.ndarray]


def open_stories(config: DataConfig, split: str, size: int) -> StorySource | ShapesSource:
    """Open one split of the config's stories, with images of `size` x `size`.

    `config.root` may be a folder as published or as prepared, or the URL of one. Raises `UserError`
    where it is neither, cannot be copied, does not have the split, or was prepared with other
    settings.
    """
    if config.name == "shapes":
        return ShapesSource(config.seed, split, size)
    require(
        config.root is not None,
        f"data.name = {config.name!r} needs data.root, the folder that holds the dataset as it "
        "was published or prepared, or its URL: add --config.data.root=DIR",
    )
    root = local_copy(config.root or "")
    if is_prepared(root):
        source = PreparedSource(root, split, size, seed=config.seed)
        require_settings(source, config)
        return source
    return open_source(config, root, split, size)


class Splits(NamedTuple):
    """The stories of a run: those it trains on, and those that it samples and validates on."""

    train: StorySource | ShapesSource
    held_out: StorySource | ShapesSource  # the test split or, where it has no stories, `train`


def open_splits(config: DataConfig, size: int) -> Splits:
    """Open each split once; raises as `open_stories` does."""
    train = training_source(config, size)
    return Splits(train, held_out_source(config, size, train))


def training_source(config: DataConfig, size: int) -> StorySource | ShapesSource:
    """The training split; raises as `open_stories` does."""
    return open_stories(config, "train", size)


def held_out_source(
    config: DataConfig, size: int, train: StorySource | ShapesSource | None = None
) -> StorySource | ShapesSource:
    """The test split or, where it has no stories, the training split, opened if need be.

    Raises as `open_stories` does.
    """
    try:
        return open_stories(config, "test", size)
    except EmptySplit:
        return training_source(config, size) if train is None else train


def require_square(model: ModelConfig) -> None:
    """Raise `UserError` for a model of images that are not square, as those of all datasets are."""
    require(
        model.height == model.width,
        f"model.height = {model.height} and model.width = {model.width} differ, and the images of "
        "a dataset are square; set both to one size",
    )


def first_stories(source: StorySource | ShapesSource, count: int) -> list[Example]:
    """The first stories of a source, `count` where it has as many."""
    return [source[i] for i in range(min(count, len(source)))]


def test_stories(config: DataConfig, size: int, count: int) -> list[Example]:
    """The first stories of `held_out_source`, `count` where it has as many; raises as it does."""
    return first_stories(held_out_source(config, size), count)


def story_notes(
    source: StorySource | ShapesSource, truncation_note: Callable[[Iterable[str]], str | None]
) -> list[str]:
    """Lines for the user on how a dataset is split and which of a folder's sentences are truncated.

    Prepared sentences were checked when they were prepared.

    Args:
        source: Stories to describe.
        truncation_note: The tokenizer's method of that name.
    """
    if isinstance(source, ShapesSource):
        return []
    notes = list(source.notes)
    if source.counts.get("test", 0) == 0:
        notes.append("the test split has no stories: training stories are used in its place")
    if isinstance(source, FolderSource):
        stories = map(source.story, range(len(source)))
        note = truncation_note(sentence for story in stories for sentence in story.sentences)
        notes += [f"warning: {note}"] if note else []
    return notes


@runtime_checkable
class Readable(Protocol):
    """Stories that are read in batches; pickling them is cheap."""

    def __len__(self) -> int: ...

    def read(self, places: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """The arrays of a batch of (index, epoch)."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenizedStories:
    """The stories of a source, as images and token ids."""

    source: Source
    tokenize: Tokenize

    def __len__(self) -> int:
        return len(self.source)

    def read(self, places: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """A batch of (index, epoch): `images`, uint8 (b, 5, h, w, 3), `ids`, int32 (b, 5, l)."""
        examples = [
            self.source.example(index, epoch)
            if isinstance(self.source, StorySource)
            else self.source[index]
            for index, epoch in places
        ]
        return {
            "images": np.stack([example.images for example in examples]),
            "ids": np.stack([self.tokenize(example.sentences) for example in examples]),
        }


def batches(
    stories: Readable,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    *,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of stories in random order, reshuffled each epoch, from `first_step`.

    Batch s is the same whatever step the iterator started at, so that resuming needs no iterator
    state, and whatever the number of processes.

    Args:
        stories: Stories to read, by their `read`.
        batch_size: Stories per batch.
        seed: Seed of the order.
        first_step: Step of the first batch.
        rows: Rows of each batch to read, by default all; those of one host are `process_rows`.
        workers: Processes that read (0: a thread of this one), to which `stories` are pickled.
    """
    of_step = _ReadStep(stories, tuple(range(batch_size) if rows is None else rows))
    order = grain.MapDataset.range(len(stories)).seed(seed).shuffle().repeat(None)
    steps = order.batch(batch_size, drop_remainder=True).map_with_index(of_step)[first_step:]
    # One thread: rendering and tokenising are Python, and the accelerator has the other cores.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else 4)
    dataset = steps.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own flags; commands here define none
        before_processes()
        dataset = dataset.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=2
            )
        )
    return iter(dataset)


@dataclasses.dataclass(frozen=True)
class _ReadStep:
    """Some rows of the batch of a step."""

    stories: Readable
    rows: tuple[int, ...]

    def __call__(self, step: int, numbers: Integer[np.ndarray, "n"]) -> dict[str, np.ndarray]:
        first = step * len(numbers)
        count = len(self.stories)
        return self.stories.read([(int(numbers[row]), (first + row) // count) for row in self.rows])


def process_rows(sharding: Sharding, batch_size: int) -> list[int]:
    """The rows of a batch, sharded along its first axis, that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index for row in range(batch_size)[index[0]]})


class WaitMeter(Generic[T]):
    """An iterator that measures the time spent waiting for it."""

    def __init__(self, iterator: Iterator[T]):
        self._iterator = iterator
        self._seconds = 0.0

    def __iter__(self) -> WaitMeter[T]:
        return self

    def __next__(self) -> T:
        began = time.monotonic()
        try:
            return next(self._iterator)
        finally:
            self._seconds += time.monotonic() - began

    def take(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
