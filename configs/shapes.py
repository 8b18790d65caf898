"""Synthetic dataset: the complete method at a size that a laptop trains, nothing to download.

    contextualstory-jax train --config shapes --workdir runs/shapes

All three of the paper's modules are on: SETA, Storyline Contextualizer and StoryFlow Adapter.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Build the config."""
    size, patch, text_width = 32, 8, 64
    return ConfigDict(
        {
            "seed": 0,
            "steps": 4000,
            "batch_size": 16,  # stories
            "compute_dtype": "float32",
            "trainable": (r"unet\..*", r"text_encoder\..*"),  # the text encoder is trained too
            "snr_gamma": None,
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
                # 4 x 4 latent positions of 192 channels.
                "vae": {"kind": "space_to_depth", "patch": patch},
                "scheduler": {
                    "prediction_type": "sample",
                    "beta_schedule": "scaled_linear",
                    "rescale_betas_zero_snr": True,
                    "timestep_spacing": "trailing",
                },
                "sampling": {"steps": 20, "guidance_scale": 1.5},
                "text_encoder": {
                    "vocab_size": 239,
                    "hidden_size": text_width,
                    "intermediate_size": 2 * text_width,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 16,  # the longest sentence has 14 tokens
                },
                "unet": {
                    "sample_size": size // patch,
                    "in_channels": 3 * patch**2,
                    "out_channels": 3 * patch**2,
                    "block_out_channels": (64, 96),
                    "layers_per_block": 1,
                    # 32 groups of two channels would normalise most of the conditioning away.
                    "norm_num_groups": 8,
                    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                    "attention_head_dim": (2, 4),  # the number of heads
                    "n_temp_heads": 4,
                    "cross_attention_dim": text_width,
                    "num_layers_FStext": 1,
                    "max_text_length": 16,
                },
            },
        }
    )
