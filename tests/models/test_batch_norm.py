from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.models.layers import BatchNorm, start_training
from contextualstory_jax.models.network import Network
from contextualstory_jax.testing import parity_weights
from tests.helpers.metric_packages import package

NETWORK = Network(lambda: BatchNorm(2, epsilon=0.0))
PARAMS = {
    "scale": jnp.array([2.0, 1.0]),
    "bias": jnp.array([1.0, 0.0]),
    "running_mean": jnp.array([3.0, 0.0]),
    "running_var": jnp.array([4.0, 1.0]),
}


def test_in_evaluation_running_statistics_normalise():
    y = NETWORK.bind(PARAMS)(jnp.array([[3.0, 5.0], [5.0, 7.0]]))

    np.testing.assert_allclose(y, [[1, 5], [3, 7]])


def test_in_training_the_batch_normalises_and_moves_the_statistics_by_a_tenth():
    module = NETWORK.bind(PARAMS)
    start_training(module)

    y = module(jnp.array([[3.0, 5.0], [5.0, 7.0]]))

    np.testing.assert_allclose(y, [[-1, -1], [3, 1]])  # (x - mean) / 1 * scale + bias
    after = NETWORK.values(module)
    np.testing.assert_allclose(after["running_mean"], [3.1, 0.6])
    np.testing.assert_allclose(after["running_var"], [3.8, 1.1])  # unbiased: 2
    np.testing.assert_array_equal(after["scale"], PARAMS["scale"])


@pytest.mark.torch
def test_a_training_step_is_torch_s():
    torch = package("torch")
    network = Network(lambda: BatchNorm(5, epsilon=1e-3))
    params = parity_weights.params(network, 0)
    theirs = torch.nn.BatchNorm2d(5, eps=1e-3)
    names = {"scale": "weight"}
    state = {names.get(n, n): torch.from_numpy(np.array(x)) for n, x in params.items()}
    theirs.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)

    def cubes(params):
        module = network.bind(params)
        start_training(module)
        return jnp.sum(module(jnp.asarray(x)) ** 3), network.values(module)

    (value, after), gradient = jax.jit(jax.value_and_grad(cubes, has_aux=True))(params)

    expected = (theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())) ** 3).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient["scale"], theirs.weight.grad.numpy(), rtol=1e-5)
    np.testing.assert_allclose(gradient["bias"], theirs.bias.grad.numpy(), rtol=1e-5)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(after[name], getattr(theirs, name).numpy(), rtol=1e-5)
