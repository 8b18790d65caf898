"""`configs/shapes.py` made tiny: a step takes milliseconds, in tests that start processes."""

from ml_collections import ConfigDict

from configs.shapes import get_config as shapes_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = shapes_config()
    config.update(steps=150, batch_size=2, log_every=1, checkpoint_every=10, sample_every=1000)
    config.update(init_from=None, keep_frames_probability=0.0)
    config.model.update(height=16, width=16, kept_frames=None)
    config.model.vae = ConfigDict({"kind": "space_to_depth", "patch": 4})
    config.model.sampling.steps = 2
    config.model.unet.update(
        sample_size=4,
        in_channels=48,
        out_channels=48,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(2,),
        norm_num_groups=8,  # of one channel each they would cancel the time embedding
    )
    return config
