"""Characters of the synthetic stories, rendered in each pose by each scene's light.

A character is one cached layer, a strip of the image around its place with colour and opacity, so
that rendering a frame is a few blends. Layers are painted without anti-aliasing on a finer grid and
averaged down. Lengths here are pixels of an image of 64, measured from the body's centre, with v
upwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

Pose = Literal["stand", "jump", "wave", "sleep", "read"]
Place = Literal["left", "middle", "right"]
Colour = tuple[int, int, int]  # RGB, 0-255


class Character(NamedTuple):
    """A character; colour and shape each distinguish it from the others."""

    pronoun: Literal["she", "he"]
    shape: Literal["circle", "square", "star", "triangle", "diamond", "cross", "heart", "hexagon"]
    colour_name: str
    colour: Colour


CAST = {
    "mia": Character("she", "circle", "red", (222, 28, 44)),
    "otto": Character("he", "square", "blue", (30, 94, 240)),
    "zoe": Character("she", "star", "yellow", (255, 228, 40)),
    "emil": Character("he", "triangle", "orange", (250, 130, 14)),
    "ida": Character("she", "diamond", "pink", (255, 112, 192)),
    "hugo": Character("he", "cross", "purple", (124, 44, 200)),
    "lena": Character("she", "heart", "turquoise", (30, 226, 214)),
    "theo": Character("he", "hexagon", "brown", (128, 72, 34)),
}

SUPERSAMPLING = 4  # per side
UNIT = 64  # pixels a side of the image in whose pixels lengths are given
PLACES: dict[Place, float] = {"left": 3 / 16, "middle": 8 / 16, "right": 13 / 16}  # of the width
HALF_STRIP = 10  # from a place to the sides of its strip, so that strips touch
RADIUS = 7.0  # of a body
CENTRES: dict[Pose, float] = {"stand": 39, "wave": 39, "read": 39, "jump": 29, "sleep": 48}
NAP_HEIGHT = 0.72  # of a sleeping body, in standing heights
GROUND = 54.0  # where feet stand, and a shadow lies
INK, WHITE, PALM, COVER = (28, 24, 36), (255, 255, 255), (255, 238, 218), (150, 34, 40)

Grid = Float[np.ndarray, "h w"]
Mask = Bool[np.ndarray, "h w"]


def grid(height: int, width: int, pixel: float) -> tuple[Grid, Grid]:
    """Coordinates of the finer grid's points, where a pixel is `pixel` long; y downwards."""
    xs, ys = (
        (np.arange(count * SUPERSAMPLING) + 0.5) / SUPERSAMPLING * pixel
        for count in (width, height)
    )
    x, y = np.meshgrid(xs, ys)
    return x, y


def average_down(fine: Float[np.ndarray, "_ _ c"]) -> Float32[np.ndarray, "h w c"]:
    """Average the finer grid's points of each pixel; read-only, because it is cached."""
    height, width = (side // SUPERSAMPLING for side in fine.shape[:2])
    blocks = fine.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, -1)
    image = blocks.mean(axis=(1, 3)).astype(np.float32)
    image.setflags(write=False)
    return image


def strip_columns(place: Place, size: int) -> slice:
    """The columns of an image of `size` pixels a side that a character at a place may cover."""
    centre, half = round(PLACES[place] * size), HALF_STRIP * size // UNIT
    return slice(centre - half, centre + half)


