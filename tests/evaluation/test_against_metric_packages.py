"""Features, FID and KID against pytorch-fid and torch-fidelity, and clean-fid's resize.

The weights follow from names. The small tests compare features of a few images, and the formulas on
features of fewer dimensions; `heavy` ones compare complete FIDs of two folders of 250 images.
"""

from __future__ import annotations

import contextlib
import io
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from contextualstory_jax.conversion import torch_names
from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.image_folders import read_folder
from contextualstory_jax.evaluation.inception_features import (
    fid_network,
    inception,
    resize_bilinear,
    resize_clean,
)
from contextualstory_jax.evaluation.measurement import Measurement, Options
from contextualstory_jax.evaluation.metrics.fid import fid
from contextualstory_jax.evaluation.metrics.kid import kid, subset_distances
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.statistics import frechet_distance, statistics
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.testing.parity_weights import torch_weight
from tests.helpers.metric_packages import package, within

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
package("torchvision")
fid_score, fid_inception = package("pytorch_fid.fid_score"), package("pytorch_fid.inception")
package("torch_fidelity")
extractor_module = package("torch_fidelity.feature_extractor_inceptionv3")
metric_fid, metric_kid = package("torch_fidelity.metric_fid"), package("torch_fidelity.metric_kid")
interpolate = package("torch_fidelity.interpolate_compat_tensorflow")
clean_resize = package("cleanfid.resize")

FEATURES_TOLERANCE = 1e-4  # of the largest value
TOLERANCE = 1e-3  # relative, of FID and KID


@pytest.fixture(scope="module")
def tensors():
    """Weights of FID's InceptionV3 by PyTorch's keys."""
    found = {}
    for name, declared in fid_network().shapes.items():
        key = torch_names.torch_key(name, len(declared.shape))
        found[key] = torch_weight(key, torch_names.torch_shape(name, declared.shape), 0)
    return found


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file(tensors, folder / "fid_inception.safetensors")
    return Weights(folder)


@pytest.fixture(scope="module")
def state(tensors):
    return {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}


def write_images(folder, count, seed, contrast):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        fields = (128 + contrast * rng.uniform(-128, 127, (8, 8, 3))).astype(np.uint8)
        Image.fromarray(fields).resize((64, 64), Image.Resampling.BICUBIC).save(
            folder / f"{number:03d}.png"
        )
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("few") / "images", 3, 0, 1.0)


def our_features(folder, protocol, weights, cache):
    items = [frame.item for frame in read_folder(folder, "generated").frames]
    return Features(batch_size=16, folder=cache)(inception(PROTOCOLS[protocol], weights), items)


def pytorch_fid_model(state, monkeypatch):
    monkeypatch.setattr(fid_inception, "load_state_dict_from_url", lambda *_, **__: state)
    return fid_inception.InceptionV3().eval()


def torch_fidelity_features(folder, state, tmp_path):
    torch.save(state, tmp_path / "state.pth")
    extractor = extractor_module.FeatureExtractorInceptionV3(
        "ours", ["2048"], feature_extractor_weights_path=str(tmp_path / "state.pth")
    )
    files = sorted(folder.glob("*.png"))
    found = []
    for start in range(0, len(files), 16):
        images = np.stack([np.asarray(Image.open(file)) for file in files[start : start + 16]])
        with torch.no_grad():
            (features,) = extractor(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        found.append(features)
    return torch.cat(found)


def require_close(what, actual, expected):
    scale = np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.005 * scale
    within(what, np.abs(actual - expected).max() / scale, FEATURES_TOLERANCE)


def relative(found, expected):
    return abs(found - expected) / abs(expected)


def test_features_are_those_of_pytorch_fid(few, state, weights, monkeypatch, tmp_path):
    model = pytorch_fid_model(state, monkeypatch)
    files = sorted(few.glob("*.png"))

    expected = fid_score.get_activations(files, model, batch_size=3, num_workers=0)

    found = our_features(few, "pytorch-fid", weights, tmp_path)
    require_close("features of 3 images, pytorch-fid", found, expected)


def test_features_are_those_of_torch_fidelity(few, state, weights, tmp_path):
    expected = torch_fidelity_features(few, state, tmp_path).numpy()

    found = our_features(few, "torch-fidelity", weights, tmp_path)
    require_close("features of 3 images, torch-fidelity", found, expected)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (40, 352)])
def test_the_resize_is_torch_fidelitys(size):
    x = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.float32)

    found = resize_bilinear(jnp.asarray(x), "tensorflow1")

    expected = interpolate.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(x.transpose(0, 3, 1, 2)), size=(299, 299), align_corners=False
    )
    error = np.abs(found - expected.numpy().transpose(0, 2, 3, 1)).max()
    within("TensorFlow 1's resize, torch-fidelity, of 255", error, 1e-4)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (40, 352)])
def test_the_resize_is_pytorchs(size):
    x = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.float32)

    found = resize_bilinear(jnp.asarray(x), "bilinear")

    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
    )
    error = np.abs(found - expected.numpy().transpose(0, 2, 3, 1)).max()
    within("PyTorch's resize, of 255", error, 1e-4)


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (400, 352), (299, 299)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow's, of how it makes an image
def test_the_clean_resize_is_clean_fids_bit_for_bit(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)

    expected = clean_resize.build_resizer("clean")(image)

    found = resize_clean(image)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)


