"""The commands: arguments in, exit status out. `train`, `generate` and `evaluate` lie beside it.

May import every folder. Start with `../__main__.py`.
"""
