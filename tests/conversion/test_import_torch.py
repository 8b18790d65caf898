"""Released folders become checkpoint folders, bit by bit, whatever way they are stored."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import convert_weights
from contextualstory_jax.checkpoints.layout import load_weights, read_model
from contextualstory_jax.config.model_config import SchedulerConfig
from contextualstory_jax.conversion import torch_names
from contextualstory_jax.conversion.import_torch import (
    Dtype,
    Source,
    checkpoint_items,
    import_released,
    parameter_shapes,
    read_source,
)
from contextualstory_jax.conversion.streaming import StoredWeights
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.testing.released_folders import (
    TEXT_ROWS,
    TINY,
    WEIGHT_FILES,
    change_json,
    change_weights,
    read_weights,
    shard_weights,
    stable_diffusion_folder,
    tiny_folder,
)
from contextualstory_jax.utils.errors import UserError

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    import_released(source, output)
    return output


@pytest.fixture(scope="module")
def plain(source: Path) -> dict:
    """The folder's parameters as it is stored."""
    return written(read_source(source))


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """A released folder to store in another way."""
    return shutil.copytree(source, tmp_path / "source")


def written(read: Source, dtype: Dtype = "keep", item: str = "params") -> dict[str, dict]:
    """The parameters that a conversion would write, by part; nothing is written."""
    not_finite: list[str] = []
    items = checkpoint_items(read, dtype, not_finite)
    parts = items[item] | items["frozen"]
    arrays = {part: {name: t.read() for name, t in parts[part].items()} for part in parts}
    assert not not_finite
    return arrays


def expected(read: Source, unet: str = "unet") -> dict[str, dict]:
    """The parameters in a folder's files, by the table of names and layouts alone."""
    folders = read.folders | {"unet": read.folders[unet]}
    tensors = {part: load_file(folders[part] / Path(WEIGHT_FILES[part]).name) for part in PARTS}
    return {part: torch_names.convert(tensors[part], read.shapes[part]) for part in PARTS}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for part in ours:
        assert ours[part].keys() == theirs[part].keys()
        for name, array in ours[part].items():
            assert array.dtype == theirs[part][name].dtype, name
            assert array.tobytes() == theirs[part][name].tobytes(), name


def test_every_parameter_is_its_tensor_in_our_layout(source, converted):
    params, _ = load_weights(converted, "raw", parameter_shapes(read_model(converted)))

    arrays = {part: {name: np.asarray(p) for name, p in params[part].items()} for part in params}
    assert_same(arrays, expected(read_source(source)))


def test_a_continuation_model_has_its_first_frame_layers(tmp_path):
    read = read_source(tiny_folder(tmp_path, first_frame_condition_mode="conv2d"))

    arrays = written(read)

    assert_same(arrays, expected(read))
    assert "mid_block.first_frame_conv.kernel" in arrays["unet"]


def test_the_model_is_what_the_json_and_the_tensors_say(converted):
    config = read_model(converted)

    assert config.unet.block_out_channels == (32,)
    assert config.unet.n_temp_heads == 2
    assert config.unet.cross_attention_dim == 32
    assert config.unet.max_text_length == TEXT_ROWS
    assert config.text_encoder.hidden_act == "gelu"
    assert config.scheduler.steps_offset == 1


def test_a_key_that_is_absent_has_the_default_of_the_original_s_class(copied):
    change_json(copied / "unet/config.json", lambda values: values.pop("temp_pos_embedding"))
    change_json(
        copied / "scheduler/scheduler_config.json", lambda values: values.pop("steps_offset")
    )

    def without_rotary(tensors: dict) -> None:
        for key in [key for key in tensors if re.search(r"tempo_attns.*rotary_emb.freqs", key)]:
            del tensors[key]

    change_weights(copied, "unet", without_rotary)

    config = read_source(copied).config

    assert config.unet.temp_pos_embedding == "sinusoidal"
    assert config.scheduler.steps_offset == 0


def test_tokenizer_json_and_storyflow_travel_along(source, converted):
    pipeline = StoryPipeline.load(converted)

    assert pipeline.storyflow.tolist() == TINY["cumulative_motion.json"][0]
    assert pipeline.weights == "raw"
    for path in (source / "tokenizer").iterdir():
        assert (converted / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    for name in TINY:
        assert (converted / "released" / name).read_bytes() == (source / name).read_bytes()


def test_dead_tensors_are_kept_under_their_names(source, converted):
    stored = StoredWeights(converted, None, parameter_shapes(read_model(converted)))
    tensors = list(stored.dead["unet"].values())
    theirs = read_weights(source, "unet")

    assert {t.name for t in tensors} == {
        key for key in theirs if re.search(r"conv3ds.*time_emb_proj|rotary_bias|dummy", key)
    }
    for tensor, array in zip(tensors, stored.read(tensors), strict=True):
        np.testing.assert_array_equal(array, theirs[tensor.name])
    assert stored.dead["text_encoder"].keys() == {"text_model.embeddings.position_ids"}


def test_a_summary_is_printed_and_stored(source, tmp_path, capsys):
    convert_weights.main([str(source), str(tmp_path / "out")])

    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "model.json").read_text())["source"]
    unet = summary["parts"]["params.unet"]
    digest = hashlib.sha256((source / WEIGHT_FILES["vae"]).read_bytes()).hexdigest()
    assert unet["dtypes"] == {"float32": unet["tensors"]}
    assert summary["sha256"]["vae/diffusion_pytorch_model.safetensors"] == digest
    assert summary["origin"] == {"folder": str(source)}
    assert summary["dead"]["a buffer holding 0, 1, 2, ..."] == 1
    assert f"params.unet: {unet['parameters']:,} parameters" in printed
    assert digest in printed


