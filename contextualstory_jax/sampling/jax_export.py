"""The generation program as a file that JAX alone can run, without this package.

::

    Path("story.jaxexport").write_bytes(export_generation(pipeline))
    weights, request = generation_arrays(pipeline, sentences, seed=0)
    images, latents = jax.export.deserialize(Path(...).read_bytes()).call(weights, request)

One file serves any weights of the model, any request of its number of stories, any number of steps
and any scales that need the same branches of guidance.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from contextualstory_jax.diffusion.denoising import initial_state, padded
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.sampling.arguments import Story, read_size, read_stories
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.sampling.sample import Request, finish, prepare, take_steps
from contextualstory_jax.utils.errors import require

Arrays = dict[str, Any]  # by name


def export_generation(
    pipeline: StoryPipeline,
    batch_size: int = 1,
    platforms: Sequence[str] = ("cpu", "cuda"),
    **options: Any,
) -> bytes:
    """The program as `jax.export` serializes it: images and latents of weights and a request.

    Args:
        batch_size: stories at once.
        platforms: some of cpu, cuda, rocm and tpu.
        options: those of `StoryPipeline.request`. Their size, solver and branches of guidance are
            the program's; everything else is the request's.

    Raises:
        UserError: without the extra [export], or where the options do not fit the model.
    """
    require(
        importlib.util.find_spec("flatbuffers") is not None,
        "flatbuffers is not installed; install the package with the extra [export]",
    )
    size = read_size(pipeline.model.config, *(options.get("size") or (None, None)))
    request = pipeline.request(pipeline.blank_stories(batch_size, size), **options)
    program = jax.jit(_flat_program(pipeline.model, request))
    arguments = _weights(pipeline), _named(request)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return bytes(jax.export.export(program, platforms=platforms)(*shapes).serialize())


def generation_arrays(
    pipeline: StoryPipeline, sentences: Sequence[str] | Sequence[Story], **options: Any
) -> tuple[Arrays, Arrays]:
    """The two arguments of an exported program: weights, and a request.

    Args:
        sentences: of one story, or as many stories as the program was exported for.
        options: those of `StoryPipeline.request`.

    Raises:
        UserError: for input that does not fit the model.
    """
    stories, _ = read_stories(sentences)
    return _weights(pipeline), _named(pipeline.request(stories, **options))


def _weights(pipeline: StoryPipeline) -> Arrays:
    parts = pipeline.params.items()
    return {f"{part}.{name}": array for part, leaves in parts for name, array in leaves.items()}


def _named(request: Request) -> Arrays:
    """The arrays of a request by their path in it, keys as their data, and its number of steps."""
    steps = np.int32(len(request.sampler.timesteps))
    leaves, _ = jax.tree_util.tree_flatten_with_path(_without_branches(request))
    arrays = {_name(path): np.asarray(jnp.asarray(_key_data(leaf))) for path, leaf in leaves}
    return {"steps": steps, **arrays}


def _flat_program(
    model: StoryModel, example: Request
) -> Callable[[Arrays, Arrays], tuple[Array, Array]]:
    """The function of named arrays, for requests of the example's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(_without_branches(example))
    names = [_name(path) for path, _ in leaves]
    keys = {_name(path) for path, leaf in leaves if _is_key(leaf)}
    branches = example.branches

    def generate(weights: Arrays, request: Arrays) -> tuple[Array, Array]:
        params: Parts = {part: {} for part in model.networks}
        for name, array in weights.items():
            part, _, leaf = name.partition(".")
            params[part][leaf] = array
        arrays = [jax.random.wrap_key_data(request[n]) if n in keys else request[n] for n in names]
        _, inputs, null_ids, motion, sampler, scales, frameinit = structure.unflatten(arrays)
        sigma = sampler.init_noise_sigma
        given, latents = prepare(
            model, branches, params, inputs, null_ids, motion, scales, sigma, frameinit
        )
        bounds = jnp.int32(0), request["steps"]
        state = initial_state(sampler, latents)
        state = take_steps(model, branches, params, given, sampler, state, *bounds)
        return finish(model, params, given.clean_first, state.latents, 1)

    return generate


def _without_branches(request: Request) -> Any:
    """The request as arrays alone; the branches of guidance are the program's."""
    return request._replace(branches=None, sampler=padded(request.sampler))  # type: ignore[arg-type]


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf
