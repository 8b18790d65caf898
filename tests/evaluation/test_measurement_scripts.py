"""The scripts that measure kept frames and long stories, each on a few stories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from contextualstory_jax.evaluation.metrics.characters import METRICS

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.slow


def measured(script, tmp_path, *options):
    """What a script writes to --json."""
    file = tmp_path / "measured.json"
    command = [sys.executable, str(SCRIPTS / script), "--json", str(file), *options]
    subprocess.run(command, check=True, cwd=tmp_path)
    return json.loads(file.read_text())


def test_a_kept_frames_story_is_measured_each_way(tmp_path):
    found = measured("measure_kept_frames.py", tmp_path, "--stories", "2", "--steps", "2")

    ways = ["entire", "other seed", "regenerated", "near"]
    assert list(found["metrics"]) == ways
    assert list(found["differences"]) == [f"{way} - entire" for way in ways[1:]]
    for report in (*found["metrics"].values(), *found["differences"].values()):
        assert report["all"]["frames"] == 2
        assert set(METRICS) < set(report["all"])
    assert found["settings"]["frame"] == 2


def test_long_stories_are_measured_by_position_and_at_seams(tmp_path):
    found = measured(
        "measure_long_stories.py",
        tmp_path,
        "--stories",
        "2",
        "--sentences",
        "12",
        "--batch-size",
        "2",
    )

    for way in ("own", "named"):
        frames = {
            name.removeprefix(f"{way} "): report["all"]["frames"]
            for name, report in found["metrics"].items()
            if name.startswith(way)
        }
        # Windows begin at 0, 3, 6 and 7, and their new frames at 5, 8 and 11.
        assert frames == {"1-5": 10, "6-10": 10, "11-15": 4, "seams": 12, "inside": 32}
    assert "own 11-15 - own 6-10" in found["differences"]
    assert "named 11-15 - named 1-5" in found["differences"]
    assert "own seams - own inside" in found["differences"]
