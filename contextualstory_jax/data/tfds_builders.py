"""The datasets on disk as tensorflow-datasets builders.

`pororo_sv`, `flintstones_sv` and `story_folder` each have two configs, because overlapping stories
share frames, and a frame may have several images to choose from: `pictures` has every image once;
`stories` has the splits, and of each frame the rows of its images.

Images are raw bytes. The fastest compression, zstd 1, would take a quarter to a third off, and
half the time that decoding and resizing took before; PNG would take more than twice that time
(`scripts/benchmark_data.py`).

`preparation.py` runs a builder's shards in parallel; `download_and_prepare()` one after the other.
This is the only module to import tensorflow-datasets, an extra, at its top; TensorFlow is not used.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from contextualstory_jax.data.example import FRAMES
from contextualstory_jax.data.images import fit_square
from contextualstory_jax.data.prepared import PICTURES, STORIES, labels_to_json
from contextualstory_jax.data.story_source import StoryRecord

Record = dict[str, Any]


class Rows(NamedTuple):
    """The rows in `pictures` of one file's images."""

    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class PictureShard:
    """The images in some files; `read` gives all that a file has, in the order of choice."""

    paths: tuple[Path, ...]
    read: Callable[[Path], list[Image.Image]]
    size: int

    def records(self, path: Path) -> list[Record]:
        """The records of one file. Raises `UserError` where it is missing or broken."""
        return [{"picture": fit_square(picture, self.size)} for picture in self.read(path)]

    def __call__(self) -> Iterator[tuple[int, Record]]:
        return enumerate(record for path in self.paths for record in self.records(path))


@dataclasses.dataclass(frozen=True)
class StoryShard:
    """Some stories, and the rows of the images in their files."""

    stories: Sequence[StoryRecord]
    rows: Mapping[Path, Rows]

    def __call__(self) -> Iterator[tuple[int, Record]]:
        for key, story in enumerate(self.stories):
            rows = [self.rows[path] for path in story.paths]
            record = {
                "story_id": story.story_id,
                "frame_ids": list(story.frame_ids),
                "source_id": story.source_id,
                "source_frame_ids": list(story.source_frame_ids),
                "sentences": list(story.sentences),
                "labels": labels_to_json(story.labels),
                "first_row": [first for first, _ in rows],
                "rows": [count for _, count in rows],
            }
            yield key, record


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


class _LocalInfo(tfds.core.DatasetInfo):
    """Dataset information that exists on this machine only."""

    def initialize_from_bucket(self) -> None:
        """Do nothing: the base class asks a public bucket, and leaves a temporary folder behind."""


class StoryBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """The images or the stories of a dataset, in given shards of each split."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=PICTURES, description="Every image once."),
        tfds.core.BuilderConfig(name=STORIES, description="Five frames with their sentences."),
    ]

    def __init__(
        self,
        folder: Path,
        config: str,
        shards: Mapping[str, Sequence[Callable[[], Iterator[tuple[int, Record]]]]],
        metadata: Mapping[str, Any],
    ):
        self.kind, self.shards, self.metadata = config, shards, metadata
        self.features = _features(config, metadata["size"])
        super().__init__(data_dir=folder, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            features=self.features,
            metadata=tfds.core.MetadataDict(self.metadata),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: object
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[int, Record]]]]]:
        return self.shards

    def paths(self, folder: Path, split: str) -> list[Path]:
        """The files of a split's shards in a folder."""
        template, count = self._template(folder, split), len(self.shards[split])
        return [
            Path(template.sharded_filepath(shard_index=index, num_shards=count))
            for index in range(count)
        ]

    def write_info(self, folder: Path, lengths: Mapping[str, Sequence[int]]) -> None:
        """Write the dataset info of a folder whose shards have `lengths` records."""
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(of_split),
                num_bytes=sum(path.stat().st_size for path in self.paths(folder, split)),
                filename_template=self._template(folder, split),
            )
            for split, of_split in lengths.items()
        ]
        self.info.set_splits(tfds.core.SplitDict(splits))
        self.info.write_to_directory(folder)

    def _template(self, folder: Path, split: str) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(folder),
            dataset_name=self.name,
            split=split,
            filetype_suffix="array_record",
        )


class PororoSv(StoryBuilder, skip_registration=True):
    """PororoSV."""


class FlintstonesSv(StoryBuilder, skip_registration=True):
    """FlintstonesSV."""


class StoryFolder(StoryBuilder, skip_registration=True):
    """Stories of one's own."""


BUILDERS = {"pororo": PororoSv, "flintstones": FlintstonesSv, "folder": StoryFolder}
