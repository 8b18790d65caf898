"""`python -m contextualstory_jax.evaluate --out DIR`: generates the test split and measures it.

Where JAX runs in several processes, each generates a part, and the first writes the results of all.
From Python: `contextualstory_jax.evaluation.compare.evaluate` for a few stories.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextualstory_jax.config.config_files import NAME_OR_FILE, load_config
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.distributed.multihost import (
    add_arguments,
    by_first,
    connect,
    is_first,
    say,
)
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require

if TYPE_CHECKING:
    from contextualstory_jax.evaluation.sample_split import Source
    from contextualstory_jax.sampling.pipeline import StoryPipeline

SHAPES_STORIES = 64  # of those there is no end


def parse(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[argparse.Namespace, DataConfig]:
    """The command's arguments, and the data to test on. Raises `UserError` for wrong ones."""
    parser = ArgumentParser(
        prog=prog,
        description="Generate stories of the test split: OUT/index.html shows them beside the "
        "originals, OUT/frames.jsonl lists the frames. For the synthetic stories OUT/metrics.json "
        "holds metrics, with the originals as upper and the untrained model as lower bound. The "
        "same command resumes where it was stopped.",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help=f"whose data to test on, --config.data.key=value included: {NAME_OR_FILE}",
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="instead of the model that ships")
    parser.add_argument(
        "--stories",
        type=int,
        metavar="N",
        help=f"the first N alone; default: all, of the synthetic ones {SHAPES_STORIES}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema where it is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="stories (8)")
    group = parser.add_argument_group("measure the frames, too", "docs/tutorials/measure.md")
    group.add_argument("--metrics", metavar="LIST", help="such as fid,kid; OUT/PROTOCOL.json")
    group.add_argument("--protocol", default="pytorch-fid", metavar="NAME", help="(pytorch-fid)")
    group.add_argument("--weights-dir", type=Path, metavar="DIR", help="of the networks")
    add_arguments(parser)
    arguments, overrides = parser.parse_with_overrides(argv)
    require(
        arguments.stories is None or arguments.stories >= 1,
        f"--stories must be at least 1; got {arguments.stories}",
    )
    require(not overrides or arguments.config is not None, "--config.key=value needs --config")
    data = load_config(arguments.config, overrides).data if arguments.config else DataConfig()
    return arguments, data


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m contextualstory_jax.evaluate"
) -> None:
    """Run the command. Raises `UserError` for bad input."""
    arguments, data = parse(argv, prog)
    connect(arguments)
    # Only here: importing JAX takes seconds, and --help and bad input must not wait.
    import jax
    from tqdm import tqdm

    from contextualstory_jax.data.loader import held_out_source, story_notes
    from contextualstory_jax.distributed.compilation import use_compilation_cache
    from contextualstory_jax.evaluation.compare import require_readable, table, untrained
    from contextualstory_jax.evaluation.results import Gallery
    from contextualstory_jax.evaluation.results_html import write_index
    from contextualstory_jax.evaluation.sample_split import generate_split, measure_split, story_of
    from contextualstory_jax.sampling.pipeline import SHIPPED, StoryPipeline
    from contextualstory_jax.utils.atomic import check_writable, write_json

    check_writable(arguments.out)
    use_compilation_cache()
    measure_images = images_measurer(arguments)
    checkpoint = arguments.checkpoint or SHIPPED
    pipeline = StoryPipeline.load(checkpoint, weights=arguments.weights, dtype=arguments.dtype)
    config = pipeline.model.config
    models, rows = {"frame": pipeline}, {"original": "original", "drawn": "frame"}
    measured = data.name == "shapes"  # whose frames can be read
    if measured:
        require_readable(config.height, config.width)
        models["untrained"], rows["untrained"] = untrained(pipeline), "untrained"
    source = held_out_source(data, config.height)
    for note in story_notes(source, pipeline.tokenizer.truncation_note):
        say(note)
    count = count_stories(arguments, data, source)
    stories = [story_of(source, number) for number in range(count)]
    settings = describe(arguments, data, pipeline, source.split, count, measured)
    gallery = Gallery(arguments.out, settings)
    gallery.check()
    how = {"seed": arguments.seed, "batch_size": arguments.batch_size}
    with tqdm(
        total=len(stories[jax.process_index() :: jax.process_count()]),
        unit="story",
        dynamic_ncols=True,
        delay=0.5,  # seconds, in which bad input is refused: an error stands alone
        disable=not is_first(),
    ) as bar:
        generate_split(models, source, stories, gallery, **how, progress=bar.update)

    def finish() -> None:
        gallery.write_settings()
        if measured:
            given = int(config.unet.is_continuation)
            metrics = measure_split(source, stories, gallery, given)
            write_json(arguments.out / "metrics.json", {"settings": settings, **metrics})
            print(table(metrics) + "\n")
        write_index(gallery, f"{data.name}: {settings['task']}", stories, rows)
        print(f"{count} {'story' if count == 1 else 'stories'} in {arguments.out / 'index.html'}")

    by_first(finish)
    measure_images()


def count_stories(arguments: argparse.Namespace, data: DataConfig, source: Source) -> int:
    """How many stories to generate. Raises `UserError` for more than there are."""
    count = arguments.stories or (SHAPES_STORIES if data.name == "shapes" else len(source))
    require(
        count <= len(source),
        f"the {source.split} split has {len(source)} stories; --stories {count} are more",
    )
    return count


def images_measurer(arguments: argparse.Namespace) -> Callable[[], None]:
    """The measurement of the folder by `--metrics`, which does nothing without.

    Names, protocol and weights are checked now. Raises `UserError` for wrong ones.
    """
    from contextualstory_jax.evaluation import report
    from contextualstory_jax.evaluation.features import Features
    from contextualstory_jax.evaluation.measurement import Options
    from contextualstory_jax.evaluation.weights import Weights

    if arguments.metrics is None:
        return lambda: None
    metrics = report.chosen_metrics(arguments.metrics)
    protocol = report.chosen_protocol(arguments.protocol)
    weights = Weights(arguments.weights_dir)
    report.check_weights(metrics, weights)

    def measure() -> None:
        out, options = arguments.out, Options(seed=arguments.seed)
        measurement = report.prepare(out, out, protocol, weights, Features(), options)
        found = report.measure(metrics, measurement)
        report.publish(found, out / f"{protocol.name}.json")

    return measure


def describe(
    arguments: argparse.Namespace,
    data: DataConfig,
    pipeline: StoryPipeline,
    split: str,
    stories: int,
    measured: bool,
) -> dict[str, Any]:
    """Settings that decide the frames, the number of stories, and which metrics."""
    from contextualstory_jax.checkpoints.layout import weights_digest
    from contextualstory_jax.evaluation.metrics.characters import METRICS

    config = pipeline.model.config
    named = {
        f"{part}.{name}": leaf
        for part, leaves in pipeline.params.items()
        for name, leaf in leaves.items()
    }
    return {
        "checkpoint": str(arguments.checkpoint or "shipped"),
        "step": pipeline.step,
        "weights": pipeline.weights,
        "dtype": arguments.dtype,
        "task": "continuation" if config.unet.is_continuation else "visualization",
        "data": dataclasses.asdict(data),
        "split": split,
        "stories": stories,
        "seed": arguments.seed,
        "height": config.height,
        "width": config.width,
        "sampling": dataclasses.asdict(config.sampling),
        "weights_sha256": weights_digest(named),
        "storyflow": pipeline.storyflow.tolist(),
        "metrics": list(METRICS) if measured else [],
    }


if __name__ == "__main__":
    run(main)
