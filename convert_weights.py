"""`python convert_weights.py SOURCE OUTPUT`: released weights to a checkpoint folder, and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.cli import ArgumentParser, run
from contextualstory_jax.config import require


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = ArgumentParser(
        description="Convert a released model to a checkpoint folder for generate, evaluate and "
        "train --config.init_from; with --export, back to the released layout.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a pipeline folder, a training checkpoint of the original, Stable Diffusion 2.1-base, "
        "or the Hub id of one; with --export a checkpoint folder",
    )
    add("output", type=Path, metavar="OUTPUT", help="a folder that is not there, or empty")
    add("--revision", metavar="R", help="of the Hub id: a branch, a tag or a commit")
    add("--export", action="store_true", help="write the released layout")
    add(
        "--weights",
        choices=("ema", "raw"),
        help="to export: averaged or last; default: averaged where there are",
    )
    add(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="of the weights written; default: keep",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for bad input; OUTPUT is then as it was."""
    arguments = parse(argv)
    # JAX takes seconds to import, and --help need not wait for it.
    from contextualstory_jax.convert import describe, import_released
    from contextualstory_jax.export import export_released
    from contextualstory_jax.hub import locate

    if arguments.export:
        require(arguments.revision is None, "--revision is of Hub ids; leave it out with --export")
        summary = export_released(
            Path(arguments.source), arguments.output, arguments.weights, arguments.dtype
        )
    else:
        require(arguments.weights is None, "--weights goes with --export")
        folder, origin = locate(arguments.source, arguments.revision)
        summary = import_released(folder, arguments.output, arguments.dtype, origin)
    print(describe(summary))


if __name__ == "__main__":
    run(main)
