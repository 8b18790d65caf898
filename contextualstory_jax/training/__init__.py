"""The training loop and step, its metrics, and the cache of encoded stories.

May import every folder but `commands`, `analysis` and `evaluation`. Start with `trainer.py`, then
`train_step.py`.
"""
