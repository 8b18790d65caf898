"""Checkpoints go back to the released layout: imported ones bit by bit, trained ones whole."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import convert_weights
from contextualstory_jax.checkpoints.layout import write_weights
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.conversion import diffusers_format, export_torch, torch_names
from contextualstory_jax.conversion.export_torch import export_released
from contextualstory_jax.conversion.import_torch import import_released, read_source
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.testing.released_folders import (
    TINY,
    WEIGHT_FILES,
    read_weights,
    stable_diffusion_folder,
    tiny_folder,
)
from contextualstory_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A continuation model, with averaged weights beside the raw ones."""
    folder = tiny_folder(tmp_path_factory.mktemp("released"), first_frame_condition_mode="conv2d")
    other = tiny_folder(
        tmp_path_factory.mktemp("averaged"), seed=1, first_frame_condition_mode="conv2d"
    )
    shutil.copytree(other / "unet", folder / "unet_ema")
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    import_released(source, output)
    return output


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[key].dtype, theirs[key].shape), key
        assert array.tobytes() == theirs[key].tobytes(), key


def test_import_then_export_gives_the_folder_back(source, checkpoint, tmp_path):
    convert_weights.main(["--export", str(checkpoint), str(tmp_path / "out"), "--weights", "raw"])

    for part in WEIGHT_FILES:
        assert_same(read_weights(tmp_path / "out", part), read_weights(source, part))
    others = {p.relative_to(source) for p in source.rglob("*.*") if "unet_ema" not in p.parts}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*")} == others
    for path in others:
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path).read_bytes() == (source / path).read_bytes()


def test_averaged_weights_are_the_default_with_their_own_dead_tensors(source, checkpoint, tmp_path):
    export_released(checkpoint, tmp_path / "out")

    averaged = load_file(source / "unet_ema" / "diffusion_pytorch_model.safetensors")
    assert_same(read_weights(tmp_path / "out", "unet"), averaged)


def test_a_dtype_that_is_asked_for_is_that_of_all_floats(source, checkpoint, tmp_path):
    export_released(checkpoint, tmp_path / "out", "raw", "bfloat16")

    for part in WEIGHT_FILES:
        expected = {
            key: array if array.dtype == np.int64 else array.astype(ml_dtypes.bfloat16)
            for key, array in read_weights(source, part).items()
        }
        assert_same(read_weights(tmp_path / "out", part), expected)


def test_a_model_trained_here_becomes_a_whole_folder(tmp_path):
    like = tiny_folder(tmp_path / "like")
    config = read_source(like).config
    params = StoryModel(config).init(0)
    meta = {"step": 3, "storyflow": [1.0, 2.0, 3.0, 4.5]}
    write_weights(tmp_path / "run", config, like / "tokenizer", {"ema_params": params}, meta)

    export_released(tmp_path / "run", tmp_path / "out")

    back = read_source(tmp_path / "out")
    for part in WEIGHT_FILES:
        made, theirs = read_weights(tmp_path / "out", part), read_weights(like, part)
        shapes = {key: array.shape for key, array in theirs.items()}
        assert {key: array.shape for key, array in made.items()} == shapes
        converted = torch_names.convert(made, back.shapes[part])
        assert_same(converted, {n: np.asarray(p) for n, p in params[part].items()})
    assert dataclasses.replace(back.config, sampling=config.sampling) == config
    assert back.storyflow == meta["storyflow"]
    positions = read_weights(tmp_path / "out", "text_encoder")
    key = "text_model.embeddings.position_ids"
    np.testing.assert_array_equal(positions[key], np.arange(16)[None])
    for name, values in TINY.items():
        if isinstance(values, dict):
            written = json.loads((tmp_path / "out" / name).read_text())
            assert values.keys() - written.keys() <= {"torch_dtype"}


def test_published_json_is_written_for_the_published_model():
    files = diffusers_format.json_files(ModelConfig(), [1.0] * 4)

    assert files["unet/config.json"]["upcast_attention"] is False
    assert files["unet/config.json"]["cross_attention_dim"] == 1024
    assert files["scheduler/scheduler_config.json"]["steps_offset"] == 1
    assert files["vae/config.json"]["down_block_types"] == ["DownEncoderBlock2D"] * 4
    assert files["model_index.json"]["unet"][1] == "VideoLDMUNet3DConditionModel"


def test_a_codec_without_weights_has_no_place_in_the_layout(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match="the released layout has no space_to_depth image codec"):
        export_released(tiny_checkpoint, tmp_path / "out")

    assert not list(tmp_path.iterdir())


def test_stable_diffusion_is_not_exported(tmp_path):
    import_released(stable_diffusion_folder(tmp_path / "sd"), tmp_path / "checkpoint")

    with pytest.raises(UserError, match="holds Stable Diffusion"):
        export_released(tmp_path / "checkpoint", tmp_path / "out")


@pytest.mark.parametrize("wanted", ["ema", "raw"])
def test_an_output_that_holds_something_is_refused(checkpoint, tmp_path, wanted):
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(UserError, match="is there and not empty"):
        export_released(checkpoint, tmp_path, wanted)


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_torch, "write_safetensors", full)

    with pytest.raises(UserError, match="cannot write .*out: No space left on device"):
        export_released(checkpoint, tmp_path / "out")

    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path):
    damaged = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    for path in (damaged / "checkpoints" / "0" / "frozen").rglob("*"):
        if path.is_file() and "d" in path.parts[-2:]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(UserError, match="checkpoint 0 of .* is damaged") as caught:
        export_released(damaged, tmp_path / "out")

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "raw"], "unrecognized arguments: --weights raw"),
        (["--export", "--revision", "main"], "unrecognized arguments: --revision main"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        convert_weights.main([str(tmp_path), str(tmp_path / "out"), *arguments])
