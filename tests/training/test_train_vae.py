"""A VAE trained by itself: it learns, resumes, and is what a story model then starts from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax import generate
from contextualstory_jax.checkpoints.layout import read_model
from contextualstory_jax.commands import train_vae as command
from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import AutoencoderKLConfig, ModelConfig
from contextualstory_jax.config.train_config import DataConfig, TrainConfig
from contextualstory_jax.data.loader import test_stories as held_out_stories
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.training import train_vae as train_vae_module
from contextualstory_jax.training import trainer
from contextualstory_jax.training.init_params import initial_params, with_scaling_factor
from contextualstory_jax.training.train_step import TrainState
from contextualstory_jax.training.train_vae import train_vae
from contextualstory_jax.training.trainer import train_and_evaluate
from contextualstory_jax.utils.errors import UserError

CHANNELS = 8


@pytest.fixture(scope="module")
def config(tiny_train_config: TrainConfig) -> TrainConfig:
    """Forty steps of a VAE of 16 x 16 frames and 8 x 8 latents."""
    model = tiny_train_config.model
    vae = AutoencoderKLConfig(
        latent_channels=CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    unet = dataclasses.replace(model.unet, in_channels=CHANNELS, out_channels=CHANNELS)
    return dataclasses.replace(
        tiny_train_config,
        model=dataclasses.replace(model, vae=vae, unet=unet),
        optimizer=dataclasses.replace(
            tiny_train_config.optimizer, learning_rate=1e-2, ema_decay=0.9, max_grad_norm=1.0
        ),
        steps=40,
        checkpoint_every=20,
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """One program of each kind for all runs, which have one config: compiling takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_vae_step", "make_measurement"):
            make, programs = getattr(train_vae_module, name), []

            def make_once(*arguments: Any, make: Any = make, programs: list = programs) -> Any:
                programs.extend([make(*arguments)] if not programs else [])
                return programs[0]

            patch.setattr(train_vae_module, name, make_once)
        yield


