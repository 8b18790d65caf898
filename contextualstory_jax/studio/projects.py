"""Stories that the studio keeps: story folders, with older versions of each beside it.

::

    PROJECTS/.key            signs links
    PROJECTS/NAME/           a story folder as `generate` writes it
    PROJECTS/NAME/studio.json    sentences and settings as they are on the page, and locked frames
    PROJECTS/NAME/.versions/0 ...    story folders, one of which equals the story
    PROJECTS/NAME/.candidates/0 ...  story folders to choose from

A story is found by its link alone: its name and a signature that nobody can guess.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
import secrets
import shutil
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from contextualstory_jax.sampling.saved_story import JSON, OWN_FILES, SavedStory
from contextualstory_jax.utils.atomic import (
    PENDING,
    atomic_path,
    check_writable,
    finish_replacing,
    write_json,
)
from contextualstory_jax.utils.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
TEMPORARY = re.compile(r"\.(.+)\.\d+")  # of `atomic_path`, after a kill
PAGE = "studio.json"
MOST_VERSIONS = 20  # of a story; older ones are deleted
SIGNATURE = 32  # characters


@dataclasses.dataclass(frozen=True)
class Project:
    """A story of the studio."""

    folder: Path
    link: str
    lock: threading.RLock = dataclasses.field(repr=False)  # held while files change

    def read(self) -> SavedStory | None:
        """The story; None before its first frames.

        Raises:
            UserError: It is damaged, or is in the format of a newer version.
        """
        if not self._is_there():
            return None
        return SavedStory.read(self.folder)

    def read_page(self) -> dict[str, Any]:
        """Sentences, settings and locked frames as the page last had them."""
        try:
            values = json.loads((self.folder / PAGE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # a story that `generate` wrote
        return values if isinstance(values, dict) else {}

    def write_page(self, **values: Any) -> None:
        """Change some values of the page. Raises `UserError` where they cannot be written."""
        with self.lock:
            write_json(self.folder / PAGE, self.read_page() | values)

    def save(self, story: SavedStory) -> None:
        """Put a story in place of the one that is there, which can be had back by `undo`.

        Raises:
            UserError: It cannot be written.
        """
        with self.lock:
            versions, current = self._versions(), self._current()
            for number in versions:
                if current is not None and number > current:
                    self._delete(number)
            number = 0 if current is None else current + 1
            story.write(self._version(number))
            self._put(number)
            for old in self._versions()[:-MOST_VERSIONS]:
                self._delete(old)
            shutil.rmtree(self._candidates, ignore_errors=True)  # of the story before

    def step(self, by: int) -> None:
        """Undo with -1, redo with 1. Raises `UserError` where there is nothing to."""
        with self.lock:
            number = self._neighbour(by)
            if number is None:
                raise UserError(f"there is nothing to {'undo' if by < 0 else 'redo'}")
            self._put(number)
            shutil.rmtree(self._candidates, ignore_errors=True)

    def can_step(self, by: int) -> bool:
        """Whether there is something to undo (-1) or to redo (1)."""
        return self._neighbour(by) is not None

    def write_candidates(self, stories: Sequence[SavedStory]) -> None:
        """Keep stories to choose from, in place of those before."""
        with self.lock:
            shutil.rmtree(self._candidates, ignore_errors=True)
            for i, story in enumerate(stories):
                story.write(self._candidates / str(i))

    def read_candidates(self) -> list[SavedStory]:
        """The stories to choose from."""
        numbers = _numbers(self._candidates)
        return [SavedStory.read(self._candidates / str(number)) for number in numbers]

    @property
    def _candidates(self) -> Path:
        return self.folder / ".candidates"

    def _version(self, number: int) -> Path:
        return self.folder / ".versions" / str(number)

    def _versions(self) -> list[int]:
        return _numbers(self.folder / ".versions")

    def _delete(self, number: int) -> None:
        # First out of sight, so that a kill leaves no half of a version.
        hidden = self._version(number).with_name(f".{number}.0")
        self._version(number).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _is_there(self) -> bool:
        return (self.folder / JSON).exists() or (self.folder / PENDING / JSON).exists()

    def _neighbour(self, by: int) -> int | None:
        current = self._current()
        return None if current is None or current + by not in self._versions() else current + by

    def _current(self) -> int | None:
        """The number of the version that is in place; None where there is no story.

        A story that was written by others, such as `generate`, becomes the newest version.
        """
        if not self._is_there():
            return None
        finish_replacing(self.folder)
        versions = self._versions()
        for number in reversed(versions):
            if _same(self._version(number) / JSON, self.folder / JSON):
                return number
        number = versions[-1] + 1 if versions else 0
        names = [path.name for path in self.folder.iterdir() if OWN_FILES.fullmatch(path.name)]
        _copy(self.folder, names, self._version(number))
        return number

    def _put(self, number: int) -> None:
        version = self._version(number)
        names = [path.name for path in version.iterdir()]
        _copy(version, names, self.folder)
        for path in self.folder.iterdir():
            if path.name not in names and OWN_FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)


class Projects:
    """The folder with all stories of the studio."""

    def __init__(self, folder: Path):
        """Make the folder, and remove what a killed server left half written.

        Raises:
            UserError: The folder cannot be written.
        """
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = _read_key(folder / ".key")
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        for path in [*folder.glob(".*.*"), *folder.glob("*/.versions/.*")]:
            match = TEMPORARY.fullmatch(path.name)
            inside = path.parent != folder
            if match and path.is_dir() and (inside or (folder / match[1] / PAGE).exists()):
                shutil.rmtree(path, ignore_errors=True)

    def create(self) -> Project:
        """A project of a name of its own, whose folder its first file makes."""
        return self._project(secrets.token_urlsafe(9))

    def find(self, link: Any) -> Project:
        """The story of a link. Raises `UserError` where there is none."""
        name, _, signature = str(link).rpartition("~")
        known = NAME.fullmatch(name) is not None and hmac.compare_digest(
            signature.encode(errors="replace"), self._sign(name).encode()
        )
        if not known or not (self.folder / name).is_dir():
            raise UserError("there is no story with this link; open another, or begin a new one")
        return self._project(name)

    def all(self) -> Iterator[Project]:
        """All stories, also those that `generate` wrote into the folder."""
        for path in sorted(self.folder.iterdir()):
            named = NAME.fullmatch(path.name) is not None
            if named and ((path / JSON).is_file() or (path / PAGE).is_file()):
                yield self._project(path.name)

    def _sign(self, name: str) -> str:
        return hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()[:SIGNATURE]

    def _project(self, name: str) -> Project:
        return Project(self.folder / name, f"{name}~{self._sign(name)}", self._locks[name])


def _read_key(path: Path) -> bytes:
    """The key of a folder's links, made where there is none; its user alone may read it."""
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _same(one: Path, other: Path) -> bool:
    """Whether two files are copies of the same file."""
    same_time = one.is_file() and one.stat().st_mtime_ns == other.stat().st_mtime_ns
    return same_time and one.read_bytes() == other.read_bytes()


def _copy(source: Path, names: Collection[str], target: Path) -> None:
    """Copy files with their times, all or none."""
    with atomic_path(target) as temporary:
        temporary.mkdir(parents=True)
        for name in names:
            shutil.copy2(source / name, temporary / name)
