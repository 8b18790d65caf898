from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import TextEncoderConfig
from contextualstory_jax.models.clip_text import MLP, CLIPTextModel
from contextualstory_jax.models.network import Network

TINY = TextEncoderConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=6,
)


@pytest.fixture(scope="module")
def tiny():
    network = Network(lambda: CLIPTextModel(TINY))
    rng = np.random.default_rng(0)
    shapes = network.shapes.items()
    return network, {k: rng.normal(size=s.shape, scale=0.3).astype(np.float32) for k, s in shapes}


def encode(network, params, ids, dtype=None):
    return jax.jit(lambda p, x: network.bind(p, dtype)(x))(params, jnp.array(ids))


def test_names_and_shapes_at_published_size_are_the_checkpoint_s():
    shapes = Network(lambda: CLIPTextModel(TextEncoderConfig())).shapes
    assert len(shapes) == 372
    assert sum(s.size for s in shapes.values()) == 340_387_840
    assert shapes["text_model.embeddings.token_embedding.embedding"].shape == (49408, 1024)
    assert shapes["text_model.embeddings.position_embedding.embedding"].shape == (77, 1024)
    assert shapes["text_model.encoder.layers.22.self_attn.out_proj.bias"].shape == (1024,)
    assert shapes["text_model.encoder.layers.0.mlp.fc1.kernel"].shape == (1024, 4096)
    assert shapes["text_model.encoder.layers.0.layer_norm2.scale"].shape == (1024,)
    assert shapes["text_model.final_layer_norm.bias"].shape == (1024,)


def test_a_token_sees_only_itself_and_what_came_before(tiny):
    hidden = encode(*tiny, [[1, 2, 3, 4, 5, 6]])
    changed = encode(*tiny, [[1, 2, 3, 9, 5, 6]])
    differs = np.abs(hidden - changed).max(axis=-1) > 1e-4
    np.testing.assert_array_equal(differs, [[False, False, False, True, True, True]])


def test_the_same_token_differs_by_its_place(tiny):
    hidden = encode(*tiny, [[7, 7, 7, 7, 7, 7]])
    assert np.abs(hidden[0, 0] - hidden[0, 1]).max() > 1e-2


def test_the_output_is_normalised(tiny):
    network, params = tiny
    params = params | {
        "text_model.final_layer_norm.scale": np.ones(8, np.float32),
        "text_model.final_layer_norm.bias": np.zeros(8, np.float32),
    }
    hidden = encode(network, params, [[1, 2, 3, 4, 5, 6]])
    np.testing.assert_allclose(hidden.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(hidden.var(axis=-1), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("hidden_act", "expected"),
    [("gelu", 0.5 * (1 + math.erf(0.5**0.5))), ("quick_gelu", 1 / (1 + math.exp(-1.702)))],
)
def test_activations_of_one_are_exact(hidden_act, expected):
    config = TextEncoderConfig(
        hidden_size=1, intermediate_size=1, num_attention_heads=1, hidden_act=hidden_act
    )
    params = {"fc1.kernel": jnp.ones((1, 1)), "fc2.kernel": jnp.ones((1, 1))}
    params |= {"fc1.bias": jnp.zeros(1), "fc2.bias": jnp.zeros(1)}
    mlp = Network(lambda: MLP(config)).bind(params)
    np.testing.assert_allclose(mlp(jnp.ones((1, 1, 1))).item(), expected, rtol=1e-6)


def test_more_tokens_than_positions_are_refused(tiny):
    with pytest.raises(ValueError, match="7 tokens, but the text encoder has 6 positions"):
        encode(*tiny, [[0] * 7])


def test_the_tower_computes_in_the_dtype_of_its_parameters(tiny):
    assert encode(*tiny, [[1, 2, 3, 4, 5, 6]], jnp.bfloat16).dtype == jnp.bfloat16
