"""`python convert_weights.py SOURCE OUTPUT`: released weights to a checkpoint folder.

With --export it is the way back. `contextualstory-jax convert` and `export` are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from contextualstory_jax.commands import convert, export
from contextualstory_jax.utils.cli import run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for bad input; OUTPUT is then as it was."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--export" in words:
        words.remove("--export")
        export.main(words, "convert_weights.py --export")
    else:
        convert.main(words, "convert_weights.py")


if __name__ == "__main__":
    run(main)
