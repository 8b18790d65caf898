"""Drawing a whole test split: whole or not at all, on where it stopped, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.loader import open_stories
from contextualstory_jax.data.shapes import ShapesSource
from contextualstory_jax.evaluate import main
from contextualstory_jax.evaluation import results as gallery_module
from contextualstory_jax.evaluation import results_html
from contextualstory_jax.evaluation.results import SIDE, TEXT_HEIGHT, Gallery, figure
from contextualstory_jax.evaluation.sample_split import generate_split, story_of
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.sampling.pipeline import Generated, StoryPipeline
from contextualstory_jax.testing.published_folders import (
    write_flintstones,
    write_pororo,
    write_story_folder,
)
from contextualstory_jax.utils.cli import run
from contextualstory_jax.utils.errors import UserError

ROOT = Path(__file__).parents[2]
WRITE = {"pororo": write_pororo, "flintstones": write_flintstones}
COUNTS = {"pororo": 3, "flintstones": 2}  # of the test splits


def options(name, root):
    """Arguments that name a dataset."""
    recipe = ROOT / "tests" / "helpers" / "tiny_config.py"
    return [f"--config={recipe}", f"--config.data.name={name}", f"--config.data.root={root}"]


def read_records(out):
    return [json.loads(line) for line in (out / "frames.jsonl").read_text("utf-8").splitlines()]


def pixels(path):
    return np.asarray(Image.open(path))


def files(folder):
    """The bytes of every file in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ------------------------------------------------------------- the command on the real datasets


@pytest.fixture(
    scope="module", params=["pororo", pytest.param("flintstones", marks=pytest.mark.slow)]
)
def evaluated(request, tiny_checkpoint, tiny_continuation_checkpoint, tmp_path_factory):
    """A dataset's name and folder, the model's, and what the command wrote of them.

    PororoSV is drawn from sentences alone, FlintstonesSV from a first frame too.
    """
    name = request.param
    root = WRITE[name](tmp_path_factory.mktemp(name) / "data")
    checkpoint = tiny_continuation_checkpoint if name == "flintstones" else tiny_checkpoint
    out = tmp_path_factory.mktemp(name) / "out"
    main([*options(name, root), f"--checkpoint={checkpoint}", f"--out={out}", "--batch-size=2"])
    return name, root, checkpoint, out


def test_every_frame_of_the_split_has_a_record(evaluated):
    name, root, _, out = evaluated
    source = open_stories(DataConfig(name=name, root=str(root)), "test", 16)

    records = read_records(out)

    assert len(source) == COUNTS[name]
    assert len(records) == 5 * len(source)
    for number in range(len(source)):
        story, example = source.story(number), source[number]
        for i, record in enumerate(records[5 * number : 5 * number + 5]):
            assert (record["story"], record["position"]) == (story.story_id, i)
            assert (record["id"], record["source_id"]) == (
                story.frame_ids[i],
                story.source_frame_ids[i],
            )
            assert record["sentence"] == story.sentences[i]
            assert record["characters"] == sorted(story.labels[i].characters)
            assert np.array_equal(pixels(out / record["original"]), example.images[i])
            assert pixels(out / record["generated"]).shape == (16, 16, 3)
            assert record["given"] == (name == "flintstones" and i == 0)


def test_frames_that_stories_share_are_drawn_for_each(evaluated):
    records = read_records(evaluated[3])

    assert max(Counter(record["source_id"] for record in records).values()) > 1
    for key in ("id", "generated", "original"):
        assert len({record[key] for record in records}) == len(records)


def test_texts_and_figures_are_beside_the_pictures(evaluated):
    for record in read_records(evaluated[3]):
        folder = (evaluated[3] / record["generated"]).parent
        sentences = (folder / "text.txt").read_text("utf-8").splitlines()
        assert sentences[record["position"]] == record["sentence"]
        assert Image.open(folder / "figure.png").size == (5 * SIDE, TEXT_HEIGHT + 2 * SIDE)


def test_no_metrics_are_made_up(evaluated):
    settings = json.loads((evaluated[3] / "settings.json").read_text())

    assert settings["metrics"] == []
    assert not (evaluated[3] / "metrics.json").exists()
    task = "continuation" if evaluated[0] == "flintstones" else "visualization"
    assert (settings["task"], settings["stories"]) == (task, COUNTS[evaluated[0]])


@pytest.mark.parametrize("evaluated", ["pororo"], indirect=True)
def test_a_second_start_draws_nothing_wherever_the_model_and_the_data_lie(evaluated, tmp_path):
    name, root, checkpoint, out = evaluated
    moved = shutil.copytree(checkpoint, tmp_path / "model")
    data = shutil.copytree(root, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (out / "stories").rglob("*")}

    main([*options(name, data), f"--checkpoint={moved}", f"--out={out}"])

    assert {path: path.stat().st_mtime_ns for path in (out / "stories").rglob("*")} == before


