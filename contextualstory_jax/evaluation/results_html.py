"""Pages of a gallery, of `STORIES` each, and its `frames.jsonl`, a record a frame.

Links and images are relative to the pages, so that the folder can be moved, or served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from contextualstory_jax.evaluation.html import Picture, StoryCard, hint, write_page
from contextualstory_jax.evaluation.results import Gallery, SplitStory
from contextualstory_jax.utils.atomic import atomic_path

STORIES = 50  # on a page


def write_index(
    gallery: Gallery, title: str, stories: Sequence[SplitStory], rows: Mapping[str, str]
) -> None:
    """Write `frames.jsonl` and the pages of some stories, all of which are generated.

    Args:
        rows: first word of the file names of each row of images, by the row's title.

    Raises:
        UserError: where a story is not there, or a file cannot be written.
    """
    count = -(-len(stories) // STORIES)
    pages = ["index.html", *(f"page_{number}.html" for number in range(2, count + 1))][:count]
    measured = ["metrics.json"] if gallery.settings["metrics"] else []
    files = ["settings.json", "frames.jsonl", *measured]
    with atomic_path(gallery.folder / "frames.jsonl") as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for number, page in enumerate(pages, 1):
                cards = []
                for story in stories[(number - 1) * STORIES : number * STORIES]:
                    records = gallery.records(story)
                    file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
                    cards.append(_card(gallery, story, records, rows))
                write_page(
                    gallery.folder / page,
                    "index.html",
                    title=title,
                    settings=gallery.settings,
                    files=files,
                    pages=pages,
                    number=number,
                    stories=cards,
                )
    for path in gallery.folder.glob("page_*.html"):
        if path.name not in pages:
            path.unlink()  # of an earlier start with more stories


def _card(
    gallery: Gallery,
    story: SplitStory,
    records: Sequence[Mapping[str, Any]],
    rows: Mapping[str, str],
) -> StoryCard:
    place = gallery.place(story).relative_to(gallery.folder).as_posix()
    size = gallery.settings["width"], gallery.settings["height"]
    images = {
        name: [Picture(f"{place}/{word}_{i}.png", *size) for i in range(len(records))]
        for name, word in rows.items()
    }
    hints = [hint(r["needs_context"], r["characters"], r["scene"]) for r in records]
    return StoryCard(story.id, story.sentences, hints, images, f"{place}/figure.png")
