"""Generation by `StoryPipeline`, from sentences to images on the host."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from contextualstory_jax.checkpoints.layout import write_weights
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.data.shapes import TOKENIZER_DIR, story
from contextualstory_jax.diffusion.denoising import make_sampler
from contextualstory_jax.diffusion.guidance import num_branches
from contextualstory_jax.models.flops import generation_flops
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.sampling.pipeline import Story, StoryPipeline
from scripts.benchmarks.measuring import Machine, Row, timed
from scripts.benchmarks.original import Original

STORYFLOW = (20.0, 25.0, 30.0, 35.0)
REQUESTS = 100


def make_pipeline(model: StoryModel, params: Parts) -> StoryPipeline:
    """A pipeline of these weights, with the synthetic dataset's tokenizer."""
    tokenizer = Tokenizer(TOKENIZER_DIR, model.config.text_encoder.max_position_embeddings)
    return StoryPipeline(model, params, tokenizer, STORYFLOW[: model.config.unet.n_frames - 1])


def stories(config: ModelConfig, count: int) -> list[Story]:
    """Sentences of the synthetic dataset; in continuation, with a grey first frame."""
    grey = np.full((config.height, config.width, 3), 128, np.uint8)
    first = grey if config.unet.is_continuation else None
    return [Story(story(0, i, "test").sentences, f"story_{i}", first) for i in range(count)]


def rows(
    machine: Machine, pipeline: StoryPipeline, batch_size: int, original: Original | None
) -> Iterator[Row]:
    """Generation of `batch_size` stories at once: compilation, time, rate and memory."""
    config, sampling = pipeline.model.config, pipeline.model.config.sampling
    chosen, what = stories(config, batch_size), f"generation, batch {batch_size}"

    def draw() -> float:
        began = time.perf_counter()
        pipeline.draw(chosen, batch_size=batch_size)
        return time.perf_counter() - began

    jax.clear_caches()
    first, again = draw(), 0.0
    if batch_size == 1:
        jax.clear_caches()
        again = draw()
    branches = num_branches(sampling.guidance_scale, sampling.image_guidance_scale)
    steps = len(make_sampler(config.scheduler, sampling).timesteps)
    flops = batch_size * generation_flops(config, steps, branches).total()
    contenders = {"": draw, **(original.tasks(f"generation {batch_size}") if original else {})}
    times, *theirs = machine.times(f"{what}, {steps} steps", contenders, flops)
    yield Row(f"{what}: compile", [first - times.median])
    if batch_size == 1:
        yield Row(f"{what}: compile, from the cache", [again - times.median])
    yield from (times, *theirs)
    assert times.floor is not None
    rates = [batch_size / seconds for seconds in times.seen]
    yield Row(f"{what}: rate", rates, "stories/s", batch_size / times.floor, times.mfu)
    yield machine.peak_memory()._replace(what=f"{what}: peak memory so far")


class CompilationCount:
    """Context manager that counts the programs JAX has made or fetched in it."""

    count = 0

    def __enter__(self) -> CompilationCount:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def mixed_requests(pipeline: StoryPipeline) -> Iterator[Row]:
    """Requests of one or two stories, each with a seed, scales and StoryFlow values of its own."""
    config, rng = pipeline.model.config, random.Random(0)

    def request() -> None:
        sampling = dataclasses.replace(
            config.sampling,
            guidance_scale=rng.uniform(2, 10),
            guidance_rescale=rng.random(),
        )
        motion = [rng.uniform(10, 40) for _ in range(config.unet.n_frames - 1)]
        pipeline.draw(
            stories(config, rng.randint(1, 2)),
            seed=rng.randrange(2**32),
            sampling=sampling,
            storyflow=motion,
        )

    for count in (1, 2):
        pipeline.draw(stories(config, count))
    with CompilationCount() as counter:
        seconds = [timed(request)() for _ in range(REQUESTS)]
    yield Row(f"{REQUESTS} mixed requests of 1 or 2 stories", seconds)
    yield Row(f"{REQUESTS} mixed requests: programs compiled", [counter.count], "")


def cold_start(model: StoryModel, params: Parts) -> Iterator[Row]:
    """`generate` as a new process, from a checkpoint in float32, with its programs cached."""
    (one,) = stories(model.config, 1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, first_frame = Path(folder) / "checkpoint", Path(folder) / "first.png"
        meta = {"step": 0, "storyflow": STORYFLOW[: model.config.unet.n_frames - 1]}
        write_weights(checkpoint, model.config, TOKENIZER_DIR, {"ema_params": params}, meta)
        command = [sys.executable, "-m", "contextualstory_jax.generate", "--out", f"{folder}/out"]
        command += ["--checkpoint", str(checkpoint), "--dtype", jnp.dtype(model.dtype).name]
        command += ["--sentence", *one.sentences]
        if one.first_frame is not None:
            Image.fromarray(one.first_frame).save(first_frame)
            command += ["--first-frame", str(first_frame)]
        cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"]}
        for _ in range(2):  # the first fills the cache
            began = time.perf_counter()
            subprocess.run(
                command,
                check=True,
                cwd=Path(__file__).parents[2],
                env={**os.environ, **cache},
                stdout=subprocess.DEVNULL,
            )
            seconds = time.perf_counter() - began
    yield Row("new process to its first story", [seconds])