@pytest.mark.parametrize("evaluated", ["pororo"], indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("--seed=1", "seed = 0, not 1;"),
        ("--checkpoint={other}", "task = 'visualization', not 'continuation';"),
        ("--stories=9", "the test split has 3 stories; --stories 9 are more"),
    ],
)
def test_another_start_in_the_folder_is_refused(
    evaluated, change, reason, tiny_continuation_checkpoint, capsys
):
    name, root, checkpoint, out = evaluated
    before = files(out)
    arguments = [*options(name, root), f"--checkpoint={checkpoint}", f"--out={out}"]
    arguments += [change.format(other=tiny_continuation_checkpoint)]

    with pytest.raises(SystemExit) as exit:
        run(lambda: main(arguments))

    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
    assert files(out) == before


# --------------------------------------------------------- what needs no model: a painter in flats


class Painter(StoryPipeline):
    """Draws five flat pictures of a colour that the sentences decide."""

    def __init__(self, config):
        self.model = StoryModel(config)
        self.batches = []

    def draw(self, stories, *, seed, batch_size, **_):
        assert len(stories) == batch_size
        self.batches.append([story.id for story in stories])
        colours = [[sum(sentence.encode()) % 256 for sentence in s.sentences] for s in stories]
        pictures = np.broadcast_to(
            np.array(colours, np.uint8)[..., None, None, None], (len(stories), 5, 16, 16, 3)
        )
        return Generated(pictures, np.zeros((len(stories), 5, 4, 4, 48), np.float32))


SETTINGS = {
    "checkpoint": "painter",
    "step": 0,
    "data": {"name": "<shapes>", "seed": 0},
    "split": "test",
    "stories": 5,
    "width": 16,
    "height": 16,
    "metrics": [],
}
SOURCE = ShapesSource(0, "test", 16)
STORIES = [story_of(SOURCE, number) for number in range(5)]


@pytest.fixture
def painter(tiny_model_config):
    return Painter(tiny_model_config)


def paint(painter, folder, stories=STORIES, source=SOURCE, **settings):
    """Draw stories in twos, and return the gallery."""
    gallery = Gallery(folder, SETTINGS)
    generate_split({"frame": painter}, source, stories, gallery, batch_size=2, **settings)
    return gallery


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": 7}, "step = 0, not 7;"),
        ({"data": {"name": "<shapes>", "seed": 1}}, "data.seed = 0, not 1;"),
        ({"weights_sha256": "ab"}, "weights_sha256 = None, not 'ab';"),
        ({"data": {"name": "<shapes>"}}, "data.seed = 0, not None;"),
    ],
)
def test_the_setting_that_is_another_is_named(painter, tmp_path, change, reason):
    paint(painter, tmp_path)

    with pytest.raises(UserError, match=re.escape(f"holds stories generated with {reason}")):
        Gallery(tmp_path, SETTINGS | change).check()


@pytest.mark.parametrize("key", ["checkpoint", "stories", "metrics"])
def test_what_decides_no_picture_may_change(painter, tmp_path, key):
    paint(painter, tmp_path)

    Gallery(tmp_path, SETTINGS | {key: "other"}).check()


class Stopped(Exception):
    """The end of a process."""


def test_a_stopped_start_goes_on_to_the_same_files(painter, tmp_path):
    written = []

    def stop(count):
        written.append(count)
        if sum(written) == 2:
            raise Stopped

    paint(painter, tmp_path / "whole")
    with pytest.raises(Stopped):
        paint(painter, tmp_path / "stopped", progress=stop)
    there = {path.name for path in (tmp_path / "stopped" / "stories").iterdir()}
    painter.batches.clear()

    paint(painter, tmp_path / "stopped")

    assert 2 <= len(there) < 5
    lacking = [s.id for s in STORIES if f"{s.number:05d}-{s.id}" not in there]
    assert list(dict.fromkeys(sum(painter.batches, []))) == lacking
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def lose(folder):
    (folder / "frame_3.png").unlink()


def cut(folder):
    (folder / "original_0.png").write_bytes((folder / "original_0.png").read_bytes()[:-10])


def spoil(folder):
    (folder / "story.json").write_text("{")


def retell(folder):
    story = json.loads((folder / "story.json").read_text())
    story["frames"][2]["sentence"] = "It was another story then."
    (folder / "story.json").write_text(json.dumps(story))


@pytest.mark.parametrize("damage", [lose, cut, spoil, retell])
def test_a_story_that_is_not_whole_is_drawn_anew(painter, tmp_path, damage):
    gallery = paint(painter, tmp_path)
    before = files(tmp_path)
    damage(gallery.place(STORIES[3]))
    painter.batches.clear()

    paint(painter, tmp_path)

    assert painter.batches == [[STORIES[3].id]]
    assert files(tmp_path) == before


def test_what_a_killed_process_left_is_removed(painter, tmp_path):
    left = tmp_path / "stories" / f".00001-{STORIES[1].id}.4711"
    left.mkdir(parents=True)
    (left / "frame_0.png").write_text("half")

    paint(painter, tmp_path)

    assert not left.exists()


