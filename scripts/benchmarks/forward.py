"""Forward passes that the original has as well: the UNet under guidance, and SETA alone.

One story, with and without its text, as the sampler asks for at every step. What does not depend on
the step is computed beforehand; the original computes it again.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.models.flops import attention, dense, unet_flops
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.sampling.sample import interleave
from contextualstory_jax.testing import parity_weights
from contextualstory_jax.testing.parity_cases import relative_error
from scripts.benchmarks.measuring import Compiled, Machine, Row, compile_twice, timed
from scripts.benchmarks.original import Original

BRANCHES = 2  # with the text and without
ALPHA = 0.3  # of every temporal blend, so that what looks across frames has a say
TIMESTEP = 500
TOLERANCES = {"float32": 2e-5, "bfloat16": 6e-2}  # relative L2 errors against the original
THEIR_DTYPES = {"float32": "float32", "bfloat16": "float16"}  # as it is run


class Place(NamedTuple):
    """A layer with SETA."""

    path: str  # of its transformer block
    side: int  # of its feature map
    channels: int


def named_weights(model: StoryModel, parts: Sequence[str]) -> Parts:
    """Weights that follow from their names, in float32 in the host's memory."""
    prefixes = {"unet": "", "vae": "vae.", "text_encoder": "text_encoder."}
    with jax.default_device(jax.devices("cpu")[0]):
        params: Parts = {
            p: dict(parity_weights.params(model.networks[p], 0, prefixes[p])) for p in parts
        }
    for name in params["unet"]:
        if name.endswith(".alpha"):
            params["unet"][name] = np.full_like(params["unet"][name], ALPHA)
    return params


def seta_places(model: StoryModel) -> list[Place]:
    """Every layer with SETA, which the mid block has none of."""
    pattern = r"((down|up)_blocks\.(\d+)\.tempo_attns\..*)\.attn1\.to_q\.kernel"
    height, _ = model.config.latent_size(model.config.height, model.config.width)
    levels = len(model.config.unet.block_out_channels)
    places = []
    for name, declared in model.unet.shapes.items():
        if (found := re.fullmatch(pattern, name)) and model.config.unet.augment_temporal_attention:
            level = int(found[3]) if found[2] == "down" else levels - 1 - int(found[3])
            places.append(Place(found[1], height >> level, declared.shape[0]))
    return places


def inputs(model: StoryModel) -> dict[str, np.ndarray]:
    """Inputs of the forward passes, by name."""
    config, unet = model.config, model.config.unet
    f, size = unet.n_frames, config.latent_size(config.height, config.width)
    words, width = config.text_encoder.max_position_embeddings, unet.cross_attention_dim
    shapes: dict[str, tuple[int, ...]] = {
        "sample": (1, f - unet.is_continuation, *size, unet.in_channels),
        "text": (1, f, words, width),
        "null_text": (1, f, words, width),
    }
    if unet.is_continuation:
        shapes["first_frame"] = (1, 1, *size, unet.in_channels)
    for place in seta_places(model):
        shapes[place.path] = (BRANCHES, f, place.side, place.side, place.channels)
    arrays = {name: parity_weights.randn(name, shape, 0) for name, shape in shapes.items()}
    arrays["timestep"] = np.asarray(TIMESTEP, np.float32)
    arrays["motion"] = 20 + 5 * np.arange(f - 1, dtype=np.float32)[None]
    return arrays


class Forward(NamedTuple):
    """A forward pass of ours, and what the original calls it."""

    what: str
    request: str
    compiled: Compiled
    arguments: tuple[Any, ...]
    flops: int

    def run(self) -> list[jax.Array]:
        return self.compiled.program(*self.arguments)


def unet_forward(model: StoryModel, params: Parts, arrays: dict[str, np.ndarray]) -> Forward:
    """A guided prediction of one story's noise."""

    def prepare(params: Parts, text: jax.Array, null_text: jax.Array, motion: jax.Array):
        storyline = interleave([null_text, model.contextualize(params, text)])
        shifts = model.time_shifts(params, jnp.full(1, TIMESTEP), motion)
        return shifts, model.text_keys_values(params, storyline)

    def predict(params: Parts, sample: jax.Array, conditions: Any, first_frame: jax.Array | None):
        first = None if first_frame is None else first_frame[:, 0]
        return [model.predict(params, sample, *conditions, first)]

    texts = (jnp.asarray(arrays[name], model.dtype) for name in ("text", "null_text"))
    conditions = jax.jit(prepare)(params, *texts, arrays["motion"])
    arguments = (params, arrays["sample"], conditions, arrays.get("first_frame"))
    compiled = compile_twice(lambda: jax.jit(predict).lower(*arguments))
    flops = BRANCHES * unet_flops(model.config).total()
    return Forward("UNet, one guided step of a story", "unet", compiled, arguments, flops)


def seta_forward(
    model: StoryModel,
    params: Parts,
    arrays: dict[str, np.ndarray],
    what: str,
    places: Sequence[Place],
) -> Forward:
    """SETA with its projections and residual, in one layer or in several, one after the other."""

    def attend(params: Parts, maps: dict[str, jax.Array]) -> list[jax.Array]:
        unet = model.unet.bind(params["unet"], model.dtype)
        return [x + find(unet, path).attn1(x) for path, x in maps.items()]

    maps = {place.path: jnp.asarray(arrays[place.path], model.dtype) for place in places}
    compiled = compile_twice(lambda: jax.jit(attend).lower(params, maps))
    frames = model.config.unet.n_frames
    flops = sum(seta_flops(frames, place) for place in places)
    request = " ".join(["seta", *(place.path for place in places)])
    return Forward(what, request, compiled, (params, maps), BRANCHES * flops)


def find(module: Any, path: str) -> Any:
    """A module inside another."""
    return functools.reduce(
        lambda m, word: m[int(word)] if word.isdigit() else getattr(m, word),
        path.split("."),
        module,
    )


def seta_flops(frames: int, place: Place) -> int:
    """Of one branch: projections, and the keys that a query sees."""
    tokens = frames * place.side**2
    projections = 4 * dense(tokens, place.channels, place.channels)
    return projections + attention(tokens, 9 * frames - 8, place.channels)


def load_original(
    original: Original, model: ModelConfig, arrays: dict[str, np.ndarray], dtype: str
) -> None:
    """Give the original the same weights and inputs."""
    about = {"config": dataclasses.asdict(model), "dtype": THEIR_DTYPES[dtype], "alpha": ALPHA}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "inputs.npz")
        np.savez(file, **arrays)
        original.ask("load", inputs=file, **about)


def errors(forward: Forward, original: Original) -> Iterator[tuple[str, float]]:
    """Errors of each variant of the original against ours."""
    ours = [np.asarray(array, np.float32) for array in forward.run()]
    for variant in original.variants:
        theirs = original.outputs(forward.request, variant)
        pairs = zip(ours, theirs, strict=True)
        yield f"{forward.what}, {variant}", max(relative_error(a, b) for a, b in pairs)


def rows(machine: Machine, forward: Forward, original: Original | None) -> Iterator[Row]:
    """The lines of a forward pass."""
    yield from forward.compiled.rows(forward.what)
    contenders = {"": timed(forward.run), **(original.tasks(forward.request) if original else {})}
    yield from machine.times(forward.what, contenders, forward.flops)
