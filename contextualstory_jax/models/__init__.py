"""The networks: UNet, VAE, CLIP text encoder; the only folder that uses Flax.

May import `config`. Start with `story_model.py`, then `unet.py`.
"""
