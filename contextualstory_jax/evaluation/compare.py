"""Measuring models on stories they have not seen, between two bounds: originals and no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from contextualstory_jax.data.example import Example
from contextualstory_jax.data.shapes_reader import read_frames
from contextualstory_jax.evaluation.metrics.characters import METRICS, CharacterMetrics, Report
from contextualstory_jax.sampling.arguments import stories_of
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.utils.errors import require
from contextualstory_jax.utils.interruption import check

SMALLEST = 32  # pixels a side that the reader of frames can recognise characters by
SUBSET_TITLES = {"all": "all frames", "needs_context": "frames that need their context"}


class Result(NamedTuple):
    """Frames of some stories, and their metrics from `measure`."""

    images: UInt8[np.ndarray, "b f h w 3"]
    metrics: Report


def untrained(pipeline: StoryPipeline) -> StoryPipeline:
    """The same architecture and VAE, the rest with fresh weights, as a lower bound."""
    model = pipeline.model
    params = {**model.init(0), "vae": pipeline.params["vae"]}
    return StoryPipeline(model, params, pipeline.tokenizer, pipeline.storyflow.tolist())


def evaluate(
    models: Mapping[str, StoryPipeline],
    stories: Sequence[Example],
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda generated: None,
) -> dict[str, Result]:
    """Generate stories with each model and measure them; `originals`, the upper bound, first.

    Where a model is given the first frame, frame 0 is measured of none.

    Args:
        progress: called after each batch with its number of stories.

    Raises:
        UserError: for stories that a model cannot generate or that cannot be measured.
    """
    given = any(pipeline.model.config.unet.is_continuation for pipeline in models.values())

    def result(images: UInt8[np.ndarray, "b f h w 3"]) -> Result:
        return Result(images, measure(stories, images, first_frame=int(given)))

    # First of all, so that what cannot be measured is not generated.
    results = {"originals": result(np.stack([story.images for story in stories]))}
    for name, pipeline in models.items():
        generated = pipeline.draw(
            stories_of(stories, pipeline.model.config.unet),
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        results[name] = result(generated.images)
        check()
    return results


def measure(
    stories: Sequence[Example], images: UInt8[np.ndarray, "b f h w 3"], first_frame: int = 0
) -> Report:
    """`CharacterMetrics.compute` of images, from frame number `first_frame` on.

    Raises `UserError` for images that the reader of frames is not made for.
    """
    require_readable(*images.shape[2:4])
    metrics = CharacterMetrics()
    for story, frames in zip(stories, images, strict=True):
        count(metrics, story, frames, first_frame)
    return metrics.compute()


def require_readable(height: int, width: int) -> None:
    """Raise `UserError` for images that the reader of frames is not made for."""
    require(
        height == width >= SMALLEST,
        f"characters are read from square images of {SMALLEST} pixels or more a side; "
        f"these have {height} x {width}: evaluate a model of such images",
    )


def count(
    metrics: CharacterMetrics,
    story: Example,
    images: UInt8[np.ndarray, "f h w 3"],
    first_frame: int = 0,
) -> None:
    """Count a story's images beside its labels, from frame number `first_frame` on."""
    labels = (story.labels or ())[first_frame:]
    metrics.update(story.story_id, read_frames(images[first_frame:]), labels)


def table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics as text, with their 95 % intervals: one block a subset, one column what is measured.

    Args:
        metrics: the results of `measure`, by name.
    """
    blocks = []
    for subset, title in SUBSET_TITLES.items():
        frames = next(iter(metrics.values()))[subset]["frames"]
        rows = [[f"{title} ({frames})", *metrics]]
        for metric in METRICS:
            cells = [in_words(values[subset][metric]) for values in metrics.values()]
            rows.append([metric.replace("_", " "), *cells])
        lines = [f"{row[0]:38}" + "".join(f"  {cell:>18}" for cell in row[1:]) for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def in_words(metric: Mapping[str, float | None]) -> str:
    """A value and its interval, such as `0.912 [0.87, 0.95]`."""
    if metric["value"] is None:
        return "-"
    return "{value:.3f} [{low:.2f}, {high:.2f}]".format(**metric)
