"""Each protocol's frames and inputs, literally."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.flintstones import FlintstonesSource
from contextualstory_jax.data.images import read_column, read_from_array
from contextualstory_jax.data.pororo import PororoSource
from contextualstory_jax.data.preparation import prepare
from contextualstory_jax.evaluation.image_folders import Frame, ImageFolder, read_folder, read_rgb
from contextualstory_jax.evaluation.inception_features import (
    resize_bilinear,
    resize_clean,
    sample_points,
)
from contextualstory_jax.evaluation.protocols import PROTOCOLS, SAMPLES, random_references
from contextualstory_jax.testing.published_folders import (
    write_flintstones,
    write_pororo,
    write_story_folder,
)
from contextualstory_jax.utils.errors import UserError
from tests.helpers.results_folder import write_results


@pytest.fixture(scope="module")
def frames():
    """Frames of 2,400 stories without files."""
    stories = range(2400)
    return tuple(Frame(Path(f"{n}_{i}.png"), f"{n:05d}-s", i) for n in stories for i in range(5))


def folder(dataset, task, split, frames):
    settings = {"data": {"name": dataset}, "task": task, "split": split}
    return ImageFolder(Path("out"), frames, settings)


@pytest.mark.parametrize(
    ("name", "side", "resize", "scale", "random"),
    [
        ("pytorch-fid", None, "bilinear", "unit", False),
        ("torch-fidelity", None, "tensorflow1", "128", False),
        ("clean-fid", None, "clean", "128", False),
        ("storyviz", 64, "bilinear", "unit", True),
        ("storydalle", 64, "bilinear", "unit", True),
        ("arldm", 64, "bilinear", "unit", True),
        ("make-a-story", 256, "bilinear", "unit", True),
    ],
)
def test_the_inputs_of_each_protocol(name, side, resize, scale, random):
    protocol = PROTOCOLS[name]

    assert (protocol.side, protocol.resize, protocol.scale) == (side, resize, scale)
    assert protocol.random_reference == random
    assert protocol.datasets == (("pororo", "flintstones") if random else ())


@pytest.mark.parametrize(
    ("name", "dataset", "task", "split", "count"),
    [
        ("storyviz", "pororo", "visualization", "val", 2304),
        ("storyviz", "pororo", "visualization", "test", 2400),
        ("storyviz", "flintstones", "continuation", "test", 1900),
        ("storyviz", "flintstones", "visualization", "test", 2400),
        ("arldm", "pororo", "continuation", "test", 2400),
        ("make-a-story", "flintstones", "continuation", "test", 2400),
        ("pytorch-fid", "shapes", "visualization", "test", 2400),
    ],
)
def test_the_stories_of_each_protocol(name, dataset, task, split, count, frames):
    given = folder(dataset, task, split, frames)

    chosen = PROTOCOLS[name].select(given)

    assert chosen.frames == given.frames[: 5 * count]


def test_a_protocol_of_other_datasets_is_refused(frames):
    given = folder("shapes", "visualization", "test", frames[:5])

    with pytest.raises(UserError, match="storyviz is for pororo and flintstones, and .*'shapes'"):
        PROTOCOLS["storyviz"].select(given)


def test_a_plain_folder_is_measured_completely(tmp_path):
    plain = ImageFolder(tmp_path, (Frame(tmp_path / "a.png", "a.png"),), {})

    for protocol in PROTOCOLS.values():
        assert protocol.select(plain) == plain


@pytest.fixture(scope="module")
def pororo(tmp_path_factory):
    root = tmp_path_factory.mktemp("pororo")
    write_pororo(root / "data", strips=True)
    return root


def test_random_reference_frames_are_seeded_and_of_the_right_files(pororo):
    data = DataConfig(name="pororo", root=str(pororo / "data"), captions="original")
    write_results(pororo / "out", stories=3, given=1, data=data)
    originals = read_folder(pororo / "out", "original")

    samples, again, other = (random_references(originals, seed) for seed in (0, 0, 1))

    assert len(samples) == SAMPLES
    assert samples == again != other
    assert len({tuple(f.choice for f in sample.frames) for sample in samples}) == SAMPLES
    source = PororoSource(pororo / "data", "test", 16, captions="original")
    for sample in samples:
        for frame in sample.frames:
            number = int(frame.story[:5])
            assert frame.path == source.story(number).paths[frame.position]
            column = read_column(frame.path)
            expected = column[frame.choice % len(column)]
            assert np.array_equal(read_rgb(frame.item), expected)


def test_random_reference_frames_of_flintstones(tmp_path):
    write_flintstones(tmp_path / "data")
    data = DataConfig(name="flintstones", root=str(tmp_path / "data"))
    write_results(tmp_path / "out", stories=2, data=data)

    first, *_ = samples = random_references(read_folder(tmp_path / "out", "original"), 0)

    assert len(samples) == SAMPLES
    paths = FlintstonesSource(tmp_path / "data", "test", 16).story(1).paths
    assert tuple(frame.path for frame in first.frames[5:]) == paths
    images = [np.asarray(read_rgb(frame.item)) for frame in first.frames]
    for image, frame in zip(images, first.frames, strict=True):
        assert np.array_equal(image, read_from_array(frame.path, frame.choice))


def test_a_dataset_with_fewer_stories_is_refused(pororo, tmp_path):
    data = DataConfig(name="pororo", root=str(pororo / "data"), captions="original")
    write_results(tmp_path, stories=4, data=data)

    with pytest.raises(UserError, match="the story 00003-s3, which is not in"):
        random_references(read_folder(tmp_path, "original"), 0)


def test_a_dataset_with_one_image_a_frame_has_no_random_ones(pororo):
    write_story_folder(pororo / "own")
    write_results(
        pororo / "results", stories=1, data=DataConfig(name="folder", root=str(pororo / "own"))
    )

    assert random_references(read_folder(pororo / "results", "original"), 0) == []


def test_a_prepared_dataset_is_warned_of(pororo, tmp_path, caplog):
    data = DataConfig(name="pororo", root=str(pororo / "data"), captions="original")
    prepare(data, tmp_path / "shards", 16)
    prepared = dataclasses.replace(data, root=str(tmp_path / "shards"))
    write_results(tmp_path / "out", stories=1, data=prepared)

    assert random_references(read_folder(tmp_path / "out", "original"), 0) == []
    assert "shards is prepared: its originals are the only sample" in caplog.text


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    write_results(tmp_path, stories=1, data=DataConfig(name="pororo", root="absent"))

    with pytest.raises(UserError, match="random images of the dataset, which cannot be read"):
        random_references(read_folder(tmp_path, "original"), 0)


def test_two_pixels_become_299():
    """Half-pixel centres keep the edges; TensorFlow 1's begin at the first pixel."""
    low, high, fraction = sample_points(2, "bilinear")
    assert (low[0], high[0], fraction[0]) == (0, 1, 0)
    assert fraction[149] == pytest.approx(0.5)
    low, high, fraction = sample_points(2, "tensorflow1")
    assert fraction[1] == pytest.approx(2 / 299) and low[298] == high[298] == 1


def test_an_image_of_299_pixels_stays():
    import jax.numpy as jnp

    x = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)

    for resize in ("bilinear", "tensorflow1"):
        assert np.array_equal(resize_bilinear(jnp.asarray(x, jnp.float32), resize), x)
    assert np.array_equal(resize_clean(x[0]), x[0])


def test_the_clean_resize_is_not_quantised():
    image = np.array(Image.linear_gradient("L").resize((8, 8)))[..., None] * np.ones(3, np.uint8)

    resized = resize_clean(image.astype(np.uint8))

    assert resized.dtype == np.float32 and 0 <= resized.min() and resized.max() <= 255
    assert not np.array_equal(resized, np.round(resized))


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROTOCOLS["storyviz"].side = 128
