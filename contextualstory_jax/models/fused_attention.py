"""cuDNN's fused attention: which calls it computes, at even lengths, each device its own part."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

MIN_QUERIES = 256  # below, writing the scores costs less than computing them again does


class _Place(NamedTuple):
    mesh: Mesh | AbstractMesh
    split: PartitionSpec  # of queries, keys and values, `b s n k`

    def ways(self, axis: int) -> int:
        """Number of parts that an axis is split into."""
        names = self.split[axis]
        names = names if isinstance(names, tuple) else (names,)
        return math.prod(self.mesh.shape[name] for name in names)


_place: ContextVar[_Place | None] = ContextVar("attention_place", default=None)


@contextlib.contextmanager
def attention_on(mesh: Mesh | AbstractMesh, split: PartitionSpec) -> Iterator[None]:
    """Name the devices that a program is traced for, which may be absent; also a decorator.

    Args:
        mesh: The devices.
        split: The mesh axes of the batch and of the heads of `b s n k`.
    """
    token = _place.set(_Place(mesh, split))
    try:
        yield
    finally:
        _place.reset(token)


def cudnn_head_width(device: Any) -> int:
    """The widest head that cuDNN's fused attention takes on a device; 0 where there is none.

    Source: `check_is_flash_attention` of JAX's `fused_attention_stablehlo.py`.
    """
    # Of other makers' GPUs JAX gives no such number.
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", None)))
    if device.platform != "gpu" or capability is None or int(capability[1]) < 8:
        return 0
    # Ampere and Ada, or Hopper and later. For an absent device JAX looks at this machine's instead.
    return 256 if int(capability[1]) > 8 and device in jax.devices() else 128


def suits_cudnn(q: Float[Array, "*batch q n k"]) -> bool:
    """Whether cuDNN computes attention of these queries to all of their keys.

    It takes 16-bit numbers, heads of a multiple of 8 channels, and on a mesh a batch that divides
    over it. Outside of programs that name their devices there must be one alone.
    """
    place, device = _place.get(), _device()
    *batch, queries, _, channels = q.shape
    return (
        device is not None
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and queries >= MIN_QUERIES
        and channels % 8 == 0
        and channels <= cudnn_head_width(device)
        and (place is None or math.prod(batch) % place.ways(0) == 0)
    )


def _device() -> Any:
    """One of the devices that the program is for, all of a kind; None where it names none."""
    place = _place.get()
    if place is None:
        return jax.devices()[0] if len(jax.devices()) == 1 else None
    return place.mesh.devices.flat[0] if isinstance(place.mesh, Mesh) else None


def fused_attention(
    q: Float[Array, "b q n k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "b q n k"]:
    """`jax.nn.dot_product_attention`; on a mesh split by batch and, where they divide, by heads.

    Left to the compiler, split queries may meet copied keys, which JAX refuses.
    """
    attend = functools.partial(_attend_at_even_lengths, implementation)
    place = _place.get()
    if place is None or place.mesh.size == 1:
        return attend(q, k, v)
    batch, _, heads = place.split
    spec = PartitionSpec(batch, None, heads if q.shape[2] % place.ways(2) == 0 else None)
    return jax.shard_map(attend, mesh=place.mesh, in_specs=(spec,) * 3, out_specs=spec)(q, k, v)


def _attend_at_even_lengths(
    implementation: Literal["cudnn", "xla"],
    q: Float[Array, "b q n k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
) -> Float[Array, "b q n k"]:
    # JAX refuses to differentiate cuDNN's attention at odd lengths. Lengths mark the padding:
    # a mask would become a bias, which takes another, slower kernel.
    batch, queries, keys = len(q), q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = {}
    if queries % 2 or keys % 2:
        lengths["query_seq_lengths"] = jnp.full(batch, queries, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(batch, keys, jnp.int32)
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    return attend(q, k, v, **lengths)[:, :queries]
