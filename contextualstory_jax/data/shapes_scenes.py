"""Scenes of the synthetic stories: backdrops, and the light that falls on characters there.

A backdrop is periodic in x, so that it can be turned sideways, and has landmarks that tell how far.
It is painted without anti-aliasing on a finer grid and averaged down. Lengths are fractions of the
image's side, y downwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from contextualstory_jax.data.shapes_figures import Colour, average_down, grid

Grid = Float[np.ndarray, "h w"]
Mask = Bool[np.ndarray, "h w"]


class Scene(NamedTuple):
    """A scene: how sentences name it, and its light, factors of red, green and blue."""

    phrase: str
    destination: str
    light: tuple[float, float, float]


SCENES = {
    "meadow": Scene("in the meadow", "to the meadow", (1.0, 1.0, 0.96)),
    "beach": Scene("on the beach", "to the beach", (1.06, 1.0, 0.9)),
    "snow": Scene("in the snow", "into the snow", (0.94, 0.98, 1.06)),
    "stars": Scene("under the stars", "out under the stars", (0.78, 0.8, 0.98)),
    "forest": Scene("in the forest", "into the forest", (0.9, 0.96, 0.84)),
    "city": Scene("in the city", "to the city", (1.0, 0.92, 0.9)),
}
TURNS = 8  # positions of the scenery; one a story


class Canvas:
    """A finer grid to paint a periodic backdrop on."""

    def __init__(self, size: int):
        self.x, self.y = grid(size, size, 1 / size)
        self.colours = np.zeros((*self.x.shape, 3))

    def paint(self, mask: Mask, *colour: int) -> None:
        """Paint a colour where the mask is true."""
        self.colours[mask] = colour

    def gradient(self, mask: Mask, top: Colour, bottom: Colour) -> None:
        """Paint a colour that changes from the mask's highest to its lowest point."""
        heights = self.y[mask]
        share = (heights - heights.min()) / max(np.ptp(heights), 1e-6)
        self.colours[mask] = top + share[:, None] * np.subtract(bottom, top)

    def wave(self, times: int, phase: float = 0.0) -> Grid:
        """A sine over x that is periodic in the image's width."""
        return np.sin(2 * np.pi * (times * self.x + phase))

    def offsets(self, x: float, y: float) -> tuple[Grid, Grid]:
        """Offsets of each point from one, the shorter way around."""
        return (self.x - x + 0.5) % 1 - 0.5, self.y - y

    def disc(self, x: float, y: float, radius: float) -> Mask:
        """A disc around a point."""
        return np.hypot(*self.offsets(x, y)) < radius

    def box(self, x: float, width: float, top: float, bottom: float) -> Mask:
        """A rectangle whose middle is at x."""
        dx, _ = self.offsets(x, 0.0)
        return (np.abs(dx) < width / 2) & (self.y > top) & (self.y < bottom)

    def cone(self, x: float, top: float, bottom: float, slope: float) -> Mask:
        """A triangle that stands on `bottom`; its half width grows by `slope` downwards."""
        dx, dy = self.offsets(x, top)
        return (np.abs(dx) < dy * slope) & (self.y < bottom)


