"""Modules as pure functions of flat dicts, and the values that parameters start with."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from contextualstory_jax.models.attention import FeedForward
from contextualstory_jax.models.layers import conv3x3, embed, linear
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.temporal import TemporalConv


class Pair(nnx.Module):
    """Two layers, or one of them."""

    def __init__(self, with_first: bool = True):
        self.first = linear(3, 4) if with_first else None
        self.second = linear(4, 5)

    def __call__(self, x):
        return self.second(self.first(x))


def test_parameters_are_named_by_their_path_and_none_is_drawn():
    shapes = Network(lambda: FeedForward(1 << 20)).shapes  # 48 TiB, if it were drawn

    assert {name: s.shape for name, s in shapes.items()} == {
        "net.0.proj.bias": (1 << 23,),
        "net.0.proj.kernel": (1 << 20, 1 << 23),
        "net.2.bias": (1 << 20,),
        "net.2.kernel": (1 << 22, 1 << 20),
    }
    assert {s.dtype for s in shapes.values()} == {np.dtype(np.float32)}


def test_initial_parameters_follow_from_the_seed():
    network = Network(Pair)
    first, again, other = network.init(0), network.init(0), network.init(1)

    for name in network.shapes:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_initial_parameters_do_not_depend_on_what_else_the_model_has():
    whole, half = Network(Pair).init(0), Network(lambda: Pair(with_first=False)).init(0)

    assert half.keys() == {"second.kernel", "second.bias"}
    for name in half:
        np.testing.assert_array_equal(half[name], whole[name])


def test_parameters_of_one_shape_differ_by_their_names():
    network = Network(lambda: nnx.List([linear(4, 4), linear(4, 4)]))
    params = network.init(0)

    assert not np.array_equal(params["0.kernel"], params["1.kernel"])


@pytest.mark.parametrize(
    ("make", "fan_in"),
    [
        (lambda: linear(64, 100), 64),
        (lambda: conv3x3(16, 100), 9 * 16),
        (lambda: TemporalConv(96), 3 * 96),
    ],
)
def test_layers_start_uniform_as_in_pytorch(make, fan_in):
    params = Network(make).init(0)
    bound = fan_in**-0.5

    for values in (params["kernel"], params["bias"]):
        assert values.dtype == np.float32
        assert 0.9 * bound < np.abs(values).max() <= bound * 1.0001
        assert abs(values.mean()) < 0.25 * bound


def test_a_zero_layer_starts_at_the_zero_map():
    params = Network(lambda: linear(3, 4, zero=True)).init(0)

    assert not params["kernel"].any()
    assert not params["bias"].any()


def test_tables_start_normal():
    table = Network(lambda: embed(100, 100, 0.1)).init(0)["embedding"]

    assert abs(table.std() - 0.1) < 0.005
    assert abs(table.mean()) < 0.005


def test_a_bound_module_computes_with_the_parameters_given():
    params = {
        "first.kernel": np.eye(3, 4, dtype=np.float32),
        "first.bias": np.zeros(4, np.float32),
        "second.kernel": 2 * np.eye(4, 5, dtype=np.float32),
        "second.bias": np.ones(5, np.float32),
    }

    out = Network(Pair).bind(params)(jnp.array([1.0, 2, 3]))

    np.testing.assert_array_equal(out, [3, 5, 7, 1, 1])


def test_a_module_bound_in_bfloat16_computes_in_bfloat16():
    network = Network(Pair)
    params = network.init(0)

    out = network.bind(params, jnp.bfloat16)(jnp.ones(3, jnp.bfloat16))

    assert out.dtype == jnp.bfloat16
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    exact = network.bind(params)(jnp.ones(3))
    np.testing.assert_allclose(out.astype(float), exact, atol=0.02)
    assert np.abs(out.astype(float) - exact).max() > 0  # it is not float32 called bfloat16


def test_a_missing_parameter_cannot_be_bound():
    with pytest.raises(KeyError, match="second.bias"):
        network = Network(Pair)
        network.bind({name: p for name, p in network.init(0).items() if name != "second.bias"})
