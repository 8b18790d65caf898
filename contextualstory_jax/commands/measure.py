"""FID, KID and the field's other metrics of generated images, under a named protocol."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.distributed.multihost import add_arguments, connect, is_first
from contextualstory_jax.utils.cli import ArgumentParser, run


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments. Raises `UserError` for wrong ones."""
    parser = ArgumentParser(
        prog=prog,
        description="Measure generated images beside reference images: two folders of images, or "
        "one that `evaluate` wrote, given twice, to compare its frames with its originals. "
        "Features are kept in the user's cache folder, so that the same command resumes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("generated", type=Path, metavar="GENERATED", help="a folder")
    add("reference", type=Path, metavar="REFERENCE", help="a folder, or statistics (FILE.npz)")
    add("--metrics", default="fid", metavar="LIST", help="with commas between (fid)")
    add("--protocol", default="pytorch-fid", metavar="NAME", help="docs/tutorials/measure.md")
    add("--weights-dir", type=Path, metavar="DIR", help="of the networks; default: a cache folder")
    add(
        "--compare",
        type=Path,
        metavar="DIR",
        help="a folder of the same stories by another model: the difference is reported too",
    )
    add(
        "--seeds",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of the same stories with other seeds: mean and deviation are reported too",
    )
    add("--out", type=Path, metavar="FILE.json", help="write the report there too")
    add("--save-statistics", type=Path, metavar="FILE.npz", help="the reference's, for next time")
    add("--seed", type=int, default=0, help="of random reference frames and distractors (0)")
    add("--batch-size", type=int, default=32, metavar="N", help="images per device (32)")
    add("--kid-subsets", type=int, default=100, metavar="N", help="that KID averages over (100)")
    add("--kid-subset-size", type=int, default=1000, metavar="N", help="images in each (1000)")
    add("--kid-seed", type=int, default=2020, help="of the subsets (2020)")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for values out of range."""
    from contextualstory_jax.utils.errors import require

    for name, least in (
        ("seed", 0),
        ("batch_size", 1),
        ("kid_subsets", 1),
        ("kid_subset_size", 2),
        ("kid_seed", 0),
    ):
        value, option = getattr(arguments, name), name.replace("_", "-")
        require(value >= least, f"--{option} must be at least {least}; got {value}")
    require(arguments.kid_seed < 2**32, f"--kid-seed must be below 2**32; got {arguments.kid_seed}")


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax measure") -> None:
    """Run the command. Raises `UserError` for bad input."""
    arguments = parse(argv, prog)
    connect(arguments)
    # JAX takes seconds to import, and --help need not wait for it.
    from contextualstory_jax.distributed.compilation import use_compilation_cache
    from contextualstory_jax.evaluation import report
    from contextualstory_jax.evaluation.features import Features
    from contextualstory_jax.evaluation.measurement import Options
    from contextualstory_jax.evaluation.metrics.fid import reference_statistics
    from contextualstory_jax.evaluation.statistics import write_statistics
    from contextualstory_jax.evaluation.weights import Weights
    from contextualstory_jax.utils.atomic import check_writable

    metrics = report.chosen_metrics(arguments.metrics)
    protocol = report.chosen_protocol(arguments.protocol)
    for file in (arguments.out, arguments.save_statistics):
        if file is not None:
            check_writable(file.parent)
    use_compilation_cache()
    measurement = report.prepare(
        arguments.generated,
        arguments.reference,
        protocol,
        Weights(arguments.weights_dir),
        Features(arguments.batch_size),
        Options(
            seed=arguments.seed,
            kid_subsets=arguments.kid_subsets,
            kid_subset_size=arguments.kid_subset_size,
            kid_seed=arguments.kid_seed,
        ),
    )
    found = report.measure(metrics, measurement, seeds=arguments.seeds, compared=arguments.compare)
    if arguments.save_statistics is not None:
        first = reference_statistics(measurement)[0]
        if is_first():
            write_statistics(arguments.save_statistics, first)
    report.publish(found, arguments.out)


if __name__ == "__main__":
    run(main)
