"""Input of clients, checked before anything is done with it."""

from __future__ import annotations

import base64
import binascii
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from contextualstory_jax.config.model_config import SamplingConfig, UNetConfig
from contextualstory_jax.data.images import read_image
from contextualstory_jax.sampling import prompts
from contextualstory_jax.sampling.arguments import check_integer, read_sampling
from contextualstory_jax.sampling.prompts import MOST_CHARACTERS, Story, check_sentence, check_story
from contextualstory_jax.studio.limits import MOST_BYTES, TOO_LARGE
from contextualstory_jax.studio.worker import Model
from contextualstory_jax.utils.errors import UserError, brief, require

MOST_STEPS = 250


class Settings(NamedTuple):
    """Everything that a client may choose beside the sentences; None: the model's own."""

    seed: Any = 0
    steps: Any = None
    guidance: Any = None
    storyflow: Any = None  # a list, one number from each frame to the next

    def sampling(self, model: Model, base: SamplingConfig | None) -> SamplingConfig:
        """Steps and scales, all else of `base`, by default the model's.

        Raises:
            UserError: For values out of range.
        """
        if self.steps is not None:
            check_integer("steps", self.steps, 1, MOST_STEPS)
        if self.guidance is not None:
            number = isinstance(self.guidance, int | float) and 0 <= self.guidance <= 100
            require(number, f"guidance must be a number in 0..100; got {brief(self.guidance)}")
        scale = None if self.guidance is None else float(self.guidance)
        return read_sampling(
            model.config, base, num_inference_steps=self.steps, guidance_scale=scale
        )


def read_story(sentences: Any) -> Story:
    """A story of text lines. Raises `UserError` for too few, too many or too long ones."""
    require(isinstance(sentences, list | tuple), "sentences must be a list of strings")
    story = Story(tuple(check_sentence(sentence, "sentences") for sentence in sentences))
    check_story(story)
    return story


def read_context(context: Any, count: int) -> dict[int, str]:
    """The words that the model reads for some sentences where a window begins with them.

    Raises:
        UserError: For anything but an object of such words by sentence numbers.
    """
    words = prompts.read_context(context, count, "context")
    for i, text in words.items():
        require(
            len(text) <= MOST_CHARACTERS,
            f"context of sentence {i} has {len(text)} characters; write at most {MOST_CHARACTERS}",
        )
    return words


def read_storyflow(values: Any, unet: UNetConfig, count: int) -> tuple[float, ...] | None:
    """StoryFlow values of a window, or of each transition of a longer story."""
    if values is None or count == 1:
        return None
    require(unet.use_motion_condition, "this model has no StoryFlow Adapter; leave storyflow out")
    listed = [*values] if isinstance(values, list | tuple) else []
    require(
        len(listed) == count - 1
        and all(isinstance(value, int | float) and 0 <= value < math.inf for value in listed),
        f"storyflow must be {count - 1} finite numbers, one from each frame to the next, at least "
        f"0; got {brief(values)}",
    )
    padding = [listed[-1]] * max(unet.n_frames - count, 0)  # to frames that are dropped
    return tuple(float(value) for value in listed + padding)


def read_frame(name: str, number: Any, count: int) -> int:
    """The number of one of `count` frames. Raises `UserError` for anything else."""
    require(
        type(number) is int and 0 <= number < count,
        f"{name}: no frame {brief(number)}; they are numbered from 0 to {count - 1}",
    )
    return number


def read_own_images(images: Any, count: int) -> dict[int, np.ndarray]:
    """One's own images by the frames that they are to be."""
    require(images is None or isinstance(images, dict), "images must be an object of data URLs")
    numbers = {str(i): i for i in range(count)}  # JSON's keys are strings
    return {
        read_frame("images", numbers.get(str(name), name), count): decode_image(data)
        for name, data in (images or {}).items()
    }


def decode_image(data: Any) -> np.ndarray:
    """An image from base64 or a data URL, decoded as `--first-frame` is.

    Raises:
        UserError: It is too large, or no image.
    """
    require(isinstance(data, str), "an image must be base64 text or a data URL")
    encoded = data.rpartition(",")[2]
    require(len(encoded) * 3 // 4 <= MOST_BYTES, TOO_LARGE)
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("the image is not base64; send it as a data URL") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        try:
            return np.asarray(read_image(path))
        except UserError as error:
            raise UserError(str(error).replace(str(path), "the upload")) from error
