"""The Python API: sentences in, images out.

Few compiled programs generate a batch (`sampling/sample.py`); batches are rounded up to few sizes.
"""

from __future__ import annotations

import functools
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float32, UInt8

from contextualstory_jax.checkpoints.layout import load_weights, read_model
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.config.model_config import FrameInitConfig, SamplingConfig
from contextualstory_jax.diffusion.denoising import make_sampler
from contextualstory_jax.diffusion.frameinit import make_frameinit
from contextualstory_jax.diffusion.guidance import num_branches
from contextualstory_jax.distributed.compilation import GenerationLog, use_compilation_cache
from contextualstory_jax.distributed.sharding import BATCH, Placement, batch_ways, make_mesh
from contextualstory_jax.models.story_model import Parts, StoryModel, clamp
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.sampling.arguments import (
    FirstFrame,
    OutputType,
    as_output,
    check_choice,
    check_frameinit,
    check_integer,
    check_stories,
    put_first_frames,
    read_negative_prompt,
    read_sampling,
    read_size,
    read_stories,
    read_storyflow,
)
from contextualstory_jax.sampling.batch_inputs import batch_inputs, read_asked, with_kept_images
from contextualstory_jax.sampling.callbacks import StepCallback, after_each_step
from contextualstory_jax.sampling.pretrained import SHIPPED, find_checkpoint
from contextualstory_jax.sampling.prompts import OVERLAP, Kept, Story
from contextualstory_jax.sampling.regeneration import S, regenerate
from contextualstory_jax.sampling.sample import (
    Generated,
    Request,
    Scales,
    bucket,
    generate,
    generation_programs,
    shared_programs,
)
from contextualstory_jax.sampling.windows import BATCH_SIZE, draw_any_length, latent_shape
from contextualstory_jax.utils.errors import require

DTYPES = ("float32", "bfloat16")


