"""Attention over frames, rotary positions and the feed-forward network."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.models.attention import GEGLU, RotaryEmbedding, attention, rotate
from contextualstory_jax.models.embeddings import frame_position_table
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.temporal import TemporalAttention
from tests.helpers.gathered_attention import gathered_attention

FRAMES = 5


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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


def test_the_gate_is_the_exact_gelu():
    network = Network(lambda: GEGLU(1, 1))
    layer = network.bind({"proj.kernel": jnp.ones((1, 2)), "proj.bias": jnp.zeros(2)})

    np.testing.assert_allclose(layer(jnp.ones((1, 1))).item(), 0.841345, atol=1e-6)
