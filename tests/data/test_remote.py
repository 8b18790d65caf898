"""Data at a URL: copied once, each file whole or not at all, and then read as any folder."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data import remote
from contextualstory_jax.data.loader import open_stories
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.testing.published_folders import write_story_folder
from contextualstory_jax.utils.errors import UserError

URL = "memory://bucket/prepared"
FILES = {"index.json": b"{}", "shards/one": b"1" * 1000, "shards/two": b"2" * 2000}


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and a store with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote.local_copy.cache_clear()
    store().rm("/", recursive=True)
    yield
    remote.local_copy.cache_clear()


def store() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("memory")


def upload(**files: bytes) -> None:
    for name, content in {**FILES, **files}.items():
        store().pipe(f"/bucket/prepared/{name}", content)


def copy_anew(url: str = URL) -> Path:
    """As another process would."""
    remote.local_copy.cache_clear()
    return remote.local_copy(url)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are copied from now on."""
    names: list[str] = []
    get_file = MemoryFileSystem.get_file

    def noted(self, path, *args, **options):
        names.append(Path(path).name)
        return get_file(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", noted)
    return names


def refuses(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        copy_anew(url)
    assert "\n" not in str(caught.value)


def test_a_folder_on_this_machine_is_itself():
    assert remote.local_copy("some/where") == Path("some/where")


def test_a_copy_holds_every_file_and_lies_in_the_user_s_cache_folder(tmp_path):
    upload()

    folder = copy_anew()

    assert contents(folder) == FILES
    assert folder.parent == tmp_path / "cache" / "contextualstory_jax" / "data"
    assert folder.name.startswith("prepared-")
    assert copy_anew(f"{URL}/") == folder
    assert copy_anew("memory://bucket") != folder


def test_what_is_there_is_not_copied_again(monkeypatch):
    upload()
    folder, names = copy_anew(), fetched(monkeypatch)

    assert copy_anew() == folder

    assert names == []


def test_a_process_asks_once(monkeypatch):
    upload()
    remote.local_copy(URL)
    store().rm("/bucket", recursive=True)  # as where the network fails

    assert contents(remote.local_copy(URL)) == FILES


def test_what_was_changed_is_copied_again(monkeypatch):
    upload()
    folder = copy_anew()
    (folder / "shards" / "two").write_bytes(b"2")  # cut short
    store().store["/bucket/prepared/index.json"].created = datetime(2000, 1, 1, tzinfo=UTC)
    names = fetched(monkeypatch)

    assert contents(copy_anew()) == FILES

    assert sorted(names) == ["index.json", "two"]


def test_what_is_no_longer_there_goes():
    upload(more=b"more")
    folder = copy_anew()
    (folder / ".one.123").write_bytes(b"of a run that was killed")
    store().rm("/bucket/prepared/more")

    assert contents(copy_anew()) == FILES


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left"),
            "No space left.*; make room, or set XDG",
        ),
        (ConnectionError("lost\nand more"), r"two cannot be copied to .* \(lost\); run again to"),
    ],
)
def test_a_copy_that_fails_keeps_whole_files_and_goes_on(monkeypatch, failure, message):
    upload()
    get_file = MemoryFileSystem.get_file

    def fail(self, path, local, **options):
        if path.endswith("two"):
            Path(local).write_bytes(b"2" * 100)
            raise failure
        get_file(self, path, local, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", fail)
        patch.setattr(remote, "AT_ONCE", 1)
        refuses(URL, message)
    folder = next(p for p in remote_folders() if p.is_dir())
    assert contents(folder) == {name: FILES[name] for name in ("index.json", "shards/one")}
    names = fetched(monkeypatch)

    assert contents(copy_anew()) == FILES

    assert names == ["two"]


def remote_folders() -> list[Path]:
    return list(Path(os.environ["XDG_CACHE_HOME"]).glob("contextualstory_jax/data/*"))


def test_a_file_that_arrives_short_is_refused(monkeypatch):
    upload()
    monkeypatch.setattr(
        MemoryFileSystem, "get_file", lambda _, path, local, **__: Path(local).write_bytes(b"")
    )

    refuses(URL, "prepared/.* was cut short; run again to resume")

    assert [p for folder in remote_folders() for p in folder.rglob("*") if p.is_file()] == []


def test_a_disk_without_room_is_refused_beforehand(monkeypatch):
    upload()
    usage = remote.shutil.disk_usage(".")._replace(free=3000)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage)

    refuses(URL, "the copy of memory.* needs 0.0 GB more, and its disk has 0.0 GB left; make room")


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    upload()
    (tmp_path / "cache").write_text("a file")

    refuses(URL, "cannot write .*prepared-.*: Not a directory; make room, or set XDG_CACHE_HOME")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/lost", "there is nothing at memory://bucket/lost; check the names"),
        ("file:///lost/bucket", "there is nothing at file:///lost/bucket; check the names of buck"),
        ("memory://bucket/prepared/index.json", "index.json is a file; name the folder that it"),
        ("nowhere://bucket", "^nowhere://bucket cannot be read .*nowhere.*; check the name, the n"),
    ],
)
def test_what_is_no_folder_is_refused(url, message):
    upload()

    refuses(url, message)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)

    refuses(
        "gs://bucket/prepared",
        r"^gs://bucket/prepared cannot be read .*gcsfs.*: pip install '.*\[gcs\]'$",
    )


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    upload()
    item = store().store["/bucket/prepared/index.json"]
    store().store["/bucket/prepared/../../evil"] = item

    refuses(URL, "the id '../../evil' leads out of the dataset's folder")


COPY = """
import sys
from contextualstory_jax.data.remote import local_copy
print(local_copy(sys.argv[1]))
"""


def test_processes_that_copy_at_once_have_the_same_files(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    command = [sys.executable, "-c", COPY, f"file://{tmp_path}/bucket"]

    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]

    folders = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(folders) == 1
    assert contents(Path(folders.pop())) == FILES


def test_prepared_stories_at_a_url_are_those_of_the_folder(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from contextualstory_jax.data.preparation import prepare

    config = DataConfig(name="folder", root=str(write_story_folder(tmp_path / "published")))
    prepare(config, tmp_path / "shards", 16)
    store().put(str(tmp_path / "shards"), "/bucket/prepared", recursive=True)
    here, there = (
        open_stories(dataclasses.replace(config, root=root), "train", 16)
        for root in (str(tmp_path / "shards"), URL)
    )

    assert isinstance(there, PreparedSource) and len(there) == len(here)
    for number in range(len(here)):
        np.testing.assert_array_equal(there[number].images, here[number].images)
        assert there[number].sentences == here[number].sentences
