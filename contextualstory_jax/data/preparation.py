"""Preparing a dataset: every story checked, every picture decoded once, and both stored to be read
fast (`prepared.py`).

Shards of pictures are written by several processes into `OUT.partial`, each under its name once it
is whole and with a note beside it of what it holds, so that a run that was stopped is gone on with.
Stories are written last, for only then is known which pictures are broken, and the folder gets its
name when everything is in it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from contextualstory_jax.config import require
from contextualstory_jax.data.candidates import candidates
from contextualstory_jax.data.index import SPLITS, StoryRecord, StorySource
from contextualstory_jax.data.prepared import PICTURES, STORIES, require_tfds
from contextualstory_jax.data.problems import Finding, problems
from contextualstory_jax.data.sources import open_source
from contextualstory_jax.errors import UserError
from contextualstory_jax.recipe_config import DataConfig

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from contextualstory_jax.data.builders import PictureShard, Rows, StoryBuilder

FILES_PER_SHARD = 256  # with pictures; 48 MiB at 256 pixels where each file has one
OPTIONS = "group_size:1,uncompressed"  # a record can be read alone; why raw: `builders.py`
DATASET = "dataset"  # in the folder of work: what gets its name at the end
MOST_TOKENS = 77  # of a caption, that the text tower reads


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found, and whether the dataset was written."""

    found: dict[str, int]  # stories of each split
    kept: dict[str, int]
    pictures: int
    findings: tuple[Finding, ...]
    complete: bool

    def __str__(self) -> str:
        counts = Counter(finding.kind for finding in self.findings)
        splits = ", ".join(
            f"{split} {self.kept[split]}" + (f" of {count}" if count > self.kept[split] else "")
            for split, count in self.found.items()
        )
        lines = [f"{finding.kind}: {finding.message}" for finding in self.findings]
        lines.append(f"stories: {splits}; pictures: {self.pictures}")
        lines.append(f"problems: {', '.join(f'{n} {k}' for k, n in counts.items()) or 'none'}")
        return "\n".join(lines)


