from __future__ import annotations

import numpy as np
import pytest

from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.measurement import (
    Interval,
    Options,
    bootstrap_interval,
    difference,
    jackknife_interval,
    mean_interval,
)
from contextualstory_jax.evaluation.paired import over_seeds
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.report import lines, measure, prepare
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.utils.errors import UserError
from tests.helpers.noisy_results import write_noisy_results
from tests.helpers.tiny_clip import write_clip


def test_a_mean_resamples_stories_not_frames():
    stories = [f"s{n // 5}" for n in range(100)]
    values = np.repeat(np.arange(20) % 2, 5).astype(float)  # all frames of a story alike

    interval = mean_interval(values, stories)

    assert interval.value == 0.5
    # Of 20 coins: 1.96 x sqrt(0.25 / 20) = 0.22; of 100 it would be 0.1.
    assert interval.high - interval.low == pytest.approx(0.44, abs=0.05)


def test_differences_of_the_same_stories_have_narrow_intervals():
    rng = np.random.default_rng(0)
    stories = [f"s{n}" for n in range(50)]
    values = rng.normal(size=50)
    better = values + 0.1 + 0.01 * rng.normal(size=50)

    first, second = mean_interval(better, stories), mean_interval(values, stories)
    found = difference(first, second)

    assert found.value == pytest.approx((better - values).mean())
    assert 0.09 < found.low < found.value < found.high < 0.11
    assert first.low < second.value  # by themselves they overlap
    assert difference(Interval(3.0), Interval(1.0)) == (2.0, None, None, *Interval(0.0)[3:])


def test_a_jackknife_s_difference_is_the_jackknife_of_the_difference():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 20))

    found = difference(jackknife_interval(1.0, left), jackknife_interval(0.0, right))

    assert found[:3] == jackknife_interval(1.0, left - right)[:3]


def test_a_statistic_of_sums_is_resampled():
    counts = np.array([[1.0, 2.0], [2.0, 2.0], [0.0, 2.0], [1.0, 2.0]])

    interval = bootstrap_interval(counts, lambda c: c[..., 0] / c[..., 1])

    assert interval.value == 0.5
    assert set(interval.replicates) <= {n / 8 for n in range(9)}
    assert len(interval.replicates) == 1000


def test_seeds_are_reported_by_mean_and_deviation():
    folders = [{"fid": Interval(v)} for v in (1.0, 2.0, 6.0)]

    assert over_seeds(folders)["fid"] == {
        "values": [1.0, 2.0, 6.0],
        "mean": 3.0,
        "deviation": pytest.approx(np.sqrt(7)),
    }


def test_a_report_has_differences_and_seeds(tmp_path):
    write_clip(tmp_path)
    near, noisy, again = (
        write_noisy_results(tmp_path / name, 6, seed, noise)
        for name, seed, noise in (("near", 0, 0.2), ("noisy", 0, 0.6), ("again", 1, 0.2))
    )
    features = Features(4, tmp_path / "features")
    asked = prepare(near, near, PROTOCOLS["pytorch-fid"], Weights(tmp_path), features, Options())

    report = measure(["clip"], asked, seeds=[again], compared=noisy)

    gap = report["difference"]["clip_i"]
    assert gap["low"] < gap["value"] < gap["high"]
    alone = measure(["clip"], asked._replace(generated=prepare_generated(noisy, asked)))
    assert gap["value"] == pytest.approx(report["clip_i"]["value"] - alone["clip_i"]["value"])
    seeds = report["seeds"]["clip_i"]
    assert seeds["values"][0] == report["clip_i"]["value"]
    assert seeds["mean"] == pytest.approx(sum(seeds["values"]) / 2)
    text = "\n".join(lines(report))
    assert "over 2 seeds" in text and "difference" in text
    assert "replicates" not in str(report)


def prepare_generated(folder, asked):
    made = prepare(
        folder, folder, PROTOCOLS["pytorch-fid"], asked.weights, asked.features, asked.options
    )
    return made.generated


def test_folders_of_other_stories_are_not_compared(tmp_path):
    write_clip(tmp_path)
    six, five = (write_noisy_results(tmp_path / f"of{n}", n) for n in (6, 5))
    features = Features(4, tmp_path / "features")
    asked = prepare(six, six, PROTOCOLS["pytorch-fid"], Weights(tmp_path), features, Options())

    with pytest.raises(UserError, match="hold different frames, such as 00005-s5 in one alone"):
        measure(["clip"], asked, compared=five)
    with pytest.raises(UserError, match="hold different frames"):
        measure(["clip"], asked, seeds=[five])
