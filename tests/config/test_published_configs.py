"""The recipes of the four released models: their values, and their weights' names and shapes."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax import evaluate, generate, train
from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.conversion import torch_names
from contextualstory_jax.data.loader import TOKENIZER_DIR, training_source
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.training import start_state
from contextualstory_jax.training.train_step import Batch, train_step
from contextualstory_jax.utils.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = {
    name: ROOT / "configs" / f"{name}.py"
    for name in (
        "pororo_visualization",
        "pororo_continuation",
        "flintstones_visualization",
        "flintstones_continuation",
    )
}
# Key and shape of every tensor in the released checkpoints, by model.
PUBLISHED = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "fixtures/published_shapes.json.gz").read_bytes())
)
# Values, tensors, and tensors that nothing reads.
COUNTS = {
    "unet_visualization": (1_424_190_732, 1537, 76),
    "unet_continuation": (1_424_232_332, 1555, 76),
    "vae": (83_653_863, 248, 0),
    "text_encoder": (340_387_840 + 77, 373, 1),
}
# The embedded stories in place of the published ones, which are nowhere here.
DRAWN = ["data.name=shapes", "init_from=null"]
# Every part of the published models, small: pictures of 32 x 32, latents of 8 x 8.
TINY = [
    *DRAWN,
    *("model.height=32", "model.width=32", "model.sampling.steps=2"),
    *("steps=1", "batch_size=2", "sample_stories=1", "compute_dtype=float32"),
    *("model.vae.block_out_channels=[8,8,8]", "model.vae.norm_num_groups=4"),
    *("model.vae.layers_per_block=1", "model.text_encoder.hidden_size=32"),
    *("model.text_encoder.intermediate_size=32", "model.text_encoder.num_hidden_layers=1"),
    *("model.text_encoder.num_attention_heads=2", "model.unet.cross_attention_dim=32"),
    *("model.unet.block_out_channels=[32]", "model.unet.attention_head_dim=[2]"),
    *("model.unet.norm_num_groups=8", "model.unet.layers_per_block=1"),
    *("model.unet.down_block_types=['CrossAttnDownBlock2D']", "model.unet.n_temp_heads=2"),
    *("model.unet.up_block_types=['CrossAttnUpBlock2D']", "model.unet.num_layers_FStext=1"),
    "model.unet.max_text_length=77",
]


@pytest.fixture(scope="module", params=RECIPES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def published_model(name) -> StoryModel:
    return StoryModel(load_config(RECIPES[name]).model)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_names_and_shapes_are_the_released_checkpoint_s(name, published_model, part):
    model = f"unet_{name.partition('_')[2]}" if part == "unet" else part
    published = {key: tuple(shape) for key, shape in PUBLISHED[model].items()}
    values, tensors, dead = COUNTS[model]

    shapes = published_model.shapes[part]

    ours = {
        torch_names.torch_key(name, len(s.shape)): torch_names.torch_shape(name, s.shape)
        for name, s in shapes.items()
    }
    assert len(ours) == len(shapes)
    assert len(published) == tensors
    assert sum(map(math.prod, published.values())) == values
    unread = published.keys() - ours.keys()
    assert {key: published[key] for key in published.keys() - unread} == ours
    assert len(unread) == dead
    assert {
        key
        for key in published
        if any(re.fullmatch(pattern, key) for pattern, _ in torch_names.DEAD)
    } == unread


def test_the_model_is_drawn_with_and_trained_as_published(name):
    recipe = load_config(RECIPES[name])

    dataset, task = name.split("_")
    pororo = dataset == "pororo"
    assert recipe.data.name == dataset
    assert recipe.model.unet.is_continuation == (task == "continuation")
    assert recipe.model.unet.first_frame_condition_mode in ("none", "conv2d")
    assert recipe.steps == (40_000 if pororo else 80_000)
    assert recipe.batch_size / recipe.accumulation_steps == 6  # stories on one device
    assert recipe.accumulation_steps == (2 if pororo else 1)
    assert recipe.init_from == "stable-diffusion-2-1-base"
    assert (recipe.checkpoint_every, recipe.sample_every, recipe.keep_checkpoints) == (
        4000,
        4000,
        2,
    )
    assert (recipe.seed, recipe.compute_dtype, recipe.trainable) == (42, "bfloat16", (r"unet\..*",))
    assert (recipe.text_drop, recipe.first_frame_drop, recipe.snr_gamma) == (0.1, 0.1, 5.0)
    assert dataclasses.asdict(recipe.optimizer) == {
        "learning_rate": 5e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "max_grad_norm": 0.5,
        "ema_decay": 0.9999,
    }
    model, scheduler, sampling = recipe.model, recipe.model.scheduler, recipe.model.sampling
    assert (model.height, model.width, model.unet.n_frames) == (256, 256, 5)
    assert (model.noise.kind, model.noise.alpha) == ("pyoco_mixed", 1.5)
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == (
        "linear",
        0.00085,
        0.012,
    )
    assert (scheduler.steps_offset, scheduler.clip_sample) == (1, False)
    assert (scheduler.timestep_spacing, scheduler.prediction_type) == ("leading", "epsilon")
    assert (sampling.steps, sampling.eta, sampling.guidance_rescale) == (50, 0.0, 0.0)
    assert (sampling.guidance_scale, sampling.image_guidance_scale) == (7.5, 1.0)


def test_a_recipe_is_read_from_any_working_directory(name, monkeypatch, tmp_path):
    here = load_config(RECIPES[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != ROOT])
    path = list(sys.path)

    there = load_config(RECIPES[name])

    assert there == here
    assert sys.path == path


def test_a_dataset_without_its_folder_is_refused_before_anything_is_written(tmp_path):
    overrides = [f"--config.{override}" for override in (*TINY, "data.name=pororo")]
    workdir = tmp_path / "run"

    with pytest.raises(UserError, match="^data.name = 'pororo' needs data.root, .* add --config"):
        train.main(
            ["--config", str(RECIPES["pororo_visualization"]), "--workdir", str(workdir)]
            + overrides
        )

    assert not workdir.exists()


def test_the_embedded_stories_come_at_published_size():
    recipe = load_config(RECIPES["pororo_visualization"], DRAWN)

    images = training_source(recipe.data, recipe.model.height)[0].images

    assert images.shape == (5, 256, 256, 3)
    assert len(np.unique(images.reshape(-1, 3), axis=0)) > 20


@pytest.mark.heavy
@pytest.mark.parametrize("recipe_name", ["pororo_visualization", "flintstones_continuation"])
def test_a_training_step_at_published_size_fits_together(recipe_name):
    recipe = load_config(RECIPES[recipe_name], DRAWN)
    model = StoryModel(recipe.model, jnp.dtype(recipe.compute_dtype))
    null_ids = jnp.asarray(Tokenizer(TOKENIZER_DIR, 77)([""])[0])
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]))
    state = start_state.abstract_state(model, recipe, placement)
    batch = Batch(
        images=jax.ShapeDtypeStruct((recipe.batch_size, 5, 256, 256, 3), np.uint8),
        ids=jax.ShapeDtypeStruct((recipe.batch_size, 5, 77), np.int32),
    )

    after, metrics = jax.eval_shape(
        functools.partial(train_step, model, recipe, placement, null_ids, None), state, batch
    )

    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.heavy
@pytest.mark.parametrize("recipe_name", ["pororo_visualization", "flintstones_continuation"])
def test_a_recipe_made_small_trains_draws_and_is_measured(recipe_name, tmp_path):
    config = ["--config", str(RECIPES[recipe_name])]
    overrides = [f"--config.{override}" for override in TINY]
    run, first_frame = str(tmp_path / "run"), []
    if recipe_name.endswith("continuation"):
        from PIL import Image

        Image.new("RGB", (32, 32), "navy").save(tmp_path / "first.png")
        first_frame = ["--first-frame", str(tmp_path / "first.png")]

    train.main([*config, *overrides, "--workdir", run])
    generate.main(
        ["--checkpoint", run, "--out", str(tmp_path / "drawn"), "--sentence", *"abcde"]
        + first_frame
    )
    evaluate.main(
        [*config, "--config.data.name=shapes", "--checkpoint", run, "--stories", "1"]
        + ["--out", str(tmp_path / "measured")]
    )

    assert (tmp_path / "drawn" / "story" / "grid.png").exists()
    metrics = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert metrics["model"]["all"]["frames"] == (4 if first_frame else 5)
