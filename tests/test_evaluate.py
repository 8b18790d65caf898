"""The evaluation command, and what it measures, with untrained models that draw in two steps."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.evaluate import main
from contextualstory_jax.evaluation import inception_features
from contextualstory_jax.evaluation.metrics.characters import METRICS, SUBSETS
from contextualstory_jax.utils.cli import run
from tests.conftest import write_untrained
from tests.helpers.tiny_inception import tiny_network, write_weights

STORIES = 3


@pytest.fixture(scope="module")
def stories():
    """The first stories of the test split."""
    from contextualstory_jax.data.loader import test_stories

    return test_stories(DataConfig(), 32, STORIES)


@pytest.fixture(scope="module")
def readable_config(tiny_model_config):
    """The tiny model, at the smallest size at which characters can be read."""
    return dataclasses.replace(tiny_model_config, height=32, width=32)


@pytest.fixture(scope="module")
def checkpoint(readable_config, tmp_path_factory):
    return write_untrained(readable_config, tmp_path_factory.mktemp("readable"))


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """What the command wrote, and printed."""
    out = tmp_path_factory.mktemp("evaluated") / "new"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(f"--checkpoint {checkpoint} --out {out} --stories {STORIES} --batch-size 2".split())
    return out, printed.getvalue()


def test_metrics_lie_between_the_originals_and_the_untrained_model(evaluated):
    found = json.loads((evaluated[0] / "metrics.json").read_text())

    assert found.keys() == {"settings", "originals", "model", "untrained"}
    for subset in SUBSETS:
        originals = found["originals"][subset]
        assert {metric: originals[metric]["value"] for metric in METRICS} == dict.fromkeys(
            METRICS, 1
        )
    assert found["originals"]["all"]["frames"] == 5 * STORIES
    # The model is an untrained one too, of the same seed.
    assert found["model"] == found["untrained"]
    assert found["model"]["all"]["character_f1"]["value"] < 0.5
    assert found["settings"]["stories"] == STORIES


def test_pictures_are_written_beside_the_originals(evaluated, stories):
    for number, story in enumerate(stories):
        folder = evaluated[0] / "stories" / f"{number:05d}-{story.story_id}"
        for i, original in enumerate(story.images):
            assert np.array_equal(np.asarray(Image.open(folder / f"original_{i}.png")), original)
            assert Image.open(folder / f"frame_{i}.png").size == (32, 32)
            assert Image.open(folder / f"untrained_{i}.png").size == (32, 32)


def test_the_table_is_printed(evaluated):
    lines = evaluated[1].splitlines()

    assert lines[0].split() == ["all", "frames", "(15)", "originals", "model", "untrained"]
    assert lines[1].startswith("character precision") and "1.000 [1.00, 1.00]" in lines[1]
    assert str(evaluated[0]) in lines[-1]


def test_the_images_are_measured_by_protocol_too(evaluated, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(inception_features, "fid_network", tiny_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_weights(tmp_path / "weights")
    given = f"--checkpoint {checkpoint} --out {evaluated[0]} --stories {STORIES}"

    main(f"{given} --metrics fid --protocol clean-fid --weights-dir {tmp_path}/weights".split())

    report = json.loads((evaluated[0] / "clean-fid.json").read_text())
    assert report["fid"]["value"] > 1
    assert (report["protocol"], report["count"]) == ("clean-fid", 5 * STORIES)


def test_pictures_of_another_story_measure_badly(stories):
    from contextualstory_jax.evaluation.compare import measure

    right = np.stack([story.images for story in stories])

    found = measure(stories, np.roll(right, 1, axis=0))

    assert found["all"]["frame_accuracy"]["value"] < 0.5
    assert found["all"]["scene_accuracy"]["value"] < 1


def test_the_lower_bound_has_the_weights_that_training_starts_from(readable_config):
    from contextualstory_jax.data.loader import TOKENIZER_DIR
    from contextualstory_jax.evaluation.compare import untrained
    from contextualstory_jax.models.story_model import StoryModel
    from contextualstory_jax.models.tokenizer import Tokenizer
    from contextualstory_jax.sampling.pipeline import StoryPipeline

    model = StoryModel(readable_config)
    trained = StoryPipeline(model, model.init(5), Tokenizer(TOKENIZER_DIR, 16), [5.0] * 4)

    found = untrained(trained).params

    for part, leaves in model.init(0).items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(found[part][name], leaf)


def test_in_continuation_the_first_frame_is_given_and_not_measured(readable_config, stories):
    from contextualstory_jax.data.loader import TOKENIZER_DIR
    from contextualstory_jax.evaluation.compare import evaluate
    from contextualstory_jax.models.story_model import StoryModel
    from contextualstory_jax.models.tokenizer import Tokenizer
    from contextualstory_jax.sampling.pipeline import Generated, StoryPipeline

    class Repeating(StoryPipeline):
        """Draws the first frame five times."""

        def draw(self, stories, **_):
            pictures = np.stack([[story.first_frame] * 5 for story in stories])
            return Generated(pictures, np.zeros((len(stories), 5, 8, 8, 48), np.float32))

    unet = dataclasses.replace(readable_config.unet, first_frame_condition_mode="conv2d")
    model = StoryModel(dataclasses.replace(readable_config, unet=unet))
    pipeline = Repeating(model, model.init(0), Tokenizer(TOKENIZER_DIR, 16), [5.0] * 4)

    results = evaluate({"model": pipeline}, stories)

    assert np.array_equal(results["model"].images[:, 0], [s.images[0] for s in stories])
    for result in results.values():
        assert result.metrics["all"]["frames"] == 4 * STORIES
    # A first frame has the scene of the others, but not always their characters.
    assert results["model"].metrics["all"]["scene_accuracy"]["value"] == 1
    assert results["model"].metrics["all"]["frame_accuracy"]["value"] < 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--stories 0", "--stories must be at least 1; got 0"),
        ("--stories many", "--stories: invalid int value: 'many'"),
        ("--config absent.py", "no config absent.py"),
        ("--checkpoint absent", "no checkpoint folder absent"),
        ("--checkpoint {tiny}", "square images of 32 pixels or more"),
        ("--checkpoint {tiny} --weights raw", "holds no raw weights"),
        ("--checkpoint {readable} --batch-size 0", "batch size must be at least 1; got 0"),
        ("--checkpoint {readable} --seed -1", "seed must be an integer in"),
        ("--metrics fod", "no metric 'fod'; there are fid, kid"),
        ("--metrics fid --protocol none", "no protocol 'none'; there are pytorch-fid"),
        ("--metrics fid --weights-dir absent", "no absent/pt_inception-2015-12-05-6726825d.pth"),
        ("--wrong", "unrecognized arguments: --wrong"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments, reason, tiny_checkpoint, checkpoint, tmp_path, capsys
):
    out = tmp_path / "out"
    given = arguments.format(tiny=tiny_checkpoint, readable=checkpoint).split()

    with pytest.raises(SystemExit) as exit:
        run(lambda: main(["--out", str(out), *given]))

    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(SystemExit) as exit:
        run(lambda: main(["--out", str(tmp_path / "file" / "out")]))

    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write to")
