"""The command that draws: what it writes, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import contextualstory_jax
from contextualstory_jax import UserError, generate
from contextualstory_jax.sampling.prompts import Story
from contextualstory_jax.utils.cli import OUT_OF_MEMORY, run

SENTENCES = ("A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps.")
SAID = ["--sentence", *SENTENCES]
FRAMES = [f"frame_{i}.png" for i in range(5)]


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def frame(folder: Path, i: int) -> np.ndarray:
    with Image.open(folder / f"frame_{i}.png") as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of five sentences with seed 3."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    latents = out.parent / "latents.npy"
    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(out), "--seed", "3"]
        + [argument for sentence in SENTENCES for argument in ("--sentence", sentence)]
        + ["--save-latents", str(latents)]
    )
    return out


def test_five_sentences_become_pictures_a_grid_and_an_animation(drawn):
    assert files(drawn).keys() == {
        "stories.json",
        *(f"story/{name}" for name in (*FRAMES, "grid.png", "story.gif")),
        *("story/latents.npy", "story/story.json"),
    }
    with Image.open(drawn / "story" / "frame_2.png") as image:
        assert image.size == (16, 16)
        assert image.text == {"seed": "3", "sentence": SENTENCES[2]}


def test_stories_json_says_how_they_were_drawn(drawn, tiny_checkpoint):
    found = json.loads((drawn / "stories.json").read_text())

    assert found.pop("versions").keys() == {"contextualstory_jax", "jax", "flax"}
    assert found == {
        "checkpoint": {"path": str(tiny_checkpoint), "step": 0},
        "seed": 3,
        "settings": {
            "scheduler": "ddim",
            "steps": 2,
            "guidance_scale": 2.0,
            "image_guidance_scale": 1.0,
            "guidance_rescale": 0.0,
            "eta": 0.0,
            "negative_prompt": None,
            "height": 16,
            "width": 16,
            "storyflow": [5.0, 5.0, 5.0, 5.0],
            "frameinit": None,
            "camera_motion": None,
            "window_overlap": 2,
            "weights": "ema",
            "dtype": "float32",
            "initial_latents": None,
        },
        "stories": [
            {
                "id": "story",
                "folder": "story",
                "sentences": list(SENTENCES),
                "context": {},
                "first_frame": None,
            }
        ],
    }


def test_the_same_command_gives_the_same_bytes(drawn, tiny_checkpoint, tmp_path):
    (tmp_path / "story.txt").write_text("\n".join(SENTENCES))

    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--seed", "3"]
        + ["--story", str(tmp_path / "story.txt")]
    )

    assert files(tmp_path / "out") == files(drawn)


def test_without_captions_the_grid_holds_the_frames_alone(drawn, tiny_checkpoint, tmp_path):
    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path), *SAID, "--seed", "3"]
        + ["--no-captions"]
    )

    bare, captioned = (Image.open(out / "story" / "grid.png") for out in (tmp_path, drawn))
    assert bare.height == 256 < captioned.height
    np.testing.assert_array_equal(np.asarray(bare), np.asarray(captioned)[:256])


def test_drawing_again_into_the_same_folder_replaces_the_story(drawn, tiny_checkpoint, tmp_path):
    for seed in ("1", "3"):
        generate.main(
            ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path), *SAID, "--seed", seed]
        )
        if seed == "1":
            other = files(tmp_path)

    assert files(tmp_path) == files(drawn)
    assert all(other[name] != data for name, data in files(drawn).items())


def test_latents_are_saved_and_may_be_given(drawn, tiny_checkpoint, tmp_path):
    saved = np.load(drawn.parent / "latents.npy")
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).normal(size=saved.shape).astype("f4"))

    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "out"), *SAID]
        + ["--initial-latents", str(tmp_path / "noise.npy"), "--seed", "3"]
    )

    assert (saved.shape, saved.dtype) == ((1, 5, 4, 4, 48), np.float32)
    assert not np.array_equal(frame(tmp_path / "out" / "story", 0), frame(drawn / "story", 0))


def test_a_jsonl_file_gives_a_folder_a_story(tiny_checkpoint, tmp_path, capsys):
    long = ["Mia runs. " * 20, *SENTENCES[1:]]
    stories = {"s1/a": SENTENCES, "b": long, "c": SENTENCES}
    lines = [json.dumps({"id": id, "sentences": story}) for id, story in stories.items()]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines) + "\n")

    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
        + ["--stories", str(tmp_path / "stories.jsonl"), "--batch-size", "2"]
        + ["--storyflow", "1,2,3.5,4", "--guidance-scale", "3", "--scheduler", "euler"]
        + ["--num-inference-steps", "3", "--negative-prompt", "A dog."]
    )

    told = json.loads((tmp_path / "out" / "stories.json").read_text())
    assert [story["folder"] for story in told["stories"]] == ["s1_a", "b", "c"]
    assert told["settings"]["storyflow"] == [1.0, 2.0, 3.5, 4.0]
    assert told["settings"]["guidance_scale"] == 3.0
    assert told["settings"]["scheduler"] == "euler"
    assert told["settings"]["steps"] == 3
    assert told["settings"]["negative_prompt"] == "A dog."
    for folder in ("s1_a", "b", "c"):
        assert {path.name for path in (tmp_path / "out" / folder).glob("frame_*")} == set(FRAMES)
    printed = capsys.readouterr()
    assert printed.err.count("1 of 6 sentences have more than 16 tokens and are truncated") == 1
    *paths, last = printed.out.splitlines()
    assert last == f"3 stories in {tmp_path / 'out'}"
    assert paths == [
        f"{tmp_path / 'out' / name / 'grid.png'}  {tmp_path / 'out' / name / 'story.gif'}"
        for name in ("s1_a", "b", "c")
    ]


def test_a_continuation_model_goes_on_from_a_picture(tiny_continuation_checkpoint, tmp_path):
    Image.new("L", (64, 48), 200).save(tmp_path / "first.png")
    line = {"id": "a", "sentences": SENTENCES, "first_frame": "first.png"}
    (tmp_path / "stories.jsonl").write_text(json.dumps(line))

    generate.main(
        ["--checkpoint", str(tiny_continuation_checkpoint), "--out", str(tmp_path / "out")]
        + ["--stories", str(tmp_path / "stories.jsonl")]
    )

    first = frame(tmp_path / "out" / "a", 0)
    assert np.max(np.abs(first.astype(int) - 200)) <= 1
    told = json.loads((tmp_path / "out" / "stories.json").read_text())
    assert told["stories"][0]["first_frame"] == str(tmp_path / "first.png")


@pytest.mark.slow
def test_a_camera_moves_over_a_picture_wider_than_the_frame(tiny_continuation_checkpoint, tmp_path):
    halves = np.repeat(np.array([[[0], [200]]], np.uint8), 16, axis=1)  # dark, then bright
    Image.fromarray(np.broadcast_to(halves, (16, 32, 3))).save(tmp_path / "first.png")

    generate.main(
        ["--checkpoint", str(tiny_continuation_checkpoint), "--out", str(tmp_path / "out")]
        + [*SAID, "--image", str(tmp_path / "first.png"), "--camera-motion", "pan_left"]
        + ["--frameinit", "butterworth", "--frameinit-level", "700", "--frameinit-order", "2"]
    )

    # The first view is the right half; the picture was not cropped in the middle.
    assert np.max(np.abs(frame(tmp_path / "out" / "story", 0).astype(int) - 200)) <= 1
    settings = json.loads((tmp_path / "out" / "stories.json").read_text())["settings"]
    assert settings["camera_motion"] == "pan_left"
    assert settings["frameinit"] == {
        "method": "butterworth",
        "level": 700,
        "spatial": 0.25,
        "temporal": 0.25,
        "order": 2,
    }


@pytest.mark.slow
def test_another_scheduler_draws_another_picture(drawn, tiny_checkpoint, tmp_path):
    generate.main(
        ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path), *SAID, "--seed", "3"]
        + ["--scheduler", "euler_ancestral"]
    )

    settings = json.loads((tmp_path / "stories.json").read_text())["settings"]
    assert settings["scheduler"] == "euler_ancestral"
    assert not np.array_equal(frame(tmp_path / "story", 2), frame(drawn / "story", 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --story --stories --sentence --from is required; see --help"),
        (["--sentence", "A cat.", "--story", "a.txt"], "not allowed with argument"),
        (SAID + ["--step", "5"], "unrecognized arguments: --step 5"),
        (
            SAID + ["--steps", "many"],
            "argument --steps/--num-inference-steps: invalid int value: 'many'",
        ),
        (SAID + ["--storyflow", "1,2,x"], "argument --storyflow: '1,2,x' is not numbers"),
        (SAID + ["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (SAID + ["--scheduler", "heun"], "argument --scheduler: invalid choice: 'heun'"),
        (SAID + ["--frameinit", "low"], "argument --frameinit: invalid choice: 'low'"),
        (SAID + ["--camera-motion", "roll"], "argument --camera-motion: invalid choice: 'roll'"),
        (SAID + ["--camera-motion", "zoom_in"], "--camera-motion without --frameinit; choose"),
        (
            SAID + ["--frameinit-level", "0", "--frameinit-order", "2"],
            "--frameinit-level, --frameinit-order without --frameinit; choose its filter",
        ),
        (
            SAID + ["--frameinit", "box", "--frameinit-spatial", "1.1"],
            r"frameinit: spatial must be in \[0, 1\]; got 1.1",
        ),
        (SAID[:-1] + [" "], "--sentence: a sentence is blank"),
        (["--story", "none.txt"], "cannot read none.txt"),
        (["--story", "empty.txt"], "empty.txt is empty"),
        (["--stories", "blank.jsonl"], "story 'a' has no sentences; write at least one"),
        (["--sentence", *["A cat."] * 101], "has 101 sentences; write at most 100"),
        (["--sentence", "A" * 10_000], "sentence 0 has 10000 characters; write at most 1000"),
        (SAID + ["--keep", "1"], "--keep without --from; name the story's folder"),
        (SAID + ["--sentence-at", "1", "A cat."], "--sentence-at without --from"),
        (SAID + ["--near"], "--near without --from"),
        (SAID + ["--frame-at", "5", "a.png"], "--frame-at: no frame '5'; .* from 0 to 4"),
        (SAID + ["--frame-at", "-1", "a.png"], "--frame-at: no frame '-1'"),
        (SAID + ["--frame-at", "1", "empty.txt"], "empty.txt is not an image"),
        (SAID + ["--candidates", "0"], "--candidates must be at least 1; got 0"),
        (SAID + ["--candidates", "2", "--latents", "a.npy"], "leave out --initial-latents"),
        (["--stories", "a.jsonl", "--candidates", "2"], "--candidates is for one story"),
        (SAID + ["--format", "pdf,bmp"], "'bmp' is none of png, strip, pdf, gif, mp4, json"),
        (["--from", "empty.txt"], r"cannot read empty.txt/story.json: Not a directory"),
        (["--stories", "broken.jsonl"], "broken.jsonl:2 is not JSON"),
        (["--stories", "a.jsonl", "--first-frame", "a.png"], "--first-frame goes with --story"),
        (SAID + ["--checkpoint", "none"], "no folder none, and no Hub id OWNER/NAME"),
        (SAID + ["--checkpoint", "."], ". is not a checkpoint folder: model.json is missing"),
        (SAID + ["--out", "empty.txt/out"], "cannot write to empty.txt/out"),
        (SAID + ["--save-latents", "empty.txt/a.npy"], "cannot write to empty.txt"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("broken.jsonl").write_text(json.dumps({"id": "a", "sentences": SENTENCES}) + "\n{")
    Path("blank.jsonl").write_text(json.dumps({"id": "a", "sentences": []}))
    before = files(tmp_path)

    with pytest.raises(UserError, match=message):
        generate.main(["--out", "out", *arguments])

    assert files(tmp_path) == before
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SAID + ["--first-frame", "text.png"], "text.png is not an image"),
        (SAID + ["--first-frame", "a.png"], "has a first frame, but .* leave it out"),
        (SAID + ["--height", "18"], "multiples of 4 for this model; got 18 x 16"),
        (
            SAID + ["--height", "0", "--first-frame", "a.png"],
            "height must be an integer of at least 1",
        ),
        (SAID + ["--weights", "raw"], "holds no raw weights; give --weights ema"),
        (SAID + ["--negative-prompt", "a", "b"], "negative_prompt must be .* a list of 5"),
        (SAID + ["--steps", "0"], "steps must be at least 1; got 0"),
        (SAID + ["--guidance-scale", "nan"], "guidance_scale must be finite, at least 0; got nan"),
        (SAID + ["--image-guidance-scale", "2"], "needs a continuation model"),
        (SAID + ["--frameinit", "gaussian"], "frameinit needs a first frame"),
        (SAID + ["--scheduler", "euler", "--eta", "0.5"], "eta = 0.5 is for scheduler ddim"),
        (SAID + ["--seed", "-1"], "seed must be an integer in"),
        (SAID + ["--initial-latents", "none.npy"], "cannot read none.npy"),
        (SAID + ["--initial-latents", "text.png"], "text.png cannot be read as a .npy file"),
        (SAID + ["--initial-latents", "pickled.npy"], "pickled.npy cannot be read"),
        (SAID + ["--initial-latents", "several.npz"], "several.npz holds several arrays"),
        (SAID + ["--initial-latents", "double.npy"], "must be float32 .* got float64"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tiny_checkpoint, tmp_path, monkeypatch, capfd, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture, no array")
    Image.new("RGB", (8, 8)).save("a.png")
    np.save("double.npy", np.zeros((1, 5, 4, 4, 48)))
    np.save("pickled.npy", np.array([{}], object), allow_pickle=True)
    np.savez("several.npz", a=np.zeros(1))

    with pytest.raises(UserError, match=message):
        generate.main(["--checkpoint", str(tiny_checkpoint), "--out", "out", *arguments])

    assert not Path("out").exists()
    assert capfd.readouterr().err == ""


def test_a_continuation_model_needs_a_first_frame(tiny_continuation_checkpoint, tmp_path):
    with pytest.raises(UserError, match="has no first frame, but .* give an image"):
        generate.main(
            ["--checkpoint", str(tiny_continuation_checkpoint), "--out", str(tmp_path), *SAID]
        )


def test_bad_input_is_one_line_on_stderr_and_status_2(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "contextualstory_jax.generate", *SAID[:2]]
    command += ["--window-overlap", "9"]

    done = subprocess.run(
        [*command, "--checkpoint", tiny_checkpoint, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )

    expected = "error: --window-overlap must be an integer in 1..4; got 9\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_an_error_of_several_lines_is_printed_as_one(capsys):
    def main() -> None:
        raise UserError("first\nsecond")

    with pytest.raises(SystemExit, match="2"):
        run(main)

    assert capsys.readouterr().err == "error: first second\n"


def test_too_little_memory_is_one_line_and_other_failures_are_not_hidden(capsys):
    def too_large() -> None:
        raise RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 345")

    def broken() -> None:
        raise RuntimeError("INTERNAL: a defect")

    with pytest.raises(SystemExit, match="2"):
        run(too_large)
    assert capsys.readouterr().err == f"error: {OUT_OF_MEMORY}\n"
    with pytest.raises(RuntimeError, match="a defect"):
        run(broken)


def test_about_needs_neither_stories_nor_a_place_to_write(tiny_checkpoint, capsys):
    generate.main(["--about"])
    generate.main(["--about", "--checkpoint", str(tiny_checkpoint)])

    shipped, tiny = capsys.readouterr().out.split("A visualization model: ")[1:]
    assert "otto  he   blue square" in shipped
    assert "16 x 16 pixels.\nThe words of its training stories are not recorded." in tiny


def test_words_that_a_model_was_not_trained_on_are_warned_of(tmp_path, capsys):
    vocabulary = {"dataset": "folder", "names": [], "words": ["a", "cat", "sits"]}
    (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary))

    generate.warn_of_unknown_words(tmp_path, [Story(("A cat sits .", "A hat sits ."))])
    generate.warn_of_unknown_words(tmp_path / "none", [Story(("A hat .",))])

    expected = "warning: 'hat' is unknown to this model; closest known word: cat\n"
    assert capsys.readouterr().err == expected


def test_the_packages_names_are_there_and_no_others():
    assert contextualstory_jax.StoryPipeline.__name__ == "StoryPipeline"
    assert callable(contextualstory_jax.train_and_evaluate)
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = contextualstory_jax.Pipeline
