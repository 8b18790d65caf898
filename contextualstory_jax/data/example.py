"""The element of every dataset: one story, its images and its sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

FRAMES = 5  # images, and sentences, per story


@dataclasses.dataclass(frozen=True)
class FrameLabels:
    """Ground truth of one frame, for metrics; a dataset fills in what it knows.

    `needs_context` says that the frame's own sentence does not name its characters or its scene.
    `poses` and `places` are by character.
    """

    characters: frozenset[str]
    scene: str | None = None
    needs_context: bool | None = None
    poses: Mapping[str, str] | None = None
    places: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A dataset's story with its images (RGB, 0-255); sentences, ids and labels, if known.

    `story_id` and `frame_ids` are unique in the dataset and fit as names of files. `restated` are
    the sentences with everybody and the scene named, where the dataset knows: the text of a window
    that begins with such a frame.
    """

    images: UInt8[np.ndarray, "f h w 3"]
    sentences: tuple[str, ...]
    frame_ids: tuple[str, ...]
    story_id: str
    labels: tuple[FrameLabels, ...] | None = None
    restated: tuple[str, ...] | None = None
