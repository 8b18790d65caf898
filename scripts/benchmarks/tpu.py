"""Generation and training compiled for one TPU chip that is not there: operations, bytes, memory.

Each program is compiled by `scripts/compile_for_tpu.py` in a process of its own, one at a time:
published sizes take many minutes and several GB, less with `--quick`.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contextualstory_jax.models.flops import DEVICES
from contextualstory_jax.utils.errors import UserError

SCRIPT = Path(__file__).parents[1] / "compile_for_tpu.py"
CHIPS = ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1")
# Generation in one step, and training on one story at a time.
PROGRAMS = {
    "sampler": ("--sampler", "--config.model.sampling.steps=1"),
    "training": ("--config.batch_size=1", "--config.accumulation_steps=1", "--config.remat=full"),
}
COLUMNS = (
    *("program", "chip", "memory", "of", "method", "XLA's count", "in full tiles", "traffic"),
    *("at best", "MFU at best", "compile"),
)


def compile_for(
    chip: str, program: str, config: str, overrides: Sequence[str], *, quick: bool = False
) -> dict[str, Any]:
    """The compiler's report, with `quick` at its least effort.

    Raises `UserError` where it cannot be asked.
    """
    command = [sys.executable, str(SCRIPT), "--config", config, "--topology", chip]
    command += [*PROGRAMS[program], *(f"--config.{override}" for override in overrides)]
    command += ["--quick"] * quick
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise UserError(f"{program} for {chip}: {said.removeprefix('error: ')}")
    return json.loads(done.stdout)


def versions() -> dict[str, str]:
    """Of the compiler and of what it is given."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def cells(found: dict[str, Any]) -> list[str]:
    """A line of the table; of what does not fit, the memory alone."""
    memory, useful = found["hbm_bytes_per_chip"], found["useful_flops_per_chip"]
    line = [
        found["program"],
        found["topology"],
        f"{memory['total'] / 2**30:.1f} GiB",
        f"{found['hbm_limit'] / 2**30:.1f} GiB",
        f"{useful / 1e12:.3g} TFLOP",
    ]
    if not found["fits"]:
        return [*line, *[""] * (len(COLUMNS) - len(line) - 1), f"{found['compile_seconds']:.0f} s"]
    device = DEVICES[found["device"]]
    tiles, traffic = found["padded_flops_per_chip"], found["memory_traffic_per_chip"]
    seconds = max(tiles / device.flops, traffic / device.bandwidth)
    return [
        *line,
        f"{found['flops_per_chip'] / useful:.2f} of it",
        f"{tiles / useful:.2f} of it",
        f"{traffic / 1e9:.3g} GB",
        f"{seconds * 1e3:.3g} ms",
        f"{useful / device.flops / seconds:.1%}",
        f"{found['compile_seconds']:.0f} s",
    ]
