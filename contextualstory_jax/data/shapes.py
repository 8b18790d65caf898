"""Synthetic stories: rendered frames with a sentence each, given (seed, index, split, length).

Eight characters that differ in colour and shape meet in six scenes. Characters, their places and
the scene persist from frame to frame; a pose lasts one frame. A later sentence may state everything
again ("mia waves a hand on the beach while otto watches .") or only what changes ("she waves a
hand ."), and then only the other sentences say who else is there, where, and in which scene:

- whoever a sentence does not move stays in place, standing;
- "she" and "he" mean the only character of that pronoun who is there, "they" both;
- "mia and otto are on the beach ." puts the first at the left and the second at the right;
- "they go to the meadow ." moves the story to another scene, everybody in their place.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, SupportsIndex, get_args

import numpy as np
from jaxtyping import UInt8

from contextualstory_jax.data.example import FRAMES, Example, FrameLabels
from contextualstory_jax.data.shapes_figures import (
    CAST,
    PLACES,
    Place,
    Pose,
    render_character,
    strip_columns,
)
from contextualstory_jax.data.shapes_scenes import SCENES, TURNS, render_scene

SPLITS = ("train", "test")
SIZE = 64  # pixels a side
TOKENIZER_DIR = Path(__file__).with_name("shapes_tokenizer")

VERBS: dict[Pose, tuple[str, str]] = {  # of one, of two
    "stand": ("is", "are"),
    "jump": ("jumps up high", "jump up high"),
    "wave": ("waves a hand", "wave a hand"),
    "sleep": ("takes a nap", "take a nap"),
    "read": ("reads a book", "read a book"),
}
ACTIONS: tuple[Pose, ...] = ("jump", "wave", "sleep", "read")

# The grammar: each sentence is one of these patterns, filled.
OPENING_OF_ONE = "{who} {verb} {scene} at the {place} ."
OPENING_OF_TWO = "{who} {verb} {scene} ."
DEED = "{who} {verb} ."
RETOLD = "{who} {verb} {scene} ."
RETOLD_WATCHED = "{who} {verb} {scene} while {watcher} watches ."
WALKS, COMES, LEAVES = "walks to the {place}", "comes to the {place}", "says goodbye and goes away"
TRAVELS = ("goes {destination}", "go {destination}")  # of one, of two
AND, THEY = " and ", "they"

RETOLD_SHARE = 0.4  # of later frames: names everybody and the scene again
PRONOUN_SHARE = 0.75  # of the others, where a pronoun is clear
TRAVEL_SHARE = 1 / 3  # of stories, and of each five frames of longer ones: the scene changes once
# Of training stories: begins in the middle of a longer one, as a window of it does, its first
# sentence restated.
LATER_SHARE = 1 / 4
TEST_SHARE = 8  # one story in this many is held out


def vocabulary() -> list[str]:
    """Every word and mark that a sentence can hold, sorted."""
    patterns = (OPENING_OF_ONE, OPENING_OF_TWO, DEED, RETOLD, RETOLD_WATCHED, *TRAVELS)
    verbs = [verb for numbers in VERBS.values() for verb in numbers]
    subjects = [THEY, AND, *CAST, *(character.pronoun for character in CAST.values())]
    places = [words for scene in SCENES.values() for words in (scene.phrase, scene.destination)]
    phrases = [*patterns, *verbs, WALKS, COMES, LEAVES, *subjects, *places, *PLACES]
    words = " ".join(phrases).split()
    return sorted({word for word in words if not word.startswith("{")})


# -------------------------------------------------------------------------------- stories


class Figure(NamedTuple):
    """Place and pose of a character in a frame."""

    place: Place
    pose: Pose


class Shot(NamedTuple):
    """One frame before it is rendered.

    `restated` says again who is there and in which scene; it is the sentence itself where that
    already does.
    """

    sentence: str
    restated: str
    scene: str
    figures: dict[str, Figure]

    @property
    def needs_context(self) -> bool:
        """Whether the sentence leaves out who is there, or the scene."""
        return self.sentence != self.restated


class Storyline(NamedTuple):
    """A synthetic story before it is rendered; its scenery is turned sideways by `turn` eighths."""

    turn: int
    shots: list[Shot]


def split_of(shots: list[Shot]) -> str:
    """The split of a story, from a hash of the scene and who does what in its first five frames.

    Places and wording do not count: training has no retold or mirrored test story.
    """
    deeds = [
        (shot.scene, sorted((name, figure.pose) for name, figure in shot.figures.items()))
        for shot in shots[:FRAMES]
    ]
    digest = hashlib.sha256(repr(deeds).encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def storyline(seed: int, index: int, split: str, length: int = FRAMES) -> Storyline:
    """The events of `story` with the same arguments; a longer story begins as a shorter one.

    Raises ValueError for an unknown split, and for less than five frames.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if length < FRAMES:
        raise ValueError(f"a story has at least {FRAMES} frames; got {length}")
    rng = random.Random(f"{seed}/{split}/{index}")
    shots: list[Shot] = []
    while not shots or split_of(shots) != split:
        turn, cast = rng.randrange(TURNS), rng.sample(list(CAST), 2)
        shots = [_open(rng, cast)]
        _continue(rng, cast, shots, FRAMES)
        if split == "train" and rng.random() < LATER_SHARE:
            _continue(rng, cast, shots, 2 * FRAMES)
            start = rng.randrange(1, FRAMES + 1)
            first = shots[start]._replace(sentence=shots[start].restated)
            shots = [first, *shots[start + 1 : start + FRAMES]]
    for end in range(2 * FRAMES, length + FRAMES, FRAMES):
        _continue(rng, cast, shots, end)
    return Storyline(turn, shots[:length])


