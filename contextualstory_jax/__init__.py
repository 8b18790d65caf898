"""ContextualStory in JAX and Flax NNX: from five sentences, five images that belong together."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from contextualstory_jax.utils import interruption

if TYPE_CHECKING:
    from contextualstory_jax.sampling.pipeline import StoryPipeline
    from contextualstory_jax.sampling.prompts import Kept, Story
    from contextualstory_jax.train import train_and_evaluate
    from contextualstory_jax.utils.errors import UserError

__version__ = "0.1.0"
__all__ = ["Kept", "Story", "StoryPipeline", "UserError", "train_and_evaluate"]

_HOMES = {
    "Kept": "sampling.prompts",
    "Story": "sampling.prompts",
    "StoryPipeline": "sampling.pipeline",
    "UserError": "utils.errors",
    "train_and_evaluate": "train",
}

# Where a command of ours starts: what it imports at its top takes half a second.
if sys.argv[:1] == ["-m"] and any(word.split(".")[0] == __name__ for word in sys.orig_argv):
    interruption.end_at_once()


def __getattr__(name: str) -> Any:
    # Importing JAX takes seconds, and --help of a command, which comes by here, must not wait.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
