"""Shared parts of the commands: bad input ends in one line on stderr and status 2."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.errors import UserError

OUT_OF_MEMORY = (
    "the device has too little memory; take a smaller batch or image size, or 16-bit numbers"
)


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` for wrong arguments, where argparse prints its usage before the reason."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_with_overrides(
        self, argv: Sequence[str] | None
    ) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and of each `--config.key=value` among them `key=value`.

        Args:
            argv: Arguments, or None for the command line.
        """
        words, prefix = sys.argv[1:] if argv is None else argv, "--config."
        overrides = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
        rest = [word for word in words if not word.startswith(prefix)]
        return self.parse_args(rest), overrides


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`.

    A `UserError` becomes one line on stderr and exit status 2; Ctrl-C, one line and 130. What the
    package logs, from INFO on, are lines on stderr.
    """
    logger = logging.getLogger("contextualstory_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [logging.StreamHandler()]
    with interruption.watching():
        try:
            main()
        except UserError as error:
            _refuse(str(error))
        except RuntimeError as error:  # JAX's, which is not imported here, is one
            # A CPU's out-of-memory error has the code INTERNAL.
            if not re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
                raise
            _refuse(OUT_OF_MEMORY)


def _refuse(message: str) -> NoReturn:
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(2)