def _open(rng: random.Random, cast: list[str]) -> Shot:
    """The first shot: one or both of the two characters."""
    scene, pose = rng.choice(list(SCENES)), rng.choice(get_args(Pose))
    if rng.random() < 0.5:
        figures = {cast[0]: Figure("left", pose), cast[1]: Figure("right", pose)}
        pattern = OPENING_OF_TWO
    else:
        figures = {cast[0]: Figure(rng.choice(get_args(Place)), pose)}
        pattern = OPENING_OF_ONE
    sentence = pattern.format(
        who=AND.join(figures),
        verb=VERBS[pose][len(figures) - 1],
        scene=SCENES[scene].phrase,
        place=figures[cast[0]].place,
    )
    return Shot(sentence, sentence, scene, figures)


def _continue(rng: random.Random, cast: list[str], shots: list[Shot], end: int) -> None:
    """Add shots until there are `end`; the scene may change in one of the last four."""
    travels = rng.randrange(end - FRAMES + 1, end) if rng.random() < TRAVEL_SHARE else None
    while len(shots) < end:
        before = shots[-1]
        shots.append(_travel(rng, before) if len(shots) == travels else _act(rng, cast, before))


def _travel(rng: random.Random, before: Shot) -> Shot:
    """The shot in which everybody goes to another scene."""
    scene = rng.choice([name for name in SCENES if name != before.scene])
    figures = {name: Figure(figure.place, "stand") for name, figure in before.figures.items()}
    names = list(figures)
    verb = TRAVELS[len(names) - 1].format(destination=SCENES[scene].destination)
    restated = DEED.format(who=AND.join(names), verb=verb)
    pronoun = CAST[names[0]].pronoun if len(names) == 1 else THEY
    retold = rng.random() < RETOLD_SHARE or rng.random() >= PRONOUN_SHARE
    return Shot(
        restated if retold else DEED.format(who=pronoun, verb=verb), restated, scene, figures
    )


