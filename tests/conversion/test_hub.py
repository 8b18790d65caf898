"""A source is a folder here or a Hub id; what is neither is said so. Nothing is fetched here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from contextualstory_jax.conversion.hub import locate
from contextualstory_jax.utils.errors import UserError

ID = "sxzheng/ContextualStory-sv-pororo"


@pytest.fixture
def fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of a Hub that has everything in tmp_path/snapshots/abc."""
    calls = []

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        calls.append({"repo_id": repo_id, **arguments})
        return str(tmp_path / "snapshots" / "abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_taken_as_it_is(tmp_path, fetches):
    assert locate(str(tmp_path)) == (tmp_path, {"folder": str(tmp_path)})
    assert not fetches


def test_a_hub_id_is_fetched_at_its_revision(tmp_path, fetches):
    snapshot = tmp_path / "snapshots" / "abc"
    for part in ("unet", "vae", "text_encoder"):
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / "model.safetensors").touch()

    folder, origin = locate(ID, "v1")

    assert folder == snapshot
    assert origin == {"hub": ID, "revision": "v1", "snapshot": "abc"}
    (call,) = fetches
    assert (call["repo_id"], call["revision"]) == (ID, "v1")
    assert "*/*.bin" not in call["allow_patterns"]


def test_pickles_are_fetched_only_where_there_is_nothing_else(fetches):
    locate(ID)

    first, second = fetches
    assert "*/*.bin" in first["ignore_patterns"]
    assert "*/*.bin" in second["allow_patterns"]


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "nowhere", "a/b/c", "~/model"])
def test_a_path_that_is_not_there_is_said_so(source, fetches):
    with pytest.raises(UserError, match=f"no folder {source}, and no Hub id OWNER/NAME"):
        locate(source)
    assert not fetches


def test_a_file_and_a_folder_with_a_revision_are_refused(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="file is a file; give the folder"):
        locate(str(tmp_path / "file"))
    with pytest.raises(UserError, match="--revision is of Hub ids"):
        locate(str(tmp_path), "main")


def test_an_id_that_cannot_be_had_is_named_in_one_line():
    # Tests run with HF_HUB_OFFLINE=1 (conftest.py).
    with pytest.raises(UserError, match="no folder nobody/nothing, and from the Hub") as caught:
        locate("nobody/nothing")

    assert "\n" not in str(caught.value)
