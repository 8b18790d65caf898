r"""The published recipe on FlintstonesSV for continuation: one image and five sentences in.

    contextualstory-jax train --config flintstones_continuation \
        --config.data.root=DIR --workdir run

Source: the original's `configs/continuation/training_contextualstory_sc_flintstones.yaml`, which is
the visualization config (see there for the rest) except for the first frame.
"""

from ml_collections import ConfigDict

from configs.flintstones_visualization import get_config as visualization


def get_config() -> ConfigDict:
    """Build the config."""
    config = visualization()
    config.model = {"unet": {"first_frame_condition_mode": "conv2d"}}
    return config
