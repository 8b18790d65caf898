"""Training of a config's VAE by itself, on the frames of its stories, by the loop of `trainer.py`.

Its workdir is a checkpoint folder that holds the VAE alone: an `init_from` for a config of the same
`model.vae`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt8

from contextualstory_jax.checkpoints.layout import write_scaling_factor
from contextualstory_jax.config.model_config import AutoencoderKLConfig
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.data.loader import TokenizedStories, first_stories
from contextualstory_jax.distributed.multihost import compiled_together
from contextualstory_jax.distributed.sharding import BATCH, HEADS
from contextualstory_jax.models.flops import vae_step_flops
from contextualstory_jax.models.fused_attention import attention_on
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.models.vae import (
    VAE,
    Moments,
    images_to_float,
    sample_latents,
)
from contextualstory_jax.training.metric_writers import NoWriter, ScalarWriter
from contextualstory_jax.training.train_step import Batch, TrainState, jitted_step, optimizer_step
from contextualstory_jax.training.trainer import (
    Objective,
    Setup,
    Validation,
    optimize,
    set_up,
    show_samples,
    storyflow_mean,
    validation_stories,
)
from contextualstory_jax.utils.errors import require

VALIDATION_STORIES = 64


def train_vae(config: TrainConfig, workdir: Path) -> TrainState:
    """Train the VAE of a config in a workdir, from where its last checkpoint is.

    With each checkpoint the VAE's PSNR on held-out frames is logged, and its scaling factor is
    measured on them and stored. Raises as `train_and_evaluate` does.
    """
    require(
        isinstance(config.model.vae, AutoencoderKLConfig),
        f"model.vae.kind = {config.model.vae.kind!r} has no parameters to train; a trained VAE is "
        "of kind 'kl'",
    )
    require(
        config.data.latents is None,
        "data.latents holds no images to train a VAE on; leave it out",
    )
    setup = set_up(dataclasses.replace(config, trainable=(r"vae\..*",)), workdir, ("vae",))
    objective = Objective(
        stories=TokenizedStories(setup.splits.train, setup.tokenizer),
        flops=vae_step_flops(config),
        make_step=functools.partial(make_vae_step, setup),
        make_validation=functools.partial(validation, setup),
        generate_samples=reconstructions(setup),
        flow=storyflow_mean,
    )
    return optimize(setup, objective)


def encode(vae: VAE, images: Float[Array, "n h w 3"]) -> Moments:
    """The posterior over unscaled latents, float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), vae.encode(images))


def vae_loss(
    model: StoryModel,
    kl_weight: float,
    trained: Parts,
    frozen: Parts,
    batch: Batch,
    keys: Key[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, " m"]]:
    """The loss of a micro-batch of stories, and zeros in place of their StoryFlow values.

    It is the mean squared error of the pixels, of which a few are far off where an edge is blurred,
    and the KL divergence of a frame's latents from the standard normal distribution, divided by the
    number of its pixel values.
    """
    b, f, h, w, _ = batch.images.shape
    shape = f, *model.config.latent_size(h, w), model.config.vae.latent_channels
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    images = images_to_float(batch.images).reshape(b * f, h, w, 3)
    vae = model.vae.bind({**trained["vae"], **frozen["vae"]}, model.dtype)
    moments = encode(vae, images)
    latents = sample_latents(moments, noise.reshape(-1, *shape[1:]), scaling_factor=1.0)
    mean, logvar = moments
    divergence = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar)
    error = jnp.mean((vae.decode(latents).astype(jnp.float32) - images) ** 2)
    return error + kl_weight * divergence / images.size, jnp.zeros(f - 1)


def make_vae_step(setup: Setup, state: TrainState) -> jax.stages.Wrapped:
    """The jitted step of the VAE."""
    model, config, placement = setup.model, setup.config, setup.placement
    of_micro_batch = functools.partial(vae_loss, model, config.kl_weight)
    given = of_micro_batch, model.dtype, config, placement
    return jitted_step(optimizer_step, given, placement, state)


def make_measurement(setup: Setup) -> jax.stages.Wrapped:
    """The jitted means of loss, PSNR, latents and their squares over a batch's images."""
    model, config, placement = setup.model, setup.config, setup.placement

    @attention_on(placement.mesh, HEADS)
    def measure(params: Parts, images: UInt8[Array, "b f h w 3"]) -> Mapping[str, Array]:
        params, images = placement.gathered(params), placement.split(images)
        keys = jax.random.split(jax.random.key(config.seed), len(images))
        batch = Batch(images, ids=jnp.zeros((len(images), 1, 0), jnp.int32))
        loss, _ = vae_loss(model, config.kl_weight, params, {"vae": {}}, batch, keys)
        levels = images_to_float(images).reshape(-1, *images.shape[2:])
        vae = model.vae.bind(params["vae"], model.dtype)
        mean, logvar = encode(vae, levels)
        decoded = vae.decode(mean).astype(jnp.float32)
        error = jnp.mean((jnp.clip(decoded, -1, 1) - levels) ** 2, axis=(1, 2, 3))
        return {
            "loss": loss,
            "psnr": jnp.mean(10 * jnp.log10(4 / jnp.maximum(error, 1e-10))),
            "latent": jnp.mean(mean),
            "square": jnp.mean(mean**2 + jnp.exp(logvar)),
        }

    return jax.jit(measure, out_shardings=NamedSharding(placement.mesh, PartitionSpec()))


def validation(setup: Setup) -> Validation:
    """Loss, PSNR and scaling factor of the averaged weights, from held-out stories.

    PSNR is the mean of the frames', each decoded from the mean of its posterior. The scaling factor
    is stored in the workdir too.
    """
    size = setup.config.batch_size // setup.config.accumulation_steps
    count = max(VALIDATION_STORIES // size, 1) * size
    images = [story.images for story in validation_stories(setup.splits.held_out, count)]
    sharding = NamedSharding(setup.placement.mesh, BATCH)
    measure = compiled_together(make_measurement(setup))

    def validate(state: TrainState) -> dict[str, float]:
        batches = (np.stack(images[i : i + size]) for i in range(0, count, size))
        measured = [measure(state.ema_params, jax.device_put(b, sharding)) for b in batches]
        means = {name: np.mean([float(m[name]) for m in measured]) for name in measured[0]}
        scaling_factor = float((means["square"] - means["latent"] ** 2) ** -0.5)
        write_scaling_factor(setup.workdir, scaling_factor)
        return {
            "validation_loss": float(means["loss"]),
            "validation_psnr": float(means["psnr"]),
            "scaling_factor": scaling_factor,
        }

    return validate


def reconstructions(setup: Setup) -> Callable[[ScalarWriter | NoWriter, TrainState], None]:
    """A function that shows held-out stories as the averaged weights encode and decode them."""
    model, placement = setup.model, setup.placement
    stories = first_stories(setup.splits.held_out, setup.config.sample_stories)
    images = np.stack([story.images for story in stories])

    def decoded(params: Parts, images: UInt8[Array, "b f h w 3"]) -> UInt8[Array, "b f h w 3"]:
        params = placement.gathered(params)
        mean = model.image_moments(params, images).mean
        return model.decode(params, mean * model.config.vae.scaling_factor)

    replicated = NamedSharding(placement.mesh, PartitionSpec())
    compiled = compiled_together(jax.jit(decoded, out_shardings=replicated))

    def show(writer: ScalarWriter | NoWriter, state: TrainState) -> None:
        shown = np.asarray(compiled(state.ema_params, images))
        show_samples(setup.workdir, writer, int(state.step), stories, shown)

    return show
