"""Generation of a complete test split into a gallery, on all hosts' devices, and its metrics.

Each process generates every n-th story on its own devices, so that no process waits for another
before the end, and stories that are there already are not generated again. While the devices run a
batch, threads read the next and write the one before; no more is in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from tqdm import tqdm

from contextualstory_jax.checkpoints.layout import weights_digest
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.example import Example
from contextualstory_jax.data.shapes import ShapesSource
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.distributed.multihost import is_first
from contextualstory_jax.evaluation.compare import count
from contextualstory_jax.evaluation.metrics.characters import CharacterMetrics, Report
from contextualstory_jax.evaluation.results import Gallery, SplitStory
from contextualstory_jax.sampling.arguments import stories_of
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.sampling.sample import fill
from contextualstory_jax.utils.errors import require
from contextualstory_jax.utils.interruption import check

Source = ShapesSource | StorySource

# Rows of a gallery that are measured, and the first word of their file names.
MEASURED = {"originals": "original", "model": "frame", "untrained": "untrained"}
THREADS = min(8, os.cpu_count() or 1)  # Pillow leaves Python to others while it packs


def story_of(source: Source, number: int) -> SplitStory:
    """A story of a split without its images."""
    if isinstance(source, StorySource):
        record = source.story(number)
        return SplitStory(number, record.story_id, record.sentences, record.source_frame_ids)
    example = source[number]
    return SplitStory(number, example.story_id, example.sentences, example.frame_ids)


def open_gallery(
    out: Path,
    pipeline: StoryPipeline,
    data: DataConfig,
    split: str,
    stories: int,
    *,
    checkpoint: str,
    seed: int,
    metrics: Sequence[str] = (),
) -> Gallery:
    """The gallery in a folder, with the settings that decide its frames.

    Args:
        out: The folder.
        pipeline: The model.
        data: Its test stories.
        split: The split that they are of.
        stories: How many there are.
        checkpoint: The name of the checkpoint.
        seed: Of the noise.
        metrics: Those of the gallery's own `metrics.json`.

    Raises:
        UserError: The folder holds stories of other settings.
    """
    config = pipeline.model.config
    named = {
        f"{part}.{name}": leaf
        for part, leaves in pipeline.params.items()
        for name, leaf in leaves.items()
    }
    settings = {
        "checkpoint": checkpoint,
        "step": pipeline.step,
        "weights": pipeline.weights,
        "dtype": str(jax.numpy.dtype(pipeline.model.dtype)),
        "task": "continuation" if config.unet.is_continuation else "visualization",
        "data": dataclasses.asdict(data),
        "split": split,
        "stories": stories,
        "seed": seed,
        "height": config.height,
        "width": config.width,
        "sampling": dataclasses.asdict(config.sampling),
        "weights_sha256": weights_digest(named),
        "storyflow": pipeline.storyflow.tolist(),
        "metrics": list(metrics),
    }
    gallery = Gallery(out, settings)
    gallery.check()
    return gallery


def generate_with_bar(
    models: Mapping[str, StoryPipeline],
    source: Source,
    stories: Sequence[SplitStory],
    gallery: Gallery,
    seed: int,
    batch_size: int,
) -> None:
    """`generate_split` with a progress bar of the first process's stories."""
    with tqdm(
        total=len(stories[jax.process_index() :: jax.process_count()]),
        unit="story",
        dynamic_ncols=True,
        delay=0.5,  # seconds, in which bad input is refused: an error stands alone
        disable=not is_first(),
    ) as bar:
        generate_split(
            models,
            source,
            stories,
            gallery,
            seed=seed,
            batch_size=batch_size,
            progress=bar.update,
        )


def generate_split(
    models: Mapping[str, StoryPipeline],
    source: Source,
    stories: Sequence[SplitStory],
    gallery: Gallery,
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Generate this process's part of the missing stories, and wait for the others'.

    Args:
        models: by the word that their files' names begin with, `frame` for the one that is looked
            at.
        progress: called with how many more of this process's stories are there.

    Raises:
        UserError: for stories that a model cannot generate, and where a file cannot be read or
            written.
    """
    require(batch_size >= 1, f"batch size must be at least 1; got {batch_size}")
    ours = stories[jax.process_index() :: jax.process_count()]
    gallery.clear(story.number for story in ours)
    missing = [story for story in ours if not gallery.has(story)]
    progress(len(ours) - len(missing))
    # Every batch has one size, so that one program serves.
    batch_size = max(min(batch_size, len(missing)), 1)
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    given = int(models["frame"].model.config.unet.is_continuation)
    with ThreadPoolExecutor(THREADS) as pool:

        def read(batch: Sequence[SplitStory]) -> list[Future[Example]]:
            return [pool.submit(source.__getitem__, story.number) for story in batch]

        reading, writing = read(batches[0] if batches else []), []
        for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=()):
            examples = [future.result() for future in reading]
            reading = read(following)
            generated = [_generate(model, examples, seed, batch_size) for model in models.values()]
            if not writing and is_first():
                gallery.write_settings()
            _finish(writing, progress)
            for story, example, *images in zip(batch, examples, *generated, strict=True):
                named = dict(zip(models, images, strict=True))
                writing.append(
                    pool.submit(gallery.write, story, example, named, seed=seed, given=given)
                )
            check()
        _finish(writing, progress)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("every story is generated")


def _generate(
    pipeline: StoryPipeline, examples: Sequence[Example], seed: int, batch_size: int
) -> UInt8[np.ndarray, "b f h w 3"]:
    """The images of a batch; the last story fills its empty places."""
    stories = fill(stories_of(examples, pipeline.model.config.unet), batch_size)
    generated = pipeline.draw(stories, seed=seed, batch_size=batch_size)
    return generated.images[: len(examples)]


def _finish(writing: list[Future[None]], progress: Callable[[int], object]) -> None:
    """Wait until all is written, and forget it."""
    while writing:
        writing.pop().result()
        progress(1)


def measure_split(
    source: Source, stories: Iterable[SplitStory], gallery: Gallery, given: int
) -> dict[str, Report]:
    """`CharacterMetrics.compute` of each of `MEASURED`, from frame `given` on."""
    metrics = {name: CharacterMetrics() for name in MEASURED}
    for story in stories:
        check()
        example = source[story.number]
        for name, word in MEASURED.items():
            count(metrics[name], example, gallery.images(story, word), given)
    return {name: metric.compute() for name, metric in metrics.items()}
