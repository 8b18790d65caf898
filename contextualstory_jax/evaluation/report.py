"""Metrics of generated frames beside reference frames, as one report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contextualstory_jax import __version__
from contextualstory_jax.distributed.multihost import is_first, say
from contextualstory_jax.evaluation.features import Features
from contextualstory_jax.evaluation.image_folders import ImageFolder, read_folder
from contextualstory_jax.evaluation.measurement import (
    Measurement,
    Options,
    check_needs,
    read_reference,
)
from contextualstory_jax.evaluation.metrics.table import METRICS
from contextualstory_jax.evaluation.paired import (
    differences,
    over_seeds,
    require_same_stories,
    shown,
)
from contextualstory_jax.evaluation.protocols import PROTOCOLS, Protocol
from contextualstory_jax.evaluation.weights import Weights
from contextualstory_jax.utils.atomic import write_json
from contextualstory_jax.utils.errors import require


def chosen_metrics(text: str) -> list[str]:
    """The metrics of a list with commas. Raises `UserError` for one that does not exist."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        require(name in METRICS, f"no metric {name!r}; there are {', '.join(METRICS)}")
    return names


def chosen_protocol(name: str) -> Protocol:
    """A protocol by its name. Raises `UserError` where there is none."""
    require(name in PROTOCOLS, f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def check_weights(metrics: Iterable[str], weights: Weights) -> None:
    """Find or download the weights of metrics. Raises `UserError` where some cannot be had."""
    for name in metrics:
        METRICS[name].find_weights(weights)


def prepare(
    generated: Path,
    reference: Path,
    protocol: Protocol,
    weights: Weights,
    features: Features,
    options: Options,
) -> Measurement:
    """Read two folders, and select the frames of a protocol.

    Raises `UserError` where a folder holds no images, or the protocol does not apply.
    """
    ours, theirs = read_folder(generated, "generated"), read_reference(reference)
    if isinstance(theirs, ImageFolder):
        theirs = protocol.select(theirs)
    return Measurement(protocol.select(ours), theirs, protocol, weights, features, options)


def measure(
    metrics: Sequence[str],
    measurement: Measurement,
    *,
    seeds: Sequence[Path] = (),
    compared: Path | None = None,
) -> dict[str, Any]:
    """The report: each metric's values, and all that they depend on.

    Args:
        metrics: Names of metrics.
        measurement: The folder to report, and its reference.
        seeds: Folders of the same stories, generated with other seeds: `seeds` is their spread.
        compared: A folder of the same stories, by another model: `difference` is ours less its.

    Raises:
        UserError: A metric needs more than there is, or folders hold other stories; before
            anything is computed.
    """
    chosen = [(name, METRICS[name]) for name in metrics]
    every = [measurement]
    for path in (*seeds, *([] if compared is None else [compared])):
        folder = measurement.protocol.select(read_folder(path, "generated"))
        require_same_stories(measurement.generated, folder)
        every.append(measurement._replace(generated=folder))
    for one in every:
        check_needs(chosen, one)
    measured = [
        {key: value for _, metric in chosen for key, value in metric.measure(one).items()}
        for one in every
    ]
    report = {key: shown(value) for key, value in measured[0].items()}
    if seeds:
        report["seeds"] = over_seeds(measured[: 1 + len(seeds)])
    if compared is not None:
        report["difference"] = differences(measured[0], measured[-1])
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


def publish(report: Mapping[str, Any], path: Path | None) -> None:
    """Print the values and, where there is a path, write the report; in the first process.

    Raises `UserError` where it cannot be written.
    """
    for line in lines(report):
        say(line)
    if path is not None and is_first():
        write_json(path, report)


def lines(report: Mapping[str, Any]) -> list[str]:
    """The values of a report as text, such as `fid  14.07 [13.61, 14.53]`."""
    found = [f"{name:<28}{in_words(value)}" for name, value in report.items() if _has(value)]
    for name, spread in report.get("seeds", {}).items():
        count = len(spread["values"])
        text = f"{spread['mean']:.6g} +- {spread['deviation']:.6g} over {count} seeds"
        found.append(f"{name:<28}{text}")
    for name, value in report.get("difference", {}).items():
        found.append(f"{name:<28}{in_words(value)} difference")
    return found


def _has(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def in_words(value: Mapping[str, Any]) -> str:
    """A value with its interval, where it has one."""
    if value["low"] is None:
        return f"{value['value']:.6g}"
    return "{value:.6g} [{low:.6g}, {high:.6g}]".format(**value)
