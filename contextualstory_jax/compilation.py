"""The user's cache folder, and the compiled programs in it."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def user_cache() -> Path:
    """The package's folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contextualstory_jax"


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a second start need not compile.

    A folder that JAX_COMPILATION_CACHE_DIR or `jax.config` names is left as it is set up.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Seconds to compile, for each tensor of the UNet: between those of the small model on two CPU cores
# and those of the published one for an H100.
TRAINING_SECONDS, GENERATION_SECONDS = 0.1, 0.03


def compiling(program: str, tensors: int, seconds_per_tensor: float) -> str:
    """The line to print before a program is compiled, with a rough estimate of the time.

    Args:
        tensors: number of tensors of the UNet, which the time grows with.
    """
    seconds = tensors * seconds_per_tensor
    time = f"{max(round(seconds, -1), 10):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f"compiling the {program} (about {time}, cached for the next time)"
