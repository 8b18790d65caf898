"""Mappings to config dataclasses, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest

from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import (
    AutoencoderKLConfig,
    ModelConfig,
    NoiseConfig,
    SamplingConfig,
    SchedulerConfig,
    SpaceToDepthConfig,
    TextEncoderConfig,
    UNetConfig,
)
from contextualstory_jax.config.train_config import OptimizerConfig, TrainConfig
from contextualstory_jax.utils.errors import UserError


def test_nothing_said_gives_the_defaults():
    assert build(TrainConfig, {}) == TrainConfig()


def test_nested_mappings_become_nested_configs():
    config = build(TrainConfig, {"model": {"unet": {"use_temporal": {"temporal_conv": False}}}})

    assert config.model.unet.use_temporal.temporal_conv is False
    assert config.model.unet.use_temporal.temporal_attn is True


def test_lists_become_tuples_and_whole_numbers_floats():
    config = build(UNetConfig, {"block_out_channels": [320, 640, 1280, 1280], "norm_eps": 1})

    assert config == UNetConfig(norm_eps=1.0)
    assert isinstance(config.block_out_channels, tuple)
    assert isinstance(config.norm_eps, float)


def test_a_config_survives_the_way_through_a_mapping():
    config = TrainConfig(model=ModelConfig(unet=UNetConfig(attention_head_dim=(5, 10, 20, 40))))

    assert build(TrainConfig, dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("vae", "expected"),
    [
        ({"kind": "space_to_depth", "patch": 2}, SpaceToDepthConfig(patch=2)),
        ({"kind": "kl", "layers_per_block": 1}, AutoencoderKLConfig(layers_per_block=1)),
        ({"layers_per_block": 1}, AutoencoderKLConfig(layers_per_block=1)),
    ],
)
def test_kind_chooses_among_configs(vae, expected):
    channels = expected.latent_channels
    unet = {"in_channels": channels, "out_channels": channels}

    assert build(ModelConfig, {"vae": vae, "unet": unet}).vae == expected


def test_none_is_a_value_where_a_union_has_it():
    config = build(TrainConfig, {"snr_gamma": None, "max_minutes": 5})

    assert config.snr_gamma is None
    assert config.max_minutes == 5.0


def test_one_number_of_heads_serves_every_level():
    assert build(UNetConfig, {"attention_head_dim": 5}).num_attention_heads == (5, 5, 5, 5)
    assert build(UNetConfig, {}).num_attention_heads == (5, 10, 20, 20)


def test_sizes_follow_from_the_codec_and_the_levels():
    config = ModelConfig()

    assert config.vae.factor == 8
    assert config.latent_size(256, 520) == (32, 65)
    assert (SpaceToDepthConfig(patch=4).latent_channels, SpaceToDepthConfig().factor) == (48, 4)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("none", False), ("conv2d", True), ("concat", True), ("input_only", True)],
)
def test_every_first_frame_mode_but_none_is_continuation(mode, expected):
    assert UNetConfig(first_frame_condition_mode=mode).is_continuation is expected


# Refused while reading: values, then the message's beginning.
UNREADABLE = [
    ({"stepz": 1}, "unknown config key stepz; known: accumulation_steps, batch_size, "),
    ({"model": {"unet": {"heads": 1}}}, "unknown config key model.unet.heads; known: FStext_"),
    ({"model": {"unet": {"use_temporal": {"x": 1}}}}, "unknown config key model.unet.use_temporal"),
    ({"steps": "10"}, "steps must be int; got '10'"),
    ({"steps": 1.5}, "steps must be int; got 1.5"),
    ({"steps": True}, "steps must be int; got True"),
    ({"text_drop": "none"}, "text_drop must be float; got 'none'"),
    ({"text_drop": True}, "text_drop must be float; got True"),
    ({"text_drop": None}, "text_drop must be float; got None"),
    ({"snr_gamma": "5"}, "snr_gamma must be float | None; got '5'"),
    ({"trainable": ".*"}, "trainable must be tuple"),
    ({"trainable": [".*", 1]}, "trainable[1] must be str; got 1"),
    ({"compute_dtype": "float16"}, "compute_dtype must be 'float32' or 'bfloat16'; got 'float16'"),
    ({"model": {"vae": {"kind": "vq"}}}, "model.vae.kind must be one of kl, space_to_depth; got"),
    ({"model": {"vae": {"kind": "kl", "patch": 4}}}, "unknown config key model.vae.patch; known: "),
    ({"steps": {"x": 1}}, "steps must not be a mapping; got {'x': 1}"),
    ({"model": 3}, "model must be ModelConfig; got 3"),
    (
        {"model": {"unet": {"down_block_types": ["DownBlock3D"]}}},
        "model.unet.down_block_types[0] must be 'CrossAttnDownBlock2D' or 'DownBlock2D'; got",
    ),
    (
        {"model": {"unet": {"first_frame_condition_mode": "conv3d"}}},
        "model.unet.first_frame_condition_mode must be 'none' or 'conv2d' or 'concat' or ",
    ),
]


@pytest.mark.parametrize(("values", "message"), UNREADABLE)
def test_an_unknown_key_or_a_value_of_another_type_is_named(values, message):
    with pytest.raises(UserError) as refusal:
        build(TrainConfig, values)

    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


# Refused by the config itself: its class, the values, the message.
UNFIT = [
    (
        UNetConfig,
        {"block_out_channels": [320, 640]},
        "unet: block_out_channels, down_block_types and up_block_types must have one entry a "
        "level; got 2, 4, 4",
    ),
    (
        UNetConfig,
        {"attention_head_dim": [5, 10]},
        "unet.attention_head_dim must be one number or one a level (4); got (5, 10)",
    ),
    (UNetConfig, {"n_frames": 1}, "unet.n_frames must be at least 2; got 1"),
    (UNetConfig, {"layers_per_block": 0}, "unet.layers_per_block must be at least 1; got 0"),
    (
        UNetConfig,
        {"transformer_layers_per_block": 0},
        "unet.transformer_layers_per_block must be at least 1; got 0",
    ),
    (UNetConfig, {"n_temp_heads": 0}, "unet.n_temp_heads must be at least 1; got 0"),
    (UNetConfig, {"norm_num_groups": 0}, "unet.norm_num_groups must be at least 1; got 0"),
    (
        UNetConfig,
        {"norm_num_groups": 64, "block_out_channels": [128, 320, 640, 640]},
        "unet.block_out_channels: 128 is not divisible by attention_head_dim (the number of "
        "heads) = 5",
    ),
    (
        UNetConfig,
        {"norm_num_groups": 48},
        "unet.block_out_channels: 320 is not divisible by norm_num_groups = 48",
    ),
    (
        UNetConfig,
        {"attention_head_dim": 0},
        "unet.block_out_channels: 320 is not divisible by attention_head_dim (the number of "
        "heads) = 0",
    ),
    (
        UNetConfig,
        {"n_temp_heads": 3},
        "unet.block_out_channels: 320 is not divisible by n_temp_heads = 3",
    ),
    (
        UNetConfig,
        {"block_out_channels": [40, 80, 160, 160], "norm_num_groups": 8},
        "unet.block_out_channels: 40 is not divisible by 32 (the groups of a temporal convolution)",
    ),
    (
        UNetConfig,
        {"FStext_layer_causal": [True]},
        "unet.FStext_layer_temporal and unet.FStext_layer_causal must have FStext_layer_depth = 2 "
        "entries",
    ),
    (
        UNetConfig,
        {"cross_attention_dim": 1000},
        "unet.cross_attention_dim must be a multiple of 16 (8 heads of rotated pairs) for the "
        "Storyline Contextualizer; got 1000",
    ),
    (SpaceToDepthConfig, {"patch": 0}, "vae.patch must be at least 1; got 0"),
    (
        TextEncoderConfig,
        {"num_attention_heads": 3},
        "text_encoder.hidden_size = 1024 is not divisible by num_attention_heads = 3",
    ),
    (
        SchedulerConfig,
        {"beta_start": 0.5, "beta_end": 0.25},
        "scheduler: need 0 < beta_start <= beta_end < 1; got 0.5 and 0.25",
    ),
    (
        SchedulerConfig,
        {"rescale_betas_zero_snr": True},
        "scheduler.rescale_betas_zero_snr needs prediction_type v_prediction or sample: at zero "
        "SNR the noise says nothing about the image",
    ),
    (SamplingConfig, {"steps": 0}, "sampling: steps must be at least 1; got 0"),
    (
        SamplingConfig,
        {"guidance_scale": float("inf")},
        "sampling: guidance_scale must be finite, at least 0; got inf",
    ),
    (
        SamplingConfig,
        {"image_guidance_scale": float("nan")},
        "sampling: image_guidance_scale must be finite, at least 0; got nan",
    ),
    (
        SamplingConfig,
        {"guidance_rescale": 1.5},
        "sampling: guidance_rescale must be in [0, 1]; got 1.5",
    ),
    (SamplingConfig, {"eta": -0.5}, "sampling: eta must be in [0, 1]; got -0.5"),
    (
        ModelConfig,
        {"vae": {"kind": "space_to_depth", "patch": 2}},
        "unet.in_channels = 4 and unet.out_channels = 4 must both be the VAE's latent channels = "
        "12",
    ),
    (
        ModelConfig,
        {"text_encoder": {"hidden_size": 768}},
        "unet.cross_attention_dim = 1024 must be text_encoder.hidden_size = 768",
    ),
    (
        ModelConfig,
        {"unet": {"max_text_length": 32}},
        "unet.max_text_length = 32 is under text_encoder.max_position_embeddings = 77",
    ),
    (
        ModelConfig,
        {"height": 250},
        "height and width must be positive multiples of 8 for this model; got 250 x 256",
    ),
    *(
        (TrainConfig, {name: 0}, f"{name} must be at least 1; got 0")
        for name in (
            "steps",
            "batch_size",
            "accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "sample_every",
            "sample_stories",
        )
    ),
    (
        TrainConfig,
        {"batch_size": 12, "accumulation_steps": 5},
        "batch_size = 12 is not divisible by accumulation_steps = 5",
    ),
    (TrainConfig, {"text_drop": 1.5}, "text_drop must be in [0, 1]; got 1.5"),
    (TrainConfig, {"first_frame_drop": -1}, "first_frame_drop must be in [0, 1]; got -1.0"),
    (TrainConfig, {"snr_gamma": 0}, "snr_gamma must be positive; got 0.0"),
    (TrainConfig, {"max_minutes": 0}, "max_minutes must be positive; got 0.0"),
    (OptimizerConfig, {"max_grad_norm": 0}, "optimizer.max_grad_norm must be positive; got 0.0"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps must be at least 0; got -1"),
    (OptimizerConfig, {"beta2": 1.5}, "optimizer.beta2 must be in [0, 1]; got 1.5"),
    (
        OptimizerConfig,
        {"ema_decay": math.nan},
        "optimizer.ema_decay must be finite, in [0, 1]; got nan",
    ),
    (NoiseConfig, {"alpha": -1}, "noise.alpha must be at least 0; got -1.0"),
    (
        SchedulerConfig,
        {"num_train_timesteps": 1},
        "scheduler.num_train_timesteps must be at least 2; got 1",
    ),
    (TextEncoderConfig, {"vocab_size": 0}, "text_encoder.vocab_size must be at least 1; got 0"),
    (
        AutoencoderKLConfig,
        {"block_out_channels": (48, 64)},
        "vae.block_out_channels must be multiples of norm_num_groups = 32; got (48, 64)",
    ),
    (
        AutoencoderKLConfig,
        {"in_channels": 1},
        "vae.in_channels and vae.out_channels must be 3, the colours; got 1 and 3",
    ),
    (
        TrainConfig,
        {"optimizer": {"learning_rate": 0}},
        "optimizer.learning_rate must be positive; got 0.0",
    ),
]


@pytest.mark.parametrize(("cls", "values", "message"), UNFIT)
def test_values_that_do_not_fit_are_refused(cls, values, message):
    with pytest.raises(UserError) as refusal:
        build(cls, values)

    assert str(refusal.value) == message


def test_a_model_without_contextualizer_may_have_any_text_width():
    config = UNetConfig(use_text_cross_attention="", cross_attention_dim=1000)

    assert config.cross_attention_dim == 1000


def test_a_model_without_temporal_convolutions_may_have_channels_of_other_groups():
    values = {
        "block_out_channels": [40, 80, 160, 160],
        "norm_num_groups": 8,
        "use_temporal": {"temporal_conv": False},
    }

    assert build(UNetConfig, values).use_temporal.temporal_conv is False
