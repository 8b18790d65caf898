"""KID against its definition, pair by pair."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from contextualstory_jax.evaluation.metrics.kid import subset_distances


def k(a, b):
    return (a @ b / len(a) + 1) ** 3


def test_a_subset_of_all_is_the_unbiased_estimate():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 4)), rng.standard_normal((6, 4)) + 1

    (found,) = subset_distances(x, y, subsets=1, size=6, seed=0)

    within = [np.mean([k(a, b) for a, b in itertools.permutations(c, 2)]) for c in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert found == pytest.approx(sum(within) - 2 * across)


def test_equal_distributions_are_nought_on_average_and_others_are_not():
    x, y = np.random.default_rng(0).standard_normal((2, 400, 4))

    same = subset_distances(x, y, subsets=50, size=100, seed=1).mean()
    other = subset_distances(x, y + 1, subsets=50, size=100, seed=1).mean()

    assert abs(same) < 0.02 < other


def test_subsets_follow_from_the_seed():
    x, y = np.random.default_rng(0).standard_normal((2, 40, 4))

    first, again, other = (
        subset_distances(x, y, subsets=3, size=10, seed=seed) for seed in (1, 1, 2)
    )

    assert np.array_equal(first, again) and not np.isclose(first, other).any()
