from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.evaluation.clip import DEVIATION, MEAN, load_clip, preprocess
from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.image_folders import Frame
from contextualstory_jax.evaluation.measurement import Options
from contextualstory_jax.evaluation.metrics.clip_scores import cosines, sharing_pairs
from contextualstory_jax.evaluation.metrics.r_precision import retrieved
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.report import measure, prepare
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.utils.errors import UserError
from tests.helpers.metric_packages import package
from tests.helpers.noisy_results import write_noisy_results
from tests.helpers.tiny_clip import write_clip
from tests.helpers.tiny_inception import write_images


def measurement(folder: Path, reference: Path, weights: Path):
    features = Features(4, weights / "features")
    return prepare(
        folder, reference, PROTOCOLS["pytorch-fid"], Weights(weights), features, Options()
    )


def frame(story: str, *characters: str) -> Frame:
    return Frame(Path(), story, characters=frozenset(characters))


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_cosines_are_of_pairs():
    first = np.array([[1, 0], [0.6, 0.8]], np.float32)
    second = np.array([[0, 1], [0.6, 0.8]], np.float32)
    np.testing.assert_allclose(cosines(first, second), [0, 1], atol=1e-7)


def test_pairs_share_a_character_and_a_story():
    frames = [
        *(frame("a", "mia"), frame("a", "otto"), frame("a", "mia", "otto"), frame("a")),
        *(frame("b", "mia"), frame("b", "mia")),
    ]
    assert sharing_pairs(frames).tolist() == [[0, 2], [1, 2], [4, 5]]
    assert sharing_pairs([Frame(Path(), "a"), Frame(Path(), "a")]).shape == (0, 2)


def test_originals_have_clip_i_1_and_reports_have_all_scores(tmp_path):
    write_clip(tmp_path / "weights")
    equal = write_noisy_results(tmp_path / "equal", 4, noise=0.0)
    noisy = write_noisy_results(tmp_path / "noisy", 4)

    of_equal = measure(["clip"], measurement(equal, equal, tmp_path / "weights"))
    of_noisy = measure(["clip"], measurement(noisy, noisy, tmp_path / "weights"))

    assert of_equal["clip_i"]["value"] == pytest.approx(1, abs=1e-6)
    assert of_noisy["clip_i"]["value"] < 0.999
    for name in ("clip_i", "clip_t", "clip_consistency"):
        assert set(of_noisy[name]) == {"value", "low", "high"}
        assert of_noisy[name]["low"] < of_noisy[name]["value"] < of_noisy[name]["high"]
    assert of_noisy["unverified"] == ["clip-vit-base-patch32"]


def test_two_plain_folders_have_clip_i_alone(tmp_path):
    write_clip(tmp_path / "weights")
    folders = [write_images(tmp_path / name, 3, seed) for seed, name in enumerate("ab")]

    report = measure(["clip"], measurement(*folders, tmp_path / "weights"))

    assert "clip_i" in report
    assert not {"clip_t", "clip_consistency"} & report.keys()
    with pytest.raises(UserError, match="clip-r-precision needs sentences"):
        measure(["clip-r-precision"], measurement(*folders, tmp_path / "weights"))


def test_what_a_model_folder_is_missing_is_said_in_one_line(tmp_path):
    folder = write_clip(tmp_path)
    with pytest.raises(UserError, match="nowhere is missing; put config.json, model.safetensors"):
        load_clip(tmp_path / "nowhere")
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="the end token is 7; CLIP's is the last"):
        load_clip(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="of a model of type 'bert'"):
        load_clip(folder)


def test_folders_of_different_stories_are_not_paired(tmp_path):
    write_clip(tmp_path / "weights")
    first, second = (write_noisy_results(tmp_path / name, 3) for name in "ab")
    records = (second / "frames.jsonl").read_text().replace("/00002-s2", "/00009-s9")
    (second / "frames.jsonl").write_text(records)
    (second / "stories" / "00002-s2").rename(second / "stories" / "00009-s9")

    with pytest.raises(UserError, match="hold different frames, such as 00002-s2"):
        measure(["clip"], measurement(first, second, tmp_path / "weights"))


def test_a_sentence_is_retrieved_where_none_of_99_others_is_nearer():
    rng = np.random.default_rng(0)
    text = unit(rng, 150, 64)
    own = list(range(150))

    np.testing.assert_array_equal(retrieved(text, text, own, seed=0), 1)
    np.testing.assert_array_equal(retrieved(-text, text, own, seed=0), 0)
    # By chance one in a hundred, of 1,500 trials.
    by_chance = retrieved(unit(rng, 150, 64), text, own, seed=0).mean()
    assert 0.002 < by_chance < 0.03


def test_the_same_seed_retrieves_the_same_sentences():
    rng = np.random.default_rng(0)
    images, text = unit(rng, 20, 8), unit(rng, 400, 8)
    images = images + text[:20]

    first, again, other = (retrieved(images, text, range(20), seed) for seed in (1, 1, 2))

    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_r_precision_needs_100_sentences(tmp_path):
    write_clip(tmp_path / "weights")
    few = write_noisy_results(tmp_path / "few", 19)
    enough = write_noisy_results(tmp_path / "enough", 20)

    with pytest.raises(UserError, match="100 different sentences, and .*few has 95"):
        measure(["clip-r-precision"], measurement(few, few, tmp_path / "weights"))
    report = measure(["clip-r-precision"], measurement(enough, enough, tmp_path / "weights"))

    assert 0 <= report["clip_r_precision"]["value"] <= 0.3


def test_an_image_is_resized_by_its_short_side_cropped_and_normalised():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = [255, 0, 128]

    ours = preprocess(Image.fromarray(pixels), 4)

    expected = (np.array([1, 0, np.float32(128 / 255)], np.float32) - MEAN) / DEVIATION
    np.testing.assert_array_equal(ours, np.broadcast_to(expected, (4, 4, 3)))


@pytest.mark.torch
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (300, 181), (97, 333), (224, 224)])
def test_preprocessing_is_transformers_bit_for_bit(size):
    package("transformers")
    processing = package("transformers.models.clip.image_processing_pil_clip")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    theirs = processing.CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]

    np.testing.assert_array_equal(preprocess(image, 224), theirs.transpose(1, 2, 0))
