"""Features are computed once, in order, and resume; a file that changed is computed again."""

from __future__ import annotations

import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from contextualstory_jax.evaluation import features as module
from contextualstory_jax.evaluation.features import Extractor, Features
from contextualstory_jax.models.layers import ones, parameter
from contextualstory_jax.models.network import Network
from contextualstory_jax.utils.errors import UserError


class Twice(nnx.Module):
    def __init__(self):
        self.scale = parameter((1,), ones)

    def __call__(self, x):
        return 2 * x * self.scale[...]


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(module, "GROUP", 4)


def extractor(read, sha256="a"):
    network = Network(Twice)
    return Extractor(
        "twice", network, network.init(0), sha256, read, lambda bound, batch: bound(batch)
    )


def counting(values):
    """A reader of numbers, and the list of those that it was asked for."""
    asked = []

    def read(item):
        asked.append(item)
        return np.array([item, values.get(item, 0)], np.float32)

    return read, asked


def test_features_come_in_the_order_of_items(tmp_path, small_groups):
    read, _ = counting({})

    found = Features(batch_size=3, folder=tmp_path)(extractor(read), range(10))

    assert found.dtype == np.float32
    assert np.array_equal(found[:, 0], 2 * np.arange(10))


def test_what_is_there_is_not_computed_again(tmp_path, small_groups):
    read, asked = counting({})
    features = Features(folder=tmp_path)
    first = features(extractor(read), range(10))
    asked.clear()

    again = features(extractor(read), range(10))
    longer = features(extractor(read), range(12))

    assert np.array_equal(first, again)
    assert sorted(asked) == [8, 9, 10, 11]  # a new last group
    assert len(longer) == 12
    features(extractor(read, sha256="b"), range(4))
    assert sorted(asked)[:4] == [0, 1, 2, 3]


def test_an_interrupted_run_resumes(tmp_path, small_groups):
    def broken(item):
        if item == 9:
            raise UserError("9 cannot be read")
        return np.array([item], np.float32)

    with pytest.raises(UserError, match="9 cannot be read"):
        Features(folder=tmp_path)(extractor(broken), range(10))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    read, asked = counting({})

    Features(folder=tmp_path)(extractor(read), range(8))

    assert asked == []


def test_a_damaged_file_is_computed_again(tmp_path, small_groups):
    read, asked = counting({})
    features = Features(folder=tmp_path)
    expected = features(extractor(read), range(4))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    asked.clear()

    assert np.array_equal(features(extractor(read), range(4)), expected)
    assert asked == [0, 1, 2, 3]


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "item"
    path.write_text("1")

    def read(item):
        return np.array([float(item.read_text())], np.float32)

    features = Features(folder=tmp_path / "cache")
    assert features(extractor(read), [path]).item() == 2
    path.write_text("3")
    os.utime(path, ns=(1, 1))
    assert features(extractor(read), [path]).item() == 6


def test_items_of_one_batch_have_one_shape(tmp_path):
    def read(item):
        return np.zeros((item, 4, 3), np.float32)

    with pytest.raises(UserError, match=r"5 and 6 differ in size, \(5, 4\) and \(6, 4\)"):
        Features(folder=tmp_path)(extractor(read), [5, 5, 6])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*absent.png"):
        Features(folder=tmp_path)(extractor(lambda path: jnp.zeros(1)), [tmp_path / "absent.png"])


def test_a_batch_has_an_item_at_least(tmp_path):
    with pytest.raises(UserError, match="--batch-size must be at least 1; got 0"):
        Features(batch_size=0, folder=tmp_path)