def _act(rng: random.Random, cast: list[str], before: Shot) -> Shot:
    """A shot in which one or both do something, one comes, or one leaves."""
    scene, there = before.scene, before.figures
    events = ["act", "walk"]
    events += ["act together", "act together", "leave"] if len(there) == 2 else ["come"]
    event = rng.choice(events)
    if event == "act together":
        actors = list(there)
    elif event == "come":
        actors = [name for name in cast if name not in there]
    else:
        actors = [rng.choice(list(there))]
    actor = actors[0]
    others = [name for name in there if name not in actors]

    figures = {name: Figure(figure.place, "stand") for name, figure in there.items()}
    if event == "leave":
        del figures[actor]
        verb = LEAVES
    elif event in ("act", "act together"):
        news: list[Pose] = [pose for pose in ACTIONS if pose != there[actor].pose]
        pose = rng.choice(news)
        figures |= {name: Figure(there[name].place, pose) for name in actors}
        verb = VERBS[pose][len(actors) - 1]
    else:
        taken = {figure.place for figure in there.values()}
        place = rng.choice([place for place in get_args(Place) if place not in taken])
        figures[actor] = Figure(place, "stand")
        verb = (COMES if event == "come" else WALKS).format(place=place)

    who = AND.join(actors)
    pattern = RETOLD_WATCHED if others else RETOLD
    restated = pattern.format(
        who=who, verb=verb, scene=SCENES[scene].phrase, watcher="".join(others)
    )
    pronoun = CAST[actor].pronoun if len(actors) == 1 else THEY
    clear = event != "come" and all(CAST[other].pronoun != pronoun for other in others)
    if rng.random() < RETOLD_SHARE:
        return Shot(restated, restated, scene, figures)
    if clear and rng.random() < PRONOUN_SHARE:
        who = pronoun
    return Shot(DEED.format(who=who, verb=verb), restated, scene, figures)


def story(seed: int, index: int, split: str, size: int = SIZE, length: int = FRAMES) -> Example:
    """One story in images of `size` x `size` pixels, determined by the arguments.

    Raises as `storyline` does.
    """
    turn, shots = storyline(seed, index, split, length)
    story_id = f"shapes-{split}-{seed}-{index}"
    return Example(
        images=np.stack([render(shot.scene, shot.figures, turn, size) for shot in shots]),
        sentences=tuple(shot.sentence for shot in shots),
        frame_ids=tuple(f"{story_id}-{frame}" for frame in range(length)),
        story_id=story_id,
        labels=tuple(
            FrameLabels(
                frozenset(shot.figures),
                shot.scene,
                shot.needs_context,
                {name: figure.pose for name, figure in shot.figures.items()},
                {name: figure.place for name, figure in shot.figures.items()},
            )
            for shot in shots
        ),
        restated=tuple(shot.restated for shot in shots),
    )


def render(
    scene: str, figures: Mapping[str, Figure], turn: int, size: int = SIZE
) -> UInt8[np.ndarray, "h w 3"]:
    """Render one frame: `scene` turned sideways by `turn` eighths, and the figures before it.

    Args:
        size: pixels a side, a multiple of 16.
    """
    image = render_scene(scene, turn, size).copy()
    for name, (place, pose) in figures.items():
        colour, opacity = render_character(name, pose, SCENES[scene].light, size)
        strip = image[:, strip_columns(place, size)]
        strip *= 1 - opacity
        strip += colour
    return np.rint(image).astype(np.uint8)


class ShapesSource:
    """The stories of one seed and split as a random-access source (grain's protocol)."""

    def __init__(self, seed: int, split: str, size: int = SIZE, length: int = FRAMES):
        self.seed, self.split, self.size, self.length = seed, split, size, length

    def __len__(self) -> int:
        return 2**31 - 1  # stories never run out; grain's shuffle wants a number of 32 bits

    def __getitem__(self, index: SupportsIndex) -> Example:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"story {number} of {len(self)}")
        return story(self.seed, number, self.split, self.size, self.length)

    def __repr__(self) -> str:
        return f"ShapesSource(seed={self.seed}, split={self.split!r}, size={self.size})"
