"""Weights are found, checked by the hash in their name, and recorded; nothing is downloaded."""

from __future__ import annotations

import hashlib
import logging

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save

from contextualstory_jax.evaluation.weights import Weights, WeightsFile
from contextualstory_jax.utils.errors import UserError
from tests.helpers.tiny_inception import FEATURES, tiny_network

CONTENT = save(
    {"fc.weight": np.ones((FEATURES, 12), np.float32), "fc.bias": np.zeros(FEATURES, np.float32)}
)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def file(url="https://example.org/tiny.pth", hash=SHA256[:8]):
    return WeightsFile(f"tiny-{hash}.safetensors", "own", url)


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_a_published_file_is_verified(tmp_path):
    (tmp_path / file().name).write_bytes(CONTENT)
    weights = Weights(tmp_path)

    params = weights.load(file(), tiny_network())

    assert np.array_equal(params["fc.kernel"], np.ones((12, FEATURES)))
    assert weights.sha256 == {file().name: SHA256} and weights.unverified == []
    assert weights.digest(file()) == SHA256


def test_a_published_name_with_other_contents_is_refused(tmp_path):
    wrong = file(hash="01234567")
    (tmp_path / wrong.name).write_bytes(CONTENT)

    with pytest.raises(UserError, match=f"SHA-256 begins with {SHA256[:8]}, not 01234567"):
        Weights(tmp_path).load(wrong, tiny_network())


def test_a_file_of_ones_own_is_unverified(tmp_path, caplog):
    (tmp_path / "own.safetensors").write_bytes(CONTENT)
    weights = Weights(tmp_path)
    other = file(hash="01234567")

    with caplog.at_level(logging.WARNING):
        weights.load(other, tiny_network())
        weights.load(other, tiny_network())

    assert weights.unverified == ["own.safetensors"]
    assert [r.getMessage() for r in caplog.records] == [
        "own.safetensors has an unknown checksum: recorded as unverified"
    ]


def test_a_renamed_published_file_is_verified(tmp_path):
    (tmp_path / "own.safetensors").write_bytes(CONTENT)
    weights = Weights(tmp_path)

    weights.load(file(), tiny_network())

    assert weights.unverified == []


def test_weights_of_another_network_are_refused_in_one_line(tmp_path):
    other = save({"fc.weight": np.ones((5, 12), np.float32), "x": np.ones(1, np.float32)})
    (tmp_path / "own.safetensors").write_bytes(other)

    with pytest.raises(UserError, match="holds weights of another network") as error:
        Weights(tmp_path).load(file(), tiny_network())

    assert "fc.bias: missing" in str(error.value) and "and 1 more" in str(error.value)


def test_without_network_one_line_says_which_file_to_put_where(tmp_path):
    path = tmp_path / file().name

    with pytest.raises(UserError) as error:
        Weights(tmp_path).path(file())

    assert str(path) in str(error.value) and file().url in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_download_is_checked(tmp_path, online):
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    right, wrong = file(source.as_uri()), file(source.as_uri(), hash="01234567")

    assert Weights(tmp_path / "there").path(right).read_bytes() == CONTENT
    with pytest.raises(UserError, match=f"wrong checksum .{SHA256[:8]}, not 01234567"):
        Weights(tmp_path / "there").path(wrong)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [right.name]


def test_a_download_that_fails_leaves_nothing(tmp_path, online):
    absent = file((tmp_path / "absent").as_uri())

    with pytest.raises(UserError, match="cannot be fetched"):
        Weights(tmp_path / "there").path(absent)

    assert not list((tmp_path / "there").iterdir())
