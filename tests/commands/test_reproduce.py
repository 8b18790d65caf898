"""`reproduce` on small published folders; by default with stand-ins for the large networks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.commands import measure
from contextualstory_jax.commands.reproduce import NAMES, main
from contextualstory_jax.config.config_files import PUBLISHED, load_config
from contextualstory_jax.evaluation import inception_features
from contextualstory_jax.evaluation.metrics.table import METRICS
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.reproduction import PROTOCOL_METRICS, TASKS
from contextualstory_jax.sampling.pipeline import Generated, StoryPipeline
from contextualstory_jax.testing.metric_weights import write_metric_weights
from contextualstory_jax.testing.published_folders import write_flintstones, write_pororo
from contextualstory_jax.utils.cli import run
from tests.conftest import write_untrained
from tests.helpers.tiny_clip import write_clip
from tests.helpers.tiny_inception import tiny_network, write_weights

TASK = "pororo-visualization"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A dataset and weights; features are kept beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception_features, "fid_network", tiny_network)
    write_pororo(tmp_path / "data")
    write_weights(tmp_path / "weights")
    return tmp_path


@pytest.fixture
def sampled(monkeypatch, capsys):
    """Random images in place of the model's; what was printed before each batch."""
    printed = []

    def draw(pipeline, stories, **_):
        printed.append(capsys.readouterr().out)
        images = np.random.default_rng(len(printed)).integers(
            0, 256, (len(stories), 5, 16, 16, 3), np.uint8
        )
        return Generated(images, np.zeros((len(stories), 5, 4, 4, 48), np.float32))

    monkeypatch.setattr(StoryPipeline, "draw", draw)
    return printed


def words(places, checkpoint, *more):
    found = {"data": places / "data", "checkpoint": checkpoint, "out": places / "out"}
    found["weights-dir"] = places / "weights"
    return [TASK, *(word for k, v in found.items() for word in (f"--{k}", str(v))), *more]


def reproduced(*arguments):
    main(*arguments)
    out = Path(arguments[0][arguments[0].index("--out") + 1])
    return json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def measured(out, weights, protocol, metrics):
    file = out.parent / f"{protocol}.json"
    options = ["--protocol", protocol, "--metrics", metrics, "--weights-dir", str(weights)]
    measure.main([str(out), str(out), *options, "--out", str(file)])
    return json.loads(file.read_text())


def test_every_task_protocol_and_metric_has_its_place():
    assert NAMES == tuple(TASKS)
    assert {task.config for task in TASKS.values()} <= PUBLISHED.keys()
    assert PROTOCOL_METRICS.keys() == PROTOCOLS.keys()
    assert {name for names in PROTOCOL_METRICS.values() for name in names} == METRICS.keys()
    for name, task in TASKS.items():
        assert name.endswith("continuation") == task.is_continuation
        assert load_config(task.config).model.unet.is_continuation == task.is_continuation


def test_the_report_holds_all_that_its_values_depend_on(places, sampled, tiny_checkpoint):
    report, page = reproduced(words(places, tiny_checkpoint))

    assert list(report["protocols"]) == [
        name for name, metrics in PROTOCOL_METRICS.items() if "fid" in metrics
    ]
    expected = measured(places / "out", places / "weights", "clean-fid", "fid")
    assert report["protocols"]["clean-fid"]["fid"] == expected["fid"]
    assert report["protocols"]["clean-fid"]["count"] == 15
    assert report["left_out"].keys() == METRICS.keys() - {"fid"}
    assert "characters_pororo.safetensors" in report["left_out"]["characters"]
    [published] = report["published"]
    assert (published["value"], published["protocol"]) == (14.07, None)
    assert (report["dataset"]["stories"], report["dataset"]["reported_stories"]) == (3, 2208)
    weights = places / "weights" / "fid_inception.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert report["weights_sha256"] == {weights.name: digest}
    assert report["unverified"] == [weights.name]
    assert report["settings"]["sampling"]["steps"] == 2
    assert report["versions"].keys() >= {"contextualstory_jax", "jax"}

    fid = report["protocols"]["clean-fid"]["fid"]
    assert f"| `clean-fid` | {fid['value']:.6g} [{fid['low']:.6g}, {fid['high']:.6g}] |" in page
    assert "| unknown (published) | 14.07 |  | a mirror of a leaderboard" in page
    assert (
        "Papers report a test split of 2,208 stories: **values of differently many stories" in page
    )
    for text in (digest, report["settings"]["weights_sha256"], report["command"]):
        assert text in page
    [before] = sampled  # printed before the one batch
    assert "to generate: 3 stories of" in before
    assert "time: at least" in before and "measured now" in before
    assert "GB of weights on each device" in before


