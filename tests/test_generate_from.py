"""Stories that are generated again: the same bytes, or with some of their frames changed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax import UserError, generate
from contextualstory_jax.sampling import export_formats, saved_story
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.sampling.prompts import fit_image
from contextualstory_jax.sampling.saved_story import SavedStory

SENTENCES = ("A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps.")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def frames(folder: Path) -> list[bytes]:
    return [(folder / f"frame_{i}.png").read_bytes() for i in range(5)]


def different(one: Path, other: Path) -> list[int]:
    """Frames whose pixels differ."""
    a, b = (SavedStory.read(folder).images for folder in (one, other))
    return [i for i in range(5) if not np.array_equal(a[i], b[i])]


def edit(path: Path, **values: Any) -> None:
    """Change values of a JSON file, and values of its mappings."""
    stored = json.loads(path.read_text())
    for key, value in values.items():
        stored[key] = stored[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(stored))


@pytest.fixture(scope="module", autouse=True)
def shared_pipelines() -> Iterator[None]:
    """A checkpoint is loaded once for all tests, and its programs compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        load = functools.cache(StoryPipeline.load)
        patch.setattr(StoryPipeline, "load", lambda folder, **_: load(folder))
        yield


@pytest.fixture(scope="module")
def saved(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a story with seed 3."""
    out = tmp_path_factory.mktemp("saved")
    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(out), "--seed", "3", "--storyflow"]
        + ["1,2,3,4", "--negative-prompt", "A dog.", "--sentence", *SENTENCES]
    )
    return out / "story"


@pytest.fixture
def change(saved, tmp_path):
    """Generate from the saved story; returns the new one's folder."""

    def change(*arguments: str, source: Path = saved, out: str = "out") -> Path:
        generate.main(["--from", str(source), "--out", str(tmp_path / out), *arguments])
        return tmp_path / out / "story"

    return change


def test_without_changes_the_same_bytes_are_generated(saved, change):
    assert files(change()) == files(saved)


def test_kept_frames_keep_their_bytes_and_the_others_change(saved, change):
    again = change("--keep", "0,1,3,4", "--seed", "5")

    assert different(saved, again) == [2]
    assert [a == b for a, b in zip(frames(saved), frames(again), strict=True)] == [1, 1, 0, 1, 1]
    story = SavedStory.read(again)
    assert story.seeds == (3, 3, 5, 3, 3)
    assert story.settings["kept"] == [0, 1, 3, 4]
    assert story.settings["storyflow"] == [1, 2, 3, 4]
    assert story.settings["negative_prompt"] == "A dog."
    assert files(change(source=again, out="again")) == files(again)


def test_a_changed_sentence_changes_its_frame_alone(saved, change):
    again = change("--sentence-at", "1", " It flies. ", "--sentence-at", "4", "It waits.")

    assert different(saved, again) == [1, 4]
    story = SavedStory.read(again)
    assert story.story.sentences == (SENTENCES[0], "It flies.", *SENTENCES[2:4], "It waits.")
    assert story.seeds == (3,) * 5


def test_another_seed_alone_changes_all_frames(saved, change):
    assert different(saved, change("--seed", "4")) == [0, 1, 2, 3, 4]


def test_an_own_image_stays_and_the_others_are_generated_to_fit_it(saved, change, tmp_path):
    own = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(own).save(tmp_path / "own.png")

    with_own = change("--frame-at", "1", str(tmp_path / "own.png"), "--seed", "4")

    story = SavedStory.read(with_own)
    np.testing.assert_array_equal(story.images[1], fit_image(own, 16, 16))
    assert different(saved, with_own) == [0, 1, 2, 3, 4]
    assert story.seeds == (4, None, 4, 4, 4)
    assert files(change(source=with_own, out="again")) == files(with_own)
    # With another seed it stays too.
    other = SavedStory.read(change("--seed", "9", source=with_own, out="other"))
    np.testing.assert_array_equal(other.images[1], story.images[1])
    assert other.seeds == (9, None, 9, 9, 9)


def test_a_new_story_may_hold_an_own_image(tiny_checkpoint, saved, tmp_path):
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "own.png")

    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path), "--seed", "3", "--sentence"]
        + [*SENTENCES, "--frame-at", "4", str(tmp_path / "own.png"), "--storyflow", "1,2,3,4"]
    )

    story = SavedStory.read(tmp_path / "story")
    assert np.all(story.images[4] == (0, 128, 128))
    assert story.seeds == (3, 3, 3, 3, None)


