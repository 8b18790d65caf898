"""Prepared datasets: the same stories as the published folder's, in shards for fast reading.

A prepared folder (`contextualstory-jax prepare`) holds two tensorflow-datasets datasets:

- `stories`: the splits; a story's frames say which rows of `pictures` are theirs;
- `pictures`: every image that a frame can show, once, at the size prepared for.

`tfds_builders.py` says how they are stored; `metadata.json` records what they were made from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.example import FrameLabels
from contextualstory_jax.data.story_source import (
    StoryRecord,
    StorySource,
    held_out_note,
    require_stories,
)
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import check_file

STORIES, PICTURES = "stories", "pictures"  # folders; the latter also names the split


def is_prepared(root: Path) -> bool:
    """Whether a folder holds a prepared dataset."""
    return os.path.exists(root / STORIES / "dataset_info.json")


def require_tfds() -> None:
    """Raise `UserError` where tensorflow-datasets is not installed."""
    try:
        import tensorflow_datasets  # noqa: F401
    except ImportError as error:
        raise UserError(
            "prepared datasets need tensorflow-datasets (without TensorFlow): "
            "pip install 'contextualstory-jax[data]'"
        ) from error


class PreparedSource(StorySource):
    """One split of a prepared dataset: the examples that the published folder's source gives.

    A record's path names no file but rows: `pictures/FIRST-LAST`. Raises `UserError` for a folder
    that is no prepared dataset, incomplete, or prepared for another size.
    """

    def __init__(self, root: Path, split: str, size: int, *, seed: int = 0):
        super().__init__(split, size, seed)
        require_tfds()
        self.root = root
        stories, pictures = _open(root / STORIES), _open(root / PICTURES)
        self.metadata = _metadata(stories.info, root / STORIES)
        self.test_fraction = self.metadata["test_fraction"]
        require(
            self.metadata["size"] == size,
            f"{root} holds images of {self.metadata['size']} pixels, and {size} are asked for; "
            f"prepare the dataset with --size {size}",
        )
        self.counts = {name: info.num_examples for name, info in stories.info.splits.items()}
        if self.test_fraction is not None:
            self.notes = (held_out_note(self.counts, self.test_fraction),)
        if split in self.counts:
            self._stories: Sequence[Any] = stories.as_data_source(split)
        else:
            self._stories = ()
        require_stories(self)
        self._pictures: Sequence[Any] = pictures.as_data_source(PICTURES)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.root, self.split, self.size, self.seed)

    def __len__(self) -> int:
        return len(self._stories)

    def story(self, index: SupportsIndex) -> StoryRecord:
        values = self._read(self._stories, self._number(index))
        rows = zip(values["first_row"], values["rows"], strict=True)
        return StoryRecord(
            story_id=values["story_id"].decode(),
            frame_ids=_texts(values["frame_ids"]),
            source_id=values["source_id"].decode(),
            source_frame_ids=_texts(values["source_frame_ids"]),
            sentences=_texts(values["sentences"]),
            labels=labels_of_json(values["labels"].decode()),
            paths=tuple(
                self.root / PICTURES / f"{first}-{first + count - 1}" for first, count in rows
            ),
        )

    def picture(self, path: Path, choice: int = 0) -> Image.Image:
        rows = _rows(path)
        return self._picture(rows[choice % len(rows)])

    def pictures(self, path: Path) -> list[Image.Image]:
        """All images of a record's path. Raises `UserError` where one is damaged."""
        return [self._picture(row) for row in _rows(path)]

    def _picture(self, row: int) -> Image.Image:
        return Image.fromarray(self._read(self._pictures, row)["picture"])

    def _read(self, rows: Sequence[Any], number: int) -> dict[str, Any]:
        try:
            return rows[number]
        except (RuntimeError, ValueError) as error:  # of ArrayRecord, for records that are damaged
            reason = str(error).splitlines()[0]
            raise UserError(
                f"a shard in {self.root} is damaged ({reason}); prepare the dataset again"
            ) from error


def _reopen(
    cls: type[PreparedSource], root: Path, split: str, size: int, seed: int
) -> PreparedSource:
    return cls(root, split, size, seed=seed)


def require_settings(source: PreparedSource, config: DataConfig) -> None:
    """Raise `UserError` where a dataset was prepared with other settings than the config's."""
    expected: dict[str, object] = {
        "name": config.name,
        "split_policy": config.split_policy,
        "captions": config.captions,
    }
    if source.test_fraction is not None:
        expected["test_fraction"] = config.test_fraction
    for key, value in expected.items():
        prepared = source.metadata[key]
        require(
            prepared == value,
            f"{source.root} was prepared with {key} = {prepared!r}, and data.{key} = {value!r} is "
            f"asked for; set data.{key}={prepared}, or prepare the dataset again",
        )


def labels_to_json(labels: Sequence[FrameLabels] | None) -> str:
    """Labels as JSON text; the empty string for None."""
    if labels is None:
        return ""
    return json.dumps(
        [[sorted(label.characters), label.scene, label.needs_context] for label in labels]
    )


def labels_of_json(text: str) -> tuple[FrameLabels, ...] | None:
    """The inverse of `labels_to_json`."""
    if not text:
        return None
    return tuple(
        FrameLabels(frozenset(characters), scene, needs_context)
        for characters, scene, needs_context in json.loads(text)
    )


def _rows(path: Path) -> range:
    first, last = map(int, path.name.split("-"))
    return range(first, last + 1)


def _texts(values: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(value.decode() for value in values)


def _open(folder: Path) -> Any:
    """The builder of a dataset, after a check that its shards are complete."""
    import tensorflow_datasets as tfds

    for name in ("dataset_info.json", "features.json", "metadata.json"):
        check_file(folder / name, "prepare the dataset again")
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds, for files that are missing or damaged
        raise UserError(f"{folder} is no prepared dataset; prepare it again") from error
    for split in builder.info.splits.values():
        for path in split.filepaths:
            check_file(Path(path), "prepare the dataset again")
        if sum(path.stat().length for path in split.filepaths) != split.num_bytes:
            lengths = zip(split.filepaths, split.shard_lengths, strict=True)
            cut = [path for path, length in lengths if _records(str(path)) != length]
            raise UserError(
                f"the shard {(cut or [folder])[0]} is damaged; prepare the dataset again"
            )
    return builder


def _metadata(info: Any, folder: Path) -> dict[str, Any]:
    """The settings that a dataset was prepared with."""
    kinds = {"name": str, "split_policy": str, "captions": str, "size": int}
    damaged = f"{folder / 'metadata.json'} is damaged; prepare the dataset again"
    try:
        values = {"test_fraction": None} | dict(info.metadata or {})
    except (TypeError, ValueError, OSError, RecursionError) as error:  # read on first use
        raise UserError(damaged) from error
    right = all(isinstance(values.get(key), kind) for key, kind in kinds.items())
    require(right and isinstance(values["test_fraction"], int | float | None), damaged)
    return values


def _records(path: str) -> int:
    reader = ArrayRecordReader(path, "readahead_buffer_size:0")
    return reader.num_records() if reader.ok() else 0
