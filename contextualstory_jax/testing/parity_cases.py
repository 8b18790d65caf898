"""Runs parity cases: our outputs beside the original's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import FrameInitConfig, SamplingConfig, UNetConfig
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.temporal import clamp_alphas
from contextualstory_jax.models.unet import UNet
from contextualstory_jax.sampling.pipeline import Story, StoryPipeline
from contextualstory_jax.testing import parity_weights

MODULE_TOLERANCE = 1e-5
UNET_TOLERANCE = 2e-5
LATENTS_TOLERANCE = 5e-5
PICTURES_TOLERANCE = 2e-4  # one 8-bit value in a thousand is off by one


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The L2 norm of the difference as a share of that of `theirs`."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


class Comparison(NamedTuple):
    """An output of ours and the original's, and the largest relative error in float32 on a CPU."""

    ours: np.ndarray
    theirs: np.ndarray
    tolerance: float
    what: str = ""  # of a case's several outputs


class Case:
    """The call (`info`), inputs and outputs (`arrays`), the UNet with `parity_weights`' weights.

    Modules compute in `dtype`.
    """

    def __init__(self, path: Path, dtype: Any = jnp.float32):
        self.info = json.loads(path.read_text())
        self.arrays = dict(np.load(path.with_suffix(".npz")))
        if "inputs" in self.info:  # too large to store
            for key, name in (("text", "text"), ("null_text", "null")):
                shape = (self.info["unet_config"]["n_frames"], 77, self.info["text_dim"])
                seed = self.info["weight_seed"]
                self.arrays[key] = parity_weights.randn(self.info["name"] + name, shape, seed)
        values = dict(self.info["unet_config"], max_text_length=self.info["max_text_length"])
        assert values["cross_attention_dim"] == self.info["text_dim"]
        self.config = build(UNetConfig, values, "unet.")
        self.network = Network(lambda: UNet(self.config))
        self.params = clamp_alphas(parity_weights.params(self.network, self.info["weight_seed"]))
        self.dtype = dtype

    def run(self, function: Callable[..., jax.Array], *inputs: np.ndarray | None) -> np.ndarray:
        """Call `function(unet, *inputs)`, inputs in the computing dtype, in one program."""

        def program(params, inputs):
            inputs = jax.tree.map(lambda x: x.astype(self.dtype), inputs)
            return function(self.network.bind(params, self.dtype), *inputs).astype(jnp.float32)

        return np.asarray(jax.jit(program)(self.params, inputs))

    def frames(self, name: str) -> np.ndarray:
        """An array of frames (b f) c h w as b f h w c."""
        return rearrange(self.arrays[name], "(b f) c h w -> b f h w c", f=self.config.n_frames)


def compare(case: Case) -> Iterator[Comparison]:
    """Every output of a case."""
    return COMPARE[case.info["kind"]](case)


def compare_module(case: Case) -> Iterator[Comparison]:
    """A module of the UNet, on the hidden states of a case."""
    path = case.info["path"].split(".")

    def module(unet, hidden):
        found = functools.reduce(
            lambda m, word: m[int(word)] if word.isdigit() else getattr(m, word), path, unet
        )
        return found(hidden)

    ours = case.run(module, case.frames("hidden"))
    yield Comparison(ours, case.frames("output"), MODULE_TOLERANCE)


def compare_storyline(case: Case) -> Iterator[Comparison]:
    """StoryLine: the contextualized text."""
    ours = case.run(lambda unet, text: unet.contextualize(text), case.arrays["context"])
    yield Comparison(ours, case.arrays["output"], MODULE_TOLERANCE)


def compare_storyflow(case: Case) -> Iterator[Comparison]:
    """StoryFlow: the embeddings in training and in sampling."""
    f, motion = (
        case.config.n_frames,
        jnp.asarray(case.arrays["motion"]),
    )  # float32 in any computing dtype
    ours = rearrange(case.run(lambda unet: unet.storyflow(motion)), "b f c -> (b f) c")
    yield Comparison(ours, case.arrays["train_embedding"], MODULE_TOLERANCE, "in training")
    shared = case.run(lambda unet: unet.storyflow(motion[:1]))
    stories = case.arrays["test_embedding"].shape[0] // f
    ours = repeat(shared, "1 f c -> (b f) c", b=stories)
    yield Comparison(ours, case.arrays["test_embedding"], MODULE_TOLERANCE, "in sampling")


def unet_inputs(case: Case) -> tuple[np.ndarray | None, ...]:
    """Sample, text, null text and first frame in our layouts."""
    arrays, f = case.arrays, case.config.n_frames
    first_frame = arrays.get("first_frame_latents")
    if first_frame is not None:
        first_frame = rearrange(first_frame, "b c 1 h w -> b h w c")
    return (
        rearrange(arrays["sample"], "b c f h w -> b f h w c"),
        rearrange(arrays["text"], "(b f) l d -> b f l d", f=f),
        arrays["null_text"][None],
        first_frame,
    )


