"""Training, phase by phase: `train_and_evaluate` is the table of contents.

A workdir is a checkpoint folder (`checkpoint.py`) that also holds `config.json` (the recipe),
`parameters.txt`, `metrics.jsonl`, `tensorboard/` and `samples/`. Starting again in the same workdir
goes on from its last checkpoint: the data's order and all randomness follow from the step.
"""

from __future__ import annotations

import contextlib
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

from contextualstory_jax.checkpoint import (
    Checkpoints,
    contents,
    latest_step,
    write_model,
    write_text,
)
from contextualstory_jax.compilation import use_compilation_cache
from contextualstory_jax.config import TrainConfig, require
from contextualstory_jax.data.latents import EncodedStories
from contextualstory_jax.data.loader import (
    WaitMeter,
    batches,
    process_rows,
    read_batches,
    test_stories,
    training_source,
)
from contextualstory_jax.errors import UserError
from contextualstory_jax.initial import initial_params, tokenizer_folder
from contextualstory_jax.latents import open_latents, require_same_weights
from contextualstory_jax.model import Parts, StoryModel
from contextualstory_jax.models.vae import Moments
from contextualstory_jax.pipeline import Story, StoryPipeline
from contextualstory_jax.scalars import ScalarWriter
from contextualstory_jax.sharding import BATCH, make_mesh, shardings
from contextualstory_jax.state import (
    Batch,
    Encoded,
    TrainState,
    init_state,
    make_train_step,
    merge_parts,
)
from contextualstory_jax.tokenizer import Tokenizer

Step = Callable[[TrainState, Batch | Encoded], tuple[TrainState, dict[str, jax.Array]]]
Flow = Callable[[TrainState], list[float]]  # the mean scene changes that sampling uses

# Of each step; what is logged are the means of all steps since the last log.
METRICS = ("loss", "grad_norm", "param_norm", "update_norm", "learning_rate")
StepMetrics = clu.metrics.Collection.create(
    **{name: clu.metrics.Average.from_output(name) for name in METRICS}
)


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message names the step and the last good checkpoint."""


def train_and_evaluate(config: TrainConfig, workdir: Path) -> TrainState:
    """Train a recipe in a workdir, from where its last checkpoint is, and return the last state.

    Raises `UserError` for what the user can mend and `NonFiniteLoss` where training diverges.
    """
    use_compilation_cache()
    mesh = make_mesh(config.mesh)
    model = StoryModel(config.model, jnp.dtype(config.compute_dtype))
    files = tokenizer_folder(config, workdir)
    tokenizer = Tokenizer(files, config.model.text_encoder.max_position_embeddings)
    check(config, mesh, tokenizer)
    latents = open_latents(config, tokenizer) if config.data.latents else None
    abstract = abstract_state(model, config, mesh)
    # Before anything is written, because it may refuse.
    params = initial_params(model, config) if latest_step(workdir) is None else None
    if latents is not None and params is not None:
        require_same_weights(latents.cache, params)
    write_model(workdir, config.model, files)
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        state = start_state(abstract, params, config, mesh, checkpoints)
        if latents is not None and params is None:
            require_same_weights(latents.cache, state.frozen)
        describe(config, state, workdir)
        step = compile_step(model, config, mesh, state, tokenizer, latents)
        data = device_batches(config, mesh, tokenizer, int(state.step), latents)
        flow = storyflow_mean if latents is None else lambda _: latents.cache.storyflow
        with contextlib.closing(ScalarWriter(workdir, int(state.step))) as writer:
            draw = functools.partial(draw_samples, model, config, tokenizer, workdir, writer, flow)
            return loop(state, step, data, config, checkpoints, writer, flow, draw)


def check(config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer) -> None:
    """Raise `UserError` where the recipe fits no data, the devices or the tokenizer."""
    training_source(config.data, config.model.height)
    parts = config.accumulation_steps * mesh.size
    require(
        config.batch_size % parts == 0,
        f"batch_size = {config.batch_size} is not divisible by accumulation_steps x devices = "
        f"{config.accumulation_steps} x {mesh.size}",
    )
    vocab_size = config.model.text_encoder.vocab_size
    needed = int(tokenizer([""]).max()) + 1  # in CLIP's vocabularies the end token is the last
    require(
        vocab_size >= needed,
        f"model.text_encoder.vocab_size = {vocab_size} is under the tokenizer's {needed}",
    )


def abstract_state(model: StoryModel, config: TrainConfig, mesh: Mesh) -> TrainState:
    """The shape, dtype and sharding of everything in the state.

    Raises `UserError` where `config.trainable` names no parameter.
    """
    state = jax.eval_shape(functools.partial(init_state, config=config), model.shapes)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def start_state(
    abstract: TrainState,
    params: Parts | None,
    config: TrainConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> TrainState:
    """The state to go on from: that before the first step, or the last checkpoint's."""
    if params is None:
        step = checkpoints.latest
        assert step is not None, "without a checkpoint there are parameters to begin with"
        return from_items(abstract, checkpoints.restore(step, to_items(abstract)))
    params = jax.device_put(params, shardings(params, mesh))
    placed = jax.tree.map(lambda s: s.sharding, abstract)
    return jax.jit(functools.partial(init_state, config=config), out_shardings=placed)(params)


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


