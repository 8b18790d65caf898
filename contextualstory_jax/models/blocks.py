"""The UNet's down, mid and up blocks.

A layer is a resnet, a temporal convolution, a spatial transformer and a temporal transformer.

In mode `conv2d` (continuation) every block begins by overwriting frame 0 of its input by a 1x1
convolution of the clean first frame. The original writes in place, so that where a block's input is
also a stored skip connection the skip changes too; `put_first_frame` is therefore a call of its own
and the UNet stores what it returns (`unet.py`).

In training a layer's parts may be rematerialised in the backward pass instead of being kept
(`Remat` in `config/model_config.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from contextualstory_jax.config.model_config import Remat, UNetConfig
from contextualstory_jax.models.attention import KeysValues
from contextualstory_jax.models.layers import conv1x1
from contextualstory_jax.models.spatial import (
    Downsample2D,
    ResnetBlock2D,
    SpatialTransformer,
    Upsample2D,
    per_branch,
)
from contextualstory_jax.models.temporal import TemporalResnetBlock, TemporalTransformer

# Of a block: what its layers receive besides the latents.
TextKeysValues = list[list[KeysValues]]  # [layer][block of the transformer]
TimeShifts = list[Float[Array, "#b f _"]]  # [layer]


def _is_product(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Whether an operation is a matrix product with weights, or a convolution."""
    of_weights = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive is jax.lax.conv_general_dilated_p or of_weights(
        primitive, *arguments, **parameters
    )


# What `jax.checkpoint` keeps; attention's scores are never kept.
REMAT_POLICIES: dict[Remat, Callable[..., bool]] = {
    "block": _is_product,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def resize_first_frame(
    frame: Float[Array, "b h0 w0 c"], height: int, width: int
) -> Float[Array, "b {height} {width} c"]:
    """The clean first frame at a block's size, by nearest neighbour.

    Parity: the original scales the width by the ratio of the heights.
    """
    whole_h, whole_w = frame.shape[1:3]
    if whole_h / height == whole_w / width == whole_h // height:
        return frame[:, :: whole_h // height, :: whole_w // width]
    rows = np.arange(height) * whole_h // height
    scaled = int(whole_w * (height / whole_h))
    if scaled == width:
        columns = np.arange(width) * whole_h // height
    elif scaled == 1:
        columns = np.zeros(width, int)  # written to every column
    else:  # Ours: the original fails here.
        columns = np.arange(width) * whole_w // width
    return frame[:, rows[:, None], columns]


class Block(nnx.Module):
    """Base of the three kinds of block: their layers and how one layer runs."""

    def __init__(
        self,
        config: UNetConfig,
        remat: Remat,
        *,
        channels_in: int,
        resnets: list[tuple[int, int]],
        heads: int | None,
        temporal_heads: int,
        seta: bool,
        rotary: bool,
    ):
        """Declare the layers.

        Args:
            resnets: Channels in and out of each.
            heads: Spatial attention heads; None for no attention of either kind.
        """
        self.remat: Remat = remat
        channels = resnets[-1][1]
        time_dim = 4 * config.block_out_channels[0]
        mode = config.first_frame_condition_mode
        self.first_frame_conv = (
            conv1x1(config.in_channels, channels_in) if mode == "conv2d" else None
        )
        self.resnets = nnx.List(ResnetBlock2D(config, i, o, time_dim) for i, o in resnets)
        self.conv3ds = nnx.List(
            TemporalResnetBlock(channels) for _ in resnets if config.use_temporal.temporal_conv
        )
        layers = self.num_attentions(len(resnets)) if heads else 0
        self.attentions = nnx.List(
            SpatialTransformer(config, channels, heads or 0) for _ in range(layers)
        )
        self.tempo_attns = nnx.List(
            TemporalTransformer(config, channels, temporal_heads, seta=seta, rotary=rotary)
            for _ in range(layers if config.use_temporal.temporal_attn else 0)
        )

    @staticmethod
    def num_attentions(resnets: int) -> int:
        """Number of attention layers beside `resnets` resnets."""
        return resnets

    def text_keys_values(self, text: Float[Array, "b f l d"]) -> TextKeysValues:
        """Cross-attention keys and values of every layer."""
        return [attention.text_keys_values(text) for attention in self.attentions]

    def time_shifts(self, temb: Float[Array, "b f t"]) -> TimeShifts:
        """Shift that the time embedding adds in each resnet."""
        return [resnet.time_shift(temb) for resnet in self.resnets]

    def put_first_frame(
        self, x: Float[Array, "bn f h w c"], first_frame: Float[Array, "b h0 w0 i"] | None
    ) -> Float[Array, "bn f h w c"]:
        """Overwrite frame 0 by the clean first frame, brought to size by nearest neighbour."""
        if self.first_frame_conv is None or first_frame is None:
            return x
        frame = self.first_frame_conv(resize_first_frame(first_frame, *x.shape[2:4]))
        return jnp.concatenate([per_branch(frame, x)[:, None], x[:, 1:]], axis=1)

    def convolve(
        self, i: int, x: Float[Array, "b f h w i"], shifts: TimeShifts
    ) -> Float[Array, "b f h w c"]:
        """Resnet and temporal convolution of layer i."""

        def layer(x: Array, shift: Array) -> Array:
            x = self.resnets[i](x, shift)
            return self.conv3ds[i](x) if self.conv3ds else x

        return self._recomputed(layer)(x, shifts[i])

    def attend(
        self, i: int, x: Float[Array, "b f h w c"], text: TextKeysValues, see_first_frame: bool
    ) -> Float[Array, "bn f h w c"]:
        """Spatial and temporal transformer of layer i, where there are any."""
        if self.attentions:
            x = self._recomputed(lambda x: self.attentions[i](x, text[i], see_first_frame))(x)
        return self._recomputed(lambda x: self.tempo_attns[i](x))(x) if self.tempo_attns else x

    def _recomputed(self, layer: Callable[..., Array]) -> Callable[..., Array]:
        """The layer, rematerialised in the backward pass as `remat` says."""
        if self.remat == "none":
            return layer
        return jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat])


