"""Writer of a prepared dataset: shards, a note on the contents of each, and the work folder.

Shards of images are written by several processes into `OUT.partial`, each under its name once it
is complete and with a note beside it, so that a run that was stopped resumes. The folder gets its
name when everything is in it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from contextualstory_jax.data import images
from contextualstory_jax.data.images import fit_square
from contextualstory_jax.data.prepared import PICTURES, STORIES
from contextualstory_jax.data.story_source import StoryRecord
from contextualstory_jax.utils.errors import UserError
from contextualstory_jax.utils.interruption import before_processes, check, removing

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from contextualstory_jax.data.tfds_builders import Dataset, Rows

OPTIONS = "group_size:1,uncompressed"  # a record can be read alone; why raw: `tfds_builders.py`
DATASET = "dataset"  # in the work folder: renamed to `OUT` at the end


class _Note(NamedTuple):
    """Contents of a shard: the number of records of each file, and the errors of broken ones.

    `remarks` are those of its process so far, which the first process logs. `stamps` are the
    files' sizes and times of change when they were read.
    """

    counts: list[int]
    broken: dict[str, str]
    remarks: dict[str, str]
    stamps: list[list[int] | None]


@dataclasses.dataclass(frozen=True)
class PictureShard:
    """The images in some files; `read` gives all that a file has, in the order of choice."""

    paths: tuple[Path, ...]
    read: Callable[[Path], list[Image.Image]]
    size: int


def write_pictures(
    dataset: Dataset,
    shards: Sequence[PictureShard],
    workers: int,
    progress: Callable[[int, int], object],
) -> tuple[dict[Path, Rows], dict[Path, str]]:
    """Write the missing shards; return the rows of each file's images, and the broken files."""
    from contextualstory_jax.data.tfds_builders import Rows

    paths = dataset.paths(PICTURES, len(shards))
    total, done = sum(len(shard.paths) for shard in shards), 0
    notes: dict[int, _Note] = {}
    tasks = []
    for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
        note = _read_note(path)
        # Broken files may have been fixed.
        if note is None or note.broken or note.stamps != list(map(_stamp, shard.paths)):
            tasks.append((number, shard, dataset.features, path))
        else:
            notes[number] = note
            done += len(shard.paths)
    progress(done, total)
    for number, note in _run(tasks, workers):
        notes[number] = note
        done += len(note.counts)
        progress(done, total)
        check()

    ordered = [notes[number] for number in range(len(shards))]
    for what, name in chain.from_iterable(note.remarks.items() for note in ordered):
        images.remark(what, name)
    dataset.write_info({PICTURES: [sum(note.counts) for note in ordered]})
    files = [path for shard in shards for path in shard.paths]
    counts = list(chain.from_iterable(note.counts for note in ordered))
    ends = accumulate(counts)
    rows = {
        path: Rows(end - count, count) for path, count, end in zip(files, counts, ends, strict=True)
    }
    broken = {Path(path): message for note in ordered for path, message in note.broken.items()}
    return rows, broken


def write_stories(
    dataset: Dataset, stories: Mapping[str, Sequence[StoryRecord]], rows: Mapping[Path, Rows]
) -> None:
    """Write the stories of each split, in one shard."""
    from contextualstory_jax.data.tfds_builders import story_record

    for split, of_split in stories.items():
        (path,) = dataset.paths(split, 1)
        with _writer(path) as write:
            for story in of_split:
                write(dataset.features.serialize_example(story_record(story, rows)))
    dataset.write_info({split: [len(of_split)] for split, of_split in stories.items()})


def _run(tasks: list[tuple[Any, ...]], workers: int) -> Iterator[tuple[int, _Note]]:
    """The notes of shards as they are written."""
    if workers == 1 or len(tasks) <= 1:
        yield from (_write_shard(*task) for task in tasks)
        return
    before_processes()
    # Spawned, not forked, because ArrayRecord has threads.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_worker
    )
    try:
        futures = [pool.submit(_write_shard, *task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that wrote shards was killed, perhaps out of memory; run again, with "
            "fewer workers, to resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave remarks to the parent, and end with it, even by a kill."""
    images.logger.disabled = True

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(
    number: int, shard: PictureShard, features: tfds.features.FeaturesDict, path: Path
) -> tuple[int, _Note]:
    """Write one shard of images, and then its note."""
    from contextualstory_jax.data.tfds_builders import picture_serializer

    note = _Note([], {}, images.remarks, [])
    serialize = picture_serializer(features, shard.size)
    with _writer(path) as write:
        for file in shard.paths:
            note.stamps.append(_stamp(file))  # before it is read, lest a change be missed
            try:
                pictures = [fit_square(picture, shard.size) for picture in shard.read(file)]
            except UserError as error:
                pictures, note.broken[str(file)] = [], str(error)
            for picture in pictures:
                write(serialize(picture))
            note.counts.append(len(pictures))
            check()
    _write_text(_note_path(path), json.dumps(note))
    return number, note


def _stamp(path: Path) -> list[int] | None:
    """The size of a file in bytes and when it was changed, in ns; None where there is none."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return None
    return [about.st_size, about.st_mtime_ns]


def _note_path(shard: Path) -> Path:
    return shard.parents[2] / "notes" / f"{shard.name}.json"


def _read_note(shard: Path) -> _Note | None:
    """Notes of an earlier run on a shard; None where either is missing or the note damaged."""
    note = _read_json(_note_path(shard))
    intact = isinstance(note, list) and len(note) == len(_Note._fields) and shard.is_file()
    return _Note(*note) if intact else None


def _read_json(path: Path) -> Any:
    """Content that an earlier run wrote to a file; None where that is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A function that appends to a shard, which gets its name when it is complete."""
    with _replacing(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), OPTIONS)
        yield writer.write
        writer.close()


def _write_text(path: Path, text: str) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path that then replaces `path`. Raises `UserError` on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with removing(temporary):
            yield temporary
            temporary.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}); make room, and run again to resume"
        ) from error


@contextlib.contextmanager
def work_folder(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The locked folder in which `out` is built; keeps files of a run with the same plan."""
    work = out.with_name(f"{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write {work}: {error.strerror}; name another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing {work}; wait until it is done") from error
        noted = work / "plan.json"
        if _read_json(noted) != plan:
            for folder in ("notes", DATASET):
                shutil.rmtree(work / folder, ignore_errors=True)
            _write_text(noted, json.dumps(plan))
        shutil.rmtree(work / DATASET / STORIES, ignore_errors=True)
        for unfinished in (work / DATASET / PICTURES).glob(".*"):
            unfinished.unlink()
        yield work


def finish(work: Path, out: Path) -> None:
    """Rename the finished work folder to `out`."""
    try:
        (work / DATASET).rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    shutil.rmtree(work)
