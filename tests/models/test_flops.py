"""The count of operations: the published model's totals, and those of traced programs, exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import (
    AutoencoderKLConfig,
    ModelConfig,
    SpaceToDepthConfig,
    TextEncoderConfig,
    UNetConfig,
    UseTemporal,
)
from contextualstory_jax.config.train_config import DataConfig, TrainConfig
from contextualstory_jax.models.flops import (
    DEVICES,
    decoder_flops,
    encoder_flops,
    generation_flops,
    peak_flops,
    storyline_flops,
    text_tower_flops,
    training_step_flops,
    unet_flops,
)
from contextualstory_jax.models.story_model import StoryModel

PUBLISHED = ModelConfig()
FRAMES, TOKENS = 3, 6


def small(**unet) -> ModelConfig:
    """Every part of the published model, on latents of 8 x 4; `unet` changes its UNet."""
    values = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "n_frames": FRAMES,
        "n_temp_heads": 2,
        "num_layers_FStext": 1,
        "max_text_length": TOKENS,
    }
    return ModelConfig(
        unet=UNetConfig(**values | unet),
        vae=AutoencoderKLConfig(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=10,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
        ),
        height=16,
        width=8,
    )


def traced_flops(function: Callable, *arguments: Any) -> int:
    """The products in a traced function, two operations each.

    Of a convolution over frames, the (3, 1) kernels, the taps on padding are left out.
    """

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            size = math.prod(equation.outvars[0].aval.shape)
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += 2 * size * math.prod(shape[axis] for axis in contracted)
            elif equation.primitive.name == "conv_general_dilated":
                kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
                total += 2 * size * math.prod(kernel) // kernel[spec.rhs_spec[0]]
                if kernel[:2] == (3, 1):
                    frames = equation.outvars[0].aval.shape[1]
                    total -= 2 * size * 2 * kernel[2] // frames
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array that a trace needs the shape of."""
    return jax.ShapeDtypeStruct(shape, dtype)


def traced_unet(config: ModelConfig, stories: int) -> int:
    """The operations of one prediction for so many stories as it is computed."""
    model, unet = StoryModel(config), config.unet
    size = config.latent_size(config.height, config.width)
    storyline = array(stories, FRAMES, TOKENS, unet.cross_attention_dim)
    text = jax.eval_shape(model.text_keys_values, model.shapes, storyline)
    times = model.shapes, array(stories, dtype=jnp.int32), array(stories, FRAMES)
    shifts = jax.eval_shape(model.time_shifts, *times)
    given = unet.is_continuation
    once = traced_flops(
        model.predict,
        model.shapes,
        array(stories, FRAMES - given, *size, unet.in_channels),
        shifts,
        text,
        array(stories, *size, unet.in_channels) if given else None,
    )
    storyflow = stories * storyline_flops(config)["StoryFlow"]  # is work of the story
    return once + traced_flops(model.time_shifts, *times) - storyflow


def masked(config: ModelConfig) -> int:
    """What SETA's 4x4 tiles compute for keys that their masks leave out.

    That is at the first level, the only one with SETA in `small`.
    """
    unet, (height, width) = config.unet, config.latent_size(config.height, config.width)
    if not unet.augment_temporal_attention or not unet.use_temporal.temporal_attn:
        return 0
    own = 0 if unet.temp_pos_embedding == "rotary" else FRAMES  # beside the tile's keys
    keys = FRAMES * 6 * 6 + own - (8 * (FRAMES - 1) + FRAMES)
    transformers = (2 * unet.layers_per_block + 1) * unet.transformer_layers_per_block
    return transformers * 4 * FRAMES * height * width * keys * unet.block_out_channels[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_frame_condition_mode": "conv2d", "temp_pos_embedding": "sinusoidal"},
        {"first_frame_condition_mode": "concat", "transformer_layers_per_block": 2},
        {"augment_temporal_attention": False, "use_frame_stride_condition": True},
        {"use_temporal": UseTemporal(temporal_attn=False), "use_motion_condition": False},
        {"use_temporal": UseTemporal(temporal_conv=False), "layers_per_block": 2},
    ],
    ids=lambda changes: ",".join(changes) or "none",
)
def test_a_prediction_is_counted_as_it_is_traced(changes):
    config = small(**changes)

    # One more story: what depends on weights alone, the projected frame positions, drops out.
    traced = traced_unet(config, 2) - traced_unet(config, 1)

    assert unet_flops(config).total() == traced - masked(config)


def test_a_prediction_of_odd_sides_is_counted_as_it_is_traced():
    # Latents of 5 x 7, without SETA, whose padding is no work that the method needs.
    config = dataclasses.replace(small(augment_temporal_attention=False), height=10, width=14)

    traced = traced_unet(config, 2) - traced_unet(config, 1)

    assert unet_flops(config).total() == traced


