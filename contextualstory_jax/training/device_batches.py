"""Batches of stories, read on the host, as arrays on the mesh."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.data.loader import Readable, TokenizedStories, batches, process_rows
from contextualstory_jax.distributed.sharding import BATCH
from contextualstory_jax.models.vae import Moments
from contextualstory_jax.training.train_step import Batch, Encoded


def device_batches(
    config: TrainConfig,
    mesh: Mesh,
    stories: Readable,
    first_step: int,
) -> Iterator[Batch | Encoded]:
    """Batches on the mesh, one for each step from `first_step` on; encoded ones from a cache."""
    for arrays in device_arrays(config, mesh, stories, first_step):
        if isinstance(stories, TokenizedStories):
            yield Batch(**arrays)
        else:
            yield Encoded(Moments(arrays["mean"], arrays["logvar"]), arrays["text"])


def device_arrays(
    config: TrainConfig, mesh: Mesh, stories: Readable, first_step: int
) -> Iterator[dict[str, jax.Array]]:
    """The arrays of batches on the mesh, one for each step from `first_step` on."""
    sharding = NamedSharding(mesh, BATCH)
    rows, workers = process_rows(sharding, config.batch_size), config.data.workers
    order = config.batch_size, config.seed, first_step
    for arrays in batches(stories, *order, rows=rows, workers=workers):
        yield {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in arrays.items()
        }
