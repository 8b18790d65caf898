"""Latent caches: the frozen networks' outputs for the training split, computed once and kept.

A cache holds what training would compute at every step: posterior moments, which training still
samples from, and text features. They are computed in the config's `compute_dtype` and stored in the
dtype they come in, so that nothing is lost. A cache records what it was made of, and training
refuses one that was made of anything else. `data/latent_cache.py` says how it is stored, and reads
it.

Each process encodes its share of images and sentences on its own devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from contextualstory_jax.checkpoints.layout import (
    load_weights,
    read_model,
    refuse_another,
    weights_digest,
    write_text,
)
from contextualstory_jax.config.build import as_json, dotted
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.conversion.torch_names import ADDED
from contextualstory_jax.data.candidates import candidates
from contextualstory_jax.data.example import FRAMES
from contextualstory_jax.data.images import fit_square
from contextualstory_jax.data.latent_cache import (
    ABOUT,
    FORMAT,
    PICTURES,
    EncodedStories,
    LatentCache,
    tabulate,
)
from contextualstory_jax.data.loader import require_square, story_notes, training_source
from contextualstory_jax.data.remote import local_copy
from contextualstory_jax.data.shapes import ShapesSource
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.distributed.multihost import is_first, say
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.models.storyflow import storyflow
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.models.vae import Moments
from contextualstory_jax.sampling.sample import fill
from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.atomic import check_writable
from contextualstory_jax.utils.errors import UserError, require

ENCODERS = ("vae", "text_encoder")  # the parts whose work is kept
PICTURES_AT_ONCE, SENTENCES_AT_ONCE, STORIES_AT_ONCE = 16, 64, 32  # on each device
# One record can be read alone, and floats hardly compress.
OPTIONS = "group_size:1,uncompressed"
READ_AHEAD = grain.ReadOptions(num_threads=16, prefetch_buffer_size=32)  # files, of many images
MEND = "train with what it was made with, or make it again"


# ----------------------------------------------------------------------------- training from one


def open_latents(
    config: TrainConfig, tokenizer: Tokenizer, source: StorySource | ShapesSource
) -> EncodedStories:
    """The training split `source` of a config, read from the cache that it names.

    Raises `UserError` where the cache is damaged, cannot be copied from its URL, or was made by
    another config or of other stories, and where the config trains what the cache was made with.
    """
    cache = LatentCache.open(local_copy(config.data.latents or ""))
    shapes = StoryModel(config.model).shapes
    for name in (f"{part}.{name}" for part in ENCODERS for name in shapes[part]):
        require(
            not any(re.fullmatch(pattern, name) for pattern in config.trainable),
            f"data.latents keeps what frozen networks make, and the config trains {name}; "
            "train without a latent cache",
        )
    theirs = cache.about["settings"]
    for key, value in settings(config).items():
        require(
            theirs.get(key) == value,
            f"the latent cache {cache.folder} was made with {key} = {theirs.get(key)!r}, and the "
            f"config says {value!r}; {MEND}",
        )
    require(
        cache.about["tokenizer"] == _files_digest(tokenizer.folder),
        f"the latent cache {cache.folder} was made with another tokenizer; {MEND}",
    )
    return EncodedStories(require_on_disk(source), cache)


def require_same_weights(cache: LatentCache, params: Parts) -> None:
    """Raise `UserError` unless a cache was made by these parameters."""
    theirs = cache.about["weights"]
    for part in ENCODERS:
        require(
            theirs.get(part) == weights_digest(params[part]),
            f"the latent cache {cache.folder} was made by another {part} than this run's; {MEND}",
        )


def settings(config: TrainConfig) -> dict[str, Any]:
    """The values of a config that decide what a cache of it holds, by their dotted keys."""
    values = as_json(dataclasses.asdict(config))
    chosen = {
        "data": ("name", "split_policy", "captions"),
        "model": ("height", "width", "vae", "text_encoder"),
    }
    kept = {group: {key: values[group][key] for key in keys} for group, keys in chosen.items()}
    return dotted({**kept, "compute_dtype": values["compute_dtype"]})


def stories_on_disk(config: TrainConfig) -> StorySource:
    """The training split of a config.

    Raises `UserError` for stories that never run out, and for a model of images not square.
    """
    require_square(config.model)
    return require_on_disk(training_source(config.data, config.model.height))


def require_on_disk(source: StorySource | ShapesSource) -> StorySource:
    """The source itself. Raises `UserError` for stories that never run out."""
    if isinstance(source, ShapesSource):
        raise UserError(
            "data.name = 'shapes' never runs out of stories, so that no pass over "
            "all of them ends; name a dataset on disk"
        )
    return source


def _files_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------- making one


def cache_latents(config: TrainConfig, checkpoint: Path, out: Path) -> LatentCache:
    """Encode the training split of a config with a checkpoint's weights into the folder `out`.

    `out` appears when all is written. Raises `UserError` where it is there already or cannot be
    written, where the checkpoint's VAE or text encoder are not the config's, and where an image
    cannot be read.
    """
    require(not out.exists(), f"{out} is there already; delete it, or choose another --out")
    check_writable(out)
    source = stories_on_disk(config)
    table = tabulate(source)
    encoder = Encoder(config, checkpoint)
    for note in story_notes(source, encoder.tokenizer.truncation_note):
        say(note)
    with _shared_folder(out) as work:
        counts = np.zeros(len(table.paths), np.int32)
        moments = encoder.moments(_pictures(source, table.paths, counts))
        text = encoder.text([table.sentences[i] for i in _share(len(table.sentences))])
        about: dict[str, Any] = {
            "format": FORMAT,
            "stories": table.digest,
            "settings": settings(config),
            **encoder.digests,
            "moments": _write(work, "moments", moments, encoder.shapes["moments"]),
            "text": _write(work, "text", text, encoder.shapes["text"]),
        }
        # Others' are zero here.
        counts = process_allgather(counts).sum(axis=0)
        if is_first():
            np.save(work / PICTURES, counts)
        sync_global_devices("moments and text are written")
        stories = EncodedStories(source, LatentCache(work, about))
        about["storyflow"] = encoder.storyflow_mean(
            len(stories), lambda some: stories.moments([(n, 0) for n in some]), config.seed
        )
        if is_first():
            write_text(work / ABOUT, json.dumps(about, indent=2))
    return LatentCache.open(out)


def storyflow_of_split(config: TrainConfig, checkpoint: Path) -> list[float]:
    """The mean scene changes of a config's training split, as in a latent cache, but without one.

    Raises `UserError` where the checkpoint's VAE or text encoder are not the config's, and where an
    image cannot be read.
    """
    source, encoder = stories_on_disk(config), Encoder(config, checkpoint)
    stories = grain.MapDataset.source(list(_share(len(source))))
    examples = stories.map(lambda n: source.example(n, 0)).to_iter_dataset(READ_AHEAD)
    encoded = encoder.moments(picture for example in examples for picture in example.images)

    def moments(some: range) -> tuple[np.ndarray, np.ndarray]:
        frames = np.stack(list(islice(encoded, FRAMES * len(some))))
        frames = frames.reshape(len(some), FRAMES, *frames.shape[1:])
        return frames[:, :, 0], frames[:, :, 1]

    return encoder.storyflow_mean(len(source), moments, config.seed)


class Encoder:
    """A checkpoint's VAE and text encoder, on this process's devices.

    Raises `UserError` where they are not those of the config's model.
    """

    def __init__(self, config: TrainConfig, checkpoint: Path):
        folder, length = checkpoint / "tokenizer", config.model.text_encoder.max_position_embeddings
        params = _encoder_params(config.model, checkpoint)
        self.tokenizer = Tokenizer(folder, length)
        self.digests = {
            "weights": {part: weights_digest(params[part]) for part in ENCODERS},
            "tokenizer": _files_digest(folder),
        }
        self.model = StoryModel(config.model, jnp.dtype(config.compute_dtype))
        self.mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        self.params = jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))
        picture = jax.ShapeDtypeStruct((1, config.model.height, config.model.width, 3), np.uint8)
        ids = jax.ShapeDtypeStruct((1, length), np.int32)
        self.shapes = {
            "moments": jax.eval_shape(self._picture_moments, self.params, picture),
            "text": jax.eval_shape(self._text, self.params, ids),
        }

    def moments(self, pictures: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Iterator[np.ndarray]:
        """Mean and log of variance (2, p, q, c) of each image."""
        return self._each(self._picture_moments, pictures, PICTURES_AT_ONCE)

    def text(self, sentences: Sequence[str]) -> Iterator[np.ndarray]:
        """Features (l, d) of each sentence."""

        def ids() -> Iterator[np.ndarray]:
            for sentence in tqdm(sentences, unit="sentence", disable=not is_first()):
                yield self.tokenizer([sentence])[0]

        return self._each(self._text, ids(), SENTENCES_AT_ONCE)

    def storyflow_mean(
        self, count: int, moments: Callable[[range], tuple[np.ndarray, np.ndarray]], seed: int
    ) -> list[float]:
        """The mean scene changes of `count` stories; each process reads its share, in order.

        Of latents sampled from the posteriors, because it stands for the values of such latents
        that the UNet is trained on; those of the means are smaller.

        Args:
            moments: means and logs of variances (b, 5, p, q, c) of some stories, as training sees
                them in its first epoch.
        """

        @jax.jit
        def flows(numbers: Int[Array, " b"], mean: Array, logvar: Array) -> Float[Array, "b m"]:
            keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers)
            return storyflow(self.model.sample(Moments(mean, logvar), keys))

        part, size = _share(count), STORIES_AT_ONCE * self.mesh.size
        total = np.zeros(self.model.config.unet.n_frames - 1)
        bar = tqdm(total=len(part), unit="story", disable=not is_first())
        for first in range(part.start, part.stop, size):
            some = range(first, min(first + size, part.stop))
            padded = [array[fill(range(len(some)), size)] for array in moments(some)]
            numbers = np.arange(first, first + size)
            values = flows(*jax.device_put((numbers, *padded), self._sharded))
            total += np.asarray(values, np.float64)[: len(some)].sum(axis=0)
            bar.update(len(some))
            interruption.check()
        bar.close()
        sums = process_allgather(total.astype(np.float32)).sum(axis=0)
        return (sums / count).tolist()

    @property
    def _sharded(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec("batch"))

    def _picture_moments(
        self, params: Parts, pictures: UInt8[Array, "n h w 3"]
    ) -> Float[Array, "n 2 p q c"]:
        moments = self.model.image_moments(params, pictures[:, None])
        return jnp.concatenate(moments, axis=1)

    def _text(self, params: Parts, ids: Int[Array, "n l"]) -> Float[Array, "n l d"]:
        return self.model.encode_text(params, ids[None])[0]

    def _each(
        self, encode: Callable[[Parts, Array], Array], rows: Iterable[np.ndarray], at_once: int
    ) -> Iterator[np.ndarray]:
        """Rows through a function of batches, of which one is read while another is computed."""
        encode = jax.jit(encode)
        rows, size = iter(rows), at_once * self.mesh.size
        pending: list[tuple[Array, int]] = []
        while chunk := list(islice(rows, size)):
            batch = np.stack(fill(chunk, size))
            pending.append((encode(self.params, jax.device_put(batch, self._sharded)), len(chunk)))
            interruption.check()
            if len(pending) > 1:
                encoded, count = pending.pop(0)
                yield from np.asarray(encoded)[:count]
        for encoded, count in pending:
            yield from np.asarray(encoded)[:count]


def _encoder_params(config: ModelConfig, checkpoint: Path) -> Parts:
    theirs = read_model(checkpoint)
    for part in ENCODERS:
        stored, ours = (dataclasses.asdict(getattr(c, part)) for c in (theirs, config))
        refuse_another(checkpoint, stored, ours, "--checkpoint", f"model.{part}")
    shapes = StoryModel(theirs).shapes
    params, _ = load_weights(checkpoint, None, shapes, may_lack=ADDED, parts=ENCODERS)
    kept = {part: params[part] for part in ENCODERS}
    return jax.tree.map(lambda p: np.asarray(p).astype(np.float32), kept)


def _pictures(
    source: StorySource, paths: Sequence[Path], counts: np.ndarray
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """This process's images; sets `counts`, how many each of its files has, as it goes."""
    part, read = _share(len(paths)), candidates(source)

    def squares(number: int) -> list[np.ndarray]:
        return [fit_square(picture, source.size) for picture in read(paths[number])]

    dataset = grain.MapDataset.source(list(part)).map(squares).to_iter_dataset(READ_AHEAD)
    bar = tqdm(dataset, total=len(part), unit="file", disable=not is_first())
    for number, pictures in zip(part, bar, strict=True):
        counts[number] = len(pictures)
        yield from pictures


