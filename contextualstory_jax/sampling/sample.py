"""The programs that generate a batch: sentences' token ids and noise in, images out.

Three functions, each compiled once for a size of batch, run one after the other. `prepare` computes
what no step changes: text encoder, contextualizer, keys and values, the first frame. `steps` takes
the denoising steps from one number up to another, in a loop whose bounds are inputs. `decode` is
the VAE. Scheduler tables, scales, eta, StoryFlow values and FrameInit's filter are arguments as
well, and so are the frames to keep: changing them compiles nothing, and Python may read the latents
between any two steps. A fourth, `encode`, is for kept images whose latents are not known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Real, UInt8

from contextualstory_jax.config.model_config import SamplingConfig
from contextualstory_jax.diffusion.denoising import (
    KeptFrames,
    Sampler,
    State,
    denoise,
    initial_state,
    padded,
)
from contextualstory_jax.diffusion.frameinit import FrameInit, mix
from contextualstory_jax.diffusion.guidance import guide
from contextualstory_jax.distributed.multihost import compiled_together
from contextualstory_jax.distributed.sharding import BATCH, HEADS, Placement, batch_ways
from contextualstory_jax.models.blocks import TextKeysValues
from contextualstory_jax.models.fused_attention import attention_on
from contextualstory_jax.models.story_model import Parts, StoryModel

T = TypeVar("T")

DECODED_AT_ONCE = 4  # stories on a device


class Inputs(NamedTuple):
    """The inputs of one batch, on the device."""

    ids: Int[Array, "b f l"]
    noise: Float[Array | np.ndarray, "b f p q c"]
    step_keys: Key[Array, " b"]  # of stochastic samplers
    frame_keys: Key[Array, " b"]  # of the first frame's posterior
    first_frame: Real[Array, "b g h w 3"] | None  # held still, g = 1, or filmed, g = f; 0..255
    keep: Bool[Array | np.ndarray, "b f"]  # frames that are not generated
    clean: Float[Array | np.ndarray, "b f p q c"]  # their latents


class Scales(NamedTuple):
    """Guidance scales, as arrays."""

    text: Float[Array, ""]
    image: Float[Array, ""]
    rescale: Float[Array, ""]

    @classmethod
    def of(cls, sampling: SamplingConfig) -> Scales:
        """Those of a config."""
        names = ("guidance_scale", "image_guidance_scale", "guidance_rescale")
        return cls(*(jnp.float32(getattr(sampling, name)) for name in names))


class Request(NamedTuple):
    """Everything that a batch is generated from, weights aside."""

    branches: int  # the number of predictions that guidance needs (`guidance.py`)
    inputs: Inputs
    null_ids: Int[Array | np.ndarray, "#f l"]
    motion: Float[Array | np.ndarray, " m"]  # StoryFlow values
    sampler: Sampler
    scales: Scales
    frameinit: FrameInit | None


class Conditioning(NamedTuple):
    """Everything that all steps of a batch share, weights aside."""

    text: list[TextKeysValues]  # of all branches of guidance
    clean_first: Float[Array, "b 1 p q c"] | None  # latents of the first frame
    first_frame: Float[Array, "bn p q c"] | None  # the network's, of all branches where they differ
    kept: KeptFrames  # without the first, in continuation
    step_keys: Key[Array, " b"]
    motion: Float[Array, " m"]  # StoryFlow values
    scales: Scales


def interleave(branches: Sequence[Float[Array, "b ..."]]) -> Float[Array, "bn ..."]:
    """One batch of several: all branches of the first story, then of the second.

    So each device keeps those of its stories; one batch after the other would move them.
    """
    return jnp.stack(branches, axis=1).reshape(-1, *branches[0].shape[1:])


def prepare(
    model: StoryModel,
    branches: int,
    params: Parts,
    inputs: Inputs,
    null_ids: Int[Array, "#f l"],
    motion: Float[Array, " m"],
    scales: Scales,
    init_noise_sigma: Float[Array, ""],
    frameinit: FrameInit | None,
) -> tuple[Conditioning, Float[Array, "b g p q c"]]:
    """Conditioning that all steps share, and the latents that they begin with.

    Args:
        branches: number of predictions that guidance needs (`guidance.py`).
    """
    storyline = model.contextualize(params, model.encode_text(params, inputs.ids))
    text = model.text_keys_values(params, storyline)
    if branches > 1:
        # The null text, or a negative prompt, bypasses the contextualizer. It is the same for all
        # stories, and for all frames unless there is one for each.
        null_text = model.encode_text(params, null_ids[None])
        null = model.text_keys_values(params, null_text)

        def all_branches(null: Array, own: Array) -> Array:
            return interleave([jnp.broadcast_to(null, own.shape)] * (branches - 1) + [own])

        text = jax.tree.map(all_branches, null, text)
    latents = jnp.asarray(inputs.noise, jnp.float32)
    kept = KeptFrames(jnp.asarray(inputs.keep), jnp.asarray(inputs.clean), latents)
    clean_first = first_frame = None
    if inputs.first_frame is not None:
        clip = model.encode_images(params, inputs.first_frame, inputs.frame_keys)
        clean_first = kept.frames(0, 1).put_clean(clip[:, :1])
        first_frame = clean_first[:, 0]
        kept = kept.frames(1)
        if frameinit is not None:
            latents = mix(frameinit, clip, latents)
        if branches == 3:
            # With image guidance the first branch has the initial noise for a first frame. Parity:
            # as large as the solver's first latents, also where that is not the network's scale.
            noisy = latents[:, 0] * init_noise_sigma
            first_frame = interleave([noisy, first_frame, first_frame])
        latents = latents[:, 1:]
    shared = Conditioning(text, clean_first, first_frame, kept, inputs.step_keys, motion, scales)
    return shared, latents * init_noise_sigma


def take_steps(
    model: StoryModel,
    branches: int,
    params: Parts,
    given: Conditioning,
    sampler: Sampler,
    state: State,
    first: Int[Array, ""],
    last: Int[Array, ""],
) -> State:
    """Denoise a batch by the steps from `first` up to, and without, `last`."""

    def predict(x: Array, t: Array) -> Array:
        # In the loop: a product over all steps at once would round with their number.
        shifts = model.time_shifts(params, t[None], given.motion[None])
        # Branches that differ by their text alone share what comes before it.
        each = interleave([x] * branches) if branches == 3 else x
        prediction = model.predict(params, each, shifts, given.text, given.first_frame)
        prediction = prediction.reshape(-1, branches, *x.shape[1:]).swapaxes(0, 1)
        return guide(prediction, *given.scales)

    return denoise(sampler, predict, state, given.step_keys, first, last, given.kept)


def decode(
    model: StoryModel, params: Parts, latents: Float[Array, "b f p q c"], ways: int
) -> UInt8[Array, "b f h w 3"]:
    """Images of latents that lie on `ways` devices, on each a few stories at a time.

    The VAE's largest arrays, at the images' full size, bound how many stories fit in memory.
    """
    of_device = len(latents) // ways
    at_once = ways * math.gcd(of_device, DECODED_AT_ONCE)
    # Every n-th story, so that each device has its share of each turn.
    turns = latents.reshape(at_once, -1, *latents.shape[1:]).swapaxes(0, 1)
    if len(turns) == 1:
        return model.decode(params, latents)
    images = jax.lax.map(functools.partial(model.decode, params), turns).swapaxes(0, 1)
    return images.reshape(len(latents), *images.shape[2:])


def finish(
    model: StoryModel,
    params: Parts,
    clean_first: Float[Array, "b 1 p q c"] | None,
    latents: Float[Array, "b g p q c"],
    ways: int,
) -> tuple[UInt8[Array, "b f h w 3"], Float[Array, "b f p q c"]]:
    """Images and latents of all frames, the first one's before the others'."""
    if clean_first is not None:
        latents = jnp.concatenate([clean_first, latents], axis=1)
    return decode(model, params, latents, ways), latents


AfterStep = Callable[[int, Array], tuple[Array, bool]]


class Programs(NamedTuple):
    """The compiled functions that generate a batch, in order."""

    prepare: Callable[..., tuple[Conditioning, Array]]  # of `prepare`'s arguments but the model
    steps: Callable[..., State]  # of `take_steps`'s, whose state is donated
    decode: Callable[..., tuple[Array, Array]]  # images and all latents, of weights, first, others
    encode: Callable[..., Array]  # latents of weights, one story's images and a key


def generation_programs(model: StoryModel, placement: Placement) -> Programs:
    """The programs that generate batches on some devices, where the results come back to all."""
    by_story: Any = NamedSharding(placement.mesh, BATCH)
    everywhere: Any = NamedSharding(placement.mesh, PartitionSpec())
    shared = Conditioning(by_story, by_story, by_story, by_story, by_story, everywhere, everywhere)

    @attention_on(placement.mesh, HEADS)
    def prepare_batch(branches: int, params: Parts, *arguments: Any) -> tuple[Conditioning, Array]:
        return prepare(model, branches, placement.gathered(params), *arguments)

    @attention_on(placement.mesh, HEADS)
    def denoise_batch(branches: int, params: Parts, *arguments: Any) -> State:
        return take_steps(model, branches, placement.gathered(params), *arguments)

    @attention_on(placement.mesh, HEADS)
    def decode_batch(
        params: Parts, clean_first: Array | None, latents: Array
    ) -> tuple[Array, Array]:
        ways = batch_ways(placement.mesh)
        return finish(model, placement.gathered(params), clean_first, latents, ways)

    @attention_on(placement.mesh, HEADS)
    def encode_story(params: Parts, images: Array, key: Array) -> Array:
        return model.encode_images(placement.gathered(params), images[None], key[None])[0]

    # All weights stay on the device meanwhile, and memory analyses are to count them.
    jit = functools.partial(jax.jit, keep_unused=True)
    return Programs(
        jit(prepare_batch, static_argnums=0, out_shardings=(shared, by_story)),
        jit(denoise_batch, static_argnums=0, donate_argnums=4, out_shardings=by_story),
        jit(decode_batch, out_shardings=everywhere),
        jit(encode_story, out_shardings=everywhere),
    )


@functools.lru_cache(maxsize=1)  # training generates again and again, each time with other weights
def shared_programs(model: StoryModel, placement: Placement) -> Programs:
    """`generation_programs`, for processes that generate together."""
    own = generation_programs(model, placement)
    return Programs(
        compiled_together(own.prepare, static=1),
        compiled_together(own.steps, static=1),
        compiled_together(own.decode),
        compiled_together(own.encode),
    )


class Generated(NamedTuple):
    """Generated stories."""

    images: UInt8[np.ndarray, "b f h w 3"]
    latents: Float32[np.ndarray, "b f p q c"]  # before decoding


def bucket(stories: int, batch_size: int, ways: int) -> int:
    """The size of every batch, so that one program serves; the last story fills the last batch.

    A power of two or, if less, `batch_size`, so that few programs serve any number of stories; a
    multiple of the devices that a batch is split over.
    """
    size = min(batch_size, 1 << (stories - 1).bit_length())
    return -(-size // ways) * ways


def fill(batch: Sequence[T], size: int) -> list[T]:
    """A batch brought to a size by repeating its last element."""
    return [*batch, *[batch[-1]] * (size - len(batch))]


def generate(
    programs: Programs, params: Parts, request: Request, after_step: AfterStep | None = None
) -> tuple[Array, Array]:
    """Images and latents of a batch.

    Args:
        after_step: called with each step's number and latents; returns those to continue with and
            whether to. Without it, all steps are one call.
    """
    branches, inputs, null_ids, motion, sampler, scales, frameinit = request
    given, latents = programs.prepare(
        branches, params, inputs, null_ids, motion, scales, sampler.init_noise_sigma, frameinit
    )
    state, tables, count = initial_state(sampler, latents), padded(sampler), len(sampler.timesteps)
    at_once = 1 if after_step else count
    for step in range(0, count, at_once):
        bounds = np.int32(step), np.int32(step + at_once)
        state = programs.steps(branches, params, given, tables, state, *bounds)
        if after_step is not None:
            latents, more = after_step(step, state.latents)
            state = state._replace(latents=latents)
            if not more:
                break
    clean_first = given.clean_first
    del given  # so that its memory is free while images are decoded
    return programs.decode(params, clean_first, state.latents)
