"""Training in several processes, and what ends it: tests that start processes of their own.

Each process is the command, on devices that the CPU passes for; all train the tiny recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.checkpoints.manager import Checkpoints
from contextualstory_jax.distributed.multihost import (
    StopRequest,
    connect,
    gather,
    require_agreement,
)
from contextualstory_jax.utils.errors import UserError
from tests.helpers.devices import environment
from tests.utils.test_interruption import INTERRUPTIBLE

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "helpers" / "tiny_config.py"
# Every step is a step of the optimizer from the first on, and eight devices have a story each.
STEPS = ("batch_size=8", "optimizer.schedule=constant", "optimizer.warmup_steps=0")
MEETING = ("--coordinator", "--processes", "--process")


def start(
    workdir: Path, *overrides: str, processes: int = 1, devices: int = 1, own: dict | None = None
) -> list[subprocess.Popen[str]]:
    """Start the command in so many processes; `own`, more overrides of one process by its number.

    A single one is started as a user would.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [f"--config.{override}" for override in (*STEPS, *overrides)]
    command = [sys.executable, "-m", "contextualstory_jax.train", "--config", str(RECIPE)]
    command += ["--workdir", str(workdir), *arguments]
    started = []
    for number in range(processes):
        meeting = zip(MEETING, (address, str(processes), str(number)), strict=True)
        options = [word for pair in meeting for word in pair] if processes > 1 else []
        options += [f"--config.{override}" for override in (own or {}).get(number, ())]
        started.append(
            subprocess.Popen(
                [*INTERRUPTIBLE, *command, *options],
                cwd=ROOT,
                env=environment(devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(processes: list[subprocess.Popen[str]], status: int = 0) -> list[tuple[str, str]]:
    """What each process printed, on stdout and stderr, when all have ended with `status`."""
    printed = []
    try:
        for process in processes:
            printed.append(process.communicate(timeout=1200))
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == status, errors[-3000:]
    return printed


def metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def assert_close(ours: Path, theirs: Path) -> None:
    """The same steps, losses and norms, to float32's rounding."""
    for a, b in zip(metrics(ours), metrics(theirs), strict=True):
        for name in ("step", "loss", "grad_norm", "param_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a["step"])


def stored(workdir: Path, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint, in order of names."""
    from contextualstory_jax.config.config_files import load_config
    from contextualstory_jax.distributed.sharding import Placement, make_mesh
    from contextualstory_jax.models.story_model import StoryModel
    from contextualstory_jax.training import start_state

    config = load_config(RECIPE)
    placement = Placement(make_mesh(config.mesh))
    abstract = start_state.abstract_state(StoryModel(config.model), config, placement)
    with Checkpoints(workdir) as checkpoints:
        items = checkpoints.restore(step, start_state.to_items(abstract))
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(items)]


def assert_same(ours: Path, theirs: Path, step: int) -> None:
    """The same state, bit for bit."""
    for a, b in zip(stored(ours, step), stored(theirs, step), strict=True):
        np.testing.assert_array_equal(a, b)


def train_three(workdir: Path, *overrides: str, **how: int) -> list[tuple[str, str]]:
    """A step, of which a copy is left in `workdir.with_suffix(".1")`, and after it two more."""
    finish(start(workdir, "steps=1", *overrides, **how))
    shutil.copytree(workdir, workdir.with_suffix(".1"))
    return finish(start(workdir, "steps=3", *overrides, **how))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    train_three(workdir)
    return workdir


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """Three steps in two processes of four devices, and what they printed from the second on."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    mesh = ("mesh.data=2", "mesh.fsdp=4", "keep_best=1")
    return workdir, train_three(workdir, *mesh, processes=2, devices=4)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_two_processes_of_four_devices_train_as_one_device(one, two_processes):
    workdir, _ = two_processes

    assert_close(workdir, one)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_the_first_process_alone_speaks_and_all_draw(two_processes):
    workdir, ((out, errors), (silent, others)) = two_processes

    assert "trained parameters: " in out and "step 3: loss" in out and "3/3" in errors
    assert "parameters" not in silent and "step" not in others
    assert (workdir / "samples" / "step_0000003.png").is_file()
    assert all(line["validation_loss"] > 0 for line in metrics(workdir) if line["step"] != 2)


@pytest.mark.heavy
@pytest.mark.multiprocess
@pytest.mark.parametrize("devices", [1, 8])
def test_what_two_processes_saved_goes_on_in_one(one, two_processes, tmp_path, devices):
    workdir = shutil.copytree(two_processes[0].with_suffix(".1"), tmp_path / "run")

    finish(start(workdir, "steps=3", devices=devices))

    assert_close(workdir, one)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_what_one_device_saved_goes_on_in_two_processes(one, tmp_path):
    workdir = shutil.copytree(one.with_suffix(".1"), tmp_path / "run")
    mesh = ("mesh.data=2", "mesh.fsdp=4", "keep_best=1")

    finish(start(workdir, "steps=3", *mesh, processes=2, devices=4))

    assert_close(workdir, one)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_training_on_all_three_axes_is_that_of_one_device_and_goes_on_exactly(one, tmp_path):
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    train_three(tmp_path / "run", *mesh, devices=8)
    finish(start(tmp_path / "whole", "steps=3", *mesh, devices=8))

    assert_close(tmp_path / "whole", one)
    assert_same(tmp_path / "run", tmp_path / "whole", 3)


@pytest.mark.multiprocess
def test_processes_that_disagree_are_told_where(tmp_path):
    own = {1: ["optimizer.learning_rate=0.5"]}

    printed = finish(start(tmp_path / "run", processes=2, own=own), status=2)

    for _, errors in printed:
        assert errors.splitlines()[-1] == (
            "error: processes disagree: optimizer.learning_rate is 0.002 in process 0 and 0.5 in "
            "process 1; start all with the same arguments"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_never_meet_say_so(tmp_path, number):
    command = [sys.executable, "-m", "contextualstory_jax.train", "--config", str(RECIPE)]
    command += ["--workdir", str(tmp_path / "run"), "--coordinator", "127.0.0.1:1"]
    if number == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command[-1] = f"127.0.0.1:{free.getsockname()[1]}"
    command += ["--processes", "2", "--process", str(number), "--connect-seconds", "3"]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"error: processes did not meet in 3 seconds: waited for all 2 at {command[-7]}; start"
    )
    assert not (tmp_path / "run").exists()


def wait_until(found: object, process: subprocess.Popen[str]) -> None:
    """Wait for `found()`."""
    while not found():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.002)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_a_kill_while_a_checkpoint_is_written_loses_no_more_than_it(one, tmp_path):
    workdir = tmp_path / "run"
    (process,) = start(workdir, "steps=100000", "checkpoint_every=1")
    # Some checkpoints are whole; another is being written.
    wait_until(
        lambda: (
            (workdir / "checkpoints" / "4").exists()
            and list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        ),
        process,
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Checkpoints(workdir) as checkpoints:
        last = checkpoints.latest
    assert last is not None and last >= 4
    reached = len(metrics(workdir))

    finish(start(workdir, f"steps={reached + 1}", "checkpoint_every=1"))
    finish(start(tmp_path / "whole", f"steps={reached + 1}"))

    assert reached - last <= 2  # one being written, and the step meanwhile
    assert [line["step"] for line in metrics(workdir)] == list(range(1, reached + 2))
    assert_same(workdir, tmp_path / "whole", reached + 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.heavy), 2])
def test_sigterm_saves_and_ends_well(tmp_path, processes):
    workdir = tmp_path / "run"
    running = start(workdir, "steps=100000", "checkpoint_every=100000", processes=processes)
    wait_until(
        lambda: (workdir / "metrics.jsonl").exists() and len(metrics(workdir)) > 2, running[-1]
    )

    running[-1].send_signal(signal.SIGTERM)
    printed = finish(running)

    stopped = len(metrics(workdir))
    assert f"SIGTERM: stopped after step {stopped}; the same command resumes" in printed[0][0]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {str(stopped)}
    finish(start(workdir, f"steps={stopped + 1}"))
    assert [line["step"] for line in metrics(workdir)] == list(range(1, stopped + 2))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "interrupted", [[1], pytest.param([0, 1], marks=pytest.mark.heavy)], ids=["one", "both"]
)
def test_ctrl_c_stops_both_processes_after_the_same_step(tmp_path, interrupted):
    workdir = tmp_path / "run"
    running = start(workdir, "steps=100000", "checkpoint_every=100000", processes=2)
    wait_until(
        lambda: (workdir / "metrics.jsonl").exists() and len(metrics(workdir)) > 2, running[-1]
    )

    for number in interrupted:
        running[number].send_signal(signal.SIGINT)
    printed = finish(running, status=130)

    stopped = len(metrics(workdir))
    assert f"interrupted, checkpoint {stopped} saved" in printed[0][0]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {str(stopped)}
    assert not any("Traceback" in errors for _, errors in printed)


# ----------------------------------------------------------------------------- in this process


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"processes": 2}, "--coordinator, --processes and --process go together"),
        ({"coordinator": "here"}, "--coordinator, --processes"),
        ({"coordinator": "here", "processes": 2, "process": 0}, "must be HOST:PORT; got 'here'"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, r"must be in 0\.\.1; got 2"),
        ({"connect_seconds": 0}, "--connect-seconds must be at least 1; got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(values, message):
    given = {"coordinator": None, "processes": None, "process": None, "connect_seconds": 9}

    with pytest.raises(UserError, match=message):
        connect(argparse.Namespace(**{**given, **values}))


def test_one_process_meets_and_asks_nobody():
    connect(argparse.Namespace(coordinator=None, processes=None, process=None, connect_seconds=9))
    require_agreement({"a": 1})

    assert gather("text") == ["text"]


def test_sigterm_is_taken_over_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(2)

    assert signal.getsignal(signal.SIGTERM) is before
