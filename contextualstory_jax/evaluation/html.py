"""HTML pages of stories, by the templates beside this file, without scripts: they open offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from contextualstory_jax.utils.atomic import atomic_path


class Picture(NamedTuple):
    """The URL of an image, and its size in pixels."""

    source: str
    width: int
    height: int


class StoryCard(NamedTuple):
    """A story as a page shows it: its sentences, with hints below, over named rows of images."""

    id: str
    sentences: Sequence[str]
    hints: Sequence[str]  # empty for none
    rows: Mapping[str, Sequence[Picture]]
    link: str = ""  # of the id


def hint(needs_context: bool | None, characters: Sequence[str] | None, scene: str | None) -> str:
    """The characters and the scene of a frame, where its sentence alone does not say them."""
    return f"{' and '.join(characters or ())}, {scene}" if needs_context else ""


def find_template(name: str, autoescape: bool = True) -> jinja2.Template:
    """A template beside this file; one of HTML escapes its values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page atomically. Raises `UserError` where it cannot be written."""
    text = find_template(template).render(values)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
