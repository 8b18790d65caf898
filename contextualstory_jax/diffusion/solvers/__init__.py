"""Solvers, one function a module; `denoising.py` has their names. Start with `sampler.py`."""
