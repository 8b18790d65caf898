"""Floating-point operations of a model of any size, and peak rates of devices.

A multiply-add is two operations; norms, softmax, activations and residuals are none. Counted is the
work that the method needs, however it is computed, so that a share of a device's peak means the
same for every implementation:

- SETA projects keys and values once per pixel, and a query sees `9 f - 8` keys, though the tiles
  compute masked ones as well;
- a temporal convolution over f frames has `3 f - 2` taps, none on the padding at the ends; the 3x3
  convolutions of images count all nine at the borders;
- work that does not depend on the denoising step counts once per story: contextualizer, keys and
  values of the text, StoryFlow; work on weights alone (projected frame positions) does not count.

A `Counter` maps parts to operations, and its `total()` is their sum. Sizes are the config's own:
`dataclasses.replace(config, height=..., width=...)` counts another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from contextualstory_jax.config.model_config import ModelConfig, SpaceToDepthConfig, UNetConfig
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.models.story_model import StoryModel


class Device(NamedTuple):
    """Peak rates of a device."""

    flops: float  # operations a second, dense bfloat16
    hbm_bytes: float
    bandwidth: float  # of its memory, bytes a second


GIB = 2**30
# By JAX's `device_kind`; of a TPU v4 and v5p both cores are one device. Source: Google's pages
# "TPU v4" to "TPU v6e", NVIDIA's data sheets (SXM modules, without sparsity).
DEVICES = {
    "TPU v4": Device(275e12, 32 * GIB, 1.2e12),
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), Device(197e12, 16 * GIB, 0.82e12)),
    **dict.fromkeys(("TPU v5", "TPU v5p"), Device(459e12, 95 * GIB, 2.77e12)),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), Device(918e12, 32 * GIB, 1.64e12)),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40e9, 1.56e12),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80e9, 2.04e12),
    "NVIDIA H100 80GB HBM3": Device(989e12, 80e9, 3.35e12),
    "NVIDIA H200": Device(989e12, 141e9, 4.8e12),
}


def peak_flops(device_kind: str, compute_dtype: str) -> float | None:
    """Peak operations a second, or None where there is no one number to compare with.

    That is for an unknown device, and for float32, which JAX multiplies in as many bfloat16 or TF32
    passes as its precision says.
    """
    device = DEVICES.get(device_kind)
    return device.flops if device and compute_dtype == "bfloat16" else None


class Layer(NamedTuple):
    """A resnet of the UNet and what follows it."""

    block: Literal["down", "mid", "up"]
    level: int  # 0 is the largest
    channels_in: int
    channels: int
    attention: bool  # whether a spatial and a temporal transformer do


def layers(unet: UNetConfig) -> Iterator[Layer]:
    """Every layer in the order of the forward pass, as `models/blocks.py` builds them."""
    channels = unet.block_out_channels
    levels = range(len(channels))
    x, skips = channels[0], [channels[0]]
    for level, kind in zip(levels, unet.down_block_types, strict=True):
        for _ in range(unet.layers_per_block):
            yield Layer("down", level, x, channels[level], kind == "CrossAttnDownBlock2D")
            x = channels[level]
            skips.append(x)
        if level < levels[-1]:
            skips.append(x)  # downsampled
    yield Layer("mid", levels[-1], x, x, True)
    yield Layer("mid", levels[-1], x, x, False)
    for level, kind in zip(reversed(levels), unet.up_block_types, strict=True):
        for _ in range(unet.layers_per_block + 1):
            x += skips.pop()
            yield Layer("up", level, x, channels[level], kind == "CrossAttnUpBlock2D")
            x = channels[level]


def dense(positions: int, channels_in: int, channels: int, taps: int = 1) -> int:
    """A linear map at every position, or a convolution of `taps` taps."""
    return 2 * positions * channels_in * channels * taps


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum of all heads, each query seeing `keys` keys."""
    return 4 * queries * keys * width


def feed_forward(tokens: int, width: int) -> int:
    """GEGLU of four times the width."""
    return dense(tokens, width, 8 * width) + dense(tokens, 4 * width, width)


def resnet(pixels: int, channels_in: int, channels: int) -> int:
    """Two 3x3 convolutions and, where the width changes, a 1x1 one around them."""
    shortcut = dense(pixels, channels_in, channels) if channels_in != channels else 0
    return dense(pixels, channels_in, channels, 9) + dense(pixels, channels, channels, 9) + shortcut


