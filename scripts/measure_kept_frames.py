"""Quality of one frame that is generated again while the story's other frames are kept.

    python scripts/measure_kept_frames.py --stories 256 --seed 777 --json kept.json

Test stories of the synthetic dataset are generated; then one frame of each is generated again with
another seed, the generated others kept, and compared with the same frame of the entire stories. A
column for each way; scenery agreement is that with the frames before and after. Then the
differences from the entire stories, on the same stories.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # what measures is not in an installation

from contextualstory_jax.data.example import Example  # noqa: E402
from contextualstory_jax.data.shapes import story  # noqa: E402
from contextualstory_jax.data.shapes_reader import read_frames  # noqa: E402
from contextualstory_jax.evaluation.compare import require_readable, table  # noqa: E402
from contextualstory_jax.evaluation.metrics.characters import (  # noqa: E402
    CharacterMetrics,
    Report,
)
from contextualstory_jax.sampling.arguments import read_sampling, stories_of  # noqa: E402
from contextualstory_jax.sampling.pipeline import StoryPipeline  # noqa: E402
from contextualstory_jax.sampling.prompts import Kept  # noqa: E402
from contextualstory_jax.sampling.sample import Generated  # noqa: E402
from contextualstory_jax.utils.atomic import write_json  # noqa: E402
from contextualstory_jax.utils.cli import ArgumentParser, run  # noqa: E402
from contextualstory_jax.utils.errors import require  # noqa: E402


class FrameMetrics:
    """Metrics of one frame of each story, and of its scenery beside the neighbours'."""

    def __init__(
        self, examples: Sequence[Example], images: UInt8[np.ndarray, "n f h h 3"], frame: int
    ):
        self.frame, self.neighbours = CharacterMetrics(), CharacterMetrics()
        for example, of_story in zip(examples, images, strict=True):
            readings, labels = read_frames(of_story), example.labels or ()
            own = slice(frame, frame + 1)
            self.frame.update(example.story_id, readings[own], labels[own])
            for start in (frame - 1, frame):
                pair = slice(max(start, 0), start + 2)
                self.neighbours.update(example.story_id, readings[pair], labels[pair])

    def compute(self) -> Report:
        """As `CharacterMetrics.compute`."""
        return _with_scenery(self.frame.compute(), self.neighbours.compute())

    def difference(self, other: FrameMetrics) -> Report:
        """As `CharacterMetrics.difference`."""
        return _with_scenery(
            self.frame.difference(other.frame), self.neighbours.difference(other.neighbours)
        )


def _with_scenery(frame: Report, neighbours: Report) -> Report:
    return {
        subset: {**values, "scenery_agreement": neighbours[subset]["scenery_agreement"]}
        for subset, values in frame.items()
    }


def generate(
    pipeline: StoryPipeline, examples: Sequence[Example], frame: int, options: dict[str, Any]
) -> dict[str, Generated]:
    """The stories entire, from two seeds, and with a frame generated again."""
    stories = stories_of(examples, pipeline.model.config.unet)
    entire = pipeline.draw(stories, seed=0, **options)
    keep = tuple(i != frame for i in range(entire.images.shape[1]))
    kept = [Kept(*arrays, keep) for arrays in zip(*entire, strict=True)]
    ways = {"entire": entire, "other seed": pipeline.draw(stories, seed=1, **options)}
    ways["regenerated"] = pipeline.draw(stories, seed=1, kept=kept, **options)
    if pipeline.model.config.noise.kind == "pyoco_mixed":
        near = {"seed": 1, "shared_noise_seed": 0, "kept": kept}
        ways["near"] = pipeline.draw(stories, **near, **options)
    return ways


def print_and_write(
    metrics: dict[str, Any], arguments: argparse.Namespace, reference: Callable[[str], str | None]
) -> None:
    """Print metrics by name and their differences, and write them to `--json`.

    Args:
        metrics: with `compute` and `difference`.
        arguments: of the command, written beside them.
        reference: the name of the metrics that those of a name are compared with, if any.
    """
    values = {name: of.compute() for name, of in metrics.items()}
    differences = {
        f"{name} - {other}": of.difference(metrics[other])
        for name, of in metrics.items()
        if (other := reference(name)) is not None
    }
    print(table(values), "\n\nDifferences\n\n", table(differences), sep="")
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        write_json(
            arguments.json,
            {"settings": settings, "metrics": values, "differences": differences},
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it."""
    parser = ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", help="by default the model that ships")
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--seed", type=int, default=777, help="of the dataset")
    parser.add_argument("--frame", type=int, default=2, help="to generate again")
    parser.add_argument("--steps", type=int, help="by default the model's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    require(arguments.stories >= 2, "--stories must be at least 2")
    pipeline = StoryPipeline.from_pretrained(arguments.checkpoint)
    config = pipeline.model.config
    require_readable(config.height, config.width)
    frames = range(int(config.unet.is_continuation), config.unet.n_frames)
    require(
        arguments.frame in frames, f"--frame must be in {frames[0]}..{frames[-1]} for this model"
    )
    examples = [
        story(arguments.seed, number, "test", config.height) for number in range(arguments.stories)
    ]
    with tqdm(unit="story") as bar:
        options = {
            "sampling": read_sampling(config, None, num_inference_steps=arguments.steps),
            "size": (config.height, config.width),
            "batch_size": arguments.batch_size,
            "progress": bar.update,
        }
        ways = generate(pipeline, examples, arguments.frame, options)
    metrics = {
        way: FrameMetrics(examples, made.images, arguments.frame) for way, made in ways.items()
    }
    print_and_write(metrics, arguments, lambda way: None if way == "entire" else "entire")


if __name__ == "__main__":
    run(main)
