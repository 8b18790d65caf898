"""KID: the maximum mean discrepancy of InceptionV3's features, by a polynomial kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from contextualstory_jax.evaluation.inception_features import inception
from contextualstory_jax.evaluation.measurement import Measurement, quantile_interval
from contextualstory_jax.utils.errors import require
from contextualstory_jax.utils.interruption import check


def kid(measurement: Measurement) -> dict[str, Any]:
    """KID: mean over subsets; `low` and `high` are quantiles over subsets, `deviation` theirs."""
    options = measurement.options
    extractor = inception(measurement.protocol, measurement.weights)
    generated, reference = (
        measurement.features(extractor, [frame.item for frame in folder.frames])
        for folder in (measurement.generated, measurement.reference_images)
    )
    values = subset_distances(
        generated,
        reference,
        subsets=options.kid_subsets,
        size=options.kid_subset_size,
        seed=options.kid_seed,
    )
    return {
        "kid": {
            **quantile_interval(float(values.mean()), values)._asdict(),
            "deviation": float(values.std()),
            "subsets": options.kid_subsets,
            "subset_size": options.kid_subset_size,
            "seed": options.kid_seed,
        }
    }


def require_subsets(measurement: Measurement) -> None:
    """Raise `UserError` where a subset is larger than a folder."""
    size = measurement.options.kid_subset_size
    folders = {"generated": measurement.generated, "reference": measurement.reference_images}
    for name, folder in folders.items():
        require(
            len(folder.frames) >= size,
            f"KID takes subsets of {size} images, and the {name} folder has "
            f"{len(folder.frames)}; give --kid-subset-size {len(folder.frames)} or less",
        )


def subset_distances(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], *, subsets: int, size: int, seed: int
) -> Float[np.ndarray, "s"]:
    """The unbiased squared discrepancy of random subsets of both.

    Reference: torch-fidelity metric_kid.py; the order of random numbers is the same.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    random = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        check()
        a = x[random.choice(len(x), size, replace=False)]
        b = y[random.choice(len(y), size, replace=False)]
        within = [kernel(c, c) for c in (a, b)]
        same = sum(k.sum() - np.trace(k) for k in within) / (size * (size - 1))
        values[i] = same - 2 * kernel(a, b).mean()
    return values


def kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """(x . y / d + 1)^3. Source: Binkowski et al. 2018, section 4."""
    return (x @ y.T / x.shape[1] + 1) ** 3
