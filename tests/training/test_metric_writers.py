"""`metrics.jsonl` and TensorBoard's files, over restarts too."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.training.metric_writers import ScalarWriter
from contextualstory_jax.utils.errors import UserError


def steps(workdir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]


def write(workdir: Path, first_step: int, numbers: range) -> None:
    with contextlib.closing(ScalarWriter(workdir, first_step)) as writer:
        for number in numbers:
            writer.write(number, {"loss": 1 / number})


def test_a_step_is_a_line_of_json(tmp_path):
    write(tmp_path, 0, range(2, 3))

    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2, "loss": 0.5}\n'


def test_lines_are_there_before_the_file_is_closed(tmp_path):
    with contextlib.closing(ScalarWriter(tmp_path, 0)) as writer:
        writer.write(1, {"loss": 0.5})

        assert steps(tmp_path) == [1]


def test_a_restart_takes_back_later_steps(tmp_path):
    write(tmp_path, 0, range(1, 6))

    write(tmp_path, 3, range(4, 8))

    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_line_that_a_kill_cut_short_goes(tmp_path):
    write(tmp_path, 0, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')

    write(tmp_path, 2, range(3, 4))

    assert steps(tmp_path) == [1, 2, 3]


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    with contextlib.closing(ScalarWriter(tmp_path, 0)) as writer:
        writer.write(1, {"loss": 0.5})
        writer.picture(1, "samples", np.zeros((8, 8, 3), np.uint8))

    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    content = events.read_bytes()
    assert b"loss" in content
    assert b"samples" in content
    assert b"PNG" in content


def test_the_same_numbers_go_to_wandb(tmp_path, monkeypatch):
    calls: list[tuple] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append(("end",))
    )
    wandb = types.SimpleNamespace(init=lambda **values: calls.append(("init", values)) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    with contextlib.closing(ScalarWriter(tmp_path / "", 0, "stories")) as writer:
        writer.write(3, {"loss": 0.5})

    (_, settings), *others = calls
    assert (settings["project"], settings["id"], settings["resume"]) == (
        "stories",
        tmp_path.name,
        "allow",
    )
    assert others == [(3, {"loss": 0.5}), ("end",)]


def test_where_wandb_is_missing_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(UserError, match=r"pip install 'contextualstory-jax\[wandb\]'"):
        ScalarWriter(tmp_path, 0, "stories")

    assert not list(tmp_path.iterdir())