def _write(
    folder: Path, kind: str, arrays: Iterable[np.ndarray], like: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """Write this process's share of arrays; says what all processes wrote."""

    def name(process: int) -> str:
        return f"{kind}-{process:05d}-of-{jax.process_count():05d}.array_record"

    path, count = folder / name(jax.process_index()), 0
    with _writing(path):
        writer = ArrayRecordWriter(str(path), OPTIONS)
    for array in arrays:
        with _writing(path):
            writer.write(array.tobytes())
        count += 1
    with _writing(path):
        writer.close()
    every = process_allgather(np.int32(count)).tolist()
    files = {name(process): count for process, count in enumerate(every)}
    return {"files": files, "shape": like.shape[1:], "dtype": str(like.dtype)}


def _share(count: int) -> range:
    """This process's part of `count` things."""
    index, processes = jax.process_index(), jax.process_count()
    return range(index * count // processes, (index + 1) * count // processes)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise `UserError` with the path where ArrayRecord cannot write."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}); choose another --out") from error


@contextlib.contextmanager
def _shared_folder(out: Path) -> Iterator[Path]:
    """Give all processes one empty folder to write in, which then is given the name `out`."""
    work, first = out.with_name(f".{out.name}.partial"), is_first()
    try:
        with interruption.removing(work) if first else contextlib.nullcontext():
            if first:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            sync_global_devices("the folder is there")
            yield work
            sync_global_devices("all is written")
            if first:
                work.replace(out)
            sync_global_devices("the folder has its name")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error
