"""The published evaluation of a task: its checks, its protocols, and their values as one report."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from contextualstory_jax import __version__
from contextualstory_jax.config.build import as_json
from contextualstory_jax.data.example import FRAMES
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.data.validation import problems
from contextualstory_jax.distributed.multihost import say
from contextualstory_jax.evaluation import report
from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.image_folders import Frame, ImageFolder, Role
from contextualstory_jax.evaluation.inception_features import inception
from contextualstory_jax.evaluation.measurement import Measurement, Options, check_needs
from contextualstory_jax.evaluation.metrics.table import METRICS
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.results import Gallery, SplitStory
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.utils.errors import UserError, require


class Task(NamedTuple):
    """A published task: the config that it was trained by, and what is known of its evaluation."""

    config: str
    stories: int  # of the test split, as papers report it
    fid: float | None = None  # that a mirror of a leaderboard attributes to ContextualStory

    @property
    def is_continuation(self) -> bool:
        """Whether a first frame is given."""
        return self.config.endswith("continuation")


PORORO_STORIES, FLINTSTONES_STORIES = 2208, 2309  # Source: Maharana et al., StoryDALL-E
TASKS = {
    "pororo-visualization": Task("pororo_visualization", PORORO_STORIES, 14.07),
    "pororo-continuation": Task("pororo_continuation", PORORO_STORIES, 14.20),
    "flintstones-visualization": Task("flintstones_visualization", FLINTSTONES_STORIES),
    "flintstones-continuation": Task("flintstones_continuation", FLINTSTONES_STORIES, 16.33),
}

# The metrics of each protocol are those that its source has. With the first stand CLIP's too, which
# no protocol changes, and characters by a classifier whose inputs are as in its training.
PROTOCOL_METRICS = {
    "pytorch-fid": ("fid", "characters", "clip", "clip-r-precision"),
    "torch-fidelity": ("fid", "kid"),
    "clean-fid": ("fid", "kid"),
    "storyviz": ("fid", "characters"),
    "storydalle": ("fid", "characters"),
    "arldm": ("fid",),
    "make-a-story": ("fid",),
    "cpcsv": ("fsd",),
    "cpcsv-resized": ("fsd",),
}
REQUIRED = (
    "fid"  # the metric of the published figures; others are left out where they cannot be had
)
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow")


def check_dataset(source: StorySource, token_count: Callable[[str], int], most: int) -> int:
    """Decode every image of a split, and compare ids; the number of captions that are truncated.

    Args:
        source: The split.
        token_count: Number of tokens of a caption, start and end included.
        most: Number of tokens that the model reads.

    Raises:
        UserError: Images are missing or broken, or ids are double: how many, and the first.
    """
    found = list(problems(source, token_count, most))
    broken = [finding for finding in found if finding.kind != "long caption"]
    if broken:
        raise UserError(
            f"{len(broken)} {'problem' if len(broken) == 1 else 'problems'} in the {source.split} "
            f"split; the first: {broken[0].message}; fetch these files again"
        )
    return len(found)


def stories_sha256(stories: Sequence[SplitStory]) -> str:
    """The SHA-256 of a split's ids and sentences: equal where two datasets hold equal stories."""
    described = [[story.id, story.sentences, story.source_ids] for story in stories]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def planned_folder(
    gallery: Gallery, source: StorySource, stories: Sequence[SplitStory], given: int, role: Role
) -> ImageFolder:
    """The folder that `read_folder` will read once the stories are generated.

    Args:
        gallery: Where they will be.
        source: The split that they are of.
        stories: The stories.
        given: How many of the first frames are given to the model.
        role: Which images.
    """
    word = "frame" if role == "generated" else "original"
    frames = []
    for story in stories:
        place, labels = gallery.place(story), source.story(story.number).labels
        for i in range(given, FRAMES):
            characters = labels[i].characters if labels else None
            path = place / f"{word}_{i}.png"
            frames.append(Frame(path, place.name, i, story.sentences[i], characters))
    return ImageFolder(gallery.folder, tuple(frames), as_json(gallery.settings))


def left_out(generated: ImageFolder, reference: ImageFolder, weights: Weights) -> dict[str, str]:
    """The metrics that cannot be measured, each with the reason; before images are there.

    Missing weights are downloaded where they can be.

    Raises `UserError` where FID cannot be measured, or its weights are another network's.
    """
    protocol = PROTOCOLS[next(iter(PROTOCOL_METRICS))]
    measurement = Measurement(generated, reference, protocol, weights, Features(), Options())
    reasons = {}
    for name in dict.fromkeys(itertools.chain(*PROTOCOL_METRICS.values())):
        try:
            check_needs([(name, METRICS[name])], measurement)
        except UserError as error:
            if name == REQUIRED:
                raise
            reasons[name] = str(error)
    inception(protocol, weights)
    return reasons


def measure_protocols(
    out: Path, weights: Weights, features: Features, seed: int, without: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The values of every protocol, printed as they are found.

    Args:
        out: A folder that `evaluate` or `reproduce` wrote.
        weights: Those of the networks.
        features: Features that are kept.
        seed: Of what is random in metrics.
        without: The metrics to leave out.

    Raises:
        UserError: An image cannot be read, or weights are another network's.
    """
    found = {}
    for name, metrics in PROTOCOL_METRICS.items():
        chosen = [metric for metric in metrics if metric not in without]
        if not chosen:
            continue
        options = Options(seed=seed)
        measurement = report.prepare(out, out, PROTOCOLS[name], weights, features, options)
        measured = report.measure(chosen, measurement)
        for line in report.lines(measured):
            say(f"{name:<16}{line}")
        common = ("protocol", "weights_sha256", "unverified", "version")
        found[name] = {key: value for key, value in measured.items() if key not in common}
        found[name]["source"] = PROTOCOLS[name].source
    return found


def environment() -> dict[str, Any]:
    """Versions and devices."""
    kinds = sorted(device.device_kind for device in jax.devices())
    return {
        "versions": {
            "contextualstory_jax": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "devices": {kind: kinds.count(kind) for kind in kinds},
    }


def published(task: Task) -> list[dict[str, Any]]:
    """The published values of a task."""
    if task.fid is None:
        return []
    source = "a mirror of a leaderboard, which attributes it to ContextualStory"
    return [{"metric": "fid", "value": task.fid, "protocol": None, "source": source}]


def require_task(name: str, is_continuation: bool, checkpoint: str | Path) -> None:
    """Raise `UserError` where a checkpoint is of the other kind of task."""
    kinds = ("visualization", "continuation")
    needed, there = kinds[TASKS[name].is_continuation], kinds[is_continuation]
    require(
        needed == there,
        f"{checkpoint} is a model for {there}, and {name} needs one for {needed}; give another "
        "--checkpoint, or another task",
    )