class StoryPipeline:
    """A model with weights, ready to generate: `StoryPipeline.load(folder)(sentences, seed=0)`.

    A callback that sets `interrupt` ends the generation after its step: the latents are decoded as
    they are, and later batches left out.
    """

    def __init__(
        self,
        model: StoryModel,
        params: Parts,
        tokenizer: Tokenizer,
        storyflow: Sequence[float],
        step: int | None = None,
        weights: str | None = None,
        placement: Placement | None = None,
    ):
        """A model in memory.

        Args:
            storyflow: the mean of the training stories.
            step: number of steps that the weights were trained for.
            weights: whether `params` are `ema` or `raw`.
            placement: where all processes together keep them and generate, by default this
                process's devices: processes then generate different stories, at different times.
        """
        use_compilation_cache()
        self.model, self.tokenizer, self.step, self.weights = model, tokenizer, step, weights
        self.storyflow = np.asarray(storyflow, np.float32)
        make_programs = generation_programs if placement is None else shared_programs
        placement = placement or Placement(make_mesh(MeshConfig(), jax.local_devices()))
        self.mesh = placement.mesh
        # Sampling only reads: weights are held once, in the dtype they are computed with.
        self.params = jax.device_put(_cast(params, model.dtype), placement.shardings(params))
        self._programs = make_programs(model, placement)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._log = GenerationLog(
            f"{parameters:,} parameters in {model.dtype}, {weights or 'given'} weights"
            + ("" if step is None else f" of step {step}"),
            len(model.shapes["unet"]),
        )
        self.interrupt = False

    @classmethod
    def load(
        cls, folder: str | Path = SHIPPED, *, weights: str | None = None, dtype: str = "float32"
    ) -> StoryPipeline:
        """Read a checkpoint folder: a training workdir, a converted one, or the model that ships.

        Args:
            weights: `ema` or `raw`; by default `ema` where there are such.

        Raises:
            UserError: where it is absent, incomplete or of another architecture.
        """
        folder = Path(folder)
        check_choice("dtype", dtype, DTYPES)
        model = StoryModel(read_model(folder), jnp.dtype(dtype))
        params, meta = load_weights(folder, weights, model.shapes)
        length = model.config.text_encoder.max_position_embeddings
        tokenizer = Tokenizer(folder / "tokenizer", length)
        return cls(model, params, tokenizer, meta["storyflow"], meta["step"], meta["weights"])

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "float32",
        weights: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> StoryPipeline:
        """Read a model from the Hub or a folder; released weights are converted once, then kept.

        Args:
            name_or_path: a Hub id, a folder in the released layout, a converted folder or a
                training workdir; None for the model that ships.
            dtype: to compute in: `float32` or `bfloat16`.
            weights: `ema` or `raw`; by default `ema` where there are such.
            revision: a branch, tag or commit of the Hub id.
            cache_dir: for converted models; by default in the user's cache folder.

        Raises:
            UserError: a `ValueError`, where there is no such model, or one that cannot be read.
        """
        folder = find_checkpoint(name_or_path, revision, cache_dir)
        return cls.load(folder, weights=weights, dtype=dtype)

    def __call__(
        self,
        sentences: Sequence[str] | Story | Sequence[Sequence[str]] | Sequence[Story],
        *,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        eta: float | None = None,
        height: int | None = None,
        width: int | None = None,
        image: FirstFrame | Sequence[FirstFrame] | None = None,
        latents: Float32[np.ndarray, "*b f p q c"] | None = None,
        output_type: OutputType = "np",
        first_frame: FirstFrame | None = None,
        sampling: SamplingConfig | None = None,
        size: tuple[int, int] | None = None,
        initial_latents: np.ndarray | None = None,
        **options: Any,
    ) -> Any:
        """Generate the images of one story, or of a list of stories.

        Arguments that are not given have the checkpoint's own values.

        Args:
            sentences: one for each image; or a list of stories, each a list of sentences, with
                the ids `story_0`, `story_1` and so on, or a `Story`.
            num_inference_steps: denoising steps.
            scheduler: the solver: ddim, euler, euler_ancestral, dpmpp_2m, pndm, lms or unipc.
            guidance_scale: weight of the text; up to 1 there is no guidance.
            image_guidance_scale: weight of the first frame, in continuation.
            guidance_rescale: 0 to 1, against overexposure.
            eta: share of new noise in each step of ddim, 0 to 1.
            height: pixels.
            width: pixels.
            image: the first frame, in continuation, cropped in the middle and resized; for a list
                of stories one each.
            latents: initial noise, standard normal, for all stories.
            output_type: `np` for uint8 `(f, h, w, 3)`, `pil` for a list of PIL images, `latent` for
                float32 latents `(f, p, q, c)`; for a list of stories a batch of these.
            first_frame: the same as `image`.
            sampling: steps, scheduler and scales in one; other arguments change single values.
            size: the same as `(height, width)`.
            initial_latents: the same as `latents`.
            options: those of `draw_batches`: `seed`, `negative_prompt`, `callback_on_step_end`,
                `storyflow`, `batch_size`, `frameinit` and `camera_motion`.

        Raises:
            UserError: a `ValueError`, for input that does not fit the model.
        """
        config = self.model.config
        check_choice("output_type", output_type, typing.get_args(OutputType))
        stories, single = read_stories(sentences)
        size = read_size(config, *(size or (height, width)))
        image = first_frame if image is None else image
        if image is not None:
            fitted = None if options.get("camera_motion") else size
            stories = put_first_frames(stories, image, single, fitted)
        generated = self.draw(
            stories,
            sampling=read_sampling(
                config,
                sampling,
                num_inference_steps=num_inference_steps,
                scheduler=scheduler,
                guidance_scale=guidance_scale,
                image_guidance_scale=image_guidance_scale,
                guidance_rescale=guidance_rescale,
                eta=eta,
            ),
            size=size,
            initial_latents=initial_latents if latents is None else latents,
            **options,
        )
        output = as_output(output_type, generated.images, generated.latents)
        return output[0] if single else output

    def draw(
        self,
        stories: Sequence[Story],
        *,
        progress: Callable[[int], object] = lambda generated: None,
        **options: Any,
    ) -> Generated:
        """Generate stories; options are those of `draw_batches`.

        Args:
            progress: called after each batch with its number of stories.

        Raises:
            UserError: for input that does not fit the model, before anything is generated.
        """
        counts = {len(story.sentences) for story in stories}
        require(
            len(counts) <= 1,
            "stories of a call are of one length; generate others by another, or by draw_batches",
        )
        batches = []
        for batch in self.draw_batches(stories, **options):
            batches.append(batch)
            progress(len(batch.images))
        return Generated(*map(np.concatenate, zip(*batches, strict=True)))

    def regenerate(
        self, story: S, frames: Sequence[int], *, seed: int = 0, near: bool = False, **options: Any
    ) -> S:
        """Generate some frames of a story again; the others stay, byte for byte.

        Args:
            story: a dataclass with `story`, `images`, `latents` and `seeds`, such as a story
                folder's content.
            frames: numbers of the frames to generate, from 0; in continuation from 1.
            seed: of the new frames.
            near: whether they stay near to the old ones, by the part of the noise that is shared.
            options: those of `draw_batches`, by default a `SavedStory`'s own; the size is that of
                the images.

        Returns:
            The story with new images, latents and seeds.

        Raises:
            UserError: a `ValueError`, for input that does not fit the model.
        """
        unet = self.model.config.unet
        return regenerate(self.draw, unet, story, frames, seed, near, options)

    def compile(
        self,
        *,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> None:
        """Compile ahead what a request of `batch_size` stories runs, and keep it on disk.

        The first step of blank stories is generated. Requests of any number of steps and of any
        scales then start at once, if they need the same branches of guidance and the same solver.

        Args:
            batch_size: stories in a request.
            height: pixels; by default the model's own.
            width: pixels; by default the model's own.
            options: those of the call.

        Raises:
            UserError: a `ValueError`, for input that does not fit the model.
        """

        def stop(pipeline: StoryPipeline, *_: Any) -> None:
            pipeline.interrupt = True

        count = check_integer("batch_size", batch_size, 1)
        size = read_size(self.model.config, height, width)
        options = {"batch_size": max(count, BATCH_SIZE), "size": size, **options}
        self(self.blank_stories(count, size), callback_on_step_end=stop, **options)

    def blank_stories(self, count: int, size: tuple[int, int]) -> list[Story]:
        """Stories without words and, in continuation, of a black first frame."""
        unet = self.model.config.unet
        black = np.zeros((*size, 3), np.uint8) if unet.is_continuation else None
        return [Story([""] * unet.n_frames, first_frame=black)] * count

    def preview(self, latents: Float32[jax.Array, "b g p q c"]) -> UInt8[np.ndarray, "b g h w 3"]:
        """Images of latents that a callback receives, or of what they are to become."""
        if not self.model.config.unet.is_continuation:
            return np.asarray(self._programs.decode(self.params, None, self._place(latents))[0])
        # In place of the first frame, which callbacks do not receive: one program serves both.
        first = jnp.zeros_like(latents[:, :1])
        arguments = self._place(first), self._place(latents)
        return np.asarray(self._programs.decode(self.params, *arguments)[0])[:, 1:]

    def draw_batches(
        self, stories: Sequence[Story], *, window_overlap: int = OVERLAP, **options: Any
    ) -> Iterator[Generated]:
        """Generate stories in batches of one size, in order.

        Stories that follow one another and have as many sentences share a batch. More sentences
        than the model has frames are generated in windows (`windows.py`).

        Args:
            stories: of 1 to 100 sentences, with their first frames, in continuation.
            window_overlap: frames that each window keeps of the one before.
            options: those of `request`, and `callback_on_step_end`, a `StepCallback`, which is
                called after each step of each window; that it is called changes no bit.

        Raises:
            UserError: for input that does not fit the model, before anything is generated.
        """
        return draw_any_length(self, stories, window_overlap, options)

    def draw_window(
        self,
        stories: Sequence[Story],
        *,
        kept: Sequence[Kept | None],
        callback_on_step_end: StepCallback | None = None,
        **options: Any,
    ) -> Generated:
        """Generate one batch of stories of as many sentences as the model has frames."""
        request = self.request(stories, kept=kept, **options)
        after_step = None
        if callback_on_step_end is not None:
            after_step = after_each_step(
                callback_on_step_end, self, self._place, request.sampler, len(stories)
            )
        self._log.before((request.branches, request.inputs.noise.shape, request.sampler.step))
        generated = generate(self._programs, self.params, request, after_step)
        real = Generated(*(np.asarray(array)[: len(stories)] for array in generated))
        return with_kept_images(real, kept)

    def request(
        self,
        stories: Sequence[Story],
        *,
        kept: Sequence[Kept | None] | None = None,
        seed: int | Sequence[int] = 0,
        shared_noise_seed: int | None = None,
        sampling: SamplingConfig | None = None,
        size: tuple[int, int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        storyflow: Sequence[float] | None = None,
        batch_size: int | None = None,
        initial_latents: np.ndarray | None = None,
        frameinit: FrameInitConfig | None = None,
        camera_motion: str | None = None,
    ) -> Request:
        """The arrays that a batch of stories is generated from.

        Args:
            stories: of as many sentences as the model has frames; with their first frames, in
                continuation.
            kept: for each story the frames that stay, byte for byte, and that others are to fit.
            seed: 0 to 2^32 - 1, for all stories or one each; with a story's id it decides its
                noise.
            shared_noise_seed: the seed of the part of the noise that a story's frames share, to
                stay near to what that seed gave; by default that of `seed`.
            sampling: steps, scheduler and scales; by default the model's own.
            size: height and width in pixels; by default the model's own.
            negative_prompt: the text that guidance leads away from, one for all frames or one
                each; by default the empty one.
            storyflow: scene changes from each frame to the next; by default the training mean.
            batch_size: of the batch, which the last story fills; by default their number.
            initial_latents: standard normal float32 `(b, f, p, q, c)`, in place of the seed's.
            frameinit: for low frequencies of the first frame in them, in continuation.
            camera_motion: one of `config.CameraMotion`, over a first frame of any size.

        Raises:
            UserError: for input that does not fit the model.
        """
        config = self.model.config
        height, width = read_size(config, *(size or (None, None)))
        shape = (config.unet.n_frames, *latent_shape(config, (height, width)))
        sampling = read_sampling(config, sampling)
        sampler = make_sampler(config.scheduler, sampling, config.kept_frames)
        motion = self.storyflow if storyflow is None else read_storyflow(storyflow, config.unet)
        check_stories(stories, config.unet, None if camera_motion else (height, width))
        counts = {len(story.sentences) for story in stories}
        require(counts == {shape[0]}, f"a window has {shape[0]} sentences; got {counts}")
        check_frameinit(frameinit, camera_motion, config.unet)
        null_ids = self.tokenizer(read_negative_prompt(negative_prompt, config.unet.n_frames))
        mixing = frameinit and make_frameinit(frameinit, config.scheduler, shape[:3])
        asked = read_asked(config, shape, stories, seed, shared_noise_seed, kept, initial_latents)
        count = batch_size or bucket(len(stories), len(stories), batch_ways(self.mesh))
        branches = num_branches(sampling.guidance_scale, sampling.image_guidance_scale)
        encode = functools.partial(self._programs.encode, self.params)
        inputs = batch_inputs(config, self.tokenizer, encode, shape, camera_motion, asked, count)
        inputs = jax.tree.map(self._place, inputs)
        scales = Scales.of(sampling)
        return Request(branches, inputs, null_ids, motion, sampler, scales, mixing)

    def _place(self, array: Any) -> jax.Array:
        """An array that every process has in full, split by story."""
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):  # which JAX moves in one process alone
            return jax.random.wrap_key_data(self._place(jax.random.key_data(array)))
        return jax.device_put(array, NamedSharding(self.mesh, BATCH))


@functools.partial(jax.jit, static_argnums=1)
def _cast(params: Parts, dtype: Any) -> Parts:
    """Weights as they are computed with."""
    return clamp(jax.tree.map(lambda p: p.astype(dtype), params))
