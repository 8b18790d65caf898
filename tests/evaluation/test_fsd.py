from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.measurement import Options
from contextualstory_jax.evaluation.metrics import fsd
from contextualstory_jax.evaluation.metrics.fsd import read_clip, scale_clip
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.report import measure, prepare
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.models.layers import linear
from contextualstory_jax.models.network import Network
from contextualstory_jax.utils.errors import UserError
from tests.helpers.metric_packages import package, within
from tests.helpers.noisy_results import write_noisy_results


def test_a_raw_clip_is_of_64_pixels_from_minus_one_to_one(tmp_path):
    story = prepared(tmp_path, "cpcsv").generated.stories()[0]

    clip = read_clip(tuple(frame.item for frame in story))

    assert (clip.shape, clip.dtype) == ((5, 64, 64, 3), np.uint8)
    levels = jnp.uint8([0, 51, 255]).reshape(1, 1, 1, 1, 3)
    np.testing.assert_allclose(scale_clip(levels, False).ravel(), [-1, -0.6, 1], rtol=1e-6)


def test_a_resized_clip_is_of_112_pixels_and_interpolates():
    ramp = np.arange(64, dtype=np.uint8)[:, None, None]
    clip = np.broadcast_to(ramp, (1, 1, 64, 64, 3))

    resized = scale_clip(jnp.asarray(clip), True)

    assert resized.shape == (1, 1, 112, 112, 3)
    places = (np.arange(112) + 0.5) * 64 / 112 - 0.5
    expected = places.clip(0, 63) / 127.5 - 1
    np.testing.assert_allclose(
        resized[0, 0, 0, :, 0] * 0 + resized[0, 0, :, 0, 0], expected, atol=1e-5
    )


def prepared(folder, protocol, count=3):
    results = folder / f"results{count}"
    if not results.exists():
        write_noisy_results(results, count)
    weights, features = Weights(folder), Features(4, folder / "features")
    return prepare(results, results, PROTOCOLS[protocol], weights, features, Options())


def test_one_story_and_plain_folders_are_refused(tmp_path):
    (tmp_path / "r2plus1d_18.safetensors").touch()
    one = prepared(tmp_path, "cpcsv", 1)
    with pytest.raises(UserError, match="holds one story"):
        fsd.clips(one.generated)
    plain = one._replace(generated=one.generated._replace(settings={}))
    with pytest.raises(UserError, match="--metrics fsd needs stories"):
        measure(["fsd"], plain)


@pytest.mark.torch
def test_resizing_is_torch_s():
    torch = package("torch")
    clip = np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), dtype=np.uint8)

    ours = scale_clip(jnp.asarray(clip), True)

    frames = torch.from_numpy(clip).flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1
    theirs = torch.nn.functional.interpolate(
        frames, (112, 112), mode="bilinear", align_corners=False
    )
    expected = theirs.permute(0, 2, 3, 1).unflatten(0, (2, 5)).numpy()
    within("resize of cpcsv-resized", float(np.abs(ours - expected).max()), 2e-6)


class Fields(nnx.Module):
    """In the place of R(2+1)D: features of the mean colours of each frame's quarters."""

    def __init__(self):
        self.fc = linear(60, 8)

    def __call__(self, clip):
        b, f, h, w, _ = clip.shape
        quarters = clip.reshape(b, f, 2, h // 2, 2, w // 2, 3).mean(axis=(3, 5))
        return self.fc(quarters.reshape(b, 60))


@pytest.fixture
def small_network(tmp_path, monkeypatch):
    monkeypatch.setattr(fsd, "r2plus1d_network", lambda: Network(Fields))
    weight = np.random.default_rng(0).standard_normal((8, 60)).astype(np.float32)
    tensors = {"fc.weight": weight, "fc.bias": np.zeros(8, np.float32)}
    save_file(tensors, tmp_path / "r2plus1d_18.safetensors")
    return weight


def expected_features(folder, weight):
    """As `Fields` computes them of a `cpcsv` clip, in float64."""
    clips = np.stack([read_clip(items) for items in fsd.clips(folder)]) / 127.5 - 1
    quarters = clips.reshape(len(clips), 5, 2, 32, 2, 32, 3).mean(axis=(3, 5))
    return quarters.reshape(len(clips), 60) @ weight.T


def test_equal_folders_have_distance_0_and_others_an_interval(tmp_path, small_network):
    asked = prepared(tmp_path, "cpcsv", 40)
    same = asked._replace(generated=asked.reference_images)

    found = measure(["fsd"], asked)["fsd"]

    assert found["low"] < found["value"] < found["high"]
    assert measure(["fsd"], same)["fsd"]["value"] == pytest.approx(0, abs=1e-6 * found["value"])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_the_distance_is_pytorch_fid_s(tmp_path, small_network):
    distance = package("pytorch_fid.fid_score").calculate_frechet_distance
    asked = prepared(tmp_path, "cpcsv", 40)

    found = measure(["fsd"], asked)["fsd"]["value"]

    folders = (asked.generated, asked.reference_images)
    features = [expected_features(folder, small_network) for folder in folders]
    statistics = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in features]
    expected = distance(*statistics[0], *statistics[1])
    within("FSD", abs(found - expected) / expected, 1e-4)
