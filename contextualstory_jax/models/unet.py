"""The spatio-temporal UNet of ContextualStory.

Terms that do not depend on the noisy latents have methods of their own and are passed in: once per
story `contextualize` (attention between sentences), `text_keys_values` (every cross-attention's
keys and values) and `storyflow` (the embedding of scene changes); for all steps together
`time_shifts` (the conditioning of every resnet on the step). `__call__` predicts the noise of one
step from them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from contextualstory_jax.config.model_config import Remat, UNetConfig
from contextualstory_jax.models.blocks import (
    DownBlock,
    MidBlock,
    TextKeysValues,
    TimeShifts,
    UpBlock,
)
from contextualstory_jax.models.embeddings import TimestepEmbedding, sinusoidal_embedding
from contextualstory_jax.models.layers import conv3x3, group_norm
from contextualstory_jax.models.storyflow import StoryFlowAdapter
from contextualstory_jax.models.storyline import StorylineContextualizer


class UNet(nnx.Module):
    """Predict the noise (or what `prediction_type` says) of a story's frames at one step.

    Reference: videoldm_unet.py VideoLDMUNet3DConditionModel; paper section "Method".
    """

    def __init__(self, config: UNetConfig, remat: Remat = "none"):
        self.config = config
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        time_dim = 4 * channels[0]
        self.conv_in = conv3x3(config.in_channels, channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        self.frame_stride_embedding = (
            TimestepEmbedding(channels[0], time_dim, zero=True)
            if config.use_frame_stride_condition
            else None
        )
        self.msim_embedding = (
            StoryFlowAdapter(channels[0], time_dim, zero=config.zero_init_storyflow_adapter)
            if config.use_motion_condition
            else None
        )
        self.text_adapter = (
            StorylineContextualizer(config) if config.use_text_cross_attention == "FSText" else None
        )
        self.down_blocks = nnx.List(DownBlock(config, level, remat) for level in range(levels))
        self.mid_block = MidBlock(config, remat)
        self.up_blocks = nnx.List(UpBlock(config, index, remat) for index in range(levels))
        self.conv_norm_out = group_norm(channels[0], config.norm_num_groups, config.norm_eps)
        self.conv_out = conv3x3(channels[0], config.out_channels)

    def contextualize(self, text: Float[Array, "b f l d"]) -> Float[Array, "b f l d"]:
        """The Storyline Contextualizer, where the config has one; null text bypasses it."""
        return text if self.text_adapter is None else self.text_adapter(text)

    def text_keys_values(self, storyline: Float[Array, "b f l d"]) -> list[TextKeysValues]:
        """Every cross-attention's keys and values, by block; sentence i conditions frame i."""
        return [block.text_keys_values(storyline) for block in self._blocks]

    def storyflow(self, motion: Float[Array, "b m"]) -> Float[Array, "b f c"] | None:
        """Embed scene changes, `frames - 1` values or one a frame; None without an adapter."""
        return (
            None
            if self.msim_embedding is None
            else self.msim_embedding(motion, self.config.n_frames)
        )

    def time_proj(self, x: Float[Array, "*b"] | Int[Array, "*b"]) -> Float[Array, "*b c"]:
        """Sinusoidal embedding of diffusion steps and frame strides."""
        return sinusoidal_embedding(
            x,
            self.config.block_out_channels[0],
            cos_first=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        ).astype(self.conv_in.kernel[...].dtype)

    def embed_time(
        self,
        timesteps: Num[Array, " b"],
        storyflow: Float[Array, "#b f c"] | None,
        frame_stride: Int[Array, " b"] | Int[Array, "b f"] | None = None,
    ) -> Float[Array, "b f c"]:
        """Embedding of diffusion step, scene change and frame stride that every resnet receives."""
        temb = self.time_embedding(self.time_proj(timesteps))[:, None]
        if self.frame_stride_embedding is not None:
            if frame_stride is None:
                raise ValueError("this model has use_frame_stride_condition: give frame_stride")
            if frame_stride.ndim == 1:  # one for all frames of a story
                frame_stride = frame_stride[:, None]
            temb = temb + self.frame_stride_embedding(self.time_proj(frame_stride))
        if self.msim_embedding is not None:
            if storyflow is None:
                raise ValueError(
                    "this model has use_motion_condition: give the StoryFlow embedding"
                )
            temb = temb + storyflow
        return jnp.broadcast_to(temb, (temb.shape[0], self.config.n_frames, temb.shape[-1]))

    def time_shifts(
        self,
        timesteps: Num[Array, " b"],
        storyflow: Float[Array, "#b f c"] | None = None,
        frame_stride: Int[Array, " b"] | Int[Array, "b f"] | None = None,
    ) -> list[TimeShifts]:
        """Shifts that `embed_time`'s embedding adds in every resnet, by block."""
        temb = self.embed_time(timesteps, storyflow, frame_stride)
        return [block.time_shifts(temb) for block in self._blocks]

    @property
    def _blocks(self) -> list[DownBlock | MidBlock | UpBlock]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def __call__(
        self,
        sample: Float[Array, "b g h w i"],
        shifts: list[TimeShifts],
        text: list[TextKeysValues],
        first_frame: Float[Array, "b h w i"] | None = None,
    ) -> Float[Array, "bn g h w i"]:
        """One step's prediction for the `g` frames of `sample`: in continuation, all but the first.

        Args:
            sample: Noisy latents.
            shifts: From `time_shifts`, each of batch 1 or b.
            text: From `text_keys_values`. It may hold several branches of guidance for each story,
                one after the other: then so does the prediction.
            first_frame: The clean first frame's latents in continuation.

        Raises:
            ValueError: The config and the inputs disagree.
        """
        if (first_frame is not None) != self.config.is_continuation:
            raise ValueError(
                f"first_frame_condition_mode is {self.config.first_frame_condition_mode!r}"
            )
        if first_frame is not None:
            sample = jnp.concatenate([first_frame[:, None], sample], axis=1)
        conditions = zip(shifts, text, strict=True)  # of the blocks, in their order
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            # Parity: the first frame is written through a view, into the stored skip as well.
            skips[-1] = x = block.put_first_frame(x, first_frame)
            x, block_skips = block(x, *next(conditions))
            skips += block_skips
        skips[-1] = x = self.mid_block.put_first_frame(x, first_frame)
        x = self.mid_block(x, *next(conditions))
        for block in self.up_blocks:
            x = block(block.put_first_frame(x, first_frame), skips, *next(conditions))
        x = self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        return x[:, 1:] if first_frame is not None else x
