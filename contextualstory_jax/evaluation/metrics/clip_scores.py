"""CLIP scores: cosines of the unit vectors that CLIP makes of frames and sentences.

- `clip_i`: a generated frame and its original;
- `clip_t`: a frame and its sentence;
- `clip_consistency`: two frames of a story that share a character.

Source: StoryGen `evaluation/`, where frames and sentences are compared so with OpenAI's ViT-B/32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from contextualstory_jax.evaluation.clip import clip_of
from contextualstory_jax.evaluation.image_folders import Frame
from contextualstory_jax.evaluation.measurement import Measurement, mean_interval
from contextualstory_jax.evaluation.paired import require_same_stories


def require_pairs(measurement: Measurement) -> None:
    """Raise `UserError` for two folders that `evaluate` wrote of different stories."""
    generated, reference = measurement.generated, measurement.reference_images
    if generated.settings and reference.settings:
        require_same_stories(generated, reference)


def clip_scores(measurement: Measurement) -> dict[str, Any]:
    """`clip_i`, `clip_t` where frames have sentences, `clip_consistency` where characters.

    Raises `UserError` where there is no CLIP model.
    """
    clip = clip_of(measurement.weights)
    frames = measurement.generated.frames
    stories = [frame.story for frame in frames]
    images = clip.images(measurement, measurement.generated)
    originals = clip.images(measurement, measurement.reference_images)
    scores = {"clip_i": mean_interval(cosines(images, originals), stories)}
    sentences = [frame.sentence for frame in frames if frame.sentence is not None]
    if len(sentences) == len(frames):
        text = clip.text(measurement, sentences)
        scores["clip_t"] = mean_interval(cosines(images, text), stories)
    pairs = sharing_pairs(frames)
    if len(pairs):
        values = cosines(images[pairs[:, 0]], images[pairs[:, 1]])
        of_pairs = [stories[first] for first, _ in pairs]
        scores["clip_consistency"] = mean_interval(values, of_pairs)
    return scores


def cosines(
    first: Float32[np.ndarray, "n c"], second: Float32[np.ndarray, "n c"]
) -> Float[np.ndarray, " n"]:
    """The cosine of each pair of unit vectors."""
    return np.einsum("nc,nc->n", first, second, dtype=np.float64)


def sharing_pairs(frames: Sequence[Frame]) -> Int[np.ndarray, "n 2"]:
    """The numbers of each two frames of one story that share a character, none without labels."""
    numbered = itertools.groupby(enumerate(frames), key=lambda entry: entry[1].story)
    pairs = [
        (i, j)
        for _, of_story in numbered
        for (i, first), (j, second) in itertools.combinations(of_story, 2)
        if (first.characters or frozenset()) & (second.characters or frozenset())
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)
