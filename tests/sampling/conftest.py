"""Pipelines of the tiny models, whose compiled programs all tests here share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from contextualstory_jax import StoryPipeline


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> StoryPipeline:
    from contextualstory_jax import StoryPipeline

    return StoryPipeline.load(tiny_checkpoint)


@pytest.fixture(scope="session")
def continuation(tiny_continuation_checkpoint: Path) -> StoryPipeline:
    from contextualstory_jax import StoryPipeline

    return StoryPipeline.load(tiny_continuation_checkpoint)
