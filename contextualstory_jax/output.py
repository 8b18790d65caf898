"""Drawn stories on disk: each file and folder appears whole or not at all, with the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contextualstory_jax.captions import viewable
from contextualstory_jax.config import require
from contextualstory_jax.errors import UserError
from contextualstory_jax.interruption import removing

GIF_MILLISECONDS = 800  # a frame
GRID_GAP = 2  # pixels of white between the frames of a grid


def check_writable(folder: Path) -> None:
    """Raise `UserError` where a folder could not be made or written to; changes nothing."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    require(
        existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        f"cannot write to {folder}: {existing} is not a folder one may write to; choose another",
    )


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a file or a folder at, which then takes the place of `path`.

    In a folder that is there already the files are replaced one by one, and others stay. Raises
    `UserError` where writing fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with removing(temporary):
            yield temporary
            if temporary.is_dir() and path.is_dir():
                for file in temporary.iterdir():
                    file.replace(path / file.name)
            else:
                temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from error


def write_story(
    folder: Path,
    pictures: UInt8[np.ndarray, "f h w 3"],
    sentences: Sequence[str],
    seed: int,
    captions: bool = True,
) -> None:
    """Write `frame_0.png` and so on, `grid.png` and `story.gif`.

    PNGs hold seed and sentence as text. The grid and the animation show small frames enlarged,
    and each frame's sentence under it if `captions`.

    Raises:
        UserError: the folder cannot be written.
    """
    views = viewable(pictures, sentences if captions else None)
    with whole(folder) as temporary:
        temporary.mkdir()
        save_frames(temporary, pictures, sentences, seed)
        grid = _side_by_side(views)
        grid.save(temporary / "grid.png", pnginfo=_text(seed, "\n".join(sentences)))
        views[0].save(
            temporary / "story.gif",
            save_all=True,
            append_images=views[1:],
            duration=GIF_MILLISECONDS,
            loop=0,
        )


def save_frames(
    folder: Path,
    pictures: UInt8[np.ndarray, "f h w 3"],
    sentences: Sequence[str],
    seed: int,
    name: str = "frame",
) -> None:
    """Write `NAME_0.png` and so on into a folder; they tell seed and sentence."""
    for i, (picture, sentence) in enumerate(zip(pictures, sentences, strict=True)):
        path = folder / f"{name}_{i}.png"
        Image.fromarray(picture).save(path, pnginfo=_text(seed, sentence))


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON. Raises `UserError` where it cannot be written."""
    with whole(path) as temporary:
        text = json.dumps(values, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_latents(path: Path, latents: Float32[np.ndarray, "b f p q c"]) -> None:
    """Write a `.npy` file. Raises `UserError` where it cannot be written."""
    with whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def _text(seed: int, sentence: str) -> PngInfo:
    info = PngInfo()
    info.add_text("seed", str(seed))
    info.add_text("sentence", sentence)
    return info


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    width = images[0].width + GRID_GAP
    grid = Image.new("RGB", (len(images) * width - GRID_GAP, images[0].height), "white")
    for column, image in enumerate(images):
        grid.paste(image, (column * width, 0))
    return grid
