"""Synthetic stories: five rendered frames with a sentence each, given (seed, index, split).

Six characters that differ in colour and shape meet in four scenes. Characters, their places and
the scene persist from frame to frame; a pose lasts one frame. A later sentence may state everything
again ("mia waves a hand on the beach while otto watches .") or only what changes ("she waves a
hand ."), and then only the other sentences say who else is there, where, and in which scene:

- whoever a sentence does not move stays in place, standing;
- "she" and "he" mean the only character of that pronoun who is there, "they" both;
- "mia and otto are on the beach ." puts the first at the left and the second at the right.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, SupportsIndex, get_args

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from contextualstory_jax.data.example import FRAMES, Example, FrameLabels

Pose = Literal["stand", "jump", "wave", "sleep"]
Place = Literal["left", "middle", "right"]

SPLITS = ("train", "test")
TOKENIZER_DIR = Path(__file__).with_name("shapes_tokenizer")


class Character(NamedTuple):
    """A character; colour and shape each distinguish it from the others."""

    pronoun: Literal["she", "he"]
    shape: Literal["circle", "square", "star", "triangle", "diamond", "cross"]
    colour_name: str
    colour: tuple[int, int, int]  # RGB, 0-255


CAST = {
    "mia": Character("she", "circle", "red", (222, 28, 44)),
    "otto": Character("he", "square", "blue", (30, 94, 240)),
    "zoe": Character("she", "star", "yellow", (255, 232, 40)),
    "emil": Character("he", "triangle", "orange", (250, 130, 14)),
    "ida": Character("she", "diamond", "pink", (255, 112, 192)),
    "hugo": Character("he", "cross", "purple", (114, 34, 190)),
}
SCENES = {
    "meadow": "in the meadow",
    "beach": "on the beach",
    "snow": "in the snow",
    "stars": "under the stars",
}
VERBS: dict[Pose, tuple[str, str]] = {  # of one, of two
    "stand": ("is", "are"),
    "jump": ("jumps up high", "jump up high"),
    "wave": ("waves a hand", "wave a hand"),
    "sleep": ("takes a nap", "take a nap"),
}
ACTIONS: tuple[Pose, ...] = ("jump", "wave", "sleep")
PLACES: dict[Place, float] = {"left": 3 / 16, "middle": 8 / 16, "right": 13 / 16}  # of the width
TURNS = 8  # positions of the scenery, which wraps around sideways; one a story

# The grammar: each sentence is one of these patterns, filled.
OPENING_OF_ONE = "{who} {verb} {scene} at the {place} ."
OPENING_OF_TWO = "{who} {verb} {scene} ."
DEED = "{who} {verb} ."
RETOLD = "{who} {verb} {scene} ."
RETOLD_WATCHED = "{who} {verb} {scene} while {watcher} watches ."
WALKS, COMES, LEAVES = "walks to the {place}", "comes to the {place}", "says goodbye and goes away"
AND, THEY = " and ", "they"

RETOLD_SHARE = 0.4  # of later frames: names everybody and the scene again
PRONOUN_SHARE = 0.75  # of the others, where a pronoun is clear
TEST_SHARE = 8  # one story in this many is held out


def vocabulary() -> list[str]:
    """Every word and mark that a sentence can hold, sorted."""
    patterns = (OPENING_OF_ONE, OPENING_OF_TWO, DEED, RETOLD, RETOLD_WATCHED)
    verbs = [verb for numbers in VERBS.values() for verb in numbers]
    subjects = [THEY, AND, *CAST, *(character.pronoun for character in CAST.values())]
    phrases = [*patterns, *verbs, WALKS, COMES, LEAVES, *subjects, *SCENES.values(), *PLACES]
    words = " ".join(phrases).split()
    return sorted({word for word in words if not word.startswith("{")})


# -------------------------------------------------------------------------------- stories


class Figure(NamedTuple):
    """Place and pose of a character in a frame."""

    place: Place
    pose: Pose


class Shot(NamedTuple):
    """One frame before it is rendered."""

    sentence: str
    figures: dict[str, Figure]
    needs_context: bool


class Storyline(NamedTuple):
    """A synthetic story before it is rendered: five shots in one scene.

    The scenery is turned sideways by `turn` eighths.
    """

    scene: str
    turn: int
    shots: list[Shot]


def split_of(storyline: Storyline) -> str:
    """The split of a story, from a hash of its scene and who does what in each frame.

    Places and wording do not count: training has no retold or mirrored test story.
    """
    deeds = [
        sorted((name, figure.pose) for name, figure in shot.figures.items())
        for shot in storyline.shots
    ]
    digest = hashlib.sha256(repr((storyline.scene, deeds)).encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def storyline(seed: int, index: int, split: str) -> Storyline:
    """The events of `story(seed, index, split)`. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    rng = random.Random(f"{seed}/{split}/{index}")
    while split_of(invented := _invent(rng)) != split:
        pass
    return invented


