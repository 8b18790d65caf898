"""Checkpoint folders: what is written comes back, and what is not whole is refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.checkpoints.layout import (
    contents,
    load_weights,
    read_model,
    weights_digest,
    write_model,
    write_storyflow,
    write_weights,
)
from contextualstory_jax.checkpoints.manager import Checkpoints
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.utils.errors import UserError


def params(value: float = 1.0, dtype: object = np.float32) -> dict:
    """Parameters of two parts, named as ours are, and a part without any."""
    kernel = np.linspace(0, value, 6).reshape(2, 3).astype(dtype)
    return {
        "unet": {"down_blocks.0.conv1.kernel": kernel, "down_blocks.10.alpha": kernel[:1, 0]},
        "text_encoder": {"embeddings.embedding": kernel.T},
        "vae": {},
    }


def shapes(tree: dict) -> dict:
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.float32), tree)


def save(folder: Path, step: int = 3, **items: dict) -> None:
    with Checkpoints(folder, keep=2) as checkpoints:
        meta = {"step": step, "storyflow": [1.0] * 4, "items": contents(items)}
        checkpoints.save(step, items, meta)


def assert_same(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_weights_come_back_in_the_dtype_they_were_stored_in(tmp_path, dtype):
    stored = params(0.1, dtype)
    save(tmp_path, ema_params=stored)

    found, meta = load_weights(tmp_path, "ema", shapes(stored))

    assert_same(found, stored)
    assert (meta["step"], meta["storyflow"]) == (3, [1.0] * 4)


def test_every_weight_counts_in_the_digest_and_their_order_does_not():
    leaves = {"a": np.zeros(3, np.float32), "b": np.float32([[1, 2], [3, 4]])}
    renamed = {"a": leaves["a"], "c": leaves["b"]}
    changed = {"a": np.float32([0, 0, 1e-7]), "b": leaves["b"]}
    transposed = {"a": leaves["a"], "b": leaves["b"].T}

    digests = [weights_digest(some) for some in (leaves, renamed, changed, transposed)]

    assert len(set(digests)) == 4
    assert weights_digest(dict(reversed(leaves.items()))) == digests[0]
    assert (
        weights_digest(jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), leaves)) == (digests[0])
    )


def test_the_newest_checkpoint_is_given_another_storyflow_mean(tmp_path):
    stored = params()
    for step in (3, 5):
        save(tmp_path, step, params=stored)

    assert write_storyflow(tmp_path, [4.0, 3.0, 2.0, 1.5]) == 5

    found, meta = load_weights(tmp_path, "raw", shapes(stored))
    assert_same(found, stored)
    assert (meta["step"], meta["storyflow"]) == (5, [4.0, 3.0, 2.0, 1.5])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.meta(3)["storyflow"] == [1.0] * 4
        assert checkpoints.meta(5).keys() == checkpoints.meta(3).keys()


def test_a_storyflow_mean_that_cannot_be_written_leaves_the_one_that_was(tmp_path, monkeypatch):
    save(tmp_path, params=params())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="^cannot write to .*: No space left on device$"):
            write_storyflow(tmp_path, [2.0] * 4)

    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.meta(3)["storyflow"] == [1.0] * 4


def test_a_folder_without_checkpoints_has_no_storyflow_mean(tmp_path):
    message = "has no complete checkpoint yet; train it, or name another$"
    with pytest.raises(UserError, match=message):
        write_storyflow(tmp_path, [2.0] * 4)


def test_weights_laid_over_a_mesh_come_back(tmp_path):
    stored = params()
    mesh = make_mesh(MeshConfig())
    save(tmp_path, params=jax.device_put(stored, Placement(mesh).shardings(stored)))

    assert_same(load_weights(tmp_path, "raw", shapes(stored))[0], stored)


def test_trained_weights_are_joined_with_the_frozen_ones(tmp_path):
    tree = params()
    trained = {"unet": tree["unet"], "text_encoder": {}, "vae": {}}
    frozen = {"unet": {}, "text_encoder": tree["text_encoder"], "vae": {}}
    doubled = jax.tree.map(lambda p: 2 * p, trained)
    save(tmp_path, params=trained, ema_params=doubled, frozen=frozen)

    assert_same(load_weights(tmp_path, "raw", shapes(tree))[0], tree)
    averaged = {**tree, "unet": doubled["unet"]}
    assert_same(load_weights(tmp_path, "ema", shapes(tree))[0], averaged)


def test_the_newest_checkpoint_counts_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, params=params(step))

    assert_same(load_weights(tmp_path, "raw", shapes(params()))[0], params(10))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "10"}


def test_reading_changes_nothing(tmp_path):
    save(tmp_path, params=params())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    load_weights(tmp_path, "raw", shapes(params()))

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_weights_that_are_not_there_are_named(tmp_path):
    save(tmp_path, ema_params=params())

    with pytest.raises(UserError, match="holds no raw weights; give --weights ema"):
        load_weights(tmp_path, "raw", shapes(params()))
    with pytest.raises(UserError, match="weights must be ema or raw"):
        load_weights(tmp_path, "best", shapes(params()))


def test_averaged_weights_are_taken_where_there_are_such(tmp_path):
    for name, items in {"raw": ["params"], "both": ["params", "ema_params"]}.items():
        save(tmp_path / name, **{item: params(2.0 if item == "params" else 3.0) for item in items})

    raw, raw_meta = load_weights(tmp_path / "raw", None, shapes(params()))
    averaged, averaged_meta = load_weights(tmp_path / "both", None, shapes(params()))

    assert_same(raw, params(2.0))
    assert_same(averaged, params(3.0))
    assert (raw_meta["weights"], averaged_meta["weights"]) == ("raw", "ema")


def test_only_names_that_may_be_lacking_are(tmp_path):
    save(tmp_path, params=params())
    more = shapes(params())
    more["unet"]["tempo_attns.0.alpha"] = jax.ShapeDtypeStruct((1,), np.float32)

    found, _ = load_weights(tmp_path, None, more, may_lack=r"tempo_attns\..*")

    assert_same(found, params())
    with pytest.raises(UserError, match="is missing 1 parameters: unet.tempo_attns.0.alpha"):
        load_weights(tmp_path, None, more, may_lack=r"conv3ds\..*")


def test_parameters_of_another_model_are_named(tmp_path):
    save(tmp_path, params=params())
    wider, more, fewer = (shapes(params()) for _ in range(3))
    wider["unet"]["down_blocks.10.alpha"] = jax.ShapeDtypeStruct((7,), np.float32)
    more["unet"]["conv_in.kernel"] = jax.ShapeDtypeStruct((7,), np.float32)
    del fewer["unet"]["down_blocks.10.alpha"]

    with pytest.raises(UserError, match=r"unet/down_blocks.10.alpha is .*expected \(\(7,\)"):
        load_weights(tmp_path, "raw", wider)
    with pytest.raises(UserError, match="is missing 1 parameters: unet.conv_in.kernel"):
        load_weights(tmp_path, "raw", more)
    with pytest.raises(UserError, match="unet/down_blocks.10.alpha is not of this model"):
        load_weights(tmp_path, "raw", fewer)


def test_a_dtype_that_orbax_would_cast_is_refused(tmp_path):
    save(tmp_path, params=params())
    targets = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params())

    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="expected .*bfloat16"),
    ):
        checkpoints.restore(3, {"params": targets})


def remove_array_data(step: Path) -> None:
    shutil.rmtree(step / "ema_params" / "d")


def truncate_array_data(step: Path) -> None:
    for path in (step / "ema_params").rglob("*"):
        if path.is_file() and "d" in path.relative_to(step / "ema_params").parts[:-1]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_item(step: Path) -> None:
    shutil.rmtree(step / "ema_params")


def remove_item_metadata(step: Path) -> None:
    (step / "ema_params" / "_METADATA").unlink()


def remove_meta(step: Path) -> None:
    shutil.rmtree(step / "meta")


def truncate_meta(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text()[:20])


@pytest.mark.parametrize(
    "damage",
    [
        remove_array_data,
        truncate_array_data,
        remove_item,
        remove_item_metadata,
        remove_meta,
        truncate_meta,
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, damage: Callable[[Path], None]):
    save(tmp_path, ema_params=params())
    damage(tmp_path / "checkpoints" / "3")

    with pytest.raises(UserError, match=f"checkpoint 3 of {tmp_path}") as caught:
        load_weights(tmp_path, "ema", shapes(params()))

    assert "\n" not in str(caught.value)


def test_a_checkpoint_whose_writing_was_interrupted_does_not_count(tmp_path):
    save(tmp_path, 1, params=params(1))
    save(tmp_path, 2, params=params(2))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "2").rename(checkpoints / "2.orbax-checkpoint-tmp")

    assert_same(load_weights(tmp_path, "raw", shapes(params()))[0], params(1))
    shutil.rmtree(checkpoints / "1")
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        load_weights(tmp_path, "raw", shapes(params()))


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="has no checkpoints yet"):
        load_weights(tmp_path, "ema", shapes(params()))


@pytest.fixture
def copied(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A whole checkpoint folder to spoil."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def change_model(folder: Path, change: Callable[[dict], object]) -> None:
    description = json.loads((folder / "model.json").read_text())
    change(description)
    (folder / "model.json").write_text(json.dumps(description))


def test_a_model_comes_back(tiny_checkpoint, tiny_model_config):
    assert read_model(tiny_checkpoint) == tiny_model_config


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder .*none"):
        StoryPipeline.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "model.json is missing"),
        (lambda f: (f / "model.json").write_text("{"), "model.json cannot be read"),
        (lambda f: (f / "model.json").write_text("[]"), "model.json does not describe a model"),
        (lambda f: change_model(f, lambda d: d.update(format=2)), "model in format 1"),
        (
            lambda f: change_model(f, lambda d: d["model"].update(depth=3)),
            "model.json: unknown config key model.depth",
        ),
        (
            lambda f: change_model(f, lambda d: d["model"]["unet"].update(n_temp_heads=5)),
            "model.json: unet.block_out_channels: 32 is not divisible by n_temp_heads = 5",
        ),
        (
            lambda f: change_model(f, lambda d: d["model"]["unet"].update(layers_per_block=2)),
            "is missing .* parameters",
        ),
        (
            lambda f: change_model(f, lambda d: d["model"]["text_encoder"].update(vocab_size=500)),
            "does not fit this model: text_encoder/.*token_embedding.*expected",
        ),
        (lambda f: shutil.rmtree(f / "checkpoints"), "has no checkpoints yet"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer_config.json is missing"),
        (lambda f: (f / "tokenizer" / "vocab.json").write_text("{"), "tokenizer in .* is damaged"),
    ],
)
def test_a_folder_that_is_not_whole_or_of_another_architecture_is_refused(
    copied: Path, spoil: Callable[[Path], object], message: str
):
    spoil(copied)

    with pytest.raises(UserError, match=message) as caught:
        StoryPipeline.load(copied)

    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_not_written_over_a_model(copied, tiny_model_config):
    other = dataclasses.replace(tiny_model_config, height=32)
    before = (copied / "model.json").read_bytes()

    with pytest.raises(UserError, match="model.height = 16, but the config says 32"):
        write_model(copied, other, TOKENIZER_DIR)
    write_model(copied, tiny_model_config, TOKENIZER_DIR)

    assert (copied / "model.json").read_bytes() == before


def test_a_model_written_before_kept_frames_is_the_same_model(copied, tiny_model_config):
    change_model(copied, lambda description: description["model"].pop("kept_frames"))

    assert read_model(copied) == tiny_model_config
    write_model(copied, tiny_model_config, TOKENIZER_DIR)
    clean = dataclasses.replace(tiny_model_config, kept_frames="clean")
    with pytest.raises(UserError, match=r"model\.kept_frames = None, but the config says 'clean'"):
        write_model(copied, clean, TOKENIZER_DIR)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, tiny_model_config):
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="cannot write to .*file"):
        write_model(tmp_path / "file", tiny_model_config, TOKENIZER_DIR)
    with pytest.raises(UserError, match="cannot write to .*file"):
        write_weights(tmp_path / "file", tiny_model_config, TOKENIZER_DIR, {}, {"step": 0})


def test_all_of_a_models_parameters_come_back(tiny_checkpoint, tiny_model_config):
    model = StoryModel(tiny_model_config)

    assert_same(load_weights(tiny_checkpoint, "ema", model.shapes)[0], model.init(0))