def test_what_is_done_once_a_story_is_counted_as_it_is_traced():
    config = small()
    model = StoryModel(config)
    text = array(1, FRAMES, TOKENS, config.unet.cross_attention_dim)

    def storyflow(params, motion):
        return model.unet.bind(params).storyflow(motion)

    parts = storyline_flops(config)

    assert parts["contextualizer"] == traced_flops(model.contextualize, model.shapes, text)
    assert parts["text keys and values"] == traced_flops(model.text_keys_values, model.shapes, text)
    assert parts["StoryFlow"] == traced_flops(storyflow, model.shapes["unet"], array(1, FRAMES))
    ids = array(1, 1, TOKENS, dtype=jnp.int32)
    assert text_tower_flops(config) == traced_flops(model.encode_text, model.shapes, ids)


def test_the_codec_is_counted_as_it_is_traced():
    config = small()
    model = StoryModel(config)
    frame, latents = array(1, 1, 16, 8, 3), array(1, 1, 8, 4, 4)

    assert encoder_flops(config) == traced_flops(model.image_moments, model.shapes, frame)
    assert decoder_flops(config) == traced_flops(model.decode, model.shapes, latents)
    patches = ModelConfig(
        unet=UNetConfig(in_channels=12, out_channels=12), vae=SpaceToDepthConfig(patch=2)
    )
    assert encoder_flops(patches) == decoder_flops(patches) == 0


def test_a_gradient_takes_three_times_the_forward_pass():
    # One level: the gradient of a strided convolution would be traced with zeros between pixels.
    config = small(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        use_temporal=UseTemporal(temporal_conv=False),  # and those over frames with the padding
    )
    model = StoryModel(config)
    text, motion = array(1, FRAMES, TOKENS, 16), array(1, FRAMES)
    noisy, timesteps = array(1, FRAMES, 8, 4, 4), array(1, dtype=jnp.int32)

    def loss(unet, text, motion, noisy, timesteps):
        params = {"unet": unet}
        keys_values = model.text_keys_values(params, model.contextualize(params, text))
        shifts = model.time_shifts(params, timesteps, motion)
        return model.predict(params, noisy, shifts, keys_values, None).sum()

    arguments = (model.shapes["unet"], text, motion, noisy, timesteps)
    forward = traced_flops(loss, *arguments)
    both = traced_flops(jax.grad(loss), *arguments)

    # Inputs, here noisy latents, text and scene changes, need no gradient.
    np.testing.assert_allclose(both / forward, 3, rtol=0.01)


