"""What every test shares: the CPU, no network, and compiled programs kept from run to run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from contextualstory_jax.config.model_config import ModelConfig
    from contextualstory_jax.config.train_config import TrainConfig

# Before any test module imports JAX. The number of devices is left alone: a test that needs
# several starts a process of its own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here and not in tests/parity: pytest knows an option only from the conftest files it reads
    # at start-up.
    parser.addoption(
        "--parity-dir",
        action="store",
        default=None,
        help="run every parity case in this folder instead of the project's own copies",
    )


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, so that the processes tests start use it too.
    cache = config.cache.mkdir("jax")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


# A model small enough to compile in seconds, with every module of the original in it. Imports are
# inside, because pytest reads this file before it sets run-time shape checks up.


@pytest.fixture(scope="session")
def tiny_model_config() -> ModelConfig:
    """A visualization model of 16 x 16 pictures that draws in 2 guided steps."""
    from contextualstory_jax.config.build import build
    from contextualstory_jax.config.model_config import ModelConfig

    values = {
        "height": 16,
        "width": 16,
        "vae": {"kind": "space_to_depth", "patch": 4},
        "scheduler": {
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
        "sampling": {"steps": 2, "guidance_scale": 2.0},
        "text_encoder": {
            "vocab_size": 400,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        },
        "unet": {
            "in_channels": 48,
            "out_channels": 48,
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
            "block_out_channels": [32],
            "layers_per_block": 1,
            "norm_num_groups": 8,  # of one channel each they would cancel the time embedding
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "n_temp_heads": 2,
            "num_layers_FStext": 1,
            "max_text_length": 16,
            # Untrained, these would have no say in the pictures.
            "zero_init_FSText": False,
            "zero_init_storyflow_adapter": False,
        },
    }
    return build(ModelConfig, values)


@pytest.fixture(scope="session")
def tiny_train_config(tiny_model_config: ModelConfig) -> TrainConfig:
    """Four steps on embedded stories, every second of which is saved."""
    from contextualstory_jax.config.train_config import OptimizerConfig, TrainConfig

    return TrainConfig(
        model=tiny_model_config,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine"),
        steps=4,
        batch_size=2,
        compute_dtype="float32",
        trainable=(r"unet\..*", r"text_encoder\..*"),
        log_every=1,
        checkpoint_every=2,
        sample_every=1000,
        sample_stories=1,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint folder of the tiny model, untrained."""
    return write_untrained(tiny_model_config, tmp_path_factory.mktemp("visualization"))


@pytest.fixture(scope="session")
def tiny_continuation_checkpoint(
    tiny_model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint folder of the tiny model for continuation, untrained."""
    unet = dataclasses.replace(tiny_model_config.unet, first_frame_condition_mode="conv2d")
    config = dataclasses.replace(tiny_model_config, unet=unet)
    return write_untrained(config, tmp_path_factory.mktemp("continuation"))


def write_untrained(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint folder of fresh weights at step 0."""
    from contextualstory_jax.checkpoints.layout import write_weights
    from contextualstory_jax.data.shapes import TOKENIZER_DIR
    from contextualstory_jax.models.story_model import StoryModel

    params = StoryModel(config).init(0)
    meta = {"step": 0, "storyflow": [5.0] * (config.unet.n_frames - 1)}
    write_weights(folder, config, TOKENIZER_DIR, {"ema_params": params}, meta)
    return folder