def _invent(rng: random.Random) -> Storyline:
    scene, turn = rng.choice(list(SCENES)), rng.randrange(TURNS)
    first, second = rng.sample(list(CAST), 2)
    pose = rng.choice(get_args(Pose))
    if rng.random() < 0.5:
        waiting = None
        figures = {first: Figure("left", pose), second: Figure("right", pose)}
        pattern = OPENING_OF_TWO
    else:
        waiting = second  # may come in later
        figures = {first: Figure(rng.choice(get_args(Place)), pose)}
        pattern = OPENING_OF_ONE
    sentence = pattern.format(
        who=AND.join(figures),
        verb=VERBS[pose][len(figures) - 1],
        scene=SCENES[scene],
        place=figures[first].place,
    )
    shots = [Shot(sentence, figures, needs_context=False)]
    while len(shots) < FRAMES:
        shots.append(_continue(rng, scene, shots[-1].figures, waiting))
        if waiting in shots[-1].figures:
            waiting = None
    return Storyline(scene, turn, shots)


def _continue(
    rng: random.Random, scene: str, before: Mapping[str, Figure], waiting: str | None
) -> Shot:
    """The shot after one with the figures `before`."""
    events = ["act", "walk"]
    if len(before) == 2:
        events += ["act together", "act together", "leave"]
    elif waiting:
        events += ["come"]
    event = rng.choice(events)
    if event == "act together":
        actors = list(before)
    elif event == "come" and waiting:
        actors = [waiting]
    else:
        actors = [rng.choice(list(before))]
    actor = actors[0]
    others = [name for name in before if name not in actors]

    figures = {name: Figure(figure.place, "stand") for name, figure in before.items()}
    if event == "leave":
        del figures[actor]
        verb = LEAVES
    elif event in ("act", "act together"):
        news: list[Pose] = [pose for pose in ACTIONS if pose != before[actor].pose]
        pose = rng.choice(news)
        figures |= {name: Figure(before[name].place, pose) for name in actors}
        verb = VERBS[pose][len(actors) - 1]
    else:
        taken = {figure.place for figure in before.values()}
        place = rng.choice([place for place in get_args(Place) if place not in taken])
        figures[actor] = Figure(place, "stand")
        verb = (COMES if event == "come" else WALKS).format(place=place)

    who = AND.join(actors)
    if event != "leave" and rng.random() < RETOLD_SHARE:
        pattern = RETOLD_WATCHED if others else RETOLD
        watcher = "".join(others)
        sentence = pattern.format(who=who, verb=verb, scene=SCENES[scene], watcher=watcher)
        return Shot(sentence, figures, needs_context=False)
    pronoun = CAST[actor].pronoun if len(actors) == 1 else THEY
    clear = event != "come" and all(CAST[other].pronoun != pronoun for other in others)
    if clear and rng.random() < PRONOUN_SHARE:
        who = pronoun
    return Shot(DEED.format(who=who, verb=verb), figures, needs_context=True)


def story(seed: int, index: int, split: str, size: int = 32) -> Example:
    """One story in images of `size` x `size` pixels, determined by the arguments.

    Raises ValueError for an unknown split.
    """
    scene, turn, shots = storyline(seed, index, split)
    story_id = f"shapes-{split}-{seed}-{index}"
    return Example(
        images=np.stack([draw(scene, shot.figures, turn, size) for shot in shots]),
        sentences=tuple(shot.sentence for shot in shots),
        frame_ids=tuple(f"{story_id}-{frame}" for frame in range(FRAMES)),
        story_id=story_id,
        labels=tuple(
            FrameLabels(frozenset(shot.figures), scene, shot.needs_context) for shot in shots
        ),
    )


class ShapesSource:
    """The stories of one seed and split as a random-access source (grain's protocol)."""

    def __init__(self, seed: int, split: str, size: int = 32):
        self.seed, self.split, self.size = seed, split, size

    def __len__(self) -> int:
        return 2**31 - 1  # stories never run out; grain's shuffle wants a number of 32 bits

    def __getitem__(self, index: SupportsIndex) -> Example:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"story {number} of {len(self)}")
        return story(self.seed, number, self.split, self.size)

    def __repr__(self) -> str:
        return f"ShapesSource(seed={self.seed}, split={self.split!r}, size={self.size})"


