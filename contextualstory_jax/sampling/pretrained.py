"""Checkpoint folders by name: the model that ships, a folder, or a Hub id.

Checkpoint folders that `push` uploaded are read from the Hub's cache. Released weights are
converted once into the user's cache and then read from there:

    CACHE/models/OWNER--NAME/COMMIT/          converted from the Hub
    CACHE/models/OWNER--NAME/refs/REVISION    the commit that a revision named last
    CACHE/models/folders/NAME-DIGEST/         converted from a folder, by its files' sizes and times
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from contextualstory_jax.checkpoints.layout import write_text
from contextualstory_jax.config.train_config import SHIPPED
from contextualstory_jax.conversion.hub import check_id, find_commit, locate
from contextualstory_jax.conversion.import_torch import import_released
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import user_cache


def find_checkpoint(
    name_or_path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The checkpoint folder of a model.

    Args:
        name_or_path: a training workdir, a converted folder, a folder in the released layout or a
            Hub id; None for the model that ships.
        revision: a branch, tag or commit of the Hub id.
        cache_dir: for converted models; by default in the user's cache folder.

    Raises:
        UserError: where there is none, or what there is cannot be fetched or converted.
    """
    require(
        name_or_path is None or isinstance(name_or_path, str | os.PathLike),
        f"a model must be a folder or a Hub id OWNER/NAME; got {name_or_path!r}",
    )
    cache = Path(cache_dir) if cache_dir is not None else user_cache() / "models"
    folder = SHIPPED if name_or_path is None else Path(name_or_path)
    if not folder.exists():
        return _from_hub(str(name_or_path), revision, cache)
    require(revision is None, f"revision is for Hub ids, and {folder} is a folder; leave it out")
    if (folder / "model.json").exists() or not (folder / "unet").is_dir():
        return folder
    converted = cache / "folders" / f"{folder.resolve().name}-{_digest(folder)}"
    _convert(folder, converted, {"folder": str(folder)})
    return converted


def _from_hub(name: str, revision: str | None, cache: Path) -> Path:
    """The checkpoint folder of a Hub id, also without a network where it is there already."""
    check_id(name)
    models = cache / name.replace("/", "--")
    ref = models / "refs" / re.sub(r"[^\w.-]", "_", revision or "main")
    commit = find_commit(name, revision) or (ref.read_text() if ref.is_file() else None)
    if commit is None or not (models / commit / "model.json").is_file():
        snapshot, origin = locate(name, revision)
        if (snapshot / "model.json").is_file():  # pushed from here
            return snapshot
        commit = snapshot.name
        _convert(snapshot, models / commit, origin)
    with contextlib.suppress(OSError):  # where the cache is read-only, it cannot change either
        ref.parent.mkdir(exist_ok=True)
        write_text(ref, commit)
    return models / commit


def _convert(source: Path, output: Path, origin: Mapping[str, str]) -> None:
    """Convert a released folder, unless that was done; other processes wait for it."""
    if (output / "model.json").is_file():
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(output.with_name(f"{output.name}.lock")):
            if not (output / "model.json").is_file():
                print(f"converting {source} to {output}, once", file=sys.stderr)
                import_released(source, output, origin=origin)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror}; choose another cache_dir"
        ) from error


def _digest(folder: Path) -> str:
    """A short digest of a folder's path and of its files' sizes and times."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.glob("**/*") if path.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
