"""Models by name: converted once, then found without conversion and without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from contextualstory_jax import StoryPipeline, UserError
from contextualstory_jax.sampling import pretrained
from contextualstory_jax.sampling.pretrained import SHIPPED, find_checkpoint
from contextualstory_jax.testing import released_folders

ID = "sxzheng/ContextualStory-sv-pororo"
SENTENCES = ("A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps.")
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the released layout."""
    return released_folders.tiny_folder(tmp_path_factory.mktemp("released") / "model")


class Hub:
    """A Hub that holds one model; `online` says whether it answers."""

    def __init__(self, folder: Path, snapshots: Path):
        self.folder, self.snapshots, self.online = folder, snapshots, True
        self.fetched: list[str] = []

    def model_info(self, repo_id: str, revision: str | None, **_: Any) -> SimpleNamespace:
        if not self.online or repo_id != ID:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=COMMITS[revision or "main"])

    def snapshot_download(self, repo_id: str, revision: str | None, **_: Any) -> str:
        commit = self.model_info(repo_id, revision).sha
        self.fetched.append(commit)
        return shutil.copytree(self.folder, self.snapshots / commit, dirs_exist_ok=True)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(folder, tmp_path / "snapshots")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", stand_in.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return stand_in


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The output folders of conversions."""
    outputs: list[Path] = []
    convert = pretrained.import_released

    def count(source: Path, output: Path, **words: Any) -> Any:
        outputs.append(output)
        return convert(source, output, **words)

    monkeypatch.setattr(pretrained, "import_released", count)
    return outputs


def test_without_a_name_it_is_the_model_that_ships():
    assert find_checkpoint() == SHIPPED


def test_a_checkpoint_folder_is_taken_as_it_is(tiny_checkpoint, conversions):
    assert find_checkpoint(tiny_checkpoint) == tiny_checkpoint
    assert find_checkpoint(str(tiny_checkpoint)) == tiny_checkpoint
    assert not conversions


def test_a_commit_is_converted_once_and_found_again_offline(
    hub, conversions, tmp_path, monkeypatch
):
    first = find_checkpoint(ID)
    shutil.rmtree(hub.snapshots)  # the Hub's own cache is not needed any more
    again = find_checkpoint(ID)
    monkeypatch.setitem(COMMITS, "main", COMMITS["v1"])  # someone pushes
    pushed = find_checkpoint(ID)
    hub.online = False
    offline = find_checkpoint(ID)

    models = tmp_path / "cache" / "contextualstory_jax" / "models"
    assert first == models / "sxzheng--ContextualStory-sv-pororo" / ("a" * 40)
    assert first == again != pushed == offline
    assert hub.fetched == [first.name, pushed.name]
    assert conversions == [first, pushed]


def test_a_released_folder_is_converted_again_when_it_changes(folder, conversions, tmp_path):
    source = shutil.copytree(folder, tmp_path / "model")
    first, again = (find_checkpoint(source, cache_dir=tmp_path / "cache") for _ in range(2))
    released_folders.change_weights(source, "unet", lambda weights: None)
    changed = find_checkpoint(source, cache_dir=tmp_path / "cache")

    assert first == again != changed
    assert conversions == [first, changed]


def test_a_conversion_that_fails_leaves_nothing(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "model")
    released_folders.change_weights(source, "unet", lambda weights: weights.pop("conv_in.weight"))

    with pytest.raises(UserError, match="conv_in.weight: missing"):
        find_checkpoint(source, cache_dir=tmp_path / "cache")

    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in left] in ([], [".lock"])


def test_a_pipeline_comes_from_the_hub(hub, folder, tmp_path):
    pipeline = StoryPipeline.from_pretrained(ID, dtype="bfloat16", cache_dir=tmp_path / "other")

    kernel = pipeline.params["unet"]["conv_in.kernel"]
    stored = released_folders.read_weights(folder, "unet")["conv_in.weight"]
    assert kernel.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(kernel, np.float32), stored.transpose(2, 3, 1, 0), 1e-2)
    assert (tmp_path / "other").is_dir() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("nowhere", None, "no folder nowhere, and no Hub id OWNER/NAME"),
        ("../up/model", None, "no folder ../up/model, and no Hub id OWNER/NAME"),
        ("nobody/nothing", None, r"from the Hub it cannot be had \(no network\)"),
        (".", "main", "revision is for Hub ids, and . is a folder"),
        (None, "main", "revision is for Hub ids"),
        (".", None, "is not a checkpoint folder: model.json is missing"),
    ],
)
def test_names_of_nothing_are_refused(hub, tmp_path, monkeypatch, name, revision, message):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=message):
        StoryPipeline.from_pretrained(name, revision=revision)

    assert not (tmp_path / "cache").exists()
