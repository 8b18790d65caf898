"""Training, phase by phase: `train_and_evaluate` is the table of contents.

A workdir is a checkpoint folder (`checkpoint.py`) with, beside it: `config.json` (the recipe), `metrics.jsonl`,
`tensorboard/`, `samples/` and `parameters.txt`. Starting again in the same workdir goes on from its last checkpoint:
the data's order and all randomness follow from the step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clu.metrics
import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image
from tqdm import tqdm

from contextualstory_jax.checkpoint import Checkpoints, contents, write_model, write_text
from contextualstory_jax.compilation import use_compilation_cache
from contextualstory_jax.config import TrainConfig, require
from contextualstory_jax.data.example import Example
from contextualstory_jax.data.loader import TOKENIZER_DIR, batches, test_stories, training_source
from contextualstory_jax.model import StoryModel
from contextualstory_jax.pipeline import Story, StoryPipeline
from contextualstory_jax.scalars import ScalarWriter
from contextualstory_jax.sharding import BATCH, make_mesh, shardings
from contextualstory_jax.state import Batch, TrainState, init_state, make_train_step, merge_parts
from contextualstory_jax.tokenizer import Tokenizer

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


METRICS = ("loss", "grad_norm", "param_norm", "update_norm", "learning_rate")


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message names the step and the last good checkpoint."""


# Means since the last log.
StepMetrics = clu.metrics.Collection.create(
    **{name: clu.metrics.Average.from_output(name) for name in METRICS}
)


def train_and_evaluate(config: TrainConfig, workdir: Path) -> TrainState:
    """Train a recipe in a workdir, from where its last checkpoint is, and return the last state.

    Raises `UserError` for what the user can mend and `NonFiniteLoss` where training diverges.
    """
    use_compilation_cache()
    mesh = make_mesh(config.mesh)
    require(
        config.batch_size % (config.accumulation_steps * mesh.size) == 0,
        f"batch_size = {config.batch_size} is not divisible by accumulation_steps x devices = "
        f"{config.accumulation_steps} x {mesh.size}",
    )
    model = StoryModel(config.model, jnp.dtype(config.compute_dtype))
    tokenizer = Tokenizer(TOKENIZER_DIR, config.model.text_encoder.max_position_embeddings)
    write_model(workdir, config.model, TOKENIZER_DIR)
    write_text(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=2))
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        state = start_state(model, config, mesh, checkpoints)
        describe(state, workdir)
        step = compile_step(model, config, mesh, state, tokenizer)
        data = device_batches(config, mesh, tokenizer, int(state.step))
        writer = ScalarWriter(workdir, int(state.step))
        sampler = functools.partial(
            draw_samples, model, tokenizer, sample_stories(config), workdir / "samples", writer
        )
        try:
            return loop(state, step, data, config, checkpoints, writer, sampler)
        finally:
            writer.close()


def start_state(
    model: StoryModel, config: TrainConfig, mesh: Mesh, checkpoints: Checkpoints
) -> TrainState:
    """The state to go on from: 1. the workdir's own last checkpoint, 2. fresh parameters."""
    begin = functools.partial(init_state, config=config)
    abstract = jax.eval_shape(begin, model.shapes)
    placed = shardings(abstract, mesh)
    if checkpoints.latest is not None:
        targets = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            abstract,
            placed,
        )
        return from_items(targets, checkpoints.restore(checkpoints.latest, to_items(targets)))
    params = model.init(config.seed)
    params = jax.device_put(params, shardings(params, mesh))
    return jax.jit(begin, out_shardings=placed)(params)


def to_items(state: TrainState) -> dict[str, Any]:
    """The state as checkpoint items: weights by name, and all else, flat, under `progress`."""
    rest = dataclasses.replace(state, params={}, ema_params={}, frozen={})
    leaves, _ = jax.tree_util.tree_flatten_with_path(rest)
    progress = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    return {
        "params": state.params,
        "ema_params": state.ema_params,
        "frozen": state.frozen,
        "progress": progress,
    }


def from_items(like: TrainState, items: dict[str, Any]) -> TrainState:
    """The inverse of `to_items`, for a state of the same structure as `like`."""
    rest = dataclasses.replace(like, params={}, ema_params={}, frozen={})
    _, structure = jax.tree_util.tree_flatten(rest)
    names = to_items(like)["progress"]
    state = jax.tree_util.tree_unflatten(structure, [items["progress"][name] for name in names])
    weights = {name: items[name] for name in ("params", "ema_params", "frozen")}
    return dataclasses.replace(state, **weights)


def describe(state: TrainState, workdir: Path) -> None:
    """Print how many parameters there are; write the table of all of them."""
    table = clu.parameter_overview.get_parameter_overview(
        {"trained": state.params, "frozen": state.frozen}, include_stats=False
    )
    write_text(workdir / "parameters.txt", table + "\n")
    for title, parts in (("trained", state.params), ("frozen", state.frozen)):
        counts = {
            part: sum(math.prod(p.shape) for p in leaves.values()) for part, leaves in parts.items()
        }
        listed = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
        print(f"{title} parameters: {listed or 'none'}", flush=True)


