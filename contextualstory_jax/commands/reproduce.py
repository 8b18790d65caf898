"""Generate the test stories of a published task and measure them by every protocol."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.distributed.multihost import add_arguments, by_first, connect, say
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require

if TYPE_CHECKING:
    from contextualstory_jax.data.story_source import StorySource
    from contextualstory_jax.evaluation.results import Gallery, SplitStory
    from contextualstory_jax.sampling.pipeline import StoryPipeline

NAMES = tuple(
    f"{dataset}-{task}"
    for dataset in ("pororo", "flintstones")
    for task in ("visualization", "continuation")
)


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments. Raises `UserError` for wrong ones."""
    parser = ArgumentParser(
        prog=prog,
        description="Check a dataset, generate all of its test stories, measure them by every "
        "protocol, and write OUT/report.md and OUT/report.json beside the published figures. The "
        "same command resumes where it was stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("task", choices=NAMES, metavar="TASK", help=", ".join(NAMES))
    add("--data", required=True, type=Path, metavar="DIR", help="the dataset as published")
    add("--checkpoint", required=True, metavar="DIR|HUB", help="a folder, or OWNER/NAME on the Hub")
    add("--out", type=Path, metavar="DIR", help="where to write; default: ./TASK")
    add("--weights-dir", type=Path, metavar="DIR", help="of the metrics' networks")
    add("--seed", type=int, default=0, help="of the noise, and of what is random in metrics (0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to generate in")
    add("--batch-size", type=int, default=8, metavar="N", help="stories (8)")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    require(arguments.seed >= 0, f"--seed must be at least 0; got {arguments.seed}")
    require(
        arguments.batch_size >= 1, f"--batch-size must be at least 1; got {arguments.batch_size}"
    )
    arguments.out = arguments.out or Path(arguments.task)
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax reproduce") -> None:
    """Run the command. Raises `UserError` for bad input."""
    arguments = parse(argv, prog)
    connect(arguments)
    # Only here: importing JAX takes seconds, and --help and bad input must not wait.
    from contextualstory_jax.checkpoints.layout import read_model
    from contextualstory_jax.data.loader import open_stories, require_square
    from contextualstory_jax.distributed.compilation import use_compilation_cache
    from contextualstory_jax.evaluation import reproduction
    from contextualstory_jax.evaluation.features import Features
    from contextualstory_jax.evaluation.sample_split import open_gallery, story_of
    from contextualstory_jax.evaluation.weights import Weights
    from contextualstory_jax.sampling.pipeline import StoryPipeline
    from contextualstory_jax.sampling.pretrained import find_checkpoint
    from contextualstory_jax.utils.atomic import check_writable

    task, out, seed = reproduction.TASKS[arguments.task], arguments.out, arguments.seed
    check_writable(out)
    use_compilation_cache()
    folder = find_checkpoint(arguments.checkpoint)
    config = read_model(folder)
    require_square(config)
    reproduction.require_task(arguments.task, config.unet.is_continuation, folder)
    data = dataclasses.replace(load_config(task.config).data, root=str(arguments.data))
    source: Any = open_stories(data, "test", config.height)
    stories = [story_of(source, number) for number in range(len(source))]

    pipeline = StoryPipeline.load(folder, dtype=arguments.dtype)
    how = {"checkpoint": arguments.checkpoint, "seed": seed}
    gallery = open_gallery(out, pipeline, data, source.split, len(stories), **how)
    dataset = describe_dataset(source, stories, pipeline, task.stories)
    weights = Weights(arguments.weights_dir)
    given = int(config.unet.is_continuation)
    planned = functools.partial(reproduction.planned_folder, gallery, source, stories, given)
    without = reproduction.left_out(planned("generated"), planned("original"), weights)
    for name, reason in without.items():
        say(f"left out: {name}: {reason}")
    generate(pipeline, source, stories, gallery, arguments)
    protocols = reproduction.measure_protocols(out, weights, Features(), seed, without)
    report = {
        "task": arguments.task,
        "command": command(arguments),
        "dataset": dataset,
        "settings": gallery.settings,
        **reproduction.environment(),
        "published": reproduction.published(task),
        "protocols": protocols,
        "left_out": without,
        "weights_sha256": weights.sha256,
        "unverified": weights.unverified,
    }
    by_first(lambda: write_report(report, out))


def describe_dataset(
    source: StorySource, stories: Sequence[SplitStory], pipeline: StoryPipeline, reported: int
) -> dict[str, Any]:
    """Check a split, and describe it for the report.

    Raises `UserError` where images are missing or broken, in one line.
    """
    from contextualstory_jax.evaluation.reproduction import check_dataset, stories_sha256

    say(f"checking {len(stories):,} stories of the {source.split} split")
    if len(stories) != reported:
        say(f"warning: papers report a test split of {reported:,} stories")
    length = pipeline.model.config.text_encoder.max_position_embeddings
    counts = pipeline.tokenizer.counts
    return {
        "split": source.split,
        "stories": len(stories),
        "reported_stories": reported,
        "stories_sha256": stories_sha256(stories),
        "truncated_captions": check_dataset(source, lambda caption: counts([caption])[0], length),
    }


def generate(
    pipeline: StoryPipeline,
    source: StorySource,
    stories: Sequence[SplitStory],
    gallery: Gallery,
    arguments: argparse.Namespace,
) -> None:
    """Generate the stories that are not there, after an estimate of what that takes."""
    import jax

    from contextualstory_jax.evaluation import estimate
    from contextualstory_jax.evaluation.results_html import write_index
    from contextualstory_jax.evaluation.sample_split import generate_with_bar

    missing = sum(not gallery.has(story) for story in stories)
    if missing:
        count, kind = jax.device_count(), jax.devices()[0].device_kind
        for line in estimate.lines(
            missing,
            estimate.story_flops(pipeline.model.config),
            count * estimate.matmul_rate(arguments.dtype),
            f"{count} {kind} ({arguments.dtype})",
            estimate.weight_bytes(pipeline),
            arguments.batch_size,
        ):
            say(line)
    models, rows = {"frame": pipeline}, {"original": "original", "drawn": "frame"}
    generate_with_bar(models, source, stories, gallery, arguments.seed, arguments.batch_size)

    def finish() -> None:
        gallery.write_settings()
        write_index(gallery, arguments.task, stories, rows)

    by_first(finish)


def command(arguments: argparse.Namespace) -> str:
    """The command that gives the same report."""
    given = {"data": arguments.data, "checkpoint": arguments.checkpoint, "out": arguments.out}
    given |= {"seed": arguments.seed, "dtype": arguments.dtype, "batch-size": arguments.batch_size}
    if arguments.weights_dir:
        given["weights-dir"] = arguments.weights_dir
    options = (word for name, value in given.items() for word in (f"--{name}", str(value)))
    return shlex.join(("contextualstory-jax", "reproduce", arguments.task, *options))


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write `report.json` and `report.md`. Raises `UserError` where they cannot be written."""
    from contextualstory_jax.evaluation.reproduction_report import markdown
    from contextualstory_jax.utils.atomic import atomic_path, write_json

    write_json(out / "report.json", report)
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")
    print(f"{out / 'report.md'} and {out / 'report.json'}")


if __name__ == "__main__":
    run(main)
