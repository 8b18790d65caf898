"""A network that takes the place of InceptionV3 in tests: a linear map of mean colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from contextualstory_jax.models.inception import InceptionV3
from contextualstory_jax.models.layers import linear
from contextualstory_jax.models.network import Network

FEATURES = 12
WEIGHTS = "fid_inception.safetensors"


class TinyInception(InceptionV3):
    """Features of the means of 2 x 2 fields of an image."""

    def __init__(self):
        self.fc = linear(12, FEATURES)

    def features(self, x):
        fields = x[:, :298, :298].reshape(len(x), 2, 149, 2, 149, 3).mean(axis=(2, 4))
        return self.fc(fields.reshape(len(x), 12))


def tiny_network() -> Network[TinyInception]:
    return Network(TinyInception)


def write_weights(folder: Path, scale: float = 1) -> None:
    """Weights of the tiny network, as a file of its own name."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    weight = scale * rng.standard_normal((FEATURES, 12)).astype(np.float32)
    tensors = {"fc.weight": weight, "fc.bias": np.zeros(FEATURES, np.float32)}
    save_file(tensors, folder / WEIGHTS)


def write_images(folder: Path, count: int, seed: int, side: int = 16, contrast: float = 1) -> Path:
    """Images unlike each other, of 4 x 4 fields."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        fields = 128 + contrast * rng.uniform(-128, 127, (4, 4, 3))
        image = np.repeat(np.repeat(fields.astype(np.uint8), side // 4, axis=0), side // 4, axis=1)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder
