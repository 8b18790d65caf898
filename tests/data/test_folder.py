"""Stories of one's own: a `stories.jsonl` and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.example import FrameLabels
from contextualstory_jax.data.folder import FolderSource
from contextualstory_jax.data.sources import open_source
from contextualstory_jax.data.validation import problems
from contextualstory_jax.testing.published_folders import picture, save_png, write_story_folder
from contextualstory_jax.utils.errors import UserError

STORY = {
    "id": "a picnic/1",
    "sentences": [" Mia packs.", "She walks.", "She sits.", "She eats.", "She naps."],
    "frames": ["a.png", "pictures/b.png", "c.png", "c.png", "c.png"],
}


def write(root: Path, *stories: object) -> Path:
    lines = [story if isinstance(story, str) else json.dumps(story) for story in stories]
    (root / "stories.jsonl").write_text("\n".join(lines))
    for frame in STORY["frames"]:
        save_png(root / frame, picture(frame, 16))
    return root


def refusal(root: Path, split: str = "train") -> str:
    """The one line by which a folder is refused."""
    with pytest.raises(UserError) as caught:
        FolderSource(root, split, 16)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_story_is_read_as_written(tmp_path):
    source = FolderSource(write(tmp_path, STORY, ""), "train", 16)
    record, example = source.story(0), source[0]
    assert (len(source), source.counts) == (1, {"train": 1, "val": 0, "test": 0})
    assert record.story_id == example.story_id == "a_picnic-1"
    assert record.source_id == "a picnic/1"
    assert record.frame_ids[4] == "a_picnic-1-4" and record.source_frame_ids[1] == "pictures/b.png"
    assert example.sentences == ("Mia packs.", "She walks.", "She sits.", "She eats.", "She naps.")
    assert example.labels is None
    for frame, image in zip(STORY["frames"], example.images, strict=True):
        np.testing.assert_array_equal(image, picture(frame, 16))


def test_labels_and_splits(tmp_path):
    labelled = STORY | {"characters": [["mia"], [], ["mia", "otto"], [], []], "split": "test"}
    scenes = ["home", None, "meadow", "meadow", "meadow"]
    write(tmp_path, STORY, labelled | {"scene": scenes}, labelled | {"scene": "meadow"}, labelled)
    source = FolderSource(tmp_path, "test", 16)
    assert source.counts == {"train": 1, "val": 0, "test": 3}
    by_frame, by_story, without = (source.story(i).labels for i in range(3))
    assert by_frame is not None and by_story is not None and without is not None
    assert by_frame[:2] == (FrameLabels(frozenset({"mia"}), "home"), FrameLabels(frozenset()))
    assert by_story[2] == FrameLabels(frozenset({"mia", "otto"}), "meadow")
    assert without[2] == FrameLabels(frozenset({"mia", "otto"}))


def test_pictures_of_any_shape_are_cut_to_squares(tmp_path):
    write(tmp_path, STORY)
    wide = np.concatenate([np.full((8, 4, 3), shade, np.uint8) for shade in (0, 100, 200)], axis=1)
    save_png(tmp_path / "a.png", wide)
    image = FolderSource(tmp_path, "train", 8)[0].images[0]
    np.testing.assert_array_equal(image, wide[:, 2:10])


def test_a_written_folder_has_its_counts(tmp_path):
    write_story_folder(tmp_path, counts={"train": 2, "test": 1})
    for split, count in {"train": 2, "test": 1}.items():
        source = open_source(DataConfig(name="folder"), tmp_path, split, 16)
        assert len(source) == count and list(problems(source, len)) == []


def test_a_folder_without_stories_is_refused(tmp_path):
    assert "looked for stories.jsonl; found none of them" in refusal(tmp_path)


def test_an_empty_split_is_refused(tmp_path):
    message = refusal(write(tmp_path, STORY), "val")
    assert message.endswith("stories in each split are: train 1, val 0, test 0")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        (STORY | {"caption": "x"}, "unknown key ['caption']"),
        (STORY | {"id": 3}, "needs an id, a string"),
        (STORY | {"id": ""}, "cannot name a file"),
        (STORY | {"id": "x" * 201}, "cannot name a file"),
        (STORY | {"split": "dev"}, "split must be one of train, val, test; got 'dev'"),
        (STORY | {"sentences": ["One."]}, "needs sentences, a list of 5 strings"),
        (STORY | {"sentences": [*STORY["sentences"][:4], " "]}, "needs sentences"),
        (STORY | {"sentences": [*STORY["sentences"][:4], "\ud800"]}, "not all Unicode text"),
        (STORY | {"frames": None}, "needs frames, a list of 5 strings"),
        (STORY | {"frames": [*STORY["frames"][:4], 7]}, "needs frames"),
        (STORY | {"characters": [["mia"]] * 4}, "characters must be 5 lists"),
        (STORY | {"characters": "abcde"}, "characters must be 5 lists"),
        (STORY | {"characters": [["mia"]] * 4 + [[1]]}, "characters must be 5 lists"),
        (STORY | {"characters": [[]] * 5, "scene": ["x"]}, "scene a name or 5"),
        (STORY | {"characters": [[]] * 5, "scene": 5}, "scene a name or 5"),
        (STORY | {"scene": "meadow"}, "a scene without characters"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
    refused = refusal(write(tmp_path, STORY, "", line))
    assert "stories.jsonl:3" in refused and message in refused


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "stories.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refusal(tmp_path)


def test_problems_are_all_found(tmp_path):
    write(tmp_path, STORY, STORY | {"id": "a picnic-1"})
    (tmp_path / "a.png").unlink()
    (tmp_path / "c.png").write_text("no picture")
    source = FolderSource(tmp_path, "train", 16)
    findings = list(problems(source, lambda caption: 78))
    found = [(finding.kind, finding.story) for finding in findings]
    assert found == [
        ("missing image", 0),
        ("unreadable image", 0),
        *[("long caption", 0)] * 5,
        ("duplicate id", 1),
    ]
    assert findings[-1].message == "stories 0 and 1 are both 'a picnic-1'"
