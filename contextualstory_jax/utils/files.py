"""Checks of input files before they are opened, text by the line, and the user's cache folder."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from contextualstory_jax.utils.errors import UserError, require

OTHERS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_file(path: Path, fix: str) -> None:
    """Raise `UserError` unless `path` is a file, or a link to one.

    To open anything else may take for ever: a FIFO waits for its writer.

    Args:
        path: The file.
        fix: The end of the message.
    """
    try:
        kind = OTHERS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {fix}") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not a path; {fix}") from error
    require(kind is None, f"{path} is {kind}, not a file; {fix}")


def has_file(path: Path) -> bool:
    """Whether an optional file is there. Raises `UserError` for a link to nothing."""
    there = os.path.exists(path)  # unlike Path's, also of a path that the system refuses
    require(there or not os.path.islink(path), f"{path} is a link to nothing; replace or delete it")
    return there


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place, `path:number`.

    Raises `UserError` where the file is missing or is not UTF-8 text.
    """
    check_file(path, "name a file of stories")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a file of stories") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    # Not splitlines, which also splits at characters that a JSON string may hold.
    numbered = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), start=1)]
    return [(where, line) for where, line in numbered if line.strip()]


def read_json_lines(
    path: Path, keys: Collection[str], form: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line, each with its place, `path:number`.

    Args:
        path: The file; its blank lines are skipped.
        keys: Keys that an object may have; `id`, a string, it must have.
        form: The form of a line, for the end of messages.

    Raises:
        UserError: The file cannot be read, or a line is no such object.
    """
    for where, line in read_lines(path):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise UserError(f"{where} is not JSON ({reason}); {form}") from error
        except (ValueError, RecursionError) as error:  # too many digits, or too deep
            raise UserError(f"{where} is not JSON; {form}") from error
        require(isinstance(values, dict), f"{where} is not a JSON object; {form}")
        unknown = sorted(values.keys() - keys)
        require(not unknown, f"{where} has an unknown key {unknown[:1]}; {form}")
        require(isinstance(values.get("id"), str), f"{where} needs an id, a string; {form}")
        yield where, values


def user_cache() -> Path:
    """The package's folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contextualstory_jax"