@functools.cache
def render_character(
    name: str, pose: Pose, light: tuple[float, float, float], size: int
) -> tuple[Float32[np.ndarray, "h strip 3"], Float32[np.ndarray, "h strip 1"]]:
    """Render a character and its shadow into a strip, on nothing.

    Args:
        light: factors of red, green and blue.
        size: pixels a side of the image.

    Returns:
        Colour times opacity (0-255), and opacity (0-1).
    """
    x, y = grid(size, 2 * (HALF_STRIP * size // UNIT), UNIT / size)
    canvas = np.zeros((*x.shape, 4))
    character = CAST[name]
    asleep = pose == "sleep"
    u, v = x - HALF_STRIP, CENTRES[pose] - y
    across, up = u / RADIUS, v / (RADIUS * (NAP_HEIGHT if asleep else 1))
    shading = (1.02 + 0.16 * (up - 0.6 * across))[..., None]  # light falls from the upper left

    def paint(mask: Mask, colour: Colour, opacity: float = 1.0) -> None:
        lit = np.clip(np.multiply(colour, light) * shading[mask], 0, 255)
        canvas[mask] = np.concatenate([lit * opacity, np.full((len(lit), 1), opacity)], axis=-1)

    def limb(start: tuple[float, float], end: tuple[float, float], mirrored: bool = True) -> None:
        for side in (1, -1) if mirrored else (1,):
            paint(_distance(u * side, v, start, end) < 1.3, dark)

    inside = SHAPES[character.shape]
    dark = _darker(character.colour)
    spread = 6.5 if pose == "jump" else 8.5
    paint((u / spread) ** 2 + ((y - GROUND) / 1.8) ** 2 < 1, INK, 0.4)  # the shadow
    if pose in ("stand", "wave", "read"):
        limb((2.8, -4.0), (2.8, 39.0 - GROUND))
    match pose:
        case "stand":
            limb((5.0, 0.0), (8.0, -6.0))
        case "jump":
            limb((2.8, -4.0), (5.5, -12.0))
            limb((5.0, 0.0), (8.2, 7.0))
        case "wave":
            limb((-5.0, 0.0), (-8.0, -6.0), mirrored=False)
    paint(inside(across, up), dark)
    paint(inside(across * 1.14, up * 1.14), character.colour)
    if pose == "wave":  # a light palm, which a VAE does not lose as it does a thin arm
        paint(_distance(u, v, (4.5, 0.0), (6.8, 9.0)) < 1.3, dark)
        paint(np.hypot(u - 6.8, v - 10.2) < 3.0, dark)
        paint(np.hypot(u - 6.8, v - 10.2) < 2.3, PALM)
    _paint_face(paint, u, v, pose)
    if pose == "read":
        limb((5.5, 0.0), (5.5, -4.0))
        paint((np.abs(u) < 6.6) & (np.abs(v + 5.2) < 3.6), COVER)
        paint((np.abs(u) < 5.6) & (np.abs(v + 5.0) < 2.6) & (np.abs(u) > 0.5), WHITE)
    layer = average_down(canvas)
    return layer[..., :3], layer[..., 3:]


def _paint_face(paint: Callable[..., None], u: Grid, v: Grid, pose: Pose) -> None:
    """Eyes and mouth; a reader looks down, and a sleeper's eyes are closed."""
    side = np.abs(u)
    if pose == "sleep":
        paint((np.abs(side - 2.2) < 1.3) & (np.abs(v) < 0.6), INK)
        return
    lift = 1.6 if pose == "read" else 0.6
    paint(np.hypot(side - 2.2, v - lift) < 1.7, WHITE)
    paint(np.hypot(side - 2.1, v - lift + (0.6 if pose == "read" else 0)) < 1.05, INK)
    if pose != "read":
        smile = np.abs(np.hypot(u, v + 1.2) - 2.0) < 0.5
        paint(smile & (v < -2.2), INK)


def _darker(colour: Colour) -> Colour:
    red, green, blue = (value * 2 // 5 for value in colour)
    return red, green, blue


def _distance(u: Grid, v: Grid, start: tuple[float, float], end: tuple[float, float]) -> Grid:
    """Distance of each point from the segment between two points."""
    (u0, v0), (u1, v1) = start, end
    du, dv = u1 - u0, v1 - v0
    along = np.clip(((u - u0) * du + (v - v0) * dv) / (du**2 + dv**2), 0, 1)
    return np.hypot(u - u0 - along * du, v - v0 - along * dv)


def _star(u: Grid, v: Grid) -> Mask:
    angle = np.abs((np.arctan2(u, v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    along, across = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    tip, valley_along, valley_across = 1.12, 0.72 * np.cos(np.pi / 5), 0.72 * np.sin(np.pi / 5)
    # Inside the edge from a tip to the next valley.
    return across * (tip - valley_along) < valley_across * (tip - along)


def _heart(u: Grid, v: Grid) -> Mask:
    lobes = np.hypot(np.abs(u) - 0.5, v - 0.42) < 0.56
    point = (np.abs(u) < (v + 1.08) * 0.78) & (v < 0.5) & (np.abs(u) < 1.02)
    return lobes | point


# Coordinates in radii from the centre, v upwards.
SHAPES: dict[str, Callable[[Grid, Grid], Mask]] = {
    "circle": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: u**12 + v**12 < 0.95**12,
    "star": _star,
    "triangle": lambda u, v: (v > -0.92) & (np.abs(u) < (1.1 - v) * 0.54),
    "diamond": lambda u, v: np.abs(u) ** 1.15 + np.abs(v) ** 1.15 < 1.06,
    "cross": lambda u, v: (
        (np.minimum(np.abs(u), np.abs(v)) < 0.44) & (np.maximum(np.abs(u), np.abs(v)) < 1)
    ),
    "heart": _heart,
    "hexagon": lambda u, v: np.maximum(np.abs(v) * 1.08, np.abs(v) * 0.54 + np.abs(u) * 0.94) < 1,
}
