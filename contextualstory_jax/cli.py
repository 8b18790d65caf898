"""What the commands share: bad input ends in one line on stderr and status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from contextualstory_jax.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` for wrong arguments, where argparse prints its usage before the reason."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without `--config.key=value`, and each such one's `key=value`."""
    prefix = "--config."
    return (
        [argument for argument in argv if not argument.startswith(prefix)],
        [argument.removeprefix(prefix) for argument in argv if argument.startswith(prefix)],
    )


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
