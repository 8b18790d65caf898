"""Attention over frames and neighbourhoods, against sums written out token by token."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from contextualstory_jax.models.attention import (
    GEGLU,
    RotaryEmbedding,
    attention,
    rotate,
    seta_attention,
    seta_mask,
    with_halo,
)
from contextualstory_jax.models.embeddings import frame_position_table
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.temporal import TemporalAttention

FRAMES = 5
# Heights and widths of tiles of 4x4 and 2x4, and of 3x4 and 2x4 after padding 5 and 7 to 8.
SIZES = [(4, 8), (2, 4), (3, 5), (6, 7)]


def ring(y: int, x: int, height: int, width: int) -> list[tuple[int, int]]:
    """The 8 neighbours of a position; beyond a border, the border again."""
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    return [(np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)) for dy, dx in steps]


@jax.jit
def gathered_attention(q, k, v, own_k, own_v):
    """SETA as the paper gives it: tokens gathered for each query. All are `b f h w n k`."""
    _, frames, height, width, _, dim = q.shape
    near = [[ring(y, x, height, width) for x in range(width)] for y in range(height)]
    rows, columns = np.moveaxis(np.array(near), -1, 0)  # h w 8

    def visible(own, others, i):
        seen_in = np.array([j for j in range(frames) if j != i])  # not its own frame's
        around = jnp.asarray(others)[:, seen_in][:, :, rows, columns]
        around = rearrange(around, "b f h w s n k -> b h w (f s) n k")
        return jnp.concatenate([rearrange(own, "b f h w n k -> b h w f n k"), around], axis=3)

    out = []
    for i in range(frames):
        keys, values = visible(own_k, k, i), visible(own_v, v, i)
        logits = jnp.einsum("bhwnk,bhwsnk->bhwns", q[:, i], keys) / math.sqrt(dim)
        out.append(jnp.einsum("bhwns,bhwsnk->bhwnk", jax.nn.softmax(logits), values))
        assert keys.shape[3] == 9 * frames - 8
    return jnp.stack(out, axis=1)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_seta_sees_the_37_tokens_that_the_paper_gathers(height, width):
    q, k, v = 2 * random(3, 2, FRAMES, height, width, 2, 4)

    out = jax.jit(seta_attention)(q, k, v)

    expected = gathered_attention(q, k, v, k, v)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_seta_sees_the_own_position_by_keys_and_values_of_its_own(height, width):
    q, k, v, own_k, own_v = 2 * random(5, 2, FRAMES, height, width, 2, 4)

    out = jax.jit(seta_attention)(q, k, v, (own_k, own_v))

    expected = gathered_attention(q, k, v, own_k, own_v)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "has_own"), [(5, 7, False), (6, 9, True)])
def test_seta_s_gradient_is_that_of_the_gathered_tokens(height, width, has_own):
    *arrays, weight = map(jnp.asarray, random(6, 1, 3, height, width, 2, 4))

    def gradient(attend):
        def total(q, k, v, own_k, own_v):
            own = (own_k, own_v) if has_own else (k, v)
            return jnp.sum(weight * attend(q, k, v, own))

        return jax.jit(jax.grad(total, argnums=tuple(range(5 if has_own else 3))))(*arrays)

    ours = gradient(lambda q, k, v, own: seta_attention(q, k, v, own if has_own else None))

    gathered = gradient(lambda q, k, v, own: gathered_attention(q, k, v, *own))
    for one, expected in zip(ours, gathered, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


def test_an_odd_side_takes_no_more_memory_than_full_tiles():
    def memory(width):
        x = jax.ShapeDtypeStruct((1, FRAMES, 16, width, 4, 16), jnp.float32)
        compiled = jax.jit(seta_attention).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Tiles of one pixel, which divide every side, would take three times as much.
    assert memory(33) <= 1.1 * memory(36)


@pytest.mark.parametrize("has_own", [False, True])
def test_the_gradient_of_seta_is_finite(has_own):
    arrays = [jnp.asarray(a) for a in 20 * random(5, 1, 2, 2, 3, 1, 4)]

    def total(q, k, v, own_k, own_v):
        return jnp.sum(seta_attention(q, k, v, (own_k, own_v) if has_own else None) ** 2)

    gradients = jax.jit(jax.grad(total, argnums=tuple(range(5 if has_own else 3))))(*arrays)

    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_the_mask_of_one_pixel_and_two_frames():
    nothing, centre, all_nine = [0] * 9, [0, 0, 0, 0, 1, 0, 0, 0, 0], [1] * 9
    neighbours = [1, 1, 1, 1, 0, 1, 1, 1, 1]

    np.testing.assert_array_equal(
        seta_mask(2, 1, 1, ring_only=False), [centre + all_nine, all_nine + centre]
    )
    np.testing.assert_array_equal(
        seta_mask(2, 1, 1, ring_only=True), [nothing + neighbours, neighbours + nothing]
    )


def test_the_mask_of_a_tile_of_two_pixels():
    # What frame 0's right pixel sees; columns are halo, pixel, pixel, halo.
    np.testing.assert_array_equal(
        seta_mask(2, 1, 2, ring_only=False)[1].reshape(2, 3, 4),
        [
            [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],  # its own frame
            [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]],  # the other
        ],
    )


@pytest.mark.parametrize("tile", [(4, 4), (2, 4), (1, 1)])
def test_every_query_of_a_tile_sees_37_keys(tile):
    np.testing.assert_array_equal(seta_mask(FRAMES, *tile, ring_only=False).sum(axis=1), 37)
    np.testing.assert_array_equal(seta_mask(FRAMES, *tile, ring_only=True).sum(axis=1), 32)


def test_a_halo_is_the_next_tile_s_border_or_the_border_again():
    x = jnp.array([[0, 1, 2, 3], [4, 5, 6, 7]])

    np.testing.assert_array_equal(
        with_halo(x, 1, 2), [[[0, 0, 1, 2], [1, 2, 3, 3]], [[4, 4, 5, 6], [5, 6, 7, 7]]]
    )
    np.testing.assert_array_equal(
        with_halo(x, 0, 1),
        [[[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]],
    )


def test_rotary_positions_turn_interleaved_pairs_by_the_frame_s_index():
    x = jnp.broadcast_to(jnp.array([1.0, 2, 3, 4, 5, 6]), (1, 3, 6))  # b f c

    out = rotate(x, jnp.array([math.pi / 2, math.pi]))  # of the pairs (1, 2) and (3, 4)

    expected = [[1, 2, 3, 4, 5, 6], [-2, 1, -3, -4, 5, 6], [-1, -2, 3, 4, 5, 6]]
    np.testing.assert_allclose(out[0], expected, atol=1e-6)


def test_rotary_frequencies_start_at_powers_of_10000():
    network = Network(lambda: RotaryEmbedding(8))

    np.testing.assert_allclose(network.init(0)["freqs"], [1, 0.1, 0.01, 0.001], rtol=1e-6)


def bound_attention(**options):
    """A temporal attention of 8 channels and 2 heads with random weights."""
    network = Network(lambda: TemporalAttention(8, 2, **options))
    params = {name: random(*s.shape, seed=i) for i, (name, s) in enumerate(network.shapes.items())}
    return network.bind(params)


def heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], 2, 4)


def test_half_of_the_channels_carry_rotary_positions_of_their_frame():
    layer = bound_attention(seta=True, rotary=True)
    x = random(1, FRAMES, 3, 2, 8)
    q, k, v = (np.asarray(x @ w.kernel[...]) for w in (layer.to_q, layer.to_k, layer.to_v))
    freqs = np.asarray(layer.rotary_emb.freqs[...])
    turns = np.exp(1j * np.arange(FRAMES)[:, None] * freqs)[None, :, None, None]  # 1 f 1 1 pair

    def turned(a):
        pairs = (a[..., 0:4:2] + 1j * a[..., 1:4:2]) * turns
        pairs = np.stack([pairs.real, pairs.imag], axis=-1).reshape(*a.shape[:-1], 4)
        return np.concatenate([pairs, a[..., 4:]], axis=-1)

    out = layer(jnp.asarray(x))

    assert freqs.shape == (2,)  # pairs of the first 4 of 8 channels
    k, v = heads(turned(k)), heads(v)
    expected = layer.merge_heads(jnp.asarray(gathered_attention(heads(turned(q)), k, v, k, v)))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_with_sinusoidal_positions_a_neighbour_carries_that_of_frame_0():
    layer = bound_attention(seta=True, rotary=False)
    x = random(1, FRAMES, 3, 2, 8)
    table = frame_position_table(FRAMES, 8)[None, :, None, None]
    own, neighbour = x + table, x + table[:, :1]

    def project(tokens, layer):
        return heads(np.asarray(tokens @ layer.kernel[...]))

    out = layer(jnp.asarray(x))

    expected = gathered_attention(
        project(own, layer.to_q),
        project(neighbour, layer.to_k),
        project(neighbour, layer.to_v),
        project(own, layer.to_k),
        project(own, layer.to_v),
    )
    expected = layer.merge_heads(jnp.asarray(expected))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotary", [False, True])
def test_without_seta_a_position_sees_its_own_frames_only(rotary):
    layer = bound_attention(seta=False, rotary=rotary)
    x = random(1, FRAMES, 2, 2, 8)
    changed = x.copy()
    changed[:, 3, 0, 1] += 1

    moved = np.abs(layer(jnp.asarray(changed)) - layer(jnp.asarray(x))).max(axis=(0, -1)) > 1e-6

    assert moved[:, 0, 1].all()
    assert moved.sum() == FRAMES


def test_sinusoidal_positions_tell_frames_apart():
    layer = bound_attention(seta=False, rotary=False)
    x = jnp.asarray(np.repeat(random(1, 1, 1, 1, 8), FRAMES, axis=1))

    out = layer(x)

    assert np.abs(np.diff(out[0, :, 0, 0], axis=0)).max(axis=-1).min() > 1e-3


def test_true_in_a_mask_attends():
    q, k, v = (jnp.asarray(a) for a in random(3, 1, 2, 1, 4))

    out = attention(q, k, v, np.array([[True, False], [False, True]]))

    np.testing.assert_allclose(out, v, rtol=1e-6)


def test_softmax_is_in_float32_whatever_the_inputs_dtype():
    # Logits 256 and 257: in bfloat16 they would be the same number.
    q = jnp.array([2.0, 2, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k = jnp.array([[256.0, 0, 0, 0], [256, 1, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([[0.0] * 4, [1.0] * 4], jnp.bfloat16).reshape(1, 2, 1, 4)

    out = attention(q, k, v)

    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(float), 1 / (1 + math.exp(-1)), rtol=1e-2)


@pytest.mark.parametrize(("has_own", "times"), [(False, 9), (True, 1)])
def test_seta_s_softmax_is_in_float32_too(has_own, times):
    # One pixel of two frames. By borders alone frame 0 sees frame 1 as 8 neighbours and as itself.
    def story(*frames):
        return jnp.array(frames, jnp.bfloat16).reshape(1, 2, 1, 1, 1, 4)

    q = story([2, 2, 0, 0], [2, 2, 0, 0])
    k, v = story([256, 0, 0, 0], [256, 1, 0, 0]), story([0] * 4, [1] * 4)

    out = seta_attention(q, -k, v, (k, v)) if has_own else seta_attention(q, k, v)

    expected = times * math.e / (1 + times * math.e)
    np.testing.assert_allclose(out[0, 0].astype(float), expected, rtol=1e-2)


def test_the_gate_is_the_exact_gelu():
    network = Network(lambda: GEGLU(1, 1))
    layer = network.bind({"proj.kernel": jnp.ones((1, 2)), "proj.bias": jnp.zeros(2)})

    np.testing.assert_allclose(layer(jnp.ones((1, 1))).item(), 0.841345, atol=1e-6)
