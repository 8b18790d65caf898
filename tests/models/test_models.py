"""The UNet's modules: shapes and peculiarities, in modules as small as can be."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.models.embeddings import frame_position_table, sinusoidal_embedding
from contextualstory_jax.models.layers import group_norm, layer_norm
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.spatial import (
    Downsample2D,
    ResnetBlock2D,
    SpatialTransformer,
    SpatialTransformerBlock,
    Upsample2D,
)
from contextualstory_jax.models.storyflow import StoryFlowAdapter, interpolation, storyflow
from contextualstory_jax.models.storyline import StorylineAttention, StorylineContextualizer
from contextualstory_jax.models.temporal import (
    TemporalConv,
    TemporalResnetBlock,
    TemporalTransformer,
    clamp_alphas,
)
from tests.helpers.tiny_networks import FRAMES, TEXT, WIDTH, differ, draw, drawn, random, tiny


def initial(make):
    """A module as it is before training."""
    network = Network(make)
    return network.bind(network.init(0))


# Embeddings and norms


def test_steps_are_embedded_as_a_half_of_cosines_and_a_half_of_sines():
    cos, sin = math.cos, math.sin
    x = jnp.array([0, 2])

    np.testing.assert_allclose(
        sinusoidal_embedding(x, 4), [[1, 1, 0, 0], [cos(2), cos(0.02), sin(2), sin(0.02)]], 1e-6
    )
    np.testing.assert_allclose(
        sinusoidal_embedding(x, 4, cos_first=False)[1], [sin(2), sin(0.02), cos(2), cos(0.02)], 1e-6
    )
    np.testing.assert_allclose(  # the frequencies then end at 1/10000
        sinusoidal_embedding(x, 4, freq_shift=1.0)[1, :2], [cos(2), cos(0.0002)], 1e-6
    )


def test_frame_positions_are_interleaved_sines_and_cosines():
    np.testing.assert_allclose(
        frame_position_table(3, 4),
        [
            [0, 1, 0, 1],
            [math.sin(1), math.cos(1), math.sin(0.1), math.cos(0.1)],
            [math.sin(2), math.cos(2), math.sin(0.2), math.cos(0.2)],
        ],
        rtol=1e-6,
    )


def test_a_group_s_statistics_are_of_one_frame():
    x = random(2, 3, 2, 2, 4)
    expected = np.asarray(x).reshape(2, 3, 4, 2, 2)  # stories, frames, pixels, groups, channels
    mean = expected.mean(axis=(2, 4), keepdims=True)
    variance = expected.var(axis=(2, 4), keepdims=True)
    expected = (expected - mean) / np.sqrt(variance + 1e-5)

    out = initial(lambda: group_norm(4, 2, 1e-5))(x)

    np.testing.assert_allclose(out, expected.reshape(x.shape), rtol=1e-5, atol=1e-5)


CONFIG = tiny()
NORMS = {
    "LayerNorm": (lambda: layer_norm(32), lambda m: [m], 1e-5),
    "ResnetBlock2D": (
        lambda: ResnetBlock2D(CONFIG, 32, 32, 8),
        lambda m: [m.norm1, m.norm2],
        CONFIG.norm_eps,
    ),
    "SpatialTransformer": (lambda: SpatialTransformer(CONFIG, 32, 2), lambda m: [m.norm], 1e-6),
    "TemporalResnetBlock": (
        lambda: TemporalResnetBlock(32),
        lambda m: [m.norm1, m.norm2],
        1e-6,
    ),
    "TemporalTransformer": (
        lambda: TemporalTransformer(CONFIG, 32, 2, seta=True, rotary=True),
        lambda m: [m.norm],
        1e-6,
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_add_the_original_s_epsilon_to_the_variance(name):
    make, norms, epsilon = NORMS[name]
    x = 1e-3 * jnp.tile(jnp.array([1.0, -1.0]), 16).reshape(1, 1, 1, 1, 32)
    if name != "LayerNorm":  # a group of one channel: over pixels
        x = 1e-3 * jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2, 1) * jnp.ones(32)

    for norm in norms(initial(make)):
        expected = 1e-3 / math.sqrt(1e-6 + epsilon)
        np.testing.assert_allclose(np.abs(norm(x)), expected, rtol=1e-4)


def test_the_temporal_convolution_s_groups_are_32_whatever_the_config_s():
    assert initial(lambda: TemporalResnetBlock(64)).norm1.num_groups == 32


# One frame at a time


@pytest.mark.parametrize(
    ("tap", "expected"),
    [((0, 0), [[0, 0], [0, 5]]), ((1, 1), [[0, 2], [8, 10]]), ((2, 2), [[5, 7], [13, 15]])],
)
def test_downsampling_pads_every_side(tap, expected):
    kernel = jnp.zeros((3, 3, 1, 1)).at[tap].set(1)
    downsample = Network(lambda: Downsample2D(1)).bind(
        {"conv.kernel": kernel, "conv.bias": jnp.zeros(1)}
    )

    out = downsample(jnp.arange(16.0).reshape(1, 1, 4, 4, 1))

    np.testing.assert_array_equal(out[0, 0, :, :, 0], expected)


def test_upsampling_repeats_pixels():
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1)
    upsample = Network(lambda: Upsample2D(1)).bind(
        {"conv.kernel": kernel, "conv.bias": jnp.zeros(1)}
    )

    x = jnp.array([[1.0, 2]]).reshape(1, 1, 1, 2, 1)

    np.testing.assert_array_equal(upsample(x, 2, 4)[0, 0, :, :, 0], [[1, 1, 2, 2]] * 2)
    np.testing.assert_array_equal(upsample(x, 1, 3)[0, 0, :, :, 0], [[1, 1, 2]])


@pytest.mark.parametrize(("see_first_frame", "moved"), [(False, [1, 0, 0]), (True, [1, 1, 1])])
def test_frames_see_the_first_one_where_they_are_let(see_first_frame, moved):
    block = drawn(lambda: SpatialTransformerBlock(4, 2, WIDTH))
    x = random(1, FRAMES, 2, 4)
    text = block.attn2.keys_values(random(1, FRAMES, TEXT, WIDTH, seed=1))
    changed = x.at[:, 0, 1].multiply(-1)  # adding a number would be lost in the norm

    out, out_of_changed = (block(a, text, see_first_frame) for a in (x, changed))

    np.testing.assert_array_equal(differ(out, out_of_changed, axis=1), moved)


def test_the_first_frame_sees_its_own_tokens_twice_without_effect():
    block = drawn(lambda: SpatialTransformerBlock(4, 2, WIDTH))
    x = random(1, FRAMES, 2, 4)
    text = block.attn2.keys_values(random(1, FRAMES, TEXT, WIDTH, seed=1))

    alone, seen = block(x, text, False), block(x, text, True)

    np.testing.assert_allclose(alone[:, 0], seen[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(alone[:, 1:] - seen[:, 1:]).max() > 1e-3


def test_a_sentence_conditions_its_own_frame():
    block = drawn(lambda: SpatialTransformerBlock(4, 2, WIDTH))
    x, text = random(1, FRAMES, 2, 4), random(1, FRAMES, TEXT, WIDTH, seed=1)
    changed = text.at[:, 1].add(1)

    out, out_of_changed = (block(x, block.attn2.keys_values(t), False) for t in (text, changed))

    np.testing.assert_array_equal(differ(out, out_of_changed, axis=1), [False, True, False])


# Across frames


def test_the_temporal_convolution_is_a_sum_over_three_frames():
    layer = drawn(lambda: TemporalConv(4))
    x = random(2, 5, 2, 3, 4)
    kernel, bias = np.asarray(layer.kernel[...])[:, 0], np.asarray(layer.bias[...])
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    expected = sum(padded[:, t : t + 5] @ kernel[t] for t in range(3)) + bias

    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


TEMPORAL = {
    "convolution": lambda: TemporalResnetBlock(32),
    "transformer": lambda: TemporalTransformer(tiny(), 32, 2, seta=True, rotary=True),
    "sinusoidal transformer": lambda: TemporalTransformer(tiny(), 32, 2, seta=True, rotary=False),
}


@pytest.mark.parametrize("make", TEMPORAL.values(), ids=TEMPORAL)
def test_temporal_modules_start_silent(make):
    x = random(1, FRAMES, 2, 2, 32)

    np.testing.assert_array_equal(initial(make)(x), x)


@pytest.mark.parametrize("make", TEMPORAL.values(), ids=TEMPORAL)
def test_alpha_blends_input_and_output(make):
    network = Network(make)
    x, params = random(1, FRAMES, 2, 2, 32), draw(network)

    branch, blend = (
        network.bind(params | {"alpha": np.array([alpha], np.float32)})(x) for alpha in (0, 0.25)
    )

    assert np.abs(branch - x).max() > 0.1
    np.testing.assert_allclose(blend, 0.25 * x + 0.75 * branch, rtol=1e-5, atol=1e-5)


def test_only_alphas_are_clamped():
    params = {"a.alpha": np.array([1.5]), "b.alpha": np.array([-0.5]), "a.bias": np.array([1.5])}

    clamped = clamp_alphas(params)

    assert {name: p.item() for name, p in clamped.items()} == {
        "a.alpha": 1,
        "b.alpha": 0,
        "a.bias": 1.5,
    }


# StoryFlow Adapter


def test_storyflow_is_the_distance_between_neighbouring_frames():
    frames = [[0, 0], [3, 4], [3, 0], [0, 0]]  # of one row of two pixels

    changes = storyflow(jnp.array(frames, jnp.bfloat16).reshape(1, 4, 1, 2, 1))

    assert changes.dtype == jnp.float32
    np.testing.assert_array_equal(changes, [[5, 4, 3]])


def test_four_values_are_stretched_to_five_frames():
    np.testing.assert_allclose(
        interpolation(5),
        [[1, 0, 0, 0], [0.3, 0.7, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.7, 0.3], [0, 0, 0, 1]],
        atol=1e-6,
    )


def test_embeddings_are_stretched_before_the_mlp():
    adapter = drawn(lambda: StoryFlowAdapter(8, 8, zero=False))
    motion = jnp.array([[0.0, 1, 5, 20]])
    embeddings = jnp.einsum("fm,bmc->bfc", interpolation(5), sinusoidal_embedding(motion, 8))
    first, activation, last = adapter

    out = adapter(motion, 5)

    np.testing.assert_allclose(out, last(activation(first(embeddings))), rtol=1e-5, atol=1e-6)
    assert np.abs(out - adapter(motion @ interpolation(5).T, 5)).max() > 1e-2


def test_one_value_a_frame_is_not_stretched():
    adapter = drawn(lambda: StoryFlowAdapter(8, 8, zero=False))

    out = adapter(jnp.array([[1.0, 2, 3, 4, 5]]), 5)
    changed = adapter(jnp.array([[1.0, 2, 9, 4, 5]]), 5)

    np.testing.assert_array_equal(differ(out, changed, axis=1), [0, 0, 1, 0, 0])


# Storyline Contextualizer


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize(("causal", "moved"), [(True, [0, 1, 1]), (False, [1, 1, 1])])
def test_under_a_causal_mask_a_sentence_does_not_see_later_ones(temporal, causal, moved):
    layer = drawn(lambda: StorylineAttention(WIDTH, temporal, causal))
    text = random(1, FRAMES, TEXT, WIDTH)
    changed = text.at[:, 1, 1].add(1)  # the last token of the second sentence

    out, out_of_changed = layer(text), layer(changed)

    np.testing.assert_array_equal(differ(out, out_of_changed, axis=1), moved)
    # Across tokens a whole sentence sees it; across sentences, only its own token slot does.
    slots = [not temporal, True]
    np.testing.assert_array_equal(differ(out[:, 1:2], out_of_changed[:, 1:2], axis=2), slots)


def test_sentences_are_told_apart_by_rotary_positions():
    layer = drawn(lambda: StorylineAttention(64, temporal=True, causal=False))
    text = jnp.repeat(random(1, 1, 1, 64), FRAMES, axis=1) + 0.1 * random(1, FRAMES, 1, 64, seed=1)

    out, backwards = layer(text), layer(text[:, ::-1])[:, ::-1]

    assert layer.rotary_emb.freqs.shape == (4,)  # a head has 8 channels
    assert np.abs(out - backwards).max() > 1e-4


def test_the_contextualizer_is_not_the_identity_at_initialisation():
    contextualizer = initial(lambda: StorylineContextualizer(tiny()))
    text = random(1, FRAMES, TEXT, WIDTH)

    added = contextualizer(text) - text

    np.testing.assert_allclose(added.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(added.std(axis=-1), 1, rtol=1e-3)


def test_the_contextualizer_s_last_feed_forward_starts_at_zero():
    params = Network(lambda: StorylineContextualizer(tiny(num_layers_FStext=2))).init(0)
    zero = {name for name, p in params.items() if name.endswith("ff.net.2.kernel") and not p.any()}

    assert zero == {"trf_blocks.1.transformer_blocks.1.ff.net.2.kernel"}


def test_positions_beyond_the_text_are_not_read():
    network = Network(lambda: StorylineContextualizer(tiny()))
    params, text = draw(network), random(1, FRAMES, TEXT, WIDTH)

    def changed(row):
        table = params["pos_embed"].copy()
        table[:, :, row] += 1 + np.arange(WIDTH)
        return network.bind(params | {"pos_embed": table})(text)

    out = network.bind(params)(text)

    np.testing.assert_array_equal(out, changed(TEXT))
    assert np.abs(out - changed(TEXT - 1)).max() > 1e-3
