"""Stories as strips, documents and videos."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image, PdfParser

from contextualstory_jax.sampling import export_formats
from contextualstory_jax.sampling.captions import viewable
from contextualstory_jax.sampling.export_formats import (
    FADE,
    FORMATS,
    GRID_GAP,
    HOLD,
    check_formats,
    contact_sheet,
    mp4,
    pdf,
    side_by_side,
)
from contextualstory_jax.utils.errors import UserError

SENTENCES = [
    "mia waves .",
    "she sleeps .",
    "otto comes .",
    "they eat .",
    "otto leaves .",
    "she runs .",
]


def frames(count: int = 5) -> np.ndarray:
    """Frames of one colour each."""
    colours = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 3), np.uint8)
    return np.broadcast_to(colours, (count, 32, 30, 3))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return np.max(np.abs(one.astype(int) - other.astype(int)))


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_story_is_the_same_bytes(name):
    if name == "mp4":
        pytest.importorskip("av")
    _, export = FORMATS[name]

    first = export(frames(), SENTENCES[:5])

    assert first == export(frames(), SENTENCES[:5])
    assert first != export(frames(), SENTENCES[1:])
    assert first != export(frames(), None)


def test_a_document_has_a_page_for_each_frame_and_one_with_all():
    data = pdf(frames(6), SENTENCES)

    views = viewable(frames(6), SENTENCES)
    expected = [*views, side_by_side(views, 5)]
    images = re.split(b"(?=\xff\xd8\xff)", data)[1:]
    assert len(PdfParser.PdfParser(buf=data).pages) == len(images) == 7
    for page, image in zip(expected, images, strict=True):
        found = Image.open(io.BytesIO(image)).convert("RGB")
        assert found.size == page.size
        assert np.mean(np.abs(np.asarray(found).astype(int) - np.asarray(page))) < 1
    assert expected[-1].size == (5 * 240 + 4 * GRID_GAP, 2 * views[0].height + GRID_GAP)


def test_a_document_of_the_longest_story_fits_the_format():
    data = pdf(frames(100), ["mia waves ."] * 100)

    boxes = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", data)
    assert len(boxes) == 101
    assert max(float(side) for box in boxes for side in box) < 14_400  # points: the format's limit


def test_a_video_holds_each_frame_and_fades_into_the_next():
    av = pytest.importorskip("av")
    data = mp4(frames(3), SENTENCES[:3])

    with av.open(io.BytesIO(data)) as container:
        shown = [image.to_ndarray(format="rgb24") for image in container.decode(video=0)]

    views = [np.asarray(view) for view in viewable(frames(3), SENTENCES[:3])]
    assert len(shown) == 3 * HOLD + 2 * FADE
    inside = np.s_[20:200, 20:200]
    for i, view in enumerate(views):
        start = i * (HOLD + FADE)
        assert difference(shown[start][inside], view[inside]) < 12
        assert difference(shown[start + HOLD - 1][inside], view[inside]) < 12
    middle = (views[0].astype(float) + views[1]) / 2
    assert difference(shown[HOLD + FADE // 2][inside], middle[inside]) < 24
    height, width = views[0].shape[:2]
    assert shown[0].shape == (height + height % 2, width + width % 2, 3)


def test_a_format_whose_library_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(export_formats.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "av", None)

    check_formats(["pdf", "gif", "strip"])
    with pytest.raises(UserError, match=r"mp4 needs PyAV: pip install '.*\[studio\]'"):
        mp4(frames(), None)


def test_a_contact_sheet_has_a_row_for_each_version():
    stories = np.stack([frames(), frames()[::-1]])

    sheet = Image.open(io.BytesIO(contact_sheet(stories, ["seed 1", "seed 2"])))

    row = np.asarray(side_by_side(viewable(frames(), ["seed 1", *[""] * 4])))
    assert sheet.size == (row.shape[1], 2 * row.shape[0] + GRID_GAP)
    np.testing.assert_array_equal(np.asarray(sheet)[: len(row)], row)
    other = np.asarray(sheet)[len(row) + GRID_GAP :]
    np.testing.assert_array_equal(other[:256, :240], row[:256, -240:])
