"""Measure how fast training reads a latent cache: made-up stories of a published size, on disk.

    python scripts/benchmark_latents.py

Overlapping stories share frames, as PororoSV's do. The cache is written where temporary files are,
and deleted. Beside the rate of a clock is that of one core's time, on which other work on the
machine counts little. The target is 2,000 stories a second on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from contextualstory_jax.data.latent_cache import (
    ABOUT,
    DTYPES,
    FORMAT,
    PICTURES,
    EncodedStories,
    LatentCache,
    tabulate,
)
from contextualstory_jax.data.loader import batches
from contextualstory_jax.data.story_source import StoryRecord, StorySource, numbered

MOMENTS = (2, 32, 32, 4)  # of an image of 256 x 256: mean and log of variance
TEXTS = {"published": (77, 1024), "synthetic stories": (16, 64)}  # tokens and features


class MadeUpStories(StorySource):
    """Stories of which each begins one frame after the one before; no images."""

    counts = {}

    def __init__(self, count: int):
        super().__init__("train", 256, seed=0)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def story(self, index: SupportsIndex) -> StoryRecord:
        first = self._number(index)
        name, frames = f"story-{first}", tuple(f"frame {first + later}" for later in range(5))
        paths = tuple(map(Path, frames))
        return StoryRecord(name, numbered(name), name, frames, frames, None, paths)

    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        raise NotImplementedError


def made_up_cache(folder: Path, stories: int, text: tuple[int, int], dtype: str) -> EncodedStories:
    """A cache of made-up stories with float32 moments, written to a folder that is there."""
    source = MadeUpStories(stories)
    table, rng = tabulate(source), np.random.default_rng(0)

    def write(kind: str, count: int, shape: tuple[int, ...], dtype: str) -> dict:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        noise, name = rng.bytes(size + count), f"{kind}.array_record"
        writer = ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
        for i in range(count):
            writer.write(noise[i : i + size])
        writer.close()
        return {"files": {name: count}, "shape": shape, "dtype": dtype}

    np.save(folder / PICTURES, np.ones(len(table.paths), np.int32))
    about = {
        "format": FORMAT,
        "stories": table.digest,
        "moments": write("moments", len(table.paths), MOMENTS, "float32"),
        "text": write("text", len(table.sentences), text, dtype),
        **dict.fromkeys(("settings", "tokenizer", "weights")),
        "storyflow": [0.0] * 4,
    }
    (folder / ABOUT).write_text(json.dumps(about))
    return EncodedStories(source, LatentCache.open(folder))


def stories_per_second(
    stories: EncodedStories, batch_size: int, seconds: float
) -> tuple[float, float]:
    """Stories a second of training's reader, in its random order, and of one core's time."""
    order = batches(stories, batch_size, seed=0)
    for _ in range(5):  # which are read ahead
        next(order)
    began, began_work, count = time.monotonic(), time.process_time(), 0
    while time.monotonic() < began + seconds:
        next(order)
        count += batch_size
    return count / (time.monotonic() - began), count / (time.process_time() - began_work)


def main() -> None:
    """Print a line for each size of text features."""
    parser = argparse.ArgumentParser(description="Measure how fast a latent cache is read.")
    parser.add_argument("--stories", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    arguments = parser.parse_args()
    for name, text in TEXTS.items():
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                stories = made_up_cache(Path(folder), arguments.stories, text, dtype)
                rate, of_core = stories_per_second(stories, arguments.batch_size, arguments.seconds)
            said = f"{rate:.0f} stories/s, {of_core:.0f} in a second of one core's time"
            print(f"text of {name} ({dtype}): {said}", flush=True)


if __name__ == "__main__":
    main()
