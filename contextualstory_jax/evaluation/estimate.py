"""The least time and memory that the generation of stories takes, before it starts."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.diffusion.denoising import make_sampler
from contextualstory_jax.diffusion.guidance import num_branches
from contextualstory_jax.models.flops import generation_flops
from contextualstory_jax.sampling.pipeline import StoryPipeline

REPEATS = 5


def story_flops(config: ModelConfig) -> int:
    """Operations of one story at the model's own sampling settings."""
    sampling = config.sampling
    steps = len(make_sampler(config.scheduler, sampling).timesteps)
    branches = num_branches(sampling.guidance_scale, sampling.image_guidance_scale)
    return generation_flops(config, steps, branches).total()


def weight_bytes(pipeline: StoryPipeline) -> int:
    """Bytes of a model's weights, of which every device holds a copy."""
    sizes = (math.prod(x.shape) for part in pipeline.params.values() for x in part.values())
    return sum(sizes) * jnp.dtype(pipeline.model.dtype).itemsize


def matmul_rate(dtype: str) -> float:
    """Operations a second of one device in a large matrix product: the best of some, measured."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def lines(
    stories: int, operations: int, rate: float, devices: str, weights: int, batch_size: int
) -> list[str]:
    """The estimate in words.

    Args:
        stories: How many are to be generated.
        operations: Of one story.
        rate: Operations a second of all devices together.
        devices: Their number and kind.
        weights: Bytes of the weights on each device.
        batch_size: Stories generated at once.
    """
    total = stories * operations
    return [
        f"to generate: {stories:,} {'story' if stories == 1 else 'stories'} of {operations:.3g} "
        f"floating-point operations, {total:.3g} in all",
        f"time: at least {duration(total / rate)} if all of it ran at {rate:.2g} operations a "
        f"second, the rate of a large matrix product on {devices}, measured now; convolutions, "
        "attention, compilation and measuring take more",
        f"memory: {weights / 1e9:.2g} GB of weights on each device; activations of {batch_size} "
        "stories come on top and are not estimated (--batch-size 1 needs least)",
    ]


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} seconds"
