"""The training step of a config, on made-up data that is on the device already."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.flops import training_step_flops
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.models.vae import Moments
from contextualstory_jax.training.start_state import abstract_state
from contextualstory_jax.training.train_step import Batch, Encoded, init_state, make_train_step
from scripts.benchmarks.measuring import Machine, Row, Task, compile_twice, timed

# Of a float32 parameter, its moments and its average, all read and written, and its gradient, read.
OPTIMIZER_BYTES = 36


def for_one_device(config: TrainConfig, batch_size: int, *, cached: bool) -> TrainConfig:
    """A config with a batch that is computed at once, from a latent cache or from images."""
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        accumulation_steps=1,
        mesh=MeshConfig(),
        data=dataclasses.replace(config.data, latents="made up" if cached else None),
    )


def made_up_batch(
    model: StoryModel, config: TrainConfig
) -> tuple[Batch | Encoded, np.ndarray, np.ndarray | None]:
    """Stories, `null_ids` and `null_text`; encoded where the config has a latent cache."""
    about, rng = config.model, np.random.default_rng(0)
    b, f, words = config.batch_size, about.unet.n_frames, about.text_encoder.max_position_embeddings
    null_ids = np.zeros(words, np.int32)
    if config.data.latents is None:
        images = rng.integers(0, 256, (b, f, about.height, about.width, 3), np.uint8)
        ids = rng.integers(0, about.text_encoder.vocab_size, (b, f, words), np.int32)
        return Batch(jnp.asarray(images), jnp.asarray(ids)), null_ids, None
    size = about.latent_size(about.height, about.width)
    mean, logvar, text = (
        jnp.asarray(rng.standard_normal(shape, np.float32), model.dtype)
        for shape in (
            *((b, f, *size, about.vae.latent_channels),) * 2,
            (b, f, words, about.text_encoder.hidden_size),
        )
    )
    null_text = np.zeros((words, about.text_encoder.hidden_size), model.dtype)
    return Encoded(Moments(mean, logvar), text), null_ids, null_text


def rows(
    machine: Machine,
    what: str,
    config: TrainConfig,
    params: Parts,
    original: Mapping[str, Task] | None = None,
) -> Iterator[Row]:
    """The lines of a config's step; `params` are those before the first one."""
    mesh = make_mesh(config.mesh, [machine.device])
    placement = Placement(mesh, config.mesh.rules)
    model = StoryModel(config.model, jnp.dtype(config.compute_dtype), config.remat)
    abstract = abstract_state(model, config, placement)
    begin = functools.partial(init_state, config=config)
    state = jax.jit(begin, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))(params)
    batch, *nulls = made_up_batch(model, config)
    program = make_train_step(model, config, placement, abstract, *nulls)
    compiled = compile_twice(lambda: program.lower(abstract, batch))
    yield from compiled.rows(what)

    def step() -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = compiled.program(state, batch)
        return metrics

    trained = sum(math.prod(p.shape) for p in jax.tree.leaves(abstract.params))
    flops = training_step_flops(config).total()
    yield from machine.times(
        what, {"": timed(step), **(original or {})}, flops, OPTIMIZER_BYTES * trained
    )
