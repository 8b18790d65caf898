"""`python -m contextualstory_jax.train --config configs/NAME.py --workdir DIR [--config.key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contextualstory_jax.config import TrainConfig
from contextualstory_jax.errors import UserError

# JAX takes seconds to import and --help must not wait: it is imported where work begins.


def train_and_evaluate(config: TrainConfig | Mapping[str, Any], workdir: str | Path) -> Any:
    """Train a recipe (a `TrainConfig`, or what `get_config()` returns) in a workdir; returns the last `TrainState`.

    Raises `UserError` for what the user can mend and `trainer.NonFiniteLoss` where training diverges.
    """
    from contextualstory_jax import trainer
    from contextualstory_jax.recipes import train_config

    if not isinstance(config, TrainConfig):
        config = train_config(config)
    return trainer.train_and_evaluate(config, Path(workdir))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The named arguments, and the overrides `key=value`."""
    parser = argparse.ArgumentParser(
        prog="python -m contextualstory_jax.train",
        description="Train a recipe; starting again in the same workdir goes on from its last checkpoint.",
        epilog="Any value of the recipe can be overridden: --config.optimizer.learning_rate=1e-4",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py", help="recipe, e.g. configs/shapes.py"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="checkpoints, logs and samples go here"
    )
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    return parser.parse_args([a for a in argv if not a.startswith("--config.")]), overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 where training diverged, 2 for bad input."""
    arguments, overrides = parse(sys.argv[1:] if argv is None else argv)
    try:
        from contextualstory_jax.recipes import load_recipe

        config = load_recipe(arguments.config, overrides)
        from contextualstory_jax import trainer

        try:
            trainer.train_and_evaluate(config, Path(arguments.workdir))
        except trainer.NonFiniteLoss as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
