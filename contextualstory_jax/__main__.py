"""`contextualstory-jax COMMAND ...`, also `python -m contextualstory_jax COMMAND ...`."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
from collections.abc import Sequence

from contextualstory_jax import __version__
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import UserError

# Each command's module, and one line about it.
COMMANDS = {
    "generate": ("generate", "generate the images of a story"),
    "train": ("train", "train a model"),
    "evaluate": ("evaluate", "generate the test stories of a dataset and measure them"),
    "measure": ("commands.measure", "measure generated images: FID, KID and others, by protocol"),
    "reproduce": (
        "commands.reproduce",
        "generate the test stories of a published task, and report every protocol",
    ),
    "train-vae": ("commands.train_vae", "train a VAE by itself, for the model to start from"),
    "train-classifier": (
        "commands.train_classifier",
        "train a classifier of a dataset's characters, for a metric",
    ),
    "studio": ("commands.studio", "serve a page to write stories and change their frames"),
    "convert": ("commands.convert", "convert a released model to a checkpoint folder"),
    "export": ("commands.export", "write a checkpoint in the layout of the released models"),
    "push": ("commands.push", "put a checkpoint on the Hugging Face Hub, with a model card"),
    "prepare": ("commands.prepare", "check a dataset and write it in shards"),
    "cache-latents": ("commands.cache_latents", "encode a dataset once, for faster training"),
    "storyflow-mean": ("commands.storyflow_mean", "compute a dataset's mean StoryFlow values"),
}


def parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command's name and its arguments. Raises `UserError` where there is no such command."""
    rows = [f"  {name:<16}{about}" for name, (_, about) in COMMANDS.items()]
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s COMMAND ...",
        description="Story visualization: images that belong together, from sentences.",
        epilog="\n".join(("commands:", *rows, "", "%(prog)s COMMAND --help says more of each.")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"contextualstory-jax {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        raise UserError(f"name a command: {', '.join(COMMANDS)}")
    if arguments.command not in COMMANDS:
        [closest] = difflib.get_close_matches(arguments.command, COMMANDS, n=1, cutoff=0)
        raise UserError(
            f"no command {arguments.command!r}; closest: {closest}; {prog} --help lists all"
        )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "python -m contextualstory_jax") -> None:
    """Run the command that the first argument names. Raises `UserError` for bad input."""
    arguments = parse(argv, prog)
    module, _ = COMMANDS[arguments.command]
    command = importlib.import_module(f"contextualstory_jax.{module}")
    command.main(arguments.arguments, f"{prog} {arguments.command}")


def script() -> None:
    """Run the installed `contextualstory-jax`."""
    run(functools.partial(main, prog="contextualstory-jax"))


if __name__ == "__main__":
    run(main)