def prepare(
    config: DataConfig,
    out: Path,
    size: int,
    *,
    token_count: Callable[[str], int] | None = None,
    skip_broken: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Write the stories in `config.root` to a new folder, pictures of `size` x `size` pixels.

    Where something is wrong with them the folder does not appear. With `skip_broken` it does,
    without the stories that lack a picture and those whose id an earlier one has; captions that are
    too long stay, of which the model reads the beginning. Args: `token_count`, of a caption, by
    default `least_tokens`; `progress`, told how many files with pictures are done, of how many.
    Raises `UserError` for a folder that is not the dataset's, and where writing fails.
    """
    require_tfds()
    from contextualstory_jax.data.builders import BUILDERS, PictureShard, StoryShard

    require(not out.exists(), f"{out} is there already; delete it, or name another folder")
    require(workers >= 1, f"workers must be at least 1; got {workers}")
    sources = open_splits(config, size)
    stories = {split: [s.story(i) for i in range(len(s))] for split, s in sources.items()}
    files = tuple(dict.fromkeys(p for s in stories.values() for r in s for p in r.paths))
    settings = {
        "name": config.name,
        "split_policy": config.split_policy,
        "captions": config.captions,
        "size": size,
    }
    plan = settings | {"files": _digest(files, config)}

    with _work_folder(out, plan) as work:
        read = candidates(next(iter(sources.values())))
        shards = [
            PictureShard(files[i : i + FILES_PER_SHARD], read, size)
            for i in range(0, len(files), FILES_PER_SHARD)
        ]
        make_builder = functools.partial(BUILDERS[config.name], work)
        builder = make_builder(PICTURES, {PICTURES: shards}, settings)
        rows, broken = _write_pictures(builder, work, workers, progress)

        findings: dict[str, Finding] = {}  # by message: a frame may be in several splits
        kept: dict[str, list[StoryRecord]] = {}
        for split, source in sources.items():
            of_text = list(problems(_Unread(source), token_count or least_tokens, MOST_TOKENS))
            of_pictures = list(_of_pictures(stories[split], broken))
            findings |= {finding.message: finding for finding in of_text + of_pictures}
            left_out = {f.story for f in of_text if f.kind == "duplicate id"}
            kept[split] = [
                story
                for number, story in enumerate(stories[split])
                if number not in left_out and broken.keys().isdisjoint(story.paths)
            ]
        report = Report(
            found={split: len(of_split) for split, of_split in stories.items()},
            kept={split: len(of_split) for split, of_split in kept.items()},
            pictures=sum(count for _, count in rows.values()),
            findings=tuple(findings.values()),
            complete=skip_broken or not findings,
        )
        if report.complete:
            require(any(kept.values()), f"no story in {config.root} has all its pictures")
            splits = {split: [StoryShard(s, rows)] for split, s in kept.items() if s}
            builder = make_builder(STORIES, splits, settings)
            _write_stories(builder, work)
            _finish(work, out)
    return report


def open_splits(config: DataConfig, size: int) -> dict[str, StorySource]:
    """Each split of a published dataset that has stories. Raises `UserError` as sources do."""
    assert config.name != "shapes"
    opened: dict[str, StorySource] = {}
    errors: dict[str, UserError] = {}
    for split in SPLITS:
        try:
            opened[split] = open_source(
                config.name,
                Path(config.root or ""),
                split,
                size,
                policy=config.split_policy,
                captions=config.captions,
                seed=config.seed,
            )
        except UserError as error:
            errors[split] = error
    counts = next(iter(opened.values())).counts if opened else {}
    for split, error in errors.items():
        if counts.get(split) != 0:
            raise error
    return opened


# ------------------------------------------------------------------------------- what is checked


class _Unread(StorySource):
    """A source whose pictures are taken for sound: writing them tells."""

    def __init__(self, source: StorySource):
        super().__init__(source.split, source.size, source.seed)
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def story(self, index: SupportsIndex) -> StoryRecord:
        return self._source.story(index)

    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        return Image.new("RGB", (1, 1))


def least_tokens(sentence: str) -> int:
    """The tokens that a sentence has at least: one a word, digit and run of signs, and two around.

    So CLIP splits a sentence before it looks words up. Source: transformers CLIPTokenizer.
    """
    parts = r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+"
    return len(re.findall(parts, sentence.lower())) + 2


def _of_pictures(stories: list[StoryRecord], broken: dict[Path, str]) -> Iterator[Finding]:
    for number, story in enumerate(stories):
        for path in story.paths:
            if path in broken:
                kind = "unreadable picture" if path.exists() else "missing picture"
                yield Finding(kind, number, broken[path])


# ------------------------------------------------------------------------------- what is written


class _Note(NamedTuple):
    """What a shard holds: the number of records of each file, and of broken ones what is wrong."""

    counts: list[int]
    broken: dict[str, str]


def _write_pictures(
    builder: StoryBuilder, work: Path, workers: int, progress: Callable[[int, int], object]
) -> tuple[dict[Path, Rows], dict[Path, str]]:
    """Write the shards that are not there yet: where each file's pictures are; what is broken."""
    from contextualstory_jax.data.builders import Rows

    folder, shards = work / DATASET / PICTURES, builder.shards[PICTURES]
    paths = builder.paths(folder, PICTURES)
    total, done = sum(len(shard.paths) for shard in shards), 0
    notes: dict[int, _Note] = {}
    tasks = []
    for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
        note = _read_note(path)
        if note is None or note.broken:  # what was broken may have been mended
            tasks.append((number, shard, builder.features, path))
        else:
            notes[number] = note
            done += len(shard.paths)
    progress(done, total)
    for number, note in _run(tasks, workers):
        notes[number] = note
        done += len(note.counts)
        progress(done, total)

    ordered = [notes[number] for number in range(len(shards))]
    builder.write_info(folder, {PICTURES: [sum(note.counts) for note in ordered]})
    files = [path for shard in shards for path in shard.paths]
    counts = list(chain.from_iterable(note.counts for note in ordered))
    ends = accumulate(counts)
    rows = {
        path: Rows(end - count, count) for path, count, end in zip(files, counts, ends, strict=True)
    }
    broken = {Path(path): message for note in ordered for path, message in note.broken.items()}
    return rows, broken


def _write_stories(builder: StoryBuilder, work: Path) -> None:
    folder = work / DATASET / STORIES
    lengths = {}
    for split, (shard,) in builder.shards.items():
        (path,) = builder.paths(folder, split)
        with _writer(path) as write:
            for _, record in shard():
                write(builder.features.serialize_example(record))
        lengths[split] = [len(shard.stories)]
    builder.write_info(folder, lengths)


def _run(tasks: list[tuple[Any, ...]], workers: int) -> Iterator[tuple[int, _Note]]:
    """The notes of shards as they are written."""
    if workers == 1 or len(tasks) <= 1:
        yield from (_write_shard(*task) for task in tasks)
        return
    # Spawned, not forked, because ArrayRecord has threads.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_end_with_parent
    )
    try:
        futures = [pool.submit(_write_shard, *task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that wrote shards was killed, for want of memory perhaps; run again, with "
            "fewer workers, to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent is gone, even by a kill, instead of waiting for tasks."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(
    number: int, shard: PictureShard, features: tfds.features.FeaturesDict, path: Path
) -> tuple[int, _Note]:
    """Write one shard of pictures, and then its note."""
    from contextualstory_jax.data.builders import picture_serializer

    note, serialize = _Note([], {}), picture_serializer(features, shard.size)
    with _writer(path) as write:
        for file in shard.paths:
            try:
                records = shard.records(file)
            except UserError as error:
                records, note.broken[str(file)] = [], str(error)
            for record in records:
                write(serialize(record["picture"]))
            note.counts.append(len(records))
    _write_text(_note_path(path), json.dumps(note))
    return number, note


def _note_path(shard: Path) -> Path:
    return shard.parents[2] / "notes" / f"{shard.name}.json"


def _read_note(shard: Path) -> _Note | None:
    """What an earlier run noted of a shard."""
    path = _note_path(shard)
    return _Note(*json.loads(path.read_text())) if path.exists() else None


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A function that appends to a shard, which gets its name when it is whole."""
    with _replacing(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), OPTIONS)
        yield writer.write
        writer.close()


def _write_text(path: Path, text: str) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write at, which then takes the place of another. Raises `UserError` on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}); make room, and run again to go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _work_folder(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The folder in which `out` comes to be, this process's own: what an earlier run with the same
    plan left in it is kept."""
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
        if not noted.exists() or json.loads(noted.read_text()) != plan:
            for folder in ("notes", DATASET):
                shutil.rmtree(work / folder, ignore_errors=True)
            _write_text(noted, json.dumps(plan))
        shutil.rmtree(work / DATASET / STORIES, ignore_errors=True)
        for unfinished in (work / DATASET / PICTURES).glob(".*"):
            unfinished.unlink()
        yield work


def _finish(work: Path, out: Path) -> None:
    """Give the dataset its name."""
    try:
        (work / DATASET).rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    shutil.rmtree(work)


def _digest(files: tuple[Path, ...], config: DataConfig) -> str:
    """Of the names and the order of the files with pictures."""
    names = (os.path.relpath(path, config.root) for path in files)
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
