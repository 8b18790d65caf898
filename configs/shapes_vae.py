"""VAE of the synthetic dataset: 64 x 64 frames to 8 x 8 latents of 32 channels, and back.

    contextualstory-jax train-vae --config shapes_vae --workdir runs/vae

Any config of the same `model.vae` then trains on its latents, with `--config.init_from=runs/vae`.
"""

from ml_collections import ConfigDict

from configs.shapes import get_config as shapes


def get_config() -> ConfigDict:
    """Build the config."""
    size, factor, channels = 64, 8, 32
    config = shapes()
    config.update(
        {
            "steps": 6000,
            "batch_size": 2,  # stories, ten frames
            "checkpoint_every": 250,  # steps
            "optimizer": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 100,
                "max_grad_norm": 1.0,
                "ema_decay": 0.999,
            },
        }
    )
    model = config.model
    model.height = model.width = size
    model.unet.sample_size = size // factor
    model.unet.in_channels = model.unet.out_channels = channels
    model.vae = ConfigDict(
        {
            "kind": "kl",
            "latent_channels": channels,
            "block_out_channels": (16, 32, 64, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": size,
        }
    )
    return config
