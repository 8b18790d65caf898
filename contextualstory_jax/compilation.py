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
