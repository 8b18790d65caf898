"""Images of stories, read and resized with Pillow as the original does.

Users' own files come in many formats. An image that was read is 8-bit RGB and upright, white where
it was transparent, and the first frame of an animation. A format that cannot be converted to that
is refused by name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import check_file

MOST_PIXELS = 2**26  # 8192 x 8192: decoded and converted within 1 GB of memory
MOST_ASPECT = 20  # long side over short side
MOST_IN_FILE = 500  # images of a column or an array: 94 MiB at 256 x 256 pixels
UNKNOWN_RANGE = {"I": "32-bit integers", "F": "floating-point numbers"}

logger = logging.getLogger(__name__)
remarks: dict[str, str] = {}  # what was logged, and the image that it was first true of


def remark(what: str, name: str) -> None:
    """Log what was done to an image, once in this process."""
    if what not in remarks:
        remarks[what] = name
        logger.warning("%s %s (logged once)", name, what)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise `UserError` with the path where an image is missing or cannot be read."""
    check_file(path, "put an image there")
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image; replace it") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has over {MOST_PIXELS} pixels; scale it down") from error
    # Decoders raise almost anything for files that are broken.
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image; replace it") from error


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, decoded and upright. Raises `UserError` where it is missing or broken."""
    with naming(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is stricter
            image = Image.open(path)
        with image:
            check_size(image.width, image.height, path)
            # A camera's MPO file holds previews beside its one image.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                remark("has several frames; the first is used", str(path))
            ImageOps.exif_transpose(image, in_place=True)
            yield image


def read_image(path: Path) -> Image.Image:
    """An image file in RGB, upright.

    Raises `UserError` where it is missing or broken, too large or too narrow, or `to_rgb` does.
    """
    with opened(path) as image:
        check_aspect(image.width, image.height, path)
        return to_rgb(image, str(path))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image in 8-bit RGB, on white where it is transparent; 16-bit greys are scaled.

    Args:
        image: Image as Pillow opened it.
        name: Name of the image in messages.

    Raises:
        UserError: The range of the pixel values is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        require(
            "transparency" not in image.info,
            f"{name} has a transparent 16-bit grey; save it with 8 bits",
        )
        image = image.convert("I").point(lambda grey: grey * (1 / 257) + 0.5).convert("L")
    require(
        image.mode not in UNKNOWN_RANGE,
        f"{name} holds {UNKNOWN_RANGE.get(image.mode)} (mode {image.mode}) in an unknown range; "
        "save it with 8 or 16 bits",
    )
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    opacity = image.getchannel("A")
    if opacity.getextrema() != (255, 255):
        remark("has transparent pixels; they become white", name)
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=opacity)
    return canvas


def check_size(width: int, height: int, path: Path) -> None:
    """Raise `UserError` for an image with too many pixels."""
    require(
        width * height <= MOST_PIXELS,
        f"{path} has {width} x {height} pixels, over {MOST_PIXELS}; scale it down",
    )


def check_aspect(width: int, height: int, path: Path) -> None:
    """Raise `UserError` for an image too narrow to be cut to a square."""
    short, long = sorted((width, height))
    require(
        long <= MOST_ASPECT * short,
        f"{path} has {width} x {height} pixels, an aspect ratio over 1:{MOST_ASPECT}; crop it",
    )


def check_count(count: int, path: Path) -> None:
    """Raise `UserError` for a file with too many images."""
    require(
        count <= MOST_IN_FILE, f"{path} has {count} images, over {MOST_IN_FILE}; leave some out"
    )


def read_column(path: Path) -> list[Image.Image]:
    """The square images stacked in a column, from the top.

    Raises `UserError` where the file is missing or broken. Source: reference `pororo.py`
    PororoDataset.sample_image.
    """
    with opened(path) as image:
        side = min(image.size)
        count = max(image.height // side, 1)
        check_count(count, path)
        tops = range(0, count * side, side)
        return [to_rgb(image.crop((0, top, side, top + side)), str(path)) for top in tops]


def read_from_array(path: Path, choice: int) -> Image.Image:
    """One of the images in a `.npy` file, uint8 (n, h, w, 3); `choice` is taken modulo n.

    Only that image is read from the disk. Raises `UserError` where the file is missing, broken or
    holds something else.
    """
    with naming(path):
        with np.errstate(over="ignore"):  # of a shape that is absurd, and refused
            images = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or 0 in images.shape:
            raise ValueError(f"{images.dtype} {images.shape}")
        count, height, width, _ = images.shape
        check_count(count, path)
        check_size(width, height, path)
        check_aspect(width, height, path)
        return Image.fromarray(np.ascontiguousarray(images[choice % len(images)]))


def fit_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "h h 3"]:
    """Resize the short side to `size` pixels, bilinearly, and crop the centre.

    Source: torchvision's Resize and CenterCrop on Pillow images, whose filter grows with the
    reduction. What the original resizes without a crop is square.
    """
    short, long = sorted(image.size)
    other = int(size * long / short)
    width, height = (size, other) if image.width == short else (other, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if width != height:
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)
