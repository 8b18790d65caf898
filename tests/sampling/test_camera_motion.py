"""A camera's views of a still picture, worked out by hand."""

from __future__ import annotations

import typing

import numpy as np
import pytest

from contextualstory_jax.config.model_config import CameraMotion
from contextualstory_jax.sampling.camera_motion import film, resize


def ramp(rows: int, columns: int) -> np.ndarray:
    """A picture whose levels are ten times the column, in every row and colour."""
    levels = 10 * np.arange(columns, dtype=np.uint8)
    return np.broadcast_to(levels[None, :, None], (rows, columns, 3)).copy()


def columns_of(clip: np.ndarray) -> np.ndarray:
    """The levels of each view's columns, which are to be the same in every row and colour."""
    assert np.ptp(clip, axis=(1, 3)).max() < 1e-4
    return clip[:, 0, :, 0]


@pytest.mark.parametrize(
    ("motion", "lefts"), [("pan_right", [0, 1, 2, 3]), ("pan_left", [4, 3, 2, 1])]
)
def test_a_pan_crosses_a_wide_picture(motion, lefts):
    clip = film(ramp(2, 6), motion, frames=4, height=2, width=2)

    assert columns_of(clip).tolist() == [[10 * left, 10 * left + 10] for left in lefts]


def test_a_zoom_in_narrows_the_view():
    clip = film(ramp(6, 6), "zoom_in", frames=2, height=3, width=3)

    # Of twice the size asked for: all 6 columns, then 6 - int((6 - 4) * 1/2) = 5 from column 0;
    # column i of three is read at (i + 1/2) * 6/3 - 1/2, then at (i + 1/2) * 5/3 - 1/2.
    expected = [[5, 25, 45], [10 / 3, 20, 110 / 3]]
    np.testing.assert_allclose(columns_of(clip), expected, rtol=1e-5)


def test_a_zoom_out_widens_it():
    clip = film(ramp(6, 6), "zoom_out", frames=2, height=3, width=3)

    # First int(6 / 1.5) = 4 columns from column 1, read at (i + 1/2) * 4/3 - 1/2, then 5 from 0
    expected = [[10 + 5 / 3, 25, 40 - 5 / 3], [10 / 3, 20, 110 / 3]]
    np.testing.assert_allclose(columns_of(clip), expected, rtol=1e-5)


def test_a_picture_no_wider_than_the_view_holds_still_in_a_pan():
    tall = ramp(2, 4).transpose(1, 0, 2)

    clip = film(tall, "pan_right", frames=3, height=2, width=2)

    np.testing.assert_array_equal(clip, np.broadcast_to(tall[1:3], (3, 2, 2, 3)))


@pytest.mark.parametrize("motion", typing.get_args(CameraMotion))
@pytest.mark.parametrize("size", [(7, 5), (5, 7), (1, 9), (33, 40)])
def test_a_picture_of_any_shape_is_filmed_in_any_shape(motion, size):
    grey = np.full((*size, 3), 200, np.uint8)

    for height, width in ((8, 8), (4, 12), (12, 4)):
        clip = film(grey, motion, 5, height, width)

        assert clip.shape == (5, height, width, 3)
        np.testing.assert_allclose(clip, 200, rtol=1e-6)


def test_resizing_reads_between_pixel_centres_and_repeats_borders():
    larger = resize(ramp(1, 2), 2, 4)

    assert larger[:, :, 0].tolist() == [[0, 2.5, 7.5, 10]] * 2
    np.testing.assert_array_equal(resize(larger, 2, 4), larger)
