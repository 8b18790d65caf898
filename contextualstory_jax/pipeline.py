"""The Python API: sentences in, pictures out.

Few compiled programs draw a batch (`drawing.py`); batches are rounded up to few sizes.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32, Key, UInt8

from contextualstory_jax.camera import film
from contextualstory_jax.checkpoint import load_weights, read_model
from contextualstory_jax.config import (
    CameraMotion,
    FrameInitConfig,
    MeshConfig,
    SamplingConfig,
    require,
)
from contextualstory_jax.diffusion.frameinit import FrameInit, make_frameinit
from contextualstory_jax.diffusion.guidance import num_branches
from contextualstory_jax.diffusion.noise import story_noise
from contextualstory_jax.diffusion.samplers import Sampler, make_sampler
from contextualstory_jax.drawing import (
    AfterStep,
    Inputs,
    Scales,
    generate,
    generation_programs,
    shared_programs,
)
from contextualstory_jax.model import Parts, StoryModel, clamp
from contextualstory_jax.sharding import BATCH, Placement, batch_ways, make_mesh
from contextualstory_jax.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "shipped"


class Story(NamedTuple):
    """One story to draw."""

    sentences: Sequence[str]
    id: str = "story"  # with the seed it decides the noise
    # Of the size to draw, or of any size for a camera to move over.
    first_frame: UInt8[np.ndarray, "h w 3"] | None = None


class Drawing(NamedTuple):
    """Drawn stories."""

    pictures: UInt8[np.ndarray, "b f h w 3"]
    latents: Float32[np.ndarray, "b f p q c"]  # before decoding


def story_key(seed: int, story_id: str) -> Key[Array, ""]:
    """The key of everything random about a story: of the seed and the story's id alone."""
    digest = hashlib.sha256(story_id.encode()).digest()
    key = jax.random.key(seed)
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "big"))
    return key


# Called after each step with the pipeline, the step's number and timestep, and `{"latents": ...}`,
# channels last, in the solver's scale; returns those to replace, or None.
StepCallback = Callable[["StoryPipeline", int, int | float, dict[str, Any]], dict[str, Any] | None]


