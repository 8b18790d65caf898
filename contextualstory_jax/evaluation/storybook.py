"""A self-contained HTML page of generated stories, their metrics, and a loss curve.

Images and styles are inside the file and it has no scripts, so that it opens anywhere, offline.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from contextualstory_jax.data.example import Example
from contextualstory_jax.evaluation.compare import SUBSET_TITLES, Result
from contextualstory_jax.evaluation.html import Picture, page, story_card
from contextualstory_jax.evaluation.metrics.characters import METRICS
from contextualstory_jax.utils.atomic import atomic_path


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
    chapters = "\n".join(
        _story(story, {name: result.images[i] for name, result in results.items()})
        for i, story in enumerate(stories[:shown])
    )
    body = f"""<p>Five sentences in, five images that belong together out. None of these stories
was trained on. {escape(about)}</p>
<h2>Stories</h2>
<p class="faint">Some sentences do not say by themselves who is in the image, or where; below
them stands what the other sentences say.</p>
{chapters}
<h2>Metrics</h2>
<p class="faint">On {len(stories)} stories, with 95&nbsp;% intervals over stories in brackets.</p>
<div class="card">
{_metrics(results)}
</div>
<h2>Training loss</h2>
<div class="card">
{_curve(losses)}
</div>"""
    with atomic_path(path) as temporary:
        temporary.write_text(page("Storybook", body), encoding="utf-8")


def _story(story: Example, images: Mapping[str, UInt8[np.ndarray, "f h w 3"]]) -> str:
    """One story: its sentences over a row of images from each source."""
    hints = [""] * len(story.sentences)
    for i, label in enumerate(story.labels or ()):
        if label.needs_context:
            hints[i] = " and ".join(sorted(label.characters)) + f", {label.scene}"
    rows = {name: [_data(frame) for frame in frames] for name, frames in images.items()}
    return story_card(escape(story.story_id), story.sentences, rows, hints)


def _data(frame: UInt8[np.ndarray, "h w 3"]) -> Picture:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    height, width = frame.shape[:2]
    return Picture(f"data:image/png;base64,{data}", width, height)


def _metrics(results: Mapping[str, Result]) -> str:
    """A table with a column a result and a group of rows a subset of the frames."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in results)
    groups = []
    for subset, title in SUBSET_TITLES.items():
        frames = next(iter(results.values())).metrics[subset]["frames"]
        rows = [
            f'<tr><th scope="rowgroup" colspan="{1 + len(results)}">'
            f"{escape(title)} ({frames})</th></tr>"
        ]
        for metric in METRICS:
            cells = "".join(
                f"<td>{_value(result.metrics[subset][metric])}</td>" for result in results.values()
            )
            rows.append(f'<tr><th scope="row">{metric.replace("_", " ")}</th>{cells}</tr>')
        groups.append("<tbody>\n" + "\n".join(rows) + "\n</tbody>")
    return (
        f'<table class="metrics">\n<thead><tr><td></td>{names}</tr></thead>\n'
        + "\n".join(groups)
        + "\n</table>"
    )


def _value(metric: Mapping[str, float | None]) -> str:
    if metric["value"] is None:
        return "-"
    return "{value:.3f} ".format(
        **metric
    ) + '<span class="faint">[{low:.2f}, {high:.2f}]</span>'.format(**metric)


WIDTH, HEIGHT = 900, 260  # of the curve
LEFT, BOTTOM, TOP = 52, 34, 12  # its margins


def _curve(losses: Sequence[tuple[int, float]]) -> str:
    """The loss over the steps as SVG, on a logarithmic scale."""
    steps, values = np.array(losses, float).T
    powers = np.log10(np.maximum(values, 1e-12))
    low, high = powers.min(), max(powers.max(), powers.min() + 1e-3)
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    x = LEFT + (steps - first) / (last - first) * (WIDTH - LEFT - 8)
    y = TOP + (high - powers) / (high - low) * (HEIGHT - TOP - BOTTOM)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    marks = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        level = TOP + share * (HEIGHT - TOP - BOTTOM)
        loss = 10 ** (high - share * (high - low))
        marks.append(
            f'<line x1="{LEFT}" x2="{WIDTH}" y1="{level:.1f}" y2="{level:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{loss:.2g}</text>'
        )
        place, anchor = LEFT + share * (WIDTH - LEFT - 8), "end" if share == 1 else "middle"
        marks.append(
            f'<text x="{place:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">'
            f"{math.floor(first + share * (last - first)):,}</text>"
        )
    summary = (
        f"Loss {values[0]:.3g} at step {steps[0]:.0f}, {values[-1]:.3g} at step {steps[-1]:.0f}"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{summary}">\n'
        f'{"".join(marks)}\n<polyline points="{points}"/>\n</svg>\n'
        f'<div class="faint">{summary}.</div>'
    )
