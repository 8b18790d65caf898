"""Rehearse the way of a real dataset: prepare, cache, train, be killed, resume, evaluate, report.

    python scripts/rehearse_data.py --out rehearsal

Writes small folders in the published layouts of PororoSV and FlintstonesSV, and goes through all
with the commands that a user gives, for a tiny model. Each step is checked; minutes in all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from contextualstory_jax.testing.metric_weights import write_metric_weights  # noqa: E402
from contextualstory_jax.testing.published_folders import write_flintstones, write_pororo  # noqa: E402
from contextualstory_jax.utils.cli import ArgumentParser, run  # noqa: E402
from contextualstory_jax.utils.errors import require  # noqa: E402

RECIPE = ROOT / "tests" / "helpers" / "tiny_stories_config.py"
WRITERS = {"pororo": write_pororo, "flintstones": write_flintstones}
TRAIN = ("-m", "contextualstory_jax.train", "--config", str(RECIPE))
STEPS = 20
KILLED_AFTER = 10  # steps, of which the fifth and tenth are checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for a folder that is there already."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    out = parser.parse_args(argv).out
    require(not out.exists(), f"{out} is there already; name a new folder")
    for dataset, write in WRITERS.items():
        write(out / dataset / "published")
        page = rehearse(dataset, out / dataset)
        print(f"{dataset}: look at {page}", flush=True)


def rehearse(dataset: str, folder: Path) -> Path:
    """Go through everything with `folder/published`; return the page of images."""
    shards, start, cache, workdir, drawn = (
        folder / name for name in ("shards", "start", "latents", "run", "evaluation")
    )
    python(
        *("-m", "contextualstory_jax", "prepare", dataset),
        *("--source", folder / "published", "--out", shards, "--size", 16),
        *("--tokenizer", ROOT / "contextualstory_jax" / "data" / "shapes_tokenizer"),
    )
    data = (f"--config.data.name={dataset}", f"--config.data.root={shards}")
    # Any VAE and text encoder will do, and both runs must have the same.
    python(*TRAIN, "--workdir", start, *data, "--config.steps=1")
    python(
        *("-m", "contextualstory_jax", "cache-latents"),
        *("--config", RECIPE, "--checkpoint", start, "--out", cache, *data),
    )
    training = (*TRAIN, "--workdir", workdir, *data)
    training += (f"--config.init_from={start}", f"--config.data.latents={cache}")
    kill_when(workdir / "metrics.jsonl", KILLED_AFTER, *training)
    python(*training)
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]
    assert steps == list(range(1, STEPS + 1)), f"steps are missing or double: {steps}"
    python(
        *("-m", "contextualstory_jax", "storyflow-mean"),
        *("--config", RECIPE, "--checkpoint", workdir, "--write", *data),
    )
    python(
        *("-m", "contextualstory_jax.evaluate", "--config", RECIPE, *data),
        *("--checkpoint", workdir, "--out", drawn),
    )
    page = drawn / "index.html"
    frames = [json.loads(line) for line in (drawn / "frames.jsonl").open()]
    assert page.is_file() and frames, "nothing was generated"
    for frame in frames:
        assert (drawn / frame["generated"]).is_file() and (drawn / frame["original"]).is_file()
    report(dataset, folder)
    return page


def report(dataset: str, folder: Path) -> None:
    """Reproduce the continuation task with the trained model and weights that mean nothing."""
    write_metric_weights(folder / "weights", dataset)
    python(
        *("-m", "contextualstory_jax", "reproduce", f"{dataset}-continuation"),
        *("--data", folder / "published", "--checkpoint", folder / "run"),
        *("--weights-dir", folder / "weights", "--out", folder / "report"),
    )
    found = json.loads((folder / "report" / "report.json").read_text())
    assert {"fid", "frame_accuracy"} <= found["protocols"]["storyviz"].keys()


def python(*arguments: object) -> None:
    """Run Python, and stop where it fails."""
    command = [sys.executable, *map(str, arguments)]
    print("$", *command, flush=True)
    subprocess.run(command, check=True, env=environment())


def kill_when(metrics: Path, lines: int, *arguments: object) -> None:
    """Run Python, and kill it, as a machine that fails would, when a file has `lines` lines."""
    command = [sys.executable, *map(str, arguments)]
    print("$", *command, f"  # killed after step {lines}", flush=True)
    with subprocess.Popen(command, env=environment()) as process:
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < lines:
            require(process.poll() is None, f"training ended before step {lines}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)


def environment() -> dict[str, str]:
    """This process's, in which commands find the project where it is not installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    run(main)
