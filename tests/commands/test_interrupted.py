"""Ctrl-C in each phase of each command: status 130, no traceback, nothing partial."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from contextualstory_jax.checkpoints.manager import latest_step
from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.conversion.torch_names import torch_key, torch_shape
from contextualstory_jax.evaluation.inception_features import fid_network
from contextualstory_jax.testing.parity_weights import torch_weight
from contextualstory_jax.testing.published_folders import write_pororo
from tests.conftest import write_untrained
from tests.conversion.test_import_torch import tiny_folder
from tests.utils.test_interruption import INTERRUPTIBLE, STOPPING

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRAINS, CACHES = (
    ROOT / "tests" / "helpers" / "tiny_config.py",
    ROOT / "tests" / "helpers" / "tiny_stories_config.py",
)
SENTENCES = ["Mia walks."] * 5
LOADING = "numpy is loaded"
FAST = "--xla_backend_optimization_level=0"  # compiles in half the time
LOGGED = {"JAX_LOG_COMPILES": "1"}
COMPILING = LOGGED | {"JAX_ENABLE_COMPILATION_CACHE": "false"}


@pytest.fixture(scope="module")
def given(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands read, by name."""
    root = tmp_path_factory.mktemp("given")
    stories = root / "stories"
    stories.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(noise).save(stories / "0.png")
    for number in range(1, 2000):  # which takes seconds to read
        os.link(stories / "0.png", stories / f"{number}.png")
    lines = [
        {
            "id": f"s{number}",
            "sentences": SENTENCES,
            "frames": [f"{5 * number + i}.png" for i in range(5)],
            "split": "test",
        }
        for number in range(400)
    ]
    (stories / "stories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = [{key: line[key] for key in ("id", "sentences")} for line in lines]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    data = {"data": {"name": "folder", "root": str(stories)}}
    (root / "evaluated.py").write_text(f"def get_config():\n    return {data}\n")
    return {
        "stories": stories,
        "prompts": root / "prompts.jsonl",
        "test": root / "evaluated.py",
        "pororo": write_pororo(root / "pororo"),
        "checkpoint": tiny_checkpoint,
        "encoders": write_untrained(load_config(CACHES).model, root / "encoders"),
        "released": tiny_folder(root),
        "weights": inception_weights(root / "weights"),
    }


def inception_weights(folder: Path) -> Path:
    """A folder with weights of FID's InceptionV3 that follow from names."""
    folder.mkdir()
    tensors = {}
    for name, declared in fid_network().shapes.items():
        key = torch_key(name, len(declared.shape))
        tensors[key] = torch_weight(key, torch_shape(name, declared.shape), 0)
    save_file(tensors, folder / "fid_inception.safetensors")
    return folder


def arguments(command: str, given: dict[str, Path], out: Path) -> list[str]:
    """A command that has much to do."""
    lines = given["prompts"]
    encodes = ["--config", CACHES, f"--config.data.root={given['pororo']}"]
    encodes += ["--checkpoint", given["encoders"]]
    generates = ["--checkpoint", given["checkpoint"], "--out", out, "--batch-size", 1]
    words = {
        "train": ["--config", TRAINS, "--workdir", out, "--config.data.workers=1"],
        "generate": ["--stories", lines, *generates],
        "evaluate": ["--config", given["test"], *generates],
        "prepare": ["folder", "--source", given["stories"], "--out", out],
        "cache-latents": [*encodes, "--out", out],
        "storyflow-mean": [*encodes, "--write"],
        "convert": [given["released"], out],
        "export": [given["encoders"], out],
        "push": ["shipped", "alice/stories", "--dry-run", out],
        "measure": [given["stories"], given["stories"], "--weights-dir", given["weights"]],
    }
    return [str(word) for word in words[command]]


def start(words: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start a command as a shell does, in a process group of its own."""
    with log.open("w") as file:
        return subprocess.Popen(
            [*INTERRUPTIBLE, sys.executable, "-m", *words],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": FAST, **variables},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def wait_for(begun: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a phase has begun."""
    end = time.monotonic() + 600
    while not begun() and time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)


def ctrl_c(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def ended(process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> str:
    """What a command printed, when it has ended as it should after Ctrl-C."""
    status = process.wait(timeout=seconds)
    printed = log.read_text()
    assert status == 130, printed[-3000:]
    assert "Traceback" not in printed and "interrupted" in printed, printed[-3000:]
    return printed


def partial(folder: Path) -> list[Path]:
    """What looks like something unfinished."""
    return [path for path in folder.rglob("*") if path.name.startswith(".") or "tmp" in path.name]


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log.txt"


NAMES = "train generate evaluate prepare cache-latents storyflow-mean convert export measure push"
COMMANDS = NAMES.split()
MODULES = [f"contextualstory_jax {command}" for command in COMMANDS]
MODULES += [f"contextualstory_jax.{command}" for command in COMMANDS[:3]]


@pytest.mark.parametrize("module", MODULES)
def test_while_libraries_are_imported(given, tmp_path, log, module):
    command = re.split("[ .]", module)[1]
    process = start([*module.split(), *arguments(command, given, tmp_path / "out")], log)
    maps = Path(f"/proc/{process.pid}/maps")

    wait_for(lambda: b"numpy" in maps.read_bytes(), process, log)
    ctrl_c(process)

    assert ended(process, log).strip() == "interrupted"
    assert not list(tmp_path.iterdir())


# The text or the file that shows that the phase has begun.
PHASES = {
    "train, compiling": ("Compiling jit(train_step)", COMPILING),
    "generate, compiling": ("Compiling jit(denoise_batch)", COMPILING),
    "generate, writing": ("out/s1/story.gif", {}),
    "evaluate, compiling": ("Compiling jit(denoise_batch)", COMPILING),
    "evaluate, writing": ("out/stories/00001-*/story.json", {}),
    "prepare, writing": ("out.partial/dataset/*/.*", {}),
    "prepare, in processes": ("out.partial/dataset/*/.*", {}),
    "cache-latents, compiling": (".out.partial/text-*", COMPILING),
    "cache-latents, encoding": (".out.partial/moments-*", {}),
    "storyflow-mean, encoding": ("Compiling jit(_picture_moments)", LOGGED),
    "convert, writing": (".out.partial", {}),
    "export, writing": (".out.partial", {}),
    "measure, compiling": ("Compiling jit(compute)", COMPILING),
}


@pytest.mark.parametrize("phase", PHASES)
def test_in_a_phase(given, tmp_path, log, phase):
    begun, variables = PHASES[phase]
    command = phase.split(",")[0]
    words = arguments(command, given, tmp_path / "out")
    if command == "prepare":
        words += ["--workers", "2" if "processes" in phase else "1"]
    process = start(["contextualstory_jax", command, *words], log, **variables)

    wait_for(lambda: begun in log.read_text() or list(tmp_path.glob(begun)), process, log)
    ctrl_c(process)

    ended(process, log)
    if "processes" not in phase:  # what those leave, in the folder of work, the next run removes
        assert partial(tmp_path) == []
    complete = {"train", "generate", "evaluate"}  # story by story
    assert (tmp_path / "out").exists() <= (command in complete)


def test_training_finishes_its_step_and_saves(given, tmp_path, log):
    workdir = tmp_path / "out"
    process = start(["contextualstory_jax", "train", *arguments("train", given, workdir)], log)

    wait_for((workdir / "checkpoints" / "20").exists, process, log)
    ctrl_c(process)

    printed = ended(process, log)
    (saved,) = re.findall(r"interrupted, checkpoint (\d+) saved; the same", printed)
    assert STOPPING in printed
    assert 20 <= int(saved) < 150 and latest_step(workdir) == int(saved)
    assert partial(workdir) == []


def test_the_second_one_ends_training_while_it_compiles(given, tmp_path, log):
    words = arguments("train", given, tmp_path / "out")
    # Samples after the first step, by a program that no other test compiles.
    words += ["--config.sample_every=1", "--config.sample_stories=16"]
    process = start(["contextualstory_jax", "train", *words], log, **LOGGED)

    wait_for(lambda: "Compiling jit(denoise_batch)" in log.read_text(), process, log)
    ctrl_c(process)
    wait_for(lambda: STOPPING in log.read_text(), process, log)
    ctrl_c(process)

    printed = ended(process, log, seconds=2)
    assert "saved" not in printed
    assert partial(tmp_path) == []