@pytest.mark.parametrize(
    ("parts", "giga"),
    [
        (["resnets"], 431.0),
        (["temporal convolutions"], 91.3),
        (["spatial projections"], 32.0),
        (["self-attention"], 102.2),
        (["cross-attention"], 36.4),
        (["spatial feed-forward"], 191.9),
        (["temporal projections"], 32.0),
        (["SETA"], 31.5 + 31.5 + 2.1),  # queries and output, keys and values, attention
        (["temporal attention"], 64.3 + 1.0),  # the last in the mid block, in SETA's place
        (["temporal feed-forward"], 191.9),
        (["resampling"], 92.0),
        (["input, output, time"], 0.26 - 0.02),  # StoryFlow is done once a story
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_published_unet_by_parts(parts, giga):
    counted = unet_flops(PUBLISHED)

    assert sum(counted[part] for part in parts) / 1e9 == pytest.approx(giga, abs=0.1)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["none", "conv2d"])
def test_the_published_unet_is_compiled_to_as_much_work(mode):
    # XLA passes over the padding of convolutions, and SETA's tiles compute masked scores as well.
    unet = dataclasses.replace(PUBLISHED.unet, first_frame_condition_mode=mode)
    config = dataclasses.replace(PUBLISHED, unet=unet)
    model, given = StoryModel(config), unet.is_continuation
    text = jax.eval_shape(model.text_keys_values, model.shapes, array(1, 5, 77, 1024))
    time = array(1, dtype=jnp.int32), array(1, 4)
    shifts = jax.eval_shape(model.time_shifts, model.shapes, *time)
    noisy, first = array(1, 5 - given, 32, 32, 4), array(1, 32, 32, 4) if given else None

    lowered = jax.jit(model.predict).lower(model.shapes, noisy, shifts, text, first)

    cost: Any = lowered.compile().cost_analysis()
    np.testing.assert_allclose(cost["flops"], unet_flops(config).total(), rtol=0.05)


def test_the_published_model():
    once = storyline_flops(PUBLISHED)

    assert unet_flops(PUBLISHED).total() / 1e9 == pytest.approx(1331.3, abs=0.05)
    assert once["contextualizer"] / 1e9 == pytest.approx(105.8, abs=0.05)
    assert once["text keys and values"] / 1e9 == pytest.approx(19.7, abs=0.05)
    assert text_tower_flops(PUBLISHED) / 1e9 == pytest.approx(45.1, abs=0.05)
    assert encoder_flops(PUBLISHED) / 1e9 == pytest.approx(272.7, abs=0.05)
    assert decoder_flops(PUBLISHED) / 1e9 == pytest.approx(622.2, abs=0.05)
    assert generation_flops(PUBLISHED, 50, 2).total() / 1e12 == pytest.approx(136.6, abs=0.05)


def test_a_training_step_of_the_published_model():
    online = TrainConfig(batch_size=6, accumulation_steps=2)
    cached = dataclasses.replace(online, data=DataConfig(latents="cache"))

    without, added = training_step_flops(cached), training_step_flops(online)
    added.subtract(without)

    assert without.total() / 1e12 == pytest.approx(26.2, abs=0.05)
    # 30 sentences, and the empty one in each micro-batch.
    encoders = 30 * encoder_flops(PUBLISHED) + 32 * text_tower_flops(PUBLISHED)
    assert added.total() == encoders
    # With the 35 sentences of the original, which encodes the empty one for each frame.
    original = without.total() + encoders + 3 * text_tower_flops(PUBLISHED)
    assert original / 1e12 == pytest.approx(36.0, abs=0.05)


def test_a_trained_text_tower_has_a_backward_pass():
    recipe = TrainConfig(model=small())
    both = dataclasses.replace(recipe, trainable=(r"unet\..*", r"text_encoder\..*layers\.0\..*"))

    frozen, trained = training_step_flops(recipe), training_step_flops(both)

    assert trained["text_encoder"] == 3 * frozen["text_encoder"] > 0
    assert trained["unet"] == frozen["unet"]


def test_continuation_adds_the_first_frame():
    # The self-attention of mid and up blocks sees as many keys again, their blocks' inputs are
    # written over by a 1x1 convolution of 4 channels, and one frame is encoded.
    continuation = dataclasses.replace(
        PUBLISHED, unet=UNetConfig(first_frame_condition_mode="conv2d")
    )
    levels = {32: 320, 16: 640, 8: 1280}
    keys = 4 * 5 * (3 * sum(side**4 * c for side, c in levels.items()) + 4**4 * 1280)
    down = 32**2 * 320 + 16**2 * 320 + 8**2 * 640 + 4**2 * 1280
    up = 4**2 * 1280 + 8**2 * 1280 + 16**2 * 1280 + 32**2 * 640
    convolutions = 2 * 4 * (down + 4**2 * 1280 + up)

    added = unet_flops(continuation).total() - unet_flops(PUBLISHED).total()

    assert added == keys + convolutions
    more = generation_flops(continuation, 1, 1).total() - generation_flops(PUBLISHED, 1, 1).total()
    assert more == added + encoder_flops(PUBLISHED)


def test_changes_move_the_count_as_by_hand():
    unet, base = PUBLISHED.unet, unet_flops(PUBLISHED)
    wide = unet_flops(dataclasses.replace(PUBLISHED, width=512))
    plain = unet_flops(
        dataclasses.replace(
            PUBLISHED, unet=dataclasses.replace(unet, augment_temporal_attention=False)
        )
    )
    deep = unet_flops(
        dataclasses.replace(
            PUBLISHED, unet=dataclasses.replace(unet, transformer_layers_per_block=2)
        )
    )

    for part in ("temporal convolutions", "SETA", "resampling", "cross-attention"):
        assert wide[part] == 2 * base[part]  # twice the pixels
    assert 2 * base["self-attention"] < wide["self-attention"] < 4 * base["self-attention"]
    # Without SETA a query sees its own position in 5 frames, not 37 keys, in 5 layers a level.
    levels = {32: 320, 16: 640, 8: 1280}
    fewer_keys = 5 * 4 * 5 * (37 - 5) * sum(side**2 * c for side, c in levels.items())
    assert base.total() - plain.total() == fewer_keys
    for part in base:
        # Projections stand around a transformer's blocks.
        twice = "attention" in part or "feed-forward" in part or part == "SETA"
        assert deep[part] == (2 if twice else 1) * base[part]


def test_peaks_of_devices():
    assert peak_flops("TPU v5 lite", "bfloat16") == peak_flops("TPU v5e", "bfloat16") == 197e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H200", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None
    # Every device needs over 100 operations a byte to be busy.
    assert all(100 < device.flops / device.bandwidth < 1000 for device in DEVICES.values())
