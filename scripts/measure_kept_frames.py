"""Quality of one frame that is generated again while the story's other frames are kept.

    python scripts/measure_kept_frames.py --stories 64 --seed 777 --json kept.json

Test stories of the synthetic dataset are generated; then one frame of each is generated again with
another seed, the generated others kept, and compared with the same frame of the entire stories. A
line for each way: scene and exact characters (shares of frames), character F1, and how often the
scenery is where a neighbouring frame has it, each with its standard error over stories; then the
differences from the entire stories, on the same stories.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # what measures is not in an installation

from contextualstory_jax.config.model_config import SamplingConfig  # noqa: E402
from contextualstory_jax.data.example import Example  # noqa: E402
from contextualstory_jax.data.shapes import SCENES, TURNS, draw_scene, story  # noqa: E402
from contextualstory_jax.data.shapes_reader import read_frames  # noqa: E402
from contextualstory_jax.sampling.arguments import read_sampling, stories_of  # noqa: E402
from contextualstory_jax.sampling.pipeline import StoryPipeline  # noqa: E402
from contextualstory_jax.sampling.prompts import Kept  # noqa: E402
from contextualstory_jax.sampling.sample import Generated  # noqa: E402
from contextualstory_jax.utils.atomic import write_json  # noqa: E402
from contextualstory_jax.utils.cli import ArgumentParser, run  # noqa: E402
from contextualstory_jax.utils.errors import require  # noqa: E402

RESAMPLES = 1000
FAR = 120.0  # RGB distance; farther pixels, such as a character's, count as this far
METRICS = ("scene", "character_f1", "exact", "scenery_of_neighbour")


class Counts(NamedTuple):
    """A frame of each story beside its labels."""

    scene: Int[np.ndarray, " n"]  # whether it is right
    right: Int[np.ndarray, " n"]  # characters that are there and should be
    characters: Int[np.ndarray, " n"]  # those that are there, and those that should be
    exact: Int[np.ndarray, " n"]
    scenery: Float[np.ndarray, " n"]  # share of the neighbours that have it in the same position


def scenery(images: UInt8[np.ndarray, "n h h 3"]) -> Int[np.ndarray, " n"]:
    """The nearest of the rendered scenes and positions, by number."""
    size = images.shape[1]
    distances = [
        np.minimum(np.linalg.norm(images - np.roll(view, turn * size // TURNS, 1), axis=-1), FAR)
        for view in (draw_scene(scene, size) for scene in SCENES)
        for turn in range(TURNS)
    ]
    return np.argmin([distance.mean(axis=(1, 2)) for distance in distances], axis=0)


def count(
    examples: Sequence[Example], images: UInt8[np.ndarray, "n f h h 3"], frame: int
) -> Counts:
    """A frame of each story, compared with its labels and its neighbours."""
    readings = read_frames(images[:, frame])
    labels = [example.labels[frame] for example in examples if example.labels]
    pairs = list(zip(readings, labels, strict=True))
    neighbours = [i for i in (frame - 1, frame + 1) if 0 <= i < images.shape[1]]
    own = scenery(images[:, frame])
    return Counts(
        np.array([shown.scene == true.scene for shown, true in pairs], int),
        np.array([len(shown.characters & true.characters) for shown, true in pairs]),
        np.array([len(shown.characters) + len(true.characters) for shown, true in pairs]),
        np.array([shown.characters == true.characters for shown, true in pairs], int),
        np.mean([scenery(images[:, i]) == own for i in neighbours], axis=0),
    )


def metrics(counts: Counts, weights: Float[np.ndarray, "*r n"]) -> Float[np.ndarray, "m *r"]:
    """`METRICS` over stories that count as often as `weights` say."""
    scene, right, characters, exact, same = (weights @ values for values in counts)
    stories = weights.sum(axis=-1)
    return np.stack([scene / stories, 2 * right / characters, exact / stories, same / stories])


def summary(ways: dict[str, Counts]) -> dict[str, dict[str, dict[str, float]]]:
    """Value, standard error and difference from the first way, of each metric and way."""
    n = len(next(iter(ways.values())).scene)
    resamples = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    values = {way: metrics(counts, np.ones(n)) for way, counts in ways.items()}
    spread = {way: metrics(counts, resamples.astype(float)) for way, counts in ways.items()}
    first = next(iter(ways))
    return {
        way: {
            metric: {
                "value": float(values[way][m]),
                "error": float(spread[way][m].std()),
                "difference": float(values[way][m] - values[first][m]),
                "difference_error": float((spread[way][m] - spread[first][m]).std()),
            }
            for m, metric in enumerate(METRICS)
        }
        for way in ways
    }


def generate(
    pipeline: StoryPipeline,
    examples: Sequence[Example],
    frame: int,
    sampling: SamplingConfig,
    batch_size: int,
    progress: Callable[[int], object],
) -> dict[str, Generated]:
    """The stories entire, from two seeds, and with a frame generated again."""
    stories = stories_of(examples, pipeline.model.config.unet)
    size = examples[0].images.shape[1:3]
    options = {"sampling": sampling, "size": size, "batch_size": batch_size, "progress": progress}
    entire = pipeline.draw(stories, seed=0, **options)
    keep = tuple(i != frame for i in range(entire.images.shape[1]))
    kept = [Kept(*arrays, keep) for arrays in zip(*entire, strict=True)]
    ways = {"entire": entire, "entire, other seed": pipeline.draw(stories, seed=1, **options)}
    ways["regenerated"] = pipeline.draw(stories, seed=1, kept=kept, **options)
    if pipeline.model.config.noise.kind == "pyoco_mixed":
        near = {"seed": 1, "shared_noise_seed": 0, "kept": kept}
        ways["regenerated near"] = pipeline.draw(stories, **near, **options)
    return ways


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The summary as lines."""
    lines = ["".join(f"{title:>22}" for title in ("", *METRICS))]
    for value, error in (("value", "error"), ("difference", "difference_error")):
        for way, row in found.items():
            cells = (f"{row[metric][value]:.3f} ± {row[metric][error]:.3f}" for metric in METRICS)
            lines.append("".join(f"{cell:>22}" for cell in (way, *cells)))
        lines.append("Differences from the entire stories:")
    return "\n".join(lines[:-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it."""
    parser = ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", help="by default the model that ships")
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--seed", type=int, default=777, help="of the dataset")
    parser.add_argument("--frame", type=int, default=2, help="to generate again")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    require(arguments.stories >= 2, "--stories must be at least 2")
    pipeline = StoryPipeline.from_pretrained(arguments.checkpoint)
    config = pipeline.model.config
    frames = range(int(config.unet.is_continuation), config.unet.n_frames)
    require(
        arguments.frame in frames, f"--frame must be in {frames[0]}..{frames[-1]} for this model"
    )
    sampling = read_sampling(config, None, num_inference_steps=arguments.steps)
    examples = [
        story(arguments.seed, number, "test", config.height) for number in range(arguments.stories)
    ]
    with tqdm(unit="story") as bar:
        ways = generate(
            pipeline, examples, arguments.frame, sampling, arguments.batch_size, bar.update
        )
    counts = {w: count(examples, made.images, arguments.frame) for w, made in ways.items()}
    found = summary(counts)
    print(table(found))
    if arguments.json:
        about: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k != "json"}
        write_json(arguments.json, {"settings": about, "ways": found})


if __name__ == "__main__":
    run(main)
