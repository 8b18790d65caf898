"""Interface of a solver of the reverse process, and the arithmetic that solvers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float64

Latents = Float[Array, "b f h w c"]
Pairs = Float64[np.ndarray, "t 2"]


def _same_input(x: Latents, coefficients: Any) -> Latents:
    return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """One solver at one number of steps.

    `step(x, prediction, coefficients, memory, noise)` gives the next latents and memory;
    `coefficients` is one entry of the field's leading axis t, `memory` a tuple of as many latents
    as the field says, zeros before the first step, and `noise` is standard normal, or None unless
    `stochastic`. `scale_input(x, coefficients)` gives the network's input, and `levels` the noise
    level of frames that are kept in it. The functions are
    module-level ones: a compiled loop is found again by their identity.
    """

    # Any, because JAX rebuilds a pytree with placeholders for its arrays.
    timesteps: Any  # Num[Array, "t"]: the network's timestep at each evaluation, in order
    coefficients: Any  # a pytree of float32 arrays with leading axis t
    init_noise_sigma: Any  # Float[Array, ""]: the standard deviation of the first latents
    step: Callable = dataclasses.field(metadata={"static": True})
    memory: int = dataclasses.field(default=0, metadata={"static": True})
    scale_input: Callable = dataclasses.field(default=_same_input, metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})
    levels: Any = None  # Float[Array, "t 2"]: signal and sigma; None where no frame is kept


def weighted(factors: Iterable[Float[Array, ""]], arrays: Iterable[Latents]) -> Latents:
    """The sum of the arrays, each times its factor."""
    terms = [factor * array for factor, array in zip(factors, arrays, strict=True)]
    return sum(terms[1:], terms[0])


def clean_and_noise(prediction_type: str, alpha: Float64[np.ndarray, "t"]) -> tuple[Pairs, Pairs]:
    """The factors of (x, prediction) in the clean latents and in the noise, at each alpha-bar."""
    signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "epsilon":
        clean, noise = (1 / signal, -sigma / signal), (zero, one)
    elif prediction_type == "v_prediction":
        clean, noise = (signal, -sigma), (sigma, signal)
    else:
        clean, noise = (zero, one), (1 / sigma, -signal / sigma)
    return np.stack(clean, axis=-1), np.stack(noise, axis=-1)
