"""Train a classifier of a dataset's characters, for `measure --metrics characters`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.config.config_files import NAME_OR_FILE, load_config
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.distributed.multihost import add_arguments, connect, say
from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require

IMAGENET = "inception_v3_google-0cc3c7bd.pth"  # with the beginning of its SHA-256


def parse(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[argparse.Namespace, DataConfig]:
    """The command's arguments, and the dataset. Raises `UserError` for wrong ones."""
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s --config CONFIG --workdir DIR [options] [--config.data.key=value ...]",
        description="Fine-tune InceptionV3 on a dataset's labels of characters; the defaults are "
        "StoryViz's. WORKDIR/characters_DATASET.safetensors is what measure --metrics characters "
        "--weights-dir WORKDIR reads. Starting again in the same workdir resumes.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help=f"whose data: {NAME_OR_FILE}"
    )
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="to write to")
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="FILE",
        help=f"torchvision's ImageNet weights, {IMAGENET}; default: none",
    )
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="(50)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="frames (8)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, metavar="X", help="(1e-5)")
    parser.add_argument("--seed", type=int, default=0, help="of order, flips and dropout (0)")
    add_arguments(parser)
    arguments, overrides = parser.parse_with_overrides(argv)
    for override in overrides:
        require(
            override.startswith("data."),
            f"--config.{override}: of the config only its data are used; options have own names",
        )
    require(arguments.epochs >= 1, f"--epochs must be at least 1; got {arguments.epochs}")
    return arguments, load_config(arguments.config, overrides).data


def main(
    argv: Sequence[str] | None = None, prog: str = "contextualstory-jax train-classifier"
) -> None:
    """Run the command; exits with status 1 where training diverges. Raises `UserError`."""
    arguments, data = parse(argv, prog)
    connect(arguments)
    # Only here: importing JAX takes seconds, and --help and bad input must not wait.
    from contextualstory_jax.evaluation.weights import sha256
    from contextualstory_jax.training.train_classifier import train_classifier
    from contextualstory_jax.training.trainer import NonFiniteLoss

    if arguments.init_from is not None:
        digest = sha256(arguments.init_from)
        require(
            arguments.init_from.name != IMAGENET or digest[:8] in IMAGENET,
            f"{arguments.init_from} is damaged or another file: its SHA-256 begins with "
            f"{digest[:8]}; download it again, or rename it",
        )
    try:
        train_classifier(
            data,
            arguments.workdir,
            init_from=arguments.init_from,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
        )
    except NonFiniteLoss as error:
        sys.exit(f"error: {error}")
    result = arguments.workdir / f"characters_{data.name}.safetensors"
    if result.is_file() and not interruption.requested():
        say(
            f"{result}\nnext: contextualstory-jax measure GENERATED REFERENCE --metrics characters "
            f"--weights-dir {shlex.quote(str(arguments.workdir))}"
        )


if __name__ == "__main__":
    run(main)
