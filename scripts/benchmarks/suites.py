"""Measurements on a device that is there, in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp

from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.models.story_model import Parts, StoryModel
from scripts.benchmarks import forward, generation, training
from scripts.benchmarks.measuring import Machine, Row
from scripts.benchmarks.original import Original

EMBEDDED = Path(__file__).parents[2] / "configs" / "shapes.py"
BATCH_SIZES = (1, 2, 4, 8, 16)  # of generation
TRAINING_BATCH = 6  # stories, as published for one device
FEW_ROUNDS = 3  # where one takes seconds


class Different(Exception):
    """The outputs of the original differ from ours."""


def lines(
    machine: Machine, config: TrainConfig, parts: Sequence[str], original: Original | None
) -> Iterator[Row]:
    """The lines of a suite's `parts`. Raises `Different` before the first."""
    model = StoryModel(config.model, jnp.dtype(machine.dtype))
    whole = machine.dtype == "bfloat16"  # on a CPU only UNet weights are made, to save memory
    params = forward.named_weights(model, list(model.networks) if whole else ["unet"])
    yield from forward_lines(machine, model, params, parts, original)
    if "generation" in parts or "requests" in parts:
        pipeline = generation.make_pipeline(model, params)
        if "generation" in parts:
            for batch_size in BATCH_SIZES:
                few = (
                    {}
                    if batch_size == 1
                    else {"rounds": min(machine.rounds, FEW_ROUNDS), "warm_ups": 1}
                )
                # The original as one story at a time, and many, are enough.
                other = original if batch_size in (BATCH_SIZES[0], BATCH_SIZES[-1]) else None
                yield from generation.rows(machine._replace(**few), pipeline, batch_size, other)
        if "requests" in parts:
            yield from generation.mixed_requests(pipeline)
        del pipeline
    if "training" in parts:
        yield from training_lines(machine, config, params if whole else None, original)
    yield machine.peak_memory()
    if original:
        yield original.peak_memory()
    if "start" in parts:
        yield from generation.cold_start(model, params)


def forward_lines(
    machine: Machine,
    model: StoryModel,
    params: Parts,
    parts: Sequence[str],
    original: Original | None,
) -> Iterator[Row]:
    """Of single passes, whose outputs are compared first."""
    placed: Parts = {"unet": {n: jnp.asarray(p, model.dtype) for n, p in params["unet"].items()}}
    arrays, places = forward.inputs(model), forward.seta_places(model)
    if original:
        forward.load_original(original, model.config, arrays, machine.dtype)
    chosen, unet = [], None
    # With the original also where it is not timed: both must generate with and train one network.
    if "unet" in parts or (original and {"generation", "training"} & set(parts)):
        unet = forward.unet_forward(model, placed, arrays)
        chosen.append(unet)
    if "seta" in parts:
        by_side = {place.side: place for place in places}
        for what, some in [
            (f"SETA, all {len(places)} layers", places),
            *((f"SETA, a layer of {side} x {side}", [by_side[side]]) for side in by_side),
        ]:
            chosen.append(forward.seta_forward(model, placed, arrays, what, some))
    if original:
        tolerance = forward.TOLERANCES[machine.dtype]
        found = dict(itertools.chain(*(forward.errors(f, original) for f in chosen)))
        for what, error in found.items():
            if not error <= tolerance:
                raise Different(f"{what}: relative error {error:.1e} is above {tolerance:.0e}")
        for what, error in found.items():
            yield Row(f"{what}: relative error", [error], unit="")
    for one in chosen:
        if one is not unet or "unet" in parts:
            yield from forward.rows(machine, one, original)


def training_lines(
    machine: Machine, config: TrainConfig, params: Parts | None, original: Original | None
) -> Iterator[Row]:
    """Of the config's step; without `params`, of the synthetic dataset's."""
    if params is None:
        small = load_config(EMBEDDED)
        begin = StoryModel(small.model).init(0)
        what = f"training on embedded stories, batch {small.batch_size}"
        yield from training.rows(machine, what, small, begin)
        return
    for cached, data in ((True, "a latent cache"), (False, "pictures")):
        what = f"training from {data}, batch {TRAINING_BATCH}"
        step = training.for_one_device(config, TRAINING_BATCH, cached=cached)
        # The original has no cache, and is trained as it is.
        tasks = original.tasks(f"training {TRAINING_BATCH}") if original else {}
        as_it_is = {name: task for name, task in tasks.items() if name.endswith("eager")}
        yield from training.rows(machine, what, step, params, as_it_is)
