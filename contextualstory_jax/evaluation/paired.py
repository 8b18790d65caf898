"""Comparison of generated folders of the same stories: two models, or several sampling seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from contextualstory_jax.evaluation.image_folders import ImageFolder
from contextualstory_jax.evaluation.measurement import Interval, difference
from contextualstory_jax.utils.errors import require

Values = Mapping[str, Any]  # an `Interval`, or a dict with its fields and others, by name


def require_same_stories(first: ImageFolder, second: ImageFolder) -> None:
    """Raise `UserError` unless two folders hold the same frames of the same stories."""
    ours, theirs = (
        [(frame.story, frame.position) for frame in folder.frames] for folder in (first, second)
    )
    missing = sorted(set(ours) ^ set(theirs))
    example = f", such as {missing[0][0]} in one alone" if missing else ""
    require(
        ours == theirs,
        f"{first.path} and {second.path} hold different frames{example}; compare folders of the "
        "same stories",
    )


def shown(value: Any) -> Any:
    """A value as it stands in a report, without what its interval was made of."""
    values = value._asdict() if isinstance(value, Interval) else value
    hidden = ("replicates", "method")
    return {key: entry for key, entry in values.items() if key not in hidden}


def differences(first: Values, second: Values) -> dict[str, Any]:
    """Each value of the first less that of the second, with the interval of pairs of stories."""
    return {
        name: shown(difference(_interval(first[name]), _interval(second[name])))
        for name in first
        if name in second
    }


def over_seeds(folders: Sequence[Values]) -> dict[str, Any]:
    """Each value in several folders, their mean, and their standard deviation (n - 1)."""
    found = {}
    for name in folders[0]:
        values = [_interval(of[name]).value for of in folders if name in of]
        found[name] = {
            "values": values,
            "mean": float(np.mean(values)),
            "deviation": float(np.std(values, ddof=1)),
        }
    return found


def _interval(value: Any) -> Interval:
    if isinstance(value, Interval):
        return value
    return Interval(**{name: value[name] for name in Interval._fields if name in value})
