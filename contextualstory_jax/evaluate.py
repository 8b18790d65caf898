"""`python -m contextualstory_jax.evaluate --out DIR`: draws the test split, measures the pictures.

From Python: `contextualstory_jax.evaluation.evaluate`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.cli import ArgumentParser, run, split_overrides
from contextualstory_jax.config import DataConfig, require
from contextualstory_jax.recipes import load_recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for bad input."""
    parser = ArgumentParser(
        prog="python -m contextualstory_jax.evaluate",
        description="Draw stories of the test split; write the pictures and metrics.json, with the "
        "drawn originals as upper and the untrained model as lower bound.",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    parser.add_argument(
        "--config",
        metavar="FILE.py",
        help="recipe whose data to test on, --config.data.key=value included",
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="instead of the model that ships")
    parser.add_argument("--stories", type=int, default=64, metavar="N", help="how many (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema where it is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="stories (8)")
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(argv)
    require(arguments.stories >= 1, f"--stories must be at least 1; got {arguments.stories}")
    require(not overrides or arguments.config is not None, "--config.key=value needs --config")
    data = load_recipe(arguments.config, overrides).data if arguments.config else DataConfig()

    # Only here: importing JAX takes seconds, and --help and bad input must not wait.
    from tqdm import tqdm

    from contextualstory_jax.compilation import use_compilation_cache
    from contextualstory_jax.data.loader import test_stories
    from contextualstory_jax.evaluation import evaluate, table, untrained, write_pictures
    from contextualstory_jax.output import check_writable, write_json
    from contextualstory_jax.pipeline import SHIPPED, StoryPipeline

    check_writable(arguments.out)
    use_compilation_cache()
    checkpoint = arguments.checkpoint or SHIPPED
    pipeline = StoryPipeline.load(checkpoint, weights=arguments.weights, dtype=arguments.dtype)
    config = pipeline.model.config
    stories = test_stories(data, config.height, arguments.stories)
    models = {"model": pipeline, "untrained": untrained(pipeline)}
    with tqdm(
        total=len(models) * len(stories),
        unit="story",
        dynamic_ncols=True,
        delay=0.5,  # seconds, in which bad input is refused: an error stands alone
    ) as bar:
        results = evaluate(
            models,
            stories,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            progress=bar.update,
        )
    write_pictures(arguments.out, stories, results["model"].pictures, arguments.seed)
    settings = {
        "checkpoint": str(arguments.checkpoint or "shipped"),
        "weights": pipeline.weights,
        "dtype": arguments.dtype,
        "data": dataclasses.asdict(data),
        "stories": len(stories),
        "seed": arguments.seed,
        "sampling": dataclasses.asdict(config.sampling),
    }
    metrics = {name: result.metrics for name, result in results.items()}
    write_json(arguments.out / "metrics.json", {"settings": settings, **metrics})
    print(table(results))
    print(f"\npictures and metrics.json are in {arguments.out}")


if __name__ == "__main__":
    run(main)
