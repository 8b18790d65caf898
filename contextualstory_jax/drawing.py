"""The program that draws a batch: sentences' token ids and noise in, pictures out.

Compiled once for a size of batch: text tower, contextualizer, keys and values, what all steps are
told of time, first frame, every denoising step in one `lax.scan`, and the codec. Scales, eta,
StoryFlow values and FrameInit's filter are its arguments, so that changing them compiles nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, Real, UInt8

from contextualstory_jax.diffusion.frameinit import FrameInit, mix
from contextualstory_jax.diffusion.guidance import guide
from contextualstory_jax.diffusion.samplers import Sampler, denoise
from contextualstory_jax.model import Parts, StoryModel
from contextualstory_jax.processes import compiled_together
from contextualstory_jax.sharding import Placement, batch_ways

DECODED_AT_ONCE = 4  # stories on a device


class Inputs(NamedTuple):
    """What one batch is drawn from, on the device."""

    ids: Int[Array, "b f l"]
    noise: Float[Array, "b f p q c"]
    step_keys: Key[Array, " b"]  # of stochastic samplers
    frame_keys: Key[Array, " b"]  # of the first frame's posterior
    first_frame: Real[Array, "b g h w 3"] | None  # held still, g = 1, or filmed, g = f; 0..255


class Scales(NamedTuple):
    """Guidance scales, as arrays."""

    text: Float[Array, ""]
    image: Float[Array, ""]
    rescale: Float[Array, ""]


def interleave(branches: Sequence[Float[Array, "b ..."]]) -> Float[Array, "bn ..."]:
    """One batch of several: all branches of the first story, then of the second.

    So each device keeps those of its stories; one batch after the other would move them.
    """
    return jnp.stack(branches, axis=1).reshape(-1, *branches[0].shape[1:])


def draw_latents(
    model: StoryModel,
    branches: int,
    params: Parts,
    inputs: Inputs,
    null_ids: Int[Array, " l"],
    motion: Float[Array, " m"],
    sampler: Sampler,
    scales: Scales,
    frameinit: FrameInit | None,
) -> Float[Array, "b f p q c"]:
    """Denoise one batch; `branches` is how many predictions guidance needs (`guidance.py`)."""
    storyline = model.contextualize(params, model.encode_text(params, inputs.ids))
    text = model.text_keys_values(params, storyline)
    if branches > 1:
        # The null text bypasses the contextualizer, and is the same for all frames and stories.
        null_text = model.encode_text(params, null_ids[None, None])
        null = model.text_keys_values(params, null_text)

        def all_branches(null: Array, own: Array) -> Array:
            return interleave([jnp.broadcast_to(null, own.shape)] * (branches - 1) + [own])

        text = jax.tree.map(all_branches, null, text)
    # Of all steps at once; the first axis is theirs.
    shifts = jax.vmap(lambda t: model.time_shifts(params, t[None], motion[None]))(
        jnp.asarray(sampler.timesteps)
    )
    noise, first_latents, first_inputs = inputs.noise, None, None
    if inputs.first_frame is not None:
        clip = model.encode_pictures(params, inputs.first_frame, inputs.frame_keys)
        first_latents = clip[:, :1]
        if frameinit is not None:
            noise = mix(frameinit, clip, noise)
        first_inputs = first_latents[:, 0]
        if branches == 3:
            # With image guidance the first branch is given the initial noise for a first frame.
            # Parity: as large as the solver's first latents are, also where that is not the
            # network's scale.
            scaled_noise = noise[:, 0] * sampler.init_noise_sigma
            first_inputs = interleave([scaled_noise, first_inputs, first_inputs])
        noise = noise[:, 1:]

    def predict(x: Array, shifts: Any) -> Array:
        # Branches that differ by their text alone share what comes before it.
        given = interleave([x] * branches) if branches == 3 else x
        prediction = model.predict(params, given, shifts, text, first_inputs)
        prediction = prediction.reshape(-1, branches, *x.shape[1:]).swapaxes(0, 1)
        return guide(prediction, scales.text, scales.image, scales.rescale)

    latents = denoise(sampler, predict, noise, inputs.step_keys, shifts)
    return latents if first_latents is None else jnp.concatenate([first_latents, latents], axis=1)


def decode(
    model: StoryModel, params: Parts, latents: Float[Array, "b f p q c"], ways: int
) -> UInt8[Array, "b f h w 3"]:
    """Pictures of latents that lie on `ways` devices, on each a few stories at a time.

    The codec's largest arrays, at the pictures' full size, bound how many stories fit in memory.
    """
    of_device = len(latents) // ways
    at_once = ways * math.gcd(of_device, DECODED_AT_ONCE)
    # Every n-th story, so that each device has its share of each turn.
    turns = latents.reshape(at_once, -1, *latents.shape[1:]).swapaxes(0, 1)
    if len(turns) == 1:
        return model.decode(params, latents)
    pictures = jax.lax.map(functools.partial(model.decode, params), turns).swapaxes(0, 1)
    return pictures.reshape(len(latents), *pictures.shape[2:])


@functools.lru_cache(maxsize=1)  # training draws again and again, each time with other weights
def shared_program(model: StoryModel, placement: Placement) -> Callable[..., tuple[Array, Array]]:
    """`drawing_program`, for processes that draw together."""
    return compiled_together(drawing_program(model, placement), static=1)


def drawing_program(model: StoryModel, placement: Placement) -> jax.stages.Wrapped:
    """What draws a batch: pictures and latents of `draw_latents`'s arguments but the model."""

    def program(branches: int, params: Parts, *arguments: Any) -> tuple[Array, Array]:
        params = placement.whole(params)
        latents = draw_latents(model, branches, params, *arguments)
        return decode(model, params, latents, batch_ways(placement.mesh)), latents

    # Pictures come back to every process.
    everywhere = NamedSharding(placement.mesh, PartitionSpec())
    return jax.jit(program, static_argnums=0, out_shardings=everywhere)
