from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import (
    CLIPConfig,
    TextEncoderConfig,
    VisionEncoderConfig,
)
from contextualstory_jax.models.clip_vision import CLIPModel
from contextualstory_jax.models.network import Network
from contextualstory_jax.testing import parity_weights
from tests.helpers.metric_packages import package, within

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TINY = CLIPConfig(
    TextEncoderConfig(vocab_size=50, hidden_size=8, max_position_embeddings=6, **LAYERS),
    VisionEncoderConfig(hidden_size=16, image_size=12, patch_size=4, **LAYERS),
    projection_dim=10,
)


def filled(config: CLIPConfig):
    network = Network(lambda: CLIPModel(config))
    return network, parity_weights.params(network, 0)


def images_of(config: CLIPConfig, count: int) -> jax.Array:
    side = config.vision_config.image_size
    values = np.random.default_rng(0).normal(size=(count, side, side, 3))
    return jnp.asarray(values, jnp.float32)


def test_names_and_shapes_at_the_size_of_vit_b_32_are_the_checkpoint_s():
    text = TextEncoderConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        hidden_act="quick_gelu",
    )
    shapes = Network(lambda: CLIPModel(CLIPConfig(text, VisionEncoderConfig()))).shapes

    # The published 151,277,313 but for logit_scale.
    assert sum(s.size for s in shapes.values()) == 151_277_312
    assert shapes["vision_model.embeddings.class_embedding"].shape == (768,)
    assert shapes["vision_model.embeddings.patch_embedding.kernel"].shape == (32, 32, 3, 768)
    assert shapes["vision_model.embeddings.position_embedding.embedding"].shape == (50, 768)
    assert shapes["vision_model.pre_layrnorm.scale"].shape == (768,)
    assert shapes["visual_projection.kernel"].shape == (768, 512)
    assert shapes["text_projection.kernel"].shape == (512, 512)


def test_every_patch_has_a_say_and_its_place_counts():
    network, params = filled(TINY)
    clip, images = network.bind(params), images_of(TINY, 1)

    vector = clip.encode_images(images)

    hidden = [
        images.at[:, row : row + 4, column : column + 4].set(0)
        for row in (0, 4, 8)
        for column in (0, 4, 8)
    ]
    changed = clip.encode_images(jnp.concatenate([*hidden, jnp.roll(images, 4, axis=1)]))
    assert float(jnp.abs(changed - vector).max(axis=1).min()) > 1e-4


def test_a_sentence_is_read_at_its_first_end_token():
    network, params = filled(TINY)
    clip = network.bind(params)

    padded = clip.encode_text(jnp.asarray([[7, 3, 49, 49, 49, 49]]))
    other = clip.encode_text(jnp.asarray([[7, 3, 49, 0, 0, 0]]))
    longer = clip.encode_text(jnp.asarray([[7, 3, 4, 49, 49, 49]]))

    np.testing.assert_array_equal(padded, other)
    assert float(jnp.abs(padded - longer).max()) > 1e-3


def test_vectors_have_length_one():
    network, params = filled(TINY)
    clip = network.bind(params)

    vectors = [clip.encode_images(images_of(TINY, 2)), clip.encode_text(jnp.full((1, 6), 49))]

    for vector in vectors:
        np.testing.assert_allclose(np.linalg.norm(vector, axis=-1), 1, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_both_encoders_are_transformers(hidden_act):
    torch, transformers = package("torch"), package("transformers")
    text = dataclasses.replace(TINY.text_config, hidden_act=hidden_act)
    vision = dataclasses.replace(TINY.vision_config, hidden_act=hidden_act)
    config = CLIPConfig(text, vision, TINY.projection_dim)
    network, params = filled(config)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            # 2 says: the largest id is the end token.
            text_config=dataclasses.asdict(text) | {"eos_token_id": 2},
            vision_config=dataclasses.asdict(vision),
            projection_dim=config.projection_dim,
        )
    ).eval()
    theirs.load_state_dict(
        {
            key: tensor
            if key == "logit_scale"
            else torch.from_numpy(parity_weights.torch_weight(key, tuple(tensor.shape), 0))
            for key, tensor in theirs.state_dict().items()
        }
    )
    images = images_of(config, 3)
    ids = np.random.default_rng(0).integers(0, 50, (3, 6))

    clip = network.bind(params)
    ours = clip.encode_images(images), clip.encode_text(jnp.asarray(ids))

    with torch.no_grad():
        found = theirs(
            pixel_values=torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))),
            input_ids=torch.from_numpy(ids),
        )
    theirs = {"images": found.image_embeds, "sentences": found.text_embeds}
    for actual, (what, expected) in zip(ours, theirs.items(), strict=True):
        error = np.abs(actual - expected.numpy()).max() / np.abs(expected.numpy()).max()
        within(f"CLIP, {hidden_act}: {what}", float(error), 1e-5)