# ------------------------------------------------------------------------------- images
# An image is one cached backdrop under one cached layer for each character, so that rendering is a
# few blends. Both are painted without anti-aliasing on a finer grid and averaged down. Lengths are
# fractions of the image's side, y downwards; places fall on integer pixels at 32, 48 and 64.

SUPERSAMPLING = 4  # per side
RADIUS = 0.15  # of a character: less than half the way between two places
HEIGHTS: dict[Pose, float] = {"stand": 23 / 32, "wave": 23 / 32, "jump": 14 / 32, "sleep": 25 / 32}
NAP_HEIGHT = 0.62  # of a sleeper, in standing heights
GROUND = 0.87  # where a shadow lies
INK, WHITE = (28, 24, 36), (255, 255, 255)

Grid = Float[np.ndarray, "h w"]
Mask = Bool[np.ndarray, "h w"]


def draw(
    scene: str, figures: Mapping[str, Figure], turn: int, size: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Render one frame: `scene` turned sideways by `turn` eighths, and the figures before it."""
    picture = np.roll(draw_scene(scene, size), turn * size // TURNS, axis=1)
    for name, figure in figures.items():
        paint, cover = draw_figure(name, figure, size)
        picture = picture * (1 - cover) + paint
    return np.rint(picture).astype(np.uint8)


def _grid(size: int) -> tuple[Grid, Grid]:
    steps = (np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING)
    x, y = np.meshgrid(steps, steps)
    return x, y


def _average_down(fine: Float[np.ndarray, "_ _ c"]) -> Float32[np.ndarray, "h w c"]:
    size = len(fine) // SUPERSAMPLING
    blocks = fine.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, -1)
    picture = blocks.mean(axis=(1, 3)).astype(np.float32)
    picture.setflags(write=False)  # it is cached
    return picture


@functools.cache
def draw_figure(
    name: str, figure: Figure, size: int
) -> tuple[Float32[np.ndarray, "h w 3"], Float32[np.ndarray, "h w 1"]]:
    """Render a character and its shadow: colour times opacity, and opacity, 0-255 and 0-1."""
    x, y = _grid(size)
    canvas = np.zeros((*x.shape, 4))

    def paint(mask: Mask, colour: tuple[int, int, int], opacity: float = 1.0) -> None:
        canvas[mask] = (*(opacity * value for value in colour), opacity)

    asleep = figure.pose == "sleep"
    u = (x - PLACES[figure.place]) / RADIUS
    v = (HEIGHTS[figure.pose] - y) / (RADIUS * (NAP_HEIGHT if asleep else 1))  # upwards
    inside = SHAPES[CAST[name].shape]
    colour = CAST[name].colour
    dark = (colour[0] * 2 // 5, colour[1] * 2 // 5, colour[2] * 2 // 5)

    paint(u**2 + ((y - GROUND) / RADIUS * 5) ** 2 < 0.8, INK, 0.35)  # the shadow
    if figure.pose == "wave":
        paint((np.abs(u - 0.35 - 0.4 * v) < 0.13) & (v > 0) & (v < 1.1), dark)
        paint((u - 0.8) ** 2 + (v - 1.15) ** 2 < 0.26**2, colour)
    paint(inside(u, v), dark)
    paint(inside(u * 1.13, v * 1.13), colour)
    side = np.abs(u)
    if asleep:
        paint((np.abs(side - 0.3) < 0.17) & (np.abs(v) < 0.12), INK)
    else:
        paint((side - 0.31) ** 2 + (v + 0.1) ** 2 < 0.19**2, WHITE)
        paint((side - 0.3) ** 2 + (v + 0.1) ** 2 < 0.13**2, INK)
    layer = _average_down(canvas)
    return layer[..., :3], layer[..., 3:]


def _star(u: Grid, v: Grid) -> Mask:
    angle = np.abs((np.arctan2(u, v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    along, across = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    tip, valley_along, valley_across = 1.08, 0.7 * np.cos(np.pi / 5), 0.7 * np.sin(np.pi / 5)
    # Inside the edge from a tip to the next valley.
    return across * (tip - valley_along) < valley_across * (tip - along)


# Coordinates in radii from the centre, v upwards.
SHAPES: dict[str, Callable[[Grid, Grid], Mask]] = {
    "circle": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: u**12 + v**12 < 0.95**12,
    "star": _star,
    "triangle": lambda u, v: (v > -0.9) & (np.abs(u) < (1.05 - v) * 0.52),
    "diamond": lambda u, v: np.abs(u) ** 1.15 + np.abs(v) ** 1.15 < 1.03,
    "cross": lambda u, v: (
        (np.minimum(np.abs(u), np.abs(v)) < 0.38) & (np.maximum(np.abs(u), np.abs(v)) < 1)
    ),
}


def _scatter(x: Grid, y: Grid, count: int, top: float, bottom: float) -> list[tuple[Grid, Grid]]:
    """Offsets from `count` evenly strewn points (the R2 sequence) between two heights."""
    points = [(0.7549 * i % 1, top + (0.5698 * i % 1) * (bottom - top)) for i in range(count)]
    return [((x - px + 0.5) % 1 - 0.5, y - py) for px, py in points]


@functools.cache
def draw_scene(scene: str, size: int) -> Float32[np.ndarray, "h w 3"]:
    """Render a scene without characters, periodic in x. Raises ValueError for an unknown one."""
    if scene not in SCENES:
        raise ValueError(f"scene must be one of {', '.join(SCENES)}; got {scene!r}")
    x, y = _grid(size)
    canvas = np.zeros((*x.shape, 3))

    def paint(mask: Mask, *colour: int) -> None:
        canvas[mask] = colour

    def wave(times: int, phase: float = 0.0) -> Grid:
        return np.sin(2 * np.pi * (times * x + phase))

    scatter = functools.partial(_scatter, x, y)

    match scene:
        case "meadow":
            paint(y >= 0, 158, 212, 240)
            for dx, dy in scatter(3, 0.08, 0.3):
                paint((np.abs(dx) / 0.13) ** 2.5 + (np.abs(dy) / 0.045) ** 2.5 < 1, 248, 252, 255)
            paint(y > 0.5 + 0.05 * wave(2), 122, 188, 116)
            paint(y > 0.6 + 0.02 * wave(1, 0.3), 92, 168, 70)
            for dx, dy in scatter(36, 0.62, 1.02):
                paint((np.abs(dx) < (0.03 + dy) * 0.55) & (np.abs(dy) < 0.03), 52, 124, 48)
            for dx, dy in scatter(9, 0.98, 0.66):
                paint(np.hypot(dx - 0.06, dy) < 0.02, 246, 250, 240)
        case "beach":
            paint(y >= 0, 206, 234, 236)
            paint(y > 0.3, 40, 150, 160)
            for row in range(4):
                crest = 0.35 + 0.07 * row + 0.014 * wave(4, 0.3 * row)
                paint(np.abs(y - crest) < 0.014, 132, 210, 206)
            shore = 0.6 + 0.025 * wave(2)
            paint(y > shore - 0.03, 246, 250, 246)
            paint(y > shore, 226, 204, 158)
            for dx, dy in scatter(40, 0.65, 1.0):
                paint(np.hypot(dx, dy * 1.6) < 0.022, 186, 158, 112)
        case "snow":
            paint(y >= 0, 170, 176, 198)
            for dx, dy in scatter(30, 0.0, 0.6):
                paint(np.hypot(dx, dy) < 0.02, 244, 248, 252)
            for tree in range(8):
                dx = (x - (tree + 0.5) / 8 + 0.5) % 1 - 0.5
                top = 0.26 + 0.1 * (tree * 5 % 3) / 2
                paint((np.abs(dx) < ((y - top) % 0.12 + 0.03) * 0.45) & (y > top), 44, 84, 82)
            paint(y > 0.6 + 0.02 * wave(2, 0.1), 236, 242, 248)
            for row in range(4):
                drift = np.abs(y - 0.68 - 0.09 * row - 0.02 * wave(3, 0.37 * row))
                paint((drift < 0.013) & (wave(3, 0.37 * row + 0.2) > -0.3), 186, 200, 222)
        case "stars":
            paint(y >= 0, 16, 20, 58)
            for dx, dy in scatter(26, 0.02, 0.62):
                paint(np.abs(dx) + np.abs(dy) < 0.026, 226, 228, 214)
            moon = (x - 0.3, y - 0.17)
            crescent = (np.hypot(*moon) < 0.1) & (np.hypot(moon[0] - 0.05, moon[1] + 0.02) > 0.09)
            paint(crescent, 236, 234, 206)
            paint(y > 0.6 + 0.04 * wave(1, 0.1), 36, 62, 66)
            for dx, dy in scatter(34, 0.68, 1.02):
                paint((np.abs(dx) < (0.03 + dy) * 0.5) & (np.abs(dy) < 0.03), 62, 98, 92)
    return _average_down(canvas)
