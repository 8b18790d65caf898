"""Generated stories on disk: each file and folder is written atomically, with the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contextualstory_jax.sampling.captions import viewable
from contextualstory_jax.utils.atomic import atomic_path

GIF_MILLISECONDS = 800  # a frame
GRID_GAP = 2  # pixels of white between the frames of a grid


def write_story(
    folder: Path,
    images: UInt8[np.ndarray, "f h w 3"],
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
    views = viewable(images, sentences if captions else None)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_frames(temporary, images, sentences, seed)
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
    images: UInt8[np.ndarray, "f h w 3"],
    sentences: Sequence[str],
    seed: int,
    name: str = "frame",
) -> None:
    """Write `NAME_0.png` and so on into a folder; they hold seed and sentence."""
    for i, (image, sentence) in enumerate(zip(images, sentences, strict=True)):
        path = folder / f"{name}_{i}.png"
        Image.fromarray(image).save(path, pnginfo=_text(seed, sentence))


def write_latents(path: Path, latents: Float32[np.ndarray, "b f p q c"]) -> None:
    """Write a `.npy` file. Raises `UserError` where it cannot be written."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
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