@functools.cache
def render_scene(scene: str, turn: int, size: int) -> Float32[np.ndarray, "h w 3"]:
    """Render a scene without characters, turned sideways by `turn` eighths.

    Raises ValueError for an unknown scene.
    """
    if scene not in SCENES:
        raise ValueError(f"scene must be one of {', '.join(SCENES)}; got {scene!r}")
    if turn:
        image = np.roll(render_scene(scene, 0, size), turn * size // TURNS, axis=1)
        image.setflags(write=False)
        return image
    canvas = Canvas(size)
    BACKDROPS[scene](canvas)
    return average_down(canvas.colours)


def _meadow(c: Canvas) -> None:
    c.gradient(c.y >= 0, (120, 190, 240), (206, 234, 250))
    c.paint(c.disc(0.2, 0.16, 0.085), 255, 244, 170)
    for x, y in ((0.5, 0.14), (0.57, 0.11), (0.63, 0.15), (0.9, 0.24), (0.96, 0.22)):
        c.paint(c.disc(x, y, 0.055), 250, 252, 255)
    hills = 0.48 + 0.07 * c.wave(1, 0.1) + 0.02 * c.wave(3)
    c.gradient(c.y > hills, (150, 204, 130), (110, 180, 96))
    c.paint(c.box(0.83, 0.035, 0.4, 0.62), 104, 78, 52)
    for x, y in ((0.79, 0.37), (0.87, 0.38), (0.83, 0.31)):
        c.paint(c.disc(x, y, 0.075), 62, 136, 66)
    c.gradient(c.y > 0.62 + 0.02 * c.wave(2, 0.3), (112, 186, 84), (66, 142, 56))
    for x, y in ((0.08, 0.72), (0.34, 0.9), (0.5, 0.7), (0.68, 0.93), (0.95, 0.88)):
        c.paint(c.disc(x, y, 0.022), 250, 250, 240)


def _beach(c: Canvas) -> None:
    c.gradient(c.y >= 0, (148, 206, 240), (240, 236, 222))
    c.paint(c.disc(0.72, 0.15, 0.085), 255, 226, 140)
    c.gradient(c.y > 0.34, (34, 120, 150), (96, 184, 186))
    c.paint(c.cone(0.3, 0.16, 0.35, 0.55) & (c.offsets(0.3, 0.0)[0] > -0.005), 252, 252, 248)
    c.paint(c.box(0.32, 0.17, 0.36, 0.4), 150, 84, 58)
    shore = 0.6 + 0.025 * c.wave(1, 0.2)
    c.paint(c.y > shore - 0.03, 240, 248, 246)
    c.gradient(c.y > shore, (236, 216, 168), (212, 184, 132))
    c.paint(c.box(0.05, 0.03, 0.3, 0.68), 128, 92, 60)
    for x, y in ((0.99, 0.31), (0.11, 0.31), (0.05, 0.26), (0.94, 0.35), (0.16, 0.35)):
        c.paint(c.disc(x, y, 0.045), 74, 140, 72)
    for x, y in ((0.4, 0.72), (0.62, 0.9), (0.85, 0.76), (0.2, 0.93)):
        c.paint(c.disc(x, y, 0.02), 184, 152, 108)


def _snow(c: Canvas) -> None:
    c.gradient(c.y >= 0, (150, 168, 204), (222, 228, 240))
    for x, top, slope in ((0.22, 0.14, 0.6), (0.55, 0.26, 0.7), (0.9, 0.2, 0.55)):
        c.gradient(c.cone(x, top, 0.66, slope), (132, 144, 172), (172, 182, 206))
        c.paint(c.cone(x, top, top + 0.11, slope), 246, 249, 253)
    c.gradient(c.y > 0.58 + 0.03 * c.wave(1, 0.35), (238, 243, 250), (206, 218, 236))
    for x in (0.06, 0.38, 0.47):
        c.paint(c.cone(x, 0.36, 0.5, 0.42) | c.cone(x, 0.44, 0.62, 0.42), 44, 92, 88)
    c.paint(c.box(0.73, 0.17, 0.46, 0.62), 128, 84, 62)
    c.paint(c.cone(0.73, 0.37, 0.47, 1.2), 250, 252, 255)
    c.paint(c.box(0.73, 0.05, 0.5, 0.56), 255, 220, 120)


def _stars(c: Canvas) -> None:
    c.gradient(c.y >= 0, (14, 16, 56), (62, 56, 112))
    c.paint(c.disc(0.28, 0.17, 0.1) & ~c.disc(0.33, 0.14, 0.085), 240, 236, 204)
    for x, y in ((0.05, 0.1), (0.14, 0.33), (0.47, 0.08), (0.55, 0.3), (0.68, 0.16), (0.81, 0.06)):
        c.paint(c.disc(x, y, 0.016), 236, 236, 220)
    for x, y in ((0.88, 0.28), (0.95, 0.18), (0.4, 0.4), (0.73, 0.38)):
        c.paint(c.disc(x, y, 0.016), 236, 236, 220)
    c.gradient(c.y > 0.54 + 0.07 * c.wave(1, 0.1) + 0.02 * c.wave(2), (46, 52, 92), (38, 60, 78))
    c.paint(c.cone(0.62, 0.44, 0.64, 0.9), 78, 64, 98)  # a tent
    c.paint(c.cone(0.62, 0.5, 0.64, 0.4), 250, 200, 96)
    c.gradient(c.y > 0.63 + 0.02 * c.wave(2, 0.4), (50, 84, 84), (28, 52, 62))


def _forest(c: Canvas) -> None:
    c.gradient(c.y >= 0, (176, 206, 160), (120, 164, 120))
    for x in (0.24, 0.61, 0.94):
        c.paint(c.box(x, 0.035, 0.0, 0.66), 112, 134, 96)
    c.gradient(c.y > 0.6 + 0.015 * c.wave(2), (106, 124, 70), (74, 88, 52))
    for x, width in ((0.02, 0.075), (0.45, 0.09), (0.82, 0.07)):
        c.paint(c.box(x, width, 0.0, 0.7), 78, 62, 50)
        c.paint(c.box(x - width / 4, width / 4, 0.0, 0.7), 106, 86, 66)
    for i in range(9):
        c.paint(c.disc(i / 9 + 0.03 * (i % 2), 0.03 + 0.03 * (i * 5 % 3), 0.085), 52, 104, 58)
    for x, y in ((0.2, 0.7), (0.64, 0.69)):
        c.paint(c.disc(x, y, 0.06) & (c.y < y + 0.01), 202, 62, 48)
        c.paint(c.box(x, 0.035, y, y + 0.06), 240, 228, 206)


def _city(c: Canvas) -> None:
    c.gradient(c.y >= 0, (196, 170, 204), (250, 214, 178))
    distant = ((0.06, 0.16, 0.3), (0.36, 0.14, 0.22), (0.62, 0.2, 0.34), (0.9, 0.14, 0.2))
    for x, width, top in distant:
        c.paint(c.box(x, width, top, 0.7), 150, 134, 166)
    near = ((0.2, 0.15, 0.36), (0.5, 0.16, 0.44), (0.76, 0.13, 0.3))
    for x, width, top in near:
        c.paint(c.box(x, width, top, 0.7), 92, 82, 116)
        for window in np.arange(top + 0.04, 0.56, 0.08):
            for side in (x - width / 4, x + width / 4):
                c.paint(c.box(side, 0.04, window, window + 0.05), 255, 220, 130)
    c.paint(c.y > 0.64, 202, 196, 196)
    c.gradient(c.y > 0.7, (122, 120, 130), (96, 94, 106))
    for x in (0.15, 0.48, 0.81):
        c.paint(c.box(x, 0.14, 0.92, 0.95), 226, 222, 206)


BACKDROPS: dict[str, Callable[[Canvas], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "stars": _stars,
    "forest": _forest,
    "city": _city,
}
