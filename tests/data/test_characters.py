from __future__ import annotations

import numpy as np
import pytest

from contextualstory_jax.data.characters import LabelledFrames, characters_of, to_labels
from contextualstory_jax.data.flintstones import FlintstonesSource
from contextualstory_jax.data.pororo import PororoSource
from contextualstory_jax.testing.published_folders import write_flintstones, write_pororo
from contextualstory_jax.utils.errors import UserError


def test_labels_are_in_the_order_of_the_published_files():
    assert to_labels({"Loopy", "Harry"}, characters_of("pororo")).tolist() == [
        *(False, True, False, False, False),
        *(False, False, False, True),
    ]
    assert len(characters_of("flintstones")) == 7
    with pytest.raises(UserError, match="of pororo and flintstones, not of 'folder'"):
        characters_of("folder")


@pytest.mark.parametrize("dataset", ["pororo", "flintstones"])
def test_a_frame_of_each_story_is_read_with_its_own_labels(tmp_path, dataset):
    write, source_of = {
        "pororo": (write_pororo, PororoSource),
        "flintstones": (write_flintstones, FlintstonesSource),
    }[dataset]
    source = source_of(write(tmp_path), "test", 16)
    names = characters_of(dataset)

    batch = LabelledFrames(source, names).read([(0, 0), (1, 0)])

    assert batch["images"].shape == (2, 16, 16, 3)
    for story, image, labels in zip(range(2), batch["images"], batch["labels"], strict=True):
        example = source[story]
        same = [i for i, frame in enumerate(example.images) if np.array_equal(frame, image)]
        expected = [to_labels(example.labels[i].characters, names) for i in same]
        assert any(np.array_equal(labels, of) for of in expected)


def test_epochs_show_other_frames_and_all_of_them(tmp_path):
    frames = LabelledFrames(PororoSource(write_pororo(tmp_path), "test", 16), ("Pororo",))

    shown = [frames.read([(0, epoch)])["images"][0] for epoch in range(40)]

    assert len({image.tobytes() for image in shown}) == 5
    np.testing.assert_array_equal(shown[3], frames.read([(0, 3)])["images"][0])


def test_a_dataset_without_labels_is_refused(tmp_path):
    write_pororo(tmp_path)
    (tmp_path / "labels.npy").unlink()
    frames = LabelledFrames(PororoSource(tmp_path, "test", 16), ("Pororo",))

    with pytest.raises(UserError, match="has no labels; put labels.npy"):
        frames.read([(0, 0)])
