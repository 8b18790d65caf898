"""Data and training configs, beside that of the model. See `config/model_config.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from contextualstory_jax.config.build import check_pattern, check_range
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.config.model_config import PARTS, ModelConfig, Remat
from contextualstory_jax.utils.errors import require

SHIPPED = Path(__file__).parents[1] / "sampling" / "shipped"  # the model that ships


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training and test stories."""

    name: Literal["shapes", "pororo", "flintstones", "folder"] = "shapes"
    seed: int = 0  # of the synthetic dataset; of the choice where a frame has several images
    root: str | None = None  # of all but shapes: the folder as published, or as prepared
    split_policy: Literal["published", "strict"] = "published"
    captions: Literal["blip2", "original"] = "blip2"  # of pororo alone
    test_fraction: float = 0.05  # of a folder's stories, held out for testing if none names a split
    workers: int = 0  # processes that read; 0: a thread of the one that trains
    latents: str | None = None  # a latent cache of the training split, read in place of images

    def __post_init__(self) -> None:
        check_range(self, "data.", ("workers",), 0)
        check_range(self, "data.", ("test_fraction",), 0, 1)
        require(
            self.name != "shapes" or self.root is None,
            f"data.root = {self.root!r} is for stories on disk; data.name = 'shapes' is rendered",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as the original uses it."""

    learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 0.5
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        require(
            self.learning_rate > 0,
            f"optimizer.learning_rate must be positive; got {self.learning_rate}",
        )
        require(
            self.max_grad_norm > 0,
            f"optimizer.max_grad_norm must be positive; got {self.max_grad_norm}",
        )
        check_range(self, "optimizer.", ("warmup_steps", "eps", "weight_decay"), 0)
        check_range(self, "optimizer.", ("beta1", "beta2", "ema_decay"), 0, 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A config: the model, its data, and how it is trained."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str | None = None  # a converted or trained checkpoint folder; None: fresh weights
    init_parts: tuple[str, ...] = PARTS  # taken from it if it holds them; the others are fresh
    seed: int = 42
    steps: int = 40_000
    max_minutes: float | None = None  # of training; stops earlier, with a checkpoint
    batch_size: int = 12  # stories a step, over all devices and accumulation steps
    accumulation_steps: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Remat = "none"
    trainable: tuple[str, ...] = (r"unet\..*",)  # regexes on `part.path`; the rest is frozen
    text_drop: float = 0.1
    first_frame_drop: float = 0.1
    keep_frames_probability: float = 0.0  # of a story having some of its frames given clean
    snr_gamma: float | None = 5.0
    kl_weight: float = 1e-6  # of the VAE's own training
    log_every: int = 10  # steps
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2  # the newest
    keep_every: int | None = None  # steps; checkpoints at multiples stay
    keep_best: int = 0  # those with the least validation loss stay; 0: no such loss is computed
    sample_every: int = 1000  # steps between images from the EMA weights
    sample_stories: int = 2
    profile_at: int | None = None  # the step from which a profile is written
    profile_steps: int = 3
    wandb_project: str | None = None  # metrics go there too; needs the extra [wandb]

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation_steps", "log_every", "checkpoint_every")
        counts += ("keep_checkpoints", "sample_every", "sample_stories", "profile_steps")
        check_range(self, "", counts, 1)
        check_range(self, "", ("keep_best",), 0)
        for name in ("keep_every", "profile_at"):
            if getattr(self, name) is not None:
                check_range(self, "", (name,), 1)
        for pattern in self.trainable:
            check_pattern("trainable", pattern)
        require(
            {*self.init_parts} <= {*PARTS},
            f"init_parts must be some of {', '.join(PARTS)}; got {self.init_parts}",
        )
        check_range(self, "", ("text_drop", "first_frame_drop", "keep_frames_probability"), 0, 1)
        require(
            self.keep_frames_probability == 0 or self.model.kept_frames == "clean",
            f"keep_frames_probability = {self.keep_frames_probability} trains a model that sees "
            "kept frames clean; set model.kept_frames = 'clean' too",
        )
        check_range(self, "", ("kl_weight",), 0)
        require(
            self.max_minutes is None or self.max_minutes > 0,
            f"max_minutes must be positive; got {self.max_minutes}",
        )
        require(
            self.batch_size % self.accumulation_steps == 0,
            f"batch_size = {self.batch_size} is not divisible by "
            f"accumulation_steps = {self.accumulation_steps}",
        )
        require(
            self.snr_gamma is None or self.snr_gamma > 0,
            f"snr_gamma must be positive; got {self.snr_gamma}",
        )
