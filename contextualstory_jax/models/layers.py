"""Basic layers of every network.

They are Flax NNX's, with PyTorch's initialisers and each numerical choice written out.

Modules declare their parameters (shape and initialiser) and initialise none, so that building a
network of any size costs milliseconds and no memory. Layout is channels-last. Parameters are
float32; a network computes in the dtype its parameters were cast to when bound (`network.py`), so
that no layer carries a dtype. Norms and softmax reduce in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

# Samples float32 values of a shape. NumPy's generator: nothing to compile, and the same on every
# platform.
Initialiser = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


class Declaration(jax.ShapeDtypeStruct):
    """A declared float32 parameter: its shape and initialiser."""

    def __init__(self, shape: tuple[int, ...], initialiser: Initialiser):
        super().__init__(shape, jnp.float32)
        self.initialiser = initialiser


def parameter(shape: tuple[int, ...], initialiser: Initialiser) -> nnx.Param:
    """Declare a parameter of a module."""
    return nnx.Param(Declaration(shape, initialiser))


def uniform(fan_in: int) -> Initialiser:
    """PyTorch's default for linear and convolution layers: uniform in +-1/sqrt(fan_in)."""
    bound = np.float32(1 / math.sqrt(fan_in))
    return lambda rng, shape: (2 * rng.random(shape, dtype=np.float32) - 1) * bound


def normal(deviation: float) -> Initialiser:
    """Normal values of mean 0."""
    return lambda rng, shape: np.float32(deviation) * rng.standard_normal(shape, dtype=np.float32)


def zeros(_: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """All zero."""
    return np.zeros(shape, np.float32)


def ones(_: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """All one."""
    return np.ones(shape, np.float32)


def _declare(initialiser: Initialiser) -> Any:
    """An initialiser as NNX's layers call it, which declares instead of initialising."""
    return lambda _key, shape, *_dtype, **_sharding: Declaration(shape, initialiser)


class _NoKeys:
    """Stand-in for the keys that NNX's layers ask for; a declaration needs none."""

    def params(self) -> None: ...


_NO_KEYS: Any = _NoKeys()


def linear(
    features_in: int, features_out: int, *, bias: bool = True, zero: bool = False
) -> nnx.Linear:
    """torch.nn.Linear; `zero` starts it at the zero map."""
    init = _declare(zeros if zero else uniform(features_in))
    return nnx.Linear(
        features_in, features_out, use_bias=bias, kernel_init=init, bias_init=init, rngs=_NO_KEYS
    )


def conv(
    channels_in: int,
    channels_out: int,
    kernel_size: tuple[int, ...],
    *,
    padding: tuple[tuple[int, int], ...],
    stride: int | tuple[int, ...] = 1,
    bias: bool = True,
) -> nnx.Conv:
    """torch.nn.Conv2d or Conv3d, channels last; padding is (before, after) of each axis."""
    init = _declare(uniform(channels_in * math.prod(kernel_size)))
    return nnx.Conv(
        channels_in,
        channels_out,
        kernel_size,
        strides=stride,
        padding=padding,
        use_bias=bias,
        kernel_init=init,
        bias_init=init,
        rngs=_NO_KEYS,
    )


def conv3x3(channels_in: int, channels_out: int) -> nnx.Conv:
    """A 3x3 convolution that keeps the size."""
    return conv(channels_in, channels_out, (3, 3), padding=((1, 1), (1, 1)))


def conv1x1(channels_in: int, channels_out: int) -> nnx.Conv:
    """A linear map of every position's channels, stored as a convolution."""
    return conv(channels_in, channels_out, (1, 1), padding=((0, 0), (0, 0)))


def embed(entries: int, features: int, deviation: float) -> nnx.Embed:
    """torch.nn.Embedding with normal values."""
    return nnx.Embed(entries, features, embedding_init=_declare(normal(deviation)), rngs=_NO_KEYS)


_NORM: Any = {"scale_init": _declare(ones), "bias_init": _declare(zeros), "rngs": _NO_KEYS}


class GroupNorm(nnx.GroupNorm):
    """torch.nn.GroupNorm over (..., h, w, c): each leading index has statistics of its own."""

    def __call__(self, x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h w c"]:
        return super().__call__(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)


def group_norm(channels: int, groups: int, epsilon: float) -> GroupNorm:
    """Group normalisation with two passes in float32."""
    return GroupNorm(channels, num_groups=groups, epsilon=epsilon, use_fast_variance=False, **_NORM)


def layer_norm(channels: int, epsilon: float = 1e-5) -> nnx.LayerNorm:
    """torch.nn.LayerNorm over the last axis, two passes in float32."""
    return nnx.LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, **_NORM)


class BatchNorm(nnx.Module):
    """torch.nn.BatchNorm2d or BatchNorm3d, computed in float32.

    It normalises by its running statistics. In training (`start_training`) by those of the batch,
    which move the running ones by a tenth, in the bound module (`Network.values` reads them).
    """

    def __init__(self, channels: int, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.training = False
        self.scale = parameter((channels,), ones)
        self.bias = parameter((channels,), zeros)
        self.running_mean = parameter((channels,), zeros)
        self.running_var = parameter((channels,), ones)

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        scale, bias, mean, variance = (
            p[...].astype(jnp.float32)
            for p in (self.scale, self.bias, self.running_mean, self.running_var)
        )
        if self.training:
            values = x.astype(jnp.float32).reshape(-1, x.shape[-1])
            n, old_mean, old_variance = len(values), mean, variance
            mean, variance = values.mean(axis=0), values.var(axis=0)
            self.running_mean[...] = 0.9 * old_mean + 0.1 * mean
            self.running_var[...] = 0.9 * old_variance + 0.1 * variance * n / (n - 1)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return (x * factor + (bias - mean * factor)).astype(x.dtype)


def start_training(module: nnx.Module) -> None:
    """Let a bound module's batch norms normalise by the statistics of their batch."""
    for _, found in nnx.iter_modules(module):
        if isinstance(found, BatchNorm):
            found.training = True


def upsample_nearest(x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch 2*h 2*w c"]:
    """Every pixel twice along both sides."""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
