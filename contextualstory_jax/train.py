"""`python -m contextualstory_jax.train`: a config in, a model out; `--help` lists the rest."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextualstory_jax.config.config_files import NAME_OR_FILE, load_config, train_config
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.distributed.multihost import add_arguments, connect, say
from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.cli import ArgumentParser, run

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from contextualstory_jax.training.train_step import TrainState

# JAX takes seconds to import, and neither --help nor a mistake in the config need wait for it: the
# trainer is imported where work begins.


def train_and_evaluate(
    config: TrainConfig | ConfigDict | Mapping[str, Any], workdir: str | Path
) -> TrainState:
    """Train a config, as `get_config()` returns it, in a workdir, and return the last state.

    Raises `UserError` for what the user can fix and `trainer.NonFiniteLoss` where training
    diverges.
    """
    from contextualstory_jax.training import trainer

    if not isinstance(config, TrainConfig):
        config = train_config(config)
    return trainer.train_and_evaluate(config, Path(workdir))


DESCRIPTION = "Train a config. Starting again in the same workdir resumes from its last checkpoint."


def parse(
    argv: Sequence[str] | None = None, prog: str | None = None, description: str = DESCRIPTION
) -> tuple[argparse.Namespace, list[str]]:
    """The command's arguments, and its overrides `key=value`."""
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s --config CONFIG --workdir DIR [--config.key=value ...]",
        description=description,
        epilog="--config.key=value overrides a value of the config, for example "
        "--config.optimizer.learning_rate=1e-4",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help=f"to train: {NAME_OR_FILE}"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=Path,
        metavar="DIR",
        help="for checkpoints, logs and samples; made where it is not there",
    )
    add_arguments(parser)
    return parser.parse_with_overrides(argv)


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m contextualstory_jax.train"
) -> None:
    """Run the command; exits with status 1 where training diverges.

    Raises `UserError` for bad input, before anything is written.
    """
    arguments, overrides = parse(argv, prog)
    config = load_config(arguments.config, overrides)
    connect(arguments)
    from contextualstory_jax.training import trainer

    if step := finish(trainer.train_and_evaluate, config, arguments.workdir):
        say(results(arguments.workdir, step, arguments.config, overrides))


def finish(
    train: Callable[[TrainConfig, Path], TrainState], config: TrainConfig, workdir: Path
) -> int | None:
    """Train; the last step where the run came to its end. Exits with status 1 where it diverges."""
    from contextualstory_jax.training import trainer

    try:
        state = train(config, workdir)
    except trainer.NonFiniteLoss as error:
        sys.exit(f"error: {error}")
    finished = int(state.step) >= config.steps and not interruption.requested()
    return int(state.step) if finished else None


def results(workdir: Path, step: int, config: str, overrides: Sequence[str]) -> str:
    """Where a finished run's results are, and the commands that use them."""
    data = [f"--config.{override}" for override in overrides if override.startswith("data.")]
    generate = ["--checkpoint", str(workdir), "--story", "story.txt", "--out", "out"]
    evaluate = ["--checkpoint", str(workdir), "--config", config, *data, "--out", "evaluation"]
    return (
        f"{workdir}: checkpoints/{step}, samples/, metrics.jsonl, tensorboard/\n"
        "next: contextualstory-jax generate " + shlex.join(generate) + "\n"
        "      contextualstory-jax evaluate " + shlex.join(evaluate)
    )


if __name__ == "__main__":
    run(main)
