"""The mean StoryFlow values of a config's training split, and into a checkpoint with them."""

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
        usage="%(prog)s --config CONFIG --checkpoint DIR [--write] [--config.key=value ...]",
        description="The mean of the StoryFlow values of all of a config's training stories, in "
        "latents of a checkpoint's VAE, which generation uses. A training run stores the mean of "
        "the stories it has seen so far, or of all where it reads a latent cache.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG", help=f"whose stories to read: {NAME_OR_FILE}")
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="its folder, or a workdir")
    add("--write", action="store_true", help="store the mean in the newest checkpoint of DIR")
    add_arguments(parser)
    return parser.parse_with_overrides(argv)


def main(
    argv: Sequence[str] | None = None, prog: str = "contextualstory-jax storyflow-mean"
) -> None:
    """Run the command. Raises `UserError` for bad input."""
    arguments, overrides = parse(argv, prog)
    # JAX takes seconds to import, and --help need not wait for it.
    from contextualstory_jax.checkpoints.layout import write_storyflow
    from contextualstory_jax.distributed.compilation import use_compilation_cache
    from contextualstory_jax.training.cache_latents import storyflow_of_split

    config = load_config(arguments.config, overrides)
    connect(arguments)
    use_compilation_cache()
    mean = storyflow_of_split(config, arguments.checkpoint)
    say("mean StoryFlow values: " + ", ".join(f"{value:.6g}" for value in mean))
    if arguments.write:
        step = write_storyflow(arguments.checkpoint, mean)
        say(f"stored in checkpoint {step} of {arguments.checkpoint}")


if __name__ == "__main__":
    run(main)
