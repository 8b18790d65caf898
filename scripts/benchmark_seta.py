"""Compare ways to compute Spatially-Enhanced Temporal Attention, inside the module it is part of.

    python scripts/benchmark_seta.py

A line for each way and level of the published UNet: one story's first temporal attention, with its
projections, forward, and forward and backward. All ways are checked to agree first. The model's own
are the tiles; the others are here only to be compared:

    gather    each pixel's 45 keys are gathered, as the paper says it
    shifts    scores with the nine shifted maps of keys, nothing gathered
    tiles N   queries in tiles of N x N pixels, keys with a halo, one mask
    dense     all keys, with the logarithm of how often a query sees each as bias; where it fits
    fused     tiles of 4; queries, keys and values come from one product, not three
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

sys.path.insert(0, str(Path(__file__).parents[1]))  # what measures is not in an installation

from contextualstory_jax.models import seta, temporal  # noqa: E402
from contextualstory_jax.models.attention import attention  # noqa: E402
from contextualstory_jax.models.network import Network  # noqa: E402
from contextualstory_jax.models.seta import seta_attention  # noqa: E402
from contextualstory_jax.models.temporal import TemporalAttention  # noqa: E402
from contextualstory_jax.utils.cli import ArgumentParser, run  # noqa: E402
from contextualstory_jax.utils.errors import require  # noqa: E402
from scripts.benchmarks.measuring import timed  # noqa: E402

FRAMES, HEADS = 5, 8
LEVELS = ((32, 320), (16, 640), (8, 1280))  # pixels a side, channels
SHIFTS = tuple(itertools.product(range(3), repeat=2))
DENSE_AT_MOST = 1280  # keys

Way = Callable[..., jax.Array]


def neighbours(x: jax.Array) -> list[jax.Array]:
    """The nine shifted maps of (b f h w n k), the borders repeated; the fifth is the map itself."""
    h, w = x.shape[2:4]
    padded = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0), (0, 0)], "edge")
    return [padded[:, :, y : y + h, x : x + w] for y, x in SHIFTS]


def seen() -> np.ndarray:
    """Mask of the frames' shifted maps that a query's frame sees: (frames, shifts, frames)."""
    frame, shift, other = np.indices((FRAMES, len(SHIFTS), FRAMES))
    return (frame != other) | (shift == 4)


def gather(q: jax.Array, k: jax.Array, v: jax.Array, own: None = None) -> jax.Array:
    """Attention of each pixel over its own 45 keys."""
    k, v = (rearrange(neighbours(x), "s b f h w n k -> b h w (s f) n k") for x in (k, v))
    q = rearrange(q, "b f h w n k -> b h w f n k")
    out = attention(q, k, v, seen().reshape(FRAMES, -1))
    return rearrange(out, "b h w f n k -> b f h w n k")


def shifts(q: jax.Array, k: jax.Array, v: jax.Array, own: None = None) -> jax.Array:
    """A map of scores for each shift."""
    scores = jnp.stack(
        [
            jnp.einsum("bfhwnk,bghwnk->bnhwfg", q, near, preferred_element_type=jnp.float32)
            for near in neighbours(k)
        ],
        axis=-2,
    )
    scores = jnp.where(seen(), scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=(-2, -1)).astype(v.dtype)
    parts = (
        jnp.einsum("bnhwfg,bghwnk->bfhwnk", weights[..., i, :], near)
        for i, near in enumerate(neighbours(v))
    )
    return functools.reduce(jnp.add, parts)


@functools.cache
def multiplicity(height: int, width: int) -> np.ndarray:
    """Count of how often each query's token sees each token: (f h w, f h w)."""
    rows, columns = np.indices((height, width)).reshape(2, -1)
    counts = np.zeros((FRAMES, height * width, FRAMES, height * width), np.float32)
    for i, (y, x) in enumerate(SHIFTS):
        near = np.clip(rows + y - 1, 0, height - 1) * width + np.clip(columns + x - 1, 0, width - 1)
        for frame, other in itertools.product(range(FRAMES), repeat=2):
            if frame != other or i == 4:
                counts[frame, np.arange(height * width), other, near] += 1
    return counts.reshape(FRAMES * height * width, -1)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, own: None = None) -> jax.Array:
    """Attention over all tokens."""
    _, _, h, w, _, _ = q.shape
    with np.errstate(divide="ignore"):
        bias = jnp.asarray(np.log(multiplicity(h, w)))[None, None]
    flat = (rearrange(x, "b f h w n k -> b (f h w) n k") for x in (q, k, v))
    out = jax.nn.dot_product_attention(*flat, bias=bias, implementation="xla")
    return out.reshape(q.shape)


