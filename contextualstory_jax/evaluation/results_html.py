"""What a gallery holds: `frames.jsonl`, a record a frame, and pages to look at, of `STORIES` each.

Links and pictures are relative to the pages, so that the folder can be moved, or served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from contextualstory_jax.evaluation.html import Picture, page, story_card
from contextualstory_jax.evaluation.results import Gallery, Told
from contextualstory_jax.utils.atomic import atomic_path

STORIES = 50  # on a page


def write_index(
    gallery: Gallery, title: str, stories: Sequence[Told], rows: Mapping[str, str]
) -> None:
    """Write `frames.jsonl` and the pages of some stories, all of which are drawn.

    Args: `rows` of pictures by what they show, as the first word of their files' names.
    Raises `UserError` where a story is not there, or a file cannot be written.
    """
    pages = -(-len(stories) // STORIES)
    with atomic_path(gallery.folder / "frames.jsonl") as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for number in range(1, pages + 1):
                shown = stories[(number - 1) * STORIES : number * STORIES]
                cards = []
                for story in shown:
                    records = gallery.records(story)
                    file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
                    cards.append(_card(gallery, story, records, rows))
                links = _links(number, pages)
                body = "\n".join([_about(gallery), links, *cards, links])
                _write(gallery.folder / _file(number), page(title, body))
    for path in gallery.folder.glob("page_*.html"):
        if path.name not in {_file(number) for number in range(2, pages + 1)}:
            path.unlink()  # of an earlier start with more stories


def _card(
    gallery: Gallery, story: Told, records: Sequence[Mapping[str, Any]], rows: Mapping[str, str]
) -> str:
    place = gallery.place(story).relative_to(gallery.folder).as_posix()
    size = gallery.settings["width"], gallery.settings["height"]
    pictures = {
        name: [Picture(f"{place}/{word}_{i}.png", *size) for i in range(len(records))]
        for name, word in rows.items()
    }
    hints = [
        " and ".join(record["characters"]) + f", {record['scene']}"
        if record["needs_context"]
        else ""
        for record in records
    ]
    heading = f'<a href="{place}/figure.png">{escape(story.id)}</a>'
    return story_card(heading, story.sentences, pictures, hints)


def _about(gallery: Gallery) -> str:
    """How many stories there are, of what, and the files that say more."""
    settings = gallery.settings
    files = ["settings.json", "frames.jsonl", *(["metrics.json"] if settings["metrics"] else [])]
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in files)
    data, checkpoint = settings["data"]["name"], settings["checkpoint"]
    stories = f"{settings['stories']:,} stories of the {settings['split']} split"
    return f"""<p>{stories} of {escape(data)}, drawn by
{escape(checkpoint)}, step {settings["step"]}. <span class="faint">{links}</span></p>"""


def _links(number: int, pages: int) -> str:
    """Links to the other pages; none where there is one page."""
    if pages == 1:
        return ""
    numbers = (
        f"<b>{n}</b>" if n == number else f'<a href="{_file(n)}">{n}</a>'
        for n in range(1, pages + 1)
    )
    return f"<nav>{' '.join(numbers)}</nav>"


def _file(number: int) -> str:
    return "index.html" if number == 1 else f"page_{number}.html"


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
