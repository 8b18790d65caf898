"""Subcommands of `contextualstory-jax`; `train`, `generate` and `evaluate` lie above this folder.

May import every folder. Start with `../__main__.py`.
"""
