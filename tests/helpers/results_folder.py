"""A small folder as `evaluate` writes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig

CHARACTERS = ("mia", "otto", "rex")


def write_results(
    folder: Path,
    stories: int,
    *,
    given: int = 0,
    side: int = 16,
    data: DataConfig | None = None,
    split: str = "test",
    **settings: Any,
) -> None:
    """Stories of random images, generated ones beside originals, with sentences and characters.

    Args:
        given: how many of the first frames were given to the model.
        data: of the settings; a folder of one's own by default.
        settings: further ones.
    """
    rng = np.random.default_rng(0)
    records = []
    for number in range(stories):
        place = f"stories/{number:05d}-s{number}"
        (folder / place).mkdir(parents=True)
        for i in range(5):
            names = {"generated": f"{place}/frame_{i}.png", "original": f"{place}/original_{i}.png"}
            for path in names.values():
                image = rng.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(image).save(folder / path)
            record = {
                "story": f"s{number}",
                "position": i,
                "id": f"s{number}-{i}",
                "source_id": f"s{number}-{i}",
                "sentence": f"Sentence {i} of s{number}.",
                **names,
                "given": i < given,
                "characters": sorted({CHARACTERS[number % 3], CHARACTERS[(number + i) % 3]}),
                "scene": None,
                "needs_context": None,
            }
            if number == 1 and i == 1:
                record["characters"] = ["mia", "otto"]
            records.append(record)
    described = {
        "data": dataclasses.asdict(data or DataConfig(name="folder", root="absent")),
        "task": "continuation" if given else "visualization",
        "split": split,
        "height": side,
        "width": side,
    }
    (folder / "settings.json").write_text(json.dumps({**described, **settings}))
    (folder / "frames.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
