"""Callbacks of a pipeline call, which read and replace latents between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from contextualstory_jax.diffusion.denoising import Sampler
from contextualstory_jax.sampling.arguments import read_replaced_latents
from contextualstory_jax.sampling.sample import AfterStep

# Called after each step with the pipeline, the step's number and timestep, and `{"latents": ...}`,
# channels last, in the solver's scale; returns those to replace, or None.
StepCallback = Callable[[Any, int, int | float, dict[str, Any]], dict[str, Any] | None]


def after_each_step(
    callback: StepCallback,
    pipeline: Any,
    place: Callable[[Array], Array],
    sampler: Sampler,
    real: int,
) -> AfterStep:
    """The callback for a batch of which the first `real` stories are asked for.

    Args:
        callback: the user's.
        pipeline: the `StoryPipeline`, whose `interrupt` it may set.
        place: moves latents of a batch to where they were.
        sampler: with the timesteps.
        real: number of stories.
    """

    def after_step(step: int, latents: Array) -> tuple[Array, bool]:
        shown = jnp.array(latents[:real], copy=True)  # the next step overwrites its own
        given = callback(pipeline, step, sampler.timesteps[step].item(), {"latents": shown})
        replaced = (given or {}).get("latents", shown)
        if replaced is not shown:
            latents = place(read_replaced_latents(replaced, shown.shape, len(latents)))
        return latents, not pipeline.interrupt

    return after_step
