"""A folder of photos as people have them, from preparation to evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax import evaluate, generate
from contextualstory_jax.commands import prepare
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.train import train_and_evaluate

RECIPE = Path(__file__).parents[1] / "helpers" / "tiny_config.py"
SIZE, STORIES = 16, 4


def photos() -> dict[str, Image.Image]:
    """One photo of each kind, of sizes that differ."""
    halves = np.zeros((40, 60, 3), np.uint8)
    halves[:, :30] = 200
    palette = Image.new("P", (30, 30), 1)
    palette.putpalette([255, 0, 0, 0, 0, 200])
    palette.info["transparency"] = 0
    return {
        "grey16.png": Image.fromarray(np.full((50, 50), 128 * 257, np.uint16)),
        "rotated.jpg": Image.fromarray(halves),
        "transparent.png": Image.new("RGBA", (64, 48), (255, 0, 0, 0)),
        "palette.png": palette,
        "wide.bmp": Image.new("RGB", (90, 45), (10, 20, 30)),
    }


def write_photos(root: Path) -> Path:
    """Stories of these photos; none says which split it is of."""
    root.mkdir()
    upside_down = Image.Exif()
    upside_down[0x0112] = 3  # orientation: turned by 180 degrees
    for name, image in photos().items():
        image.save(root / name, exif=upside_down if name == "rotated.jpg" else b"", quality=100)
    lines = [
        {
            "id": f"holiday {number}",
            "sentences": [f"Mia {word} in the meadow." for word in ("runs", *["jumps"] * 4)],
            "frames": list(photos()),
        }
        for number in range(STORIES)
    ]
    lines[0]["sentences"][0] = "Mia runs. " * 60
    (root / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.mark.slow
def test_photos_are_prepared_trained_on_and_generated_from(tiny_train_config, tmp_path, capsys):
    source, shards, workdir = (
        write_photos(tmp_path / "photos"),
        tmp_path / "shards",
        tmp_path / "run",
    )
    prepare.main(["folder", "--source", str(source), "--out", str(shards)] + ["--size", str(SIZE)])
    printed = capsys.readouterr().out
    assert "truncated captions: 1" in printed and "1 of 4 are held out as the test" in printed
    assert "stories: train 3, test 1; images: 5" in printed
    grey, rotated, transparent, palette, wide = PreparedSource(shards, "test", SIZE)[0].images
    assert (grey == 128).all() and (transparent == 255).all()
    assert rotated[:, 0].mean() < 10 and rotated[:, -1].mean() > 190
    assert (palette == (0, 0, 200)).all() and (wide == (10, 20, 30)).all()

    data = DataConfig(name="folder", root=str(shards))
    train_and_evaluate(dataclasses.replace(tiny_train_config, data=data), workdir)
    assert "1 of 4 are held out as the test split" in capsys.readouterr().out
    sample = np.asarray(Image.open(workdir / "samples/step_0000004.png"))
    assert sample.shape == (2 * SIZE, 5 * SIZE, 3) and (sample[:SIZE, :SIZE] == 128).all()

    generate.main(
        ["--checkpoint", str(workdir), "--out", str(tmp_path / "out")]
        + ["--sentence", *["Mia runs."] * 5]
    )
    assert Image.open(tmp_path / "out/story/frame_4.png").size == (SIZE, SIZE)

    options = ["--config", str(RECIPE), "--config.data.name=folder"]
    options.append(f"--config.data.root={shards}")
    evaluate.main([*options, "--checkpoint", str(workdir), "--out", str(tmp_path / "evaluated")])
    assert len((tmp_path / "evaluated/frames.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "evaluated/settings.json").read_text())["split"] == "test"
