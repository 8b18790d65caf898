"""The storybook page: what is in it, and that a browser shows it."""

from __future__ import annotations

import html.parser
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.loader import test_stories as held_out_stories
from contextualstory_jax.evaluation.compare import Result, measure
from contextualstory_jax.evaluation.metrics.characters import METRICS, SUBSETS
from contextualstory_jax.evaluation.storybook import read_losses, write_storybook
from contextualstory_jax.utils.errors import UserError

STORIES, SHOWN = 3, 2
LOSSES = [(10, 1.0), (20, 0.1), (30, 0.05)]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def stories():
    return held_out_stories(DataConfig(), 32, STORIES)


@pytest.fixture(scope="module")
def page(stories, tmp_path_factory):
    """A page of the originals and of noise, under a name that HTML must quote."""
    originals = np.stack([story.images for story in stories])
    noise = np.random.default_rng(0).integers(0, 256, originals.shape).astype(np.uint8)
    results = {
        name: Result(pictures, measure(stories, pictures))
        for name, pictures in {"originals": originals, "<noise> & more": noise}.items()
    }
    path = tmp_path_factory.mktemp("book") / "storybook.html"
    write_storybook(path, stories, results, LOSSES, shown=SHOWN, about="A < B.")
    return path


class Elements(html.parser.HTMLParser):
    """The start tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_every_picture_shown_is_described_by_its_sentence(page, stories):
    pictures = Elements(page.read_text()).named("img")

    sentences = [s for story in stories[:SHOWN] for _ in range(2) for s in story.sentences]
    assert [picture["alt"] for picture in pictures] == sentences


def test_the_page_needs_nothing_else(page):
    found = Elements(page.read_text())

    links = [a[key] for _, a in found.tags for key in ("src", "href") if key in a]
    assert links and all(link.startswith("data:") for link in links)
    assert not found.named("script")
    assert "url(" not in page.read_text() and "@import" not in page.read_text()


def test_text_is_quoted(page):
    text = Elements(page.read_text()).text

    assert "<noise> & more" in text
    assert "A < B." in text


def test_the_table_holds_every_metric_of_every_result(page):
    text = re.sub(r"\s+", " ", Elements(page.read_text()).text)

    assert "all frames (15)" in text
    cells = len(SUBSETS) * len(METRICS)
    assert text.count("1.000 [1.00, 1.00]") == cells  # of the originals
    assert text.count("0.000 [0.00, 0.00]") == cells  # of noise


def test_a_frame_that_needs_its_context_shows_what_that_tells(page, stories):
    labels = [label for story in stories[:SHOWN] for label in story.labels]
    hints = [f"{' and '.join(sorted(x.characters))}, {x.scene}" for x in labels if x.needs_context]

    shown = re.findall(r'<td>.+?<div class="faint">(.+?)</div></td>', page.read_text())

    assert shown == hints


def test_the_curve_falls_from_left_to_right(page):
    (line,) = Elements(page.read_text()).named("polyline")

    points = np.array([point.split(",") for point in line["points"].split()], float)
    assert len(points) == len(LOSSES)
    assert (np.diff(points, axis=0) > 0).all()  # y is downwards


def test_losses_are_read_from_a_workdir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 0.5, "grad_norm": 1.0}\n{"step": 10, "loss": 0.25}\n'
    )

    assert read_losses(tmp_path / "metrics.jsonl") == [(5, 0.5), (10, 0.25)]


def test_a_place_that_cannot_be_written_is_named(stories, tmp_path):
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(UserError, match="storybook.html"):
        write_storybook(tmp_path / "file" / "storybook.html", stories, _one(stories), LOSSES)


def _one(stories):
    pictures = np.stack([story.images for story in stories])
    return {"originals": Result(pictures, measure(stories, pictures))}


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH, nor in CHROMIUM")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_loads_every_picture(page, tmp_path, width):
    report = """<script>
    addEventListener("load", () => {
      const pictures = [...document.images], shown = pictures.filter(i => i.naturalWidth > 0);
      const wide = document.documentElement.scrollWidth > innerWidth;
      document.body.textContent =
        `${shown.length} of ${pictures.length} pictures, ${wide ? "too wide" : "fits"}`;
    });
    </script></body>"""
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", report))

    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )

    count = 5 * 2 * SHOWN
    assert f"{count} of {count} pictures, fits" in done.stdout
