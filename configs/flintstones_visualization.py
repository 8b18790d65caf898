r"""The published recipe on FlintstonesSV: five sentences in, five images out.

    contextualstory-jax train --config flintstones_visualization \
        --config.data.root=DIR --workdir run

Source: the original's `configs/visualization/training_contextualstory_sv_flintstones.yaml`, which
is the PororoSV config (see there for the rest) with twice the steps without accumulation.
"""

from ml_collections import ConfigDict

from configs.pororo_visualization import get_config as pororo


def get_config() -> ConfigDict:
    """Build the config."""
    config = pororo()
    config.data.name = "flintstones"
    config.steps = 80_000
    config.batch_size = 6  # stories, one device's: train_batch_size
    config.accumulation_steps = 1
    return config