class StoryPipeline:
    """A model with weights, ready to draw: `StoryPipeline.load(folder)(sentences, seed=0)`.

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

        Args: `storyflow`, the mean of the training stories; `step`, how long they were seen;
        `weights`, whether `params` are `ema` or `raw`; `placement`, where all processes together
        keep them and draw, by default this one's devices: processes then draw different stories,
        at different times.
        """
        self.model, self.tokenizer, self.step, self.weights = model, tokenizer, step, weights
        self.storyflow = np.asarray(storyflow, np.float32)
        make_programs = generation_programs if placement is None else shared_programs
        placement = placement or Placement(make_mesh(MeshConfig(), jax.local_devices()))
        self.mesh = placement.mesh
        # Drawing only reads: weights are held once, in the dtype they are computed with.
        self.params = jax.device_put(
            clamp(jax.tree.map(lambda p: jnp.asarray(p, model.dtype), params)),
            placement.shardings(params),
        )
        self._programs = make_programs(model, placement)
        self.interrupt = False

    @classmethod
    def load(
        cls, folder: str | Path = SHIPPED, *, weights: str | None = None, dtype: str = "float32"
    ) -> StoryPipeline:
        """Read a checkpoint folder: a training workdir, a converted one, or the model that ships.

        Args: `weights`, `ema` or `raw`; by default `ema` where there are such.
        Raises `UserError` where it is absent, incomplete or of another architecture.
        """
        folder = Path(folder)
        require(dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16; got {dtype}")
        model = StoryModel(read_model(folder), jnp.dtype(dtype))
        params, meta = load_weights(folder, weights, model.shapes)
        length = model.config.text_encoder.max_position_embeddings
        tokenizer = Tokenizer(folder / "tokenizer", length)
        return cls(model, params, tokenizer, meta["storyflow"], meta["step"], meta["weights"])

    def __call__(
        self,
        story: Sequence[str] | Sequence[Sequence[str]] | Sequence[Story],
        *,
        first_frame: UInt8[np.ndarray, "h w 3"] | None = None,
        **options: Any,
    ) -> UInt8[np.ndarray, "*b f h w 3"]:
        """Draw one story, a list of sentences, or a list of stories.

        Options are those of `draw_batches`.

        `first_frame` is that of one story; each `Story` of a list holds its own. Stories given as
        lists of sentences have the ids `story_0`, `story_1` and so on, one alone `story`. Raises
        `UserError` for input that does not fit the model.
        """
        require(not isinstance(story, str), "a story is a list of sentences, not one string")
        if all(isinstance(sentence, str) for sentence in story):
            one = Story(tuple(map(str, story)), first_frame=first_frame)
            return self.draw([one], **options).pictures[0]
        require(first_frame is None, "first_frame is for one story; put it into each Story")
        stories = [
            item if isinstance(item, Story) else Story(tuple(item), id=f"story_{i}")
            for i, item in enumerate(story)
        ]
        return self.draw(stories, **options).pictures

    def draw(
        self,
        stories: Sequence[Story],
        *,
        progress: Callable[[int], object] = lambda drawn: None,
        **options: Any,
    ) -> Drawing:
        """Draw stories; options are those of `draw_batches`.

        Args: `progress`, told after each batch how many stories it drew. Raises `UserError` for
        input that does not fit the model, before anything is drawn.
        """
        drawings = []
        for drawing in self.draw_batches(stories, **options):
            drawings.append(drawing)
            progress(len(drawing.pictures))
        return Drawing(*map(np.concatenate, zip(*drawings, strict=True)))

    def draw_batches(
        self,
        stories: Sequence[Story],
        *,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        size: tuple[int, int] | None = None,
        storyflow: Sequence[float] | None = None,
        batch_size: int = 8,
        initial_latents: np.ndarray | None = None,
        frameinit: FrameInitConfig | None = None,
        camera_motion: str | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Iterator[Drawing]:
        """Draw stories in batches of one size, in order.

        Args: `seed`, in [0, 2^32); `sampling`, steps and scales, the model's own by default;
        `size`, height and width in pixels; `storyflow`, scene changes, the training mean by
        default; `initial_latents`, float32 (b, f, p, q, c), standard-normal-like values in place of
        the drawn ones; `frameinit`, in continuation, gives them low frequencies of the first frame;
        `camera_motion`, of `config.CameraMotion`, moves over that, whose size is then free;
        `callback_on_step_end`, a `StepCallback`, changes no bit of the result by being called.
        Raises `UserError` for input that does not fit the model, before anything is drawn.
        """
        config = self.model.config
        height, width = size or (config.height, config.width)
        shape = (config.unet.n_frames, *config.latent_size(height, width), config.unet.in_channels)
        sampling = sampling or config.sampling
        sampler = make_sampler(config.scheduler, sampling)
        motion = self._motion(storyflow)
        self._check(stories, None if camera_motion else (height, width))
        self._check_frameinit(frameinit, camera_motion)
        mixing = frameinit and make_frameinit(frameinit, config.scheduler, shape[:3])
        require(0 <= seed < 2**32, f"seed must be in 0..{2**32 - 1}; got {seed}")
        require(batch_size >= 1, f"batch size must be at least 1; got {batch_size}")
        require(
            sampling.image_guidance_scale <= 1 or config.unet.is_continuation,
            "image_guidance_scale above 1 needs a continuation model; leave it at 1",
        )
        if initial_latents is not None:
            _check_latents(initial_latents, (len(stories), *shape))
        # Every batch has one size, so that one program serves: a power of two or, if less,
        # `batch_size`, so that few serve any number of stories. The last batch is filled by the
        # last story.
        ways = batch_ways(self.mesh)
        bucket = min(batch_size, 1 << (len(stories) - 1).bit_length())
        batch_size = -(-bucket // ways) * ways
        self.interrupt = False
        for start in range(0, len(stories), batch_size):
            chosen = [min(i, len(stories) - 1) for i in range(start, start + batch_size)]
            real = min(batch_size, len(stories) - start)
            inputs = self._inputs([stories[i] for i in chosen], seed, shape, camera_motion)
            if initial_latents is not None:
                inputs = inputs._replace(noise=self._place(initial_latents[chosen]))
            after_step = None
            if callback_on_step_end is not None:
                after_step = self._after_step(callback_on_step_end, sampler, real)
            drawn = self._run(inputs, motion, sampler, sampling, mixing, after_step)
            yield Drawing(*(np.asarray(array)[:real] for array in drawn))
            if self.interrupt:
                return

    def _check(self, stories: Sequence[Story], size: tuple[int, int] | None) -> None:
        """Refuse stories that the model cannot draw, and first frames not of `size`, if any."""
        unet = self.model.config.unet
        require(len(stories) > 0, "no stories to draw")
        for story in stories:
            name, picture = f"story {story.id!r}", story.first_frame
            require(
                len(story.sentences) == unet.n_frames,
                f"{name} has {len(story.sentences)} sentences; this model draws {unet.n_frames}",
            )
            require(
                unet.is_continuation or picture is None,
                f"{name} has a first frame, but the model draws from sentences alone; leave it out",
            )
            require(
                not unet.is_continuation or picture is not None,
                f"{name} has no first frame, but the model continues from one; give a picture",
            )
            require(
                picture is None or _is_picture(picture, size),
                f"{name}: the first frame must be uint8 of shape "
                + ("{} x {} x 3".format(*size) if size else "height x width x 3"),
            )

    def _check_frameinit(
        self, frameinit: FrameInitConfig | None, camera_motion: str | None
    ) -> None:
        require(
            frameinit is None or self.model.config.unet.is_continuation,
            "frameinit needs a first frame, but the model draws from sentences alone; leave it out",
        )
        known = typing.get_args(CameraMotion)
        require(
            camera_motion is None or camera_motion in known,
            f"camera_motion must be one of {', '.join(known)}; got {camera_motion!r}",
        )
        require(
            camera_motion is None or frameinit is not None,
            "camera_motion makes the clip that frameinit starts from; choose its filter too",
        )

    def _motion(self, storyflow: Sequence[float] | None) -> Float32[np.ndarray, " m"]:
        if storyflow is None:
            return self.storyflow
        unet = self.model.config.unet
        require(
            unet.use_motion_condition, "this model has no StoryFlow Adapter; leave storyflow out"
        )
        motion = np.asarray(storyflow, np.float32)
        require(
            motion.shape in ((unet.n_frames - 1,), (unet.n_frames,))
            and bool(np.all((motion >= 0) & (motion < np.inf))),
            f"storyflow must be {unet.n_frames - 1} finite numbers, one from each frame to the next"
            f" (or {unet.n_frames}), at least 0; got {motion.tolist()}",
        )
        return motion

    def _place(self, array: Any) -> jax.Array:
        """An array that every process has whole, split by story."""
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):  # which JAX moves in one process alone
            return jax.random.wrap_key_data(self._place(jax.random.key_data(array)))
        return jax.device_put(array, NamedSharding(self.mesh, BATCH))

    def _inputs(
        self,
        stories: Sequence[Story],
        seed: int,
        shape: tuple[int, int, int, int],
        camera_motion: str | None = None,
    ) -> Inputs:
        ids = jnp.stack([self.tokenizer(story.sentences) for story in stories])
        keys = jnp.stack([story_key(seed, story.id) for story in stories])
        noise_keys, step_keys, frame_keys = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(keys)
        noise = jax.vmap(lambda key: story_noise(key, shape, self.model.config.noise))(noise_keys)
        given = [story.first_frame for story in stories if story.first_frame is not None]
        if camera_motion is None:
            clips = [picture[None] for picture in given]
        else:
            f, *sides = shape[:3]
            height, width = (side * self.model.config.vae.factor for side in sides)
            clips = [film(picture, camera_motion, f, height, width) for picture in given]
        first_frames = jnp.stack(clips) if clips else None
        return jax.tree.map(self._place, Inputs(ids, noise, step_keys, frame_keys, first_frames))

    def _after_step(self, callback: StepCallback, sampler: Sampler, real: int) -> AfterStep:
        """The callback for a batch of which the first `real` stories are asked for."""

        def after_step(step: int, latents: Array) -> tuple[Array, bool]:
            shown = jnp.array(latents[:real], copy=True)  # the next step overwrites its own
            given = callback(self, step, sampler.timesteps[step].item(), {"latents": shown})
            replaced = (given or {}).get("latents", shown)
            if replaced is not shown:
                latents = self._place(_filled(replaced, shown.shape, len(latents)))
            return latents, not self.interrupt

        return after_step

    def _run(
        self,
        inputs: Inputs,
        motion: Float32[np.ndarray, " m"],
        sampler: Sampler,
        sampling: SamplingConfig,
        frameinit: FrameInit | None,
        after_step: AfterStep | None,
    ) -> tuple[Array, Array]:
        scales = Scales(
            jnp.float32(sampling.guidance_scale),
            jnp.float32(sampling.image_guidance_scale),
            jnp.float32(sampling.guidance_rescale),
        )
        return generate(
            self._programs,
            num_branches(sampling.guidance_scale, sampling.image_guidance_scale),
            self.params,
            inputs,
            self.tokenizer([""])[0],
            motion,
            sampler,
            scales,
            frameinit,
            after_step,
        )


def _is_picture(array: np.ndarray, size: tuple[int, int] | None) -> bool:
    return (
        array.dtype == np.uint8
        and array.ndim == 3
        and array.shape[2] == 3
        and array.size > 0
        and size in (None, array.shape[:2])
    )


def _check_latents(latents: np.ndarray, shape: tuple[int, ...]) -> None:
    require(
        latents.shape == shape and latents.dtype == np.float32,
        f"initial latents must be float32 of shape {shape} (stories, frames, h, w, c); "
        f"got {latents.dtype} of shape {latents.shape}",
    )
    require(bool(np.isfinite(latents).all()), "initial latents must be finite; draw them anew")


def _filled(latents: Any, shape: tuple[int, ...], batch_size: int) -> Float32[Array, "b g p q c"]:
    """Latents that a callback gave, the last repeated up to the size of the batch."""
    require(
        np.shape(latents) == shape and jnp.issubdtype(np.result_type(latents), jnp.floating),
        f"callback_on_step_end must return latents of shape {shape}; got {np.shape(latents)}",
    )
    rows = np.minimum(np.arange(batch_size), len(latents) - 1)
    return jnp.asarray(latents, jnp.float32)[rows]
