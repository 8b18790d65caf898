"""The datasets on disk by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from contextualstory_jax.data.flintstones import FlintstonesSource
from contextualstory_jax.data.folder import FolderSource
from contextualstory_jax.data.pororo import Captions, PororoSource
from contextualstory_jax.data.story_source import Policy, StorySource


def open_source(
    name: Literal["pororo", "flintstones", "folder"],
    root: Path,
    split: str,
    size: int,
    *,
    policy: Policy = "published",
    captions: Captions = "blip2",
    test_fraction: float = 0.05,
    seed: int = 0,
) -> StorySource:
    """One split of a dataset on disk; `captions` are for pororo, `test_fraction` for folders.

    Raises `UserError` for a folder that is not the dataset's, or whose files are broken.
    """
    match name:
        case "pororo":
            return PororoSource(root, split, size, policy=policy, captions=captions, seed=seed)
        case "flintstones":
            return FlintstonesSource(root, split, size, policy=policy, seed=seed)
        case "folder":
            return FolderSource(root, split, size, policy=policy, test_fraction=test_fraction)
