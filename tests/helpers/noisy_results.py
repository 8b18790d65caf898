"""Small folders as `evaluate` writes them, whose generated frames resemble their originals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from tests.helpers.results_folder import write_results

IN_PORORO = {"mia": "Pororo", "otto": "Loopy", "rex": "Crong"}


def write_noisy_results(folder: Path, stories: int, seed: int = 0, noise: float = 0.5) -> Path:
    """Stories of PororoSV whose generated frames are originals mixed with a seed's noise.

    Args:
        noise: its share.
    """
    write_results(folder, stories, data=DataConfig(name="pororo"), seed=seed)
    records = (folder / "frames.jsonl").read_text()
    for name, other in IN_PORORO.items():
        records = records.replace(f'"{name}"', f'"{other}"')
    (folder / "frames.jsonl").write_text(records)
    rng = np.random.default_rng(seed)
    for path in sorted(folder.glob("stories/*/original_*.png")):
        original = np.asarray(Image.open(path))
        mixed = (1 - noise) * original + noise * rng.integers(0, 256, original.shape)
        Image.fromarray(mixed.astype(np.uint8)).save(str(path).replace("original_", "frame_"))
    return folder
