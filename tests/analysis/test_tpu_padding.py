"""Matrix products in whole tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from contextualstory_jax.analysis.tpu_padding import padded_flops


def traced(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).trace(*arrays).jaxpr


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((8, 128), (128, 128), 2 * 8 * 128 * 128),  # full tiles
        ((5, 40), (40, 45), 2 * 8 * 128 * 128),  # a row of tiles, mostly empty
        ((300, 40), (40, 5), 2 * 8 * 384 * 128),  # the other side lies along the lanes
        ((7, 8, 128), (7, 128, 128), 7 * 2 * 8 * 128 * 128),  # one product after the other
    ],
)
def test_a_product_fills_its_tiles(a, b, expected):
    assert padded_flops(traced(jnp.matmul, a, b)) == expected


@pytest.mark.parametrize(
    ("features", "contracted"),
    [(320, 9 * 384), (4, 128)],  # each tap's fill tiles; few share one
)
def test_a_convolution_is_a_product_of_taps_and_features(features, contracted):
    def convolve(x, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)

    program = traced(convolve, (2, 4, 4, features), (3, 3, features, 128))

    assert padded_flops(program) == 2 * 32 * 128 * contracted


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, kernel):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, kernel), None), x, length=3)[0]

    assert padded_flops(traced(loop, (8, 128), (128, 128))) == 3 * 2 * 8 * 128 * 128
