"""SETA against attention over the gathered tokens, as the paper gives it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.models.seta import seta_attention, seta_mask, with_halo
from tests.helpers.gathered_attention import gathered_attention

FRAMES = 5

# Heights and widths of tiles of 4x4 and 2x4, and of 3x4 and 2x4 after padding 5 and 7 to 8.
SIZES = [(4, 8), (2, 4), (3, 5), (6, 7)]


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
