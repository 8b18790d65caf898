"""Reader of synthetic stories' images, rendered or generated: who is there, where, and the scene.

It compares an image with what the renderer can render. The scene and the position of its scenery
are those of the nearest backdrop. Then each place holds the nearest of all characters in all poses
before that backdrop, or nobody. Where a character is nearest, it is there if it explains the pixels
that it covers much better than the empty backdrop does, and the pixels around it are as they should
be. A shape in between, a smear or half a ghost is nobody.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from contextualstory_jax.data.shapes import Figure
from contextualstory_jax.data.shapes_figures import (
    CAST,
    PLACES,
    UNIT,
    Pose,
    render_character,
    strip_columns,
)
from contextualstory_jax.data.shapes_scenes import SCENES, TURNS, render_scene

CAP = 120.0  # RGB distance (0-255); farther pixels count as this far
SCENE_LIMIT = 60.0  # mean RGB distance beyond which an image shows none of the scenes
# A character is there below these shares of the backdrop's distance from the pixels it covers.
PRESENT, AROUND = 0.7, 0.5  # on them; around them
RING = (1, 4)  # pixels from a character, of an image of 64: nearer ones may be blurred
BACKDROPS = [(scene, turn) for scene in SCENES for turn in range(TURNS)]
LOOKS = [(name, pose) for name in CAST for pose in get_args(Pose)]


class FrameReading(NamedTuple):
    """Content of an image: characters with place and pose, the scene, and its scenery's position.

    A character that is shown twice is there twice. Scene and turn are None where none is near, and
    then nobody is read.
    """

    figures: tuple[tuple[str, Figure], ...]
    scene: str | None
    turn: int | None

    @property
    def characters(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(sorted(name for name, _ in self.figures))


def read_frames(images: UInt8[np.ndarray, "n h h 3"]) -> list[FrameReading]:
    """Read square images of 32 pixels or more a side."""
    return [_read(image.astype(np.float32)) for image in images]


def _read(image: Float32[np.ndarray, "h h 3"]) -> FrameReading:
    far = _distance(image, _backdrops(len(image))).mean(axis=(1, 2))
    if far.min() > SCENE_LIMIT:
        return FrameReading((), None, None)
    scene, turn = BACKDROPS[far.argmin()]
    looks, bodies, surroundings = _looks(scene, len(image))
    figures = []
    for place in PLACES:
        columns = strip_columns(place, len(image))
        strip, backdrop = image[:, columns], render_scene(scene, turn, len(image))[:, columns]
        somebody = _distance(strip, backdrop * (1 - looks[..., 3:]) + looks[..., :3])
        nearest = somebody.sum(axis=(1, 2)).argmin()
        body, around = bodies[nearest], surroundings[nearest]
        here, near = (somebody[nearest][mask].mean() for mask in (body, around))
        empty = _distance(strip, backdrop)[body].mean()
        if here < PRESENT * empty and near < AROUND * empty:
            name, pose = LOOKS[nearest]
            figures.append((name, Figure(place, pose)))
    return FrameReading(tuple(figures), scene, turn)


def _distance(
    image: Float32[np.ndarray, "h w 3"], others: Float32[np.ndarray, "*n h w 3"]
) -> Float32[np.ndarray, "*n h w"]:
    """Capped RGB distance of each pixel."""
    difference = image - others
    return np.minimum(np.sqrt(np.einsum("...c,...c->...", difference, difference)), CAP)


@functools.cache
def _backdrops(size: int) -> Float32[np.ndarray, "s h w 3"]:
    return np.stack([render_scene(scene, turn, size) for scene, turn in BACKDROPS])


@functools.cache
def _looks(
    scene: str, size: int
) -> tuple[
    Float32[np.ndarray, "k h strip 4"],
    Bool[np.ndarray, "k h strip"],
    Bool[np.ndarray, "k h strip"],
]:
    """Every character in every pose by a scene's light, the pixels that each covers, and around."""
    layers = [
        np.concatenate(render_character(name, pose, SCENES[scene].light, size), axis=-1)
        for name, pose in LOOKS
    ]
    looks = np.stack(layers)
    bodies = looks[..., 3] > 0.6  # more than a shadow
    near, far = (_grown(bodies, pixels * size / UNIT) for pixels in RING)
    return looks, bodies, far & ~near


def _grown(masks: Bool[np.ndarray, "k h w"], pixels: float) -> Bool[np.ndarray, "k h w"]:
    """Masks grown by a number of pixels on all sides."""
    margin = round(pixels)
    padded = np.pad(masks, ((0, 0), (margin, margin), (margin, margin)))
    window = (2 * margin + 1,) * 2
    return np.lib.stride_tricks.sliding_window_view(padded, window, (1, 2)).any(axis=(-2, -1))
