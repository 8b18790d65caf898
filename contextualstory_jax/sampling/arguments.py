"""The arguments of a pipeline call, brought to one form and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from contextualstory_jax.config.model_config import (
    CameraMotion,
    FrameInitConfig,
    ModelConfig,
    NoiseConfig,
    SamplingConfig,
    UNetConfig,
)
from contextualstory_jax.data.example import Example
from contextualstory_jax.data.images import read_image, to_rgb
from contextualstory_jax.sampling.prompts import (
    MOST_SENTENCES,
    Kept,
    Story,
    check_text,
    fit_image,
)
from contextualstory_jax.sampling.sample import fill
from contextualstory_jax.utils.errors import require

OutputType = Literal["np", "pil", "latent"]
SEEDS = (0, 2**32 - 1)
FirstFrame = Image.Image | UInt8[np.ndarray, "_ _ 3"] | str | os.PathLike[str]


def shown(value: Any) -> str:
    """A value in an error message: on one line, and short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer argument in [least, most]. Raises `UserError` for anything else."""
    allowed = f"of at least {least}" if most is None else f"in {least}..{most}"
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(
        number and bool(least <= value) and (most is None or bool(value <= most)),
        f"{name} must be an integer {allowed}; got {shown(value)}",
    )
    return int(value)


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise `UserError` unless an argument is one of the names that are known."""
    require(
        isinstance(value, str) and value in known,
        f"{name} must be one of {', '.join(known)}; got {shown(value)}",
    )


def read_stories(sentences: Any) -> tuple[list[Story], bool]:
    """The stories of a call, and whether it is one story alone.

    Args:
        sentences: the sentences of one story, a `Story`, or a list of either. Stories given as
            lists of sentences have the ids `story_0`, `story_1` and so on, one alone `story`.

    Raises:
        UserError: where it is none of these.
    """
    if isinstance(sentences, Story):
        return [sentences], True
    items = _items("sentences", sentences)
    if all(isinstance(item, str) for item in items):
        return [Story(tuple(items))], True
    if any(isinstance(item, str) for item in items):
        for i, item in enumerate(items):
            check_text(item, f"sentences[{i}]")
    stories = [
        item
        if isinstance(item, Story)
        else Story(tuple(_items(f"sentences[{i}]", item)), f"story_{i}")
        for i, item in enumerate(items)
    ]
    return stories, False


def stories_of(examples: Iterable[Example], unet: UNetConfig) -> list[Story]:
    """The stories to generate beside a dataset's, with their context where the dataset knows it.

    In continuation with their first frames.
    """
    return [
        Story(
            example.sentences,
            example.story_id,
            example.images[0] if unet.is_continuation else None,
            dict(enumerate(example.restated or ())),
        )
        for example in examples
    ]


def _items(name: str, value: Any) -> list[Any]:
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    require(listed, f"{name} must be a list of sentences or of stories; got {shown(value)}")
    return list(value)


def put_first_frames(
    stories: Sequence[Story], image: Any, single: bool, size: tuple[int, int] | None
) -> list[Story]:
    """Stories with their first frames.

    Args:
        image: of one story an image, of several a list with one each.
        size: height and width that images are cropped and resized to, if any.

    Raises:
        UserError: where there are too few or too many, and for what is no image.
    """
    images = [image] if single else image
    require(
        isinstance(images, list | tuple) and len(images) == len(stories),
        f"image must be a list of {len(stories)} images, one a story; got {shown(image)}",
    )
    names = ["image"] if single else [f"image[{i}]" for i in range(len(images))]
    return [
        story._replace(first_frame=read_first_frame(name, image, size))
        for story, name, image in zip(stories, names, images, strict=True)
    ]


