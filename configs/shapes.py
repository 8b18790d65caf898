"""Synthetic dataset: the complete method at a size that a laptop trains, nothing to download.

    contextualstory-jax train --config shapes --workdir runs/shapes

All three of the paper's modules are on: SETA, Storyline Contextualizer and StoryFlow Adapter. The
VAE is that of the model that ships; `configs/shapes_vae.py` trains it.
"""

from ml_collections import ConfigDict

from contextualstory_jax.config.train_config import SHIPPED


def get_config() -> ConfigDict:
    """Build the config."""
    size, factor, channels, text_width = 64, 8, 32, 64
    return ConfigDict(
        {
            "seed": 0,
            "steps": 6000,
            "batch_size": 16,  # stories
            "compute_dtype": "float32",
            "init_from": str(SHIPPED),
            "init_parts": ("vae",),
            "trainable": (r"unet\..*", r"text_encoder\..*"),  # the text encoder is trained too
            "snr_gamma": None,
            "keep_frames_probability": 0.3,  # stories of which some frames are given clean
            "log_every": 20,  # steps
            "checkpoint_every": 250,  # steps
            "sample_every": 500,  # steps
            "optimizer": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "max_grad_norm": 1.0,
                "ema_decay": 0.995,
            },
            "data": {"name": "shapes", "seed": 0},
            "model": {
                "height": size,
                "width": size,
                "kept_frames": "clean",
                "vae": {
                    "kind": "kl",
                    "latent_channels": channels,
                    "block_out_channels": (16, 32, 64, 64),
                    "layers_per_block": 1,
                    "norm_num_groups": 8,
                    "sample_size": size,
                },
                # Much noise: who is there is decided where an image is nearly nothing but noise.
                "scheduler": {
                    "prediction_type": "sample",
                    "beta_start": 1e-4,
                    "beta_end": 0.02,
                    "beta_schedule": "linear",
                    "rescale_betas_zero_snr": True,
                    "timestep_spacing": "trailing",
                },
                "sampling": {"steps": 20, "guidance_scale": 1.5},
                "text_encoder": {
                    "vocab_size": 261,
                    "hidden_size": text_width,
                    "intermediate_size": 2 * text_width,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 16,  # the longest sentence has 15 tokens
                },
                "unet": {
                    "sample_size": size // factor,
                    "in_channels": channels,
                    "out_channels": channels,
                    "block_out_channels": (64, 96),
                    "layers_per_block": 1,
                    # 32 groups of two channels would normalise most of the conditioning away.
                    "norm_num_groups": 8,
                    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                    "attention_head_dim": (2, 4),  # the number of heads
                    "n_temp_heads": 4,
                    "cross_attention_dim": text_width,
                    "num_layers_FStext": 1,
                    "max_text_length": 16,
                },
            },
        }
    )
