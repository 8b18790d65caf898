"""`configs/pororo_continuation.py` made tiny: every part is there, a step takes milliseconds."""

from ml_collections import ConfigDict

from configs.pororo_continuation import get_config as published

WIDTH = 32  # channels, and features of a token


def get_config() -> ConfigDict:
    """The recipe."""
    config = published()
    config.update(
        init_from=None, steps=20, batch_size=2, accumulation_steps=1, compute_dtype="float32"
    )
    config.update(log_every=1, checkpoint_every=5, sample_every=1000)
    config.model.update(height=16, width=16)
    config.model.vae = {"block_out_channels": (WIDTH, WIDTH), "layers_per_block": 1}
    config.model.sampling = {"steps": 2}
    config.model.text_encoder = {
        "vocab_size": 261,  # of the embedded stories' tokenizer
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    config.model.unet.update(
        block_out_channels=(WIDTH,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=(2,),
        n_temp_heads=2,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        num_layers_FStext=1,
        max_text_length=16,
    )
    return config
