"""Storyline Contextualizer: attention over the CLIP tokens of all sentences, before the UNet."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from contextualstory_jax.config.model_config import UNetConfig
from contextualstory_jax.models.attention import Attention, FeedForward, RotaryEmbedding, attention
from contextualstory_jax.models.layers import layer_norm, parameter, zeros

HEADS = 8  # fixed in the original
ROTARY_CHANNELS = 32  # of each head, or all of the head where it is narrower


class StorylineAttention(Attention):
    """Self-attention over all tokens of all sentences, or (temporal) over one token slot of each.

    Reference: videoldm_attention.py CrossAttention.
    """

    def __init__(self, dim: int, temporal: bool, causal: bool):
        super().__init__(dim, HEADS)
        self.temporal, self.causal = temporal, causal
        if temporal:
            self.rotary_emb = RotaryEmbedding(min(ROTARY_CHANNELS, dim // HEADS))

    def __call__(self, x: Float[Array, "b f l d"]) -> Float[Array, "b f l d"]:  # type: ignore[override]
        b, f, length, _ = x.shape
        q, k, v = (
            self.split_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v)
        )  # b f l n k
        if self.temporal:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
            q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))  # b l f n k
            out = jnp.swapaxes(
                attention(q, k, v, np.tri(f, dtype=bool) if self.causal else None), 1, 2
            )
        else:
            q, k, v = (a.reshape(b, f * length, *a.shape[3:]) for a in (q, k, v))
            # A token sees the tokens of its own and of earlier sentences.
            earlier = np.tri(f, dtype=bool).repeat(length, axis=0).repeat(length, axis=1)
            out = attention(q, k, v, earlier if self.causal else None)
            out = out.reshape(b, f, length, *v.shape[2:])
        return self.merge_heads(out)


class StorylineBlock(nnx.Module):
    """Attention and feed-forward, both pre-norm and residual.

    Reference: videoldm_attention.py BasicLinearTransformerBlock3D.
    """

    def __init__(self, dim: int, temporal: bool, causal: bool, *, zero: bool):
        self.attn1 = StorylineAttention(dim, temporal, causal)
        self.ff = FeedForward(dim, zero=zero)
        self.norm1 = layer_norm(dim)
        self.norm3 = layer_norm(dim)

    def __call__(self, x: Float[Array, "b f l d"]) -> Float[Array, "b f l d"]:
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class StorylineLayer(nnx.Module):
    """Blocks across tokens and across sentences in turn. Reference: LinearTransformer3D."""

    def __init__(self, config: UNetConfig, *, last: bool):
        kinds = list(zip(config.FStext_layer_temporal, config.FStext_layer_causal, strict=True))
        self.transformer_blocks = nnx.List(
            StorylineBlock(
                config.cross_attention_dim,
                temporal,
                causal,
                zero=config.zero_init_FSText and last and i == len(kinds) - 1,
            )
            for i, (temporal, causal) in enumerate(kinds)
        )

    def __call__(self, x: Float[Array, "b f l d"]) -> Float[Array, "b f l d"]:
        for block in self.transformer_blocks:
            x = block(x)
        return x


class StorylineContextualizer(nnx.Module):
    """`output = input + LayerNorm(layers(input + positions))`.

    Rows of `pos_embed` beyond the text's length are never read; they are kept because checkpoints
    hold them.

    Reference: videoldm_unet.py FSTextTransformer; paper section "Storyline Contextualizer".
    """

    def __init__(self, config: UNetConfig):
        dim, layers = config.cross_attention_dim, config.num_layers_FStext
        self.pos_embed = parameter((1, config.n_frames, config.max_text_length, dim), zeros)
        self.trf_blocks = nnx.List(
            StorylineLayer(config, last=i == layers - 1) for i in range(layers)
        )
        self.norm = layer_norm(dim)

    def __call__(self, text: Float[Array, "b f l d"]) -> Float[Array, "b f l d"]:
        x = text + self.pos_embed[...][:, :, : text.shape[2]]
        for layer in self.trf_blocks:
            x = layer(x)
        # Parity: not the identity at initialisation, although the last feed-forward starts at zero.
        return text + self.norm(x)