def test_it_resumes_with_the_same_settings(places, sampled, tiny_checkpoint, monkeypatch, capsys):
    arguments = words(places, tiny_checkpoint, "--batch-size", "1")
    draw = StoryPipeline.draw

    def draw_and_fail(*given, **named):
        if len(sampled) == 2:
            raise RuntimeError("power cut")
        return draw(*given, **named)

    monkeypatch.setattr(StoryPipeline, "draw", draw_and_fail)
    with pytest.raises(RuntimeError, match="power cut"):
        main(arguments)
    there = {
        path: path.stat().st_mtime_ns for path in (places / "out").glob("stories/*/frame_0.png")
    }
    assert there and not (places / "out" / "report.json").exists()
    monkeypatch.setattr(StoryPipeline, "draw", draw)
    refuse([*arguments, "--seed", "1"], "generated with seed = 0", capsys)

    main(arguments)

    assert f"to generate: {3 - len(there)} stor" in sampled[2]
    assert len(sampled) == 2 + 3 - len(there)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert (places / "out" / "report.md").is_file()


def remove_weights(places):
    shutil.rmtree(places / "weights")


def swap_weights(places):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(1)}, places / "weights" / "fid_inception.safetensors")


def remove_an_image(places):
    frame = "Pororo_ENGLISH1_2/Pororo_ENGLISH1_2_ep1/4.png"
    (places / "data" / "pororo_png_filtered_blip2" / frame).unlink()


def remove_the_dataset(places):
    shutil.rmtree(places / "data")
    write_flintstones(places / "data")


def put_a_file(places):
    (places / "out").write_text("")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove_weights, "put it there as"),
        (swap_weights, "fid_inception.safetensors holds weights of another network"),
        (remove_an_image, "in the test split; the first: "),
        (remove_the_dataset, "is not a PororoSV folder"),
        (put_a_file, "cannot write to"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_generated(
    spoil, reason, places, sampled, tiny_checkpoint, capsys
):
    spoil(places)

    refuse(words(places, tiny_checkpoint), reason, capsys)

    assert sampled == [] and not (places / "out" / "stories").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--checkpoint", "absent"], "no folder absent, and no Hub id OWNER/NAME"),
        (["--data"], "expected one argument"),
    ],
)
def test_wrong_arguments_end_in_one_line(more, reason, places, tiny_checkpoint, capsys):
    refuse(words(places, tiny_checkpoint, *more), reason, capsys)


def test_a_task_that_does_not_exist_is_refused(capsys):
    refuse(["pororo"], "invalid choice: 'pororo'", capsys)


def test_a_model_for_the_other_task_is_refused(places, tiny_continuation_checkpoint, capsys):
    reason = f"a model for continuation, and {TASK} needs one for visualization"

    refuse(words(places, tiny_continuation_checkpoint), reason, capsys)


def refuse(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit:
        run(lambda: main(arguments))
    assert exit.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line


@pytest.mark.heavy  # of which scripts/rehearse_data.py does all but CLIP
@pytest.mark.parametrize(("dataset", "stories"), [("pororo", 3), ("flintstones", 2)])
def test_the_rehearsal(dataset, stories, tmp_path, monkeypatch):
    """The networks have their published sizes, and weights that follow from their names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    {"pororo": write_pororo, "flintstones": write_flintstones}[dataset](tmp_path / "data")
    write_metric_weights(tmp_path / "weights", dataset)
    write_clip(tmp_path / "weights")
    config = Path(__file__).parents[1] / "helpers" / "tiny_stories_config.py"
    checkpoint = write_untrained(load_config(config).model, tmp_path / "checkpoint")

    report, page = reproduced(
        [f"{dataset}-continuation", *words(tmp_path, checkpoint)[1:]],
    )

    # 1,000 images are too many for KID's subsets, and 100 sentences for R-precision.
    assert report["left_out"].keys() == {"kid", "clip-r-precision"}
    assert {name: found.keys() & SHOWN for name, found in report["protocols"].items()} == {
        name: {value for metric in metrics for value in VALUES.get(metric, ())}
        for name, metrics in PROTOCOL_METRICS.items()
    }
    assert {found["count"] for found in report["protocols"].values()} == {4 * stories}
    assert len(report["unverified"]) == 4
    found = report["protocols"]["storyviz"]
    expected = measured(tmp_path / "out", tmp_path / "weights", "storyviz", "fid,characters")
    assert found["fid"] == expected["fid"]
    assert found["frame_accuracy"] == expected["frame_accuracy"]
    if dataset == "flintstones":
        assert found["fid"]["reference_samples"]["count"] == 10
        assert "random reference frames" in page


VALUES = {
    "fid": ("fid",),
    "fsd": ("fsd",),
    "characters": ("character_f1_micro", "frame_accuracy", "story_exact_match"),
    "clip": ("clip_i", "clip_t"),
}
SHOWN = {value for values in VALUES.values() for value in values}
