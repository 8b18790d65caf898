"""Inputs that are unusual, damaged or hostile, in tables: each has its outcome, and none hangs.

`python -m pytest tests/hostile` counts them: image files through every door (`image_cases.py`),
published folders (`dataset_cases.py`), prepared shards, and texts.
"""
