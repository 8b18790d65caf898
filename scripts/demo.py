"""Generate held-out stories with the model that ships, train another for minutes, compare them.

Writes OUT/storybook.html, a page to open in a browser, and OUT/training, the training run's
workdir, which a second run of the demo starts again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tqdm import tqdm

from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.data.loader import test_stories
from contextualstory_jax.distributed.compilation import use_compilation_cache
from contextualstory_jax.evaluation.compare import evaluate, table, untrained
from contextualstory_jax.evaluation.storybook import read_losses, write_storybook
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.train import train_and_evaluate
from contextualstory_jax.utils.atomic import check_writable
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require

RECIPE = Path(__file__).parents[1] / "configs" / "shapes.py"
# The config is for an hour or two; in minutes there is no time for a schedule, a long average, or
# checkpoints and samples before the last. As many samples as `evaluate` makes at once: that program
# is compiled already.
SHORT = (
    "optimizer.schedule=constant",
    "optimizer.ema_decay=0.98",
    "log_every=5",
    "checkpoint_every=1000000",
    "sample_every=1000000",
    "sample_stories=8",
)


def main() -> None:
    """Run the demo. Raises `UserError` where it cannot write."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")
    parser.add_argument("--train-minutes", type=float, default=3.0, metavar="M")
    parser.add_argument("--stories", type=int, default=16, metavar="N", help="to generate, measure")
    arguments = parser.parse_args()
    out, workdir = arguments.out, arguments.out / "training"
    require(arguments.stories >= 1, f"--stories must be at least 1; got {arguments.stories}")
    require(
        arguments.train_minutes > 0,
        f"--train-minutes must be positive; got {arguments.train_minutes:g}",
    )
    check_writable(out)
    require(
        not workdir.exists() or (workdir / "model.json").is_file(),
        f"{workdir} is not of an earlier demo; choose another --out",
    )
    use_compilation_cache()

    print("1/3 generating stories that no model was trained on", flush=True)
    shipped = StoryPipeline.load()
    stories = test_stories(load_config(RECIPE).data, shipped.model.config.height, arguments.stories)

    def measure(models: dict[str, StoryPipeline]) -> dict:
        with tqdm(total=len(models) * len(stories), unit="story", dynamic_ncols=True) as bar:
            return evaluate(models, stories, progress=bar.update)

    results = measure({"shipped": shipped, "untrained": untrained(shipped)})

    overrides = (f"max_minutes={arguments.train_minutes}", *SHORT)
    print(f"\n2/3 training a model for {arguments.train_minutes:g} minutes; by hand it would be")
    options = " ".join(f"--config.{override}" for override in overrides)
    print(
        f"  python -m contextualstory_jax.train --config {RECIPE} --workdir {workdir} {options}",
        flush=True,
    )
    shutil.rmtree(workdir, ignore_errors=True)
    state = train_and_evaluate(load_config(RECIPE, overrides), workdir)

    print("\n3/3 generating the same stories with it", flush=True)
    results |= measure({"trained just now": StoryPipeline.load(workdir)})
    rows = ("originals", "shipped", "trained just now", "untrained")
    results = {row: results[row] for row in rows}
    page = out / "storybook.html"
    write_storybook(
        page,
        stories,
        results,
        read_losses(workdir / "metrics.jsonl"),
        about=f"The model trained just now had {arguments.train_minutes:g} minutes, in which it "
        f"saw {int(state.stories):,} others.",
    )
    metrics = {row: result.metrics for row, result in results.items()}
    print(f"\n{table(metrics)}\n\nThe storybook: {page.absolute().as_uri()}")


if __name__ == "__main__":
    run(main)
