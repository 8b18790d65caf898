"""Solvers, one function a module; `samplers.py` has their names. Start with `sampler.py`."""
