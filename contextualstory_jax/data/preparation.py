"""Preparing a dataset: every story checked, every picture decoded once, and both stored to be read
fast (`prepared.py`).

Stories are written last, for only then is known which pictures are broken (`shards.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import SupportsIndex

from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.candidates import candidates
from contextualstory_jax.data.prepared import PICTURES, STORIES, require_tfds
from contextualstory_jax.data.shards import finish, work_folder, write_pictures, write_stories
from contextualstory_jax.data.sources import open_source
from contextualstory_jax.data.story_source import SPLITS, EmptySplit, StoryRecord, StorySource
from contextualstory_jax.data.validation import Finding, problems
from contextualstory_jax.utils.errors import require

FILES_PER_SHARD = 256  # with pictures; 48 MiB at 256 pixels where each file has one
MOST_TOKENS = 77  # of a caption, that the text tower reads
LONG = "long caption"  # the finding that keeps no story out
LONG_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found, and whether the dataset was written."""

    found: dict[str, int]  # stories of each split
    kept: dict[str, int]
    pictures: int
    findings: tuple[Finding, ...]
    complete: bool
    notes: tuple[str, ...] = ()  # on the splits

    @property
    def problems(self) -> list[Finding]:
        """The findings because of which stories cannot be written: all but long captions."""
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
    without the stories that miss an image and those whose id an earlier one has. Captions of more
    than 77 tokens are reported and kept: the tokenizer truncates them. Args: `token_count`, of a
    caption, by default `least_tokens`; `progress`, called with the number of files with pictures
    that are done, and of all. Raises `UserError` for a folder that is not the dataset's, and where
    writing fails.
    """
    require_tfds()
    from contextualstory_jax.data.tfds_builders import BUILDERS, PictureShard, StoryShard

    require(not out.exists(), f"{out} is there already; delete it, or name another folder")
    require(workers >= 1, f"workers must be at least 1; got {workers}")
    sources = open_splits(config, size)
    stories = {split: [s.story(i) for i in range(len(s))] for split, s in sources.items()}
    first = next(iter(sources.values()))
    files = tuple(dict.fromkeys(p for s in stories.values() for r in s for p in r.paths))
    settings = {
        "name": config.name,
        "split_policy": config.split_policy,
        "captions": config.captions,
        "test_fraction": first.test_fraction,
        "size": size,
    }
    plan = settings | {"files": _digest(files, config)}

    with work_folder(out, plan) as work:
        read = candidates(first)
        shards = [
            PictureShard(files[i : i + FILES_PER_SHARD], read, size)
            for i in range(0, len(files), FILES_PER_SHARD)
        ]
        make_builder = functools.partial(BUILDERS[config.name], work)
        builder = make_builder(PICTURES, {PICTURES: shards}, settings)
        rows, broken = write_pictures(builder, work, workers, progress)

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
            complete=skip_broken or all(f.kind == LONG for f in findings.values()),
            notes=first.notes,
        )
        if report.complete:
            require(any(kept.values()), f"no story in {config.root} has all its pictures")
            splits = {split: [StoryShard(s, rows)] for split, s in kept.items() if s}
            builder = make_builder(STORIES, splits, settings)
            write_stories(builder, work)
            finish(work, out)
    return report


def open_splits(config: DataConfig, size: int) -> dict[str, StorySource]:
    """Each split of a published dataset that has stories. Raises `UserError` as sources do."""
    assert config.name != "shapes"
    opened: dict[str, StorySource] = {}
    empty: list[EmptySplit] = []
    for split in SPLITS:
        try:
            opened[split] = open_source(
                config.name,
                Path(config.root or ""),
                split,
                size,
                policy=config.split_policy,
                captions=config.captions,
                test_fraction=config.test_fraction,
                seed=config.seed,
            )
        except EmptySplit as error:
            empty.append(error)
    if not opened:
        raise empty[0]
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
                kind = "unreadable picture" if os.path.exists(path) else "missing picture"
                yield Finding(kind, number, broken[path])


def _digest(files: tuple[Path, ...], config: DataConfig) -> str:
    """Of the names and the order of the files with pictures."""
    names = (os.path.relpath(path, config.root) for path in files)
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
