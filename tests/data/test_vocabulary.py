"""The words a model was trained on: recorded by training, compared with a user's sentences."""

from __future__ import annotations

import pytest

from contextualstory_jax.checkpoints.layout import read_model
from contextualstory_jax.data import shapes
from contextualstory_jax.data.folder import FolderSource
from contextualstory_jax.data.shapes_scenes import SCENES
from contextualstory_jax.data.vocabulary import (
    FILE,
    MAX_WARNINGS,
    Vocabulary,
    read_vocabulary,
    split_words,
    vocabulary_of,
    warnings,
    write_vocabulary,
)
from contextualstory_jax.sampling.model_summary import about
from contextualstory_jax.sampling.pipeline import SHIPPED
from contextualstory_jax.testing.published_folders import write_story_folder
from contextualstory_jax.utils.errors import UserError

CAST_NAMES = "mia, otto, zoe, emil, ida, hugo, lena, theo"
SHAPES = vocabulary_of("shapes", shapes.ShapesSource(0, "train"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mia waves a hand .", ["mia", "waves", "a", "hand"]),
        ("it's 5 o'clock!", ["it's", "o'clock"]),
        ("Ein Bär, 熊。", ["ein", "bär", "熊"]),
        ("", []),
    ],
)
def test_words_are_letters_in_lower_case(text, words):
    assert split_words(text) == words


def test_every_sentence_of_the_synthetic_stories_is_known():
    for number in range(200):
        shots = shapes.storyline(0, number, "test").shots
        assert warnings([shot.sentence for shot in shots], SHAPES) == []


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "A dragon waves.",
            [f"'dragon' is unknown to this model; known names: {CAST_NAMES}"],
        ),
        (
            "mia is on the Beech . ottto sleeps",
            [
                "'beech' is unknown to this model; closest known word: beach",
                "'ottto' is unknown to this model; closest known word: otto",
                f"'sleeps' is unknown to this model; known names: {CAST_NAMES}",
            ],
        ),
        (
            "xx xx xx",
            [f"'xx' is unknown to this model; known names: {CAST_NAMES}"],
        ),
    ],
)
def test_an_unknown_word_is_named_once_with_what_is_known(sentence, expected):
    assert warnings([sentence], SHAPES) == expected


def test_of_many_unknown_words_the_first_are_named():
    lines = warnings([" ".join("qwxyzvk")], SHAPES)

    assert len(lines) == MAX_WARNINGS + 1
    assert lines[-1] == "2 more words are unknown to this model"


def test_the_vocabulary_of_a_folder_is_that_of_its_training_stories(tmp_path):
    root = write_story_folder(tmp_path, counts={"train": 2, "test": 1})
    source = FolderSource(root, "train", 16)

    found = vocabulary_of("folder", source)

    records = [source.story(number) for number in range(len(source))]
    assert found.words == {w for r in records for s in r.sentences for w in split_words(s)}
    labels = [label for record in records for label in record.labels or ()]
    assert set(found.names) == {name for label in labels for name in label.characters}


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    vocabulary = Vocabulary("folder", ("Ä", "b"), frozenset({"x", "ß"}))

    write_vocabulary(tmp_path, vocabulary)

    assert read_vocabulary(tmp_path) == vocabulary
    assert read_vocabulary(tmp_path / "none") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"dataset": "a"}', '{"names": 1}'])
def test_a_damaged_vocabulary_is_refused_by_name(tmp_path, text):
    (tmp_path / FILE).write_text(text)

    with pytest.raises(UserError, match=f"{FILE} is damaged; remove it"):
        read_vocabulary(tmp_path)


def test_the_model_that_ships_knows_the_words_of_the_synthetic_stories():
    assert read_vocabulary(SHIPPED) == SHAPES


def test_about_lists_all_that_sentences_are_made_of():
    text = about(read_model(SHIPPED), SHAPES)

    assert "A visualization model: 5 sentences to 5 frames of 64 x 64 pixels." in text
    assert "mia   she  red circle" in text
    scenes = [words for scene in SCENES.values() for words in (scene.phrase, scene.destination)]
    for word in [*CAST_NAMES.split(", "), *scenes, "walks to the left|middle|right"]:
        assert word in text
    for number in (1, 2, 3):
        assert f"Sample story {number}" in text
    samples = text.split("Sample story 1")[1].split("\n\n")[0].splitlines()[1:]
    assert samples == [f"  {shot.sentence}" for shot in shapes.storyline(0, 0, "test").shots]


def test_about_a_model_of_other_data_says_what_is_recorded():
    config = read_model(SHIPPED)

    named = about(config, Vocabulary("pororo", ("loopy", "pororo"), frozenset({"a", "b", "c"})))
    assert "dataset 'pororo', with 3 words" in named
    assert "loopy, pororo" in named
    assert about(config, None).endswith("The words of its training stories are not recorded.")
