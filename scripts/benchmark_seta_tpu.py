"""Compare the ways of `benchmark_seta.py` by what they would take of a TPU that is not there.

    python scripts/benchmark_seta_tpu.py --topology v5e:1x1

A line for each way and level of the published UNet, both branches of one story's guidance in
bfloat16, forward, and forward and backward: the compiler's count of operations, the traffic between
chip and memory, and the larger of the times that these take at the chip's best. Compiled with the
compiler's least effort (`ahead.QUICK`). Needs the extra [tpu].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # what measures is not in an installation

import scripts.benchmarks.absent_tpu  # noqa: F401, I001 - before JAX

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from contextualstory_jax.analysis.ahead_of_time import QUICK, tpu_devices
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.models.flops import DEVICES
from contextualstory_jax.analysis.hlo import memory_traffic
from scripts.benchmark_seta import FRAMES, LEVELS, programs


def costs(device: Any) -> Iterator[str]:
    """Lines of a table."""
    yield f"{'level':10}{'way':10}" + 2 * f"{'GFLOP':>9}{'MB':>7}{'us at best':>12}"
    known = DEVICES[device.device_kind]
    here = SingleDeviceSharding(device)
    for side, channels in LEVELS:
        x = jax.ShapeDtypeStruct((2, FRAMES, side, side, channels), jnp.bfloat16, sharding=here)
        for name, network, *pair in programs(side, channels):
            params = jax.tree.map(
                lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=here), network.shapes
            )
            line = f"{f'{side}x{side}':10}{name:10}"
            for program in pair:
                compiled = jax.jit(program).lower(params, x).compile(QUICK)
                cost: Any = compiled.cost_analysis()
                flops, traffic = cost["flops"], memory_traffic(compiled.as_text() or "")
                seconds = max(flops / known.flops, traffic / known.bandwidth)
                line += f"{flops / 1e9:9.1f}{traffic / 1e6:7.0f}{seconds * 1e6:12.0f}"
            yield line


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. Raises `UserError` for an unknown slice, or without the compiler."""
    parser = ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--topology", required=True, help="of one chip: v5e:1x1, v4:1x1x1")
    device, *_ = tpu_devices(parser.parse_args(argv).topology)
    for line in costs(device):
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
