"""Programs compiled for devices that are absent: memory, traffic, collectives.

May import every folder but `commands` and `evaluation`. Start with `ahead_of_time.py`.
"""