def test_candidates_are_what_their_seeds_give(saved, change, tmp_path):
    keep = ["--keep", "0,1,3,4"]
    change(*keep, "--seed", "5", "--candidates", "2")

    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("candidates.png", "candidate_0", "candidate_1", "stories.json")
    }
    stories = [SavedStory.read(out / f"candidate_{i}") for i in range(2)]
    assert [story.seeds[2] for story in stories] == [5, 6]
    assert different(out / "candidate_0", out / "candidate_1") == [2]
    alone = SavedStory.read(change(*keep, "--seed", "6", out="alone"))
    # Of another batch size, so not bit for bit.
    assert np.max(np.abs(alone.images.astype(int) - stories[1].images)) <= 1
    summary = json.loads((out / "stories.json").read_text())
    assert [story["folder"] for story in summary["stories"]] == ["candidate_0", "candidate_1"]
    # It is generated again in a batch of that size, and so it is.
    again = change(source=out / "candidate_1", out="again")
    assert files(again) == files(out / "candidate_1")


def test_without_a_place_the_story_itself_is_replaced(saved, change):
    copy = change()
    summary = (copy.parent / "stories.json").read_bytes()
    (copy / "notes.txt").write_text("mine")

    generate.main(["--from", str(copy), "--sentence-at", "0", "A dog sits.", "--format", "pdf"])

    assert different(saved, copy) == [0]
    assert (copy / "notes.txt").read_text() == "mine"
    assert (copy / "story.pdf").read_bytes().startswith(b"%PDF")
    assert (copy.parent / "stories.json").read_bytes() == summary


def test_near_frames_are_nearer(saved, change):
    arguments = ["--keep", "0,1,3,4", "--seed", "5"]
    near = change(*arguments, "--near", out="near")

    old, far, new = (
        SavedStory.read(folder).images[2].astype(int)
        for folder in (saved, change(*arguments), near)
    )
    assert 0 < np.mean(np.abs(new - old)) < 0.8 * np.mean(np.abs(far - old))
    assert SavedStory.read(near).settings["shared_noise_seed"] == 3
    assert files(change(source=near, out="again")) == files(near)


def test_a_story_of_a_batch_is_generated_again_in_a_batch_of_that_size(
    tiny_checkpoint, change, tmp_path
):
    lines = [json.dumps({"id": id, "sentences": SENTENCES}) for id in ("story", "b", "c")]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines))
    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "many"), "--batch-size", "2"]
        + ["--stories", str(tmp_path / "stories.jsonl")]
    )

    again = change(source=tmp_path / "many" / "story")

    assert SavedStory.read(again).settings["batch_size"] == 2
    assert files(again) == files(tmp_path / "many" / "story")


def test_a_continuation_keeps_its_first_frame(tiny_continuation_checkpoint, change, tmp_path):
    Image.new("L", (64, 48), 200).save(tmp_path / "first.png")
    generate.main(
        ["--checkpoint", str(tiny_continuation_checkpoint), "--out", str(tmp_path / "first")]
        + ["--sentence", *SENTENCES, "--first-frame", str(tmp_path / "first.png")]
    )
    first = tmp_path / "first" / "story"

    assert files(change(source=first)) == files(first)
    again = change("--keep", "1,2", "--seed", "5", source=first, out="kept")
    assert different(first, again) == [3, 4]
    assert SavedStory.read(again).settings["kept"] == [0, 1, 2]
    with pytest.raises(UserError, match="--frame-at 0: that frame is the first frame"):
        change("--frame-at", "0", str(tmp_path / "first.png"), source=first, out="none")


@pytest.mark.parametrize("near", [False, True])
def test_what_python_regenerates_the_command_generates_again(saved, change, tmp_path, near):
    story = SavedStory.read(saved)
    pipeline = StoryPipeline.load(story.checkpoint["path"])

    pipeline.regenerate(story, [2], seed=5, near=near).write(tmp_path / "python" / "story")

    assert different(saved, tmp_path / "python" / "story") == [2]
    command = change("--keep", "0,1,3,4", "--seed", "5", *["--near"] * near)
    assert files(command) == files(tmp_path / "python" / "story")
    assert files(change(source=command, out="again")) == files(command)