def frame_strides(case: Case, batch: int) -> jax.Array | None:
    """A stride for each story of a batch, or for each of its frames.

    A case gives one number, in its JSON or its arrays, one a story, or one a frame.
    """
    given = case.arrays.get("frame_stride", case.info.get("frame_stride"))
    if given is None:
        return None
    stories, frames = case.arrays["sample"].shape[0], case.config.n_frames
    of_frames = np.size(given) in (stories * frames, batch * frames)
    return jnp.asarray(np.resize(given, (batch, frames) if of_frames else (batch,)))


def predict_noise(case: Case, unet: UNet, sample, text, null_text, first_frame) -> jax.Array:
    """The UNet on `unet_inputs`, which may be traced; all branches of guidance together."""
    arrays = case.arrays
    # Guidance: this many branches with the null text stand before the conditional one.
    unconditional = {None: 0, "text": 1, "both": 2}[case.info["guidance"]]

    def branches(x):
        return jnp.concatenate([x] * (unconditional + 1))

    storyline = unet.contextualize(text)
    null_text = jnp.broadcast_to(null_text, storyline.shape)
    if case.info["mode"] == "train":
        storyline = jnp.where(arrays["is_null"][:, None, None, None], null_text, storyline)
    storyline = jnp.concatenate([null_text] * unconditional + [storyline])
    sample = branches(sample)
    timesteps = jnp.broadcast_to(arrays["timesteps"], sample.shape[:1])
    storyflow = unet.storyflow(jnp.asarray(arrays["motion"]))
    return unet(
        sample,
        unet.time_shifts(timesteps, storyflow, frame_strides(case, len(sample))),
        unet.text_keys_values(storyline),
        None if first_frame is None else branches(first_frame),
    )


def compare_unet(case: Case) -> Iterator[Comparison]:
    """The UNet's predicted noise."""
    ours = case.run(functools.partial(predict_noise, case), *unet_inputs(case))
    ours = rearrange(ours, "b f h w c -> b c f h w")
    yield Comparison(ours, case.arrays["noise_pred"], UNET_TOLERANCE)


COMPARE = {
    "temporal_conv": compare_module,
    "temporal_transformer": compare_module,
    "storyline": compare_storyline,
    "storyflow": compare_storyflow,
    "unet": compare_unet,
}


def frameinit_of(info: Mapping[str, Any]) -> FrameInitConfig | None:
    """A pipeline case's FrameInit as our config."""
    given = info["frameinit"]
    names: dict[str, str] = {"d_s": "spatial", "d_t": "temporal", "n": "order"}
    if given is None:
        return None
    parameters: Mapping[str, Any] = given["filter_params"]
    values = {names.get(name, name): value for name, value in parameters.items()}
    return build(FrameInitConfig, {"level": given["noise_level"]} | values, "frameinit.")


def compare_pipeline(path: Path, pipeline: StoryPipeline) -> Iterator[Comparison]:
    """A pipeline case's text encoder, latents and images, of a checkpoint of its own weights."""
    info, arrays = json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))
    f, motion = info["n_frames"], path.parent / "checkpoint" / "cumulative_motion.json"
    initial, final, pictures = (
        rearrange(arrays[name], "b c f h w -> b f h w c")
        for name in ("latents", "final_latents", "pictures")
    )
    given = arrays.get("first_frames_uint8", [None] * len(initial))

    ids = pipeline.tokenizer(info["prompts"])[: len(arrays["text_embeddings"])]
    text = jax.jit(pipeline.model.encode_text)(pipeline.params, jnp.asarray(ids)[None])
    generated = pipeline.draw(
        [
            Story(info["prompts"][i * f : (i + 1) * f], f"{info['name']}_{i}", first_frame)
            for i, first_frame in enumerate(given)
        ],
        sampling=SamplingConfig(
            steps=info["num_inference_steps"],
            guidance_scale=info["guidance_scale_txt"],
            image_guidance_scale=info["guidance_scale_img"],
            guidance_rescale=info["guidance_rescale"],
            eta=info["eta"],
        ),
        size=(info["height"], info["width"]),
        storyflow=json.loads(motion.read_text())[0],
        initial_latents=np.ascontiguousarray(initial),
        frameinit=frameinit_of(info),
    )

    embeddings = np.asarray(text[0], np.float32)
    yield Comparison(embeddings, arrays["text_embeddings"], MODULE_TOLERANCE, "text encoder")
    yield Comparison(generated.latents, final, LATENTS_TOLERANCE, "latents")
    ours, theirs = generated.images.astype(np.float32), pictures.astype(np.float32)
    yield Comparison(ours, theirs, PICTURES_TOLERANCE, "pictures")
