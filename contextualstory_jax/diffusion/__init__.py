"""Noise schedules, losses, guidance and solvers: pure functions.

May import `config`. Start with `denoising.py`.
"""