class DownBlock(Block):
    """Layers, then half the size but for the last level.

    Reference: videoldm_unet_blocks.py VideoLDMCrossAttnDownBlock, VideoLDMDownBlock.
    """

    def __init__(self, config: UNetConfig, level: int, remat: Remat):
        channels = config.block_out_channels
        channels_in, channels_out = channels[max(level - 1, 0)], channels[level]
        has_attention = config.down_block_types[level] == "CrossAttnDownBlock2D"
        super().__init__(
            config,
            remat,
            channels_in=channels_in,
            resnets=[
                (channels_in if i == 0 else channels_out, channels_out)
                for i in range(config.layers_per_block)
            ],
            heads=config.num_attention_heads[level] if has_attention else None,
            temporal_heads=config.n_temp_heads,
            seta=config.augment_temporal_attention,
            rotary=config.temp_pos_embedding == "rotary",
        )
        last = level == len(channels) - 1
        self.downsamplers = nnx.List([] if last else [Downsample2D(channels_out)])
        self.see_first_frame = config.first_frame_condition_mode == "concat"

    def __call__(
        self,
        x: Float[Array, "b f h w i"],
        shifts: TimeShifts,
        text: TextKeysValues,
    ) -> tuple[Array, list[Array]]:
        """Return the output and the skip connections, in the order they were made."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.attend(i, self.convolve(i, x, shifts), text, self.see_first_frame)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Resnet, temporal convolution, then transformers, resnet, temporal convolution.

    Parity: built without rotary positions and without SETA, its temporal attention has the spatial
    number of heads.

    Reference: videoldm_unet_blocks.py VideoLDMUNetMidBlock2DCrossAttn.
    """

    def __init__(self, config: UNetConfig, remat: Remat):
        channels, heads = config.block_out_channels[-1], config.num_attention_heads[-1]
        super().__init__(
            config,
            remat,
            channels_in=channels,
            resnets=[(channels, channels)] * 2,
            heads=heads,
            temporal_heads=heads,
            seta=False,
            rotary=False,
        )
        self.see_first_frame = config.first_frame_condition_mode in ("conv2d", "concat")

    @staticmethod
    def num_attentions(resnets: int) -> int:
        return resnets - 1

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        shifts: TimeShifts,
        text: TextKeysValues,
    ) -> Float[Array, "bn f h w c"]:
        x = self.attend(0, self.convolve(0, x, shifts), text, self.see_first_frame)
        return self.convolve(1, x, shifts)


class UpBlock(Block):
    """One layer more than a down block, then twice the size but for the last.

    Reference: videoldm_unet_blocks.py VideoLDMCrossAttnUpBlock, VideoLDMUpBlock.
    """

    def __init__(self, config: UNetConfig, index: int, remat: Remat):
        channels = config.block_out_channels[::-1]
        previous, out, skip = (
            channels[max(index - 1, 0)],
            channels[index],
            channels[min(index + 1, len(channels) - 1)],
        )
        layers = config.layers_per_block + 1
        has_attention = config.up_block_types[index] == "CrossAttnUpBlock2D"
        super().__init__(
            config,
            remat,
            channels_in=previous,
            resnets=[
                ((previous if i == 0 else out) + (skip if i == layers - 1 else out), out)
                for i in range(layers)
            ],
            heads=config.num_attention_heads[::-1][index] if has_attention else None,
            temporal_heads=config.n_temp_heads,
            seta=config.augment_temporal_attention,
            rotary=config.temp_pos_embedding == "rotary",
        )
        last = index == len(channels) - 1
        self.upsamplers = nnx.List([] if last else [Upsample2D(out)])
        self.see_first_frame = config.first_frame_condition_mode in ("conv2d", "concat")

    def __call__(
        self,
        x: Float[Array, "b f h w i"],
        skips: list[Array],
        shifts: TimeShifts,
        text: TextKeysValues,
    ) -> Array:
        """Consume skip connections from the end of `skips`."""
        for i in range(len(self.resnets)):
            x = jnp.concatenate([x, per_branch(skips.pop(), x)], axis=-1)
            x = self.attend(i, self.convolve(i, x, shifts), text, self.see_first_frame)
        for upsample in self.upsamplers:
            x = upsample(x, *skips[-1].shape[2:4])
        return x
