"""The wheel, installed far from a checkout: every command does its work in an empty folder."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from contextualstory_jax.config.config_files import CONFIGS
from contextualstory_jax.testing.published_folders import write_story_folder
from contextualstory_jax.testing.released_folders import WEIGHT_FILES, read_weights, tiny_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# The embedded stories' model, made tiny and trained on a folder, its text encoder frozen.
TINY = [
    *("--config.model.height=16", "--config.model.width=16", "--config.model.vae.patch=4"),
    *("--config.model.unet.in_channels=48", "--config.model.unet.out_channels=48"),
    *("--config.model.unet.block_out_channels=(32,)", "--config.model.sampling.steps=2"),
    "--config.model.unet.down_block_types=('CrossAttnDownBlock2D',)",
    "--config.model.unet.up_block_types=('CrossAttnUpBlock2D',)",
    *("--config.model.unet.attention_head_dim=(2,)", "--config.trainable=('unet.*',)"),
    *("--config.batch_size=2", "--config.steps=2", "--config.sample_every=1000"),
    *("--config.data.name=folder", "--config.data.root=shards"),
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
    archive = build(ROOT, "sdist", tmp_path / "sdist")
    subprocess.run(["tar", "--extract", "--file", archive, "--directory", tmp_path], check=True)
    (source,) = tmp_path.glob("contextualstory_jax-*")

    again = build(source, "wheel", tmp_path / "wheel")

    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        for config in CONFIGS.glob("*.py"):
            assert archive.read(f"contextualstory_jax/configs/{config.name}") == config.read_bytes()


def test_published_configs_that_build_on_others_are_read(run):
    read = (
        "from contextualstory_jax.config.config_files import load_config as r; "
        "print(r('{}').data.name)"
    )

    for name in ("flintstones_continuation", "pororo_continuation"):
        shown = run("-c", read.format(name), program=("python",))
        assert shown == f"{name.removesuffix('_continuation')}\n"


def test_a_released_model_is_converted_and_exported(run, tmp_path):
    released = tiny_folder(tmp_path / "released")

    run("convert", released, "converted")
    run("export", "converted", "exported")

    for part in WEIGHT_FILES:
        exported, original = (read_weights(f, part) for f in (run.folder / "exported", released))
        assert exported.keys() == original.keys()
        assert all(exported[key].tobytes() == original[key].tobytes() for key in original)


def test_the_module_of_a_command_is_the_command(run):
    for name in ("convert", "export"):
        usage = run("--help", program=("python", "-m", f"contextualstory_jax.commands.{name}"))
        assert usage.startswith(f"usage: contextualstory-jax {name} ")


def test_the_model_that_ships_generates(run):
    run("generate", "--out", "images", "--steps", 2, *STORY)

    assert len(list(run.folder.glob("images/story/frame_*.png"))) == 5


def test_a_folder_of_stories_is_prepared_encoded_trained_on_and_evaluated(run, tmp_path):
    stories = write_story_folder(tmp_path / "stories")
    shapes = ["--config", "shapes", *TINY]

    run("prepare", "folder", "--source", stories, "--out", "shards", "--size", 16)
    run("train", *shapes, "--workdir", "run")
    encoded = run("cache-latents", *shapes, "--checkpoint", "run", "--out", "latents")
    means = run("storyflow-mean", *shapes, "--checkpoint", "run", "--write")
    run("evaluate", *shapes, "--checkpoint", "run", "--out", "evaluation")

    steps = [json.loads(line)["step"] for line in (run.folder / "run/metrics.jsonl").open()]
    assert steps == [2]
    assert "15 images and 15 sentences" in encoded
    assert "stored in checkpoint 2 of run" in means
    assert (run.folder / "evaluation" / "index.html").is_file()