def test_a_full_disk_leaves_no_part_of_a_story(painter, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gallery_module, "save_frames", fail)

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        paint(painter, tmp_path)

    assert list((tmp_path / "stories").iterdir()) == []


def test_no_more_than_three_batches_are_in_memory(painter, tmp_path):
    class Counting(ShapesSource):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    source = Counting(0, "test", 16)
    stories = [story_of(SOURCE, number) for number in range(12)]
    written, held = [], []
    draw = painter.draw

    def watched(batch, **options):
        held.append(source.reads - sum(written))
        return draw(batch, **options)

    painter.draw = watched

    paint(painter, tmp_path, stories, source, progress=written.append)

    assert len(held) == 6 and sum(written) == source.reads == 12
    assert max(held) <= 3 * 2


def test_a_picture_that_cannot_be_read_is_named(painter, tmp_path):
    root = write_story_folder(tmp_path / "data", counts={"test": 3})
    (root / "pictures" / "test-2-1.png").write_text("no picture")
    source = open_stories(DataConfig(name="folder", root=str(root)), "test", 16)

    with pytest.raises(UserError, match=re.escape("test-2-1.png")):
        paint(painter, tmp_path / "out", [story_of(source, i) for i in range(3)], source)


# ---------------------------------------------------------------------------- pages and figures


def write_pages(gallery, count):
    results_html.write_index(gallery, "A & B", STORIES[:count], {"original": "original"})


def test_pages_link_one_another_and_show_every_picture(painter, tmp_path, monkeypatch):
    monkeypatch.setattr(results_html, "STORIES", 2)
    gallery = paint(painter, tmp_path)

    write_pages(gallery, 5)

    shown = []
    for name in ("index.html", "page_2.html", "page_3.html"):
        text = (tmp_path / name).read_text("utf-8")
        assert "A &amp; B" in text and "&lt;shapes&gt;" in text and "<script" not in text
        links = re.findall(r'href="([^"]+)"', text)
        others = {"index.html", "page_2.html", "page_3.html"} - {name}
        assert {link for link in links if link.endswith(".html")} == others
        places = [link for link in links if link.endswith("figure.png")]
        pictures = re.findall(r'<img class="small" loading="lazy" src="([^"]+)"', text)
        assert all((tmp_path / path).is_file() for path in places + pictures)
        shown += pictures
    assert len(set(shown)) == 5 * 5


def test_pages_of_an_earlier_start_with_more_stories_are_removed(painter, tmp_path, monkeypatch):
    monkeypatch.setattr(results_html, "STORIES", 2)
    gallery = paint(painter, tmp_path)
    write_pages(gallery, 5)

    write_pages(gallery, 3)

    assert {path.name for path in tmp_path.glob("*.html")} == {"index.html", "page_2.html"}
    assert len(read_records(tmp_path)) == 3 * 5


def test_a_story_that_another_process_wrote_elsewhere_is_missed(painter, tmp_path):
    gallery = paint(painter, tmp_path, STORIES[:2])

    with pytest.raises(UserError, match="all processes must write to one folder"):
        write_pages(gallery, 3)

    assert not (tmp_path / "frames.jsonl").exists()


def test_a_figure_has_text_over_originals_over_drawn_frames():
    grey = np.full((5, 16, 16, 3), 90, np.uint8)
    words = "a rather long sentence that goes on and on until the line is full " * 5

    short = np.asarray(figure(["Hello."] * 5, grey, grey + 50))
    long = np.asarray(figure([words] * 5, grey, grey + 50))

    for picture in (short, long):
        height, width, _ = picture.shape
        assert width == 5 * SIDE
        assert (picture[height - 2 * SIDE : height - SIDE] == 90).all()
        assert (picture[height - SIDE :] == 140).all()
        text = (picture[: height - 2 * SIDE] < 128).any(axis=2)
        assert text.any() and not text[:, -4:].any() and not text[-1].any()
    assert len(short) == TEXT_HEIGHT + 2 * SIDE < len(long)


# -------------------------------------------------------------------------------- several hosts

PROCESS = """
import sys, jax
number, port, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from contextualstory_jax.evaluate import main
main(arguments)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("evaluated", ["pororo"], indirect=True)
def test_two_processes_draw_what_one_does(evaluated, tmp_path, free_port):
    name, root, checkpoint, out = evaluated
    arguments = [*options(name, root), f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}"]

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(n), free_port, *arguments, "--batch-size=2"],
            cwd=ROOT,
        )
        for n in range(2)
    ]

    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert files(tmp_path / "out").keys() == files(out).keys()
    for ours, theirs in zip(read_records(tmp_path / "out"), read_records(out), strict=True):
        assert ours == theirs
        apart = pixels(tmp_path / "out" / ours["generated"]).astype(int)
        apart -= pixels(out / theirs["generated"])
        assert np.abs(apart).max() <= 1  # a batch of another size may round otherwise


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])
