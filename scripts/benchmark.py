"""Measure this project on the device that JAX finds, and the original beside it.

    python scripts/benchmark.py --json out.json
    python scripts/benchmark.py --reference DIR --reference-python PYTHON
    python scripts/benchmark.py --suite tpu-aot --chip v5e:1x1 --only sampler

Prints a Markdown table, line by line as it is measured; docs/benchmarks.md says what the lines are.
`--reference` is a clone of sixiaozheng/ContextualStory, PYTHON an interpreter with the packages
that it needs. Both sides have the same weights and inputs and take turns. First their outputs are
compared: where they differ nothing is measured, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before JAX is imported: memory is measured, and other processes need some of the device's.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # what measures is not in an installation

from contextualstory_jax.config.config_files import load_config  # noqa: E402
from contextualstory_jax.config.train_config import TrainConfig  # noqa: E402
from contextualstory_jax.utils.cli import ArgumentParser, run  # noqa: E402
from contextualstory_jax.utils.errors import require  # noqa: E402

PARTS = {
    "cpu": ("unet", "seta", "training"),
    "gpu": ("unet", "seta", "generation", "training", "requests", "start"),
    "tpu-aot": ("sampler", "training"),
}
VARIANTS = ("eager", "compile", "strongest")  # of the original


class Report:
    """A table that is printed line by line, and a JSON file that is complete at any time."""

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path, self.values = path, {**about, "rows": []}

    def head(self, columns: Sequence[str], **about: Any) -> None:
        """Begin the table; `about` says what it was measured on."""
        self.values |= about
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def line(self, cells: Sequence[str], values: dict[str, Any]) -> None:
        """Add a line to the table, and its values to the file."""
        print(f"| {' | '.join(cells)} |", flush=True)
        self.values["rows"].append(values)
        if self.path:
            draft = self.path.with_name(self.path.name + ".part")
            draft.write_text(json.dumps(self.values, indent=1) + "\n")
            draft.replace(self.path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    arguments, overrides = parse(argv)
    config = load_config(arguments.config, overrides)
    about = {
        "suite": arguments.suite,
        "date": datetime.date.today().isoformat(),
        "command": ["scripts/benchmark.py", *argv],
    }
    report = Report(arguments.json, about)
    if arguments.suite == "tpu-aot":
        compile_for_chips(report, arguments, overrides)
    else:
        measure_device(report, arguments, config)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's arguments, and their overrides of the config."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipe = ROOT / "configs" / "pororo_visualization.py"
    parser.add_argument("--suite", choices=PARTS, help="by default that of the device")
    parser.add_argument("--config", default=str(recipe), metavar="CONFIG", help="its model")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of the suite")
    parser.add_argument("--rounds", type=int, metavar="N", help="to take turns in: 3 (CPU) or 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a clone of the original")
    parser.add_argument("--reference-python", metavar="PYTHON", help="which has its packages")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        help="of the original: as it is, by torch.compile, and fixed, in channels_last and with "
        "max-autotune; on a CPU the first alone by default",
    )
    parser.add_argument(
        "--chip", nargs="+", metavar="NAME", help="of tpu-aot; v4:1x1x1 v5e:1x1 v5p:1x1x1 v6e:1x1"
    )
    parser.add_argument(
        "--quick", action="store_true", help="of tpu-aot; see scripts/compile_for_tpu.py"
    )
    arguments, overrides = parser.parse_with_overrides(argv)
    if arguments.suite is None:
        import jax

        arguments.suite = "cpu" if jax.default_backend() == "cpu" else "gpu"
    parts = PARTS[arguments.suite]
    arguments.only = arguments.only or list(parts)
    for part in arguments.only:
        require(part in parts, f"suite {arguments.suite} has no {part}, only {', '.join(parts)}")
    require(arguments.rounds is None or arguments.rounds >= 1, "--rounds must be at least 1")
    require(
        (arguments.reference is None) == (arguments.reference_python is None),
        "--reference and --reference-python go together",
    )
    require(
        arguments.suite == "tpu-aot" or not (arguments.chip or arguments.quick),
        "--chip and --quick are of the suite tpu-aot",
    )
    require(
        arguments.json is None or arguments.json.absolute().parent.is_dir(),
        f"--json: no folder {arguments.json and arguments.json.absolute().parent}",
    )
    return arguments, overrides


def compile_for_chips(
    report: Report, arguments: argparse.Namespace, overrides: Sequence[str]
) -> None:
    """The suite tpu-aot."""
    from scripts.benchmarks import tpu

    programs = [(chip, p) for chip in arguments.chip or tpu.CHIPS for p in arguments.only]
    for i, (chip, program) in enumerate(programs):
        found = tpu.compile_for(chip, program, arguments.config, overrides, quick=arguments.quick)
        if i == 0:  # so that bad input is reported without a table
            about = {"config": arguments.config, "quick": arguments.quick, **tpu.versions()}
            report.head(tpu.COLUMNS, **about)
        report.line(tpu.cells(found), found)


def measure_device(report: Report, arguments: argparse.Namespace, config: TrainConfig) -> None:
    """The suites of a device that is there. Exits with 1 where the original's outputs differ."""
    import jax

    from scripts.benchmarks.measuring import COLUMNS, Machine
    from scripts.benchmarks.original import Original
    from scripts.benchmarks.suites import Different, lines

    on_cpu = arguments.suite == "cpu"
    rounds, warm_ups = (3, 1) if on_cpu else (10, 3)
    original = None
    if arguments.reference:
        variants = arguments.variants or (VARIANTS[:1] if on_cpu else VARIANTS)
        original = Original(arguments.reference, arguments.reference_python, variants)
    with tempfile.TemporaryDirectory() as cache:
        # Empty, so that the first compilation is one, and everything is kept for the second.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        machine = Machine.of(
            jax.devices()[0],
            "float32" if on_cpu else "bfloat16",
            arguments.rounds or rounds,
            warm_ups,
        )
        try:
            for i, row in enumerate(lines(machine, config, arguments.only, original)):
                if i == 0:  # outputs are compared before
                    versions = original.versions if original else {}
                    report.head(COLUMNS, config=arguments.config, **machine.about(), **versions)
                report.line(row.cells(), row.values())
        except Different as error:
            print(f"parity: {error}; nothing is measured", file=sys.stderr)
            sys.exit(1)
        finally:
            if original:
                original.close()


if __name__ == "__main__":
    run(main)
