"""Reader of synthetic stories' images, rendered or generated: which characters and scene.

A character is present where the pixels near its colour form its outline: the best cosine
similarity, over all positions, of that mask with the mask of the character as rendered, standing
or asleep, sharp or blurred. On rendered frames it is at least 0.88 for characters they show and at
most 0.6 for others; `PRESENT` lies between, so that noise of 15 to 25 grey levels and a blur of up
to a fortieth of the side are still read correctly, while noise, specks and smears are no character.
Mostly the colour decides: a red square fits a circle well enough, an orange cross no triangle.

The scene is the one whose rows have the nearest colours, if any is near.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFilter

from contextualstory_jax.data.shapes import CAST, RADIUS, SCENES, Figure, draw_figure, draw_scene

NEAR, FAR = 50.0, 95.0  # RGB distances (0-255) up to which a pixel surely, and at all, has a colour
PRESENT = 0.72  # cosine similarity
MARGIN = 0.06  # of the side, around a body, where its colour counts against it
BLUR = 0.025  # of the side: the blur at which a shape is still recognised
SCENE_CAP = 120.0  # RGB distance; farther pixels, such as a character's, count as this far
SCENE_LIMIT = 75.0  # mean RGB distance beyond which an image shows none of the scenes
GREY = 128.0  # a background unlike any character, to render outlines on

COLOURS = np.array([character.colour for character in CAST.values()], np.float32)


class FrameReading(NamedTuple):
    """Content of an image; `scene` is None where none is near."""

    characters: frozenset[str]
    scene: str | None


def read_frames(images: UInt8[np.ndarray, "n h h 3"]) -> list[FrameReading]:
    """Read square images of 32 pixels or more a side."""
    present = _outline_fit(images) > PRESENT
    scenes = _scene_distances(images)
    names, places = np.array(list(CAST)), list(SCENES)
    return [
        FrameReading(
            frozenset(names[here].tolist()),
            places[far.argmin()] if far.min() < SCENE_LIMIT else None,
        )
        for here, far in zip(present, scenes, strict=True)
    ]


def _outline_fit(images: UInt8[np.ndarray, "n h h 3"]) -> Float32[np.ndarray, "n k"]:
    """Best cosine similarity of colour masks with rendered characters, over positions and looks."""
    size = images.shape[1]
    outlines = _outlines(size)
    half = outlines.shape[-1] // 2
    # Borders are repeated, lest a flat patch in a corner look like a shape on nothing.
    masks = np.pad(_colour_masks(images), ((0, 0), (half, half), (half, half), (0, 0)), mode="edge")
    width = size + 2 * half

    def spectrum(x: np.ndarray) -> np.ndarray:
        return np.fft.rfft2(x, (width, width))

    def slide(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """Sums under the kernel at each position whose window does not wrap around."""
        return np.fft.irfft2(x * np.conj(kernel), (width, width))[:, :size, :size]

    window = spectrum(np.ones(outlines.shape[-2:], np.float32))
    fit = np.zeros((len(images), len(CAST)), np.float32)
    for who in range(len(CAST)):
        seen = masks[..., who].any(axis=(1, 2))
        mask = masks[seen, ..., who]
        # No floor would let the rounding of empty windows look like a fit.
        length = np.sqrt(np.maximum(slide(spectrum(mask**2), window), 1.0))
        for outline in outlines[who]:
            cosine = slide(spectrum(mask), spectrum(outline)) / length
            fit[seen, who] = np.maximum(fit[seen, who], cosine.max(axis=(1, 2)))
    return fit


def _colour_masks(
    pictures: UInt8[np.ndarray, "*n 3"],
) -> Float32[np.ndarray, "*n k"]:
    """Confidence, 0 to 1, that a pixel has each character's colour; only the nearest counts."""
    distance = np.linalg.norm(pictures[..., None, :].astype(np.float32) - COLOURS, axis=-1)
    sure = np.clip((FAR - distance) / (FAR - NEAR), 0, 1)
    return np.where(distance == distance.min(axis=-1, keepdims=True), sure, 0)


@functools.cache
def _outlines(size: int) -> Float32[np.ndarray, "k look h w"]:
    """Masks of unit length: each character standing and asleep, sharp and blurred.

    Blur erodes tips and mixes colours, so that a blurred star's mask differs from a sharp one's.
    """
    half = round((RADIUS + MARGIN) * size)
    figures = (Figure("middle", "stand"), Figure("middle", "sleep"))
    looks = [(figure, blur) for figure in figures for blur in (0, BLUR * size)]
    outlines = np.zeros((len(CAST), len(looks), 2 * half, 2 * half), np.float32)
    for who, name in enumerate(CAST):
        for look, (figure, blur) in enumerate(looks):
            paint, cover = draw_figure(name, figure, size)
            picture = Image.fromarray(np.rint(paint + (1 - cover) * GREY).astype(np.uint8))
            blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)))
            mask = _colour_masks(blurred)[..., who]
            rows = np.flatnonzero(mask.any(axis=1))
            top = (rows[0] + rows[-1] + 1) // 2 - half
            outlines[who, look] = mask[top : top + 2 * half, size // 2 - half : size // 2 + half]
    return outlines / np.linalg.norm(outlines, axis=(2, 3), keepdims=True)


def _scene_distances(images: UInt8[np.ndarray, "n h h 3"]) -> Float32[np.ndarray, "n s"]:
    """Mean capped RGB distance of each image's pixels from the mean colour of their row."""
    size = images.shape[1]
    far = np.empty((len(images), len(SCENES)), np.float32)
    for column, scene in enumerate(SCENES):
        rows = draw_scene(scene, size).mean(axis=1, keepdims=True)
        distance = np.linalg.norm(images.astype(np.float32) - rows, axis=-1)
        far[:, column] = np.minimum(distance, SCENE_CAP).mean(axis=(1, 2))
    return far
