"""Character and scene accuracy of generated frames.

Characters are counted over all frames together (micro average): precision and recall of
(frame, character) pairs, their harmonic mean F1, and the share of frames whose set of characters is
exactly right. Intervals come from resampling complete stories, because the frames of one story
share characters and scene and so are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 1000
CONFIDENCE = 0.95

METRICS = (
    "character_precision",
    "character_recall",
    "character_f1",
    "frame_accuracy",  # frames whose set of characters is exactly right
    "scene_accuracy",
)
SUBSETS = (
    "all",
    "needs_context",  # frames whose own sentence does not say who is there, or where
)


class Outcome(NamedTuple):
    """The contents of one frame beside its labels."""

    story: str
    shown: Set[str]
    characters: Set[str]
    shown_scene: str | None
    scene: str | None
    needs_context: bool


class CharacterMetrics:
    """Counts outcomes, batch by batch; `compute` gives the metrics of all so far."""

    def __init__(self) -> None:
        self._counts: dict[str, Int[np.ndarray, "s n"]] = {}

    def update(self, outcomes: Iterable[Outcome]) -> None:
        """Count frames. A story may be spread over several calls."""
        for outcome in outcomes:
            counts = [  # in the order that _metrics takes them
                1,
                len(outcome.shown & outcome.characters),
                len(outcome.shown),
                len(outcome.characters),
                outcome.shown == outcome.characters,
                outcome.shown_scene == outcome.scene,
            ]
            of_story = self._counts.get(outcome.story, 0)
            self._counts[outcome.story] = of_story + np.outer((1, outcome.needs_context), counts)

    def compute(self) -> dict[str, dict[str, Any]]:
        """For each of `SUBSETS`: `frames`, and for each of `METRICS` its `value`, `low` and `high`.

        A metric whose denominator is nought, such as the precision of a model that shows nobody,
        is 0; all are None where there are no frames.
        """
        counts = np.stack(list(self._counts.values()))
        stories = len(counts)
        # How often each story is sampled, in each resample of as many stories as there are.
        sampled = np.random.default_rng(0).multinomial(
            stories, np.full(stories, 1 / stories), size=RESAMPLES
        )
        total = counts.sum(axis=0)
        values = _metrics(total)
        resampled = _metrics(np.einsum("rb,bsn->rsn", sampled, counts))
        tail = (1 - CONFIDENCE) / 2
        report: dict[str, dict[str, Any]] = {}
        for s, subset in enumerate(SUBSETS):
            frames = int(total[s, 0])
            report[subset] = {"frames": frames}
            for m, metric in enumerate(METRICS):
                numbers = [None] * 3
                if frames:
                    # A resample may hold no frame of the subset, and then has no metrics.
                    interval = np.nanquantile(resampled[:, s, m], (tail, 1 - tail))
                    numbers = [float(values[s, m]), *interval.tolist()]
                report[subset][metric] = dict(zip(("value", "low", "high"), numbers, strict=True))
        return report


def _metrics(counts: Int[np.ndarray, "*r s n"]) -> Float[np.ndarray, "*r s m"]:
    """`METRICS` of summed counts; nan where there are no frames."""
    frames, right, shown, true, exact, scene = np.moveaxis(counts, -1, 0)
    ratios = np.stack(
        [
            right / np.maximum(shown, 1),
            right / np.maximum(true, 1),
            2 * right / np.maximum(shown + true, 1),
            exact / np.maximum(frames, 1),
            scene / np.maximum(frames, 1),
        ],
        axis=-1,
    )
    return np.where(frames[..., None] > 0, ratios, np.nan)
