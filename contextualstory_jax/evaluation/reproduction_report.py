"""The report of `reproduce` as Markdown, from the values of its `report.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from contextualstory_jax.evaluation.report import in_words

Row = Sequence[object]


def markdown(report: Mapping[str, Any]) -> str:
    """A report as a page."""
    sections = (_head(report), _fid(report), _others(report), _left_out(report), _settings(report))
    return "\n".join(line for section in sections for line in section)


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    dataset = report["dataset"]
    yield from (f"# {report['task']}", "")
    yield f"`{report['command']}`"
    yield ""
    yield f"{dataset['stories']:,} test stories, generated and measured by every protocol below."
    if dataset["stories"] != dataset["reported_stories"]:
        yield (
            f"Papers report a test split of {dataset['reported_stories']:,} stories: **values of "
            "differently many stories cannot be compared.**"
        )
    if report["unverified"]:
        yield (
            f"Weights of unknown checksum: {', '.join(report['unverified'])}. **Values by them "
            "can be compared with those by the same files alone.**"
        )
    yield ""


def _fid(report: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## FID", "")
    rows = []
    for name, found in report["protocols"].items():
        if "fid" in found:
            rows.append((f"`{name}`", in_words(found["fid"]), found["count"], _spread(found)))
    for known in report["published"]:
        rows.append(("unknown (published)", f"{known['value']:.2f}", "", known["source"]))
    yield from _table(("protocol", "FID [95 %]", "frames", ""), rows)
    yield ""
    if report["published"]:
        yield "The protocol of the published value, and the frames it was measured on, are unknown."
    else:
        yield "No published value of this task is known."
    yield ""


def _spread(found: Mapping[str, Any]) -> str:
    samples = found["fid"].get("reference_samples")
    if samples is None:
        return ""
    return "random reference frames: {mean:.6g}, {smallest:.6g} to {largest:.6g}".format(**samples)


def _others(report: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (f"`{name}`", metric, in_words(value))
        for name, found in report["protocols"].items()
        for metric, value in found.items()
        if metric != "fid" and isinstance(value, Mapping)
    ]
    if rows:
        yield from ("## Other metrics", "")
        yield from _table(("protocol", "metric", "value [95 %]"), rows)
        yield ""


def _left_out(report: Mapping[str, Any]) -> Iterator[str]:
    if report["left_out"]:
        yield from ("## Left out", "")
        yield from _table(
            ("metric", "reason"), [(f"`{n}`", r) for n, r in report["left_out"].items()]
        )
        yield ""


def _settings(report: Mapping[str, Any]) -> Iterator[str]:
    settings, dataset = report["settings"], report["dataset"]
    yield from ("## Settings", "")
    sampling = ", ".join(f"{key} {value}" for key, value in settings["sampling"].items())
    devices = ", ".join(f"{count} {kind}" for kind, count in report["devices"].items())
    rows = [
        ("checkpoint", f"{settings['checkpoint']}, {settings['weights']}, step {settings['step']}"),
        ("its SHA-256", settings["weights_sha256"]),
        ("computed in", f"{settings['dtype']} on {devices}"),
        ("size", f"{settings['width']} x {settings['height']} pixels"),
        ("sampling", f"{sampling}, seed {settings['seed']}"),
        ("test stories' SHA-256", dataset["stories_sha256"]),
        ("truncated captions", dataset["truncated_captions"]),
        *((f"SHA-256 of {name}", digest) for name, digest in report["weights_sha256"].items()),
        *((f"version of {name}", number) for name, number in report["versions"].items()),
    ]
    yield from _table(("", ""), rows)
    yield from ("", "Protocols were read from:", "")
    yield from (f"- `{name}`: {found['source']}" for name, found in report["protocols"].items())
    yield ""


def _table(head: Row, rows: Sequence[Row]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        cells = (" ".join(str(cell).split()).replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
