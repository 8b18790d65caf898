"""The checkpoint folder: its layout, and the numbered checkpoints in it.

May import `distributed` and `config`. Start with `layout.py`.
"""
