"""Compile a config's training step, or generation, for a TPU slice or GPUs that are not there.

    python scripts/compile_for_tpu.py --config configs/pororo_visualization.py --topology v5e:4x4 \
        --config.batch_size=96 --config.accumulation_steps=1 --config.mesh.data=1 \
        --config.mesh.fsdp=-1 --config.remat=full

Prints one line of JSON (docs/scaling.md says how to read it) and exits with 0 if the program fits
the chips' memory, with 1 if not. Neither weights nor data need be there. Needs the extra [tpu] or,
for `--topology h100` or eight of them, `h100:8`, the extra [gpu].
On two cores training of a published config takes ten minutes and up to 18 GB with `--quick`, more
than half an hour and 19 GB without.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import scripts.benchmarks.absent_tpu  # noqa: F401, I001 - before JAX

from contextualstory_jax.analysis.ahead_of_time import absent_devices, generation, report, training
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.config.config_files import load_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for what does not fit the slice but for its memory."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, metavar="CONFIG")
    parser.add_argument(
        "--topology", required=True, help="v5e:4x4, v4:2x2x2, v5p:4x4x4, v6e:16x16, h100, h100:8"
    )
    parser.add_argument(
        "--sampler",
        action="store_true",
        help="compile generation: --config.batch_size stories at once, by default one a chip",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="with the compiler's least effort: soon done, memory and traffic less exact",
    )
    arguments, overrides = parser.parse_with_overrides(argv)
    config = load_config(arguments.config, overrides)
    devices = absent_devices(arguments.topology)
    if arguments.sampler:
        given = any(override.startswith("batch_size=") for override in overrides)
        program = generation(config, devices, config.batch_size if given else None)
        about = {"program": "sampler"}
    else:
        program = training(config, devices)
        about = {"program": "training", "remat": config.remat}
        about["accumulation_steps"] = config.accumulation_steps
    about = {"config": arguments.config, "overrides": overrides, **about, "quick": arguments.quick}
    values = report(program, quick=arguments.quick)
    print(json.dumps({"topology": arguments.topology, **about, **values}))
    sys.exit(0 if values["fits"] else 1)


if __name__ == "__main__":
    run(main)