def pairs(count, size):
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((2, size, size)).astype(np.float32)
    noise = rng.standard_normal((2, count, size)).astype(np.float32)
    return [noise[i] @ mixing[i] + np.float32(i) for i in range(2)]


@pytest.fixture
def sqrtm(monkeypatch):
    """SciPy 1.18 has no `disp`, which pytorch-fid gives."""
    ours = fid_score.linalg.sqrtm
    monkeypatch.setattr(
        fid_score.linalg,
        "sqrtm",
        lambda matrix, disp=True: ours(matrix) if disp else (ours(matrix), 0),
    )


def test_the_distance_is_that_of_both_packages(sqrtm):
    x, y = pairs(200, 32)
    a, b = statistics(x), statistics(y)

    found = frechet_distance(a, b)

    expected = fid_score.calculate_frechet_distance(*a, *b)
    within("distance in 32 dimensions, pytorch-fid", relative(found, expected), 1e-8)
    described = [{"mu": s.mu, "sigma": s.sigma} for s in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*described, verbose=False)
    expected = theirs["frechet_inception_distance"]
    within("distance in 32 dimensions, torch-fidelity", relative(found, expected), 1e-8)


def test_kid_is_torch_fidelitys():
    x, y = pairs(200, 32)

    values = subset_distances(x, y, subsets=20, size=50, seed=2020)

    theirs = metric_kid.kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        kid_subsets=20,
        kid_subset_size=50,
        rng_seed=2020,
        verbose=False,
    )
    expected = theirs["kernel_inception_distance_mean"]
    within("KID in 32 dimensions, torch-fidelity", relative(values.mean(), expected), 1e-5)
    expected = theirs["kernel_inception_distance_std"]
    within("its deviation", relative(values.std(), expected), 1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return write_images(root / "a", 250, 0, 1.0), write_images(root / "b", 250, 1, 0.7)


def measurement(folders, protocol, weights, cache):
    generated, reference = (read_folder(folder, "generated") for folder in folders)
    options = Options(kid_subset_size=100)
    features = Features(batch_size=25, folder=cache)
    return Measurement(generated, reference, PROTOCOLS[protocol], weights, features, options)


@pytest.mark.heavy
def test_fid_is_pytorch_fids(folders, state, weights, monkeypatch, sqrtm, tmp_path):
    found = fid(measurement(folders, "pytorch-fid", weights, tmp_path))["fid"]["value"]

    monkeypatch.setattr(fid_inception, "load_state_dict_from_url", lambda *_, **__: state)
    expected = fid_score.calculate_fid_given_paths(
        [str(folder) for folder in folders], 25, "cpu", 2048, num_workers=0
    )
    print(f"FID of 250 images: {found:.8g}")
    within("FID of 250 images, pytorch-fid", relative(found, expected), TOLERANCE)


@pytest.mark.heavy
def test_fid_and_kid_are_torch_fidelitys(folders, state, weights, tmp_path):
    given = measurement(folders, "torch-fidelity", weights, tmp_path / "cache")
    found = fid(given)["fid"]["value"]
    found_kid = kid(given)["kid"]

    features = [torch_fidelity_features(folder, state, tmp_path) for folder in folders]
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = metric_fid.fid_statistics_to_metric(
            *(metric_fid.fid_features_to_statistics(x) for x in features), verbose=False
        )
    expected = theirs["frechet_inception_distance"]
    print(f"FID of 250 images: {found:.8g}")
    within("FID of 250 images, torch-fidelity", relative(found, expected), TOLERANCE)
    theirs = metric_kid.kid_features_to_metric(
        *features, kid_subsets=100, kid_subset_size=100, rng_seed=2020, verbose=False
    )
    expected = theirs["kernel_inception_distance_mean"]
    within("KID of 250 images, torch-fidelity", relative(found_kid["value"], expected), TOLERANCE)
    expected = theirs["kernel_inception_distance_std"]
    within("its deviation", relative(found_kid["deviation"], expected), TOLERANCE)


@pytest.mark.heavy
def test_features_take_at_most_three_times_the_cpu_time(
    folders, state, weights, monkeypatch, tmp_path
):
    model = pytorch_fid_model(state, monkeypatch)
    extractor, features = inception(PROTOCOLS["pytorch-fid"], weights), Features(25, tmp_path)
    files = sorted(folders[0].glob("*.png"))[:100]

    def ours():
        features(extractor, files)
        for file in tmp_path.glob("*.npy"):
            file.unlink()

    def theirs():
        fid_score.get_activations(files, model, batch_size=25, num_workers=0)

    seconds = {}
    for name, run in (("ours", ours), ("theirs", theirs)):
        run()  # compiles, and reads the files
        begun = time.process_time()
        run()
        seconds[name] = time.process_time() - begun
    print(f"seconds of CPU time for 100 images: {seconds}")
    within("CPU time over pytorch-fid's", seconds["ours"] / seconds["theirs"], 3)
