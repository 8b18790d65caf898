"""FrameInit's filters and their mixing, worked out by hand and against plain NumPy."""

from __future__ import annotations

import itertools
import math
import typing

import jax
import numpy as np
import pytest

from contextualstory_jax.config.model_config import FrameInitConfig, SchedulerConfig
from contextualstory_jax.diffusion.frameinit import FrameInit, low_pass_filter, make_frameinit, mix
from contextualstory_jax.utils.errors import UserError

METHODS = typing.get_args(typing.get_type_hints(FrameInitConfig)["method"])


def test_gaussian():
    config = FrameInitConfig("gaussian", spatial=0.5, temporal=0.25)

    low_pass = low_pass_filter(config, (4, 4, 4))

    # exp(-d^2 / (2 * 0.5^2)); an axis has the coordinates -1, -0.5, 0, 0.5, twice that over frames
    column, row = [np.exp([-2, -0.5, 0, -0.5])] * 2
    frame = np.exp([-8, -2, 0, -2])
    np.testing.assert_allclose(low_pass, np.einsum("f,p,q->fpq", frame, row, column), rtol=1e-12)


def test_butterworth():
    config = FrameInitConfig("butterworth", spatial=0.5, temporal=0.5, order=3)

    low_pass = low_pass_filter(config, (4, 4, 4))

    # 1 / (1 + (d^2 / 0.25)^3): half at the stop frequency
    np.testing.assert_allclose(low_pass[2, 2], [1 / 65, 1 / 2, 1, 1 / 2], rtol=1e-12)
    np.testing.assert_allclose(low_pass[:, 2, 2], [1 / 65, 1 / 2, 1, 1 / 2], rtol=1e-12)
    np.testing.assert_allclose(low_pass[3, 3, 3], 1 / (1 + 3**3), rtol=1e-12)


def test_ideal():
    # A ball of radius sqrt(2 * 0.125) = 0.5, half as thick over frames
    config = FrameInitConfig("ideal", spatial=0.125, temporal=0.0625)

    low_pass = low_pass_filter(config, (4, 4, 4))

    expected = np.zeros((4, 4, 4))
    expected[2] = [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]
    np.testing.assert_array_equal(low_pass, expected)


def test_box():
    config = FrameInitConfig("box", spatial=0.5, temporal=0.4)

    low_pass = low_pass_filter(config, (5, 4, 6))

    # Half widths: round(2 * 0.4) = 1 frame, round(2 * 0.5) = 1 row and as many columns
    expected = np.zeros((5, 4, 6))
    expected[1:3, 1:3, 2:4] = 1
    np.testing.assert_array_equal(low_pass, expected)


def test_a_box_of_the_defaults_lets_nothing_of_five_frames_pass():
    assert low_pass_filter(FrameInitConfig("box"), (5, 32, 32)).sum() == 0  # round(0.5) is 0
    assert low_pass_filter(FrameInitConfig("box", temporal=0.3), (5, 32, 32)).sum() == 2 * 8 * 8


@pytest.mark.parametrize("method", METHODS)
def test_a_filter_is_the_formula_entry_by_entry(method):
    config = FrameInitConfig(method, spatial=0.3, temporal=0.7, order=2)
    shape = (5, 6, 8)

    low_pass = low_pass_filter(config, shape)

    for place in itertools.product(*map(range, shape)):
        f, p, q = (2 * i / n - 1 for i, n in zip(place, shape, strict=True))
        squared = (0.3 / 0.7 * f) ** 2 + p**2 + q**2
        expected = {
            "gaussian": math.exp(-squared / (2 * 0.3**2)),
            "butterworth": 1 / (1 + (squared / 0.3**2) ** 2),
            "ideal": float(squared <= 0.6),
            # Half widths: round(2 * 0.7) = 1, round(3 * 0.3) = 1
            "box": float(place[0] in (1, 2) and place[1] in (2, 3) and place[2] in (3, 4)),
        }[method]
        assert low_pass[place] == pytest.approx(expected, rel=1e-12), place


