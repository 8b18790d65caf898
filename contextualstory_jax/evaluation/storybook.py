"""A self-contained HTML page of generated stories, their metrics, and a loss curve.

Images and styles are inside the file and it has no scripts, so that it opens anywhere, offline.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from contextualstory_jax.data.example import Example
from contextualstory_jax.evaluation.compare import SUBSET_TITLES, Result
from contextualstory_jax.evaluation.html import Picture, StoryCard, hint, write_page
from contextualstory_jax.evaluation.metrics.characters import METRICS


def read_losses(path: Path) -> list[tuple[int, float]]:
    """Steps and losses of a training workdir's `metrics.jsonl`."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def write_storybook(
    path: Path,
    stories: Sequence[Example],
    results: Mapping[str, Result],
    losses: Sequence[tuple[int, float]],
    *,
    shown: int = 6,
    about: str = "",
) -> None:
    """Write the page: the first `shown` stories, one row of images a result, and all metrics.

    Args:
        results: by the name that the page gives them, with images of all stories.
        losses: (step, loss) of a training run.
        about: a sentence or two for the top of the page.

    Raises:
        UserError: where the page cannot be written.
    """
    write_page(
        path,
        "storybook.html",
        title="Storybook",
        about=about,
        stories=[
            _card(story, {name: result.images[i] for name, result in results.items()})
            for i, story in enumerate(stories[:shown])
        ],
        count=len(stories),
        results=results,
        subsets=SUBSET_TITLES,
        metrics=METRICS,
        curve=_curve(losses),
    )


def _card(story: Example, images: Mapping[str, UInt8[np.ndarray, "f h w 3"]]) -> StoryCard:
    hints = [""] * len(story.sentences)
    for i, label in enumerate(story.labels or ()):
        hints[i] = hint(label.needs_context, sorted(label.characters), label.scene)
    rows = {name: [_data(frame) for frame in frames] for name, frames in images.items()}
    return StoryCard(story.story_id, story.sentences, hints, rows)


def _data(frame: UInt8[np.ndarray, "h w 3"]) -> Picture:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    height, width = frame.shape[:2]
    return Picture(f"data:image/png;base64,{data}", width, height)


WIDTH, HEIGHT = 900, 260  # of the curve
LEFT, BOTTOM, TOP = 52, 34, 12  # its margins


def _curve(losses: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """The points and marks of the loss over the steps, on a logarithmic scale."""
    steps, values = np.array(losses, float).T
    powers = np.log10(np.maximum(values, 1e-12))
    low, high = powers.min(), max(powers.max(), powers.min() + 1e-3)
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    x = LEFT + (steps - first) / (last - first) * (WIDTH - LEFT - 8)
    y = TOP + (high - powers) / (high - low) * (HEIGHT - TOP - BOTTOM)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    marks = [
        {
            "x": LEFT + share * (WIDTH - LEFT - 8),
            "y": TOP + share * (HEIGHT - TOP - BOTTOM),
            "step": f"{math.floor(first + share * (last - first)):,}",
            "loss": f"{10 ** (high - share * (high - low)):.2g}",
        }
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    summary = (
        f"Loss {values[0]:.3g} at step {steps[0]:.0f}, {values[-1]:.3g} at step {steps[-1]:.0f}"
    )
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "marks": marks,
        "points": points,
        "summary": summary,
    }
