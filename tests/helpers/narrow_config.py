"""Overrides that make a published config narrow: 8 channels a head and few layers.

Its lengths stay: 32 x 32 latent pixels, sentences of 77 tokens and five of them.
"""

NARROW = [
    "batch_size=2",
    "accumulation_steps=1",
    "model.height=32",  # of latents too: the codec has one level
    "model.width=32",
    "model.vae.block_out_channels=(160,)",  # its attention is too wide for cuDNN, as published
    "model.vae.layers_per_block=1",
    "model.text_encoder.hidden_size=64",
    "model.text_encoder.intermediate_size=64",
    "model.text_encoder.num_hidden_layers=1",
    "model.text_encoder.num_attention_heads=1",
    "model.unet.cross_attention_dim=64",
    "model.unet.n_temp_heads=4",
    "model.unet.block_out_channels=(32,)",
    "model.unet.attention_head_dim=(4,)",
    "model.unet.down_block_types=('CrossAttnDownBlock2D',)",
    "model.unet.up_block_types=('CrossAttnUpBlock2D',)",
    "model.unet.layers_per_block=1",
    "model.unet.num_layers_FStext=1",
]
# As many layers with long attention as are published.
DEEP = [
    "model.unet.block_out_channels=(32, 32, 32)",
    "model.unet.attention_head_dim=(4, 4, 4)",
    "model.unet.down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D')",
    "model.unet.up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D')",
    "model.unet.layers_per_block=2",
    "model.unet.num_layers_FStext=4",
]
