"""Check a dataset on disk, and write it in shards that training reads fast.

    contextualstory-jax prepare pororo --source pororo_png --out pororo_256

A run that was stopped resumes where it was when it is started again. Needs the extra [data].
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax prepare") -> None:
    """Run the command. Raises `UserError` for bad input, and for stories that are broken."""
    arguments = parse(argv, prog)
    from tqdm import tqdm

    from contextualstory_jax.data.preparation import prepare

    config = DataConfig(
        name=arguments.dataset,
        root=str(arguments.source),
        split_policy=arguments.split_policy,
        captions=arguments.captions,
        test_fraction=arguments.test_fraction,
    )
    count = None if arguments.tokenizer is None else token_counter(arguments.tokenizer)
    with tqdm(unit="file", dynamic_ncols=True, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = prepare(
            config,
            arguments.out,
            arguments.size,
            token_count=count,
            skip_broken=arguments.skip_broken,
            workers=arguments.workers,
            progress=show,
        )
    print(report)
    require(
        report.complete,
        f"{len(report.problems)} problems, listed above; fix them, or give --skip-broken, and "
        "run again: what is done is kept",
    )
    print(f"{arguments.out} is ready: train with --config.data.root={arguments.out}")


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = ArgumentParser(
        prog=prog,
        description="Check a dataset on disk and write it in shards that training reads fast.",
        epilog="Started again after it was stopped, it resumes.",
    )
    parser.add_argument("dataset", choices=("pororo", "flintstones", "folder"))
    parser.add_argument(
        "--source", required=True, type=Path, metavar="DIR", help="the dataset as published"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a new folder for the shards"
    )
    parser.add_argument(
        "--size", type=int, default=256, metavar="N", help="pixels a side of the images (256)"
    )
    parser.add_argument(
        "--split-policy",
        choices=("published", "strict"),
        default="published",
        help="strict: no frame in two splits (published)",
    )
    parser.add_argument(
        "--captions",
        choices=("blip2", "original"),
        default="blip2",
        help="of pororo: filtered by BLIP-2, with one image a frame, or all (blip2)",
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=DataConfig.test_fraction,
        metavar="F",
        help="of a folder's stories, held out for testing where none names a split (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="CLIP's, to count the tokens of captions exactly; the default is a lower bound",
    )
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out stories without all their images, or with an id there was before",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes (%(default)s)",
    )
    return parser.parse_args(argv)


def token_counter(folder: Path) -> Callable[[str], int]:
    """Counts the tokens of a caption, start and end included, by the tokenizer in a folder."""
    from contextualstory_jax.data.preparation import MOST_TOKENS
    from contextualstory_jax.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder, MOST_TOKENS)
    return lambda caption: tokenizer.counts([caption])[0]


if __name__ == "__main__":
    run(main)
