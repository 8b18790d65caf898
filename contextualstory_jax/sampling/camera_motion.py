"""A still image filmed by a moving camera: the clips that FrameInit may start from.

Numbers are float32 levels 0 to 255. Images are resized without antialiasing, as in the original.
Source: reference pipeline_conditional_animation.py pan_left, pan_right, zoom_in, zoom_out.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, UInt8

ZOOM = 1.5  # how much narrower the closest view is than the widest


def film(
    image: UInt8[np.ndarray, "r s 3"], motion: str, frames: int, height: int, width: int
) -> Float32[np.ndarray, "f h w 3"]:
    """A clip of `frames` views of `height` x `width` pixels; `motion` is one of `CameraMotion`.

    A pan crosses an image wider than the view, and holds still on one that is not; a zoom goes to,
    or starts from, the image's middle. Each stops a step before its end.
    """
    # Parity: view i is i / frames of the way along.
    shares = [i / frames for i in range(frames)]
    if motion in ("zoom_in", "zoom_out"):
        whole = _cover(image, 2 * height, 2 * width)
        views = [_middle(whole, _zoom(motion, share, 2 * height, 2 * width)) for share in shares]
        return np.stack([resize(view, height, width) for view in views])
    whole = _cover(image, height, width)
    whole = _middle(whole, (height, whole.shape[1]))
    space = whole.shape[1] - width
    lefts = [int(space * (share if motion == "pan_right" else 1 - share)) for share in shares]
    return np.stack([whole[:, left : left + width] for left in lefts])


def _zoom(motion: str, share: float, height: int, width: int) -> tuple[int, int]:
    """The size of the view of an image of `height` x `width`, `share` of the way along."""

    def side(widest: int) -> int:
        closest = int(widest // ZOOM)
        way = int((widest - closest) * share)
        return widest - way if motion == "zoom_in" else closest + way

    return side(height), side(width)


def _middle(
    image: Float32[np.ndarray, "r s 3"], size: tuple[int, int]
) -> Float32[np.ndarray, "h w 3"]:
    top, left = ((image.shape[axis] - size[axis]) // 2 for axis in (0, 1))
    return image[top : top + size[0], left : left + size[1]]


def _cover(
    image: UInt8[np.ndarray, "r s 3"], height: int, width: int
) -> Float32[np.ndarray, "h w 3"]:
    """The image in its own proportions, as small as covers `height` x `width`."""
    rows, columns = image.shape[:2]
    if rows * width >= columns * height:
        return resize(image, math.floor(rows * width / columns), width)
    return resize(image, height, math.floor(columns * height / rows))


def resize(
    image: UInt8[np.ndarray, "r s 3"] | Float32[np.ndarray, "r s 3"], height: int, width: int
) -> Float32[np.ndarray, "h w 3"]:
    """Bilinear between the four nearest pixels. Source: torch interpolate, align_corners=False."""
    image = image.astype(np.float32)
    for axis, n in enumerate((height, width)):
        last = image.shape[axis] - 1
        places = np.clip((np.arange(n) + 0.5) * (last + 1) / n - 0.5, 0, last)
        low = places.astype(int)
        share = (places - low).astype(np.float32).reshape((-1, 1, 1)[: 3 - axis])
        above = image.take(np.minimum(low + 1, last), axis)
        image = image.take(low, axis) * (1 - share) + above * share
    return image
