"""Classifier-free guidance: predictions of a story with less and more of its condition, made one.

Branches, in order::

    none  [text]
    text  [null text, text]
    both  [null text and a first frame of noise, null text and the given first frame, text and the
          given first frame]

Reference: pipeline_conditional_animation.py AnimationPipeline.__call__.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def num_branches(guidance_scale: float, image_guidance_scale: float) -> int:
    """Number of predictions that a step needs: 1 for no guidance, 2 for text, 3 for both.

    A scale up to 1 asks for no guidance of its kind.
    """
    if image_guidance_scale > 1:
        return 3
    return 2 if guidance_scale > 1 else 1


def guide(
    predictions: Float[Array, "g b f h w c"],
    guidance_scale: Float[ArrayLike, ""],
    image_guidance_scale: Float[ArrayLike, ""],
    rescale: Float[ArrayLike, ""],
) -> Float[Array, "b f h w c"]:
    """Join the g = 1, 2 or 3 branches of a prediction, in float32.

    `rescale` in [0, 1] pulls each story's standard deviation back to that of its last branch, the
    fully conditioned one. Source: arXiv 2211.09800, equation 3; arXiv 2305.08891, section 3.4.
    """
    predictions = predictions.astype(jnp.float32)
    conditional = predictions[-1]
    if len(predictions) == 1:
        return conditional
    unconditional = predictions[0]
    if len(predictions) == 2:
        guided = unconditional + guidance_scale * (conditional - unconditional)
    else:
        image = predictions[1]
        guided = (
            unconditional
            + image_guidance_scale * (image - unconditional)
            + guidance_scale * (conditional - image)
        )
    # The reference rescales text guidance only.
    ratio = _story_std(conditional) / _story_std(guided)
    return guided * (rescale * ratio + (1 - rescale))


def _story_std(x: Float[Array, "b f h w c"]) -> Float[Array, "b 1 1 1 1"]:
    return jnp.std(x, axis=(1, 2, 3, 4), keepdims=True)
