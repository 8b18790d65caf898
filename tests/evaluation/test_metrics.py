"""Metrics on outcomes small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from contextualstory_jax.evaluation.metrics.characters import METRICS, CharacterMetrics, Outcome


def outcome(story="a", shown="", true="", scene_right=True, needs_context=False):
    """A frame; each letter of `shown` and `true` is a character."""
    shown_scene = "beach" if scene_right else None
    return Outcome(story, set(shown), set(true), shown_scene, "beach", needs_context)


def report(outcomes):
    metrics = CharacterMetrics()
    metrics.update(outcomes)
    return metrics.compute()


def values(part):
    return {metric: part[metric]["value"] for metric in METRICS}


def test_characters_are_counted_over_all_frames_together():
    found = report(
        [
            outcome(shown="mo", true="mo"),  # 2 right
            outcome(shown="mz", true="m"),  # 1 right, 1 too many
            outcome(shown="", true="eih", scene_right=False),  # 3 missing
        ]
    )

    assert found["all"]["frames"] == 3
    assert values(found["all"]) == pytest.approx(
        {
            "character_precision": 3 / 4,
            "character_recall": 3 / 6,
            "character_f1": 6 / 10,
            "frame_accuracy": 1 / 3,
            "scene_accuracy": 2 / 3,
        }
    )


def test_frames_that_need_context_are_reported_by_themselves():
    found = report(
        [
            outcome(shown="m", true="m"),
            outcome(shown="o", true="m", needs_context=True, scene_right=False),
            outcome(shown="m", true="m", needs_context=True, scene_right=False),
        ]
    )

    assert found["needs_context"]["frames"] == 2
    assert found["needs_context"]["character_f1"]["value"] == 1 / 2
    assert found["needs_context"]["scene_accuracy"]["value"] == 0
    assert found["all"]["character_f1"]["value"] == 2 / 3


def test_batches_add_up():
    outcomes = [outcome(f"{i // 2}", "mo"[: i % 3], "mz"[: i % 2 + 1]) for i in range(40)]
    metrics = CharacterMetrics()
    for start in range(0, 40, 7):
        metrics.update(outcomes[start : start + 7])

    assert metrics.compute() == report(outcomes)


def test_perfect_frames_have_intervals_of_no_width():
    part = report([outcome(f"{i}", "mo", "mo") for i in range(8)])["all"]

    assert all(part[metric] == {"value": 1, "low": 1, "high": 1} for metric in METRICS)


def test_the_interval_is_that_of_resampled_stories():
    # 30 of 40 stories are right in all five frames: the share has the spread of 40 draws, not 200.
    found = report([outcome(f"{i}", "m", "m" if i < 30 else "o") for i in range(40)] * 5)

    accuracy = found["all"]["frame_accuracy"]
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 40)
    assert accuracy["value"] == 0.75
    assert accuracy["low"] == pytest.approx(0.75 - spread, abs=0.03)
    assert accuracy["high"] == pytest.approx(0.75 + spread, abs=0.03)


def test_showing_nobody_has_precision_zero():
    part = report([outcome(shown="", true="m")])["all"]

    assert part["character_precision"]["value"] == part["character_f1"]["value"] == 0


def test_a_part_without_frames_has_no_metrics():
    part = report([outcome(shown="m", true="m")])["needs_context"]

    assert part["frames"] == 0
    assert part["character_f1"] == {"value": None, "low": None, "high": None}


def test_a_part_that_most_stories_lack_has_finite_intervals():
    rare = outcome("rare", "m", "m", needs_context=True)

    found = report([rare, *(outcome(f"{i}", "m", "m") for i in range(5))])

    assert found["needs_context"]["character_f1"] == {"value": 1, "low": 1, "high": 1}
