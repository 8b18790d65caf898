"""Stories to batches, tokenised and stacked on the host, in an order set by (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from contextualstory_jax.config import DataConfig
from contextualstory_jax.data.example import Example
from contextualstory_jax.data.shapes import TOKENIZER_DIR, ShapesSource

__all__ = ["TOKENIZER_DIR", "batches", "test_stories", "training_source"]


def training_source(config: DataConfig, size: int) -> ShapesSource:
    """The training split, pictures of `size` x `size`."""
    return ShapesSource(config.seed, "train", size)


def test_stories(config: DataConfig, size: int, count: int) -> list[Example]:
    """The first `count` stories of the test split."""
    source = ShapesSource(config.seed, "test", size)
    return [source[i] for i in range(count)]


def batches(
    source: Sequence[Example] | ShapesSource,
    tokenize: Callable[[Sequence[str]], np.ndarray],
    batch_size: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from step `first_step` on.

    Each has `images`, uint8 (b, 5, h, w, 3), and `ids`, int32 (b, 5, l). Batch s is the same
    whatever step the iterator started at, so that resuming needs no iterator state.
    """

    def arrays(example: Example) -> dict[str, np.ndarray]:
        return {"images": example.images, "ids": tokenize(example.sentences)}

    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).map(arrays)
    dataset = dataset.batch(batch_size, drop_remainder=True)[first_step:]
    # One thread: drawing and tokenising are Python, and the accelerator has the other cores.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
