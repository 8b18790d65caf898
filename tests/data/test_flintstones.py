"""FlintstonesSV read from its published layout, against story lists worked out by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.flintstones import CHARACTERS, FlintstonesSource
from contextualstory_jax.data.sources import open_source
from contextualstory_jax.data.validation import problems
from contextualstory_jax.testing.published_folders import (
    FLINTSTONES_CLIPS,
    picture,
    save_json,
    write_flintstones,
    write_hostile,
)
from contextualstory_jax.utils.errors import UserError


def clip(season: int, episode: int, shot: int) -> str:
    return f"s_{season:02}_e_{episode:02}_shot_{shot:06}_{shot + 74:06}"


# By hand. The clips written are, of season 1 episode 1: 100 to 600 in train, 700 in val; of episode
# 2: 100 to 500 in val; of season 2 episode 1: 100 to 600 in test, of episode 2: 100 in test. Only
# a clip with four of its episode after it begins a story; the order is that of the split's list.
PUBLISHED = {
    "train": [clip(1, 1, 300), clip(1, 1, 100), clip(1, 1, 200)],
    "val": [clip(1, 2, 100)],
    "test": [clip(2, 1, 200), clip(2, 1, 100)],
}
# The story from 300 on ends with the clip 700, which is val's.
STRICT = PUBLISHED | {"train": [clip(1, 1, 100), clip(1, 1, 200)]}

ANNOTATIONS = "flintstones_annotations_v1-0.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flintstones(tmp_path_factory.mktemp("flintstones"))


def firsts(source: FlintstonesSource) -> list[str]:
    return [source.story(i).source_id for i in range(len(source))]


def refusal(*args) -> str:
    """The one line by which a folder is refused."""
    with pytest.raises(UserError) as caught:
        FlintstonesSource(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("policy", "stories"), [("published", PUBLISHED), ("strict", STRICT)])
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("caches", [True, False])
def test_stories_and_their_order(policy, stories, split, caches, tmp_path):
    write_flintstones(tmp_path, caches=caches)
    source = FlintstonesSource(tmp_path, split, 16, policy=policy)
    assert firsts(source) == stories[split]
    assert source.counts == {name: len(clips) for name, clips in stories.items()}
    for i, first in enumerate(stories[split]):
        season, episode, shot = int(first[2:4]), int(first[7:9]), int(first[15:21])
        expected = tuple(clip(season, episode, shot + 100 * later) for later in range(5))
        assert source.story(i).source_frame_ids == expected


def test_a_cache_decides_what_follows(tmp_path):
    write_flintstones(tmp_path)
    following = {
        clip(2, 1, 600): [clip(2, 1, n) for n in (100, 500, 200, 300)],
        clip(2, 1, 100): [clip(2, 1, n) for n in (200, 300, 400)],  # too few: no story
    }
    (tmp_path / "following_cache4.pkl").write_bytes(pickle.dumps(following))
    source = FlintstonesSource(tmp_path, "test", 16)
    assert firsts(source) == [clip(2, 1, 600)]
    assert source.story(0).source_frame_ids[2] == clip(2, 1, 500)


def test_what_a_story_says(tmp_path):
    write_flintstones(tmp_path)
    first = clip(1, 2, 100)
    annotations = json.loads((tmp_path / ANNOTATIONS).read_text())
    described = {
        "globalID": first,
        "description": "FRED AND Mr Slate Talk.",
        "setting": "quarry",
        "characters": [{"entityLabel": name} for name in ("fred ", "Mr Slate", "policeman")],
    }
    save_json(tmp_path / ANNOTATIONS, [*annotations, described])
    (tmp_path / "labels.pkl").unlink()
    record = FlintstonesSource(tmp_path, "val", 16).story(0)
    assert record.story_id == record.source_id == first
    assert record.frame_ids[4] == f"{first}-4"
    assert record.sentences[0] == "fred and mr slate talk."
    assert record.labels is not None and record.labels[0].scene == "quarry"
    assert record.labels[0].characters == {"Fred", "Mr Slate"}
    assert record.paths[1] == tmp_path / "video_frames_sampled" / f"{clip(1, 2, 200)}.npy"


def test_labels_are_the_same_with_the_cache_and_without(root, tmp_path):
    write_flintstones(tmp_path, caches=False)
    for split in PUBLISHED:
        cached, computed = (FlintstonesSource(folder, split, 16) for folder in (root, tmp_path))
        assert cached.story(0).labels == computed.story(0).labels


def test_the_labels_are_in_the_published_order():
    assert CHARACTERS == ("Wilma", "Fred", "Betty", "Barney", "Dino", "Pebbles", "Mr Slate")


# ----------------------------------------------------------------------------- pictures


def drawn(source: FlintstonesSource, epoch: int) -> list[list[int]]:
    """Which picture of its clip each frame of each story shows."""
    numbers = []
    for i in range(len(source)):
        images = source.example(i, epoch).images
        clips = source.story(i).source_frame_ids
        shown = [
            [np.array_equal(image, picture(f"{name}/{k}", 16)) for k in range(4)].index(True)
            for name, image in zip(clips, images, strict=True)
        ]
        numbers.append(shown)
    return numbers


def test_in_training_the_draw_is_by_seed_epoch_and_story(root):
    first = drawn(FlintstonesSource(root, "train", 16), epoch=0)
    assert drawn(FlintstonesSource(root, "train", 16), epoch=0) == first
    assert drawn(FlintstonesSource(root, "train", 16), epoch=1) != first
    assert drawn(FlintstonesSource(root, "train", 16, seed=1), epoch=0) != first
    assert len({number for story in first for number in story}) > 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_elsewhere_the_draw_is_fixed(split, root):
    first = drawn(FlintstonesSource(root, split, 16), epoch=0)
    assert drawn(FlintstonesSource(root, split, 16, seed=1), epoch=3) == first


def test_pictures_are_enlarged_bilinearly(root):
    small = FlintstonesSource(root, "test", 16)[0].images
    large = FlintstonesSource(root, "test", 32)[0].images
    assert large.shape == (5, 32, 32, 3)
    # Fields of 4 x 4 pixels became 8 x 8, with their own colour in the middle.
    np.testing.assert_array_equal(large[:, 3::8, 3::8], small[:, 1::4, 1::4])


# ----------------------------------------------------------------------------- bad input


def test_a_wrong_folder_tells_what_was_looked_for_and_found(tmp_path):
    (tmp_path / ANNOTATIONS).touch()
    message = refusal(tmp_path, "train", 16)
    assert "not a FlintstonesSV folder: looked for train-val-test_split.json" in message
    assert message.endswith(f"found {ANNOTATIONS}")


def test_an_unknown_split_is_refused(root):
    assert "one of train, val, test; got 'dev'" in refusal(root, "dev", 16)


def test_a_split_without_stories_is_refused(tmp_path):
    write_flintstones(tmp_path, clips=FLINTSTONES_CLIPS | {"val": []})
    assert "'val' has no stories; stories in each split are: train 2" in refusal(
        tmp_path, "val", 16
    )


@pytest.mark.parametrize("name", ["following_cache4.pkl", "labels.pkl"])
def test_hostile_files_are_refused_and_not_run(name, tmp_path):
    write_flintstones(tmp_path / "flintstones")
    marker = tmp_path / "it ran"
    write_hostile(tmp_path / "flintstones" / name, marker)
    message = refusal(tmp_path / "flintstones", "train", 16)
    assert name in message and "builtins.exec" in message
    assert not marker.exists()


def test_a_hostile_clip_is_refused_and_not_run(tmp_path):
    write_flintstones(tmp_path / "flintstones")
    marker = tmp_path / "it ran"
    path = tmp_path / "flintstones" / "video_frames_sampled" / f"{clip(2, 1, 200)}.npy"
    write_hostile(path, marker)
    source = FlintstonesSource(tmp_path / "flintstones", "test", 16)
    with pytest.raises(UserError, match=f"{path.name} cannot be read"):
        source[0]
    assert not marker.exists()


def test_labels_that_disagree_with_the_annotations_are_refused(tmp_path):
    path = write_flintstones(tmp_path) / "labels.pkl"
    labels = pickle.loads(path.read_bytes())
    first = clip(2, 1, 200)
    for label in ([1 - labels[first][0], *labels[first][1:]], [0, 1], None, 3):
        path.write_bytes(pickle.dumps(labels | {first: label}))
        message = refusal(tmp_path, "test", 16)
        assert f"labels.pkl disagrees with {ANNOTATIONS}: {first} has" in message
        assert "delete it" in message
    path.unlink()
    FlintstonesSource(tmp_path, "test", 16)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "no list of clips named 'train'"),
        ({"train": [], "val": []}, "no list of clips named 'test'"),
        (FLINTSTONES_CLIPS | {"val": 3}, "where a list of clips belongs"),
        (FLINTSTONES_CLIPS | {"val": [clip(2, 1, 100)]}, "in val and in test"),
        (FLINTSTONES_CLIPS | {"val": ["../../secret"]}, "leads out of the dataset's folder"),
        (FLINTSTONES_CLIPS | {"val": ["shot_1"]}, "an id begins as s_01_e_02_ does"),
    ],
)
def test_broken_splits_are_refused(splits, message, tmp_path):
    write_flintstones(tmp_path, caches=False)
    save_json(tmp_path / "train-val-test_split.json", splits)
    assert message in refusal(tmp_path, "train", 16)


@pytest.mark.parametrize(
    ("following", "message"),
    [
        ([1, 2], "no dictionary of clips"),
        ({clip(2, 1, 100): 4}, "where a list of clips belongs"),
        ({clip(2, 1, 100): ["/etc/passwd"] * 4}, "leads out of the dataset's folder"),
        ({clip(2, 1, 100): [clip(9, 9, 9)] * 4}, f"does not annotate the clip {clip(9, 9, 9)}"),
    ],
)
def test_broken_caches_are_refused(following, message, tmp_path):
    write_flintstones(tmp_path)
    (tmp_path / "following_cache4.pkl").write_bytes(pickle.dumps(following))
    assert message in refusal(tmp_path, "test", 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[7]", "no list of annotated clips"),
        ("[]", "does not annotate the clip"),
        (json.dumps([{"globalID": clip(2, 1, 100), "characters": []}]), "KeyError: 'setting'"),
    ],
)
def test_broken_annotations_are_refused(text, message, tmp_path):
    write_flintstones(tmp_path)
    (tmp_path / ANNOTATIONS).write_text(text)
    assert message in refusal(tmp_path, "test", 16)


def test_clips_missing_or_broken_are_found(tmp_path):
    write_flintstones(tmp_path, missing=[clip(2, 1, 100)])
    folder = tmp_path / "video_frames_sampled"
    np.save(folder / f"{clip(2, 1, 300)}.npy", np.zeros((0, 16, 16, 3), np.uint8))
    np.save(folder / f"{clip(2, 1, 400)}.npy", np.zeros((2, 16, 16, 3)))
    np.save(folder / f"{clip(2, 1, 500)}.npy", np.zeros((16, 16, 3), np.uint8))
    short = folder / f"{clip(2, 1, 600)}.npy"
    short.write_bytes(short.read_bytes()[:-1])
    found = list(problems(open_source(DataConfig(name="flintstones"), tmp_path, "test", 16), len))
    named = {
        shot: finding.kind
        for shot in range(100, 700, 100)
        for finding in found
        if clip(2, 1, shot) in finding.message
    }
    assert len(found) == 5
    assert named == {100: "missing image"} | dict.fromkeys(range(300, 700, 100), "unreadable image")
