"""CLIP's text encoder: token ids to the last hidden states that condition the UNet.

Modules nest and are named as in published checkpoints. The vision encoder (`clip_vision.py`) shares
the layers, and pools.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from contextualstory_jax.config.model_config import TextEncoderConfig, VisionEncoderConfig
from contextualstory_jax.models.attention import attention
from contextualstory_jax.models.layers import embed, layer_norm, linear

EncoderConfig = TextEncoderConfig | VisionEncoderConfig


class TextEmbeddings(nnx.Module):
    """A vector for each token plus one for its place.

    Reference: transformers CLIPTextEmbeddings.
    """

    def __init__(self, config: TextEncoderConfig):
        width = config.hidden_size
        # Used only when training from scratch: CLIP's 0.02 would be lost in the unit-scale outputs
        # of newly initialised attention.
        self.token_embedding = embed(config.vocab_size, width, 1.0)
        self.position_embedding = embed(config.max_position_embeddings, width, 0.1)

    def __call__(self, ids: Int[Array, "n l"]) -> Float[Array, "n l d"]:
        # Not nnx.Embed's call: it casts to the dtype the table was declared in.
        tokens = jnp.take(self.token_embedding.embedding[...], ids, axis=0)
        return tokens + self.position_embedding.embedding[: ids.shape[1]]


class SelfAttention(nnx.Module):
    """Multi-head self-attention, every projection with a bias.

    Reference: transformers CLIPAttention.
    """

    def __init__(self, config: EncoderConfig):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, width)
        self.v_proj = linear(width, width)
        self.out_proj = linear(width, width)

    def __call__(
        self, x: Float[Array, "n l d"], mask: Bool[np.ndarray, "l l"] | None
    ) -> Float[Array, "n l d"]:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in projections)  # n l heads k
        return self.out_proj(attention(q, k, v, mask).reshape(x.shape))


class MLP(nnx.Module):
    """Linear, activation, linear. Reference: transformers CLIPMLP."""

    def __init__(self, config: EncoderConfig):
        self.is_quick = config.hidden_act == "quick_gelu"
        self.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "n l d"]) -> Float[Array, "n l d"]:
        x = self.fc1(x)
        return self.fc2(
            x * jax.nn.sigmoid(1.702 * x) if self.is_quick else jax.nn.gelu(x, approximate=False)
        )


class EncoderLayer(nnx.Module):
    """Attention and MLP, both pre-norm and residual. Reference: transformers CLIPEncoderLayer."""

    def __init__(self, config: EncoderConfig):
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self, x: Float[Array, "n l d"], mask: Bool[np.ndarray, "l l"] | None
    ) -> Float[Array, "n l d"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The layers; where `mask` is false a token does not see another. Reference: CLIPEncoder."""

    def __init__(self, config: EncoderConfig):
        self.layers = nnx.List(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def __call__(
        self, x: Float[Array, "n l d"], mask: Bool[np.ndarray, "l l"] | None = None
    ) -> Float[Array, "n l d"]:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextTransformer(nnx.Module):
    """Embeddings, layers, final norm; a token sees itself and what came before.

    Reference: transformers CLIPTextTransformer.
    """

    def __init__(self, config: TextEncoderConfig):
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, ids: Int[Array, "n l"]) -> Float[Array, "n l d"]:
        causal = np.tri(ids.shape[1], dtype=bool)
        return self.final_layer_norm(self.encoder(self.embeddings(ids), causal))


class CLIPTextModel(nnx.Module):
    """The last hidden state of each token, after the final norm.

    Reference: transformers CLIPTextModel.
    """

    def __init__(self, config: TextEncoderConfig):
        self.max_length = config.max_position_embeddings
        self.text_model = TextTransformer(config)

    def __call__(self, ids: Int[Array, "n l"]) -> Float[Array, "n l d"]:
        """Encode token ids, padding included. Raises ValueError for more tokens than positions."""
        if ids.shape[1] > self.max_length:
            raise ValueError(
                f"{ids.shape[1]} tokens, but the text encoder has {self.max_length} positions"
            )
        return self.text_model(ids)
