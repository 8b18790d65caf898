"""Frames made to be looked at: enlarged where they are small, each with its sentence under it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from font_roboto import font_files
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

VIEW_SIZE = 256  # pixels that the longer side of a frame has at least, enlarged
FONT_SIZE = 14  # pixels
MARGIN = 6  # pixels around a caption
MAX_LINES = 12  # of a caption; longer ones end in an ellipsis
PAPER, INK = (255, 255, 255), (32, 32, 32)


def viewable(
    frames: UInt8[np.ndarray, "f h w 3"], captions: Sequence[str] | None
) -> list[Image.Image]:
    """Frames of one size for a grid or an animation.

    Args:
        frames: levels 0 to 255; enlarged by an integer factor, so that pixels stay sharp squares.
        captions: one sentence a frame, written under it; None for bare frames.
    """
    height, width = frames.shape[1:3]
    factor = -(-VIEW_SIZE // max(height, width))
    size = (width * max(factor, 1), height * max(factor, 1))
    images = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]
    if captions is None:
        return images
    font = ImageFont.truetype(font_files["Roboto"], FONT_SIZE)  # Latin, Greek and Cyrillic letters
    texts = [wrap(caption, font, size[0] - 2 * MARGIN) for caption in captions]
    bottom = size[1] + 2 * MARGIN + _text_height("\n".join(max(texts, key=len)), font)
    return [_write_under(*pair, font, bottom) for pair in zip(images, texts, strict=True)]


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, and at most `MAX_LINES`; a longer word is split."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + " …"]
    return lines


def _write_under(
    image: Image.Image,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    height: int,
) -> Image.Image:
    page = Image.new("RGB", (image.width, height), PAPER)
    page.paste(image)
    corner = (MARGIN, image.height + MARGIN)
    ImageDraw.Draw(page).multiline_text(corner, "\n".join(lines), INK, font)
    return page


def _text_height(text: str, font: ImageFont.FreeTypeFont) -> int:
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    # With ascender and descender in it, so that captions of few letters are as high as others.
    first, *rest = text.split("\n")
    box = canvas.multiline_textbbox((0, 0), "\n".join([first + "Ég", *rest[:-1], "Ég"]), font=font)
    return int(np.ceil(box[3]))
