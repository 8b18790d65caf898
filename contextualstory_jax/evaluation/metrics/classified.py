"""Character F1 and accuracies, by a classifier of the dataset's characters.

The classifier is torchvision's InceptionV3, fine-tuned: a character is present where its logit is
positive. Published code reports different numbers as F1; each here says which it is.

Source: StoryViz `eval_scripts/eval_classifier.py`, storydalle `eval_char_clf.py`, StoryGPT-V
`eval/eval_cls.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from contextualstory_jax.data.characters import characters_of, to_labels
from contextualstory_jax.data.images import fit_square
from contextualstory_jax.evaluation.features import Extractor
from contextualstory_jax.evaluation.image_folders import Item, read_rgb
from contextualstory_jax.evaluation.measurement import Measurement, bootstrap_interval
from contextualstory_jax.evaluation.protocols import ClassifierInput
from contextualstory_jax.evaluation.weights import Weights, read, sha256
from contextualstory_jax.models.inception import SIDE, InceptionV3
from contextualstory_jax.models.network import Network
from contextualstory_jax.utils.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt")  # `.pt` is the authors'
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def characters(measurement: Measurement) -> dict[str, Any]:
    """`character_f1_micro`, `character_f1_macro`, each character's F1, and two accuracies.

    Raises `UserError` where the dataset has no classifier, or its weights are missing.
    """
    folder = measurement.generated
    dataset = folder.settings["data"]["name"]
    names = characters_of(dataset)
    extractor = classifier(dataset, measurement.weights, measurement.protocol.classifier_input)
    logits = measurement.features(extractor, [frame.item for frame in folder.frames])
    labels = np.stack([to_labels(frame.characters or (), names) for frame in folder.frames])
    stories = np.unique([frame.story for frame in folder.frames], return_inverse=True)[1]
    return scores(logits > 0, labels, stories, names)


def require_classifier(measurement: Measurement) -> None:
    """Raise `UserError` where the dataset has no classifier, or its weights are missing."""
    dataset = measurement.generated.settings["data"]["name"]
    characters_of(dataset)
    find_classifier(measurement.weights.folder, dataset)


def scores(
    predicted: Bool[np.ndarray, "n k"],
    labels: Bool[np.ndarray, "n k"],
    stories: Int[np.ndarray, " n"],
    names: tuple[str, ...],
) -> dict[str, Any]:
    """The metrics of predictions.

    Args:
        predicted: The characters found in each frame.
        labels: The characters that should be there.
        stories: The number of each frame's story, from 0.
        names: The characters' names.
    """
    exact = (predicted == labels).all(axis=1)
    frames = np.bincount(stories)
    right = np.bincount(stories, exact)
    counts = np.zeros((len(frames), len(names), 2))  # of pairs found, and of all, twice
    np.add.at(counts[..., 0], stories, 2 * (predicted & labels))
    np.add.at(counts[..., 1], stories, predicted.astype(int) + labels)
    found = {
        "character_f1_micro": bootstrap_interval(counts.sum(axis=1), _ratio),
        "character_f1_macro": bootstrap_interval(counts, lambda c: _ratio(c).mean(axis=-1)),
        "frame_accuracy": bootstrap_interval(np.stack([right, frames], axis=-1), _ratio),
        "story_exact_match": bootstrap_interval(
            np.stack([right == frames, np.ones(len(frames))], axis=-1), _ratio
        ),
    }
    for number, name in enumerate(names):
        key = f"character_f1_{name.lower().replace(' ', '_')}"
        found[key] = bootstrap_interval(counts[:, number], _ratio)
    return found


def _ratio(counts: Float[np.ndarray, "*r 2"]) -> Any:
    """The first count over the second; 0 where there is none."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1)


def classifier(dataset: str, weights: Weights, scale: ClassifierInput) -> Extractor:
    """The extractor of a dataset's logits. Raises `UserError` where its weights are missing."""
    network = Network(lambda: InceptionV3(len(characters_of(dataset)), aux=True))
    path = find_classifier(weights.folder, dataset)
    digest = sha256(path)
    params = read(path, network)
    weights.record(path.name, digest, verified=False)

    def compute(module: InceptionV3, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b k"]:
        return module(scale_images(images, scale))

    return Extractor(f"characters {scale}", network, params, digest, read_square, compute)


def find_classifier(folder: Path, dataset: str) -> Path:
    """The file of a dataset's classifier. Raises `UserError` where there is none."""
    stem = f"characters_{dataset}"
    for suffix in SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise UserError(
        f"{folder} has no {stem}.safetensors (or {' or '.join(SUFFIXES[1:])}); train it with "
        f"contextualstory-jax train-classifier --config {dataset}_visualization, or put the "
        "authors' file there under this name"
    )


def read_square(item: Item) -> UInt8[np.ndarray, "299 299 3"]:
    """An image at the classifier's size."""
    return fit_square(read_rgb(item), SIDE)


def scale_images(
    images: UInt8[Array, "b h w 3"], scale: ClassifierInput
) -> Float[Array, "b h w 3"]:
    """Levels 0 to 255 as a protocol's classifier receives them."""
    unit = images.astype(jnp.float32) / 255
    if scale == "unit":
        return unit
    if scale == "symmetric":
        return 2 * unit - 1
    return (unit - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)
