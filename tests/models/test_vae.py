from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import AutoencoderKLConfig, SpaceToDepthConfig
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.vae import (
    AutoencoderKL,
    Downsample,
    MidBlock,
    Moments,
    PixelAttention,
    SpaceToDepth,
    decode_latents,
    images_to_float,
    images_to_uint8,
    make_vae,
    sample_latents,
)

TINY = AutoencoderKLConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


def draw(network):
    """Random parameters, by NumPy: compiling the initialisers would take longer than the tests."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=s.shape) / math.prod(s.shape[:-1]) ** 0.5).astype(np.float32)
        for name, s in network.shapes.items()
    }


@pytest.fixture(scope="module")
def tiny():
    network = Network(lambda: AutoencoderKL(TINY))
    return network, draw(network)


def test_names_and_shapes_at_published_size_are_the_checkpoint_s():
    shapes = Network(lambda: AutoencoderKL(AutoencoderKLConfig())).shapes
    assert len(shapes) == 248
    assert sum(s.size for s in shapes.values()) == 83_653_863
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.kernel"].shape == (1, 1, 128, 256)
    assert shapes["encoder.down_blocks.2.downsamplers.0.conv.kernel"].shape == (3, 3, 512, 512)
    assert shapes["encoder.conv_out.kernel"].shape == (3, 3, 512, 8)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.kernel"].shape == (512, 512)
    assert shapes["decoder.mid_block.attentions.0.group_norm.scale"].shape == (512,)
    assert shapes["decoder.up_blocks.3.resnets.0.conv1.kernel"].shape == (3, 3, 256, 128)
    assert shapes["post_quant_conv.kernel"].shape == (1, 1, 4, 4)


def encode(network, params, pictures, dtype=None):
    return jax.jit(lambda p, x: network.bind(p, dtype).encode(x))(params, pictures)


def decode(network, params, latents, dtype=None):
    return jax.jit(lambda p, x: network.bind(p, dtype).decode(x))(params, latents)


def test_latents_are_smaller_by_the_config_s_factor_and_decode_to_the_pictures_size(tiny):
    mean, logvar = encode(*tiny, jnp.zeros((2, 12, 8, 3)))
    assert mean.shape == logvar.shape == (2, 12 // TINY.factor, 8 // TINY.factor, 4)
    assert decode(*tiny, mean).shape == (2, 12, 8, 3)


def test_pictures_do_not_see_each_other(tiny):
    pictures = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    changed = pictures.at[1].set(0)
    mean, mean_of_changed = encode(*tiny, pictures).mean, encode(*tiny, changed).mean
    np.testing.assert_array_equal(mean[0], mean_of_changed[0])
    assert np.abs(mean[1] - mean_of_changed[1]).max() > 1e-3


def test_the_autoencoder_computes_in_the_dtype_of_its_parameters(tiny):
    moments = encode(*tiny, jnp.zeros((1, 8, 8, 3)), jnp.bfloat16)
    assert moments.mean.dtype == moments.logvar.dtype == jnp.bfloat16
    assert decode(*tiny, jnp.zeros((1, 4, 4, 4)), jnp.bfloat16).dtype == jnp.bfloat16


def test_log_variance_is_clipped(tiny):
    network, params = tiny
    bias = jnp.array([0.0, 0, 0, 0, 1e3, 1e3, -1e3, -1e3])  # of the mean, then of the log variance
    moments = encode(network, params | {"quant_conv.bias": bias}, jnp.zeros((1, 8, 8, 3)))
    np.testing.assert_array_equal(moments.logvar[0, 0, 0], [20, 20, -30, -30])


@pytest.mark.parametrize(
    ("tap", "expected"), [((0, 0), [[0, 2], [8, 10]]), ((2, 2), [[10, 0], [0, 0]])]
)
def test_downsampling_pads_below_and_to_the_right_only(tap, expected):
    kernel = jnp.zeros((3, 3, 1, 1)).at[tap].set(1)
    downsample = Network(lambda: Downsample(1)).bind(
        {"conv.kernel": kernel, "conv.bias": jnp.zeros(1)}
    )
    out = downsample(jnp.arange(16.0).reshape(1, 4, 4, 1))
    np.testing.assert_array_equal(out[0, :, :, 0], expected)


def test_norms_add_1e_6_to_the_variance():
    network = Network(lambda: MidBlock(1, 1))
    params = {name: np.full(s.shape, name.endswith("scale")) for name, s in network.shapes.items()}
    block = network.bind(params, jnp.float32)
    x = 1e-3 * jnp.array([1.0, -1.0]).reshape(1, 1, 2, 1)  # of variance 1e-6
    resnet, attention = block.resnets[0], block.attentions[0]
    for norm in (resnet.norm1, resnet.norm2, attention.group_norm):
        np.testing.assert_allclose(norm(x).ravel(), [0.5**0.5, -(0.5**0.5)], rtol=1e-5)


def test_pixel_attention_has_one_head_over_all_positions():
    network = Network(lambda: PixelAttention(4, 2))
    layer = network.bind(draw(network))
    x = jax.random.normal(jax.random.key(1), (1, 2, 3, 4))
    y = layer.group_norm(x).reshape(6, 4)
    weights = jax.nn.softmax(layer.to_q(y) @ layer.to_k(y).T / 4**0.5, axis=-1)
    expected = x + layer.to_out[0](weights @ layer.to_v(y)).reshape(x.shape)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_space_to_depth_has_no_parameters_and_is_lossless():
    network = Network(lambda: SpaceToDepth(SpaceToDepthConfig(patch=2)))
    codec = network.bind(network.init(0), jnp.bfloat16)
    pictures = jax.random.uniform(jax.random.key(1), (2, 4, 6, 3), minval=-1)
    mean = codec.encode(pictures).mean
    assert network.shapes == {}
    assert mean.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(codec.decode(mean), pictures)


def test_space_to_depth_channels_are_row_then_column_then_colour():
    codec = SpaceToDepth(SpaceToDepthConfig(patch=2))
    pictures = jnp.arange(48.0).reshape(1, 4, 4, 3)
    mean = codec.encode(pictures).mean
    y, x, colour = 1, 0, 2
    assert mean[0, 1, 0, (y * 2 + x) * 3 + colour] == pictures[0, 2 * 1 + y, 2 * 0 + x, colour]


def test_a_sample_of_space_to_depth_is_the_mean_exactly():
    codec = SpaceToDepth(SpaceToDepthConfig(patch=2))
    moments = codec.encode(jax.random.uniform(jax.random.key(1), (1, 4, 4, 3), minval=-1))
    noise = jax.random.normal(jax.random.key(2), moments.mean.shape)
    np.testing.assert_array_equal(sample_latents(moments, noise, 1.0), moments.mean)


@pytest.mark.parametrize(
    ("config", "codec"), [(TINY, AutoencoderKL), (SpaceToDepthConfig(), SpaceToDepth)]
)
def test_the_config_chooses_the_codec(config, codec):
    assert type(make_vae(config)) is codec


def test_samples_are_scaled_after_the_noise():
    ones = jnp.ones((1, 1, 1, 1))
    moments = Moments(3 * ones, jnp.log(4.0) * ones)
    np.testing.assert_allclose(sample_latents(moments, 0.5 * ones, 0.1).item(), 0.4, rtol=1e-6)


def test_decoding_divides_by_the_scaling_factor():
    codec = SpaceToDepth(SpaceToDepthConfig(patch=1))
    latents = jnp.full((1, 1, 1, 3), 0.25)
    np.testing.assert_array_equal(decode_latents(codec, latents, 0.5), 0.5)


def test_levels_are_truncated_and_clipped():
    pictures = jnp.array([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 6)
    levels = images_to_uint8(pictures)
    assert levels.dtype == jnp.uint8
    np.testing.assert_array_equal(levels.ravel(), [0, 0, 127, 254, 255, 255])


def test_every_level_survives_float_to_within_one():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16, 1)
    pictures = images_to_float(levels)
    assert pictures.dtype == jnp.float32
    assert (pictures.min(), pictures.max()) == (-1, 1)
    lost = np.asarray(levels, int) - np.asarray(images_to_uint8(pictures), int)
    assert set(lost.ravel()) <= {0, 1}
