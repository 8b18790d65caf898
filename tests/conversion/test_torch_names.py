"""Names and layouts of PyTorch checkpoints, and what the converter refuses."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.conversion import torch_names
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.utils.errors import UserError

# Key and shape of every tensor in the released checkpoints, by model.
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published_shapes.json.gz"


@pytest.mark.parametrize(
    ("name", "ndim", "key"),
    [
        ("conv_in.kernel", 4, "conv_in.weight"),
        ("conv_in.bias", 1, "conv_in.bias"),
        ("time_embedding.linear_1.kernel", 2, "time_embedding.linear_1.weight"),
        ("down_blocks.0.resnets.1.norm1.scale", 1, "down_blocks.0.resnets.1.norm1.weight"),
        ("mid_block.conv3ds.0.conv1.kernel", 4, "mid_block.conv3ds.0.conv1.weight"),
        ("mid_block.conv3ds.0.alpha", 1, "mid_block.conv3ds.0.alpha"),
        ("msim_embedding.0.kernel", 2, "msim_embedding.0.weight"),
        ("text_adapter.pos_embed", 4, "text_adapter.pos_embed"),
        ("a.rotary_emb.freqs", 1, "a.rotary_emb.freqs"),
        ("a.token_embedding.embedding", 2, "a.token_embedding.weight"),
    ],
)
def test_a_key_is_our_name_but_for_the_last_word(name, ndim, key):
    assert torch_names.torch_key(name, ndim) == key


def test_dead_tensors_at_published_size_are_the_checkpoint_s():
    published = json.loads(gzip.decompress(PUBLISHED.read_bytes()))
    shapes = StoryModel(ModelConfig()).shapes

    made = {part: torch_names.dead_tensors(shapes[part], n_temp_heads=8) for part in shapes}

    models = ("unet_visualization", "vae", "text_encoder")
    for part, model in zip(shapes, models, strict=True):
        assert {key: list(array.shape) for key, array in made[part].items()} == {
            key: shape
            for key, shape in published[model].items()
            if any(re.fullmatch(pattern, key) for pattern, _ in torch_names.DEAD)
        }


def test_stable_diffusion_has_all_but_what_is_added():
    keys = json.loads(gzip.decompress(PUBLISHED.read_bytes()))["unet_continuation"]

    # So many tensors, and values, has the UNet of Stable Diffusion 2.1-base.
    theirs = [shape for key, shape in keys.items() if not re.fullmatch(torch_names.ADDED, key)]
    assert len(theirs) == 686
    assert sum(map(math.prod, theirs)) == 865_910_724


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (
            "encoder.mid_block.attentions.0.query.weight",
            "encoder.mid_block.attentions.0.to_q.weight",
        ),
        ("decoder.mid_block.attentions.0.key.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("decoder.mid_block.attentions.0.value.bias", "decoder.mid_block.attentions.0.to_v.bias"),
        (
            "encoder.mid_block.attentions.0.proj_attn.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight",
        ),
        ("embeddings.position_ids", "text_model.embeddings.position_ids"),
        ("encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.bias"),
        ("final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
    ],
)
def test_names_of_other_versions_are_known(given, key):
    assert torch_names.canonical_key(given) == key


LAYOUTS = {  # our name: (PyTorch's shape, ours, an index there, the same value's index here)
    "a.linear.kernel": ((2, 3), (3, 2), (1, 2), (2, 1)),
    "a.conv.kernel": ((2, 3, 4, 5), (4, 5, 3, 2), (1, 2, 3, 0), (3, 0, 2, 1)),
    "a.conv3ds.0.conv1.kernel": ((2, 4, 3, 1, 1), (3, 1, 4, 2), (1, 3, 2, 0, 0), (2, 0, 3, 1)),
    "a.norm.scale": ((3,), (3,), (2,), (2,)),
    "a.table.embedding": ((4, 3), (4, 3), (3, 1), (3, 1)),
    "a.pos_embed": ((1, 2, 3, 4), (1, 2, 3, 4), (0, 1, 2, 3), (0, 1, 2, 3)),
}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items())
def test_layouts_go_there_and_back(name, layout):
    torch_shape, shape, there, here = layout
    tensor = np.arange(math.prod(torch_shape)).reshape(torch_shape)

    ours = torch_names.from_torch(name, tensor, len(shape))

    assert ours.shape == shape
    assert ours[here] == tensor[there]
    assert torch_names.torch_shape(name, shape) == torch_shape
    np.testing.assert_array_equal(torch_names.to_torch(name, ours), tensor)


SHAPES = {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in {"a.kernel": (3, 2), "a.bias": (2,), "b.scale": (4,)}.items()
}


def test_conversion_fills_every_parameter_and_passes_over_dead_tensors():
    tensors = {
        "a.weight": np.arange(6.0).reshape(2, 3),
        "a.bias": np.zeros(2),
        "b.weight": np.ones(4),
        "text_model.embeddings.position_ids": np.arange(77),
    }

    params = torch_names.convert(tensors, SHAPES)

    assert params.keys() == SHAPES.keys()
    np.testing.assert_array_equal(params["a.kernel"], [[0, 3], [1, 4], [2, 5]])


def test_conversion_names_all_problems_at_once():
    tensors = {
        "a.weight": np.zeros((3, 2)),  # of a PyTorch shape that only looks like ours
        "b.weight": np.zeros(4),
        "c.weight": np.zeros(1),
    }

    with pytest.raises(UserError) as refusal:
        torch_names.convert(tensors, SHAPES)

    assert str(refusal.value) == (
        "weights do not fit this model: "
        "a.bias: missing; "
        "a.weight: shape (3, 2), expected (2, 3); "
        "c.weight: no such parameter in this model"
    )
