"""Make the checkpoint folder that ships of a training workdir: its EMA weights in bfloat16.

python scripts/ship_model.py WORKDIR OUT
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from contextualstory_jax.checkpoints.layout import load_weights, read_model, write_weights
from contextualstory_jax.data import vocabulary
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.utils.cli import run


def main() -> None:
    """Read WORKDIR, write OUT (which must hold no model yet)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    config = read_model(arguments.workdir)
    params, meta = load_weights(arguments.workdir, "ema", StoryModel(config).shapes)
    params = jax.tree.map(lambda p: np.asarray(p).astype(ml_dtypes.bfloat16), params)
    kept = {"step": meta["step"], "storyflow": meta["storyflow"]}
    tokenizer = arguments.workdir / "tokenizer"
    write_weights(arguments.out, config, tokenizer, {"ema_params": params}, kept)
    for marker in arguments.out.rglob("commit_success.txt"):
        marker.unlink()  # orbax's; it holds the folder's path, and only buckets need it
    shutil.copy(arguments.workdir / vocabulary.FILE, arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: step {meta['step']}, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    run(main)
