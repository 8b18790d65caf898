"""The three networks of a `ModelConfig` as one model, shared by training and sampling.

Parameters are `{part: {name: array}}` with the parts `unet`, `vae` and `text_encoder`; a
parameter's full path is `part.name`. Networks compute in the dtype given here; values passed
between them are float32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, Real, UInt8

from contextualstory_jax.config.model_config import PARTS, ModelConfig, Remat
from contextualstory_jax.models.blocks import TextKeysValues, TimeShifts
from contextualstory_jax.models.clip_text import CLIPTextModel
from contextualstory_jax.models.network import Network, Params
from contextualstory_jax.models.temporal import clamp_alphas
from contextualstory_jax.models.unet import UNet
from contextualstory_jax.models.vae import (
    Moments,
    decode_latents,
    images_to_float,
    images_to_uint8,
    make_vae,
    sample_latents,
)

Parts = dict[str, Params]


class StoryModel:
    """Pure functions of parameters; one instance serves any number of weights and devices."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
        parts: Collection[str] = PARTS,
    ):
        """Declare the networks.

        Args:
            config: The model.
            dtype: To compute in.
            remat: Rematerialisation in the backward pass.
            parts: Those with parameters here; functions of others cannot be called.
        """
        self.config = config
        self.dtype = dtype
        self.unet = Network(lambda: UNet(config.unet, remat))
        self.vae = Network(lambda: make_vae(config.vae))
        self.text_encoder = Network(lambda: CLIPTextModel(config.text_encoder))
        self.networks: dict[str, Network] = {part: getattr(self, part) for part in parts}

    @property
    def shapes(self) -> dict[str, dict]:
        """Shape and dtype of every parameter."""
        return {part: dict(network.shapes) for part, network in self.networks.items()}

    def init(self, seed: int) -> Parts:
        """Initialise all parameters, on the host."""
        return {part: network.init(seed) for part, network in self.networks.items()}

    def encode_text(self, params: Parts, ids: Int[Array, "b f l"]) -> Float[Array, "b f l d"]:
        """Each sentence's tokens through the text encoder."""
        text_encoder = self.text_encoder.bind(params["text_encoder"], self.dtype)
        return text_encoder(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape, -1)

    def encode_images(
        self, params: Parts, images: Real[Array, "b f h w 3"], keys: Key[Array, " b"]
    ) -> Float[Array, "b f p q c"]:
        """Scaled latents of levels 0 to 255, sampled from the posterior with one key a story."""
        return self.sample(self.image_moments(params, images), keys)

    def image_moments(self, params: Parts, images: Real[Array, "b f h w 3"]) -> Moments:
        """The posterior over unscaled latents, `b f p q c`, of levels 0 to 255."""
        b, f = images.shape[:2]
        vae = self.vae.bind(params["vae"], self.dtype)
        moments = vae.encode(images_to_float(images).reshape(b * f, *images.shape[2:]))
        return jax.tree.map(lambda x: x.reshape(b, f, *x.shape[1:]), moments)

    def sample(self, moments: Moments, keys: Key[Array, " b"]) -> Float[Array, "b f p q c"]:
        """Scaled latents sampled from posteriors `b f p q c`, with one key a story."""
        moments = jax.tree.map(lambda x: x.astype(jnp.float32), moments)
        shape = moments.mean.shape[1:]
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return sample_latents(moments, noise, self.config.vae.scaling_factor)

    def decode(
        self, params: Parts, latents: Float[Array, "b f p q c"]
    ) -> UInt8[Array, "b f h w 3"]:
        """Images of scaled latents."""
        b, f = latents.shape[:2]
        vae = self.vae.bind(params["vae"], self.dtype)
        flat = latents.reshape(b * f, *latents.shape[2:])
        images = images_to_uint8(decode_latents(vae, flat, self.config.vae.scaling_factor))
        return images.reshape(b, f, *images.shape[1:])

    def contextualize(
        self, params: Parts, text: Float[Array, "b f l d"]
    ) -> Float[Array, "b f l d"]:
        """Text after the Storyline Contextualizer; the null text bypasses this."""
        return self._unet(params).contextualize(text.astype(self.dtype))

    def text_keys_values(
        self, params: Parts, storyline: Float[Array, "b f l d"]
    ) -> list[TextKeysValues]:
        """Cross-attention keys and values of contextualized text, or of null text."""
        return self._unet(params).text_keys_values(storyline.astype(self.dtype))

    def time_shifts(
        self, params: Parts, timesteps: Num[Array, " b"], motion: Num[Array, "#b m"]
    ) -> list[TimeShifts]:
        """Shifts that condition the UNet on steps and scene changes (StoryFlow values)."""
        unet = self._unet(params)
        # One image a frame: the stride is 1, as in the original's configs.
        strides = jnp.ones_like(timesteps) if self.config.unet.use_frame_stride_condition else None
        return unet.time_shifts(timesteps, unet.storyflow(motion), strides)

    def predict(
        self,
        params: Parts,
        noisy: Float[Array, "b g p q c"],
        shifts: list[TimeShifts],
        text: list[TextKeysValues],
        first_frame: Float[Array, "b p q c"] | None,
    ) -> Float[Array, "bn g p q c"]:
        """The UNet's prediction, float32, for all frames, or all but the first in continuation.

        There is one for each branch of guidance that `text` holds of a story.
        """
        prediction = self._unet(params)(
            noisy.astype(self.dtype),
            shifts,
            text,
            None if first_frame is None else first_frame.astype(self.dtype),
        )
        return prediction.astype(jnp.float32)

    def _unet(self, params: Parts) -> UNet:
        return self.unet.bind(params["unet"], self.dtype)


def clamp(params: Parts) -> Parts:
    """Project the temporal blends to [0, 1], as the original does before each use."""
    return {part: clamp_alphas(leaves) for part, leaves in params.items()}
