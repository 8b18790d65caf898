r"""The published recipe on PororoSV for continuation: a first picture and five sentences in.

    contextualstory-jax train --config pororo_continuation \
        --config.data.root=DIR --workdir run

Source: the original's `configs/continuation/training_contextualstory_sc_pororo.yaml`, which is the
visualization recipe (see there for the rest) but for the first frame.
"""

from ml_collections import ConfigDict

from configs.pororo_visualization import get_config as visualization


def get_config() -> ConfigDict:
    """The recipe."""
    config = visualization()
    config.model = {"unet": {"first_frame_condition_mode": "conv2d"}}
    return config
