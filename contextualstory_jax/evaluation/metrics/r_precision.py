"""R-precision by CLIP: how often a frame's own sentence is nearer than 99 others.

A sentence is retrieved for each frame, out of its own and 99 that are sampled from all other
sentences of the folder, and right where none is as near. StoryViz's R-precision ranks stories, by
encoders trained for it (`eval_damsm.py`): the two cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from contextualstory_jax.evaluation.clip import clip_of
from contextualstory_jax.evaluation.measurement import Measurement, mean_interval
from contextualstory_jax.utils.errors import require

DISTRACTORS = 99
TRIALS = 10


def require_sentences(measurement: Measurement) -> None:
    """Raise `UserError` for fewer than 100 different sentences."""
    folder = measurement.generated
    count = len({frame.sentence for frame in folder.frames})
    require(
        count > DISTRACTORS,
        f"clip-r-precision compares {DISTRACTORS + 1} different sentences, and {folder.path} has "
        f"{count}; generate more stories",
    )


def clip_r_precision(measurement: Measurement) -> dict[str, Any]:
    """`clip_r_precision`, a share."""
    frames = measurement.generated.frames
    sentences = [frame.sentence or "" for frame in frames]
    numbers = {sentence: n for n, sentence in enumerate(dict.fromkeys(sentences))}
    clip = clip_of(measurement.weights)
    images = clip.images(measurement, measurement.generated)
    text = clip.text(measurement, list(numbers))
    own = [numbers[sentence] for sentence in sentences]
    hits = retrieved(images, text, own, measurement.options.seed)
    return {"clip_r_precision": mean_interval(hits, [frame.story for frame in frames])}


def retrieved(
    images: Float32[np.ndarray, "n c"],
    text: Float32[np.ndarray, "m c"],
    own: Sequence[int],
    seed: int,
) -> Float[np.ndarray, " n"]:
    """The share of trials in which each image's own sentence is nearest.

    Args:
        images: Unit vectors of the images.
        text: Unit vectors of the different sentences.
        own: The number of each image's sentence.
        seed: Seed of the distractors.
    """
    rng = np.random.default_rng(seed)
    shares = np.empty(len(images))
    for number, (image, right) in enumerate(zip(images, own, strict=True)):
        nearness = text @ image
        others = np.delete(nearness, right)
        best = [rng.choice(others, DISTRACTORS, replace=False).max() for _ in range(TRIALS)]
        shares[number] = np.mean(nearness[right] > np.array(best))
    return shares
