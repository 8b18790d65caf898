"""Reader of a latent cache: VAE moments and text encoder features of a training split, on disk.

::

    FOLDER/moments-00000-of-00002.array_record   one record per image: mean, then log of variance
    FOLDER/text-00000-of-00002.array_record      one record per sentence: its features
    FOLDER/pictures.npy                          number of images in each file of the dataset
    FOLDER/cache.json                            shapes, what it was made from, the StoryFlow mean

Images and sentences that several stories share are stored once, in the order in which the stories
first show them; sentence 0 is the empty one. Of a frame that shows one of several images all are
stored, so that training chooses as it does without a cache. `training/cache_latents.py` writes the
folder, `cache.json` last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float, Int32, Integer
from ml_dtypes import bfloat16

from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.utils.errors import UserError, require

FORMAT = 1
ABOUT, PICTURES = "cache.json", "pictures.npy"
KEYS = {"stories", "settings", "tokenizer", "weights", "moments", "text", "storyflow"}  # of ABOUT
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16)}

READ = "readahead_buffer_size:0"  # of ArrayRecord: rows are read in random order
# Threads, each of which reads record by record: for several in one call ArrayRecord starts threads
# of its own, and takes 1.5 times the CPU time.
READERS = 4


class StoryTable(NamedTuple):
    """Index of stories: each image file and each sentence once, and where stories use them.

    `digest` is a hash of the ids, frames and sentences of the stories.
    """

    paths: tuple[Path, ...]
    sentences: tuple[str, ...]  # the first is empty
    frames: Int32[np.ndarray, "n 5"]  # places in `paths`
    texts: Int32[np.ndarray, "n 5"]  # places in `sentences`
    frame_ids: tuple[tuple[str, ...], ...]
    digest: str


def tabulate(source: StorySource) -> StoryTable:
    """Index all stories of a source; no image is read."""
    paths: dict[Path, int] = {}
    sentences = {"": 0}
    digest = hashlib.sha256()
    frames, texts, frame_ids = [], [], []
    for number in range(len(source)):
        story = source.story(number)
        frames.append([paths.setdefault(path, len(paths)) for path in story.paths])
        texts.append([sentences.setdefault(s, len(sentences)) for s in story.sentences])
        frame_ids.append(story.frame_ids)
        told = [story.story_id, story.source_frame_ids, story.sentences]
        digest.update(json.dumps(told).encode() + b"\n")
    return StoryTable(
        paths=tuple(paths),
        sentences=tuple(sentences),
        frames=np.array(frames, np.int32),
        texts=np.array(texts, np.int32),
        frame_ids=tuple(frame_ids),
        digest=digest.hexdigest(),
    )


class Records:
    """Arrays of one shape and dtype, in files that each hold a share of them, in order.

    Raises ValueError where a file is missing or broken, or holds another number.
    """

    def __init__(self, folder: Path, files: Mapping[str, int], shape: Sequence[int], dtype: str):
        self.shape, self.dtype = tuple(shape), DTYPES[dtype]
        self._readers = [ArrayRecordReader(str(folder / name), READ) for name in files]
        for (name, count), reader in zip(files.items(), self._readers, strict=True):
            found = reader.num_records() if reader.ok() else "no readable"
            if found != count:
                raise ValueError(f"{name} has {found} records, not {count}")
        self._ends = np.cumsum(list(files.values()))
        self._pool = ThreadPoolExecutor(READERS)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of one array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: Integer[np.ndarray, " n"], put: Callable[[int, np.ndarray], None]) -> None:
        """Pass each row's place in `rows` and its array to `put`, in any order.

        Raises ValueError or RuntimeError for damaged records.
        """
        files = np.searchsorted(self._ends, rows, side="right")
        first = np.concatenate([[0], self._ends[:-1]])[files]
        where = list(zip(files.tolist(), (rows - first).tolist(), strict=True))

        def read_some(places: range) -> None:
            for place in places:
                file, number = where[place]
                (record,) = self._readers[file].read([number])
                put(place, np.frombuffer(record, self.dtype).reshape(self.shape))

        parts = [range(reader, len(rows), READERS) for reader in range(READERS)]
        list(self._pool.map(read_some, parts))


class LatentCache:
    """A folder with a latent cache; `about` is the content of its `cache.json`.

    Raises `UserError` for one that is damaged or incomplete.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder, self.about = folder, about
        try:
            self._moments, self._text = (
                Records(folder, about[kind]["files"], about[kind]["shape"], about[kind]["dtype"])
                for kind in ("moments", "text")
            )
            self.picture_counts: Integer[np.ndarray, " n"] = np.load(folder / PICTURES)
            if self.picture_counts.sum() != len(self._moments):
                raise ValueError(f"{PICTURES} counts other images")
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise self._damaged(error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.about)

    def __str__(self) -> str:
        size = sum(len(r) * r.nbytes for r in (self._moments, self._text)) / 2**30
        flow = ", ".join(f"{value:.3g}" for value in self.storyflow)
        return (
            f"{self.folder}: {len(self._moments)} images and {len(self._text) - 1} sentences, "
            f"{size:.2f} GiB; mean StoryFlow values {flow}"
        )

    @classmethod
    def open(cls, folder: Path) -> LatentCache:
        """The cache in a folder. Raises `UserError` where there is none, or it is damaged."""
        return cls(folder, _about(folder))

    @property
    def storyflow(self) -> list[float]:
        """The mean scene changes of all its stories."""
        return self.about["storyflow"]

    @property
    def null_text(self) -> Float[np.ndarray, "l d"]:
        """The features of the empty sentence."""
        return self.text(np.zeros(1, np.int64))[0]

    def moments(
        self, rows: Integer[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, "n p q c"], Float[np.ndarray, "n p q c"]]:
        """Means and logs of variances of images. Raises `UserError` for damaged records."""
        shape = (len(rows), *self._moments.shape[1:])
        mean, logvar = np.empty(shape, self._moments.dtype), np.empty(shape, self._moments.dtype)

        def put(place: int, moments: Float[np.ndarray, "2 p q c"]) -> None:
            mean[place], logvar[place] = moments

        self._read(self._moments, rows, put)
        return mean, logvar

    def text(self, rows: Integer[np.ndarray, " n"]) -> Float[np.ndarray, "n l d"]:
        """Features of sentences. Raises `UserError` for damaged records."""
        text = np.empty((len(rows), *self._text.shape), self._text.dtype)
        self._read(self._text, rows, text.__setitem__)
        return text

    def _read(self, records: Records, rows: np.ndarray, put: Callable) -> None:
        try:
            records.read(rows, put)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        return UserError(f"the latent cache {self.folder} is damaged ({reason}); make it again")


