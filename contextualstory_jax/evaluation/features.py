"""Features of images, stories or sentences: computed once, on all devices, and kept.

Items are computed in groups. A group's features are a file in the user's cache folder, named by all
that decides them, so that what was interrupted resumes, and what was measured is not computed
again. Processes compute every n-th group and share the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, Shaped
from tqdm import tqdm

from contextualstory_jax.distributed.multihost import is_first
from contextualstory_jax.models.network import Network, Params
from contextualstory_jax.sampling.sample import fill
from contextualstory_jax.utils.atomic import atomic_path
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import user_cache
from contextualstory_jax.utils.interruption import check

GROUP = 256  # items in a file
THREADS = min(8, os.cpu_count() or 1)  # to read with; Pillow leaves Python to others


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network with weights, and how items become its inputs.

    Attributes:
        name: all that decides the features but weights and items.
        network: the architecture.
        params: its weights.
        sha256: of the weights.
        read: an item's array, on the host; called in threads.
        compute: features (b, d) of a bound network and a batch of arrays, on devices.
    """

    name: str
    network: Network
    params: Params
    sha256: str
    read: Callable[[Any], np.ndarray]
    compute: Callable[[Any, jax.Array], jax.Array]


class Features:
    """Computes and keeps features.

    Args:
        batch_size: items per device.
        folder: of the files; by default among the user's caches.
    """

    def __init__(self, batch_size: int = 32, folder: Path | None = None):
        require(batch_size >= 1, f"--batch-size must be at least 1; got {batch_size}")
        self.batch_size = batch_size
        self.folder = folder or user_cache() / "features"
        self._programs: dict[str, Callable[[Params, jax.Array], jax.Array]] = {}

    def __call__(
        self, extractor: Extractor, items: Sequence[Hashable]
    ) -> Float32[np.ndarray, "n d"]:
        """The features of items: paths, sentences, or tuples of such and of numbers.

        Raises `UserError` where an item cannot be read, or items of one batch differ in shape.
        """
        groups = [items[i : i + GROUP] for i in range(0, len(items), GROUP)]
        files = [self.folder / f"{_fingerprint(extractor, group)}.npy" for group in groups]
        ours = list(zip(groups, files, strict=True))[jax.process_index() :: jax.process_count()]
        missing = [(group, file) for group, file in ours if _load(file, len(group)) is None]
        if missing:
            self._compute(extractor, missing)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("features are computed")
        loaded = []
        for group, file in zip(groups, files, strict=True):
            features = _load(file, len(group))
            if features is None:
                raise UserError(
                    f"{file} is not there; all processes must share one cache folder "
                    "(XDG_CACHE_HOME)"
                )
            loaded.append(features)
        return np.concatenate(loaded)

    def _compute(self, extractor: Extractor, missing: Sequence[tuple[Sequence, Path]]) -> None:
        """Write files of groups."""
        devices = jax.local_devices()
        mesh = Mesh(devices, "data")
        split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
        params = jax.device_put(extractor.params, everywhere)
        # Every batch has one size, so that one program serves.
        largest = max(len(group) for group, _ in missing)
        size = min(self.batch_size, -(-largest // len(devices))) * len(devices)
        program = self._program(extractor)
        total = sum(len(group) for group, _ in missing)
        bar = tqdm(
            total=total,
            desc=extractor.name.partition(" ")[0],
            dynamic_ncols=True,
            delay=0.5,
            disable=not is_first(),
        )
        with ThreadPoolExecutor(THREADS) as pool, bar:
            for group, file in missing:
                rows: list[np.ndarray] = []
                running = None
                for start in range(0, len(group), size):
                    batch = group[start : start + size]
                    # Meanwhile the devices compute the batch before.
                    arrays = _stack(list(pool.map(extractor.read, batch)), batch)
                    _finish(running, rows, bar)
                    padded = np.stack(fill(arrays, size))
                    running = program(params, jax.device_put(padded, split)), len(batch)
                    check()
                _finish(running, rows, bar)
                with atomic_path(file) as temporary, temporary.open("wb") as opened:
                    np.save(opened, np.concatenate(rows))

    def _program(self, extractor: Extractor) -> Callable[[Params, jax.Array], jax.Array]:
        """The compiled computation, one for all extractors of a name."""

        def compute(params: Params, batch: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                return extractor.compute(extractor.network.bind(params), batch)

        return self._programs.setdefault(extractor.name, jax.jit(compute))


def _finish(running: tuple[jax.Array, int] | None, rows: list[np.ndarray], bar: tqdm) -> None:
    """Wait for a batch's features and count them."""
    if running is not None:
        features, count = running
        rows.append(np.asarray(features, np.float32)[:count])
        bar.update(count)


def _stack(arrays: list[np.ndarray], items: Sequence) -> list[Shaped[np.ndarray, "..."]]:
    """The arrays of a batch. Raises `UserError` where shapes differ."""
    for array, item in zip(arrays, items, strict=True):
        require(
            array.shape == arrays[0].shape,
            f"{items[0]} and {item} differ in size, {arrays[0].shape[:2]} and {array.shape[:2]} "
            "pixels; bring all to one, or choose a protocol that resizes each image",
        )
    return arrays


def _load(file: Path, count: int) -> np.ndarray | None:
    """The features in a file; None where it is missing or damaged."""
    try:
        features = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features if features.ndim == 2 and len(features) == count else None


def _fingerprint(extractor: Extractor, items: Sequence[Hashable]) -> str:
    described = [extractor.name, extractor.sha256, [_describe(item) for item in items]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _describe(item: Hashable) -> Any:
    """An item as JSON; of a file its size and time too."""
    if isinstance(item, tuple):
        return [_describe(part) for part in item]
    if not isinstance(item, Path):
        return item
    try:
        status = item.stat()
    except OSError as error:
        raise UserError(f"cannot read {item}: {error.strerror}; put an image there") from error
    return [str(item.absolute()), status.st_size, status.st_mtime_ns]
