"""Inputs and comparisons that tests, the parity report and the benchmarks share.

May import every folder but `commands`, `analysis`, `training` and `evaluation`.
"""
