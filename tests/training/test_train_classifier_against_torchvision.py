"""The classifier's loss, gradient and running statistics against torchvision's in float64.

Of small batches the gradient through 94 batch norms is ill-conditioned: PyTorch's own, in float32,
is further from that in float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.conversion import torch_names
from contextualstory_jax.testing.parity_weights import torch_weight
from contextualstory_jax.training import train_classifier as module
from tests.helpers.metric_packages import package, within

pytestmark = [pytest.mark.torch, pytest.mark.heavy]
NAMES = tuple("abcdefghi")


def relative_error(ours, theirs):
    ours, theirs = (np.concatenate([x[key].ravel() for key in theirs]) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def symmetric_images(rng):
    """Of which a flip changes nothing."""
    half = np.kron(rng.integers(0, 256, (3, 30, 15, 3)), np.ones((1, 10, 10, 1)))[:, :299]
    return np.concatenate([half, half[:, :, -2::-1]], axis=2).astype(np.uint8)


def theirs(torch, torchvision, state, images, labels):
    """Loss, gradient and running statistics, in the dtype of the state."""
    network = torchvision.models.inception_v3(
        num_classes=len(NAMES), weights=None, init_weights=False, dropout=0.0
    )
    dtype = state["fc.bias"].dtype
    network.to(dtype).load_state_dict(state, strict=False)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(dtype) / 127.5 - 1
    logits, auxiliary = network.train()(x)
    y, entropy = torch.from_numpy(labels).to(dtype), torch.nn.BCEWithLogitsLoss()
    loss = entropy(logits, y) + 0.4 * entropy(auxiliary, y)
    loss.backward()
    gradient = {name: p.grad.numpy() for name, p in network.named_parameters()}
    running = {name: x.numpy() for name, x in network.state_dict().items() if "running" in name}
    return {"loss": loss.detach().numpy()}, gradient, running


def test_a_training_step_is_torchvision_s(monkeypatch):
    torch, torchvision = package("torch"), package("torchvision")
    monkeypatch.setattr(module, "DROPOUT", 0.0)
    rng = np.random.default_rng(0)
    images, labels = symmetric_images(rng), (rng.random((3, 9)) < 0.3).astype(np.float32)
    network = module.Classifier(NAMES).network
    state, params = {}, {}
    for name, shape in network.shapes.items():
        key = torch_names.torch_key(name, len(shape.shape))
        state[key] = torch_weight(key, torch_names.torch_shape(name, shape.shape), 0)
        params[name] = jnp.asarray(torch_names.from_torch(name, state[key], len(shape.shape)))
    running = {"classifier": {name: x for name, x in params.items() if "running" in name}}
    trained = {"classifier": {name: x for name, x in params.items() if "running" not in name}}

    def loss(trained):
        batch = module.Frames(jnp.asarray(images), jnp.asarray(labels))
        return module.classifier_loss(network, trained, running, batch, jax.random.key(0))

    (value, after), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)

    ours = (
        {"loss": np.asarray(value)},
        *(
            {
                torch_names.torch_key(name, x.ndim): torch_names.to_torch(name, np.asarray(x))
                for name, x in tree["classifier"].items()
            }
            for tree in (gradient, after)
        ),
    )
    single = {key: torch.from_numpy(x) for key, x in state.items()}
    double = {key: x.double() for key, x in single.items()}
    reference = theirs(torch, torchvision, double, images, labels)
    rounded = theirs(torch, torchvision, single, images, labels)
    bounds = {"loss": 1e-4, "gradient": 0.1, "running statistics": 1e-3}
    for (what, bound), x, y, z in zip(bounds.items(), ours, rounded, reference, strict=True):
        print(f"{what}, PyTorch in float32: {relative_error(y, z):.2g}")
        within(f"{what} of a training step", relative_error(x, z), bound)
