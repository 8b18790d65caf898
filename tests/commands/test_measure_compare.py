"""`measure --compare` and `--seeds`, with a small network in the place of InceptionV3."""

from __future__ import annotations

import json

import pytest

from contextualstory_jax.commands.measure import main
from contextualstory_jax.evaluation import inception_features
from contextualstory_jax.utils.errors import UserError
from tests.helpers.noisy_results import write_noisy_results
from tests.helpers.tiny_inception import tiny_network, write_weights


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(inception_features, "fid_network", tiny_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_weights(tmp_path / "weights")
    return {
        name: write_noisy_results(tmp_path / name, 30, seed, noise)
        for name, seed, noise in (("near", 0, 0.3), ("far", 0, 0.6), ("again", 1, 0.3))
    }


def measured(tmp_path, *arguments):
    out = tmp_path / "report.json"
    main([*map(str, arguments), "--weights-dir", str(tmp_path / "weights"), "--out", str(out)])
    return json.loads(out.read_text())


def test_the_nearer_model_has_the_smaller_fid_and_seeds_agree(folders, tmp_path, capsys):
    near, far, again = folders.values()

    report = measured(tmp_path, near, near, "--compare", far, "--seeds", again)

    of_far = measured(tmp_path, far, near)["fid"]
    difference, seeds = report["difference"]["fid"], report["seeds"]["fid"]
    assert difference["value"] == pytest.approx(report["fid"]["value"] - of_far["value"])
    assert difference["low"] < difference["value"] < difference["high"] < 0
    assert report["fid"].keys() == difference.keys() == {"value", "low", "high"}
    assert seeds["values"][0] == report["fid"]["value"]
    assert seeds["deviation"] < abs(difference["value"])
    printed = capsys.readouterr().out
    assert "over 2 seeds" in printed and "difference" in printed


def test_the_difference_of_a_folder_and_itself_is_0_without_doubt(folders, tmp_path):
    far = folders["far"]

    difference = measured(tmp_path, far, folders["near"], "--compare", far)["difference"]["fid"]

    assert difference == {"value": 0, "low": 0, "high": 0}


def test_another_number_of_stories_is_refused(folders, tmp_path):
    fewer = write_noisy_results(tmp_path / "fewer", 29)
    with pytest.raises(UserError, match="hold different frames"):
        measured(tmp_path, folders["near"], folders["near"], "--compare", fewer)
    assert not (tmp_path / "report.json").exists()
