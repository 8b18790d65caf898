"""The training state, and the pure step that updates it.

One step: sample noise, timesteps and drops; predict; min-SNR loss; gradient (accumulated over
micro-batches); clip; AdamW; EMA. Randomness is a function of (seed, step, story's place in the
global batch), whatever the devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.diffusion.losses import min_snr_weight, story_losses, training_target
from contextualstory_jax.diffusion.noise import story_noise
from contextualstory_jax.diffusion.noise_schedules import add_noise, noise_schedule
from contextualstory_jax.distributed.sharding import BATCH, HEADS, Placement
from contextualstory_jax.models.fused_attention import attention_on
from contextualstory_jax.models.story_model import Parts, StoryModel, clamp
from contextualstory_jax.models.storyflow import storyflow
from contextualstory_jax.models.vae import Moments
from contextualstory_jax.training.optimizer import learning_rate, optimizer
from contextualstory_jax.training.trainable import merge_parts, split_trainable


@no_type_check  # of arrays here; JAX makes others, of shapes and of shardings
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to resume exactly, but for the configuration."""

    step: Int[Array, ""]
    params: Parts  # the trained ones
    frozen: Parts  # the others
    ema_params: Parts
    opt_state: optax.OptState
    storyflow_sum: Float[Array, " m"]  # over all stories seen, for the mean that sampling uses
    stories: Float[Array, ""]


class Batch(NamedTuple):
    """Stories on the device."""

    images: UInt8[Array, "b f h w 3"]
    ids: Int[Array, "b f l"]  # token ids of the sentences


class Encoded(NamedTuple):
    """Stories on the device, as the VAE and the text encoder have encoded them."""

    moments: Moments  # of the latents, b f p q c
    text: Float[Array, "b f l d"]


# The loss of trained and frozen parameters on a micro-batch with one key a story, and the sum of
# the stories' StoryFlow values.
MicroLoss = Callable[
    [Parts, Parts, Any, Key[Array, " b"]], tuple[Float[Array, ""], Float[Array, " m"]]
]


class RandomInputs(NamedTuple):
    """The random part of a step's loss."""

    latents: Float[Array, "b f p q c"]
    noise: Float[Array, "b f p q c"]
    timesteps: Int[Array, " b"]
    drop_text: Bool[Array, " b"]
    drop_first_frame: Bool[Array, " b"]
    keep: Bool[Array, "b g"] | None = None  # predicted frames that are given clean instead


def ema_decay(updates: Int[Array, ""], largest: float) -> Float[Array, ""]:
    """The share of the old average, where `updates` came before this one.

    Parity: the first update copies the parameters.

    Reference: diffusers EMAModel.get_decay.
    """
    updates = updates.astype(jnp.float32)
    return jnp.where(updates == 0, 0.0, jnp.minimum((1 + updates) / (10 + updates), largest))


def init_state(params: Parts, config: TrainConfig) -> TrainState:
    """The state before the first step."""
    trained, frozen = split_trainable(params, config.trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=frozen,
        # A copy, because it is donated beside params.
        ema_params=jax.tree.map(jnp.copy, trained),
        opt_state=optimizer(config.optimizer, config.steps).init(trained),
        storyflow_sum=jnp.zeros(config.model.unet.n_frames - 1),
        stories=jnp.zeros(()),
    )


def encode(
    model: StoryModel, params: Parts, batch: Batch, null_ids: Int[Array | np.ndarray, " l"]
) -> tuple[Encoded, Float[Array, "l d"]]:
    """A batch, and the empty sentence, through the VAE and the text encoder."""
    text = model.encode_text(params, batch.ids)
    # By itself: one sentence more than devices divide would scatter all of the text encoder's work.
    null_text = model.encode_text(params, jnp.asarray(null_ids)[None, None])[0, 0]
    return Encoded(model.image_moments(params, batch.images), text), null_text


def sample_inputs(
    model: StoryModel, moments: Moments, keys: Key[Array, " b"], config: TrainConfig
) -> RandomInputs:
    """Latents, noise, timesteps and drops of a batch, with one key a story."""
    latent_keys, noise_keys, time_keys, text_keys, frame_keys = jax.vmap(
        lambda key: jax.random.split(key, 5), out_axes=1
    )(keys)
    latents = model.sample(moments, latent_keys)
    _, f, p, q, c = latents.shape
    keep = None
    if config.keep_frames_probability > 0:
        frames = f - config.model.unet.is_continuation
        # A sixth child: the keys above are the same as without kept frames.
        keep = jax.vmap(
            lambda key: sample_kept(
                jax.random.fold_in(key, 5), frames, config.keep_frames_probability
            )
        )(keys)
    return RandomInputs(
        latents=latents,
        noise=jax.vmap(lambda key: story_noise(key, (f, p, q, c), config.model.noise))(noise_keys),
        timesteps=jax.vmap(
            lambda key: jax.random.randint(key, (), 0, config.model.scheduler.num_train_timesteps)
        )(time_keys),
        drop_text=jax.vmap(lambda key: jax.random.bernoulli(key, config.text_drop))(text_keys),
        drop_first_frame=jax.vmap(lambda key: jax.random.bernoulli(key, config.first_frame_drop))(
            frame_keys
        ),
        keep=keep,
    )