def describe(config: TrainConfig, state: TrainState, workdir: Path) -> None:
    """Write the recipe and the table of parameters; print how many there are.

    Raises `UserError` where the workdir cannot be written.
    """
    table = clu.parameter_overview.get_parameter_overview(
        {"trained": state.params, "frozen": state.frozen}, include_stats=False
    )
    try:
        write_text(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=2))
        write_text(workdir / "parameters.txt", table + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir}: {error.strerror}; choose another workdir"
        ) from error
    for title, parts in (("trained", state.params), ("frozen", state.frozen)):
        counts = {
            part: sum(math.prod(p.shape) for p in leaves.values()) for part, leaves in parts.items()
        }
        listed = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
        print(f"{title} parameters: {listed or 'none'}", flush=True)


def compile_step(
    model: StoryModel,
    config: TrainConfig,
    mesh: Mesh,
    state: TrainState,
    tokenizer: Tokenizer,
    latents: EncodedStories | None = None,
) -> Step:
    """The training step over the mesh: state donated and kept where it lies, metrics everywhere."""
    placed = jax.tree.map(lambda x: x.sharding, state)
    null = tokenizer([""])[0] if latents is None else latents.cache.null_text
    return jax.jit(
        make_train_step(model, config, jnp.asarray(null)),
        donate_argnums=0,
        in_shardings=(placed, NamedSharding(mesh, BATCH)),
        out_shardings=(placed, None),
    )


def device_batches(
    config: TrainConfig,
    mesh: Mesh,
    tokenizer: Tokenizer,
    first_step: int,
    latents: EncodedStories | None = None,
) -> Iterator[Batch | Encoded]:
    """Batches on the mesh, one for each step from `first_step` on; encoded ones from a cache."""
    sharding = NamedSharding(mesh, BATCH)
    order = config.batch_size, config.seed, first_step
    rows, workers = process_rows(sharding, config.batch_size), config.data.workers
    if latents is None:
        source = training_source(config.data, config.model.height)
        read = batches(source, tokenizer, *order, rows=rows, workers=workers)
    else:
        read = read_batches(latents.read, len(latents), *order, rows=rows, workers=workers)
    for arrays in read:
        arrays = {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in arrays.items()
        }
        if latents is None:
            yield Batch(**arrays)
        else:
            yield Encoded(Moments(arrays["mean"], arrays["logvar"]), arrays["text"])


def draw_samples(
    model: StoryModel,
    config: TrainConfig,
    tokenizer: Tokenizer,
    workdir: Path,
    writer: ScalarWriter,
    flow: Flow,
    state: TrainState,
) -> None:
    """Draw held-out stories with the EMA weights; one row a story, the originals above."""
    stories = test_stories(config.data, config.model.height, config.sample_stories)
    step, continuation = int(state.step), model.config.unet.is_continuation
    params = merge_parts(state.ema_params, state.frozen)
    pipeline = StoryPipeline(model, params, tokenizer, flow(state))
    pictures = pipeline.draw(
        [Story(s.sentences, s.story_id, s.images[0] if continuation else None) for s in stories]
    ).pictures
    rows = [
        np.concatenate(list(frames), axis=1)
        for story, drawn in zip(stories, pictures, strict=True)
        for frames in (story.images, drawn)
    ]
    picture = np.concatenate(rows)
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"step_{step:07d}.png")
    writer.picture(step, "samples", picture)


def storyflow_mean(state: TrainState) -> list[float]:
    """The mean scene changes of all stories trained on; zeros before the first."""
    return np.asarray(state.storyflow_sum / jnp.maximum(state.stories, 1)).tolist()