def tiles(size: int) -> Way:
    """The model's own way, with tiles of a size."""

    def tiled(*arguments: Any) -> jax.Array:
        with mock.patch.object(seta, "SETA_TILE", size):
            return seta_attention(*arguments)

    return tiled


def ways(side: int) -> dict[str, Way]:
    """The ways that fit a level."""
    found = {"gather": gather, "shifts": shifts, "tiles 4": tiles(4), "tiles 8": tiles(8)}
    if FRAMES * side**2 <= DENSE_AT_MOST:
        found["dense"] = dense
    return {**found, "fused": tiles(4)}


def fuse_projections(layer: TemporalAttention, x: jax.Array) -> None:
    """Have a module make queries, keys and values of one input in one product."""
    names = ("to_q", "to_k", "to_v")
    kernels = jnp.concatenate([getattr(layer, name).kernel[...] for name in names], axis=1)
    for name, part in zip(names, jnp.split(x @ kernels, len(names), axis=-1), strict=True):
        setattr(layer, name, lambda _, part=part: part)


Program = Callable[[dict[str, jax.Array], jax.Array], Any]


def programs(side: int, channels: int) -> Iterator[tuple[str, Network, Program, Program]]:
    """Each way's name and network, forward, and forward and backward."""
    network = Network(lambda: TemporalAttention(channels, HEADS, seta=True, rotary=True))
    for name, way in ways(side).items():

        def forward(params: dict, x: jax.Array, name: str = name, way: Way = way) -> jax.Array:
            layer = network.bind(params)
            if name == "fused":
                fuse_projections(layer, x)
            with mock.patch.object(temporal, "seta_attention", way):
                return layer(x)

        def both(params: dict, x: jax.Array, forward: Program = forward) -> Any:
            return jax.grad(lambda *a: (forward(*a) ** 2).sum(), argnums=(0, 1))(params, x)

        yield name, network, forward, both


def measure(rounds: int) -> Iterator[str]:
    """Lines of a table: milliseconds on this machine, the ways taking turns."""
    yield f"{'level':10}{'way':10}{'forward ms':>12}{'with backward ms':>18}{'error':>10}"
    for side, channels in LEVELS:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((1, FRAMES, side, side, channels), np.float32))
        found = list(programs(side, channels))
        params = jax.tree.map(jnp.asarray, found[0][1].init(0))
        compiled = {n: (jax.jit(forward), jax.jit(both)) for n, _, forward, both in found}
        exact = compiled["gather"][0](params, x)
        taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in compiled}
        errors = {}
        for name, (forward, both) in compiled.items():
            errors[name] = float(
                jnp.linalg.norm(forward(params, x) - exact) / jnp.linalg.norm(exact)
            )
            jax.block_until_ready(both(params, x))
        timed_pairs = {
            name: [timed(functools.partial(program, params, x)) for program in pair]
            for name, pair in compiled.items()
        }
        for _ in range(rounds):
            for name, tasks in timed_pairs.items():
                taken[name].append(tuple(task() for task in tasks))
        for name, times in taken.items():
            forward, both = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
            error = errors[name]
            yield f"{f'{side}x{side}':10}{name:10}{forward:12.1f}{both:18.1f}{error:10.1e}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    require(arguments.rounds >= 1, f"--rounds must be at least 1; got {arguments.rounds}")
    for line in measure(arguments.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
