"""A self-contained HTML page of drawn stories, what was measured on them, and a loss curve.

Pictures and styles are inside the file and it has no scripts, so that it opens anywhere, offline.
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
from contextualstory_jax.evaluation import SUBSET_TITLES, Result
from contextualstory_jax.metrics.characters import METRICS
from contextualstory_jax.output import whole

STYLE = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#fbfaf7, #17181b); --card: light-dark(#ffffff, #202226);
  --ink: light-dark(#22242a, #e8e6e1); --faint: light-dark(#686b73, #a2a4ab);
  --line: light-dark(#e2dfd7, #34373d); --accent: light-dark(#a8431f, #f0a27f);
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
}
h1, h2 { font-family: Georgia, "Times New Roman", serif; font-weight: 600; line-height: 1.2; }
h1 { margin: 0 0 .5rem; font-size: 2.2rem; }
h2 { margin: 3rem 0 .75rem; font-size: 1.5rem; }
p { max-width: 46rem; }
.faint { color: var(--faint); font-size: .875rem; }
.card {
  margin: 1rem 0; padding: 1.1rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; overflow-x: auto;
}
table { border-collapse: collapse; }
th { font-weight: 600; text-align: left; }
.story { width: 100%; min-width: 44rem; table-layout: fixed; }
.story thead th:first-child { width: 8rem; }
.story td, .story th { padding: .3rem .35rem; vertical-align: top; }
.story thead td { font: italic .95rem/1.35 Georgia, "Times New Roman", serif; }
.story thead .faint { font: .8rem/1.4 system-ui, sans-serif; }
.story th { padding-left: 0; font-size: .875rem; }
.story tbody th { vertical-align: middle; }
.story img {
  display: block; width: 100%; height: auto; border-radius: 8px; image-rendering: pixelated;
}
.metrics { width: 100%; min-width: 40rem; font-variant-numeric: tabular-nums; }
.metrics th, .metrics td { padding: .35rem .75rem .35rem 0; border-top: 1px solid var(--line); }
.metrics thead > tr > * { border-top: 0; vertical-align: bottom; }
.metrics tbody:not(:first-of-type) tr:first-child th { padding-top: 1.5rem; }
.metrics tbody th[scope=row] { font-weight: 400; }
.metrics tbody th[scope=rowgroup] { border-top: 0; color: var(--accent); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 12px; }
svg line { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
"""


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
    """Write the page: the first `shown` stories, one row of pictures a result, and all metrics.

    Args: `results` by the name that the page gives them, with pictures of all stories; `losses`,
    (step, loss) of a training run; `about`, a sentence or two for the top of the page.
    Raises `UserError` where the page cannot be written.
    """
    chapters = "\n".join(
        _story(story, {name: result.pictures[i] for name, result in results.items()})
        for i, story in enumerate(stories[:shown])
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Storybook</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Storybook</h1>
<p>Five sentences in, five pictures that belong together out. None of these stories was trained on.
{escape(about)}</p>
<h2>Stories</h2>
<p class="faint">Some sentences do not tell by themselves who is in the picture, or where; below
them stands what the other sentences tell.</p>
{chapters}
<h2>Metrics</h2>
<p class="faint">On {len(stories)} stories, with 95&nbsp;% intervals over stories in brackets.</p>
<div class="card">
{_metrics(results)}
</div>
<h2>Training loss</h2>
<div class="card">
{_curve(losses)}
</div>
</body>
</html>
"""
    with whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _story(story: Example, pictures: Mapping[str, UInt8[np.ndarray, "f h w 3"]]) -> str:
    """One story: its sentences over a row of pictures from each source."""
    sentences = []
    for i, sentence in enumerate(story.sentences):
        label = story.labels[i] if story.labels else None
        hint = ""
        if label and label.needs_context:
            told = " and ".join(sorted(label.characters)) + f", {label.scene}"
            hint = f'<div class="faint">{escape(told)}</div>'
        sentences.append(f"<td>{escape(sentence)}{hint}</td>")
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f"<td>{_picture(frame, sentence)}</td>"
            for frame, sentence in zip(frames, story.sentences, strict=True)
        )
        + "</tr>"
        for name, frames in pictures.items()
    )
    return f"""<div class="card"><table class="story">
<thead><tr><th class="faint">{escape(story.story_id)}</th>{"".join(sentences)}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>"""


def _picture(frame: UInt8[np.ndarray, "h w 3"], sentence: str) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    height, width = frame.shape[:2]
    return (
        f'<img src="data:image/png;base64,{data}" alt="{escape(sentence)}" '
        f'width="{width}" height="{height}">'
    )


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
