"""Stories in the formats that people pass on: a strip, an animation, a document, a video."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contextualstory_jax.sampling.captions import viewable
from contextualstory_jax.utils.errors import require

GIF_MILLISECONDS = 800  # a frame
GRID_GAP = 2  # pixels of white between the frames of a strip
PDF_COLUMNS = 5  # of the page with all frames
VIDEO_RATE = 25  # images a second
HOLD, FADE = 30, 10  # images of a video for which a frame stays, and changes to the next


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


def pdf(images: UInt8[np.ndarray, "f h w 3"], captions: Sequence[str] | None) -> bytes:
    """A document of a page for each frame, and one with all of them."""
    views = viewable(images, captions)
    dates = {"creationDate": None, "modDate": None}  # so that the same story is the same bytes
    pages = [*views[1:], side_by_side(views, PDF_COLUMNS)]
    quality = {"quality": 95, "subsampling": 0}  # of JPEG, which Pillow's PDF pages hold
    return _saved(views[0], "PDF", save_all=True, append_images=pages, **dates, **quality)


def mp4(images: UInt8[np.ndarray, "f h w 3"], captions: Sequence[str] | None) -> bytes:
    """A video in which each frame fades into the next.

    Raises `UserError` without PyAV.
    """
    check_formats(["mp4"])
    import av

    views = [np.asarray(view) for view in viewable(images, captions)]
    height, width = (side + side % 2 for side in views[0].shape[:2])  # H.264 takes even ones alone
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # One thread and no macroblock tree, for which x264 reads beyond the frame: so that the same
        # story is the same bytes.
        options = {"crf": "18", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", VIDEO_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for view in _with_fades(views):
            canvas = np.full((height, width, 3), 255, np.uint8)
            canvas[: view.shape[0], : view.shape[1]] = view
            container.mux(stream.encode(av.VideoFrame.from_ndarray(canvas, "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _with_fades(views: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Iterator[np.ndarray]:
    for i, view in enumerate(views):
        if i > 0:
            for share in np.arange(1, FADE + 1) / (FADE + 1):
                mixed = (1 - share) * views[i - 1] + share * view
                yield np.rint(mixed).astype(np.uint8)
        yield from [view] * HOLD


# Of each format the file in a story's folder and its bytes, of frames and captions.
FORMATS: dict[str, tuple[str, Callable[..., bytes]]] = {
    "strip": ("grid.png", strip),
    "pdf": ("story.pdf", pdf),
    "gif": ("story.gif", gif),
    "mp4": ("story.mp4", mp4),
}


def check_formats(names: Collection[str]) -> None:
    """Raise `UserError` for a format whose library is not installed."""
    require(
        "mp4" not in names or importlib.util.find_spec("av") is not None,
        "mp4 needs PyAV: pip install 'contextualstory-jax[studio]'",
    )


def contact_sheet(stories: UInt8[np.ndarray, "n f h w 3"], labels: Sequence[str]) -> bytes:
    """A PNG file with a row of frames for each version of a story, and its label below."""
    rows = [
        side_by_side(viewable(frames, [label, *[""] * (len(frames) - 1)]))
        for frames, label in zip(stories, labels, strict=True)
    ]
    return _saved(side_by_side(rows, columns=1), "PNG")


def side_by_side(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size in a row, or in rows of so many columns, with a gap between them."""
    columns = min(columns or len(images), len(images))
    width, height = images[0].width + GRID_GAP, images[0].height + GRID_GAP
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width - GRID_GAP, rows * height - GRID_GAP), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
