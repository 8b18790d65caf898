"""Folders of images to measure: plain ones, and those that `evaluate` wrote."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from contextualstory_jax.data.images import (
    check_aspect,
    opened,
    read_column,
    read_from_array,
    remark,
    to_rgb,
)
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import read_json_lines

SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KEYS = {
    *("story", "position", "id", "source_id", "sentence", "generated", "original", "given"),
    *("characters", "scene", "needs_context"),
}
FORM = "generate the folder again with evaluate"

Role = Literal["generated", "original"]
Item = Path | tuple[Path, int]  # an image file, or one image of a file that holds several


class Frame(NamedTuple):
    """An image, and what is known of it."""

    path: Path
    story: str  # frames of one story are neighbours; in a plain folder each image is its own
    position: int = 0
    sentence: str | None = None
    characters: frozenset[str] | None = None
    choice: int | None = None  # which image of a file that holds several

    @property
    def item(self) -> Item:
        """The file, and the number of the image in it, as `read_rgb` takes them."""
        return self.path if self.choice is None else (self.path, self.choice)


class ImageFolder(NamedTuple):
    """Frames of a folder, in order, and the settings of the `evaluate` that wrote it, if one did.

    `settings` is empty for a plain folder.
    """

    path: Path
    frames: tuple[Frame, ...]
    settings: dict[str, Any]

    def stories(self) -> list[tuple[Frame, ...]]:
        """The frames by story."""
        return [tuple(of) for _, of in itertools.groupby(self.frames, lambda frame: frame.story)]


def read_folder(path: Path, role: Role) -> ImageFolder:
    """The frames of a folder.

    Args:
        path: The folder.
        role: Which images of a folder that `evaluate` wrote; frames that were given to the model
            are left out of both.

    Raises:
        UserError: It is no folder, or holds no images.
    """
    require(path.is_dir(), f"{path} is not a folder of images; name one")
    if (path / "settings.json").is_file() and (path / "frames.jsonl").is_file():
        return _read_results(path, role)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
    require(bool(files), f"{path} holds no images ({kinds}); name a folder that does")
    return ImageFolder(path, tuple(Frame(file, file.name) for file in files), {})


def _read_results(path: Path, role: Role) -> ImageFolder:
    """The frames of a folder that `evaluate` wrote."""
    try:
        settings = json.loads((path / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'settings.json'} cannot be read; {FORM}") from error
    frames = []
    for where, record in read_json_lines(path / "frames.jsonl", KEYS, FORM):
        try:
            image, characters = path / record[role], record["characters"]
            frame = Frame(
                image,
                image.parent.name,
                record["position"],
                record["sentence"],
                None if characters is None else frozenset(characters),
            )
            given = record["given"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{where} is no record of a frame; {FORM}") from error
        if not given:
            frames.append(frame)
    require(bool(frames), f"{path / 'frames.jsonl'} lists no frames; {FORM}")
    return ImageFolder(path, tuple(frames), settings)


def read_rgb(item: Item) -> Image.Image:
    """An image in 8-bit RGB. Raises `UserError`, with its path, where it cannot be read."""
    if isinstance(item, tuple):
        path, choice = item
        if path.suffix == ".npy":
            return read_from_array(path, choice)
        column = read_column(path)
        return column[choice % len(column)]
    with opened(item) as image:
        check_aspect(image.width, image.height, item)
        if image.mode[0] in "1LI":
            remark("is greyscale; its three channels are equal", str(item))
        return to_rgb(image, str(item))
