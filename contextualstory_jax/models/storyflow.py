"""StoryFlow Adapter: conditions the UNet on the scene change from each frame to the next."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from contextualstory_jax.models.embeddings import sinusoidal_embedding
from contextualstory_jax.models.layers import linear


def storyflow(latents: Float[Array, "b f h w c"]) -> Float[Array, "b f-1"]:
    """L2 distance of each frame's scaled latents from those of the frame before, float32.

    Reference: train.py (motion); paper section "StoryFlow Adapter".
    """
    steps = jnp.diff(latents.astype(jnp.float32), axis=1)
    return jnp.sqrt(jnp.sum(jnp.square(steps), axis=(2, 3, 4)))


def interpolation(frames: int) -> Float[np.ndarray, "f f-1"]:
    """Weights of the linear interpolation from f - 1 values to f frames.

    Centres are at half pixels, torch's align_corners=False.
    """
    source = np.clip((np.arange(frames) + 0.5) * (frames - 1) / frames - 0.5, 0, frames - 2)
    return np.maximum(0, 1 - np.abs(source[:, None] - np.arange(frames - 1))).astype(np.float32)


class StoryFlowAdapter(nnx.List):
    """Linear, SiLU, linear over the embedded values, one vector a frame.

    Parity: the sinusoidal embeddings are interpolated to the frames before the MLP (the paper's
    figure has it after).

    Reference: videoldm_unet.py get_motion_embedding; its parameters are `msim_embedding.0`
    and `.2`.
    """

    def __init__(self, dim: int, time_dim: int, *, zero: bool):
        super().__init__(
            [linear(dim, time_dim), jax.nn.silu, linear(time_dim, time_dim, zero=zero)]
        )

    def __call__(self, motion: Float[Array, "b m"], frames: int) -> Float[Array, "b f c"]:
        """One vector a frame from `frames - 1` values of `storyflow`, or from one value a frame."""
        first, activation, last = self
        embedding = sinusoidal_embedding(motion, first.in_features)
        if motion.shape[1] != frames:
            embedding = jnp.einsum("fm,bmc->bfc", interpolation(frames), embedding)
        return last(activation(first(embedding.astype(first.kernel[...].dtype))))
