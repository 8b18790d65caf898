"""Datasets, read as published or prepared, and batches of them; the synthetic stories.

May import `config`. Start with `loader.py`.
"""
