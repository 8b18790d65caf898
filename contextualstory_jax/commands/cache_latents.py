"""Encode a config's training split once, for `train --config.data.latents=DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.config.config_files import NAME_OR_FILE, load_config
from contextualstory_jax.distributed.multihost import add_arguments, connect, say
from contextualstory_jax.utils.cli import ArgumentParser, run


def parse(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The command's arguments, and its overrides `key=value`."""
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s --config CONFIG --checkpoint DIR --out DIR [--config.key=value ...]",
        description="Store the VAE's and the text encoder's outputs for a config's training "
        "stories, and the mean of their StoryFlow values, so that training need not compute them "
        "at every step: train --config CONFIG --config.data.latents=DIR",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG", help=f"to be trained: {NAME_OR_FILE}")
    add(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="the folder whose VAE and text encoder encode: that which training starts from "
        "(init_from), or its workdir",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="a folder that is not there")
    add_arguments(parser)
    return parser.parse_with_overrides(argv)


def main(
    argv: Sequence[str] | None = None, prog: str = "contextualstory-jax cache-latents"
) -> None:
    """Run the command. Raises `UserError` for bad input; nothing is then left behind."""
    arguments, overrides = parse(argv, prog)
    # JAX takes seconds to import, and --help need not wait for it.
    from contextualstory_jax.distributed.compilation import use_compilation_cache
    from contextualstory_jax.training.cache_latents import cache_latents

    config = load_config(arguments.config, overrides)
    connect(arguments)
    use_compilation_cache()
    say(str(cache_latents(config, arguments.checkpoint, arguments.out)))


if __name__ == "__main__":
    run(main)