def sample_kept(key: Key[Array, ""], frames: int, probability: float) -> Bool[Array, " g"]:
    """Which frames of a story are given clean: with `probability` some, any number of them alike.

    At least one frame is not, and any number from 1 on is equally likely, so that both single
    frames and all but one are seen often.
    """
    any_key, number_key, order_key = jax.random.split(key, 3)
    number = jax.random.randint(number_key, (), 1, frames)
    number = jnp.where(jax.random.bernoulli(any_key, probability), number, 0)
    return jax.random.permutation(order_key, frames) < number


def loss(
    model: StoryModel,
    params: Parts,
    sampled: RandomInputs,
    text: Float[Array, "b f l d"],
    null_text: Float[Array, "#b #f l d"],
    snr_gamma: float | None,
) -> Float[Array, ""]:
    """The mean of the stories' losses. Reference: train.py."""
    schedule = noise_schedule(model.config.scheduler)
    noisy = add_noise(schedule, sampled.latents, sampled.noise, sampled.timesteps)
    target = training_target(schedule, sampled.latents, sampled.noise, sampled.timesteps)
    storyline = model.contextualize(params, text)
    # The null text bypasses the contextualizer.
    dropped = sampled.drop_text[:, None, None, None]
    storyline = jnp.where(dropped, null_text.astype(storyline.dtype), storyline)
    keys_values = model.text_keys_values(params, storyline)
    # Parity: StoryFlow values are truncated to integers in training, not in sampling.
    motion = jnp.trunc(storyflow(sampled.latents))
    shifts = model.time_shifts(params, sampled.timesteps, motion)
    first_frame, clean = None, sampled.latents
    if model.config.unet.is_continuation:
        dropped = sampled.drop_first_frame[:, None, None, None]
        first_frame = jnp.where(dropped, noisy[:, 0], sampled.latents[:, 0])
        clean, noisy, target = clean[:, 1:], noisy[:, 1:], target[:, 1:]
    if sampled.keep is not None:
        noisy = jnp.where(sampled.keep[..., None, None, None], clean, noisy)
    prediction = model.predict(params, noisy, shifts, keys_values, first_frame)
    weight = min_snr_weight(schedule, sampled.timesteps, snr_gamma)
    return jnp.mean(story_losses(prediction, target, weight, sampled.keep))


def update(
    state: TrainState, gradient: Parts, tx: optax.GradientTransformation, largest_ema_decay: float
) -> TrainState:
    """Clip, AdamW, EMA; `state.params` are those the gradient was taken at, alphas clamped."""
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, largest_ema_decay)
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema_params, params)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, ema_params=ema, opt_state=opt_state
    )


def updated(
    state: TrainState, value: Float[Array, ""], gradient: Parts, config: TrainConfig
) -> tuple[TrainState, dict[str, Array]]:
    """The state after `update` by a loss's value and gradient, and the step's metrics."""
    tx = optimizer(config.optimizer, config.steps)
    new = update(state, gradient, tx, config.optimizer.ema_decay)
    change = jax.tree.map(jnp.subtract, new.params, state.params)
    metrics: dict[str, Any] = {
        "loss": value,
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": learning_rate(config.optimizer, config.steps)(state.step),
        "param_norm": optax.tree.norm(new.params),
        "update_norm": optax.tree.norm(change),
    }
    return new, metrics


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def micro_loss(
    model: StoryModel,
    config: TrainConfig,
    null_ids: Int[Array | np.ndarray, " l"],
    null_text: Float[Array | np.ndarray, "l d"] | None,
    trained: Parts,
    frozen: Parts,
    batch: Batch | Encoded,
    keys: Key[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, " m"]]:
    """The loss of a micro-batch, and the sum of its stories' StoryFlow values."""
    params = merge_parts(trained, frozen)
    if isinstance(batch, Batch):
        batch, null_text = encode(model, params, batch, null_ids)
    sampled = sample_inputs(model, batch.moments, keys, config)
    null = jnp.asarray(null_text)[None, None]
    value = loss(model, params, sampled, batch.text, null, config.snr_gamma)
    return value, storyflow(sampled.latents).sum(axis=0)


