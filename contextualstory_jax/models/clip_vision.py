"""CLIP: images and sentences to unit vectors whose cosine says how well they agree.

Modules nest and are named as in published checkpoints; layers are those of `clip_text.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from contextualstory_jax.config.model_config import CLIPConfig, VisionEncoderConfig
from contextualstory_jax.models.clip_text import Encoder, TextTransformer
from contextualstory_jax.models.layers import conv, embed, layer_norm, linear, normal, parameter


class VisionEmbeddings(nnx.Module):
    """A learned vector, then one of each patch, row by row; plus one of each position.

    Reference: transformers CLIPVisionEmbeddings.
    """

    def __init__(self, config: VisionEncoderConfig):
        width, side = config.hidden_size, config.patch_size
        self.class_embedding = parameter((width,), normal(1.0))
        self.patch_embedding = conv(
            3, width, (side, side), padding=((0, 0), (0, 0)), stride=side, bias=False
        )
        patches = (config.image_size // side) ** 2
        self.position_embedding = embed(patches + 1, width, 0.1)

    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n l d"]:
        patches = self.patch_embedding(images).reshape(len(images), -1, len(self.class_embedding))
        first = jnp.broadcast_to(self.class_embedding[...], (len(images), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding.embedding[...]


class VisionTransformer(nnx.Module):
    """Embeddings, norm, layers, and the first vector's norm. Reference: CLIPVisionTransformer."""

    def __init__(self, config: VisionEncoderConfig):
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = layer_norm(config.hidden_size, config.layer_norm_eps)  # sic
        self.encoder = Encoder(config)
        self.post_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n d"]:
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(hidden[:, 0])


class CLIPModel(nnx.Module):
    """Both encoders with their projections. Reference: transformers CLIPModel.

    Its halves are transformers' CLIPVisionModelWithProjection and CLIPTextModelWithProjection.
    """

    def __init__(self, config: CLIPConfig):
        self.vision_model = VisionTransformer(config.vision_config)
        self.text_model = TextTransformer(config.text_config)
        size = config.projection_dim
        self.visual_projection = linear(config.vision_config.hidden_size, size, bias=False)
        self.text_projection = linear(config.text_config.hidden_size, size, bias=False)

    def encode_images(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n c"]:
        """Unit vectors of preprocessed images."""
        return unit(self.visual_projection(self.vision_model(images)))

    def encode_text(self, ids: Int[Array, "n l"]) -> Float[Array, "n c"]:
        """Unit vectors of sentences, read at the first end token: the largest id there is."""
        hidden = self.text_model(ids)
        ends = jnp.argmax(ids, axis=1)
        return unit(self.text_projection(hidden[jnp.arange(len(ids)), ends]))


def unit(x: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """Vectors of length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
