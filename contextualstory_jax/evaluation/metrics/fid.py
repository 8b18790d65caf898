"""FID: the Frechet distance between InceptionV3's features of generated and reference frames."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from contextualstory_jax.distributed.multihost import is_first
from contextualstory_jax.evaluation.image_folders import ImageFolder
from contextualstory_jax.evaluation.inception_features import inception
from contextualstory_jax.evaluation.measurement import Measurement, jackknife_interval
from contextualstory_jax.evaluation.protocols import random_references
from contextualstory_jax.evaluation.statistics import (
    Statistics,
    distances_without,
    frechet_distance,
    root,
    statistics,
)
from contextualstory_jax.models.inception import FEATURES
from contextualstory_jax.utils.errors import require
from contextualstory_jax.utils.interruption import check

GROUPS = 20  # of stories, of which the jackknife leaves one out each
FEWEST = 3  # stories for an interval

logger = logging.getLogger(__name__)


def fid(measurement: Measurement) -> dict[str, Any]:
    """FID, with an interval by a jackknife over groups of the generated stories.

    Neighbouring stories share a group: in test splits they share frames too. Where the protocol
    takes random reference frames, `reference_samples` is the spread over ten samples of them, and
    the value that of the first.

    Raises `UserError` for fewer than two images.
    """
    extractor = inception(measurement.protocol, measurement.weights)
    generated = measurement.generated
    _check_count(generated)
    features = measurement.features(extractor, [frame.item for frame in generated.frames])
    ours = statistics(features)
    references = reference_statistics(measurement)
    first = references[0]
    require(
        first.mu.shape == ours.mu.shape,
        f"the reference's statistics are of {len(first.mu)} features, not FID's {len(ours.mu)}; "
        "take those of the last pool",
    )
    root_of_first = root(first.sigma)
    groups = story_groups(generated)
    left_out = distances_without(features, groups, first, root_of_first) if groups else []
    value = frechet_distance(ours, first, root_of_first)
    report = dict(jackknife_interval(value, left_out)._asdict())
    if len(references) > 1:
        root_of_ours = root(ours.sigma)
        values = [value, *(frechet_distance(r, ours, root_of_ours) for r in references[1:])]
        report["reference_samples"] = {
            "count": len(values),
            "mean": float(np.mean(values)),
            "smallest": min(values),
            "largest": max(values),
        }
    return {"fid": report}


def reference_statistics(measurement: Measurement) -> list[Statistics]:
    """Statistics of the reference's frames: several where the protocol takes random ones.

    Raises `UserError` where there are fewer than two images.
    """
    reference = measurement.reference
    if isinstance(reference, Statistics):
        return [reference]
    _check_count(reference)
    folders = [reference]
    if measurement.protocol.random_reference and reference.settings:
        folders = random_references(reference, measurement.options.seed) or folders
    extractor = inception(measurement.protocol, measurement.weights)
    found = []
    for folder in folders:
        check()
        items = [frame.item for frame in folder.frames]
        found.append(statistics(measurement.features(extractor, items)))
    return found


def story_groups(folder: ImageFolder) -> list[np.ndarray]:
    """Numbers of the frames of each group of neighbouring stories; none for too few stories."""
    counts = [len(story) for story in folder.stories()]
    if len(counts) < FEWEST:
        return []
    stories = np.repeat(np.arange(len(counts)), counts)
    groups = np.array_split(np.arange(len(counts)), min(GROUPS, len(counts)))
    return [np.flatnonzero(np.isin(stories, group)) for group in groups]


def _check_count(folder: ImageFolder) -> None:
    """Warn of few images. Raises `UserError` for one."""
    count = len(folder.frames)
    require(count >= 2, f"{folder.path} holds one image; FID needs two, and 2,048 to be meaningful")
    if count < FEATURES and is_first():
        logger.warning(
            "%s holds %d images, fewer than FID has features (%d): its value depends on their "
            "number; compare it with values of equally many only",
            folder.path,
            count,
            FEATURES,
        )
