"""`contextualstory-jax export CHECKPOINT OUTPUT`: a checkpoint to the released layout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.commands.convert import add_dtype
from contextualstory_jax.utils.cli import ArgumentParser, run


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = ArgumentParser(
        prog=prog,
        description="Write a checkpoint in the layout of the released models, which the original "
        "and diffusers read.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder, or a training workdir")
    add("output", type=Path, metavar="OUTPUT", help="a folder that is not there, or empty")
    add("--weights", choices=("ema", "raw"), help="averaged or last; default: ema where it is")
    add_dtype(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax export") -> None:
    """Run the command. Raises `UserError` for bad input; OUTPUT is then as it was."""
    arguments = parse(argv, prog)
    # JAX takes seconds to import, and --help need not wait for it.
    from contextualstory_jax.conversion.export_torch import export_released
    from contextualstory_jax.conversion.import_torch import describe

    summary = export_released(
        arguments.checkpoint, arguments.output, arguments.weights, arguments.dtype
    )
    print(describe(summary))


if __name__ == "__main__":
    run(main)
