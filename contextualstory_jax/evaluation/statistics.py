"""Means and covariances of features, the Frechet distance between two, and files of them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from contextualstory_jax.utils.atomic import atomic_path
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import check_file

OFFSET = 1e-6  # on the diagonals of covariances whose product has no root


class Statistics(NamedTuple):
    """Mean and covariance, float64, under pytorch-fid's names."""

    mu: Float64[np.ndarray, "d"]
    sigma: Float64[np.ndarray, "d d"]


def statistics(features: Float[np.ndarray, "n d"]) -> Statistics:
    """The statistics of features. Raises `UserError` for fewer than two, or not finite ones."""
    require(len(features) >= 2, "a covariance needs two images or more; there is one")
    require(
        bool(np.isfinite(features).all()), "features are not finite; the weights must be damaged"
    )
    features = features.astype(np.float64)
    return Statistics(features.mean(axis=0), np.cov(features, rowvar=False))


def read_statistics(path: Path) -> Statistics:
    """Statistics of a .npz file with `mu` and `sigma`, as pytorch-fid writes it.

    Raises `UserError` where it is no such file.
    """
    check_file(path, "name a .npz file of statistics, or a folder of images")
    form = f"{path} is no file of statistics: a .npz with mu (d,) and sigma (d, d)"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Statistics(*(np.asarray(file[name], np.float64) for name in ("mu", "sigma")))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{form}; write it with --save-statistics") from error
    size = found.mu.size
    require(
        found.mu.shape == (size,)
        and found.sigma.shape == (size, size)
        and bool(np.isfinite(found.mu).all() and np.isfinite(found.sigma).all()),
        f"{form}; these are {found.mu.shape} and {found.sigma.shape}, or not finite",
    )
    return found


def write_statistics(path: Path, found: Statistics) -> None:
    """Write a file that `read_statistics` and pytorch-fid read. Raises `UserError`."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, mu=found.mu, sigma=found.sigma)


def root(sigma: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d r"]:
    """A matrix R of full rank with R R^T the covariance."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def _sum_of_roots(gram: Float64[np.ndarray, "r r"]) -> float:
    """The sum of the square roots of the eigenvalues, none of which is negative but by rounding."""
    return float(np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum())


def frechet_distance(
    a: Statistics, b: Statistics, root_b: Float64[np.ndarray, "d r"] | None = None
) -> float:
    """The squared distance of two normal distributions.

    It is `|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2)`, and the trace of that root is the one of the
    symmetric `R^T A R` with `B = R R^T`. Where no eigenvalues are found, 1e-6 is added to both
    diagonals for it, as is usual.

    Args:
        root_b: `root(b.sigma)`, where it is known.

    Source: Dowson and Landau 1982; pytorch-fid fid_score.py calculate_frechet_distance, which takes
    the root of the unsymmetric product.
    """
    try:
        r = root(b.sigma) if root_b is None else root_b
        trace = _sum_of_roots(r.T @ a.sigma @ r)
    except np.linalg.LinAlgError:
        offset = OFFSET * np.eye(len(a.mu))
        r = root(b.sigma + offset)
        trace = _sum_of_roots(r.T @ (a.sigma + offset) @ r)
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace)


def distances_without(
    features: Float[np.ndarray, "n d"],
    groups: Sequence[Int[np.ndarray, "_"]],
    b: Statistics,
    root_b: Float64[np.ndarray, "d r"],
) -> list[float]:
    """The distances of features to `b`, with one group of their rows left out each.

    Equal to `frechet_distance` of the rest. A group costs eigenvalues of at most min(n, r) rows:
    the scatter of all rows is computed once, and that of a group subtracted.
    """
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    projected = centred @ root_b
    if len(projected) < projected.shape[1]:  # the same scatter, in as many axes as there are rows
        projected = np.asarray(np.linalg.qr(projected.T, mode="r")).T
    scatter, squares = projected.T @ projected, np.square(centred).sum(axis=1)
    found = []
    for rows in groups:
        kept = len(features) - len(rows)
        of_group = projected[rows]
        shift, projected_shift = -centred[rows].sum(axis=0) / kept, -of_group.sum(axis=0) / kept
        rest = scatter - of_group.T @ of_group - kept * np.outer(projected_shift, projected_shift)
        total = squares.sum() - squares[rows].sum() - kept * shift @ shift
        trace = _sum_of_roots(rest / (kept - 1))
        difference = mean + shift - b.mu
        found.append(
            float(difference @ difference + total / (kept - 1) + np.trace(b.sigma) - 2 * trace)
        )
    return found
