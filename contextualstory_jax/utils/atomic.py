"""Atomic writes: a file or a folder is complete or does not exist."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.interruption import removing

PENDING = ".pending"  # in a folder: the files that are taking the place of older ones


def check_writable(folder: Path) -> None:
    """Raise `UserError` where a folder could not be made or written to; changes nothing."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    require(
        existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        f"cannot write to {folder}: {existing} is not a folder one may write to; choose another",
    )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a file or a folder at, which then takes the place of `path`.

    In a folder that is there already the files are replaced one by one, and others stay; whoever
    calls `finish_replacing` before reading finds all of them or none, also after a kill. Raises
    `UserError` where writing fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with removing(temporary):
            yield temporary
            if temporary.is_dir() and path.is_dir():
                finish_replacing(path)
                temporary.rename(path / PENDING)
                finish_replacing(path)
            else:
                temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from error


def finish_replacing(folder: Path) -> None:
    """Put pending files in their places, which a process that was killed had no time to do.

    Several processes may do so at once. Raises `OSError` where the folder cannot be written to.
    """
    pending = folder / PENDING
    with contextlib.suppress(FileNotFoundError):
        for file in pending.iterdir():
            with contextlib.suppress(FileNotFoundError):
                file.replace(folder / file.name)
        pending.rmdir()


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON. Raises `UserError` where it cannot be written."""
    with atomic_path(path) as temporary:
        text = json.dumps(values, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
