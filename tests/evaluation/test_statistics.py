"""The Frechet distance against closed forms and SciPy's root, its jackknife, and its files."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from contextualstory_jax.evaluation.measurement import jackknife_interval, mean_interval
from contextualstory_jax.evaluation.statistics import (
    Statistics,
    distances_without,
    frechet_distance,
    read_statistics,
    root,
    statistics,
    write_statistics,
)
from contextualstory_jax.utils.errors import UserError


def features(count, size, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, size)) @ rng.standard_normal((size, size)) + seed


def test_the_statistics_are_numpys():
    x = features(20, 5, 1).astype(np.float32)

    mu, sigma = statistics(x)

    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False))


def test_the_distance_of_diagonal_covariances_is_the_closed_form():
    a = Statistics(np.array([0.0, 0, 0]), np.diag([1.0, 4, 9]))
    b = Statistics(np.array([1.0, 2, 2]), np.diag([4.0, 4, 0]))

    # 1 + 4 + 4, and (1 - 2)^2 + (2 - 2)^2 + (3 - 0)^2 of the deviations
    assert frechet_distance(a, b) == pytest.approx(9 + 10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [300, 8], ids=["full rank", "singular"])
def test_the_distance_is_that_of_the_root_of_the_product(count):
    a, b = statistics(features(count, 12, 1)), statistics(features(count, 12, 2))

    roots = np.sqrt(np.linalg.eigvals(a.sigma @ b.sigma).astype(complex)).real.sum()
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma) - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    if count == 300:
        trace = np.trace(scipy.linalg.sqrtm(a.sigma @ b.sigma)).real
        assert trace == pytest.approx(roots, rel=1e-9)


def test_a_product_without_a_root_is_offset(monkeypatch):
    a, b = statistics(features(50, 4, 1)), statistics(features(50, 4, 2))
    offset = 1e-6 * np.eye(4)
    expected = frechet_distance(
        Statistics(a.mu, a.sigma + offset), Statistics(b.mu, b.sigma + offset)
    )
    eigvalsh, fail = np.linalg.eigvalsh, iter([True, False])

    def fails_once(matrix):
        if next(fail):
            raise np.linalg.LinAlgError
        return eigvalsh(matrix)

    monkeypatch.setattr(np.linalg, "eigvalsh", fails_once)

    # Only the trace of the root is offset, as in pytorch-fid.
    assert frechet_distance(a, b) == pytest.approx(expected - 8e-6, abs=1e-12)


@pytest.mark.parametrize(("count", "size"), [(60, 8), (24, 40)], ids=["n > d", "n < d"])
def test_leaving_groups_out_equals_the_distance_of_the_rest(count, size):
    x, b = features(count, size, 3), statistics(features(50, size, 4))
    groups = np.array_split(np.arange(count), 5)

    found = distances_without(x, groups, b, root(b.sigma))

    expected = [frechet_distance(statistics(np.delete(x, rows, axis=0)), b) for rows in groups]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).standard_normal(40)
    left_out = [np.delete(values, i).mean() for i in range(40)]

    value, low, high = jackknife_interval(values.mean(), left_out)[:3]

    error = values.std(ddof=1) / np.sqrt(40)
    assert (low, high) == pytest.approx(
        (value - 1.95996 * error, value + 1.95996 * error), rel=1e-5
    )


def test_a_mean_over_frames_resamples_stories():
    # The frames of a story are equal: forty stories, not two hundred values.
    of_story = np.random.default_rng(0).standard_normal(40)
    stories = [f"s{i}" for i in range(40) for _ in range(5)]

    value, low, high = mean_interval(np.repeat(of_story, 5), stories)[:3]

    assert value == pytest.approx(of_story.mean())
    assert high - low == pytest.approx(2 * 1.96 * of_story.std() / np.sqrt(40), rel=0.1)
    assert mean_interval(np.ones(3), ["a", "a", "a"])[:3] == (1, None, None)


def test_a_file_of_statistics_has_pytorch_fids_keys(tmp_path):
    found = statistics(features(20, 5, 1))

    write_statistics(tmp_path / "s.npz", found)

    with np.load(tmp_path / "s.npz") as file:
        assert sorted(file) == ["mu", "sigma"]
    again = read_statistics(tmp_path / "s.npz")
    assert np.array_equal(again.mu, found.mu) and np.array_equal(again.sigma, found.sigma)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.zeros((3, 2))},
        {"mu": np.zeros((3, 3)), "sigma": np.eye(9)},
        {"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)},
        {"mu": np.array([{}]), "sigma": np.eye(1)},
        {"mu": np.array(["a"]), "sigma": np.eye(1)},
    ],
    ids=["no sigma", "not square", "mu a matrix", "not finite", "pickled", "text"],
)
def test_another_file_is_refused(arrays, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)

    with pytest.raises(UserError, match="no file of statistics"):
        read_statistics(tmp_path / "s.npz")


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 nothing more")

    with pytest.raises(UserError, match="no file of statistics"):
        read_statistics(tmp_path / "s.npz")


def test_too_little_for_statistics_is_refused():
    with pytest.raises(UserError, match="two images or more"):
        statistics(np.zeros((1, 4)))
    with pytest.raises(UserError, match="not finite"):
        statistics(np.full((3, 4), np.nan))
