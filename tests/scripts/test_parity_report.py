"""The report of relative errors: what it prints, and bad input in one line."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contextualstory_jax.testing.parity_report import is_shell_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "parity_report.py"
OWN = ROOT / "tests" / "parity" / "cases"
# The script, where importing JAX fails.
WITHOUT_JAX = f"""
import runpy, sys
sys.modules["jax"] = None
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_JAX, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_help_needs_no_jax():
    result = report("--help")

    assert result.returncode == 0, result.stderr
    assert "Two Markdown tables" in result.stdout


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no parity cases (*.json, */case.json) in "),
        ({"a.json": "{"}, "a.json cannot be read"),
        ({"a.json": "[]"}, "a.json is no parity case: it has no kind"),
    ],
)
def test_a_folder_of_no_cases_is_one_line_and_status_2(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    result = report("checkpoint", "--parity-dir", str(tmp_path))

    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_pipeline_case_is_a_checkpoint_s_where_its_folder_is_configured_the_same(tmp_path):
    shell, checkpoint = tmp_path / "shell", tmp_path / "checkpoint"
    for folder in (shell, checkpoint / "released"):
        for part in ("unet", "vae", "text_encoder"):
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps({"part": part}))
    assert is_shell_of(shell, checkpoint)

    (checkpoint / "released" / "vae" / "config.json").write_text(json.dumps({"part": "other"}))

    assert not is_shell_of(shell, checkpoint)
    assert not is_shell_of(shell, tmp_path / "trained")


@pytest.mark.slow
def test_the_tables_hold_every_case_and_every_module(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    for path in OWN.glob("storyline.*"):
        shutil.copy(path, tmp_path)
    arguments = [str(tiny_checkpoint), "--parity-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["parity_report.py", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))

    runpy.run_path(str(SCRIPT), run_name="__main__")

    lines = capsys.readouterr().out.splitlines()
    assert "matmul precision default" in lines[0]
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    float32, bfloat16, tolerance = map(float, rows["storyline"])
    assert 0 < float32 <= tolerance == 1e-5
    assert 1e-4 < bfloat16 < 0.1
    modules = ["text encoder", "Storyline Contextualizer", "StoryFlow Adapter", "UNet"]
    for module in modules:
        float32, bfloat16 = map(float, rows[module])
        assert float32 <= 1e-6  # on a CPU it is what is compared with
        assert 1e-5 < bfloat16 < 0.1
    assert {"VAE encoder", "VAE decoder"} < rows.keys()
