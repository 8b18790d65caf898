"""The two tensorflow-datasets datasets of a prepared folder, `pictures` and `stories`.

Overlapping stories share frames, and a frame may have several images to choose from: `pictures` has
every image once; `stories` has the splits, and of each frame the rows of its images.

Images are raw bytes. The fastest compression, zstd 1, would take a quarter to a third off, and
half the time that decoding and resizing took before; PNG would take more than twice that time
(`scripts/benchmark_data.py`).

This is the only module to import tensorflow-datasets, an extra, at its top; TensorFlow is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt8
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from contextualstory_jax.data.example import FRAMES
from contextualstory_jax.data.prepared import PICTURES, STORIES, labels_to_json
from contextualstory_jax.data.story_source import StoryRecord

NAMES = {"pororo": "pororo_sv", "flintstones": "flintstones_sv", "folder": "story_folder"}
DESCRIPTIONS = {PICTURES: "Every image once.", STORIES: "Five frames with their sentences."}


class Rows(NamedTuple):
    """The rows in `pictures` of one file's images."""

    first: int
    count: int


def story_record(story: StoryRecord, rows: Mapping[Path, Rows]) -> dict[str, Any]:
    """A story as it is stored, with the rows of the images in its files."""
    places = [rows[path] for path in story.paths]
    return {
        "story_id": story.story_id,
        "frame_ids": list(story.frame_ids),
        "source_id": story.source_id,
        "source_frame_ids": list(story.source_frame_ids),
        "sentences": list(story.sentences),
        "labels": labels_to_json(story.labels),
        "first_row": [first for first, _ in places],
        "rows": [count for _, count in places],
    }


def _features(kind: str, size: int) -> tfds.features.FeaturesDict:
    if kind == PICTURES:
        picture = tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8, encoding="bytes")
        return tfds.features.FeaturesDict({"picture": picture})
    text = tfds.features.Text()
    five = functools.partial(tfds.features.Sequence, length=FRAMES)
    return tfds.features.FeaturesDict(
        {
            "story_id": text,
            "frame_ids": five(text),
            "source_id": text,
            "source_frame_ids": five(text),
            "sentences": five(text),
            "labels": text,  # JSON, because lists in lists need TensorFlow
            "first_row": five(np.int64),
            "rows": five(np.int64),
        }
    )


def picture_serializer(
    features: tfds.features.FeaturesDict, size: int
) -> Callable[[UInt8[np.ndarray, "h w 3"]], bytes]:
    """A fast `serialize_example` for images, without the time it spends on its messages.

    The bytes before the pixels, which come last, are the same in every record.
    """
    blank = np.zeros((size, size, 3), np.uint8)
    head = features.serialize_example({"picture": blank})[: -blank.nbytes]
    return lambda picture: b"".join((head, np.ascontiguousarray(picture).data))


class Dataset:
    """One of the two datasets of a prepared folder, as tensorflow-datasets describes it.

    Args:
        name: Name of the stories in the configs, such as `pororo`.
        kind: `pictures` or `stories`.
        folder: Folder to write in.
        metadata: Settings that it was prepared with.
    """

    def __init__(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]):
        self.name, self.folder = NAMES[name], folder / kind
        self.features, self._metadata = _features(kind, metadata["size"]), metadata
        self._identity = DatasetIdentity(
            name=self.name,
            version=tfds.core.Version("1.0.0"),
            data_dir=str(self.folder),
            module_name=__name__,
            config_name=kind,
            config_description=DESCRIPTIONS[kind],
        )

    def paths(self, split: str, count: int) -> list[Path]:
        """The files of a split's `count` shards."""
        template = self._template(split)
        return [
            Path(template.sharded_filepath(shard_index=index, num_shards=count))
            for index in range(count)
        ]

    def write_info(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Write the dataset info of a folder whose shards have `lengths` records."""
        info = tfds.core.DatasetInfo(
            builder=self._identity,
            features=self.features,
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )
        info.set_file_format("array_record")
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(of_split),
                num_bytes=sum(path.stat().st_size for path in self.paths(split, len(of_split))),
                filename_template=self._template(split),
            )
            for split, of_split in lengths.items()
        ]
        info.set_splits(tfds.core.SplitDict(splits))
        info.write_to_directory(self.folder)

    def _template(self, split: str) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(self.folder),
            dataset_name=self.name,
            split=split,
            filetype_suffix="array_record",
        )
