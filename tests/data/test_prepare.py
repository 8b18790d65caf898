"""Preparing datasets: the same stories as the published folder, whole or not at all, resumable."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data import candidates, preparation
from contextualstory_jax.data.loader import open_stories
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.testing.published_folders import (
    picture,
    save_object,
    save_png,
    write_flintstones,
    write_pororo,
    write_story_folder,
)
from contextualstory_jax.utils.errors import UserError

SIZE = 16
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "contextualstory_jax", "prepare"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def few_files_a_shard(monkeypatch) -> None:
    monkeypatch.setattr(preparation, "FILES_PER_SHARD", 4)


def prepare(config: DataConfig, out: Path, **options) -> preparation.Report:
    return preparation.prepare(config, out, SIZE, **options)


def published(name: str, folder: Path, **settings) -> DataConfig:
    """A small dataset in the published layout."""
    write = {"pororo": write_pororo, "flintstones": write_flintstones, "folder": write_story_folder}
    options = {"strips": True} if settings.get("captions") == "original" else {}
    return DataConfig(name=name, root=str(write[name](folder, **options)), **settings)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


def assert_same_stories(prepared: StorySource, original: StorySource) -> None:
    assert len(prepared) == len(original)
    assert prepared.counts == {k: n for k, n in original.counts.items() if n}
    for number in range(len(original)):
        for epoch in range(3):
            ours, theirs = prepared.example(number, epoch), original.example(number, epoch)
            np.testing.assert_array_equal(ours.images, theirs.images)
            for field in ("sentences", "frame_ids", "story_id", "labels"):
                assert getattr(ours, field) == getattr(theirs, field)
        ours, theirs = prepared.story(number), original.story(number)
        assert dataclasses.replace(ours, paths=theirs.paths) == theirs


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("*.array_record-*")}


CASES = [
    {"name": "pororo"},
    {"name": "pororo", "captions": "original", "seed": 7},
    {"name": "flintstones", "split_policy": "strict"},
    {"name": "folder"},
    {"name": "folder", "split_policy": "strict"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_prepared_stories_are_the_published_folder_s(case, tmp_path, few_files_a_shard):
    config = published(folder=tmp_path / "source", **case)

    report = prepare(config, tmp_path / "out")

    assert report.complete and report.findings == ()
    assert report.kept == report.found
    prepared = dataclasses.replace(config, root=str(tmp_path / "out"))
    for split in report.found:
        source = open_stories(prepared, split, SIZE)
        assert isinstance(source, PreparedSource)
        assert_same_stories(source, open_stories(config, split, SIZE))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_frame_s_pictures_are_all_kept_and_stored_once(tmp_path):
    config = published("flintstones", tmp_path / "source")
    source = open_stories(config, "train", SIZE)
    assert isinstance(source, StorySource)

    report = prepare(config, tmp_path / "out")

    clips = {
        path
        for split in report.found
        for number in range(report.found[split])
        for path in open_stories(config, split, SIZE).story(number).paths
    }
    assert report.pictures == sum(len(np.load(path)) for path in clips)
    chosen = {source.example(0, epoch).images.tobytes() for epoch in range(20)}
    prepared = PreparedSource(tmp_path / "out", "train", SIZE)
    assert {prepared.example(0, epoch).images.tobytes() for epoch in range(20)} == chosen
    assert len(chosen) > 5


def test_several_processes_write_the_same_shards(tmp_path, few_files_a_shard):
    config = published("flintstones", tmp_path / "source")

    prepare(config, tmp_path / "by_two", workers=2)
    prepare(config, tmp_path / "by_one")

    by_two, by_one = (shards(tmp_path / name / "pictures") for name in ("by_two", "by_one"))
    assert len(by_one) > 2
    assert by_two == by_one


def test_tensorflow_datasets_reads_a_prepared_folder_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    report = prepare(published("pororo", tmp_path / "source"), tmp_path / "out")

    pictures, stories = (
        tfds.builder_from_directory(tmp_path / "out" / kind) for kind in ("pictures", "stories")
    )

    assert pictures.name == stories.name == "pororo_sv"
    assert len(pictures.as_data_source("pictures")) == report.pictures
    kept = {split: len(stories.as_data_source(split)) for split in stories.info.splits}
    assert kept == report.kept
    assert "tensorflow" not in sys.modules


def test_a_picture_is_serialized_as_tensorflow_datasets_does():
    pytest.importorskip("tensorflow_datasets")
    from contextualstory_jax.data.tfds_builders import _features, picture_serializer

    features, pixels = _features("pictures", SIZE), picture("somewhere", SIZE)

    record = picture_serializer(features, SIZE)(pixels)

    assert record == features.serialize_example({"picture": pixels})


def test_a_pickled_source_is_small_and_reads_the_same(tmp_path):
    prepare(published("folder", tmp_path / "source"), tmp_path / "out")
    source = PreparedSource(tmp_path / "out", "test", SIZE)

    pickled = pickle.dumps(source)

    assert len(pickled) < 1000
    assert_same_stories(pickle.loads(pickled), source)


# ------------------------------------------------------------------------------ what is broken


def break_pororo(root: Path) -> Path:
    """Break two pictures of one training story, and make captions of another two too long."""
    write_pororo(root)
    episode = root / "pororo_png_filtered_blip2/Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep1"
    (episode / "1.png").unlink()
    (episode / "2.png").write_bytes((episode / "2.png").read_bytes()[:50])
    captions = np.load(root / "descriptions_blip2.npy", allow_pickle=True).item()
    captions["Pororo_ENGLISH1_2/Pororo_ENGLISH1_2_ep1/8"] = ["very " * 80 + "long."]
    save_object(root / "descriptions_blip2.npy", captions)
    return root


def test_what_is_wrong_is_reported_and_nothing_appears(tmp_path):
    config = DataConfig(name="pororo", root=str(break_pororo(tmp_path / "source")))

    report = prepare(config, tmp_path / "out")

    assert not report.complete
    assert sorted(finding.kind for finding in report.findings) == [
        "long caption",
        "missing image",
        "unreadable image",
    ]
    lines = str(report).splitlines()
    assert any("ep1/1.png" in line and line.startswith("missing image: ") for line in lines)
    assert any("ep1/2.png" in line and line.startswith("unreadable image: ") for line in lines)
    assert lines[-1].startswith("problems: 1 ")
    assert not (tmp_path / "out").exists()


def test_broken_stories_are_left_out_if_so_told(tmp_path):
    config = DataConfig(name="pororo", root=str(break_pororo(tmp_path / "source")))

    report = prepare(config, tmp_path / "out", skip_broken=True)

    assert report.complete
    assert len(report.findings) == 3
    broken = {f"Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep1/{n}" for n in (1, 2)}
    for split in ("train", "val", "test"):
        original = open_stories(config, split, SIZE)
        assert isinstance(original, StorySource)
        stories = [original.story(i) for i in range(len(original))]
        whole = [s.story_id for s in stories if broken.isdisjoint(s.source_frame_ids)]
        prepared = PreparedSource(tmp_path / "out", split, SIZE)
        assert [prepared.story(i).story_id for i in range(len(prepared))] == whole
        assert report.kept[split] == len(whole)
        for number in range(len(prepared)):
            prepared.example(number)
    assert report.kept["train"] < report.found["train"]


def test_of_two_stories_with_one_id_the_second_is_left_out(tmp_path):
    root = write_story_folder(tmp_path / "source")
    lines = (root / "stories.jsonl").read_text().splitlines()
    (root / "stories.jsonl").write_text("\n".join([*lines, lines[1].replace("counts", "adds")]))
    config = DataConfig(name="folder", root=str(root))

    report = prepare(config, tmp_path / "out", skip_broken=True)

    assert [finding.kind for finding in report.findings] == ["duplicate id"]
    assert (report.found["train"], report.kept["train"]) == (4, 3)
    prepared = PreparedSource(tmp_path / "out", "train", SIZE)
    assert "counts" in prepared.story(1).sentences[0]


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [("a cat", 4), ("It's 10 o'clock...", 10), ("", 2), ("snow_man", 5), ("éléphant", 3)],
)
def test_tokens_are_counted_from_below_by_words_digits_and_signs(sentence, tokens):
    assert preparation.least_tokens(sentence) == tokens


def test_a_dataset_without_one_whole_story_is_refused(tmp_path):
    root = write_story_folder(tmp_path / "source", counts={"train": 1})
    (root / "pictures" / "train-0-2.png").unlink()

    with pytest.raises(UserError, match="^no story in .*source has all its images$"):
        prepare(DataConfig(name="folder", root=str(root)), tmp_path / "out", skip_broken=True)

    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ going on


class Stop(Exception):
    pass


def stop_after(files: int):
    def progress(done: int, total: int) -> None:
        if done >= files:
            raise Stop

    return progress


def written(monkeypatch) -> list[Path]:
    """The files with pictures that shards read from now on."""
    files: list[Path] = []
    read_one = candidates.read_one
    monkeypatch.setattr(
        candidates, "read_one", lambda path: (files.append(path), read_one(path))[1]
    )
    return files


def test_a_stopped_run_goes_on_where_it_was(tmp_path, few_files_a_shard, monkeypatch):
    config = published("pororo", tmp_path / "source")
    whole = prepare(config, tmp_path / "whole")
    with pytest.raises(Stop):
        prepare(config, tmp_path / "out", progress=stop_after(8))
    assert not (tmp_path / "out").exists()
    read = written(monkeypatch)

    report = prepare(config, tmp_path / "out")

    assert report == whole
    assert len(read) == whole.pictures - 8
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("change", ["size", "captions", "stories"])
def test_what_was_begun_otherwise_is_begun_anew(tmp_path, few_files_a_shard, change):
    root = write_pororo(tmp_path / "source", strips=True)
    config, size = DataConfig(name="pororo", root=str(root)), SIZE
    with pytest.raises(Stop):
        prepare(config, tmp_path / "out", progress=stop_after(8))
    if change == "size":
        size = 8
    elif change == "captions":
        config = dataclasses.replace(config, captions="original")
    else:
        parts = np.load(root / "train_seen_unseen_ids.npy", allow_pickle=True)
        parts[0] = parts[0][:1]
        np.save(root / "train_seen_unseen_ids.npy", parts)

    preparation.prepare(config, tmp_path / "out", size)

    prepared = dataclasses.replace(config, root=str(tmp_path / "out"))
    assert_same_stories(open_stories(prepared, "train", size), open_stories(config, "train", size))


def test_a_mended_picture_is_read_again_and_only_its_shard(
    tmp_path, few_files_a_shard, monkeypatch
):
    root = break_pororo(tmp_path / "source")
    config = DataConfig(name="pororo", root=str(root))
    prepare(config, tmp_path / "out")
    for number in (1, 2):
        frame = f"Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep1/{number}"
        save_png(root / "pororo_png_filtered_blip2" / f"{frame}.png", picture(frame, SIZE))
    read = written(monkeypatch)

    report = prepare(config, tmp_path / "out", skip_broken=True)

    assert [finding.kind for finding in report.findings] == ["long caption"]
    assert report.kept == report.found
    assert len(read) <= 8


@pytest.mark.slow
def test_a_run_that_is_killed_ends_its_processes_and_goes_on(tmp_path):
    root, out = write_story_folder(tmp_path / "source", counts={"train": 300}), tmp_path / "out"
    arguments = ["folder", "--source", str(root), "--out", str(out), "--size", "128"]
    run = subprocess.Popen([*COMMAND, *arguments, "--workers", "2"], cwd=ROOT, env=ENVIRONMENT)
    notes = tmp_path / "out.partial" / "notes"
    while not (notes.exists() and any(notes.iterdir())) and run.poll() is None:
        time.sleep(0.01)
    processes = psutil.Process(run.pid).children(recursive=True)

    run.kill()
    run.wait()

    assert len(processes) >= 2
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert not out.exists()
    assert run_command(*arguments, "--workers", "2").returncode == 0
    preparation.prepare(DataConfig(name="folder", root=str(root)), tmp_path / "whole", 128)
    for name, shard in shards(out / "pictures").items():
        assert shards(tmp_path / "whole")[name] == shard
    ours, theirs = (PreparedSource(f, "train", 128) for f in (out, tmp_path / "whole"))
    stories = ([source.story(i).frame_ids for i in range(300)] for source in (ours, theirs))
    assert next(stories) == next(stories)


def test_a_disk_that_fills_up_is_one_error_and_the_run_goes_on_after(tmp_path, few_files_a_shard):
    config = published("folder", tmp_path / "source")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes a file
    try:
        with pytest.raises(UserError, match="^cannot write .*array_record.*; make room") as caught:
            prepare(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()

    assert prepare(config, tmp_path / "out").complete


def test_two_runs_do_not_write_one_folder(tmp_path):
    config = published("folder", tmp_path / "source")

    def second_run(done: int, total: int) -> None:
        with pytest.raises(UserError, match="^another run is writing .*out.partial; wait"):
            prepare(config, tmp_path / "out")

    assert prepare(config, tmp_path / "out", progress=second_run).complete


# ------------------------------------------------------------------------------ bad input


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    config = published("folder", tmp_path / "source")

    with pytest.raises(UserError, match="^.*source is there already; delete it"):
        prepare(config, tmp_path / "source")


def test_a_split_without_stories_is_not_there(tmp_path):
    prepare(published("folder", tmp_path / "source"), tmp_path / "out")

    with pytest.raises(UserError, match="^the split 'val' has no stories; .*: train 3, test 1"):
        PreparedSource(tmp_path / "out", "val", SIZE)


def test_another_size_is_asked_for(tmp_path):
    prepare(published("folder", tmp_path / "source"), tmp_path / "out")

    with pytest.raises(UserError, match="^.*out holds images of 16 pixels, and 32 are asked for"):
        PreparedSource(tmp_path / "out", "train", 32)


@pytest.mark.parametrize(
    ("key", "value"), [("name", "pororo"), ("split_policy", "strict"), ("captions", "original")]
)
def test_a_recipe_with_other_settings_is_refused(tmp_path, key, value):
    config = published("folder", tmp_path / "source")
    prepare(config, tmp_path / "out")
    config = dataclasses.replace(config, root=str(tmp_path / "out"), **{key: value})

    with pytest.raises(UserError, match=f"^.*out was prepared with {key} = .* data.{key} = "):
        open_stories(config, "train", SIZE)


def damage(out: Path, kind: str) -> str:
    """Damage a prepared dataset, and return what its error says."""
    pictures = out / "pictures"
    last = sorted(pictures.glob("*.array_record-*"))[-1]
    content = last.read_bytes()
    if kind == "cut short":
        last.write_bytes(content[: len(content) // 2])
        return f"^the shard .*{last.name} is damaged; prepare the dataset again$"
    if kind == "missing":
        last.unlink()
        return f"^cannot read .*{last.name}: No such file.*; prepare the dataset again$"
    if kind == "no pictures":
        (pictures / "dataset_info.json").unlink()
        return "^cannot read .*pictures/dataset_info.json: .*; prepare the dataset again$"
    (out / "stories" / "features.json").write_text("{")
    return "^.*stories is no prepared dataset; prepare it again$"


@pytest.mark.parametrize("kind", ["cut short", "missing", "no pictures", "broken features"])
def test_damage_is_named_when_a_dataset_is_opened(tmp_path, few_files_a_shard, kind):
    prepare(published("folder", tmp_path / "source"), tmp_path / "out")
    message = damage(tmp_path / "out", kind)

    with pytest.raises(UserError, match=message) as caught:
        PreparedSource(tmp_path / "out", "train", SIZE)

    assert "\n" not in str(caught.value)


def test_damage_inside_a_shard_is_named_when_it_is_read(tmp_path):
    prepare(published("folder", tmp_path / "source"), tmp_path / "out")
    (shard,) = (tmp_path / "out" / "pictures").glob("*.array_record-*")
    content = bytearray(shard.read_bytes())
    content[200:40000] = bytes(39800)
    shard.write_bytes(content)

    with pytest.raises(
        UserError, match="^a shard in .*out is damaged .*; prepare the dataset again"
    ):
        PreparedSource(tmp_path / "out", "train", SIZE)[0]


# ------------------------------------------------------------------------------ the command


def test_the_command_reports_and_ends_with_status_2_unless_told_to_skip(tmp_path):
    root, out = break_pororo(tmp_path / "source"), tmp_path / "out"
    arguments = ["pororo", "--source", str(root), "--out", str(out), "--size", "16"]
    arguments += ["--workers", "1"]

    refused = run_command(*arguments)
    skipped = run_command(*arguments, "--skip-broken")

    assert refused.returncode == 2
    assert "\nstories: train 6 of 8, val 3 of 4, test 3; images: 28\n" in refused.stdout
    assert refused.stderr.splitlines()[-1].startswith("error: 2 problems, listed above; fix them")
    assert skipped.returncode == 0
    assert skipped.stdout.splitlines()[-1] == (
        f"{out} is ready: train with --config.data.root={out}"
    )
    assert json.loads((out / "stories" / "metadata.json").read_text())["size"] == 16
