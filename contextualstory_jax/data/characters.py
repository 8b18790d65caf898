"""The characters of the published datasets, and frames of stories labelled with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool

from contextualstory_jax.data import flintstones, pororo
from contextualstory_jax.data.images import fit_square
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.utils.errors import require

CHARACTERS = {"pororo": pororo.CHARACTERS, "flintstones": flintstones.CHARACTERS}


def characters_of(dataset: object) -> tuple[str, ...]:
    """A dataset's characters in the order of its labels.

    Raises `UserError` for a dataset of which nobody has published a classifier.
    """
    require(
        dataset in CHARACTERS,
        f"character classifiers are of {' and '.join(CHARACTERS)}, not of {dataset!r}",
    )
    return CHARACTERS[str(dataset)]


def to_labels(present: Collection[str], characters: Sequence[str]) -> Bool[np.ndarray, " k"]:
    """Which of some characters are present."""
    return np.array([character in present for character in characters])


@dataclasses.dataclass(frozen=True)
class LabelledFrames:
    """A random frame of each story of a source, another in each epoch, with its labels."""

    source: StorySource
    characters: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, places: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """A batch of (index, epoch): `images`, uint8 (b, h, w, 3), `labels`, float32 (b, k).

        Raises `UserError` where the source has no labels, or an image cannot be read.
        """
        images, labels = [], []
        for index, epoch in places:
            record = self.source.story(index)
            seed = [self.source.seed, epoch, index]
            position = int(np.random.default_rng(seed).integers(len(record.paths)))
            choice = self.source.choices(record.frame_ids, epoch)[position]
            image = self.source.picture(record.paths[position], choice)
            images.append(fit_square(image, self.source.size))
            label = record.labels
            require(label is not None, f"{record.source_id} has no labels; {MISSING}")
            assert label is not None
            labels.append(to_labels(label[position].characters, self.characters))
        return {"images": np.stack(images), "labels": np.stack(labels).astype(np.float32)}


MISSING = "put labels.npy (PororoSV) or labels.pkl (FlintstonesSV) into the dataset's folder"
