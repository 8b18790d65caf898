"""FSD: the Frechet distance between R(2+1)D-18's features of generated and reference stories.

Source: Song et al., Character-Preserving Coherent Story Visualization, ECCV 2020; its code,
CPCStoryVisualization `fid/residual2p1.py` and `fid/vfid_score.py`, resizes a clip to 112 x 112 and
scales it, and then passes on the clip as it came: 64 x 64, from -1 to 1. It leaves out the last
stories, where they fill no batch of 50; here all count.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from contextualstory_jax.evaluation.features import Extractor
from contextualstory_jax.evaluation.image_folders import ImageFolder, Item, read_rgb
from contextualstory_jax.evaluation.measurement import Measurement, jackknife_interval
from contextualstory_jax.evaluation.metrics.fid import FEWEST, GROUPS
from contextualstory_jax.evaluation.protocols import Protocol
from contextualstory_jax.evaluation.statistics import (
    distances_without,
    frechet_distance,
    root,
    statistics,
)
from contextualstory_jax.evaluation.weights import Weights, WeightsFile
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.r2plus1d import FEATURES, R2Plus1D
from contextualstory_jax.utils.errors import require

SIDE = 64  # pixels that frames are resized to
RESIZED = 112  # of a `resized` clip

R2PLUS1D_WEIGHTS = WeightsFile(
    "r2plus1d_18-91a641e6.pth",
    "r2plus1d_18",
    "https://download.pytorch.org/models/r2plus1d_18-91a641e6.pth",
)

logger = logging.getLogger(__name__)


def fsd(measurement: Measurement) -> dict[str, Any]:
    """FSD, with an interval by a jackknife over groups of the generated stories.

    Raises `UserError` for fewer than two stories.
    """
    extractor = r2plus1d(measurement.protocol, measurement.weights)
    ours, theirs = (
        measurement.features(extractor, clips(folder))
        for folder in (measurement.generated, measurement.reference_images)
    )
    reference = statistics(theirs)
    root_of_reference = root(reference.sigma)
    value = frechet_distance(statistics(ours), reference, root_of_reference)
    groups = np.array_split(np.arange(len(ours)), min(GROUPS, len(ours)))
    enough = len(ours) >= FEWEST
    left_out = distances_without(ours, groups, reference, root_of_reference) if enough else []
    return {"fsd": jackknife_interval(value, left_out)}


def clips(folder: ImageFolder) -> list[tuple[Item, ...]]:
    """The images of each story. Raises `UserError` for fewer than two stories; warns of few."""
    stories = [tuple(frame.item for frame in story) for story in folder.stories()]
    require(
        len(stories) >= 2, f"{folder.path} holds one story; FSD needs two, and 512 to mean much"
    )
    if len(stories) < FEATURES:
        logger.warning(
            "%s holds %d stories, fewer than FSD has features (%d): its value depends on their "
            "number; compare it with values of equally many only",
            folder.path,
            len(stories),
            FEATURES,
        )
    return stories


@functools.cache
def r2plus1d_network() -> Network[R2Plus1D]:
    """R(2+1)D-18."""
    return Network(R2Plus1D)


def r2plus1d(protocol: Protocol, weights: Weights) -> Extractor:
    """The extractor of a protocol's features. Raises `UserError` where weights are missing."""
    network = r2plus1d_network()
    params = weights.load(R2PLUS1D_WEIGHTS, network)

    def compute(module: Any, clip: UInt8[Array, "b f h w 3"]) -> Float[Array, "b d"]:
        return module(scale_clip(clip, protocol.clip == "resized"))

    digest = weights.digest(R2PLUS1D_WEIGHTS)
    return Extractor(f"r2plus1d {protocol.clip}", network, params, digest, read_clip, compute)


def read_clip(items: tuple[Item, ...]) -> UInt8[np.ndarray, "f 64 64 3"]:
    """A story's frames. Reference: torchvision's Resize((64, 64)) on Pillow images."""
    size = SIDE, SIDE
    images = [read_rgb(item).resize(size, Image.Resampling.BILINEAR) for item in items]
    return np.stack([np.asarray(image) for image in images])


def scale_clip(clip: UInt8[Array, "b f h w 3"], resized: bool) -> Float[Array, "b f p q 3"]:
    """Levels 0 to 255 to -1 to 1, and to 112 x 112 pixels where `resized`.

    As torch's `interpolate` does it: bilinear, without antialiasing.
    """
    x = clip.astype(jnp.float32) / 127.5 - 1
    if not resized:
        return x
    shape = (*x.shape[:2], RESIZED, RESIZED, 3)
    return jax.image.resize(x, shape, "bilinear", antialias=False)
