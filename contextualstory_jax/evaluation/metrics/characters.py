"""Metrics of the frames of synthetic stories: characters, poses, places, scene and scenery.

Characters are counted over all frames together (micro average): precision and recall of
(frame, character) pairs, their harmonic mean F1, and the share of frames with exactly the right
characters. Pose and place are asked for each character that should be there; those of a missing one
are wrong. Scenery agrees where it is in the same position as in the frame before, of the same
scene. Intervals come from resampling complete stories, because the frames of one story share
characters and scene and so are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from contextualstory_jax.data.example import FrameLabels
from contextualstory_jax.data.shapes_reader import FrameReading

RESAMPLES = 1000
CONFIDENCE = 0.95

METRICS = (
    "character_precision",
    "character_recall",
    "character_f1",
    "frame_accuracy",  # frames with exactly the right characters
    "pose_accuracy",
    "place_accuracy",
    "scene_accuracy",
    "scenery_agreement",
)
SUBSETS = (
    "all",
    "needs_context",  # frames whose own sentence does not say who is there, or where
)

Report = dict[str, dict[str, Any]]


class CharacterMetrics:
    """Counts the frames of stories; `compute` gives the metrics of all so far."""

    def __init__(self) -> None:
        self._counts: dict[str, Int[np.ndarray, "s n"]] = {}

    def update(
        self, story: str, readings: Sequence[FrameReading], labels: Sequence[FrameLabels]
    ) -> None:
        """Count successive frames of a story, which may be spread over several calls."""
        befores = (None, *zip(readings, labels, strict=True))
        for reading, label, before in zip(readings, labels, befores, strict=False):
            counts = _counts(reading, label, before)
            of_story = self._counts.get(story, 0)
            self._counts[story] = of_story + np.outer((1, bool(label.needs_context)), counts)

    def compute(self) -> Report:
        """For each of `SUBSETS`: `frames`, and for each of `METRICS` its `value`, `low` and `high`.

        A metric whose denominator is nought, such as the precision of a model that shows nobody,
        is 0; all are None where there are no frames, and scenery's where none has one before it.
        """
        counts = np.stack(list(self._counts.values()))
        return _report(counts.sum(axis=0), _metrics(counts.sum(axis=0)), _resampled(counts))

    def difference(self, other: CharacterMetrics) -> Report:
        """These metrics minus another's of the same stories, with paired intervals.

        Raises ValueError where the stories differ.
        """
        if self._counts.keys() != other._counts.keys():
            raise ValueError("a paired difference needs the same stories")
        ours = np.stack(list(self._counts.values()))
        theirs = np.stack([other._counts[story] for story in self._counts])
        value = _metrics(ours.sum(axis=0)) - _metrics(theirs.sum(axis=0))
        return _report(ours.sum(axis=0), value, _resampled(ours) - _resampled(theirs))


def _counts(
    reading: FrameReading, label: FrameLabels, before: tuple[FrameReading, FrameLabels] | None
) -> list[int]:
    """A frame's counts, in the order that `_metrics` takes them."""
    shown, true = Counter(reading.characters), Counter(label.characters)
    figures = [(name, figure) for name, figure in reading.figures]
    poses, places = label.poses or {}, label.places or {}
    compared = before is not None and before[1].scene == label.scene
    return [
        1,
        (shown & true).total(),
        shown.total(),
        true.total(),
        shown == true,
        sum(any(n == name and f.pose == poses[name] for n, f in figures) for name in poses),
        sum(any(n == name and f.place == places[name] for n, f in figures) for name in places),
        reading.scene == label.scene,
        compared,
        before is not None and compared and reading[1:] == before[0][1:] != (None, None),
    ]


def _resampled(counts: Int[np.ndarray, "b s n"]) -> Float[np.ndarray, "r s m"]:
    """`METRICS` of resamples of as many stories as there are, the same for as many stories."""
    stories = len(counts)
    sampled = np.random.default_rng(0).multinomial(
        stories, np.full(stories, 1 / stories), size=RESAMPLES
    )
    return _metrics(np.einsum("rb,bsn->rsn", sampled, counts))


def _report(
    total: Int[np.ndarray, "s n"],
    values: Float[np.ndarray, "s m"],
    resampled: Float[np.ndarray, "r s m"],
) -> Report:
    tail = (1 - CONFIDENCE) / 2
    report: Report = {}
    for s, subset in enumerate(SUBSETS):
        report[subset] = {"frames": int(total[s, 0])}
        for m, metric in enumerate(METRICS):
            numbers = [None] * 3
            if np.isfinite(values[s, m]):
                # A resample may hold no frame of the subset, and then has no metrics.
                interval = np.nanquantile(resampled[:, s, m], (tail, 1 - tail))
                numbers = [float(values[s, m]), *interval.tolist()]
            report[subset][metric] = dict(zip(("value", "low", "high"), numbers, strict=True))
    return report


def _metrics(counts: Int[np.ndarray, "*r s n"]) -> Float[np.ndarray, "*r s m"]:
    """`METRICS` of summed counts; nan where there are no frames."""
    frames, right, shown, true, exact, pose, place, scene, pairs, same = np.moveaxis(counts, -1, 0)
    ratios = np.stack(
        [
            right / np.maximum(shown, 1),
            right / np.maximum(true, 1),
            2 * right / np.maximum(shown + true, 1),
            exact / np.maximum(frames, 1),
            pose / np.maximum(true, 1),
            place / np.maximum(true, 1),
            scene / np.maximum(frames, 1),
            np.where(pairs > 0, same / np.maximum(pairs, 1), np.nan),
        ],
        axis=-1,
    )
    return np.where(frames[..., None] > 0, ratios, np.nan)
