"""`generate --about`: the sentences that a model understands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.data import shapes
from contextualstory_jax.data.shapes_figures import CAST, PLACES
from contextualstory_jax.data.shapes_scenes import SCENES
from contextualstory_jax.data.vocabulary import Vocabulary

SAMPLE_STORIES = 3


def about(config: ModelConfig, vocabulary: Vocabulary | None) -> str:
    """A description of a model for its users: its task and sizes, and what its stories are of."""
    task = "continuation" if config.unet.is_continuation else "visualization"
    frames = config.unet.n_frames
    size = f"{config.height} x {config.width} pixels"
    lines = [f"A {task} model: {frames} sentences to {frames} frames of {size}."]
    if vocabulary is None:
        lines.append("The words of its training stories are not recorded.")
    elif vocabulary.dataset == "shapes":
        lines += _about_shapes()
    else:
        lines.append(
            f"Trained on the dataset {vocabulary.dataset!r}, with {len(vocabulary.words)} words."
        )
        lines += _section("Characters", [", ".join(vocabulary.names) or "not labelled"])
    return "\n".join(lines)


def _about_shapes() -> Iterator[str]:
    yield from _section(
        "Characters",
        [
            f"{name:<6}{character.pronoun:<5}{character.colour_name} {character.shape}"
            for name, character in CAST.items()
        ],
    )
    scenes = (f"{scene.phrase:<16}{scene.destination}" for scene in SCENES.values())
    yield from _section("Scenes, and the ways there", scenes)
    places = "|".join(PLACES)
    movements = [pattern.format(place=places) for pattern in (shapes.WALKS, shapes.COMES)]
    yield from _section(
        "Actions, of one / of two characters",
        [
            *(" / ".join(verbs) for verbs in shapes.VERBS.values()),
            *movements,
            shapes.LEAVES,
            " / ".join(verb.format(destination="WAY") for verb in shapes.TRAVELS),
        ],
    )
    blanks = {name: name.upper() for name in ("who", "verb", "scene", "watcher")}
    blanks |= {"verb": "ACTION", "place": places}
    first, later = (
        [pattern.format(**blanks) for pattern in patterns]
        for patterns in (
            (shapes.OPENING_OF_ONE, shapes.OPENING_OF_TWO),
            (shapes.DEED, shapes.RETOLD, shapes.RETOLD_WATCHED),
        )
    )
    yield from _section("First sentence", first)
    yield from _section("Later sentences", [*later, "WHO: a name, two with 'and', she, he or they"])
    for number in range(SAMPLE_STORIES):
        shots = shapes.storyline(0, number, "test").shots
        yield from _section(f"Sample story {number + 1}", [shot.sentence for shot in shots])


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)]