def time_mlp(vectors: int, unet: UNetConfig) -> int:
    """The two linear maps over sinusoidal embeddings of steps, frame strides or scene changes."""
    width = unet.block_out_channels[0]
    return dense(vectors, width, 4 * width) + dense(vectors, 4 * width, 4 * width)


def unet_flops(config: ModelConfig) -> Counter[str]:
    """One prediction of the UNet for one story, given what `storyline_flops` counts."""
    unet, frames, channels = config.unet, config.unet.n_frames, config.unet.block_out_channels
    height, width = config.latent_size(config.height, config.width)
    # Of a frame, at each level: a side is halved rounding up.
    pixels = [(-(-height >> level)) * (-(-width >> level)) for level in range(len(channels))]
    parts: Counter[str] = Counter()
    parts["input, output, time"] = (
        dense(frames * pixels[0], unet.in_channels, channels[0], 9)
        + dense(frames * pixels[0], channels[0], unet.out_channels, 9)
        + time_mlp(1 + unet.use_frame_stride_condition, unet)
    )
    for level in range(len(channels) - 1):
        c, c_below = channels[level : level + 2]
        parts["resampling"] += dense(frames * pixels[level + 1], c, c, 9)
        parts["resampling"] += dense(frames * pixels[level], c_below, c_below, 9)
    if unet.first_frame_condition_mode == "conv2d":  # written into the input of each block
        parts["first frame"] = dense(pixels[-1], unet.in_channels, channels[-1])  # of the mid block
        down, up = (channels[0], *channels[:-1]), (*channels[1:], channels[-1])
        for p, c_down, c_up in zip(pixels, down, up, strict=True):
            parts["first frame"] += dense(p, unet.in_channels, c_down + c_up)
    for layer in layers(unet):
        c, frame = layer.channels, pixels[layer.level]
        parts["resnets"] += resnet(frames * frame, layer.channels_in, c)
        parts["resnets"] += dense(frames, 4 * channels[0], c)  # of the time embedding
        if unet.use_temporal.temporal_conv:
            parts["temporal convolutions"] += 2 * dense(frame, c, c, 3 * frames - 2)
        if layer.attention:
            parts.update(_transformers(config, layer, frame))
    return parts


def _transformers(config: ModelConfig, layer: Layer, frame: int) -> Counter[str]:
    """The spatial and the temporal transformer of a layer, over frames of `frame` pixels."""
    unet, frames, c = config.unet, config.unet.n_frames, layer.channels
    blocks, tokens = unet.transformer_layers_per_block, frames * frame
    projections = 4 * dense(tokens, c, c)  # queries, keys, values, output
    # In continuation each frame sees the first one's tokens as well.
    twice = {"conv2d": ("mid", "up"), "concat": ("down", "mid", "up")}
    keys = frame * (2 if layer.block in twice.get(unet.first_frame_condition_mode, ()) else 1)
    words = config.text_encoder.max_position_embeddings
    parts = Counter(
        {
            "spatial projections": 2 * dense(tokens, c, c),
            "self-attention": blocks * (projections + attention(tokens, keys, c)),
            "cross-attention": blocks * (2 * dense(tokens, c, c) + attention(tokens, words, c)),
            "spatial feed-forward": blocks * feed_forward(tokens, c),
        }
    )
    if unet.use_temporal.temporal_attn:
        over_frames = blocks * (projections + attention(tokens, frames, c))
        parts["temporal projections"] = 2 * dense(tokens, c, c)
        if unet.augment_temporal_attention and layer.block != "mid":
            parts["SETA"] = blocks * (projections + attention(tokens, 9 * frames - 8, c))
            parts["temporal attention"] = over_frames
        else:
            parts["temporal attention"] = 2 * over_frames
        parts["temporal feed-forward"] = blocks * feed_forward(tokens, c)
    return parts


def storyline_flops(config: ModelConfig) -> Counter[str]:
    """UNet work done once for a story, from the text encoder's output on."""
    unet, frames = config.unet, config.unet.n_frames
    tokens, width = frames * config.text_encoder.max_position_embeddings, unet.cross_attention_dim
    parts: Counter[str] = Counter()
    if unet.use_text_cross_attention == "FSText":
        parts["contextualizer"] = unet.num_layers_FStext * sum(
            4 * dense(tokens, width, width)
            + attention(tokens, frames if temporal else tokens, width)
            + feed_forward(tokens, width)
            for temporal in unet.FStext_layer_temporal
        )
    parts["text keys and values"] = unet.transformer_layers_per_block * sum(
        2 * dense(tokens, width, layer.channels) for layer in layers(unet) if layer.attention
    )
    if unet.use_motion_condition:
        parts["StoryFlow"] = time_mlp(frames, unet)
    return parts


