"""Dataset preparation: check every story, decode every image once, store both for fast reading.

`prepared.py` reads them. Stories are written last, because only then is it known which images are
broken (`shards.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.candidates import candidates
from contextualstory_jax.data.prepared import PICTURES, STORIES, require_tfds
from contextualstory_jax.data.shards import (
    DATASET,
    PictureShard,
    finish,
    work_folder,
    write_pictures,
    write_stories,
)
from contextualstory_jax.data.sources import open_source
from contextualstory_jax.data.story_source import SPLITS, EmptySplit, StoryRecord, StorySource
from contextualstory_jax.data.validation import Finding, problems
from contextualstory_jax.utils.errors import require

FILES_PER_SHARD = 256  # with images; 48 MiB at 256 pixels where each file has one
MOST_TOKENS = 77  # of a caption, that the text encoder reads
LONG = "long caption"  # the finding that excludes no story
LONG_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a preparation: findings, and whether the dataset was written."""

    found: dict[str, int]  # stories of each split
    kept: dict[str, int]
    pictures: int
    findings: tuple[Finding, ...]
    complete: bool
    notes: tuple[str, ...] = ()  # on the splits

    @property
    def problems(self) -> list[Finding]:
        """The findings that exclude stories from the dataset: all but long captions."""
        return [finding for finding in self.findings if finding.kind != LONG]

    def __str__(self) -> str:
        counts = Counter(finding.kind for finding in self.problems)
        long = [finding for finding in self.findings if finding.kind == LONG]
        splits = ", ".join(
            f"{split} {self.kept[split]}" + (f" of {count}" if count > self.kept[split] else "")
            for split, count in self.found.items()
        )
        lines = [f"{finding.kind}: {finding.message}" for finding in self.problems]
        lines += [f"{LONG}: {finding.message:.160}" for finding in long[:LONG_NAMED]]
        if long:
            lines.append(f"truncated captions: {len(long)}")
        lines += self.notes
        lines.append(f"stories: {splits}; images: {self.pictures}")
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
    """Write the stories in `config.root` to a new folder, with images of `size` x `size` pixels.

    Where something is wrong with them the folder is not created. With `skip_broken` it is, without
    the stories with a missing image and those whose id an earlier one has. Captions of more than 77
    tokens are reported and kept: the tokenizer truncates them.

    Args:
        config: Dataset to prepare.
        out: Folder to create.
        size: Side of the stored images in pixels.
        token_count: Number of tokens of a caption, by default `least_tokens`.
        skip_broken: Leave out broken stories instead of writing nothing.
        workers: Number of processes that write shards.
        progress: Called with the numbers of image files done and in total.

    Raises:
        UserError: The folder is not the dataset's, or writing fails.
    """
    require_tfds()
    from contextualstory_jax.data.tfds_builders import Dataset

    require(not out.exists(), f"{out} is there already; delete it, or name another folder")
    require(workers >= 1, f"workers must be at least 1; got {workers}")
    sources = open_splits(config, size)
    stories = {split: [s.story(i) for i in range(len(s))] for split, s in sources.items()}
    first = next(iter(sources.values()))
    files = tuple(dict.fromkeys(p for s in stories.values() for r in s for p in r.paths))
    settings = _settings(config, first.test_fraction, size)
    with work_folder(out, settings | {"files": _digest(files, config)}) as work:
        starts, read = range(0, len(files), FILES_PER_SHARD), candidates(first)
        shards = [PictureShard(files[i : i + FILES_PER_SHARD], read, size) for i in starts]
        make_dataset = functools.partial(
            Dataset, config.name, folder=work / DATASET, metadata=settings
        )
        rows, broken = write_pictures(make_dataset(PICTURES), shards, workers, progress)
        kept, findings = _intact(sources, stories, broken, token_count or least_tokens)
        report = Report(
            found={split: len(of_split) for split, of_split in stories.items()},
            kept={split: len(of_split) for split, of_split in kept.items()},
            pictures=sum(count for _, count in rows.values()),
            findings=findings,
            complete=skip_broken or all(finding.kind == LONG for finding in findings),
            notes=first.notes,
        )
        if report.complete:
            require(any(kept.values()), f"no story in {config.root} has all its images")
            splits = {split: of_split for split, of_split in kept.items() if of_split}
            write_stories(make_dataset(STORIES), splits, rows)
            finish(work, out)
    return report


def _intact(
    sources: Mapping[str, StorySource],
    stories: Mapping[str, Sequence[StoryRecord]],
    broken: Mapping[Path, str],
    token_count: Callable[[str], int],
) -> tuple[dict[str, list[StoryRecord]], tuple[Finding, ...]]:
    """The stories of each split with all their images and an id of their own; all findings."""
    kept: dict[str, list[StoryRecord]] = {}
    findings: dict[str, Finding] = {}  # by message: a frame may be in several splits
    for split, source in sources.items():
        of_text = list(problems(_Unread(source), token_count, MOST_TOKENS))
        of_images = list(_of_pictures(stories[split], broken))
        findings |= {finding.message: finding for finding in of_text + of_images}
        repeated = {finding.story for finding in of_text if finding.kind == "duplicate id"}
        kept[split] = [
            story
            for number, story in enumerate(stories[split])
            if number not in repeated and broken.keys().isdisjoint(story.paths)
        ]
    return kept, tuple(findings.values())


def _settings(config: DataConfig, test_fraction: float | None, size: int) -> dict[str, Any]:
    """The settings that decide which stories are written, and how."""
    names = ("name", "split_policy", "captions")
    given = {name: getattr(config, name) for name in names}
    return given | {"test_fraction": test_fraction, "size": size}


def open_splits(config: DataConfig, size: int) -> dict[str, StorySource]:
    """Each split of a published dataset that has stories. Raises `UserError` as sources do."""
    opened: dict[str, StorySource] = {}
    empty: list[EmptySplit] = []
    for split in SPLITS:
        try:
            opened[split] = open_source(config, Path(config.root or ""), split, size)
        except EmptySplit as error:
            empty.append(error)
    if not opened:
        raise empty[0]
    return opened


# ---------------------------------------------------------------------------------------- checks


class _Unread(StorySource):
    """A source whose images are assumed intact; broken ones are found when they are written."""

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
    """Lower bound on the tokens of a sentence: one per word, digit and run of signs, and two more.

    CLIP splits a sentence this way before it looks words up. Source: transformers CLIPTokenizer.
    """
    parts = r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+"
    return len(re.findall(parts, sentence.lower())) + 2


def _of_pictures(stories: Sequence[StoryRecord], broken: Mapping[Path, str]) -> Iterator[Finding]:
    for number, story in enumerate(stories):
        for path in story.paths:
            if path in broken:
                kind = "unreadable image" if os.path.exists(path) else "missing image"
                yield Finding(kind, number, broken[path])


def _digest(files: tuple[Path, ...], config: DataConfig) -> str:
    """Digest of the names and the order of the image files."""
    names = (os.path.relpath(path, config.root) for path in files)
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
