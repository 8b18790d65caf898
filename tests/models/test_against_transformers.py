"""The VAE and text encoder against diffusers and transformers, on random small configs.

`tests/models/test_tokenizer.py` holds ids against CLIP's own procedure, without PyTorch.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import AutoencoderKLConfig, TextEncoderConfig
from contextualstory_jax.conversion import torch_names
from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.models.clip_text import CLIPTextModel
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.models.vae import AutoencoderKL

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SEEDS = range(4)
TOLERANCE = 1e-5  # relative L2 error in float32


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def randomize(module) -> None:
    """Give every tensor, norms and biases too, values that show in the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5 if parameter.ndim > 1 else 0.5)


def bind(network, module, prefix: str = ""):
    """Our network with the weights of a PyTorch module; refuses a missing or an unknown key."""
    tensors = {prefix + key: tensor.numpy() for key, tensor in module.state_dict().items()}
    return network.bind(torch_names.convert(tensors, network.shapes))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def random_vae(seed: int):
    """A config, our autoencoder, diffusers' autoencoder with the same weights, and a generator."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([2, 4]))
    config = AutoencoderKLConfig(
        latent_channels=int(rng.integers(2, 6)),
        block_out_channels=tuple(groups * int(c) for c in rng.integers(1, 5, rng.integers(2, 4))),
        layers_per_block=int(rng.integers(1, 3)),
        norm_num_groups=groups,
    )
    levels = len(config.block_out_channels)
    torch.manual_seed(seed)
    reference = diffusers.AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()
    randomize(reference)
    codec = bind(Network(lambda: AutoencoderKL(config)), reference)
    return config, codec, reference, rng


@pytest.mark.parametrize("seed", SEEDS)
def test_encode_is_diffusers(seed):
    config, codec, reference, rng = random_vae(seed)
    size = 3 * config.factor, 2 * config.factor
    pictures = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)

    moments = codec.encode(jnp.asarray(pictures))

    with torch.no_grad():
        expected = reference.encode(nchw(pictures)).latent_dist
    assert relative_error(moments.mean, nhwc(expected.mean)) <= TOLERANCE
    assert relative_error(moments.logvar, nhwc(expected.logvar)) <= TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_decode_is_diffusers(seed):
    config, codec, reference, rng = random_vae(seed)
    latents = rng.normal(size=(2, 3, 2, config.latent_channels)).astype(np.float32)

    pictures = codec.decode(jnp.asarray(latents))

    with torch.no_grad():
        expected = reference.decode(nchw(latents)).sample
    assert relative_error(pictures, nhwc(expected)) <= TOLERANCE


def random_text_tower(seed: int, **fixed):
    """A config, our text encoder, transformers' with the same weights, and a generator."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    values = {
        "vocab_size": 50,
        "hidden_size": heads * int(rng.choice([4, 8])),
        "intermediate_size": int(rng.integers(8, 40)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "max_position_embeddings": int(rng.integers(8, 20)),
    }
    config = TextEncoderConfig(**{**values, **fixed})
    torch.manual_seed(seed)
    reference = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**dataclasses.asdict(config))
    ).eval()
    randomize(reference)
    # transformers 5 left the prefix out of its names; published checkpoints have it.
    tower = bind(Network(lambda: CLIPTextModel(config)), reference, prefix="text_model.")
    return config, tower, reference, rng


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("seed", SEEDS)
def test_text_tower_is_transformers(seed, hidden_act):
    config, tower, reference, rng = random_text_tower(seed, hidden_act=hidden_act)
    ids = rng.integers(0, config.vocab_size, (3, config.max_position_embeddings))

    hidden = tower(jnp.asarray(ids))

    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert relative_error(hidden, expected) <= TOLERANCE


def test_sentences_through_tokenizer_and_tower_are_transformers():
    sentences = [
        "mia and otto are on the beach .",
        "",
        'mia jumps up high! otto, who watches, says: "where\'s mia?!"',
        "they take a nap " * 10,
    ]
    theirs = transformers.CLIPTokenizer.from_pretrained(TOKENIZER_DIR)
    length = theirs.model_max_length
    fixed = {"vocab_size": len(theirs), "max_position_embeddings": length}
    _, tower, reference, _ = random_text_tower(0, **fixed)

    hidden = tower(jnp.asarray(Tokenizer(TOKENIZER_DIR, length)(sentences)))

    # As the original's pipeline calls it: no attention mask, so that padding is read too.
    ids = theirs(sentences, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids).last_hidden_state.numpy()
    assert relative_error(hidden, expected) <= TOLERANCE
