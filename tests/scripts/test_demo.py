"""The demo that `make demo` runs, with seconds of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.heavy
def test_the_demo_ends_in_a_storybook_and_can_run_again(tmp_path):
    for _ in range(2):
        done = demo("--out", tmp_path, "--train-minutes", 0.01, "--stories", 8)

        assert done.returncode == 0, done.stderr
        page = tmp_path / "storybook.html"
        assert page.as_uri() in done.stdout
        assert "character f1" in done.stdout
        assert all(name in page.read_text() for name in ("shipped", "trained just now"))
        page.unlink()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--stories", 0], "--stories must be at least 1; got 0"),
        (["--train-minutes", 0], "--train-minutes must be positive; got 0"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, reason, tmp_path):
    done = demo("--out", tmp_path / "out", *arguments)

    assert done.returncode == 2
    assert done.stderr == f"error: {reason}\n"


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "thesis.txt").write_text("all of it")

    done = demo("--out", tmp_path)

    assert done.returncode == 2
    assert "is not of an earlier demo" in done.stderr
    assert (tmp_path / "training" / "thesis.txt").exists()
