"""The command that trains: arguments, exit statuses, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict

import contextualstory_jax
from contextualstory_jax import UserError, train
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.utils.cli import run

ROOT = Path(__file__).parents[1]
SHAPES, TINY = (
    str(ROOT / "configs" / "shapes.py"),
    str(ROOT / "tests" / "helpers" / "tiny_config.py"),
)
# The command, where importing JAX fails.
WITHOUT_JAX = """
import runpy, sys
sys.modules["jax"] = None
runpy.run_module("contextualstory_jax.train", run_name="__main__", alter_sys=True)
"""


def command_without_jax(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_JAX, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", SHAPES, "--config.stepz=3"], "unknown config key stepz; known: "),
        (["--config", SHAPES, "--config.steps=0"], "steps must be at least 1; got 0"),
        (
            ["--config", "lost.py"],
            "no config lost.py; --config takes a file, or one of ",
        ),
        (["--config", SHAPES, "--steps", "3"], "unrecognized arguments: --steps 3; see --help"),
        ([], "the following arguments are required: --config; see --help"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_before_jax_is_imported(tmp_path, arguments, message):
    workdir = tmp_path / "run"

    result = command_without_jax("--workdir", str(workdir), *arguments)

    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not workdir.exists()


def test_a_finished_run_names_its_results_and_the_next_commands():
    overrides = ["steps=2", "data.root=my folder"]

    text = train.results(Path("run"), 2, "pororo_visualization", overrides)

    assert text.splitlines() == [
        "run: checkpoints/2, samples/, metrics.jsonl, tensorboard/",
        "next: contextualstory-jax generate --checkpoint run --story story.txt --out out",
        "      contextualstory-jax evaluate --checkpoint run --config pororo_visualization "
        "'--config.data.root=my folder' --out evaluation",
    ]


def test_a_workdir_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit) as caught:
        run(lambda: train.main(["--config", SHAPES, "--workdir", str(tmp_path / "file")]))

    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: cannot write to {tmp_path / 'file'}: ")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Path]]:
    """What the trainer, which does nothing here, was called with."""
    from contextualstory_jax.training import trainer

    calls = []

    def train_and_evaluate(*arguments: Any) -> SimpleNamespace:
        calls.append(arguments)
        return SimpleNamespace(step=0)

    monkeypatch.setattr(trainer, "train_and_evaluate", train_and_evaluate)
    return calls


def test_overrides_reach_the_trainer(trained, tmp_path):
    overrides = ["--config.steps=7", "--config.optimizer.learning_rate=1e-4"]

    train.main(["--config", SHAPES, overrides[0], "--workdir", str(tmp_path), overrides[1]])

    ((config, workdir),) = trained
    assert (config.steps, config.optimizer.learning_rate) == (7, 1e-4)
    assert workdir == tmp_path


def test_a_run_that_stopped_early_names_no_next_commands(trained, tmp_path, capsys):
    train.main(["--config", SHAPES, "--workdir", str(tmp_path), "--config.max_minutes=5"])

    assert len(trained) == 1 and "next:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "config", [{"steps": 3}, ConfigDict({"steps": 3}), TrainConfig(steps=3)], ids=type
)
def test_from_python_a_recipe_is_a_mapping_or_built(trained, config):
    contextualstory_jax.train_and_evaluate(config, "run")

    assert trained == [(TrainConfig(steps=3), Path("run"))]


def test_from_python_an_unknown_key_is_named(trained):
    with pytest.raises(UserError, match="unknown config key stepz"):
        contextualstory_jax.train_and_evaluate({"stepz": 3}, "run")

    assert trained == []


def test_divergence_is_one_line_and_status_1(monkeypatch, tmp_path):
    from contextualstory_jax.training import trainer

    def diverge(*_: object) -> None:
        raise trainer.NonFiniteLoss("loss is nan at step 3")

    monkeypatch.setattr(trainer, "train_and_evaluate", diverge)

    with pytest.raises(SystemExit, match="^error: loss is nan at step 3$"):  # a text: status 1
        run(lambda: train.main(["--config", SHAPES, "--workdir", str(tmp_path)]))


# ------------------------------------------------------------------ whole runs of the command


def start(workdir: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command with the tiny recipe."""
    module = [sys.executable, "-m", "contextualstory_jax.train"]
    return subprocess.Popen(
        [*module, "--config", TINY, "--workdir", str(workdir), *overrides],
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a command that succeeds says on stderr."""
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return errors


def logged_steps(workdir: Path) -> Sequence[int]:
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_run_goes_on_without_gap_or_repeat(tmp_path):
    workdir = tmp_path / "run"
    for checkpoint in (20, 60):  # killed twice, some steps after a checkpoint
        process = start(workdir)
        wait_for(workdir / "checkpoints" / str(checkpoint), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert max(logged_steps(workdir)) < 150

    finish(start(workdir))

    assert logged_steps(workdir) == list(range(1, 151))
    assert (workdir / "checkpoints" / "150").is_dir()


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_is_status_1_and_names_the_step(tmp_path):
    high = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=12")

    process = start(tmp_path / "run", *high)
    _, errors = process.communicate(timeout=600)

    assert process.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and " at step " in last
    assert "the last good checkpoint is none" in last


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
    }

    cold = finish(start(tmp_path / "cold", "--config.steps=1", **cache))
    warm = finish(start(tmp_path / "warm", "--config.steps=1", **cache))

    hit = "Persistent compilation cache hit for 'jit_train_step'"
    assert hit not in cold
    assert hit in warm
    assert any(path.name.startswith("jit_train_step") for path in (tmp_path / "cache").iterdir())
