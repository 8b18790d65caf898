"""Print how far this machine's numbers are from the original's, and a checkpoint's from its best.

    python scripts/parity_report.py CHECKPOINT --parity-dir DIR

Two Markdown tables of relative errors (L2 norms), in float32 and in bfloat16, on the device that
JAX chooses:

1. The cases in DIR against what the original computed in float32 on a CPU. Modules and UNets have
   the cases' own weights. A pipeline case (DIR/NAME/case.json) uses CHECKPOINT's where it
   was converted from a folder of the same configuration, which DIR/NAME/checkpoint is the shell of.
   Cases of training are left to the tests: bfloat16 does not suit them.
2. CHECKPOINT's own modules, whatever trained or converted model it is, against the same in float32
   at the highest matmul precision on the CPU, at the size it generates. Each is given what those
   computed before it, so that errors do not add up; the input is a synthetic story.

Accelerators round float32 matrix products unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import UserError, require

if TYPE_CHECKING:
    from contextualstory_jax.testing.parity_report import Row

DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Run the command. Raises `UserError` for bad input."""
    parser = ArgumentParser(
        prog="parity_report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--parity-dir", type=Path, metavar="DIR", required=True)
    arguments = parser.parse_args()
    cases = find_cases(arguments.parity_dir)

    # Only here: importing JAX takes seconds, and --help and bad input must not wait.
    import jax

    from contextualstory_jax.distributed.compilation import use_compilation_cache
    from contextualstory_jax.sampling.pipeline import StoryPipeline

    # The code that runs cases is the tests', which no installation holds.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from contextualstory_jax.testing.parity_report import case_rows, module_rows

    use_compilation_cache()
    pipelines = [StoryPipeline.load(arguments.checkpoint, dtype=dtype) for dtype in DTYPES]
    device = jax.devices()[0].device_kind
    precision = jax.config.jax_default_matmul_precision or "default"
    versions = f"jax {jax.__version__}, matmul precision {precision}"
    print(f"{device}, {versions}, {datetime.date.today()}")
    columns = ("case", *DTYPES, "float32 on a CPU must be within")
    print_table(columns, case_rows(cases, arguments.checkpoint, pipelines))
    print_table(("module of the checkpoint", *DTYPES), module_rows(pipelines))


def find_cases(folder: Path) -> dict[Path, dict[str, Any]]:
    """Contents of each case in a folder. Raises `UserError` where there is none, or a bad one."""
    cases = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/case.json")]):
        try:
            cases[path] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it again") from error
        require(
            isinstance(cases[path], dict) and "kind" in cases[path],
            f"{path} is no parity case: it has no kind; name a folder of cases alone",
        )
    require(len(cases) > 0, f"no parity cases (*.json, */case.json) in {folder}; name another")
    return cases


def print_table(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Print rows as they come."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        numbers = [*row.errors, *([row.tolerance] if row.tolerance else [])]
        print(f"| {' | '.join([row.name, *(f'{number:.1e}' for number in numbers)])} |", flush=True)


if __name__ == "__main__":
    run(main)
