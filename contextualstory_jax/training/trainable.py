"""Which parameters are trained, and which are frozen."""

from __future__ import annotations

import re

from contextualstory_jax.models.story_model import Parts
from contextualstory_jax.utils.errors import require


def split_trainable(params: Parts, patterns: tuple[str, ...]) -> tuple[Parts, Parts]:
    """Trained and frozen parameters, by regexes on `part.name`.

    A tensor that nothing computes with is no parameter of ours, so every trained one has a
    gradient. Raises `UserError` for a pattern that matches nothing.
    """
    paths = {f"{part}.{name}" for part, leaves in params.items() for name in leaves}
    for pattern in patterns:
        require(
            any(re.fullmatch(pattern, path) for path in paths),
            f"trainable: no parameter's path matches {pattern!r}; paths look like {min(paths)}",
        )

    def choose(trained: bool) -> Parts:
        return {
            part: {
                name: leaf
                for name, leaf in leaves.items()
                if any(re.fullmatch(p, f"{part}.{name}") for p in patterns) == trained
            }
            for part, leaves in params.items()
        }

    return choose(True), choose(False)


def merge_parts(first: Parts, second: Parts) -> Parts:
    """The union of trained and frozen parameters."""
    return {part: {**first[part], **second[part]} for part in first}