def text_tower_flops(config: ModelConfig) -> int:
    """The text encoder on one sentence, padding included."""
    tower, tokens = config.text_encoder, config.text_encoder.max_position_embeddings
    width, inner = tower.hidden_size, tower.intermediate_size
    return tower.num_hidden_layers * (
        4 * dense(tokens, width, width)
        + attention(tokens, tokens, width)
        + 2 * dense(tokens, width, inner)
    )


def _codec_mid(pixels: int, channels: int) -> int:
    projections = 4 * dense(pixels, channels, channels)
    return (
        2 * resnet(pixels, channels, channels) + projections + attention(pixels, pixels, channels)
    )


def encoder_flops(config: ModelConfig) -> int:
    """The VAE's encoder on one frame."""
    vae = config.vae
    if isinstance(vae, SpaceToDepthConfig):
        return 0
    pixels, x = config.height * config.width, vae.block_out_channels[0]
    total = dense(pixels, vae.in_channels, x, 9)
    for level, c in enumerate(vae.block_out_channels):
        if level > 0:
            pixels //= 4
            total += dense(pixels, x, x, 9)
        total += resnet(pixels, x, c) + (vae.layers_per_block - 1) * resnet(pixels, c, c)
        x = c
    moments = 2 * vae.latent_channels
    total += _codec_mid(pixels, x)
    return total + dense(pixels, x, moments, 9) + dense(pixels, moments, moments)


def decoder_flops(config: ModelConfig) -> int:
    """The VAE's decoder on one frame."""
    vae = config.vae
    if isinstance(vae, SpaceToDepthConfig):
        return 0
    height, width = config.latent_size(config.height, config.width)
    pixels, x, latent = height * width, vae.block_out_channels[-1], vae.latent_channels
    total = dense(pixels, latent, latent) + dense(pixels, latent, x, 9) + _codec_mid(pixels, x)
    for level, c in enumerate(reversed(vae.block_out_channels)):
        if level > 0:
            pixels *= 4
            total += dense(pixels, x, x, 9)
        total += resnet(pixels, x, c) + vae.layers_per_block * resnet(pixels, c, c)
        x = c
    return total + dense(pixels, x, vae.out_channels, 9)


def training_step_flops(config: TrainConfig) -> Counter[str]:
    """One optimizer step on all devices together, by network.

    A backward pass is twice the forward one. The UNet has one, whichever of its parameters are
    trained; VAE and text encoder where any of theirs are. Rematerialised work
    does not count; with a latent cache neither VAE nor text encoder runs.
    """
    model, stories = config.model, config.batch_size
    frames = model.unet.n_frames
    once = unet_flops(model).total() + storyline_flops(model).total()
    forward = Counter({"unet": stories * once})
    if config.data.latents is None:
        forward["vae"] = stories * frames * encoder_flops(model)
        # Each micro-batch encodes the empty sentence again.
        sentences = stories * frames + config.accumulation_steps
        forward["text_encoder"] = sentences * text_tower_flops(model)
    shapes = StoryModel(model).shapes

    def passes(part: str) -> int:
        paths = [f"{part}.{name}" for name in shapes[part]]
        trained = any(re.fullmatch(pattern, path) for pattern in config.trainable for path in paths)
        return 3 if trained or part == "unet" else 1

    return Counter({part: passes(part) * flops for part, flops in forward.items()})


def vae_step_flops(config: TrainConfig) -> int:
    """One optimizer step of the VAE alone, on all devices together."""
    frames = config.batch_size * config.model.unet.n_frames
    return 3 * frames * (encoder_flops(config.model) + decoder_flops(config.model))


def generation_flops(config: ModelConfig, steps: int, branches: int) -> Counter[str]:
    """One story from its sentences to its images.

    The null text is not counted: it is the same for all stories.

    Args:
        config: The model.
        steps: Predictions that the solver asks for.
        branches: Predictions that guidance joins (`num_branches`).
    """
    frames = config.unet.n_frames
    return Counter(
        {
            "text encoder": frames * text_tower_flops(config),
            **storyline_flops(config),
            "UNet": steps * branches * unet_flops(config).total(),
            "encoder": encoder_flops(config) if config.unet.is_continuation else 0,
            "decoder": frames * decoder_flops(config),
        }
    )
