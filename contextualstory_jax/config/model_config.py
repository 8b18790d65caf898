"""Model and sampling configs: frozen dataclasses, built once from plain mappings.

A config (`configs/NAME.py`) returns an `ml_collections.ConfigDict`; a checkpoint folder holds the
same values in `model.json`. Both cross into code through `build`, which refuses unknown keys and
values by name. After that every default lives here or in `config/train_config.py`, and every
deviation in the config file.

Field names of `UNetConfig`, `AutoencoderKLConfig`, `TextEncoderConfig` and `SchedulerConfig` are
those of the original's `config.json` files, so that a released folder's values can be read as they
are.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from contextualstory_jax.config.build import check_range
from contextualstory_jax.utils.errors import require

FirstFrameMode = Literal["none", "conv2d", "concat", "input_only"]


@dataclasses.dataclass(frozen=True)
class UseTemporal:
    """Switches for the temporal layers inside the UNet's blocks."""

    temporal_attn: bool = True
    temporal_conv: bool = True


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The spatio-temporal UNet. Defaults are the released visualization models'.

    Source: reference `videoldm_unet.py` VideoLDMUNet3DConditionModel.__init__.
    """

    sample_size: int = 64  # latent height and width the model was made for; other sizes work
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1024
    transformer_layers_per_block: int = 1
    attention_head_dim: int | tuple[int, ...] = (5, 10, 20, 20)  # the NUMBER of heads, as in SD-2.1
    use_linear_projection: bool = True
    use_temporal: UseTemporal = UseTemporal()
    n_frames: int = 5
    n_temp_heads: int = 8
    first_frame_condition_mode: FirstFrameMode = "none"
    augment_temporal_attention: bool = True  # SETA
    temp_pos_embedding: Literal["rotary", "sinusoidal"] = "rotary"
    use_frame_stride_condition: bool = False
    use_motion_condition: bool = True  # StoryFlow Adapter
    use_text_cross_attention: Literal["FSText", ""] = "FSText"  # Storyline Contextualizer, or none
    num_layers_FStext: int = 4
    FStext_layer_depth: int = 2
    FStext_layer_temporal: tuple[bool, ...] = (False, True)
    FStext_layer_causal: tuple[bool, ...] = (False, False)
    zero_init_storyflow_adapter: bool = True
    zero_init_FSText: bool = True
    max_text_length: int = 1024  # rows of the contextualizer's position table

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        require(
            len(self.down_block_types) == levels == len(self.up_block_types),
            "unet: block_out_channels, down_block_types and up_block_types must have one entry a "
            f"level; got {levels}, {len(self.down_block_types)}, {len(self.up_block_types)}",
        )
        require(
            len(self.num_attention_heads) == levels,
            f"unet.attention_head_dim must be one number or one a level ({levels}); "
            f"got {self.attention_head_dim}",
        )
        check_range(self, "unet.", ("n_frames",), 2)
        counts = ("layers_per_block", "transformer_layers_per_block", "n_temp_heads")
        counts += ("num_layers_FStext", "FStext_layer_depth", "norm_num_groups")
        check_range(self, "unet.", counts, 1)
        temporal_groups = 32 if self.use_temporal.temporal_conv else 1
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads, strict=True):
            for what, divisor in (
                (f"norm_num_groups = {self.norm_num_groups}", self.norm_num_groups),
                (f"attention_head_dim (the number of heads) = {heads}", heads),
                (f"n_temp_heads = {self.n_temp_heads}", self.n_temp_heads),
                # Whatever norm_num_groups says.
                ("32 (the groups of a temporal convolution)", temporal_groups),
            ):
                require(
                    divisor >= 1 and channels % divisor == 0,
                    f"unet.block_out_channels: {channels} is not divisible by {what}",
                )
        if self.use_text_cross_attention == "FSText":
            require(
                len(self.FStext_layer_temporal)
                == len(self.FStext_layer_causal)
                == self.FStext_layer_depth,
                "unet.FStext_layer_temporal and unet.FStext_layer_causal must have "
                f"FStext_layer_depth = {self.FStext_layer_depth} entries",
            )
            require(
                self.cross_attention_dim % 16 == 0,
                "unet.cross_attention_dim must be a multiple of 16 (8 heads of rotated pairs) for "
                f"the Storyline Contextualizer; got {self.cross_attention_dim}",
            )

    @property
    def num_attention_heads(self) -> tuple[int, ...]:
        """Spatial attention heads, one number a level."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

    @property
    def is_continuation(self) -> bool:
        """Whether the first frame is given."""
        return self.first_frame_condition_mode != "none"


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Stable Diffusion's KL autoencoder. Source: diffusers AutoencoderKL."""

    kind: Literal["kl"] = "kl"
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512

    def __post_init__(self) -> None:
        counts = ("latent_channels", "layers_per_block", "norm_num_groups")
        check_range(self, "vae.", counts, 1)
        require(
            len(self.block_out_channels) > 0
            and all(c > 0 and c % self.norm_num_groups == 0 for c in self.block_out_channels),
            "vae.block_out_channels must be multiples of norm_num_groups = "
            f"{self.norm_num_groups}; got {self.block_out_channels}",
        )
        require(
            self.in_channels == self.out_channels == 3,
            f"vae.in_channels and vae.out_channels must be 3, the colours; "
            f"got {self.in_channels} and {self.out_channels}",
        )

    @property
    def factor(self) -> int:
        """Pixels to a latent position, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class SpaceToDepthConfig:
    """Image codec without parameters: a patch of pixels is the channels of one latent."""

    kind: Literal["space_to_depth"] = "space_to_depth"
    patch: int = 4
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "vae.", ("patch",), 1)

    @property
    def latent_channels(self) -> int:
        """Three colours of every pixel in a patch."""
        return 3 * self.patch**2

    @property
    def factor(self) -> int:
        """Pixels to a latent position, along each side."""
        return self.patch


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """CLIP's text encoder. Defaults are SD-2.1's. Source: transformers CLIPTextModel."""

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    hidden_act: Literal["gelu", "quick_gelu"] = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        counts = ("vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_range(self, "text_encoder.", (*counts, "max_position_embeddings"), 1)
        require(
            self.hidden_size > 0 and self.hidden_size % self.num_attention_heads == 0,
            f"text_encoder.hidden_size = {self.hidden_size} is not divisible by "
            f"num_attention_heads = {self.num_attention_heads}",
        )


@dataclasses.dataclass(frozen=True)
class VisionEncoderConfig:
    """CLIP's vision encoder. Defaults are ViT-B/32's. Source: transformers CLIPVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP's two encoders, and the features they share. Source: transformers CLIPConfig."""

    text_config: TextEncoderConfig
    vision_config: VisionEncoderConfig
    projection_dim: int = 512


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule and how sampling steps through it. Defaults are the released models'.

    Every solver (`SamplingConfig.scheduler`) reads it as diffusers' `from_config` would, but for
    zero terminal SNR, which all solvers here support. `clip_sample` is of ddim alone,
    `set_alpha_to_one` of ddim and pndm. Source: diffusers DDIMScheduler and PNDMScheduler; the
    reference's `noise_scheduler_kwargs`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    steps_offset: int = 1
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    rescale_betas_zero_snr: bool = False
    skip_prk_steps: bool = False  # whether pndm begins without Runge-Kutta steps

    def __post_init__(self) -> None:
        check_range(self, "scheduler.", ("num_train_timesteps",), 2)
        check_range(self, "scheduler.", ("steps_offset", "clip_sample_range"), 0)
        require(
            0 < self.beta_start <= self.beta_end < 1,
            "scheduler: need 0 < beta_start <= beta_end < 1; "
            f"got {self.beta_start} and {self.beta_end}",
        )
        require(
            not (self.rescale_betas_zero_snr and self.prediction_type == "epsilon"),
            "scheduler.rescale_betas_zero_snr needs prediction_type v_prediction or sample: "
            "at zero SNR the noise says nothing about the image",
        )


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Correlation of the noise of a story's frames (PYoCo). Source: reference train.py."""

    kind: Literal["vanilla", "pyoco_mixed", "pyoco_progressive"] = "pyoco_mixed"
    alpha: float = 1.5

    def __post_init__(self) -> None:
        check_range(self, "noise.", ("alpha",), 0)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Sampling defaults. Source: reference `sampling_kwargs`."""

    scheduler: Literal["ddim", "euler", "euler_ancestral", "dpmpp_2m", "pndm", "lms", "unipc"] = (
        "ddim"
    )
    steps: int = 50
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    eta: float = 0.0  # of ddim alone

    def __post_init__(self) -> None:
        known = typing.get_args(typing.get_type_hints(SamplingConfig)["scheduler"])
        require(
            self.scheduler in known,
            f"sampling: scheduler must be one of {', '.join(known)}; got {self.scheduler!r}",
        )
        check_range(self, "sampling: ", ("steps",), 1)
        check_range(self, "sampling: ", ("guidance_scale", "image_guidance_scale"), 0)
        check_range(self, "sampling: ", ("guidance_rescale", "eta"), 0, 1)
        require(
            self.eta == 0 or self.scheduler == "ddim",
            f"sampling: eta = {self.eta} is for scheduler ddim, not {self.scheduler}; leave it 0",
        )


PARTS = ("unet", "vae", "text_encoder")  # of a model

# Rematerialised in the backward pass, layer by layer, instead of kept: nothing; all but the outputs
# of matrix products; all but the layers' inputs.
Remat = Literal["none", "block", "full"]

CameraMotion = Literal["pan_left", "pan_right", "zoom_in", "zoom_out"]


@dataclasses.dataclass(frozen=True)
class FrameInitConfig:
    """FrameInit: the initial noise takes low frequencies from the first frame.

    Source: reference `frameinit_kwargs`.
    """

    method: Literal["gaussian", "butterworth", "ideal", "box"] = "gaussian"
    level: int = 850  # the timestep to whose noise level the first frame is brought
    spatial: float = 0.25  # stop frequencies, as shares of the highest
    temporal: float = 0.25
    order: int = 4  # of butterworth alone: how steep

    def __post_init__(self) -> None:
        check_range(self, "frameinit: ", ("level",), 0)
        check_range(self, "frameinit: ", ("spatial", "temporal"), 0, 1)
        check_range(self, "frameinit: ", ("order",), 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to interpret a set of weights."""

    unet: UNetConfig = UNetConfig()
    vae: AutoencoderKLConfig | SpaceToDepthConfig = AutoencoderKLConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    noise: NoiseConfig = NoiseConfig()
    height: int = 256  # pixels of the training images, and of generated ones by default
    width: int = 256
    sampling: SamplingConfig = SamplingConfig()
    # How the network sees frames that sampling keeps: clean, if it was trained so
    # (`keep_frames_probability`); by default at their timestep's noise level, like all others.
    kept_frames: Literal["clean"] | None = None

    def __post_init__(self) -> None:
        require(
            self.unet.in_channels == self.unet.out_channels == self.vae.latent_channels,
            f"unet.in_channels = {self.unet.in_channels} and "
            f"unet.out_channels = {self.unet.out_channels} must both be the VAE's "
            f"latent channels = {self.vae.latent_channels}",
        )
        require(
            self.unet.cross_attention_dim == self.text_encoder.hidden_size,
            f"unet.cross_attention_dim = {self.unet.cross_attention_dim} must be "
            f"text_encoder.hidden_size = {self.text_encoder.hidden_size}",
        )
        require(
            self.unet.use_text_cross_attention != "FSText"
            or self.unet.max_text_length >= self.text_encoder.max_position_embeddings,
            f"unet.max_text_length = {self.unet.max_text_length} is under "
            f"text_encoder.max_position_embeddings = {self.text_encoder.max_position_embeddings}",
        )
        self.latent_size(self.height, self.width)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent height and width of images of `height` x `width` pixels.

        Raises `UserError` if the size does not divide.
        """
        multiple = self.vae.factor
        require(
            height > 0 and width > 0 and height % multiple == 0 and width % multiple == 0,
            f"height and width must be positive multiples of {multiple} for this model; "
            f"got {height} x {width}",
        )
        return height // self.vae.factor, width // self.vae.factor
