"""PororoSV read from its published layout, against story lists worked out by hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import grain
import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.pororo import CHARACTERS, PororoSource
from contextualstory_jax.data.sources import open_source
from contextualstory_jax.data.validation import problems
from contextualstory_jax.testing.published_folders import (
    PORORO_IDS,
    bits,
    picture,
    save_object,
    save_png,
    write_hostile,
    write_pororo,
)
from contextualstory_jax.utils.errors import UserError

# First frames of all stories, by hand: episodes of 6, 5, 14 and 8 frames, in the order of files'
# names, in which 10 comes before 2; the last four frames of an episode begin no story.
ONE, TEN = "Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep1/", "Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep10/"
TWO, LAST = "Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep2/", "Pororo_ENGLISH1_2/Pororo_ENGLISH1_2_ep1/"
LISTED = [
    *(ONE + "1", ONE + "2", TEN + "1"),  # 0 to 2
    *(TWO + n for n in ("1", "10", "2", "3", "4", "5", "6", "7", "8", "9")),  # 3 to 12
    *(LAST + n for n in ("1", "2", "3", "4")),  # 13 to 16
]
# With the splits that `write_pororo` gives: train 8, 3, 1, 10; val 5, 2, 0, 15; test 16, 13, 14.
PUBLISHED = {
    "train": [0, 1, 2, 3, 5, 8, 10, 15],
    "val": [0, 2, 5, 15],
    "test": [13, 14, 16],
}
STRICT = {"train": [1, 3, 8, 10], "val": [2], "test": [13, 14, 16]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pororo(tmp_path_factory.mktemp("pororo"), strips=True)


def firsts(source: PororoSource) -> list[str]:
    return [source.story(i).source_id for i in range(len(source))]


def refusal(*args, **options) -> str:
    """The one line by which a folder is refused."""
    with pytest.raises(UserError) as caught:
        PororoSource(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("policy", "stories"), [("published", PUBLISHED), ("strict", STRICT)])
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("captions", ["blip2", "original"])
def test_stories_and_their_order(policy, stories, split, captions, root):
    source = PororoSource(root, split, 16, policy=policy, captions=captions)
    assert firsts(source) == [LISTED[n] for n in stories[split]]
    assert source.counts == {name: len(numbers) for name, numbers in stories.items()}


@pytest.mark.parametrize("options", [{"filtered": True}, {"filtered": False, "strips": True}])
def test_without_caches_the_same_stories_are_worked_out(options, tmp_path, root):
    write_pororo(tmp_path, caches=False, **options)
    captions = "blip2" if options["filtered"] else "original"
    for split in PUBLISHED:
        source = PororoSource(tmp_path, split, 16, captions=captions)
        assert firsts(source) == firsts(PororoSource(root, split, 16))


def test_no_frame_is_in_two_strict_splits(root):
    frames = [
        {frame for i in range(len(source)) for frame in source.story(i).source_frame_ids}
        for source in (PororoSource(root, split, 16, policy="strict") for split in STRICT)
    ]
    assert sum(map(len, frames)) == len(set.union(*frames))


def test_what_a_story_says(root):
    record = PororoSource(root, "test", 16).story(2)
    assert record.source_id == LAST + "4"
    assert record.source_frame_ids == tuple(LAST + n for n in ("4", "5", "6", "7", "8"))
    assert record.story_id == "Pororo_ENGLISH1_2-Pororo_ENGLISH1_2_ep1-4"
    assert record.frame_ids[1] == "Pororo_ENGLISH1_2-Pororo_ENGLISH1_2_ep1-4-1"
    assert record.sentences[0] == f"now pororo is in {LAST}4.".lower()
    assert record.labels is not None
    for frame, label in zip(record.source_frame_ids, record.labels, strict=True):
        expected = [name for name, bit in zip(CHARACTERS, bits(frame, 9), strict=True) if bit]
        assert label.characters == set(expected)
    assert record.paths[4] == root / "pororo_png_filtered_blip2" / f"{LAST}8.png"


def test_original_captions_come_with_the_original_pictures(root):
    record = PororoSource(root, "test", 16, captions="original").story(0)
    assert record.sentences[0] == f"long ago pororo is in {LAST}1.".lower()
    assert record.paths[0] == root / f"{LAST}1.png"


def test_the_labels_are_in_the_published_order():
    names = "Pororo Loopy Crong Eddy Poby Petty Tongtong Rody Harry"
    assert list(CHARACTERS) == names.split()


def test_without_a_label_file_nothing_is_known(tmp_path):
    assert PororoSource(write_pororo(tmp_path, labels=False), "test", 16).story(0).labels is None


def test_frame_ids_are_unique_and_name_files(root, tmp_path):
    source = PororoSource(root, "train", 16)
    ids = [frame_id for i in range(len(source)) for frame_id in source.story(i).frame_ids]
    assert len(set(ids)) == 5 * len(source)
    for frame_id in ids:
        (tmp_path / frame_id).touch()


# ----------------------------------------------------------------------------- pictures


def test_filtered_pictures_are_read_as_they_are(root):
    example = PororoSource(root, "test", 16)[0]
    for frame, image in zip((LAST + n for n in "12345"), example.images, strict=True):
        np.testing.assert_array_equal(image, picture(frame, 16))


def drawn(source: PororoSource, epoch: int) -> list[list[int]]:
    """Which picture of its column each frame of each story shows."""
    numbers = []
    for i in range(len(source)):
        images = source.example(i, epoch).images
        frames = source.story(i).source_frame_ids
        shown = [
            [np.array_equal(image, picture(f"{frame}/{k}", 16)) for k in range(3)].index(True)
            for frame, image in zip(frames, images, strict=True)
        ]
        numbers.append(shown)
    return numbers


def test_in_training_the_draw_is_by_seed_epoch_and_story(root):
    def source(seed: int) -> PororoSource:
        return PororoSource(root, "train", 16, captions="original", seed=seed)

    first = drawn(source(0), epoch=0)
    assert drawn(source(0), epoch=0) == first
    assert drawn(source(0), epoch=1) != first
    assert drawn(source(1), epoch=0) != first
    assert {number for story in first for number in story} == {0, 1, 2}


@pytest.mark.parametrize("split", ["val", "test"])
def test_elsewhere_the_draw_is_fixed(split, root):
    first, later = (
        PororoSource(root, split, 16, captions="original", seed=seed) for seed in (0, 1)
    )
    assert drawn(first, epoch=0) == drawn(later, epoch=5)


def test_grain_tells_the_epoch_whatever_the_order(root):
    source = PororoSource(root, "train", 16, captions="original")
    count = len(source)
    stories = grain.MapDataset.range(count).map_with_index(
        lambda number, index: source.example(index, epoch=number // count)
    )
    epochs = [
        {e.story_id: e.images for e in map(stories.seed(3).shuffle().repeat().__getitem__, numbers)}
        for numbers in (range(count), range(count, 2 * count))
    ]
    for epoch, examples in enumerate(epochs):
        assert len(examples) == count
        for i in range(count):
            expected = source.example(i, epoch)
            np.testing.assert_array_equal(examples[expected.story_id], expected.images)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (13, 8, (2, 0, 10, 8)),  # halves round to even, as torchvision's do
        (15, 8, (4, 0, 12, 8)),
        (8, 11, (0, 2, 8, 10)),
    ],
)
def test_the_middle_is_cut_out(width, height, box, tmp_path):
    write_pororo(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    save_png(tmp_path / "pororo_png_filtered_blip2" / f"{LAST}1.png", pixels)
    left, top, right, bottom = box
    read = PororoSource(tmp_path, "test", 8)[0].images[0]
    np.testing.assert_array_equal(read, pixels[top:bottom, left:right])


def test_reductions_average(tmp_path):
    write_pororo(tmp_path)
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    save_png(tmp_path / "pororo_png_filtered_blip2" / f"{LAST}1.png", stripes)
    read = PororoSource(tmp_path, "test", 8)[0].images[0]
    # Without a filter that grows with the reduction every pixel would be 0 or 255.
    assert (abs(read[:, 1:-1].astype(int) - 128) < 8).all()


def test_other_kinds_of_png_become_rgb(tmp_path):
    write_pororo(tmp_path)
    path = tmp_path / "pororo_png_filtered_blip2" / f"{LAST}1.png"
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(path)
    assert (PororoSource(tmp_path, "test", 8)[0].images[0] == 7).all()


def test_a_source_can_be_pickled_for_workers(root):
    source = PororoSource(root, "train", 16)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3].images, source[3].images)


# ----------------------------------------------------------------------------- bad input


def test_past_the_end_is_an_index_error(root):
    source = PororoSource(root, "test", 16)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"story {index} of 3"):
            source[index]


def test_a_wrong_folder_tells_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "descriptions_blip2.npy").touch()
    message = refusal(tmp_path, "train", 16)
    assert "not a PororoSV folder" in message
    assert "looked for train_seen_unseen_ids.npy, descriptions_blip2.npy" in message
    assert message.endswith("found descriptions_blip2.npy")
    assert refusal(tmp_path / "nowhere", "train", 16).endswith("found none of them")


def test_an_unknown_split_is_refused(root):
    assert "one of train, val, test; got 'dev'" in refusal(root, "dev", 16)


def test_an_empty_split_is_refused(tmp_path):
    write_pororo(tmp_path, ids=PORORO_IDS | {"val": ()})
    assert "the split 'val' has no stories" in refusal(tmp_path, "val", 16)


@pytest.mark.parametrize(
    "name",
    ["train_seen_unseen_ids", "img_cache4", "following_cache4", "descriptions_blip2", "labels"],
)
def test_hostile_files_are_refused_and_not_run(name, tmp_path):
    write_pororo(tmp_path / "pororo")
    marker = tmp_path / "it ran"
    write_hostile(tmp_path / "pororo" / f"{name}.npy", marker)
    message = refusal(tmp_path / "pororo", "train", 16)
    assert f"{name}.npy" in message and "builtins.exec" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_seen_unseen_ids", np.arange(4), "three arrays"),
        ("train_seen_unseen_ids", np.zeros((3, 2)), "the train part is no list of numbers"),
        ("train_seen_unseen_ids", np.array([[0], [1], [17]]), "the test part has story 17"),
        ("train_seen_unseen_ids", np.array([[0], [-1], [1]]), "the val part has story -1"),
        ("img_cache4", np.array([b"a/1.png"]), r"shapes \(1,\) and \(17, 4\)"),
        ("img_cache4", np.array([b"../a/1.png"] * 17), "leads out of the dataset's folder"),
        ("img_cache4", np.array([b"/etc/1.png"] * 17), "leads out of the dataset's folder"),
        ("img_cache4", np.arange(17), "where text belongs"),
        ("descriptions_blip2", np.arange(3), "no dictionary"),
        ("descriptions_blip2", {"a/1": ["A."]}, "frame Pororo.*is not there"),
    ],
)
def test_files_that_contradict_one_another_are_refused(name, content, message, tmp_path):
    path = write_pororo(tmp_path) / f"{name}.npy"
    np.save(path, content) if isinstance(content, np.ndarray) else save_object(path, content)
    with pytest.raises(UserError, match=message):
        PororoSource(tmp_path, "test", 16)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", [0] * 8, "its label is not 9 zeros and ones"),
        ("labels", [2] * 9, "its label is not 9 zeros and ones"),
        ("descriptions_blip2", [], "no list of captions"),
        ("descriptions_blip2", "text", "no list of captions"),
        ("descriptions_blip2", [7], "where text belongs"),
    ],
)
def test_a_frame_that_is_described_wrongly_is_named(name, value, message, tmp_path):
    path = write_pororo(tmp_path) / f"{name}.npy"
    content = np.load(path, allow_pickle=True).item()
    save_object(path, content | {LAST + "3": value})
    refused = refusal(tmp_path, "test", 16)
    assert f"{name}.npy, frame {LAST}3" in refused and message in refused


def test_a_gap_in_the_pictures_is_refused_where_caches_are_missing(tmp_path):
    write_pororo(tmp_path, caches=False, missing=[TWO + "7"])
    message = refusal(tmp_path, "train", 16)
    assert "img_cache4.npy" in message and f"{TWO[:-1]} has no 7.png" in message


def test_a_picture_without_a_number_is_refused_where_caches_are_missing(tmp_path):
    write_pororo(tmp_path, caches=False)
    save_png(tmp_path / "pororo_png_filtered_blip2" / ONE / "cover.png", picture("", 8))
    assert "cover.png has no number" in refusal(tmp_path, "train", 16)


def test_pictures_missing_or_broken_are_named_when_read(tmp_path):
    write_pororo(tmp_path, missing=[LAST + "1"])
    folder = tmp_path / "pororo_png_filtered_blip2"
    (folder / f"{LAST}8.png").write_bytes((folder / f"{LAST}8.png").read_bytes()[:60])
    (folder / f"{LAST}7.png").write_text("no picture")
    source = PororoSource(tmp_path, "test", 16)
    with pytest.raises(UserError, match=rf"cannot read .*{LAST}1\.png: No such file"):
        source[0]
    with pytest.raises(UserError, match=rf"{LAST}7\.png is not an image"):
        source[2]
    (folder / f"{LAST}7.png").write_bytes((folder / f"{LAST}6.png").read_bytes())
    with pytest.raises(UserError, match=rf"{LAST}8\.png cannot be read"):
        source[2]


# ----------------------------------------------------------------------------- reports


def test_problems_of_a_whole_folder(root):
    assert list(problems(PororoSource(root, "train", 16), len)) == []


def test_problems_are_all_found(tmp_path):
    write_pororo(tmp_path, ids=PORORO_IDS | {"test": (13, 14, 16, 13)}, missing=[LAST + "2"])
    broken = tmp_path / "pororo_png_filtered_blip2" / f"{LAST}8.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source = PororoSource(tmp_path, "test", 16)
    found = list(problems(source, lambda caption: 80 if f"{LAST}6.".lower() in caption else 9))
    assert [(finding.kind, finding.story) for finding in found] == [
        ("missing image", 0),
        ("duplicate id", 1),
        ("long caption", 2),
        ("unreadable image", 3),
    ]
    assert "80 tokens, of which the model reads 77" in found[2].message


def test_sources_by_name(root):
    config = DataConfig(name="pororo", split_policy="strict", captions="original", seed=3)
    source = open_source(config, root, "val", 16)
    assert isinstance(source, PororoSource) and source.captions == "original" and source.seed == 3
    assert firsts(source) == [TEN + "1"]
