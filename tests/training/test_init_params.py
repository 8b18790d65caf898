"""Training begins with fresh parameters, or with those of a converted or trained checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from contextualstory_jax.checkpoints.layout import load_weights, read_model
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.config.model_config import ModelConfig, SamplingConfig
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.conversion.import_torch import import_released
from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.testing.released_folders import TINY, stable_diffusion_folder, tiny_folder
from contextualstory_jax.training.init_params import initial_params, tokenizer_folder
from contextualstory_jax.training.trainer import train_and_evaluate
from contextualstory_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A visualization model whose weights are bfloat16."""
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    import_released(tiny_folder(tmp_path_factory.mktemp("released"), dtype="bfloat16"), output)
    return output


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    import_released(stable_diffusion_folder(tmp_path_factory.mktemp("sd")), output)
    return output


def with_unet(config: ModelConfig, **values: Any) -> ModelConfig:
    return dataclasses.replace(config, unet=dataclasses.replace(config.unet, **values))


def begin(folder: Path, model: StoryModel, **values: Any) -> dict:
    """The parameters that training begins with."""
    config = TrainConfig(model=model.config, init_from=str(folder), seed=3, **values)
    return initial_params(model, config, Placement(make_mesh(MeshConfig())))


def assert_equal(ours: dict, theirs: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_all_parameters_of_a_whole_model_are_taken_as_float32(converted, capsys):
    model = StoryModel(read_model(converted))

    params = begin(converted, model)

    stored, _ = load_weights(converted, "raw", model.shapes)
    assert {p.dtype for part in params.values() for p in part.values()} == {np.dtype(np.float32)}
    assert_equal(params, jax.tree.map(lambda p: np.asarray(p, np.float32), stored))
    assert capsys.readouterr().out == f"raw parameters of {converted}; fresh: none\n"


def test_parts_that_are_not_asked_for_may_be_of_another_model(converted, capsys):
    model = StoryModel(with_unet(read_model(converted), block_out_channels=(64,)))

    params = begin(converted, model, init_parts=("vae",))

    stored, _ = load_weights(converted, "raw", StoryModel(read_model(converted)).shapes)
    fresh = model.init(3)
    assert_equal(params["vae"], jax.tree.map(lambda p: np.asarray(p, np.float32), stored["vae"]))
    assert_equal(params["unet"], fresh["unet"])
    assert_equal(params["text_encoder"], fresh["text_encoder"])
    counts = (f"{len(fresh[part])} of {part}" for part in ("unet", "text_encoder"))
    assert capsys.readouterr().out.endswith(f"fresh: {', '.join(counts)}\n")


def test_unknown_parts_are_refused():
    with pytest.raises(UserError, match=r"init_parts must be some of unet, vae, .*; got \('u',\)"):
        TrainConfig(init_parts=("u",))


def test_a_first_frame_s_layers_are_fresh(converted, capsys):
    model = StoryModel(with_unet(read_model(converted), first_frame_condition_mode="conv2d"))

    params = begin(converted, model)

    fresh = model.init(3)
    name = "mid_block.first_frame_conv.kernel"
    np.testing.assert_array_equal(params["unet"][name], fresh["unet"][name])
    assert (params["unet"]["conv_in.kernel"] != fresh["unet"]["conv_in.kernel"]).any()
    assert "fresh: 6 of first_frame_conv" in capsys.readouterr().out


def test_what_stable_diffusion_lacks_is_fresh(stable_diffusion, capsys):
    values = TINY["unet/config.json"]
    config = with_unet(
        read_model(stable_diffusion), n_temp_heads=values["n_temp_heads"], num_layers_FStext=1
    )
    model = StoryModel(config)

    params = begin(stable_diffusion, model)

    fresh = model.init(3)
    stored, _ = load_weights(stable_diffusion, "raw", model.shapes, may_lack=".*")
    for part, leaves in params.items():
        for name, ours in leaves.items():
            theirs = stored[part] if name in stored[part] else fresh[part]
            np.testing.assert_array_equal(ours, theirs[name])
    printed = capsys.readouterr().out
    assert all(f" of {name}" in printed for name in ("conv3ds", "tempo_attns", "text_adapter"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: with_unet(m, n_temp_heads=4),
            r"model.unet.n_temp_heads = 2, but the config says 4; use another init_from",
        ),
        (lambda m: with_unet(m, attention_head_dim=4), "attention_head_dim = 2, but .* 4"),
        (lambda m: with_unet(m, block_out_channels=(64,)), r"block_out_channels = .*32.*says .*64"),
        (lambda m: with_unet(m, max_text_length=32), "text_adapter.pos_embed is .*expected"),
        (
            lambda m: dataclasses.replace(
                m, scheduler=dataclasses.replace(m.scheduler, prediction_type="v_prediction")
            ),
            "prediction_type = 'epsilon', but the config says 'v_prediction'",
        ),
    ],
)
def test_another_model_is_refused(converted, change, message):
    with pytest.raises(UserError, match=message):
        begin(converted, StoryModel(change(read_model(converted))))


def test_layers_that_the_model_has_not_are_refused(converted):
    model = StoryModel(with_unet(read_model(converted), use_motion_condition=False))

    with pytest.raises(UserError, match="msim_embedding.* is not of this model"):
        begin(converted, model)


def test_nothing_is_written_where_the_folder_is_missing(tmp_path, tiny_model_config):
    config = TrainConfig(model=tiny_model_config, init_from=str(tmp_path / "gone"))

    with pytest.raises(UserError, match="gone"):
        train_and_evaluate(config, tmp_path / "run")

    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_the_workdir_s_own_then_that_of_the_first_weights(converted, tmp_path):
    fresh, begun = TrainConfig(), TrainConfig(init_from=str(converted))

    assert tokenizer_folder(fresh, tmp_path) == TOKENIZER_DIR
    assert tokenizer_folder(begun, tmp_path) == converted / "tokenizer"
    vae_alone = dataclasses.replace(begun, init_parts=("vae",))
    assert tokenizer_folder(vae_alone, tmp_path) == TOKENIZER_DIR
    (tmp_path / "tokenizer").mkdir()
    assert tokenizer_folder(begun, tmp_path) == tmp_path / "tokenizer"


@pytest.mark.slow
def test_a_model_is_trained_on_from_stable_diffusion_and_goes_on(stable_diffusion, tmp_path):
    model = dataclasses.replace(
        read_model(stable_diffusion), height=16, width=16, sampling=SamplingConfig(steps=2)
    )
    config = TrainConfig(
        model=with_unet(model, n_temp_heads=2, num_layers_FStext=1),
        init_from=str(stable_diffusion),
        steps=1,
        batch_size=1,
        compute_dtype="float32",
        sample_stories=1,
    )

    first = train_and_evaluate(config, tmp_path / "run")
    second = train_and_evaluate(dataclasses.replace(config, steps=2), tmp_path / "run")

    assert (int(first.step), int(second.step)) == (1, 2)
    tokenizers = (stable_diffusion / "tokenizer", tmp_path / "run" / "tokenizer")
    ours, theirs = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in tokenizers)
    assert ours == theirs
