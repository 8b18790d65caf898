"""The datasets on disk by name."""

from __future__ import annotations

from pathlib import Path

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.flintstones import FlintstonesSource
from contextualstory_jax.data.folder import FolderSource
from contextualstory_jax.data.pororo import PororoSource
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.utils.errors import UserError


def open_source(config: DataConfig, root: Path, split: str, size: int) -> StorySource:
    """One split of the config's dataset in a folder as published.

    Raises `UserError` for a folder that is not the dataset's, or whose files are broken.
    """
    policy, seed = config.split_policy, config.seed
    match config.name:
        case "pororo":
            return PororoSource(
                root, split, size, policy=policy, captions=config.captions, seed=seed
            )
        case "flintstones":
            return FlintstonesSource(root, split, size, policy=policy, seed=seed)
        case "folder":
            return FolderSource(
                root, split, size, policy=policy, test_fraction=config.test_fraction
            )
        case "shapes":
            raise UserError("data.name = 'shapes' is rendered, not on disk; name another dataset")
