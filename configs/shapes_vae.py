"""VAE of the synthetic dataset: 64 x 64 frames to 8 x 8 latents of 32 channels, and back.

    contextualstory-jax train-vae --config shapes_vae --workdir runs/vae

Any config of the same `model.vae` then trains on its latents, with `--config.init_from=runs/vae`.
"""

from ml_collections import ConfigDict

from configs.shapes import get_config as shapes


def get_config() -> ConfigDict:
    """Build the config."""
    config = shapes()
    config.update(
        {
            "init_from": None,
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
    return config
