"""Weights from PyTorch files: read by name, and nothing in them is run."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from contextualstory_jax.evaluation.weights import Weights, WeightsFile
from contextualstory_jax.testing.published_folders import write_hostile
from contextualstory_jax.utils.errors import UserError
from tests.helpers.tiny_inception import FEATURES, tiny_network

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("zipped", [True, False], ids=["new format", "old format"])
def test_a_published_file_is_read_by_name(tmp_path, zipped):
    weight = np.random.default_rng(0).standard_normal((FEATURES, 12))
    state = {"fc.bias": torch.zeros(FEATURES), "fc.weight": torch.from_numpy(weight)}
    state["bn.num_batches_tracked"] = torch.tensor(3)
    path = tmp_path / "file"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = WeightsFile(f"tiny-{digest[:8]}.pth", "own", "https://example.org")
    path.rename(tmp_path / file.name)
    weights = Weights(tmp_path)

    params = weights.load(file, tiny_network())

    assert params["fc.kernel"].dtype == np.float32
    np.testing.assert_allclose(params["fc.kernel"], weight.T, rtol=1e-6)
    assert weights.sha256 == {file.name: digest} and weights.unverified == []


def test_a_file_that_would_run_code_is_refused(tmp_path):
    write_hostile(tmp_path / "own.pth", tmp_path / "marker")

    with pytest.raises(UserError, match="own.pth is refused"):
        Weights(tmp_path).load(WeightsFile("x-01234567.pth", "own", ""), tiny_network())

    assert not (tmp_path / "marker").exists()


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3, 3, 1, 1)}, tmp_path / "own.pth")

    with pytest.raises(UserError, match="own.pth holds weights of another network"):
        Weights(tmp_path).load(WeightsFile("x-01234567.pth", "own", ""), tiny_network())
