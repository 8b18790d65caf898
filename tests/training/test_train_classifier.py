from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from contextualstory_jax.commands import train_classifier as command
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.models.layers import BatchNorm, conv, linear
from contextualstory_jax.testing.published_folders import write_pororo
from contextualstory_jax.training import train_classifier as module
from contextualstory_jax.training.train_classifier import (
    Frames,
    classifier_loss,
    initial_params,
    train_classifier,
)
from contextualstory_jax.utils.errors import UserError


class Auxiliary(nnx.Module):
    def __init__(self, classes: int):
        self.fc = linear(4, classes)

    def __call__(self, x):
        return self.fc(x.mean(axis=(1, 2)))


class Small(nnx.Module):
    """A convolution, a batch norm and both heads, under InceptionV3's names."""

    def __init__(self, classes: int, *, aux: bool):
        assert aux
        self.conv = conv(3, 4, (23, 23), padding=((0, 0), (0, 0)), stride=23, bias=False)
        self.bn = BatchNorm(4, epsilon=1e-3)
        self.AuxLogits = Auxiliary(classes)
        self.fc = linear(4, classes)

    def middle(self, x):
        return self.bn(self.conv(x))

    def top(self, x):
        return jax.nn.relu(x).mean(axis=(1, 2))

    def __call__(self, x):
        return self.fc(self.top(self.middle(x)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "InceptionV3", Small)


@pytest.fixture
def data(tmp_path):
    return DataConfig(name="pororo", root=str(write_pororo(tmp_path / "pororo")))


def weights(workdir):
    return load_file(workdir / "characters_pororo.safetensors")


def test_a_run_ends_with_torchvision_s_names_and_resumes_to_the_same_weights(tmp_path, data):
    how = {"batch_size": 2, "learning_rate": 1e-3}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"

    train_classifier(data, straight, epochs=2, **how)
    train_classifier(data, resumed, epochs=1, **how)
    first = weights(resumed)
    train_classifier(data, resumed, epochs=2, **how)

    ours = weights(straight)
    assert {key: x.shape for key, x in ours.items()} == {
        "conv.weight": (4, 3, 23, 23),
        **{f"bn.{key}": (4,) for key in ("weight", "bias", "running_mean", "running_var")},
        "AuxLogits.fc.weight": (9, 4),
        "AuxLogits.fc.bias": (9,),
        "fc.weight": (9, 4),
        "fc.bias": (9,),
    }
    again = weights(resumed)
    for key, x in ours.items():
        np.testing.assert_array_equal(x, again[key], err_msg=key)
        assert not np.array_equal(x, first[key]), key
    records = [json.loads(line) for line in (straight / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [4, 8]  # of 8 training stories
    assert 0 <= records[-1]["validation_frame_accuracy"] <= 1
    assert records[-1]["validation_loss"] > 0


def test_the_loss_counts_the_auxiliary_classifier_and_moves_running_statistics(monkeypatch):
    monkeypatch.setattr(module, "DROPOUT", 0.0)
    network = module.Classifier(("mia", "otto")).network
    params = {name: jnp.asarray(x) for name, x in network.init(0).items()}
    running = {name: x for name, x in params.items() if "running" in name}
    trained = {name: x for name, x in params.items() if name not in running}
    # Symmetric, so that flips change nothing.
    half = np.random.default_rng(0).integers(0, 256, (3, 299, 150, 3), np.uint8)
    images = np.concatenate([half, half[:, :, -2::-1]], axis=2)
    labels = np.float32([[1, 0], [0, 0], [1, 1]])

    value, after = classifier_loss(
        network,
        {"classifier": trained},
        {"classifier": running},
        Frames(jnp.asarray(images), jnp.asarray(labels)),
        jax.random.key(0),
    )

    kernel = np.float64(trained["conv.kernel"]).reshape(-1, 4)
    x = images[:, :299, :299].astype(np.float64) / 127.5 - 1
    patches = x.reshape(3, 13, 23, 13, 23, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3 * 169, -1)
    hidden = patches @ kernel
    normed = ((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-3)).reshape(3, 169, 4)

    def cross_entropy(features, head):
        kernel, bias = (np.float64(params[f"{head}.{name}"]) for name in ("kernel", "bias"))
        logits = features @ kernel + bias
        return np.mean(np.logaddexp(0, logits) - labels * logits)

    expected = cross_entropy(normed.clip(min=0).mean(1), "fc")
    expected += 0.4 * cross_entropy(normed.mean(1), "AuxLogits.fc")
    assert float(value) == pytest.approx(expected, rel=1e-4)
    variance = 0.9 + 0.1 * hidden.var(0, ddof=1)
    np.testing.assert_allclose(after["classifier"]["bn.running_var"], variance, rtol=1e-4)


def test_imagenet_s_weights_are_taken_but_for_the_last_layers(tmp_path):
    imagenet, ours = module.Network(lambda: Small(5, aux=True)), module.Classifier(("mia",)).network
    tensors = {
        module.torch_names.torch_key(name, x.ndim): module.torch_names.to_torch(name, x)
        for name, x in imagenet.init(3).items()
    }
    tensors["bn.num_batches_tracked"] = np.array(7)
    save_file(tensors, tmp_path / "imagenet.safetensors")

    params = initial_params(ours, str(tmp_path / "imagenet.safetensors"), seed=1)

    fresh, theirs = ours.init(1), imagenet.init(3)
    np.testing.assert_array_equal(params["conv.kernel"], theirs["conv.kernel"])
    np.testing.assert_array_equal(params["fc.kernel"], fresh["fc.kernel"])
    np.testing.assert_array_equal(params["AuxLogits.fc.bias"], fresh["AuxLogits.fc.bias"])
    del tensors["conv.weight"]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"conv\.weight: missing"):
        initial_params(ours, str(tmp_path / "other.safetensors"), seed=1)


def test_what_cannot_be_trained_on_is_refused_and_nothing_is_written(tmp_path, data):
    (tmp_path / "pororo" / "labels.npy").unlink()
    with pytest.raises(UserError, match="has no labels"):
        train_classifier(data, tmp_path / "work")
    with pytest.raises(UserError, match="not of 'shapes'"):
        train_classifier(DataConfig(), tmp_path / "work")
    arguments = ["--config", "pororo_visualization", "--workdir", str(tmp_path / "work")]
    with pytest.raises(UserError, match="only its data are used"):
        command.main([*arguments, "--config.steps=3"])
    with pytest.raises(UserError, match="--epochs must be at least 1"):
        command.main([*arguments, "--epochs", "0"])
    damaged = tmp_path / command.IMAGENET
    damaged.write_bytes(b"cut off")
    with pytest.raises(UserError, match="is damaged or another file: its SHA-256 begins with"):
        command.main([*arguments, "--init-from", str(damaged)])
    assert not (tmp_path / "work").exists()