def shard_all(folder: Path) -> None:
    for part in WEIGHT_FILES:
        shard_weights(folder, part)


def name_fp16(folder: Path) -> None:
    for file in WEIGHT_FILES.values():
        path = folder / file
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


def name_attention_as_old_diffusers(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict) -> None:
        for key in list(tensors):
            for new, name in old.items():
                if f"mid_block.attentions.0.{new}." in key:
                    tensors[key.replace(new, name)] = tensors.pop(key)

    change_weights(folder, "vae", rename)
    assert any(".proj_attn." in key for key in read_weights(folder, "vae"))


def name_text_without_prefix(folder: Path) -> None:
    def rename(tensors: dict) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("text_model.")] = tensors.pop(key)

    change_weights(folder, "text_encoder", rename)


def leave_position_ids_out(folder: Path) -> None:
    key = "text_model.embeddings.position_ids"
    change_weights(folder, "text_encoder", lambda tensors: tensors.pop(key))


def add_keys_of_later_versions(folder: Path) -> None:
    change_json(folder / "vae/config.json", lambda v: v.update(latents_mean=None, _name="x"))
    change_json(folder / "unet/config.json", lambda v: v.update(upcast_attention=True))
    change_json(folder / "text_encoder/config.json", lambda v: v.update(dtype="float32"))


@pytest.mark.parametrize(
    "store",
    [
        shard_all,
        name_fp16,
        name_attention_as_old_diffusers,
        name_text_without_prefix,
        leave_position_ids_out,
        add_keys_of_later_versions,
    ],
)
def test_the_way_of_storing_does_not_matter(
    copied: Path, plain: dict, store: Callable[[Path], None]
):
    store(copied)

    assert_same(written(read_source(copied)), plain)


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [
        ("float16", "keep", "float16"),
        ("bfloat16", "keep", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_all_weights_have_the_dtype_they_came_in_or_that_asked_for(tmp_path, stored, asked, dtype):
    read = read_source(tiny_folder(tmp_path, dtype=stored))

    arrays = written(read, asked)

    theirs = expected(read)
    for leaves in theirs.values():
        leaves.update({name: p.astype(np.dtype(dtype)) for name, p in leaves.items()})
    assert_same(arrays, theirs)


def training_checkpoint(run: Path) -> Path:
    """What the original's train.py saves, RUN/checkpoints/checkpoint-7, beside the pipeline."""
    final, averaged = tiny_folder(run / "final_checkpoint"), tiny_folder(run / "other", seed=1)
    folder = run / "checkpoints" / "checkpoint-7"
    shutil.copytree(final / "unet", folder / "unet")
    shutil.copytree(averaged / "unet", folder / "unet_ema")
    shutil.copyfile(final / "cumulative_motion.json", folder / "cumulative_motion.json")
    ema = {"decay": 0.9999, "optimization_step": 7, "power": 2 / 3, "use_ema_warmup": False}
    change_json(folder / "unet_ema/config.json", lambda values: values.update(ema))
    return folder


def test_a_training_checkpoint_has_raw_and_averaged_weights(tmp_path):
    read = read_source(training_checkpoint(tmp_path))

    raw, averaged = written(read), written(read, item="ema_params")

    assert_same(raw, expected(read))
    assert_same(averaged, expected(read, "unet_ema"))
    assert all(path.is_file() for name, path in read.json.items() if name != "model_index.json")
    assert (raw["unet"]["conv_in.bias"] != averaged["unet"]["conv_in.bias"]).any()


def test_a_training_checkpoint_without_its_run_says_what_is_missing(tmp_path):
    folder = training_checkpoint(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final_checkpoint")

    with pytest.raises(UserError, match="has no vae, text_encoder, tokenizer; copy .*final_checkp"):
        read_source(folder)


def test_averaged_weights_of_another_architecture_are_refused(tmp_path):
    folder = training_checkpoint(tmp_path / "run")
    change_json(folder / "unet_ema/config.json", lambda values: values.update(n_temp_heads=4))

    with pytest.raises(UserError, match="unet_ema/config.json: n_temp_heads = 4, but 2 in unet"):
        read_source(folder)


def test_stable_diffusion_lacks_what_is_temporal(tmp_path):
    source = stable_diffusion_folder(tmp_path / "sd")

    summary = import_released(source, tmp_path / "out")

    config = read_model(tmp_path / "out")
    names = {n for n in parameter_shapes(config)["unet"] if "conv3ds" in n or "tempo_" in n}
    assert summary["absent"] > len(names) > 0
    assert config.scheduler == SchedulerConfig()  # not Stable Diffusion's own
    with pytest.raises(UserError, match="holds Stable Diffusion, .* --config.init_from="):
        StoryPipeline.load(tmp_path / "out")
