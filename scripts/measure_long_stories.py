"""Quality of long stories by the position of their frames, and of the scenery where windows meet.

    python scripts/measure_long_stories.py --stories 256 --sentences 20 --json long.json

Test stories of the synthetic dataset are generated twice: by their own sentences, each window's
first one restated as `context`, and with every sentence restated, so that names and scene are in
each ("named"). A column for each five frames, and the differences between them; then scenery
agreement where a window's new frames begin ("seams") and elsewhere ("inside").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # what measures is not in an installation

from contextualstory_jax.data.example import FRAMES, Example  # noqa: E402
from contextualstory_jax.data.shapes import story  # noqa: E402
from contextualstory_jax.data.shapes_reader import read_frames  # noqa: E402
from contextualstory_jax.evaluation.compare import require_readable  # noqa: E402
from contextualstory_jax.evaluation.metrics.characters import CharacterMetrics  # noqa: E402
from contextualstory_jax.sampling.arguments import stories_of  # noqa: E402
from contextualstory_jax.sampling.pipeline import StoryPipeline  # noqa: E402
from contextualstory_jax.sampling.prompts import OVERLAP  # noqa: E402
from contextualstory_jax.sampling.windows import windows  # noqa: E402
from contextualstory_jax.utils.cli import ArgumentParser, run  # noqa: E402
from contextualstory_jax.utils.errors import require  # noqa: E402
from scripts.measure_kept_frames import print_and_write  # noqa: E402


def count(
    examples: Sequence[Example],
    images: UInt8[np.ndarray, "n f h h 3"],
    seams: set[int],
    way: str,
) -> dict[str, CharacterMetrics]:
    """Metrics of each five frames, and of pairs of frames at seams and inside windows."""
    frames = images.shape[1]
    groups = {f"{way} {i + 1}-{i + FRAMES}": slice(i, i + FRAMES) for i in range(0, frames, FRAMES)}
    metrics = {name: CharacterMetrics() for name in (*groups, f"{way} seams", f"{way} inside")}
    for example, of_story in zip(examples, images, strict=True):
        readings, labels = read_frames(of_story), example.labels or ()
        for name, part in groups.items():
            metrics[name].update(example.story_id, readings[part], labels[part])
        for second in range(1, frames):
            name = f"{way} seams" if second in seams else f"{way} inside"
            pair = slice(second - 1, second + 1)
            metrics[name].update(example.story_id, readings[pair], labels[pair])
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it."""
    parser = ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", help="by default the model that ships")
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--sentences", type=int, default=20)
    parser.add_argument("--seed", type=int, default=777, help="of the dataset")
    parser.add_argument("--window-overlap", type=int, default=OVERLAP)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    require(arguments.stories >= 2, "--stories must be at least 2")
    require(arguments.sentences > FRAMES, f"--sentences must be at least {FRAMES + 1}")
    pipeline = StoryPipeline.from_pretrained(arguments.checkpoint)
    config = pipeline.model.config
    require_readable(config.height, config.width)
    examples = [
        story(arguments.seed, number, "test", config.height, arguments.sentences)
        for number in range(arguments.stories)
    ]
    stories = stories_of(examples, config.unet)
    named = [
        one._replace(sentences=example.restated or one.sentences)
        for one, example in zip(stories, examples, strict=True)
    ]
    overlap = arguments.window_overlap
    found = windows(arguments.sentences, config.unet.n_frames, overlap)[1:]
    seams = {window.start + window.kept for window in found}
    metrics: dict[str, CharacterMetrics] = {}
    with tqdm(total=2 * len(stories), unit="story") as bar:
        for way, texts in (("own", stories), ("named", named)):
            generated = pipeline.draw(
                texts, batch_size=arguments.batch_size, window_overlap=overlap, progress=bar.update
            )
            metrics |= count(examples, generated.images, seams, way)

    def earlier(name: str) -> str | None:
        way, part = name.split()
        if part in ("inside", f"1-{FRAMES}"):
            return None
        first = FRAMES + 1 if way == "own" and part != f"{FRAMES + 1}-{2 * FRAMES}" else 1
        return f"{way} inside" if part == "seams" else f"{way} {first}-{first + FRAMES - 1}"

    print_and_write(metrics, arguments, earlier)


if __name__ == "__main__":
    run(main)
