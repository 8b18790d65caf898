"""Pictures of stories: read, cut out and brought to size as the original does, with Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from contextualstory_jax.errors import UserError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise `UserError` with the path where a picture is missing or cannot be read."""
    try:
        yield
    except UserError:  # names the path itself
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no picture {path}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture; fetch it again") from error
    # Decoders raise all of these for files that are broken.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture; fetch it again") from error


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB. Raises `UserError` where it is missing or broken."""
    with naming(path), Image.open(path) as image:
        return image.convert("RGB")


def read_from_strip(path: Path, choice: int) -> Image.Image:
    """One of the square pictures that stand in a column, counted from the top and around.

    Raises `UserError` where the file is missing or broken. Source: reference `pororo.py`
    PororoDataset.sample_image.
    """
    with naming(path), Image.open(path) as image:
        side = min(image.size)
        top = choice % max(image.height // side, 1) * side
        return image.crop((0, top, side, top + side)).convert("RGB")


def read_from_array(path: Path, choice: int) -> Image.Image:
    """One of the pictures in a `.npy` file, uint8 (n, h, w, 3), counted around.

    Only that picture is read from the disk. Raises `UserError` where the file is missing, broken or
    holds something else.
    """
    with naming(path):
        pictures = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
        if pictures.dtype != np.uint8 or pictures.shape[3:] != (3,) or 0 in pictures.shape:
            raise ValueError(f"{pictures.dtype} {pictures.shape}")
        return Image.fromarray(np.ascontiguousarray(pictures[choice % len(pictures)]))


def fit_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "h h 3"]:
    """The short side brought to `size` pixels, bilinearly, and the middle cut out.

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
