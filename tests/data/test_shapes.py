"""Synthetic stories: their grammar, splits, images, reader and tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import runpy
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageFilter

from contextualstory_jax.data.shapes import (
    TOKENIZER_DIR,
    Figure,
    ShapesSource,
    render,
    split_of,
    story,
    storyline,
    vocabulary,
)
from contextualstory_jax.data.shapes_figures import CAST, PLACES, Pose
from contextualstory_jax.data.shapes_reader import FrameReading, read_frames
from contextualstory_jax.data.shapes_scenes import SCENES, TURNS, render_scene

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_shapes_tokenizer.py"
SIZES = (32, 64)
PRONOUNS = {"she", "he", "they"}
POSES = get_args(Pose)


@pytest.fixture(scope="module")
def storylines():
    """Thousands of storylines of each split."""
    return {
        split: [storyline(0, i, split) for i in range(count)]
        for split, count in (("train", 4000), ("test", 2000))
    }


@pytest.fixture(scope="module")
def sentences(storylines):
    return {shot.sentence for lines in storylines.values() for line in lines for shot in line.shots}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER_DIR, local_files_only=True)


def reading(scene, figures, turn):
    """What the reader should find."""
    ordered = sorted(figures.items(), key=lambda item: list(PLACES).index(item[1].place))
    return FrameReading(tuple(ordered), scene, turn)


def frames(count, size=64):
    """The images of `count` stories and their readings."""
    images, truth = [], []
    for index in range(count):
        line = storyline(3, index, "test")
        images.append(story(3, index, "test", size).images)
        truth += [reading(shot.scene, shot.figures, line.turn) for shot in line.shots]
    return np.concatenate(images), truth


def every_staging():
    """Every scene with each character in every place and pose, and each pair in two places."""
    poses = itertools.cycle(POSES)
    alone = [{name: Figure(place, pose)} for name in CAST for place in PLACES for pose in POSES]
    places = itertools.cycle(itertools.permutations(PLACES, 2))
    pairs = [
        {a: Figure(here, next(poses)), b: Figure(there, next(poses))}
        for a, b in itertools.combinations(CAST, 2)
        for here, there in [next(places)]
    ]
    return [(scene, figures) for scene in SCENES for figures in alone + pairs]


# ----------------------------------------------------------------------------- stories


def test_a_story_is_the_documented_example():
    example = story(0, 7, "train")

    assert example.images.shape == (5, 64, 64, 3)
    assert example.images.dtype == np.uint8
    assert example.story_id == "shapes-train-0-7"
    assert len(example.sentences) == len(set(example.frame_ids)) == len(example.labels) == 5
    assert len(example.restated) == 5


@pytest.mark.parametrize("size", SIZES)
def test_images_have_the_size_asked_for(size):
    assert story(0, 0, "test", size).images.shape == (5, size, size, 3)


def test_a_story_is_a_function_of_its_arguments():
    once, again = story(1, 2, "train"), story(1, 2, "train")

    assert once.sentences == again.sentences
    np.testing.assert_array_equal(once.images, again.images)


def test_seed_index_and_split_each_change_the_story():
    found = [story(*arguments).sentences for arguments in ((0, 0, "train"), (1, 0, "train"))]
    found += [story(*arguments).sentences for arguments in ((0, 1, "train"), (0, 0, "test"))]

    assert len(set(found)) == 4


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_longer_story_begins_as_a_shorter_one(split):
    for index in range(50):
        lines = [storyline(0, index, split, length) for length in (5, 8, 20)]

        assert [len(line.shots) for line in lines] == [5, 8, 20]
        assert lines[0].shots == lines[1].shots[:5] == lines[2].shots[:5]
        assert lines[1].shots == lines[2].shots[:8]
        assert len({line.turn for line in lines}) == 1


def test_long_stories_keep_two_characters_who_leave_and_return():
    lines = [storyline(0, index, "test", 20) for index in range(300)]
    both = [np.mean([len(line.shots[i].figures) == 2 for line in lines]) for i in range(5, 20)]
    returned = [
        any("goodbye" in a.sentence and "comes" in b.sentence for a, b in pairs)
        for pairs in (itertools.combinations(line.shots, 2) for line in lines)
    ]

    assert min(both) > 0.5
    assert np.mean(returned) > 0.3
    assert max(len({name for shot in line.shots for name in shot.figures}) for line in lines) == 2


def test_stories_stay_what_they_are():
    # The model that ships was trained on these; Python and NumPy versions must not change them.
    digest = hashlib.sha256()
    for index in range(200):
        digest.update(repr(storyline(0, index, "train", 8)).encode())

    assert digest.hexdigest()[:16] == "ae7c40c775141f4d"


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, test; got 'validation'"):
        storyline(0, 0, "validation")


def test_a_story_of_less_frames_is_refused():
    with pytest.raises(ValueError, match="a story has at least 5 frames; got 4"):
        storyline(0, 0, "train", 4)


def test_the_cast_differs_in_colour_and_in_shape():
    colours = np.array([character.colour for character in CAST.values()], float)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1)

    assert len({character.shape for character in CAST.values()}) == len(CAST) == 8
    assert apart[~np.eye(len(CAST), dtype=bool)].min() > 100


def test_a_character_changes_its_own_strip_alone():
    for scene, figures in every_staging():
        for name, figure in figures.items():
            empty = render(scene, {}, 0).astype(int)
            changed = np.abs(render(scene, {name: figure}, 0) - empty).sum(axis=(0, 2)) > 0
            centre = round(PLACES[figure.place] * 64)

            assert changed[centre - 10 : centre + 10].sum() == changed.sum() > 10


def test_each_pose_and_character_looks_different_in_every_scene():
    for scene in SCENES:
        looks = [
            render(scene, {name: Figure("middle", pose)}, 0).astype(float)
            for name in CAST
            for pose in POSES
        ]
        for one, other in itertools.combinations(looks, 2):
            assert (np.linalg.norm(one - other, axis=-1) > 60).sum() >= 20


def test_the_scenery_turns_without_a_seam():
    for scene in SCENES:
        for turn in range(1, TURNS):
            back = np.roll(render_scene(scene, turn, 64), -turn * 8, axis=1)

            np.testing.assert_array_equal(back, render_scene(scene, 0, 64))


def test_an_unknown_scene_is_refused():
    with pytest.raises(ValueError, match="scene must be one of meadow, .*; got 'moon'"):
        render_scene("moon", 0, 64)


# ----------------------------------------------------------------------------- sentences


def scene_of(sentence):
    """The scene that a sentence names, if any."""
    for name, scene in SCENES.items():
        if scene.phrase in sentence or scene.destination in sentence:
            return name
    return None


def test_every_sentence_is_short_and_of_the_vocabulary(sentences):
    words = {word for sentence in sentences for word in sentence.split()}

    assert words == set(vocabulary())
    assert {len(sentence.split()) for sentence in sentences} <= set(range(4, 15))


def test_the_first_sentence_names_scene_and_characters(storylines):
    for line in storylines["train"] + storylines["test"]:
        first = line.shots[0]
        assert scene_of(first.sentence) == first.scene
        assert set(first.figures) <= set(first.sentence.split())


def test_a_frame_needs_context_exactly_if_its_sentence_leaves_something_out(storylines):
    for line in storylines["train"]:
        for shot in line.shots:
            names = set(shot.figures) <= set(shot.sentence.split())
            assert shot.needs_context != (names and scene_of(shot.sentence) == shot.scene), shot


def test_a_restated_sentence_leaves_nothing_out(storylines):
    for line in storylines["train"]:
        for shot in line.shots:
            assert scene_of(shot.restated) == shot.scene
            assert set(shot.figures) <= set(shot.restated.split())
            assert not PRONOUNS & set(shot.restated.split())


def test_about_half_of_the_frames_need_context(storylines):
    for lines in storylines.values():
        share = np.mean([shot.needs_context for line in lines for shot in line.shots])
        assert 0.4 < share < 0.6


def test_a_pronoun_means_one_thing(storylines):
    for line in storylines["train"]:
        for before, shot in itertools.pairwise(line.shots):
            (pronoun,) = PRONOUNS & set(shot.sentence.split()) or {None}
            if pronoun == "they":
                assert len(before.figures) == 2
            elif pronoun:
                meant = [name for name in before.figures if CAST[name].pronoun == pronoun]
                assert len(meant) == 1, (before, shot)


def test_a_third_of_the_stories_change_the_scene_once_and_say_so(storylines):
    changes = []
    for line in storylines["test"]:
        moved = [b for a, b in itertools.pairwise(line.shots) if a.scene != b.scene]
        changes.append(len(moved))
        for shot in moved:
            assert SCENES[shot.scene].destination in shot.sentence

    assert set(changes) == {0, 1}
    assert 0.3 < np.mean(changes) < 0.37


def follow(line):
    """Scene and figures of each frame as a reader of the sentences would place them."""
    scene, figures = None, {}
    poses = {"jump": "jump", "wave": "wave", "take": "sleep", "read": "read"}
    for shot in line.shots:
        scene = scene_of(shot.sentence) or scene
        words = shot.sentence.removesuffix(" .").split(" while ")[0].split()
        subjects = [word for word in words if word in CAST]
        if words[0] in ("she", "he"):
            subjects = [name for name in figures if CAST[name].pronoun == words[0]]
        elif words[0] == "they":
            subjects = list(figures)
        if len(subjects) == 2 and not figures:
            figures = {subjects[0]: Figure("left", "stand"), subjects[1]: Figure("right", "stand")}
        figures = {name: Figure(figure.place, "stand") for name, figure in figures.items()}
        verb = next(
            (poses[w.removesuffix("s")] for w in words if w.removesuffix("s") in poses), None
        )
        place = next((word for word in words if word in PLACES), None)
        for name in subjects:
            if "away" in words:
                del figures[name]
            else:
                figures[name] = Figure(place or figures[name].place, verb or "stand")
        yield scene, dict(figures)


def test_the_sentences_say_everything_that_is_rendered(storylines):
    for line in storylines["test"]:
        assert list(follow(line)) == [(shot.scene, shot.figures) for shot in line.shots]


def test_some_training_stories_begin_in_the_middle(storylines):
    # Whose places only the frames before say; stories to be measured begin at the beginning.
    shares = {
        split: np.mean(["at the" not in line.shots[0].sentence for line in lines])
        for split, lines in storylines.items()
    }
    walking = [line for line in storylines["train"] if "walks" in line.shots[0].sentence]

    assert shares["train"] > shares["test"]
    assert walking and not any("walks" in line.shots[0].sentence for line in storylines["test"])


# ----------------------------------------------------------------------------- splits


def happenings(line):
    """What a storyline is, whatever the words, the places and the scenery."""
    deeds = (frozenset((n, f.pose) for n, f in shot.figures.items()) for shot in line.shots)
    return tuple(zip((shot.scene for shot in line.shots), deeds, strict=True))


def test_test_storylines_never_occur_in_training(storylines):
    trained, held_out = ({happenings(line) for line in lines} for lines in storylines.values())

    assert len(held_out) > 1000
    assert not trained & held_out


def test_what_happens_alone_decides_the_split(storylines):
    # So that the splits are disjoint beyond the stories looked at here.
    for split, lines in storylines.items():
        for line in lines:
            mirrored = [
                shot._replace(
                    sentence="",
                    figures={
                        name: figure._replace(place="left")
                        for name, figure in reversed(shot.figures.items())
                    },
                )
                for shot in line.shots
            ]
            assert split_of(line.shots) == split_of(mirrored) == split


def test_held_out_sentences_never_occur_in_training(storylines):
    trained, held_out = (
        {tuple(shot.sentence for shot in line.shots) for line in lines}
        for lines in storylines.values()
    )

    assert not trained & held_out


# ----------------------------------------------------------------------------- reader


@pytest.mark.parametrize("size", SIZES)
def test_the_reader_reads_every_staging(size):
    stagings = every_staging()[:: 64 // size]
    images = np.stack([render(scene, f, i % TURNS, size) for i, (scene, f) in enumerate(stagings)])

    assert read_frames(images) == [
        reading(scene, figures, i % TURNS) for i, (scene, figures) in enumerate(stagings)
    ]


def test_the_reader_sees_nobody_on_empty_scenes():
    images = np.stack([render(scene, {}, turn) for scene in SCENES for turn in range(TURNS)])

    assert read_frames(images) == [
        FrameReading((), scene, turn) for scene in SCENES for turn in range(TURNS)
    ]


@pytest.mark.parametrize(("blur", "noise"), [(0, 20), (0.8, 12)])  # pixels at 64, grey levels
def test_the_reader_stands_noise_and_blur(blur, noise):
    images, truth = frames(20)
    soft = ImageFilter.GaussianBlur(blur)
    images = np.stack([np.asarray(Image.fromarray(image).filter(soft)) for image in images])
    grain = np.random.default_rng(0).normal(0, noise, images.shape)

    assert read_frames(np.clip(images + grain, 0, 255).astype(np.uint8)) == truth


@pytest.mark.parametrize("size", SIZES)
def test_the_reader_sees_nobody_in_noise_or_on_plain_colours(size):
    rng = np.random.default_rng(0)
    uniform = rng.integers(0, 256, (10, size, size, 3)).astype(np.uint8)
    gaussian = np.clip(rng.normal(127.5, 127.5, (10, size, size, 3)), 0, 255).astype(np.uint8)
    colours = [(grey,) * 3 for grey in range(0, 256, 15)] + [who.colour for who in CAST.values()]
    plain = np.stack([np.full((size, size, 3), colour, np.uint8) for colour in colours])

    readings = read_frames(np.concatenate([uniform, gaussian, plain]))

    assert {found.characters for found in readings} == {()}
    assert {found.scene for found in readings[:20]} == {None}


def test_the_reader_takes_neither_another_colour_nor_a_block_nor_a_smear_nor_a_ghost():
    ground, mia = render("meadow", {}, 0), render("meadow", {"mia": Figure("middle", "stand")}, 0)
    green, block, smear = ground.copy(), ground.copy(), ground.copy()
    green[32:46, 25:39] = (60, 220, 90)
    block[32:46, 25:39] = CAST["hugo"].colour
    smear[30:56] = CAST["otto"].colour
    ghost = np.rint(0.7 * ground + 0.3 * mia).astype(np.uint8)

    readings = read_frames(np.stack([green, block, smear, ghost, mia]))

    assert [found.characters for found in readings] == [(), (), (), (), ("mia",)]


def test_the_reader_sees_a_character_twice():
    image = render("snow", {"zoe": Figure("left", "jump")}, 2)
    right = render("snow", {"zoe": Figure("right", "sleep")}, 2)
    image[:, 42:] = right[:, 42:]

    (found,) = read_frames(image[None])

    assert found.characters == ("zoe", "zoe")
    assert [figure.pose for _, figure in found.figures] == ["jump", "sleep"]


# ----------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_pads_with_id_0(tokenizer):
    ids = tokenizer("she jumps up high .", padding="max_length")["input_ids"]

    assert len(ids) == tokenizer.model_max_length == 16
    assert ids[0] == tokenizer.bos_token_id
    assert ids[6:] == [tokenizer.eos_token_id] + [0] * 9
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("!", 0)


def test_every_word_is_one_token(tokenizer):
    for word in vocabulary():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_every_sentence_fits(tokenizer, sentences):
    lengths = {len(ids) for ids in tokenizer(sorted(sentences))["input_ids"]}

    assert max(lengths) <= tokenizer.model_max_length


def test_the_tokenizer_spells_other_english(tokenizer):
    ids = tokenizer('A dragon, 42 years old, says: "Where\'s Mia?"')["input_ids"]

    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.convert_tokens_to_ids("mia</w>") in ids


def test_every_id_is_in_use_and_below_the_vocabulary_size(tokenizer):
    ids = json.loads((TOKENIZER_DIR / "vocab.json").read_text()).values()

    assert sorted(ids) == list(range(len(tokenizer)))
    assert len(tokenizer) < 300


def test_the_packaged_tokenizer_is_what_the_script_writes():
    files = runpy.run_path(str(SCRIPT))["tokenizer_files"]()

    assert {path.name: path.read_text() for path in TOKENIZER_DIR.iterdir()} == files


# ----------------------------------------------------------------------------- source


def test_the_source_is_random_access_and_picklable():
    source = pickle.loads(pickle.dumps(ShapesSource(5, "test", size=48)))

    assert len(source) == 2**31 - 1
    np.testing.assert_array_equal(source[9].images, story(5, 9, "test", 48).images)
    assert source[np.int64(9)].story_id == "shapes-test-5-9"
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source[outside]


def test_grain_shuffles_the_source():
    import grain

    dataset = grain.MapDataset.source(ShapesSource(0, "train")).seed(1).shuffle()

    assert len({dataset[i].story_id for i in range(20)}) == 20