class EncodedStories:
    """The stories of a source, read from a cache instead.

    Raises `UserError` where the cache holds other stories.
    """

    def __init__(self, source: StorySource, cache: LatentCache):
        table = tabulate(source)
        require(
            cache.about["stories"] == table.digest,
            f"the latent cache {cache.folder} is of other stories than the config's data; "
            "cache these, or name their data",
        )
        self.source, self.cache = source, cache
        ends = np.cumsum(cache.picture_counts)
        self._first = (ends - cache.picture_counts)[table.frames]
        self._count = cache.picture_counts[table.frames]
        self._texts, self._frame_ids = table.texts, table.frame_ids

    def __len__(self) -> int:
        return len(self._texts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {self.cache.folder})"

    def read(self, places: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """A batch of (index, epoch): `mean` and `logvar` (b, 5, p, q, c), `text` (b, 5, l, d).

        Raises `UserError` for damaged records.
        """
        indices = [index for index, _ in places]
        mean, logvar = self.moments(places)
        text = self.cache.text(self._texts[indices].ravel())
        text = text.reshape(*mean.shape[:2], *text.shape[1:])
        return {"mean": mean, "logvar": logvar, "text": text}

    def moments(
        self, places: Sequence[tuple[int, int]]
    ) -> tuple[Float[np.ndarray, "b 5 p q c"], Float[np.ndarray, "b 5 p q c"]]:
        """Means and logs of variances of a batch of (index, epoch); raises as `read` does."""
        indices = [index for index, _ in places]
        choices = [self.source.choices(self._frame_ids[i], epoch) for i, epoch in places]
        chosen = np.array(choices, np.uint64) % self._count[indices].astype(np.uint64)
        rows = self._first[indices] + chosen.astype(np.int64)
        mean, logvar = self.cache.moments(rows.ravel())
        shape = (*rows.shape, *mean.shape[1:])
        return mean.reshape(shape), logvar.reshape(shape)


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    require(
        path.is_file(),
        f"{folder} holds no latent cache: {ABOUT} is missing; make one with "
        "contextualstory-jax cache-latents",
    )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); make the latent cache again") from error
    require(
        isinstance(about, dict) and about.get("format") == FORMAT and about.keys() >= KEYS,
        f"{path} does not describe a latent cache in format {FORMAT}; make it again",
    )
    return about
