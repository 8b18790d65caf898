"""Measure how long a checkpoint keeps training waiting, and how long it takes to be read again.

    python scripts/benchmark_checkpoint.py --config configs/pororo_visualization.py --folder DIR

Saves the config's complete state, with random weights, from the mesh that training in one process
would have, and restores it. Training waits while the state is copied off the devices;
meanwhile it is written to the disk of DIR, which should have done so before the next checkpoint.
What is written is deleted. On a CPU it needs memory for the state twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from contextualstory_jax.checkpoints.manager import Checkpoints
from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.distributed.multihost import say
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.training.start_state import abstract_state, to_items
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require

ROUNDS = 3  # the first has threads to start


def random_array(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers that do not compress, of a shape and dtype, on each device its share."""

    def share(index: tuple[slice, ...]) -> np.ndarray:
        shape = like.sharding.shard_shape(like.shape)
        return np.random.default_rng(0).standard_normal(shape, np.float32).astype(like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, share)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` where the config does not fit the devices or the disk."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, metavar="CONFIG")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured")
    arguments, overrides = parser.parse_with_overrides(argv)
    writable = arguments.folder.is_dir() and os.access(arguments.folder, os.W_OK)
    require(
        writable, f"{arguments.folder}: no such folder, or not to be written to; choose another"
    )
    config = load_config(arguments.config, overrides)
    placement = Placement(make_mesh(config.mesh, jax.devices()), config.mesh.rules)
    abstract = to_items(abstract_state(StoryModel(config.model), config, placement))
    state = jax.tree.map(random_array, abstract)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    say(f"{size / 1e9:.2f} GB on {jax.device_count()} x {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for step in range(ROUNDS):
            with Checkpoints(Path(folder), keep=1) as checkpoints:
                began = time.perf_counter()
                checkpoints.save(step, state, meta={})
                waited = time.perf_counter() - began
            written = time.perf_counter() - began
            say(f"save: training waits {waited:.2f} s, written after {written:.1f} s")
        del state
        began = time.perf_counter()
        with Checkpoints(Path(folder)) as checkpoints:
            jax.block_until_ready(checkpoints.restore(step, abstract))
        say(f"restore: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    run(main)