def save(checkpoints: Checkpoints, flow: Flow, state: TrainState) -> None:
    """Write a checkpoint in the background."""
    step, items = int(state.step), to_items(state)
    named = {name: items[name] for name in ("params", "ema_params", "frozen")}
    meta = {"step": step, "storyflow": flow(state), "items": contents(named)}
    checkpoints.save(step, items, meta)


def loop(
    state: TrainState,
    train_step: Step,
    data: Iterator[Batch | Encoded],
    config: TrainConfig,
    checkpoints: Checkpoints,
    writer: ScalarWriter,
    flow: Flow,
    draw: Callable[[TrainState], None],
) -> TrainState:
    """Step until `config.steps` or `config.max_minutes`; log, save and draw on the way."""
    unchecked: list[tuple[int, dict[str, jax.Array]]] = []
    data = WaitMeter(data)
    with contextlib.closing(Progress(config, writer, int(state.step))) as progress:
        for number in range(int(state.step) + 1, config.steps + 1):
            state, values = train_step(state, next(data))
            unchecked.append((number, values))
            progress.add(number, values)
            last = number == config.steps or progress.out_of_time
            saves = last or number % config.checkpoint_every == 0
            # A checkpoint is logged, so that no mean is of steps from before and after a restart.
            if saves or number % config.log_every == 0:
                require_finite(unchecked, checkpoints.latest)
                unchecked.clear()
                progress.log(number, data.take(), aloud=saves)
            if saves:
                save(checkpoints, flow, state)
            if last or number % config.sample_every == 0:
                with progress.paused():
                    draw(state)
            if last:
                break
    return state


def require_finite(steps: list[tuple[int, dict[str, jax.Array]]], last_good: int | None) -> None:
    """Raise `NonFiniteLoss` for the first step whose loss or new parameters are not finite."""
    for number, values in steps:
        for name in ("loss", "param_norm"):
            if not math.isfinite(values[name]):
                raise NonFiniteLoss(
                    f"{name} is {float(values[name])} at step {number}; the last good checkpoint "
                    f"is {last_good or 'none'}; lower optimizer.learning_rate and start again"
                )


class Progress:
    """What the user sees of a run: a bar, and the means of all steps since the last log."""

    def __init__(self, config: TrainConfig, writer: ScalarWriter, first_step: int):
        self._config, self._writer = config, writer
        self._bar = tqdm(total=config.steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._merge = jax.jit(lambda m, values: m.merge(m.single_from_model_output(**values)))
        self._means = StepMetrics.empty()
        self._began: float | None = None  # when the first step, which compiles, was done
        self._logged = (0.0, first_step)  # the time and the step of the last log

    def add(self, number: int, values: dict[str, jax.Array]) -> None:
        """Take the metrics of a step."""
        self._means = self._merge(self._means, values)
        self._bar.update()
        if self._began is None:
            jax.block_until_ready(values)
            self._began = time.monotonic()
            self._logged = (self._began, number)

    @property
    def out_of_time(self) -> bool:
        """Whether `config.max_minutes` are over."""
        return self._seconds_left() <= 0

    def log(self, number: int, waited: float, aloud: bool) -> None:
        """Write the means, and print them if `aloud`; begin anew.

        Args: `waited`, seconds that steps waited for their stories since the last log.
        """
        now, (logged_time, logged_number) = time.monotonic(), self._logged
        steps_per_second = (number - logged_number) / max(now - logged_time, 1e-9)
        values = {name: float(value) for name, value in self._means.compute().items()}
        values["stories_per_second"] = steps_per_second * self._config.batch_size
        values["data_wait"] = waited / max(number - logged_number, 1)  # seconds a step
        self._writer.write(number, values)
        if self._config.max_minutes is not None:  # so that the time left that the bar shows is true
            steps_left = int(max(self._seconds_left(), 0) * steps_per_second)
            self._bar.total = min(self._config.steps, number + steps_left)
        self._bar.set_postfix(
            loss=f"{values['loss']:.4f}", stories_s=f"{values['stories_per_second']:.1f}"
        )
        if aloud:
            listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._bar.write(f"step {number}: {listed}")
        self._means, self._logged = StepMetrics.empty(), (now, number)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done meanwhile out of the speed."""
        began = time.monotonic()
        yield
        time_logged, number = self._logged
        self._logged = (time_logged + time.monotonic() - began, number)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _seconds_left(self) -> float:
        if self._config.max_minutes is None or self._began is None:
            return math.inf
        return self._began + self._config.max_minutes * 60 - time.monotonic()
