"""Remote data folders, such as `gs://BUCKET/FOLDER`, copied to this machine to be read.

ArrayRecord reads local files only. A folder is copied once per machine, into the user's cache
folder (set by XDG_CACHE_HOME); later only changed files are copied. Any fsspec URL is accepted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from contextualstory_jax.data.story_source import check_inside
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.interruption import removing
from contextualstory_jax.utils.progress import bytes_bar

AT_ONCE = 8  # files
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ROOM = "make room, or set XDG_CACHE_HOME to a folder on another disk"


@functools.cache  # so that a run asks once, and continues without the network
def local_copy(root: str) -> Path:
    """A folder on this machine: `root` itself or, for a URL, a complete copy.

    Raises `UserError` where nothing is at the URL or it cannot be copied; what was copied is kept.
    """
    if "://" not in root:
        return Path(root)
    root = root.rstrip("/")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{root.rpartition('/')[2]}-{hashlib.sha256(root.encode()).hexdigest()[:16]}"
    folder = base / "contextualstory_jax" / "data" / name
    files, system = _listed(root)
    with _locked(folder):
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if str(path.relative_to(folder)) not in files:
                path.unlink()  # unfinished, or no longer there
        missing = {name: i for name, i in files.items() if not _is_copy(folder / name, i)}
        if missing:
            _copy(root, system, missing, folder)
    return folder


def _listed(root: str) -> tuple[dict[str, Mapping[str, Any]], fsspec.AbstractFileSystem]:
    """The fsspec info of each file, by its path in the folder, and the file system."""
    nothing = f"there is nothing at {root}; check the names of bucket and folder"
    try:
        system, path = fsspec.core.url_to_fs(root)
        system.invalidate_cache()
        found = system.find(path, detail=True)
    except FileNotFoundError as error:
        raise UserError(nothing) from error
    except ImportError as error:
        google = root.startswith(("gs:", "gcs:"))
        mend = "pip install 'contextualstory-jax[gcs]'" if google else "install it"
        raise UserError(f"{root} cannot be read ({_reason(error)}): {mend}") from error
    except Exception as error:  # of many kinds: the store's, its transport's
        raise UserError(
            f"{root} cannot be read ({_reason(error)}); check the name, the network and your "
            "access to it"
        ) from error
    files = {
        name.removeprefix(path).strip("/"): info
        for name, info in found.items()
        if not name.endswith("/")  # stores have such files in place of folders
    }
    require(bool(files), nothing)
    require("" not in files, f"{root} is a file; name the folder that it is in")
    sizes = [info.get("size") for info in files.values()]
    require(None not in sizes, f"{root} does not report the sizes of its files; copy it by hand")
    return {check_inside(name, root): info for name, info in files.items()}, system


def _copy(
    root: str,
    system: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> None:
    """Copy files, each of which gets its name when it is complete."""
    needed, free = sum(info["size"] for info in files.values()), shutil.disk_usage(folder).free
    require(
        needed < free,
        f"the copy of {root} in {folder} needs {needed / 1e9:.1f} GB more, and its disk has "
        f"{free / 1e9:.1f} GB left; {ROOM}",
    )
    bar = bytes_bar(needed, root)
    # Not fsspec's TqdmCallback, whose total is that of the file opened last.
    callback: Any = fsspec.Callback()
    callback.relative_update = bar.update

    def fetch(name: str) -> None:
        info, path = files[name], folder / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with removing(temporary):
                system.get_file(info["name"], str(temporary), callback=callback)
                size = temporary.stat().st_size
                require(size == info["size"], f"{root}/{name} was cut short; run again to resume")
                if (when := _when(info)) is not None:
                    os.utime(temporary, (when, when))
                temporary.replace(path)
        except UserError:
            raise
        except Exception as error:  # of many kinds, as above, and the disk's
            full = isinstance(error, OSError) and error.errno in FULL
            mend = ROOM if full else "run again to resume"
            raise UserError(
                f"{root}/{name} cannot be copied to {path} ({_reason(error)}); {mend}"
            ) from error

    with bar, ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(fetch, name) for name in files]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _is_copy(path: Path, info: Mapping[str, Any]) -> bool:
    """Whether a file has the size and modification time that fsspec reports."""
    if not path.is_file() or path.stat().st_size != info["size"]:
        return False
    when = _when(info)
    return when is None or int(path.stat().st_mtime) == int(when)


def _when(info: Mapping[str, Any]) -> float | None:
    """Modification time of a file in seconds; stores report it under several names, or not."""
    for key in ("mtime", "LastModified", "last_modified", "created"):
        if (when := info.get(key)) is not None:
            return when.timestamp() if hasattr(when, "timestamp") else float(when)
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; others wait, and then find it filled."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; {ROOM}") from error
    with lock:
        yield


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