def read_first_frame(
    name: str, image: Any, size: tuple[int, int] | None
) -> UInt8[np.ndarray, "h w 3"]:
    """An image from a PIL image, an array or a path, cropped in the middle and resized to `size`.

    Raises `UserError` where it is none of these or cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = read_image(Path(image))
    elif isinstance(image, Image.Image):
        image = to_rgb(ImageOps.exif_transpose(image), name)
    array = np.asarray(image)
    require(
        _is_image(array),
        f"{name} must be a PIL image, a path or a uint8 array of shape height x width x 3; got "
        + (f"{array.dtype} of shape {array.shape}" if array.ndim else shown(image)),
    )
    return array if size is None else fit_image(array, *size)


def _is_image(array: np.ndarray, size: tuple[int, int] | None = None) -> bool:
    return (
        array.dtype == np.uint8
        and array.ndim == 3
        and array.shape[2] == 3
        and array.size > 0
        and size in (None, array.shape[:2])
    )


def read_size(config: ModelConfig, height: Any, width: Any) -> tuple[int, int]:
    """Height and width in pixels, by default the model's own.

    Raises `UserError` for a size that the model cannot generate.
    """
    size = (
        config.height if height is None else check_integer("height", height, 1),
        config.width if width is None else check_integer("width", width, 1),
    )
    config.latent_size(*size)
    return size


def read_sampling(
    config: ModelConfig, base: SamplingConfig | None, **values: Any
) -> SamplingConfig:
    """Steps, scheduler and scales: `values` that are not None, else those of `base` or the model.

    Raises `UserError` for values out of range.
    """
    base = config.sampling if base is None else base
    require(
        isinstance(base, SamplingConfig), f"sampling must be a SamplingConfig; got {shown(base)}"
    )
    given = {name: value for name, value in values.items() if value is not None}
    if "num_inference_steps" in given:
        most = config.scheduler.num_train_timesteps
        steps = check_integer("num_inference_steps", given.pop("num_inference_steps"), 1, most)
        given["steps"] = steps
    sampling = dataclasses.replace(base, **given)
    require(
        sampling.image_guidance_scale <= 1 or config.unet.is_continuation,
        "image_guidance_scale above 1 needs a continuation model; leave it at 1",
    )
    return sampling


def check_stories(stories: Sequence[Story], unet: UNetConfig, size: tuple[int, int] | None) -> None:
    """Raise `UserError` for stories that the model cannot generate.

    Args:
        size: height and width that first frames must have, None for any.
    """
    require(len(stories) > 0, "no stories to generate")
    for story in stories:
        require(isinstance(story.id, str), f"a story's id must be a string; got {shown(story.id)}")
        name, image = f"story {story.id!r}", story.first_frame
        for sentence in _items(f"{name}: sentences", story.sentences):
            check_text(sentence, name)
        require(
            1 <= len(story.sentences) <= MOST_SENTENCES,
            f"{name} has {len(story.sentences)} sentences; write 1 to {MOST_SENTENCES}",
        )
        require(
            unet.is_continuation or image is None,
            f"{name} has a first frame, but the model needs sentences alone; leave it out",
        )
        require(
            not unet.is_continuation or image is not None,
            f"{name} has no first frame, but the model continues from one; give an image",
        )
        require(
            image is None or (isinstance(image, np.ndarray) and _is_image(image, size)),
            f"{name}: the first frame must be a uint8 array of shape "
            + ("{} x {} x 3".format(*size) if size else "height x width x 3"),
        )


def check_frameinit(frameinit: Any, camera_motion: Any, unet: UNetConfig) -> None:
    """Raise `UserError` where the model or the other argument does not fit."""
    require(
        frameinit is None or isinstance(frameinit, FrameInitConfig),
        f"frameinit must be a FrameInitConfig; got {shown(frameinit)}",
    )
    require(
        frameinit is None or unet.is_continuation,
        "frameinit needs a first frame, but the model needs sentences alone; leave it out",
    )
    if camera_motion is not None:
        check_choice("camera_motion", camera_motion, typing.get_args(CameraMotion))
    require(
        camera_motion is None or frameinit is not None,
        "camera_motion makes the clip that frameinit starts from; choose its filter too",
    )


def read_storyflow(storyflow: Any, unet: UNetConfig) -> Float32[np.ndarray, " m"]:
    """Scene changes as an array. Raises `UserError` where the model cannot use them."""
    require(unet.use_motion_condition, "this model has no StoryFlow Adapter; leave storyflow out")
    try:
        motion = np.asarray(storyflow, np.float32)
    except (TypeError, ValueError):
        motion = np.full(0, np.nan, np.float32)
    require(
        motion.shape in ((unet.n_frames - 1,), (unet.n_frames,))
        and bool(np.all((motion >= 0) & (motion < np.inf))),
        f"storyflow must be {unet.n_frames - 1} finite numbers, one from each frame to the next"
        f" (or {unet.n_frames}), at least 0; got {shown(storyflow)}",
    )
    return motion


def read_negative_prompt(negative_prompt: Any, frames: int) -> list[str]:
    """Negative prompts, one for all frames or one each; an empty one where there is none.

    Raises `UserError` for other numbers of them, and for what is no text.
    """
    if negative_prompt is None or isinstance(negative_prompt, str):
        prompts = [negative_prompt or ""]
    else:
        listed = isinstance(negative_prompt, list | tuple) and len(negative_prompt) == frames
        require(
            listed,
            f"negative_prompt must be a string or a list of {frames}, one a frame; got "
            + shown(negative_prompt),
        )
        prompts = list(negative_prompt)
    return [check_text(prompt, "negative_prompt") for prompt in prompts]


def read_latents(latents: Any, shape: tuple[int, ...]) -> Float32[np.ndarray, "b f p q c"]:
    """Initial latents; those of one story may come without the axis of stories.

    Raises `UserError` for another dtype or shape, and where values are not finite.
    """
    array = np.asarray(latents) if isinstance(latents, np.ndarray | jax.Array) else np.empty(0)
    array = array[None] if array.ndim == 4 and shape[0] == 1 else array
    require(
        array.shape == shape and array.dtype == np.float32,
        f"latents must be float32 of shape {shape} (stories, frames, h, w, c); got "
        + (f"{array.dtype} of shape {array.shape}" if array.size else shown(latents)),
    )
    require(bool(np.isfinite(array).all()), "latents must be finite; sample them again")
    return array


def read_seeds(seed: Any, stories: int) -> list[int]:
    """A seed for each story, of one for all or a sequence of one each.

    Raises `UserError` where there are too few or too many, and for what is no seed.
    """
    if not isinstance(seed, list | tuple | np.ndarray):
        return [check_integer("seed", seed, *SEEDS)] * stories
    require(
        len(seed) == stories,
        f"seed must be an integer or {stories}, one a story; got {shown(seed)}",
    )
    return [check_integer(f"seed[{i}]", value, *SEEDS) for i, value in enumerate(seed)]


def check_shared_noise(seed: Any, initial_latents: Any, noise: NoiseConfig) -> None:
    """Raise `UserError` unless the noise that is sampled has a shared part for this seed."""
    if seed is None:
        return
    check_integer("shared_noise_seed", seed, *SEEDS)
    require(
        noise.kind == "pyoco_mixed",
        f"shared_noise_seed is for noise with a shared part, and this model's is {noise.kind}; "
        "leave it out",
    )
    require(
        initial_latents is None,
        "shared_noise_seed is for noise that is sampled, and latents are given; leave one out",
    )


def read_kept(
    kept: Any, stories: Sequence[Story], shape: tuple[int, ...], size: tuple[int, int]
) -> list[Kept | None]:
    """The frames that each story keeps, None where it keeps none.

    Args:
        shape: of a frame's latents.
        size: height and width of its image.

    Raises:
        UserError: where there are too few or too many, and where they do not fit the model.
    """
    if kept is None:
        return [None] * len(stories)
    require(
        isinstance(kept, list | tuple) and len(kept) == len(stories),
        f"kept must be a list of {len(stories)}, a Kept or None for each story; got {shown(kept)}",
    )
    for i, one in enumerate(kept):
        if one is not None:
            _check_kept(f"kept[{i}]", one, (len(stories[i].sentences), *shape), size)
    return list(kept)


def _check_kept(name: str, kept: Any, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    require(isinstance(kept, Kept), f"{name} must be a Kept or None; got {shown(kept)}")
    keep = np.array(kept.keep)
    require(
        keep.dtype == bool and keep.shape == shape[:1],
        f"{name}: keep must be {shape[0]} booleans, one a frame; got {shown(kept.keep)}",
    )
    require(
        not keep.all(), f"{name} keeps every frame, and nothing is generated; keep fewer of them"
    )
    for part, dtype, expected in (
        ("images", np.uint8, (*shape[:1], *size, 3)),
        ("latents", np.float32, shape),
    ):
        array = getattr(kept, part)
        if part == "latents" and array is None:
            return
        require(
            isinstance(array, np.ndarray) and (array.dtype, array.shape) == (dtype, expected),
            f"{name}: {part} must be {np.dtype(dtype)} of shape {expected} for this model and "
            "size; got "
            + (
                f"{array.dtype} of shape {array.shape}"
                if isinstance(array, np.ndarray)
                else shown(array)
            ),
        )
    require(
        bool(np.isfinite(kept.latents[keep]).all()),
        f"{name}: latents must be finite; give None, and the images are encoded",
    )


def read_frames(frames: Any, unet: UNetConfig, count: int) -> list[int]:
    """Numbers of those of `count` frames to generate again.

    Raises `UserError` for those that cannot be.
    """
    first, last = int(unet.is_continuation), count - 1
    numbers = list(frames) if isinstance(frames, list | tuple | range) else []
    require(
        len(numbers) > 0,
        f"frames must be a list of the frames to generate again, in {first}..{last}; got "
        + shown(frames),
    )
    return [check_integer(f"frames[{i}]", n, first, last) for i, n in enumerate(numbers)]


def as_output(
    output_type: OutputType, images: UInt8[np.ndarray, "b f h w 3"], latents: np.ndarray
) -> Any:
    """Generated stories in the form that a call asks for."""
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in story] for story in images]
    return images if output_type == "np" else latents


def read_replaced_latents(
    latents: Any, shape: tuple[int, ...], batch_size: int
) -> Float32[jax.Array, "b g p q c"]:
    """Latents that a callback gave, the last repeated up to the size of the batch."""
    require(
        np.shape(latents) == shape and jnp.issubdtype(np.result_type(latents), jnp.floating),
        f"callback_on_step_end must return latents of shape {shape}; got {np.shape(latents)}",
    )
    return jnp.asarray(latents, jnp.float32)[np.array(fill(range(len(latents)), batch_size))]
