"""Frozen dataclasses of the model, the data and training, and the config files they come from.

May import `utils`. Start with `model_config.py`.
"""
