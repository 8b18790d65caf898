"""HTML pages of stories, without scripts: they open anywhere, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

SMALL = 128  # pixels: narrower images are shown by their pixels, others are smoothed

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
.story img { display: block; width: 100%; height: auto; border-radius: 8px; }
.story img.small { image-rendering: pixelated; }
.story td, .story th { overflow-wrap: anywhere; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .25rem .75rem; margin: 1.5rem 0; }
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


class Picture(NamedTuple):
    """The URL of an image, and its size in pixels."""

    source: str
    width: int
    height: int


def page(title: str, body: str) -> str:
    """A complete page, headed by its title."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def story_card(
    heading: str,
    sentences: Sequence[str],
    rows: Mapping[str, Sequence[Picture]],
    hints: Sequence[str],
) -> str:
    """One story: its sentences over named rows of images; files load when they come into view.

    Args:
        heading: as HTML.
        hints: shown below the sentences, empty for none.
    """
    columns = "".join(
        f"<td>{escape(sentence)}"
        + (f'<div class="faint">{escape(hint)}</div>' if hint else "")
        + "</td>"
        for sentence, hint in zip(sentences, hints, strict=True)
    )
    shown = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f"<td>{_image(picture, sentence)}</td>"
            for picture, sentence in zip(pictures, sentences, strict=True)
        )
        + "</tr>"
        for name, pictures in rows.items()
    )
    return f"""<div class="card"><table class="story">
<thead><tr><th class="faint">{heading}</th>{columns}</tr></thead>
<tbody>
{shown}
</tbody>
</table></div>"""


def _image(picture: Picture, sentence: str) -> str:
    kind = ' class="small"' if picture.width < SMALL else ""
    kind += "" if picture.source.startswith("data:") else ' loading="lazy"'
    return (
        f'<img{kind} src="{escape(picture.source)}" alt="{escape(sentence)}" '
        f'width="{picture.width}" height="{picture.height}">'
    )
