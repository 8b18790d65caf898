"""Weights of the metrics' networks that follow from their names: for rehearsals alone."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import save_file

from contextualstory_jax.data.characters import characters_of
from contextualstory_jax.models.inception import FID_CLASSES, InceptionV3
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.r2plus1d import R2Plus1D
from contextualstory_jax.testing.parity_weights import torch_tensors


def write_metric_weights(folder: Path, dataset: str) -> Path:
    """A folder for `--weights-dir`, without CLIP; its files are recorded as unverified.

    Args:
        folder: To write to.
        dataset: Of the characters that a classifier is for: `pororo` or `flintstones`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    networks = {
        "fid_inception": lambda: InceptionV3(FID_CLASSES, fid=True),
        "r2plus1d_18": R2Plus1D,
        f"characters_{dataset}": lambda: InceptionV3(len(characters_of(dataset)), aux=True),
    }
    for name, make in networks.items():
        save_file(torch_tensors(Network(make), 0), folder / f"{name}.safetensors")
    return folder