def compile_step(
    model: StoryModel, config: TrainConfig, mesh: Mesh, state: TrainState, tokenizer: Tokenizer
) -> Step:
    """The training step over the mesh: state donated and kept where it lies, metrics everywhere."""
    placed = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        make_train_step(model, config, tokenizer([""])[0]),
        donate_argnums=0,
        in_shardings=(placed, NamedSharding(mesh, BATCH)),
        out_shardings=(placed, None),
    )


def device_batches(
    config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer, first_step: int
) -> Iterator[Batch]:
    """Batches on the mesh, one for each step from `first_step` on."""
    source = training_source(config.data, config.model.height)
    sharding = NamedSharding(mesh, BATCH)
    for arrays in batches(source, tokenizer, config.batch_size, config.seed, first_step):
        yield Batch(
            **{
                name: jax.make_array_from_process_local_data(sharding, a)
                for name, a in arrays.items()
            }
        )


def sample_stories(config: TrainConfig) -> list[Example]:
    """The held-out stories that samples are drawn of."""
    return test_stories(config.data, config.model.height, config.sample_stories)


def draw_samples(
    model: StoryModel,
    tokenizer: Tokenizer,
    stories: list[Example],
    folder: Path,
    writer: ScalarWriter,
    state: TrainState,
) -> None:
    """Draw held-out stories with the EMA weights; one row a story, the originals above."""
    step, continuation = int(state.step), model.config.unet.is_continuation
    params = merge_parts(state.ema_params, state.frozen)
    pipeline = StoryPipeline(model, params, tokenizer, storyflow_mean(state).tolist())
    pictures = pipeline.draw(
        [Story(s.sentences, s.story_id, s.images[0] if continuation else None) for s in stories]
    ).pictures
    rows = [
        np.concatenate(list(frames), axis=1)
        for pair in zip(stories, pictures, strict=True)
        for frames in (pair[0].images, pair[1])
    ]
    picture = np.concatenate(rows)
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"step_{step:07d}.png")
    writer.picture(step, "samples", picture)


def storyflow_mean(state: TrainState) -> np.ndarray:
    """The mean scene changes of all stories trained on; zeros before the first."""
    return np.asarray(state.storyflow_sum / jnp.maximum(state.stories, 1))


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    """Write a checkpoint in the background, unless it is there."""
    step = int(state.step)
    if checkpoints.latest != step:
        items = to_items(state)
        named = {name: items[name] for name in ("params", "ema_params", "frozen")}
        meta = {"step": step, "storyflow": storyflow_mean(state).tolist(), "items": contents(named)}
        checkpoints.save(step, items, meta)


def loop(
    state: TrainState,
    train_step: Step,
    data: Iterator[Batch],
    config: TrainConfig,
    checkpoints: Checkpoints,
    writer: ScalarWriter,
    draw: Callable[[TrainState], None],
) -> TrainState:
    """Step until `config.steps` or `config.max_minutes`; log, check, save and draw on the way."""
    began = logged = math.nan  # from the end of the first step, which compiles
    logged_number = 0
    limit = config.max_minutes * 60 if config.max_minutes else math.inf
    merge = jax.jit(lambda m, out: m.merge(StepMetrics.single_from_model_output(**out)))
    metrics, losses = StepMetrics.empty(), []

    def check() -> None:
        """Stop at the first non-finite loss; called before anything is saved or logged."""
        for number, value in losses:
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"the loss is {float(value)} at step {number}; the last good checkpoint is "
                    f"{checkpoints.latest or 'none'}; lower optimizer.learning_rate and start again"
                )
        losses.clear()

    with tqdm(total=config.steps, initial=int(state.step), unit="step", dynamic_ncols=True) as bar:
        number = int(state.step)
        while number < config.steps:
            state, out = train_step(state, next(data))
            number += 1
            metrics = merge(metrics, out)
            losses.append((number, out["loss"]))
            bar.update()
            if math.isnan(began):
                jax.block_until_ready(state)
                began = logged = time.monotonic()
                logged_number = number
            last = number == config.steps or time.monotonic() - began >= limit
            if number % config.log_every == 0 or last:
                check()
                now = time.monotonic()
                speed = (number - logged_number) / max(now - logged, 1e-9)  # steps a second
                if limit < math.inf:  # so that the bar's time left is true
                    steps_left = int(max(began + limit - now, 0) * speed)
                    bar.total = min(config.steps, number + steps_left)
                values = {name: float(v) for name, v in metrics.compute().items()}
                values["stories_per_second"] = speed * config.batch_size
                writer.write(number, values)
                bar.set_postfix(
                    loss=f"{values['loss']:.4f}", stories_s=f"{values['stories_per_second']:.1f}"
                )
                if number % config.checkpoint_every == 0 or last:
                    bar.write(
                        f"step {number}: " + ", ".join(f"{n} {v:.4g}" for n, v in values.items())
                    )
                metrics, logged, logged_number = StepMetrics.empty(), now, number
            if number % config.checkpoint_every == 0 or last:
                check()
                save(checkpoints, state)
            if number % config.sample_every == 0 or last:
                paused = time.monotonic()
                draw(state)
                logged += time.monotonic() - paused
            if last:
                break
    return state
