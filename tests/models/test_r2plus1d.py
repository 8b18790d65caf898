from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.models.network import Network
from contextualstory_jax.models.r2plus1d import BasicBlock, R2Plus1D
from contextualstory_jax.testing import parity_weights
from tests.helpers.metric_packages import package, within


def test_names_and_shapes_are_the_published_file_s():
    shapes = Network(R2Plus1D).shapes

    trained = {name: s for name, s in shapes.items() if "running" not in name}
    assert sum(s.size for s in trained.values()) == 31_505_325  # as torchvision states
    assert shapes["stem.0.kernel"].shape == (1, 7, 7, 3, 45)
    assert shapes["stem.3.kernel"].shape == (3, 1, 1, 45, 64)
    assert shapes["layer2.0.downsample.0.kernel"].shape == (1, 1, 1, 64, 128)
    assert shapes["layer4.1.conv2.0.3.kernel"].shape == (3, 1, 1, 1152, 512)
    assert shapes["layer4.1.conv2.1.running_var"].shape == (512,)
    assert shapes["fc.kernel"].shape == (512, 400)


def test_a_block_sees_the_frame_before_and_after_and_halves_all_but_channels():
    network = Network(lambda: BasicBlock(2, 3, 2))
    params = parity_weights.params(network, 0)
    block = jax.jit(lambda clip: network.bind(params)(clip))
    clip = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 6, 4, 2)), jnp.float32)

    out = block(clip)
    changed = block(clip.at[:, 8].add(1.0))

    assert out.shape == (1, 5, 3, 2, 3)
    differs = np.abs(out - changed).max(axis=(0, 2, 3, 4)) > 1e-6
    # The strided convolution reads frame 8 at 4 alone, the second one at 3 and 4.
    np.testing.assert_array_equal(differs, [False, False, False, True, True])


@pytest.mark.torch
def test_features_are_torchvision_s():
    torch = package("torch")
    theirs = package("torchvision").models.video.r2plus1d_18(weights=None).eval()
    network = Network(R2Plus1D)
    theirs.load_state_dict(
        {
            key: tensor
            if key.endswith("num_batches_tracked")
            else torch.from_numpy(parity_weights.torch_weight(key, tuple(tensor.shape), 0))
            for key, tensor in theirs.state_dict().items()
        }
    )
    theirs.fc = torch.nn.Identity()
    params = parity_weights.params(network, 0)
    clip = np.random.default_rng(0).normal(size=(2, 5, 64, 64, 3)).astype(np.float32)

    ours = jax.jit(lambda x: network.bind(params)(x))(clip)

    with torch.no_grad():
        expected = theirs(torch.from_numpy(clip.transpose(0, 4, 1, 2, 3).copy())).numpy()
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    within("R(2+1)D-18: features", float(error), 1e-5)