def test_other_versions_are_warned_of(saved, change, monkeypatch, capsys):
    now = saved_story.versions()
    for module in (saved_story, generate):
        monkeypatch.setattr(module, "versions", lambda: now | {"jax": "99"})

    change()

    error = capsys.readouterr().err
    assert f"warning: the story was made with jax {now['jax']}; bytes may differ\n" in error


def test_frames_kept_by_another_model_are_encoded_by_it(saved, change, monkeypatch, capsys):
    copy = change()
    edit(copy / "story.json", checkpoint={"step": 99})

    again = change("--keep", "0,1,3,4", source=copy, out="again")

    assert "warning: the kept frames are of another model" in capsys.readouterr().err
    assert frames(again) == frames(saved)  # of the same seed, and the VAE is lossless
    assert SavedStory.read(again).checkpoint["step"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "7"], "--keep: no frame 7; they are numbered from 0 to 4"),
        (["--keep", "0,1,2,3,4"], "all 5 frames are kept; leave one to generate out of --keep"),
        (["--keep", "0,x"], "argument --keep: '0,x' is not frames with commas between"),
        (["--keep", "0,-1"], "--keep: no frame -1"),
        (["--sentence-at", "5", "A cat."], "--sentence-at: no frame '5'"),
        (["--sentence-at", "x", "A cat."], "--sentence-at: no frame 'x'"),
        (["--sentence-at", "1", " "], "--sentence-at: a sentence is blank"),
        (["--sentence-at", "1", "A" * 10_000], "sentence 1 has 10000 characters; write at most"),
        (["--keep", "0", "--height", "32"], "have 16 x 16 pixels and can be kept at that size"),
        (["--first-frame", "a.png"], "--first-frame goes with --story or --sentence; a story of"),
        (["--story", "a.txt"], "not allowed with argument"),
        (["--candidates", "2"], "--candidates needs --out"),
        (["--candidates", "0"], "--candidates must be at least 1; got 0"),
        (["--format", "mp4"], r"mp4 needs PyAV: pip install 'contextualstory-jax\[studio\]'"),
        (["--seed", "-1"], "must be an integer in"),
    ],
)
def test_bad_changes_are_refused(saved, monkeypatch, arguments, message):
    find = export_formats.importlib.util.find_spec
    monkeypatch.setattr(
        export_formats.importlib.util, "find_spec", lambda n, *a: None if n == "av" else find(n, *a)
    )
    before = files(saved)

    with pytest.raises(UserError, match=message) as caught:
        generate.main(["--from", str(saved), *arguments])

    assert "\n" not in str(caught.value)
    assert files(saved) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "is in format 2, and this version reads up to 1"),
        ({"settings": {"steps": "many"}}, "sampling: steps must be int; got 'many'"),
        ({"settings": {"frameinit": {"method": "box", "level": "x"}}}, "frameinit: level must be"),
        ({"settings": {"batch_size": 0}}, r"settings.batch_size is 0, not in 1..1024"),
        ({"settings": {"kept": [9]}}, "settings.kept: no frame 9"),
        ({"settings": {"kept": 9}}, "settings.kept"),
        ({"settings": {"seed": "x"}}, "settings.seed"),
        ({"settings": {"negative_prompt": 3}}, "story.json: negative_prompt must be"),
        ({"settings": {"storyflow": "x"}}, "story.json: storyflow must be"),
        ({"settings": {"storyflow": [1.0]}}, "storyflow must be 4 finite numbers"),
        ({"settings": {"dtype": "float16"}}, "story.json: dtype must be"),
        ({"settings": {"initial_latents": "a.npy"}}, "began from --initial-latents 'a.npy'; give"),
        ({"checkpoint": {"path": "none"}}, "no folder none, and no Hub id"),
        ({"checkpoint": {"path": 3}}, "story.json: path must be"),
    ],
)
def test_a_story_json_that_was_edited_is_refused(saved, change, values, message):
    copy = change()
    edit(copy / "story.json", **values)

    with pytest.raises(UserError, match=message) as caught:
        change(source=copy, out="again")

    assert "\n" not in str(caught.value)
    assert not (copy.parent.parent / "again").exists()