@pytest.mark.parametrize("method", ["gaussian", "butterworth", "ideal"])
def test_a_filter_is_symmetric_but_for_the_frames_of_an_odd_number(method):
    low_pass = low_pass_filter(FrameInitConfig(method, spatial=0.4), (5, 8, 8))

    for axis in (1, 2):  # frequency k stands 4 + k from the start
        beyond = low_pass.take(range(1, 8), axis)
        np.testing.assert_array_equal(beyond, np.flip(beyond, axis))
    # Frequencies 0 and 1 (of frames 2 and 3) pass alike, as in the original.
    np.testing.assert_allclose(low_pass[2], low_pass[3], rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [{"spatial": 0.0}, {"temporal": 0.0}])
def test_at_a_stop_frequency_of_0_nothing_passes(method, stop):
    assert low_pass_filter(FrameInitConfig(method, **stop), (5, 4, 4)).sum() == 0


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


CLIP, NOISE = normal(0, (2, 5, 4, 6, 3)), normal(1, (2, 5, 4, 6, 3))


def test_where_all_passes_the_noise_becomes_the_noisy_clip_and_where_nothing_does_it_stays():
    signal, sigma = np.float32(0.6), np.float32(0.8)
    all_passes = FrameInit(np.ones((5, 4, 6), np.float32), np.array(signal), np.array(sigma))
    nothing_does = all_passes._replace(low_pass=np.zeros((5, 4, 6), np.float32))

    noisy_clip, kept = (jax.jit(mix)(way, CLIP, NOISE) for way in (all_passes, nothing_does))

    np.testing.assert_allclose(noisy_clip, 0.6 * CLIP + 0.8 * NOISE, atol=1e-5)
    np.testing.assert_array_equal(kept, NOISE)


@pytest.mark.parametrize("method", METHODS)
def test_low_frequencies_of_the_noisy_clip_join_high_ones_of_the_noise(method):
    config = FrameInitConfig(method, level=300, spatial=0.5, temporal=0.5)
    low_pass = low_pass_filter(config, (5, 4, 6))[..., None]
    betas = np.linspace(0.00085, 0.012, 1000)
    kept = np.prod(1 - betas[:301])

    ours = jax.jit(mix)(make_frameinit(config, SchedulerConfig(), (5, 4, 6)), CLIP, NOISE)

    axes = (1, 2, 3)
    noisy_clip = np.sqrt(kept) * CLIP + np.sqrt(1 - kept) * NOISE
    low, high = (np.fft.fftshift(np.fft.fftn(x, axes=axes), axes) for x in (noisy_clip, NOISE))
    mixed = np.fft.ifftshift(low * low_pass + high * (1 - low_pass), axes)
    np.testing.assert_allclose(ours, np.fft.ifftn(mixed, axes=axes).real, atol=1e-5)
    assert np.abs(ours - NOISE).max() > 0.1


def test_a_still_clip_is_its_one_frame_again_and_again():
    way = make_frameinit(FrameInitConfig(), SchedulerConfig(), (5, 4, 6))
    still = CLIP[:, :1]

    one, five = (jax.jit(mix)(way, clip, NOISE) for clip in (still, np.repeat(still, 5, axis=1)))

    np.testing.assert_allclose(one, five, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"level": -1}, "frameinit: level must be at least 0; got -1"),
        ({"spatial": 1.5}, r"frameinit: spatial must be in \[0, 1\]; got 1.5"),
        ({"temporal": -0.1}, r"frameinit: temporal must be in \[0, 1\]; got -0.1"),
        ({"temporal": math.nan}, r"frameinit: temporal must be finite, in \[0, 1\]; got nan"),
        ({"order": 0}, "frameinit: order must be at least 1; got 0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        FrameInitConfig(**values)


def test_a_level_past_the_schedule_is_refused():
    make_frameinit(FrameInitConfig(level=999), SchedulerConfig(), (5, 4, 4))
    with pytest.raises(UserError, match=r"level must be a timestep, 0\.\.999; got 1000"):
        make_frameinit(FrameInitConfig(level=1000), SchedulerConfig(), (5, 4, 4))
