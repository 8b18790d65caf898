"""`contextualstory-jax convert SOURCE OUTPUT`: released weights to a checkpoint folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.utils.cli import ArgumentParser, run


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = ArgumentParser(
        prog=prog,
        description="Convert a released model to a checkpoint folder for generate, evaluate and "
        "train --config.init_from. `export` (convert_weights.py --export) is the way back.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a pipeline folder, a training checkpoint of the original, Stable Diffusion 2.1-base, "
        "or the Hub id of one",
    )
    add("output", type=Path, metavar="OUTPUT", help="a folder that is not there, or empty")
    add("--revision", metavar="R", help="of the Hub id: a branch, a tag or a commit")
    add_dtype(parser)
    return parser.parse_args(argv)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the option for the dtype of the weights written, which `export` has too."""
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="of the weights written; default: keep",
    )


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax convert") -> None:
    """Run the command. Raises `UserError` for bad input; OUTPUT is then as it was."""
    arguments = parse(argv, prog)
    # JAX takes seconds to import, and --help need not wait for it.
    from contextualstory_jax.conversion.hub import locate
    from contextualstory_jax.conversion.import_torch import describe, import_released

    folder, origin = locate(arguments.source, arguments.revision)
    print(describe(import_released(folder, arguments.output, arguments.dtype, origin)))


if __name__ == "__main__":
    run(main)
