"""Frames to look at: enlarged where they are small, with their sentences under them."""

from __future__ import annotations

import numpy as np
import pytest
from font_roboto import Roboto
from PIL import ImageFont

from contextualstory_jax.sampling.captions import FONT_SIZE, MAX_LINES, VIEW_SIZE, viewable, wrap

FONT = ImageFont.truetype(Roboto, FONT_SIZE)


def frames(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(32, 32, 8), (8, 6, 32), (100, 60, 3), (255, 1, 2), (256, 32, 1), (300, 300, 1)],
)
def test_small_frames_are_enlarged_by_a_whole_factor(height, width, factor):
    views = viewable(frames(height, width), None)

    assert max(views[0].size) >= VIEW_SIZE
    for view, frame in zip(views, frames(height, width), strict=True):
        np.testing.assert_array_equal(np.asarray(view), frame.repeat(factor, 0).repeat(factor, 1))


def test_a_caption_stands_under_its_frame_on_white_paper():
    views = viewable(frames(32, 32), ["mia waves .", "she sleeps . " * 9])

    assert len({view.size for view in views}) == 1
    short, long = (np.asarray(view)[256:] for view in views)
    bare = np.asarray(viewable(frames(32, 32), None)[0])
    np.testing.assert_array_equal(np.asarray(views[0])[:256], bare)
    assert short.min() < 64 and long.min() < 64
    ink = [np.flatnonzero((paper < 128).any(axis=(1, 2))) for paper in (short, long)]
    assert ink[0].max() < len(short) // 2 < ink[1].max() < len(long) - 1


def test_an_empty_caption_leaves_the_paper_white():
    empty, _ = viewable(frames(32, 32), ["", "mia waves ."])

    assert np.asarray(empty)[256:].min() == 255


def test_letters_beyond_ascii_have_shapes_of_their_own():
    views = viewable(np.zeros((6, 256, 256, 3), np.uint8), ["Ü", "é", "Ω", "д", "ß", "U"])

    assert len({view.tobytes() for view in views}) == 6


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 100, [""]),
        ("  one   two ", 1000, ["one two"]),
        ("one two", 30, ["one", "two"]),
        ("www", 1, ["w", "w", "w"]),
        ("a iiiiii", 12, ["a", "iii", "iii"]),
    ],
)
def test_lines_break_between_words_and_inside_those_that_are_too_long(text, width, lines):
    assert wrap(text, FONT, width) == lines


def test_a_text_without_end_is_cut():
    lines = wrap("word " * 2000, FONT, 200)

    assert len(lines) == MAX_LINES
    assert lines[-1].endswith("…")
