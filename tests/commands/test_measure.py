"""`measure` on small folders, with a small network in the place of InceptionV3."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.commands.measure import main
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data import images
from contextualstory_jax.evaluation import inception_features
from contextualstory_jax.evaluation.statistics import read_statistics
from contextualstory_jax.testing.published_folders import write_pororo
from contextualstory_jax.utils.cli import run
from tests.helpers.results_folder import write_results
from tests.helpers.tiny_inception import FEATURES, tiny_network, write_images, write_weights


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(inception_features, "fid_network", tiny_network)
    monkeypatch.setattr(images, "remarks", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_weights(tmp_path / "weights")


@pytest.fixture
def folders(tmp_path):
    return write_images(tmp_path / "a", 30, 0), write_images(tmp_path / "b", 40, 1, contrast=0.5)


def measured(tmp_path, *arguments):
    out = tmp_path / "report.json"
    main([*map(str, arguments), "--weights-dir", str(tmp_path / "weights"), "--out", str(out)])
    return json.loads(out.read_text())


def test_two_plain_folders(folders, tmp_path, capsys):
    report = measured(
        tmp_path, *folders, "--metrics", "fid,kid", "--kid-subset-size", 20, "--kid-subsets", 9
    )

    assert report["fid"].keys() == {"value", "low", "high"}
    assert report["fid"]["low"] < report["fid"]["value"] < report["fid"]["high"]
    kid = report["kid"]
    assert kid["low"] <= kid["value"] <= kid["high"]
    assert (kid["subsets"], kid["subset_size"], kid["seed"]) == (9, 20, 2020)
    assert report["protocol"] == "pytorch-fid"
    assert (report["count"], report["reference_count"]) == (30, 40)
    assert report["unverified"] == list(report["weights_sha256"]) == ["fid_inception.safetensors"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fid", "kid"]


def test_a_folder_is_at_no_distance_from_itself(folders, tmp_path):
    assert measured(tmp_path, folders[0], folders[0])["fid"]["value"] == pytest.approx(0, abs=1e-5)


def test_protocols_differ(folders, tmp_path):
    values = {
        name: measured(tmp_path, *folders, "--protocol", name)["fid"]["value"]
        for name in ("pytorch-fid", "torch-fidelity", "clean-fid", "storyviz")
    }

    assert len(set(values.values())) == 4


def test_a_file_of_statistics_takes_the_place_of_the_folder(folders, tmp_path):
    file = tmp_path / "b.npz"
    expected = measured(tmp_path, *folders, "--save-statistics", file)

    report = measured(tmp_path, folders[0], file)

    assert read_statistics(file).sigma.shape == (FEATURES, FEATURES)
    assert report["fid"] == pytest.approx(expected["fid"])
    assert report["reference_count"] is None


def test_features_are_read_from_the_cache(folders, tmp_path, monkeypatch):
    first = measured(tmp_path, *folders)
    monkeypatch.setattr(inception_features, "read_rgb", None)

    assert measured(tmp_path, *folders) == first


def test_a_folder_that_evaluate_wrote_beside_its_originals(tmp_path):
    write_results(tmp_path / "out", stories=6, given=1)

    report = measured(tmp_path, tmp_path / "out", tmp_path / "out")

    assert (report["count"], report["reference_count"]) == (24, 24)
    assert report["fid"]["value"] > 0 and report["fid"]["low"] is not None


def test_random_reference_frames_are_reported_with_their_spread(tmp_path):
    write_pororo(tmp_path / "data", strips=True)
    data = DataConfig(name="pororo", root=str(tmp_path / "data"), captions="original")
    write_results(tmp_path / "out", stories=3, data=data)
    arguments = (tmp_path / "out", tmp_path / "out", "--protocol", "storyviz")

    report, other = measured(tmp_path, *arguments), measured(tmp_path, *arguments, "--seed", 1)

    spread = report["fid"]["reference_samples"]
    assert spread["count"] == 10
    assert spread["smallest"] < spread["mean"] < spread["largest"]
    assert spread["smallest"] <= report["fid"]["value"] <= spread["largest"]
    assert other["fid"] != report["fid"] == measured(tmp_path, *arguments)["fid"]


def test_few_images_are_warned_of(folders, tmp_path, caplog):
    measured(tmp_path, *folders)

    assert any("fewer than FID has features" in r.getMessage() for r in caplog.records)


def test_images_of_several_sizes_need_a_protocol_that_resizes_each(folders, tmp_path):
    Image.new("RGB", (30, 20)).save(folders[0] / "other.png")

    assert measured(tmp_path, *folders, "--protocol", "clean-fid")["count"] == 31


def damage(path):
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{a} {absent}", "absent is not a folder of images; name one"),
        ("{a} {empty}", "empty holds no images"),
        ("{one} {b}", "one holds one image; FID needs two"),
        ("{mixed} {b}", "differ in size, (16, 16) and (20, 30) pixels"),
        ("{damaged} {b}", "000.png is not an image; replace it"),
        ("{a} {b} --metrics kid", "KID takes subsets of 1000 images"),
        ("{a} {text} --metrics fid", "text.npz is no file of statistics"),
        ("{a} {small} --metrics fid", "statistics are of 3 features, not FID's 12"),
        ("{a} {small} --metrics kid", "--metrics kid needs a folder of reference images"),
        ("{a} {b} --metrics fid,fod", "no metric 'fod'; there are fid, kid"),
        ("{a} {b} --protocol ours", "no protocol 'ours'; there are pytorch-fid, torch-fidelity"),
        ("{results} {results} --protocol arldm", "arldm is for pororo and flintstones"),
        ("{a} {b} --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("{a} {b} --kid-subset-size 1", "--kid-subset-size must be at least 2; got 1"),
        ("{a} {b} --kid-seed 4294967296", "--kid-seed must be below 2**32"),
        ("{a} {b} --weights-dir {empty}", "pt_inception-2015-12-05-6726825d.pth"),
        ("{a} {b} --weights-dir {other}", "holds weights of another network"),
        ("{a} {b} --out {text}/report.json", "cannot write to"),
        ("{a}", "the following arguments are required: REFERENCE"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, reason, folders, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("empty", "one", "mixed", "damaged", "other")}
    places["empty"].mkdir()
    write_images(places["one"], 1, 2)
    write_images(places["mixed"], 3, 2)
    Image.new("RGB", (30, 20)).save(places["mixed"] / "other.png")
    write_images(places["damaged"], 3, 2)
    damage(places["damaged"] / "000.png")
    shutil.copytree(tmp_path / "weights", places["other"])
    write_results(tmp_path / "results", stories=1)
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "text.npz").write_text("no archive")
    if "{other}" in arguments:
        from safetensors.numpy import save_file

        save_file({"a": np.ones(1)}, places["other"] / "fid_inception.safetensors")
    given = arguments.format(
        a=folders[0],
        b=folders[1],
        absent=tmp_path / "absent",
        results=tmp_path / "results",
        small=tmp_path / "small.npz",
        text=tmp_path / "text.npz",
        **places,
    ).split()
    if "--weights-dir" not in given:
        given += ["--weights-dir", str(tmp_path / "weights")]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "report.json")]

    with pytest.raises(SystemExit) as exit:
        run(lambda: main(given))

    assert exit.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
    assert not (tmp_path / "report.json").exists()
