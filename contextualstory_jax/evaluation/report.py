"""Metrics of generated frames beside reference frames, as one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contextualstory_jax import __version__
from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.image_folders import ImageFolder, read_folder
from contextualstory_jax.evaluation.measurement import (
    Interval,
    Measurement,
    Options,
    check_needs,
    read_reference,
)
from contextualstory_jax.evaluation.metrics.table import METRICS
from contextualstory_jax.evaluation.protocols import PROTOCOLS
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.utils.errors import require


def chosen_metrics(text: str) -> list[str]:
    """The metrics of a list with commas. Raises `UserError` for one that does not exist."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        require(name in METRICS, f"no metric {name!r}; there are {', '.join(METRICS)}")
    return names


def prepare(
    generated: Path,
    reference: Path,
    protocol: str,
    weights: Weights,
    features: Features,
    options: Options,
) -> Measurement:
    """Read two folders, and select the frames of a protocol.

    Raises `UserError` where a folder holds no images, or the protocol does not apply.
    """
    named = PROTOCOLS[protocol]
    ours, theirs = read_folder(generated, "generated"), read_reference(reference)
    if isinstance(theirs, ImageFolder):
        theirs = named.select(theirs)
    return Measurement(named.select(ours), theirs, named, weights, features, options)


def measure(metrics: Sequence[str], measurement: Measurement) -> dict[str, Any]:
    """The report: each metric's values, and all that they depend on.

    Raises `UserError` for a metric that needs more than there is, before anything is computed.
    """
    check_needs([(name, METRICS[name]) for name in metrics], measurement)
    report: dict[str, Any] = {}
    for name in metrics:
        for key, value in METRICS[name].measure(measurement).items():
            report[key] = value._asdict() if isinstance(value, Interval) else value
    reference = measurement.reference
    return report | {
        "protocol": measurement.protocol.name,
        "weights_sha256": measurement.weights.sha256,
        "unverified": measurement.weights.unverified,
        "count": len(measurement.generated.frames),
        "reference_count": len(reference.frames) if isinstance(reference, ImageFolder) else None,
        "seed": measurement.options.seed,
        "version": __version__,
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """The values of a report as text, such as `fid  14.07 [13.61, 14.53]`."""
    found = []
    for name, value in report.items():
        if isinstance(value, Mapping) and "value" in value:
            shown = f"{value['value']:.6g}"
            if value["low"] is not None:
                shown += f" [{value['low']:.6g}, {value['high']:.6g}]"
            found.append(f"{name:<20}{shown}")
    return found
