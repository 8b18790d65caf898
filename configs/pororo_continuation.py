r"""The published recipe on PororoSV for continuation: one image and five sentences in.

    contextualstory-jax train --config pororo_continuation \
        --config.data.root=DIR --workdir run

Source: the original's `configs/continuation/training_contextualstory_sc_pororo.yaml`, which is the
visualization config (see there for the rest) except for the first frame.
"""

from ml_collections import ConfigDict

from configs.pororo_visualization import get_config as visualization


def get_config() -> ConfigDict:
    """Build the config."""
    config = visualization()
    config.model = {"unet": {"first_frame_condition_mode": "conv2d"}}
    return config
