"""Inputs and results of a metric, and the checks before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.image_folders import ImageFolder, read_folder
from contextualstory_jax.evaluation.protocols import Protocol
from contextualstory_jax.evaluation.statistics import Statistics, read_statistics
from contextualstory_jax.evaluation.weights import Weights, WeightsFile
from contextualstory_jax.utils.errors import UserError, require

Need = Literal["images", "pairs", "stories", "sentences", "characters"]
CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices that do not belong to a protocol.

    Attributes:
        seed: of all that is random, but for KID's subsets.
        kid_subsets: how many subsets KID is averaged over.
        kid_subset_size: images in each.
        kid_seed: of the subsets. The defaults of all three are torch-fidelity's.
    """

    seed: int = 0
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    kid_seed: int = 2020


class Measurement(NamedTuple):
    """Generated frames beside reference frames, or beside statistics of such."""

    generated: ImageFolder
    reference: ImageFolder | Statistics
    protocol: Protocol
    weights: Weights
    features: Features
    options: Options

    @property
    def reference_images(self) -> ImageFolder:
        """The reference's images. Raises `UserError` where it is a file of statistics."""
        if isinstance(self.reference, Statistics):
            raise UserError("the reference is a file of statistics; give a folder of images")
        return self.reference


def _nothing(_: object) -> None: ...


class Metric(NamedTuple):
    """A metric: its function, the weights it uses, and what the folders must have.

    `model` and `check` raise `UserError` for what is missing, before anything is computed.
    """

    measure: Callable[[Measurement], dict[str, Any]]  # values by name, as they stand in the report
    files: tuple[WeightsFile, ...] = ()
    needs: frozenset[Need] = frozenset()
    model: Callable[[Weights], object] = _nothing  # reads one that is not a single file
    check: Callable[[Measurement], object] = _nothing

    def find_weights(self, weights: Weights) -> None:
        """Find or download all weights. Raises `UserError` where some cannot be had."""
        for file in self.files:
            weights.path(file)
        self.model(weights)


class Interval(NamedTuple):
    """A value with its interval of 95 %, None where there are too few stories for one.

    The interval is made of replicates: values of resampled stories (`bootstrap`), or of all but one
    group of stories each (`jackknife`). Of two folders of the same stories they are pairs.
    """

    value: float
    low: float | None = None
    high: float | None = None
    replicates: Float[np.ndarray, " r"] = np.empty(0)
    method: Literal["bootstrap", "jackknife"] = "bootstrap"


def read_reference(path: Path) -> ImageFolder | Statistics:
    """A folder of images, or a file of statistics. Raises `UserError` where it is neither."""
    return read_statistics(path) if path.suffix == ".npz" else read_folder(path, "original")


def check_needs(metrics: Iterable[tuple[str, Metric]], measurement: Measurement) -> None:
    """Raise `UserError` for a metric that needs more than the folders have.

    Where weights are missing, they are downloaded.
    """
    generated, reference = measurement.generated, measurement.reference
    images = reference.frames if isinstance(reference, ImageFolder) else ()
    plain = f"{generated.path} is no folder that evaluate wrote"
    there: dict[Need, tuple[bool, str]] = {
        "images": (bool(images), "a folder of reference images, not a file of statistics"),
        "pairs": (
            len(images) == len(generated.frames),
            "as many reference images as generated ones; there are "
            f"{len(images)} and {len(generated.frames)}",
        ),
        "stories": (bool(generated.settings), f"stories, and {plain}"),
        "sentences": (
            all(frame.sentence is not None for frame in generated.frames),
            f"sentences, and {plain}",
        ),
        "characters": (
            all(frame.characters is not None for frame in generated.frames),
            f"characters of every frame, and {generated.path} has frames without",
        ),
    }
    for name, metric in metrics:
        for need, (has, what) in there.items():
            require(need not in metric.needs or has, f"--metrics {name} needs {what}")
        metric.check(measurement)
        metric.find_weights(measurement.weights)


def mean_interval(
    values: Float[np.ndarray, "n"], stories: Sequence[str], seed: int = 0
) -> Interval:
    """The mean over frames; its interval resamples complete stories.

    Frames of one story are not independent.
    """
    _, members = np.unique(stories, return_inverse=True)
    sums = np.stack([np.bincount(members, values), np.bincount(members)], axis=-1)
    return bootstrap_interval(sums, lambda sums: sums[..., 0] / sums[..., 1], seed)


def bootstrap_interval(
    counts: Float[np.ndarray, "s *n"],
    statistic: Callable[[Float[np.ndarray, "*r"]], Any],
    seed: int = 0,
) -> Interval:
    """A statistic of sums over stories; its interval resamples complete stories.

    Args:
        counts: Of each story.
        statistic: Of summed counts, or of an array of such.
        seed: Of the resamples; equal ones pair those of two folders.
    """
    value, stories = float(statistic(counts.sum(axis=0))), len(counts)
    if stories < 2:
        return Interval(value)
    sampled = np.random.default_rng(seed).multinomial(
        stories, np.full(stories, 1 / stories), size=RESAMPLES
    )
    return quantile_interval(value, statistic(np.tensordot(sampled, counts, axes=1)))


def quantile_interval(value: float, replicates: Float[np.ndarray, " r"]) -> Interval:
    """The interval that holds all but 5 % of the replicates."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return Interval(value, float(low), float(high), replicates)


def jackknife_interval(
    value: float, left_out: Sequence[float] | Float[np.ndarray, " r"]
) -> Interval:
    """The interval of a value from those with one group left out each, by normal approximation.

    Bias that all of them share, as FID's by the number of images, does not widen it.
    """
    groups = len(left_out)
    if groups < 2:
        return Interval(value)
    error = np.sqrt((groups - 1) * np.var(left_out))
    margin = float(NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error)
    return Interval(value, value - margin, value + margin, np.asarray(left_out), "jackknife")


def difference(first: Interval, second: Interval) -> Interval:
    """The first less the second, both of the same stories, with the interval of pairs."""
    value = first.value - second.value
    if not len(first.replicates):
        return Interval(value)
    interval = jackknife_interval if first.method == "jackknife" else quantile_interval
    return interval(value, first.replicates - second.replicates)
