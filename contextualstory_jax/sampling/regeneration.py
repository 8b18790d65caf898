"""Some frames of a story generated again, while the others stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from contextualstory_jax.config.model_config import UNetConfig
from contextualstory_jax.sampling.arguments import SEEDS, check_integer, read_frames
from contextualstory_jax.sampling.prompts import Kept, Story
from contextualstory_jax.sampling.sample import Generated
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.utils.errors import UserError, require


@runtime_checkable
class GeneratedStory(Protocol):
    """A dataclass of a story with its frames, such as a story folder's content."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def story(self) -> Story:
        """Its sentences and id."""
        ...

    @property
    def images(self) -> UInt8[np.ndarray, "f h w 3"]:
        """Its frames."""
        ...

    @property
    def latents(self) -> Float32[np.ndarray, "f p q c"] | None:
        """The frames' latents; None: the VAE encodes the images."""
        ...

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of each frame, None for one's own image."""
        ...


S = TypeVar("S", bound=GeneratedStory)


def regenerate(
    draw: Callable[..., Generated],
    unet: UNetConfig,
    story: S,
    frames: Any,
    seed: Any,
    near: bool,
    options: dict[str, Any],
) -> S:
    """The story with new frames; see `StoryPipeline.regenerate`.

    Args:
        draw: `StoryPipeline.draw` of the model that `unet` is of.
    """
    asked, images = story.story, np.asarray(story.images)
    again = read_frames(frames, unet, len(asked.sentences))
    seed = check_integer("seed", seed, *SEEDS)
    if unet.is_continuation:
        asked = asked._replace(first_frame=images[0])
    if isinstance(story, SavedStory):
        options = story.options() | options
    keep = tuple(i not in again for i in range(len(asked.sentences)))
    if images.ndim == 4:
        options = {"size": images.shape[1:3], **options}
    if near:
        options["shared_noise_seed"] = seed_of([story.seeds[i] for i in again])
    kept = [Kept(images, story.latents, keep)] if any(keep) else None
    generated = draw([asked], kept=kept, seed=seed, **options)
    if isinstance(story, SavedStory):
        new = story.regenerated(generated.images[0], generated.latents[0], keep, seed, options)
        return cast(S, new)
    seeds = tuple(old if kept else seed for old, kept in zip(story.seeds, keep, strict=True))
    return dataclasses.replace(
        story, images=generated.images[0], latents=generated.latents[0], seeds=seeds
    )


def seed_of(seeds: list[int | None]) -> int:
    """The seed that frames to stay near to were generated from."""
    seed = seeds[0]
    if seed is None:
        raise UserError("a frame that is an image of one's own has no noise to stay near to")
    require(
        len(set(seeds)) == 1,
        f"the frames to stay near to have several seeds, {', '.join(map(str, seeds))}; "
        "generate them again one by one",
    )
    return seed
