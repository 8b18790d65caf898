from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.image_folders import Frame
from contextualstory_jax.evaluation.measurement import Options
from contextualstory_jax.evaluation.metrics import classified
from contextualstory_jax.evaluation.metrics.classified import scale_images, scores
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.report import measure, prepare
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.utils.errors import UserError
from tests.helpers.metric_packages import package, within
from tests.helpers.noisy_results import write_noisy_results

NAMES = ("Mia", "Otto", "Mr Slate")


def values(found):
    return {name: interval.value for name, interval in found.items()}


def test_scores_of_two_stories_counted_by_hand():
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    predicted = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], bool)

    found = values(scores(predicted, labels, np.array([0, 0, 1, 1]), NAMES))

    assert found == {
        "character_f1_micro": pytest.approx(8 / 10),
        "character_f1_macro": pytest.approx((1 + 4 / 5 + 0) / 3),
        "frame_accuracy": 0.5,
        "story_exact_match": 0.5,
        "character_f1_mia": 1,
        "character_f1_otto": pytest.approx(4 / 5),
        "character_f1_mr_slate": 0,
    }


def test_intervals_resample_stories():
    rng = np.random.default_rng(0)
    labels = rng.random((100, 3)) < 0.4
    predicted = labels ^ (rng.random((100, 3)) < 0.1)

    found = scores(predicted, labels, np.arange(100) // 5, NAMES)
    certain = scores(labels, labels, np.arange(100) // 5, NAMES)
    single = scores(predicted, labels, np.zeros(100, int), NAMES)

    f1 = found["character_f1_micro"]
    assert f1.low < f1.value < f1.high
    assert (certain["frame_accuracy"].low, certain["frame_accuracy"].high) == (1, 1)
    assert (single["frame_accuracy"].low, single["frame_accuracy"].high) == (None, None)


@pytest.mark.torch
def test_scores_are_scikit_learn_s():
    metrics = package("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.random((500, 9)) < 0.3
    predicted = labels ^ (rng.random((500, 9)) < 0.15)
    labels[:, 8] = predicted[:, 8] = False  # of whom there is nothing to count

    found = values(scores(predicted, labels, np.arange(500) // 5, tuple("abcdefghi")))

    ours = [found[f"character_f1_{c}"] for c in ("micro", "macro", *"abcdefghi")]
    theirs = [
        metrics.f1_score(labels, predicted, average=average, zero_division=0)
        for average in ("micro", "macro", None)
    ]
    within("character F1", float(np.abs(ours - np.hstack(theirs)).max()), 1e-12)
    assert found["frame_accuracy"] == metrics.accuracy_score(labels, predicted)


def test_protocols_scale_images_in_three_ways():
    levels = jnp.uint8([[[[0, 0, 0], [255, 255, 255]]]])
    scaled = {
        name: np.asarray(scale_images(levels, PROTOCOLS[name].classifier_input))[0, 0]
        for name in ("storyviz", "storydalle", "pytorch-fid")
    }

    np.testing.assert_allclose(scaled["storyviz"], [[0] * 3, [1] * 3])
    np.testing.assert_allclose(scaled["pytorch-fid"], [[-1] * 3, [1] * 3])
    expected = [[-2.117904, -2.035714, -1.804444], [2.248908, 2.428571, 2.64]]
    np.testing.assert_allclose(scaled["storydalle"], expected, rtol=1e-6)


def test_a_classifier_s_positive_logits_are_measured(tmp_path, monkeypatch):
    """A stand-in for features: the labels themselves, but one frame's."""
    folder = write_noisy_results(tmp_path / "results", 3)
    asked = prepare(
        folder,
        folder,
        PROTOCOLS["pytorch-fid"],
        Weights(tmp_path),
        Features(1, tmp_path),
        Options(),
    )
    names = classified.characters_of("pororo")
    logits = np.where(
        [[n in (f.characters or ()) for n in names] for f in asked.generated.frames], 1, -1
    )
    logits[0] *= -1
    monkeypatch.setattr(classified, "classifier", lambda *_: None)
    (tmp_path / "characters_pororo.pt").touch()

    found = measure(["characters"], asked._replace(features=lambda *_: logits))

    assert found["frame_accuracy"]["value"] == pytest.approx(14 / 15)
    assert found["story_exact_match"]["value"] == pytest.approx(2 / 3)


def test_missing_classifiers_labels_and_datasets_are_named(tmp_path):
    folder = write_noisy_results(tmp_path / "results", 3)

    def asked(**changes):
        features = Features(1, tmp_path)
        made = prepare(
            folder, folder, PROTOCOLS["pytorch-fid"], Weights(tmp_path), features, Options()
        )
        return made._replace(generated=made.generated._replace(**changes))

    with pytest.raises(UserError, match=re.escape("has no characters_pororo.safetensors (or")):
        measure(["characters"], asked())
    with pytest.raises(UserError, match="of pororo and flintstones, not of 'shapes'"):
        measure(["characters"], asked(settings={"data": {"name": "shapes"}}))
    unlabelled = tuple(Frame(f.path, f.story) for f in asked().generated.frames)
    with pytest.raises(UserError, match="has frames without"):
        measure(["characters"], asked(frames=unlabelled))
