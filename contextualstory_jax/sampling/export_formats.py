"""Stories in the formats that people pass on: a strip, an animation, a document, a video."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contextualstory_jax.sampling.captions import viewable

GIF_MILLISECONDS = 800  # a frame
GRID_GAP = 2  # pixels of white between the frames of a strip


def strip(
    images: UInt8[np.ndarray, "f h w 3"],
    captions: Sequence[str] | None,
    text: PngInfo | None = None,
) -> bytes:
    """A PNG file with all frames side by side.

    Args:
        images: the frames; small ones are enlarged.
        captions: a sentence under each frame; None for bare frames.
        text: to be held in the file.
    """
    return _saved(side_by_side(viewable(images, captions)), "PNG", pnginfo=text)


def gif(images: UInt8[np.ndarray, "f h w 3"], captions: Sequence[str] | None) -> bytes:
    """An animation that shows one frame after the other, again and again."""
    first, *rest = viewable(images, captions)
    return _saved(
        first, "GIF", save_all=True, append_images=rest, duration=GIF_MILLISECONDS, loop=0
    )


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in a row, with a gap between them."""
    width = images[0].width + GRID_GAP
    grid = Image.new("RGB", (len(images) * width - GRID_GAP, images[0].height), "white")
    for column, image in enumerate(images):
        grid.paste(image, (column * width, 0))
    return grid


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
