"""The persistent compilation cache, and log lines before each compilation."""

from __future__ import annotations

import logging
from collections.abc import Hashable

import jax

from contextualstory_jax.distributed.multihost import is_first
from contextualstory_jax.utils.files import user_cache

logger = logging.getLogger(__name__)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a second start need not compile.

    A folder that JAX_COMPILATION_CACHE_DIR or `jax.config` names is left as it is set up.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
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


class GenerationLog:
    """Log lines, at INFO, of a pipeline: its model and devices, and each compilation ahead of it.

    Args:
        model: a description of the model and its weights.
        tensors: number of tensors of the UNet, which the time to compile grows with.
    """

    def __init__(self, model: str, tensors: int):
        self._model, self._tensors = model, tensors
        self._compiled: set[Hashable] = set()

    def before(self, program: Hashable) -> None:
        """Log a batch's program, unless one of the same key was logged before."""
        if not is_first() or program in self._compiled:
            return
        if not self._compiled:
            devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
            logger.info("generating on %s with %s", devices, self._model)
        self._compiled.add(program)
        logger.info(compiling("generation program", self._tensors, GENERATION_SECONDS))
