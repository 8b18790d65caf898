"""The exception for bad input: commands print it as one line and exit with status 2."""

from __future__ import annotations

import reprlib


class UserError(ValueError):
    """Bad input; the message names the cause and the fix in one line."""


def brief(value: object) -> str:
    """The beginning of a value, however deep, as a message quotes it in one line."""
    return " ".join(reprlib.repr(value).split())[:60]


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)
