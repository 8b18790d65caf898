"""Metrics on frames small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from contextualstory_jax.data.example import FrameLabels
from contextualstory_jax.data.shapes import Figure
from contextualstory_jax.data.shapes_reader import FrameReading
from contextualstory_jax.evaluation.metrics.characters import METRICS, CharacterMetrics


def reading(shown="", scene="beach", turn=0, pose="stand", place="left"):
    """A frame that was read; each letter of `shown` is a character."""
    return FrameReading(tuple((name, Figure(place, pose)) for name in shown), scene, turn)


def label(true="", scene="beach", needs_context=False, pose="stand", place="left"):
    """A frame's labels; each letter of `true` is a character."""
    poses, places = dict.fromkeys(true, pose), dict.fromkeys(true, place)
    return FrameLabels(frozenset(true), scene, needs_context, poses, places)


def counted(*frames):
    """Metrics of frames, each (reading, label) in a call of its own, of one story."""
    metrics = CharacterMetrics()
    for shown, true in frames:
        metrics.update("a", [shown], [true])
    return metrics


def values(part):
    return {metric: part[metric]["value"] for metric in METRICS}


def test_characters_are_counted_over_all_frames_together():
    found = counted(
        (reading("mo"), label("mo")),  # 2 right
        (reading("mz"), label("m")),  # 1 right, 1 too many
        (reading("", scene=None, turn=None), label("eih")),  # 3 missing
    ).compute()

    assert found["all"]["frames"] == 3
    assert values(found["all"]) == pytest.approx(
        {
            "character_precision": 3 / 4,
            "character_recall": 3 / 6,
            "character_f1": 6 / 10,
            "frame_accuracy": 1 / 3,
            "pose_accuracy": 3 / 6,
            "place_accuracy": 3 / 6,
            "scene_accuracy": 2 / 3,
            "scenery_agreement": None,
        }
    )


def test_a_character_that_is_there_twice_is_wrong():
    found = values(counted((reading("mm"), label("m"))).compute()["all"])

    assert (found["character_precision"], found["character_recall"]) == (1 / 2, 1)
    assert found["frame_accuracy"] == 0


def test_pose_and_place_are_asked_for_each_character_that_should_be_there():
    found = counted(
        (reading("mo", pose="wave"), label("mo", pose="wave", place="right")),
        (reading("m", place="right"), label("mo", pose="jump", place="right")),
    ).compute()["all"]

    assert found["pose_accuracy"]["value"] == 2 / 4
    assert found["place_accuracy"]["value"] == 1 / 4


def test_scenery_agrees_with_the_frame_before_of_the_same_scene():
    beach, snow = label("m"), label("m", scene="snow")
    readings = [
        reading("m", turn=3),
        reading("m", turn=3),  # agrees
        reading("m", turn=4),  # does not
        reading("m", scene="snow", turn=4),  # another scene: not asked
        reading("m", scene=None, turn=None),
        reading("m", scene=None, turn=None),  # both unreadable: does not agree
    ]
    metrics = CharacterMetrics()
    metrics.update("a", readings, [beach, beach, beach, snow, snow, snow])

    assert metrics.compute()["all"]["scenery_agreement"]["value"] == 1 / 4


def test_frames_that_need_context_are_reported_by_themselves():
    found = counted(
        (reading("m"), label("m")),
        (reading("o", scene="snow"), label("m", needs_context=True)),
        (reading("m", scene="snow"), label("m", needs_context=True)),
    ).compute()

    assert found["needs_context"]["frames"] == 2
    assert found["needs_context"]["character_f1"]["value"] == 1 / 2
    assert found["needs_context"]["scene_accuracy"]["value"] == 0
    assert found["all"]["character_f1"]["value"] == 2 / 3


def many(count, shown):
    """Stories of five equal frames, of which number `i` shows `shown(i)` and should show m."""
    metrics = CharacterMetrics()
    for i in range(count):
        metrics.update(f"{i}", [reading(shown(i))] * 5, [label("m")] * 5)
    return metrics


def test_calls_add_up():
    once, spread = CharacterMetrics(), CharacterMetrics()
    frames = [(reading("mo"[: i % 3]), label("mz"[: i % 2 + 1])) for i in range(40)]
    for i, (shown, true) in enumerate(frames):
        spread.update(f"{i // 20}", [shown], [true])
    for story in range(2):
        part = frames[20 * story : 20 * story + 20]
        once.update(f"{story}", *map(list, zip(*part, strict=True)))

    for name in set(METRICS) - {"scenery_agreement"}:
        assert once.compute()["all"][name] == spread.compute()["all"][name]


def test_perfect_frames_have_intervals_of_no_width():
    part = many(8, lambda i: "m").compute()["all"]

    assert all(part[metric] == {"value": 1, "low": 1, "high": 1} for metric in METRICS)


def test_the_interval_is_that_of_resampled_stories():
    # 30 of 40 stories are right in all five frames: the share has the spread of 40 draws, not 200.
    accuracy = many(40, lambda i: "m" if i < 30 else "o").compute()["all"]["frame_accuracy"]

    spread = 1.96 * np.sqrt(0.75 * 0.25 / 40)
    assert accuracy["value"] == 0.75
    assert accuracy["low"] == pytest.approx(0.75 - spread, abs=0.03)
    assert accuracy["high"] == pytest.approx(0.75 + spread, abs=0.03)


def test_a_difference_is_paired():
    # The same 30 stories are right both times, and 4 more: their variation cancels.
    worse, better = (many(40, lambda i, n=n: "m" if i < n else "o") for n in (30, 34))

    accuracy = better.difference(worse)["all"]["frame_accuracy"]

    spread = 1.96 * np.sqrt(0.1 * 0.9 / 40)
    assert accuracy["value"] == pytest.approx(0.1)
    assert accuracy["low"] == pytest.approx(0.1 - spread, abs=0.03)
    assert accuracy["high"] == pytest.approx(0.1 + spread, abs=0.03)


def test_a_difference_needs_the_same_stories():
    with pytest.raises(ValueError, match="a paired difference needs the same stories"):
        many(3, lambda i: "m").difference(many(4, lambda i: "m"))


def test_showing_nobody_has_precision_zero():
    part = counted((reading(""), label("m"))).compute()["all"]

    assert part["character_precision"]["value"] == part["character_f1"]["value"] == 0


def test_a_part_without_frames_has_no_metrics():
    part = counted((reading("m"), label("m"))).compute()["needs_context"]

    assert part["frames"] == 0
    assert part["character_f1"] == {"value": None, "low": None, "high": None}


def test_a_part_that_most_stories_lack_has_finite_intervals():
    metrics = many(5, lambda i: "m")
    metrics.update("rare", [reading("m")], [label("m", needs_context=True)])

    found = metrics.compute()["needs_context"]["character_f1"]

    assert found == {"value": 1, "low": 1, "high": 1}