@pytest.fixture(scope="module")
def trained(
    config: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainState, Path]:
    """A run without interruption, and its workdir."""
    workdir = tmp_path_factory.mktemp("vae") / "run"
    return train_vae(config, workdir), workdir


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the clock's."""
    clock = {"stories_per_second", "step_time", "data_wait"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return [{name: v for name, v in line.items() if name not in clock} for line in lines]


def from_vae(config: TrainConfig, workdir: Path, to: Path) -> TrainConfig:
    """A story's config that starts from a VAE."""
    return with_scaling_factor(dataclasses.replace(config, init_from=str(workdir)), to)


def test_it_learns(trained):
    lines = metrics(trained[1])

    losses = [line["loss"] for line in lines]
    psnr = [line["validation_psnr"] for line in lines if "validation_psnr" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 3
    assert len(psnr) == 2 and psnr[1] > max(psnr[0], 14.5)


def test_the_workdir_holds_the_vae_alone(trained, config):
    state, workdir = trained

    assert {part for part, leaves in state.params.items() if leaves} == {"vae"}
    assert {path.name for path in (workdir / "samples").iterdir()} == {"step_0000040.png"}
    assert json.loads((workdir / "config.json").read_text())["trainable"] == [r"vae\..*"]
    stored = read_model(workdir).vae.scaling_factor
    assert stored == metrics(workdir)[-1]["scaling_factor"] != config.model.vae.scaling_factor


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(trained, config, tmp_path, monkeypatch):
    device_batches = trainer.device_batches

    def interrupted(*arguments: Any) -> Iterator:
        batches = device_batches(*arguments)
        for _ in range(30):  # after the first checkpoint
            yield next(batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "device_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_vae(config, tmp_path)

    state = train_vae(config, tmp_path)

    jax.tree.map(np.testing.assert_array_equal, state, trained[0])
    assert metrics(tmp_path) == metrics(trained[1])
    assert (tmp_path / "model.json").read_bytes() == (trained[1] / "model.json").read_bytes()


def test_a_story_model_starts_from_it(trained, config, tmp_path, capsys):
    state, workdir = trained
    story = from_vae(config, workdir, tmp_path)
    model = StoryModel(story.model)

    params = initial_params(model, story, Placement(make_mesh(story.mesh)))

    jax.tree.map(np.testing.assert_array_equal, params["vae"], state.ema_params["vae"])
    fresh = model.init(story.seed)
    for part in ("unet", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, params[part], fresh[part])
    printed = capsys.readouterr().out
    assert f"ema parameters of {workdir}; fresh: {len(fresh['unet'])} of unet, " in printed
    stories = held_out_stories(story.data, story.model.height, 16)
    images = np.stack([story.images for story in stories])
    keys = jax.random.split(jax.random.key(0), 16)
    latents = jax.jit(model.encode_images)(params, images, keys)
    decoded = jax.jit(model.decode)(params, latents)
    assert float(jnp.std(latents)) == pytest.approx(1, abs=0.1)
    error = np.mean((np.asarray(decoded, np.float32) - images) ** 2, axis=(1, 2, 3, 4))
    psnr = np.mean(10 * np.log10(255**2 / error))
    assert psnr == pytest.approx(metrics(workdir)[-1]["validation_psnr"], abs=2)


@pytest.mark.heavy
def test_a_story_model_trains_on_its_latents(trained, config, tmp_path):
    story = dataclasses.replace(config, init_from=str(trained[1]), steps=1, sample_every=1)

    state = train_and_evaluate(story, tmp_path / "run")

    jax.tree.map(np.testing.assert_array_equal, state.frozen["vae"], trained[0].ema_params["vae"])
    assert read_model(tmp_path / "run").vae == read_model(trained[1]).vae
    # The first weights need not be there to resume.
    gone = dataclasses.replace(story, init_from=str(tmp_path / "gone"), steps=2)
    assert int(train_and_evaluate(gone, tmp_path / "run").step) == 2


def test_another_vae_is_refused(trained, config, tmp_path):
    vae = dataclasses.replace(config.model.vae, block_out_channels=(8, 8))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, vae=vae))

    with pytest.raises(UserError, match=r"model.vae.block_out_channels = \[?\(?8, 16"):
        train_and_evaluate(from_vae(other, trained[1], tmp_path), tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_it_generates_no_stories(trained, tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("Ann waves.\n" * 5)
    words = ["--checkpoint", str(trained[1]), "--out", str(tmp_path / "out")]

    with pytest.raises(UserError, match="holds a VAE alone, .* train --config.init_from="):
        generate.main([*words, "--story", str(story)])

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model.vae.kind = 'space_to_depth' has no parameters to train"),
        ({"data": DataConfig(latents="cache")}, "data.latents holds no images to train a VAE on"),
        ({"batch_size": 3, "accumulation_steps": 3, "mesh": {"data": 2}}, "does not make up"),
    ],
)
def test_a_config_without_a_vae_to_train_is_refused(
    config, tiny_model_config, tmp_path, change, message
):
    if "model" in change:
        change = {"model": tiny_model_config}
    if "mesh" in change:
        change = {**change, "mesh": dataclasses.replace(config.mesh, **change["mesh"])}

    with pytest.raises(UserError, match=message):
        train_vae(dataclasses.replace(config, **change), tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_frames_that_do_not_divide_are_refused(config):
    values = dataclasses.asdict(config.model)

    with pytest.raises(UserError, match="height and width must be positive multiples of 2"):
        build(ModelConfig, {**values, "height": 17, "width": 17})


def test_the_command_says_what_is_next(trained, config, monkeypatch, capsys):
    state, workdir = trained
    monkeypatch.setattr(command, "load_config", lambda *_: config)

    command.main(["--config", "shapes_vae", "--workdir", str(workdir)])

    assert f"train --config CONFIG --workdir OTHER --config.init_from={workdir}" in (
        capsys.readouterr().out
    )