def sum_over(micro: Any, function: Callable[[Any], Any]) -> Any:
    """The sum of a function's results over the first axis of its argument's arrays."""
    # The first stands outside: XLA's CPU backward convolutions are many times slower in a loop.
    first, rest = (
        jax.tree.map(lambda x, part=part: x[part], micro) for part in (0, slice(1, None))
    )
    if jax.tree.leaves(rest)[0].shape[0] == 0:
        return function(first)

    def add(sums: Any, one: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(one)), None

    return jax.lax.scan(add, function(first), rest)[0]


def train_step(
    model: StoryModel,
    config: TrainConfig,
    placement: Placement,
    null_ids: Int[Array | np.ndarray, " l"],
    null_text: Float[Array | np.ndarray, "l d"] | None,
    state: TrainState,
    batch: Batch | Encoded,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after a batch of `config.batch_size` stories, and the step's metrics."""
    of_micro_batch = functools.partial(micro_loss, model, config, null_ids, null_text)
    return optimizer_step(of_micro_batch, model.dtype, config, placement, state, batch)


def optimizer_step(
    of_micro_batch: MicroLoss,
    dtype: Any,
    config: TrainConfig,
    placement: Placement,
    state: TrainState,
    batch: Any,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after an update by a loss that is computed in `dtype`, and the step's metrics."""
    # Parity: the original clamps alpha in forward, outside the graph: the gradient is not cut.
    state = dataclasses.replace(state, params=clamp(state.params))
    step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    places = jnp.arange(config.batch_size)
    keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(places)
    # Every n-th story, so that each device has its share of each micro-batch.
    micro = jax.tree.map(
        lambda x: x.reshape(-1, config.accumulation_steps, *x.shape[1:]).swapaxes(0, 1),
        (batch, keys),
    )
    # Cast and gathered once, for all micro-batches, forward and backward.
    trained, frozen = placement.gathered(_cast((state.params, state.frozen), dtype))

    def gradient_of(micro: tuple[Any, Array]):
        (value, motion), gradient = jax.value_and_grad(of_micro_batch, has_aux=True)(
            trained, frozen, *placement.split(micro)
        )
        return value, motion, _cast(placement.sharded(placement.gathered(gradient)), jnp.float32)

    value, motion, gradient = sum_over(micro, gradient_of)
    value, gradient = jax.tree.map(lambda x: x / config.accumulation_steps, (value, gradient))
    new, metrics = updated(state, value, gradient, config)
    new = dataclasses.replace(
        new,
        storyflow_sum=state.storyflow_sum + motion,
        stories=state.stories + config.batch_size,
    )
    return new, metrics


def make_train_step(
    model: StoryModel,
    config: TrainConfig,
    placement: Placement,
    state: TrainState,
    null_ids: Int[np.ndarray, " l"],
    null_text: Float[np.ndarray, "l d"] | None = None,
) -> jax.stages.Wrapped:
    """`train_step`, jitted: state donated and kept where it lies, metrics everywhere.

    Args:
        state: the state, or its `abstract_state`.
        null_ids: token ids of the empty sentence.
        null_text: its features, where batches are `Encoded`.
    """
    given = model, config, placement, null_ids, null_text
    return jitted_step(train_step, given, placement, state)


def jitted_step(
    step: Callable, given: tuple[Any, ...], placement: Placement, state: TrainState
) -> jax.stages.Wrapped:
    """A function of `given`, state and batch, jitted as `make_train_step` says."""
    placed = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        functools.partial(attention_on(placement.mesh, HEADS)(step), *given),
        donate_argnums=0,
        in_shardings=(placed, NamedSharding(placement.mesh, BATCH)),
        out_shardings=(placed, NamedSharding(placement.mesh, PartitionSpec())),
    )


def make_validation(
    model: StoryModel,
    config: TrainConfig,
    null_ids: Int[Array | np.ndarray, " l"],
    placement: Placement,
) -> jax.stages.Wrapped:
    """The jitted loss of trained and frozen parameters on a batch, with noise of the seed alone.

    Nothing is dropped, and no frame is given clean.
    """
    config = dataclasses.replace(
        config, text_drop=0.0, first_frame_drop=0.0, keep_frames_probability=0.0
    )

    @attention_on(placement.mesh, HEADS)
    def validate(trained: Parts, frozen: Parts, batch: Batch) -> Float[Array, ""]:
        params = merge_parts(clamp(trained), frozen)
        params, batch = placement.gathered(_cast(params, model.dtype)), placement.split(batch)
        encoded, null_text = encode(model, params, batch, null_ids)
        keys = jax.random.split(jax.random.key(config.seed), len(batch.images))
        sampled = sample_inputs(model, encoded.moments, keys, config)
        return loss(model, params, sampled, encoded.text, null_text[None, None], config.snr_gamma)

    return jax.jit(validate, out_shardings=NamedSharding(placement.mesh, PartitionSpec()))
