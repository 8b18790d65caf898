"""All candidate images of a frame, of which a source's `picture` takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from contextualstory_jax.data.flintstones import FlintstonesSource
from contextualstory_jax.data.images import read_column, read_from_array, read_image
from contextualstory_jax.data.pororo import PororoSource
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.data.story_source import StorySource


def candidates(source: StorySource) -> Callable[[Path], list[Image.Image]]:
    """The function that reads all images of a file; image n is `picture(path, n)`."""
    if isinstance(source, PreparedSource):
        return source.pictures
    if isinstance(source, FlintstonesSource):
        return read_array
    if isinstance(source, PororoSource) and source.captions == "original":
        return read_column
    return read_one


def read_one(path: Path) -> list[Image.Image]:
    """The image in a file. Raises `UserError` where it is missing or broken."""
    return [read_image(path)]


def read_array(path: Path) -> list[Image.Image]:
    """The images in a `.npy` file, as `read_from_array` chooses among them; raises as it does."""
    first = read_from_array(path, 0)
    count = len(np.lib.format.open_memmap(path, mode="r"))
    return [first, *(read_from_array(path, number) for number in range(1, count))]
