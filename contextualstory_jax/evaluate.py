"""`python -m contextualstory_jax.evaluate --out DIR`: generates the test split and measures it.

Where JAX runs in several processes, each generates a part, and the first writes the results of all.
From Python: `contextualstory_jax.evaluation.compare.evaluate` for a few stories.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contextualstory_jax.config.config_files import NAME_OR_FILE, load_config
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.distributed.multihost import (
    add_arguments,
    by_first,
    connect,
    say,
)
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require

if TYPE_CHECKING:
    from contextualstory_jax.evaluation.sample_split import Source

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
    from contextualstory_jax.data.loader import held_out_source, story_notes
    from contextualstory_jax.distributed.compilation import use_compilation_cache
    from contextualstory_jax.evaluation.compare import require_readable, table, untrained
    from contextualstory_jax.evaluation.metrics.characters import METRICS
    from contextualstory_jax.evaluation.results_html import write_index
    from contextualstory_jax.evaluation.sample_split import (
        generate_with_bar,
        measure_split,
        open_gallery,
        story_of,
    )
    from contextualstory_jax.sampling.pipeline import SHIPPED, StoryPipeline
    from contextualstory_jax.utils.atomic import check_writable, write_json

    check_writable(arguments.out)
    use_compilation_cache()
    measure_images = images_measurer(arguments)
    how = {"weights": arguments.weights, "dtype": arguments.dtype}
    pipeline = StoryPipeline.load(arguments.checkpoint or SHIPPED, **how)
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
    gallery = open_gallery(
        arguments.out,
        pipeline,
        data,
        source.split,
        count,
        checkpoint=str(arguments.checkpoint or "shipped"),
        seed=arguments.seed,
        metrics=METRICS if measured else (),
    )
    generate_with_bar(models, source, stories, gallery, arguments.seed, arguments.batch_size)

    def finish() -> None:
        gallery.write_settings()
        if measured:
            metrics = measure_split(source, stories, gallery, int(config.unet.is_continuation))
            write_json(arguments.out / "metrics.json", {"settings": gallery.settings, **metrics})
            print(table(metrics) + "\n")
        write_index(gallery, f"{data.name}: {gallery.settings['task']}", stories, rows)
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


if __name__ == "__main__":
    run(main)
