"""What the commands share: bad input ends in one line on stderr and status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from contextualstory_jax.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` for wrong arguments, where argparse prints its usage before the reason."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
