"""InceptionV3 against pytorch-fid's and torchvision's, with weights that follow from names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.conversion import torch_names
from contextualstory_jax.models.inception import FID_CLASSES, InceptionV3
from contextualstory_jax.models.network import Network
from contextualstory_jax.testing.parity_weights import torch_weight
from tests.helpers.metric_packages import package, within

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
torchvision = package("torchvision")
fid_inception = package("pytorch_fid.inception")

TOLERANCE = 1e-4  # relative, of the largest value
SIDE = 139  # pixels: the network is convolutional, and full size takes five times as long


def filled(module):
    """A PyTorch module with weights from names, in evaluation."""
    state = {
        key: tensor if key.endswith("num_batches_tracked") else weight(key, tensor)
        for key, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval()


def weight(key, tensor):
    return torch.from_numpy(torch_weight(key, tuple(tensor.shape), 0))


def bound(network, module):
    tensors = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
    return network.bind(torch_names.convert(tensors, network.shapes))


def fid_module(monkeypatch):
    """pytorch-fid's InceptionV3, and the torchvision one that it is made of, weights filled."""
    made = torchvision.models.inception_v3(
        num_classes=FID_CLASSES, aux_logits=False, weights=None, init_weights=False
    )
    state = {key: tensor for key, tensor in filled(made).state_dict().items()}
    monkeypatch.setattr(fid_inception, "load_state_dict_from_url", lambda *_, **__: state)
    return fid_inception.InceptionV3(resize_input=False, normalize_input=False).eval(), made


def images(count):
    """Smooth images from -1 to 1, unlike each other."""
    coarse = np.random.default_rng(0).uniform(-1, 1, (count, 3, 8, 8)).astype(np.float32)
    return torch.nn.functional.interpolate(torch.from_numpy(coarse), (SIDE, SIDE), mode="bilinear")


def nhwc(x):
    return x.numpy().transpose(0, 2, 3, 1)


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


def test_fid_features_are_those_of_pytorch_fid(monkeypatch):
    reference, made = fid_module(monkeypatch)
    module = bound(Network(lambda: InceptionV3(FID_CLASSES, fid=True)), made)
    x = images(2)

    features = jax.jit(module.features)(nhwc(x))

    with torch.no_grad():
        expected = reference(x)[0][:, :, 0, 0].numpy()
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()
    within("features, pytorch-fid", relative_error(features, expected), TOLERANCE)


def test_logits_are_those_of_torchvision():
    reference = filled(
        torchvision.models.inception_v3(num_classes=9, weights=None, init_weights=False)
    )
    module = bound(Network(lambda: InceptionV3(9, aux=True)), reference)
    x = images(2)

    logits = jax.jit(module.__call__)(nhwc(x))

    with torch.no_grad():
        expected = reference(x).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()
    within("logits, torchvision", relative_error(logits, expected), TOLERANCE)


def test_auxiliary_logits_are_those_of_torchvision():
    reference = filled(
        torchvision.models.inception_v3(num_classes=9, weights=None, init_weights=False)
    ).AuxLogits
    network = Network(lambda: InceptionV3(9, aux=True))
    x = torch.randn((2, 768, 17, 17), generator=torch.manual_seed(0))
    shapes = {
        name.removeprefix("AuxLogits."): shape
        for name, shape in network.shapes.items()
        if name.startswith("AuxLogits.")
    }
    tensors = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    params = network.init(0) | {
        f"AuxLogits.{name}": value for name, value in torch_names.convert(tensors, shapes).items()
    }

    logits = network.bind(params).AuxLogits(jnp.asarray(nhwc(x)))

    with torch.no_grad():
        expected = reference(x).numpy()
    within("auxiliary logits, torchvision", relative_error(logits, expected), TOLERANCE)
