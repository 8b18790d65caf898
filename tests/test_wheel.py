"""The wheel, installed far from a checkout: every command does its work in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from contextualstory_jax.recipes import CONFIGS
from tests.published_folders import write_story_folder
from tests.released import WEIGHT_FILES, tiny_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# The embedded stories' model, made tiny.
TINY = [
    *("--config.model.height=16", "--config.model.width=16", "--config.model.vae.patch=4"),
    *("--config.model.unet.in_channels=48", "--config.model.unet.out_channels=48"),
    *("--config.model.unet.block_out_channels=(32,)", "--config.model.unet.attention_head_dim=2"),
    "--config.model.unet.down_block_types=('CrossAttnDownBlock2D',)",
    "--config.model.unet.up_block_types=('CrossAttnUpBlock2D',)",
    *("--config.batch_size=2", "--config.steps=2", "--config.sample_every=1000"),
]
STORY = ["--sentence", "mia is here .", "she waves .", "otto jumps .", "they nap .", "mia goes ."]

Run = Callable[..., str]


def build(source: Path, target: str, out: Path) -> Path:
    """An sdist or a wheel of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", out]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the installed command in an empty folder; returns what it prints."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", wheel], check=True)
    # Its dependencies are those of the tests' environment; an editable installation, which is a
    # .pth file there, is not followed from a .pth file.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    workplace = tmp_path_factory.mktemp("empty")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: object, program: tuple[str, ...] = ("contextualstory-jax",)) -> str:
        command = [str(folder / "bin" / program[0]), *program[1:], *map(str, arguments)]
        done = subprocess.run(
            command, cwd=workplace, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        return done.stdout

    home = run("-c", "import contextualstory_jax as c; print(c.__file__)", program=("python",))
    assert Path(home.strip()).is_relative_to(packages)
    run.folder = workplace
    return run


def test_an_sdist_builds_the_same_wheel_which_holds_the_configs(wheel, tmp_path):
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("contextualstory_jax-*")

    again = build(source, "wheel", tmp_path / "wheel")

    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        for config in CONFIGS.glob("*.py"):
            assert archive.read(f"contextualstory_jax/configs/{config.name}") == config.read_bytes()


def test_a_released_model_is_converted_used_and_exported(run, tmp_path):
    released = tiny_folder(tmp_path / "released")

    run("convert", released, "converted")
    small = ("--height", 16, "--width", 16, "--steps", 2)
    run("generate", "--checkpoint", "converted", "--out", "images", *small, *STORY)
    run("converted", "exported", program=("python", "-m", "contextualstory_jax.export"))

    assert len(list(run.folder.glob("images/story/frame_*.png"))) == 5
    for file in WEIGHT_FILES.values():
        assert (run.folder / "exported" / file).read_bytes() == (released / file).read_bytes()


def test_the_model_that_ships_generates(run):
    run("generate", "--out", "shipped", "--steps", 2, *STORY)

    assert (run.folder / "shipped" / "story" / "grid.png").is_file()


def test_a_published_config_trains(run):
    run("train", "--config", "shapes", "--workdir", "shapes", *TINY)

    assert metrics(run.folder / "shapes")[-1]["step"] == 2


def test_a_folder_of_stories_is_prepared_encoded_trained_on_and_evaluated(run, tmp_path):
    stories = write_story_folder(tmp_path / "stories")
    shutil.copy(ROOT / "tests" / "tiny_stories_recipe.py", run.folder / "tiny.py")
    data = ["--config", "tiny.py", "--config.data.name=folder", "--config.data.root=shards"]
    latents = ["--config.init_from=start", "--config.data.latents=latents", "--config.steps=2"]

    run("prepare", "folder", "--source", stories, "--out", "shards", "--size", 16)
    run("train", *data, "--workdir", "start", "--config.steps=1")
    run("cache-latents", *data, "--checkpoint", "start", "--out", "latents")
    run("train", *data, "--workdir", "trained", *latents)
    means = run("storyflow-mean", *data, "--checkpoint", "trained", "--write")
    run("evaluate", *data, "--checkpoint", "trained", "--out", "evaluation")

    assert metrics(run.folder / "trained")[-1]["step"] == 2
    assert "stored in checkpoint 2 of trained" in means
    assert (run.folder / "evaluation" / "index.html").is_file()


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
