"""Reading recipes: what is unknown, out of range or no recipe is named in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from contextualstory_jax.config.config_files import load_config, train_config
from contextualstory_jax.config.train_config import OptimizerConfig, TrainConfig
from contextualstory_jax.data.loader import TOKENIZER_DIR, training_source
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.utils.errors import UserError

SHAPES = Path(__file__).parents[2] / "configs" / "shapes.py"


def test_the_embedded_recipe_fits_its_tokenizer_and_its_sentences():
    recipe = load_config(SHAPES)
    text_encoder = recipe.model.text_encoder
    source = training_source(recipe.data, recipe.model.height)
    sentences = [sentence for i in range(400) for sentence in source[i].sentences]

    ids = Tokenizer(TOKENIZER_DIR, 77)(sentences)  # longer than any

    vocabulary = json.loads((TOKENIZER_DIR / "vocab.json").read_text())
    assert text_encoder.vocab_size == len(vocabulary)
    ends = (ids == vocabulary["<|endoftext|>"]).argmax(axis=1)
    assert ends.min() > 1
    assert ends.max() < text_encoder.max_position_embeddings


def test_the_embedded_recipe_has_all_three_modules():
    unet = load_config(SHAPES).model.unet

    assert unet.augment_temporal_attention
    assert unet.use_text_cross_attention == "FSText"
    assert unet.use_motion_condition


def test_overrides_are_python_values_or_words():
    overrides = [
        "optimizer.learning_rate=1e-4",
        "optimizer.schedule=constant",
        "steps=7",
        "trainable=('unet.*',)",
        "model.unet.augment_temporal_attention=false",
        "snr_gamma=null",
        "mesh.fsdp=1",  # a mapping that the recipe leaves out
    ]

    recipe = load_config(SHAPES, overrides)

    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.optimizer.schedule == "constant"
    assert recipe.steps == 7
    assert recipe.trainable == ("unet.*",)
    assert recipe.model.unet.augment_temporal_attention is False
    assert recipe.snr_gamma is None
    assert recipe.optimizer.warmup_steps == load_config(SHAPES).optimizer.warmup_steps


def test_a_mapping_or_a_config_dict_is_a_recipe_and_stays_as_it_is():
    values = {"steps": 3, "optimizer": {"learning_rate": 0.5}}
    expected = TrainConfig(steps=3, optimizer=OptimizerConfig(learning_rate=0.25))

    for config in (values, ConfigDict(values)):
        assert train_config(config, ["optimizer.learning_rate=0.25"]) == expected
        assert config["optimizer"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown config key stepz; known: .*steps"),
        ("model.unet.layers=3", "unknown config key model.unet.layers; known: .*layers_per_block"),
        ("optimizers.eps=1", "unknown config key optimizers"),
        ("steps.more=3", "config key steps.more: steps holds no keys"),
        ("steps", "'steps' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("steps=3.5", "steps must be int; got 3.5"),
        ("steps=0", "steps must be at least 1; got 0"),
        ("text_drop=1.5", r"text_drop must be in \[0, 1\]; got 1.5"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be positive; got -1"),
        ("optimizer.schedule=linear", "optimizer.schedule must be 'constant' or 'cosine'"),
        ("compute_dtype=float16", "compute_dtype must be 'float32' or 'bfloat16'"),
        ("accumulation_steps=3", "batch_size = 16 is not divisible by accumulation_steps = 3"),
        ("model.height=33", "height and width must be positive multiples of 8 .* got 33 x 64"),
    ],
)
def test_an_override_that_does_not_fit_is_named(override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(SHAPES, [override])

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", r"recipe.py is not a config: it has no get_config\(\)"),
        ("def get_config(", "recipe.py fails: SyntaxError"),
        ("import no_such_module", "recipe.py fails: ModuleNotFoundError: .*no_such_module"),
        ("def get_config():\n  return {}['a']", "recipe.py fails: KeyError: 'a'"),
        ("def get_config():\n  raise ValueError('a\\nb')", "recipe.py fails: ValueError: a$"),
        ("def get_config():\n  pass", r"its get_config\(\) returns NoneType, no ConfigDict"),
        ("def get_config():\n  return {'stepz': 3}", "unknown config key stepz"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, source, message):
    (tmp_path / "recipe.py").write_text(source)

    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "recipe.py")

    assert "\n" not in str(caught.value)


def test_a_published_config_is_known_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "shapes").write_text("a file of that name is ./shapes")
    monkeypatch.chdir(tmp_path)

    assert load_config("shapes") == load_config(SHAPES)


def test_a_file_builds_on_one_beside_it_and_on_a_published_one(tmp_path):
    for name, steps in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "base.py").write_text(f"STEPS = {steps}")
        (tmp_path / name / "mine.py").write_text(
            "from configs.base import STEPS\n"
            "from configs.pororo_continuation import get_config as published\n"
            "def get_config():\n  config = published()\n  config.steps = STEPS\n  return config\n"
        )

    published = load_config("pororo_continuation")
    for name, steps in (("one", 1), ("two", 2)):
        assert load_config(tmp_path / name / "mine.py") == replace(published, steps=steps)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match="no config .*lost.py; .*, shapes, shapes_vae$"):
        load_config(tmp_path / "lost.py")
