"""Training, phase by phase: `train_and_evaluate` is the table of contents.

A workdir is a checkpoint folder (`checkpoints/layout.py`) that also holds `config.json`,
`parameters.txt`, `metrics.jsonl`, `tensorboard/` and `samples/`. Starting again in the same workdir
resumes from its last checkpoint: the data's order and all randomness follow from the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import UInt8
from PIL import Image

from contextualstory_jax.checkpoints.layout import contents, write_model, write_text
from contextualstory_jax.checkpoints.manager import Checkpoints, latest_step
from contextualstory_jax.config.build import dotted
from contextualstory_jax.config.model_config import PARTS
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.data.example import Example
from contextualstory_jax.data.loader import (
    Readable,
    Splits,
    TokenizedStories,
    WaitMeter,
    first_stories,
    open_splits,
    require_square,
    story_notes,
)
from contextualstory_jax.data.shapes import ShapesSource
from contextualstory_jax.data.story_source import StorySource
from contextualstory_jax.data.vocabulary import vocabulary_of, write_vocabulary
from contextualstory_jax.distributed.compilation import (
    TRAINING_SECONDS,
    compiling,
    use_compilation_cache,
)
from contextualstory_jax.distributed.multihost import (
    StopRequest,
    by_first,
    compiled_together,
    is_first,
    require_agreement,
    say,
)
from contextualstory_jax.distributed.sharding import BATCH, Placement, batch_ways, make_mesh
from contextualstory_jax.models.flops import training_step_flops
from contextualstory_jax.models.story_model import Parts, StoryModel
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.sampling.arguments import stories_of
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.training.cache_latents import open_latents, require_same_weights
from contextualstory_jax.training.device_batches import device_batches
from contextualstory_jax.training.init_params import (
    initial_params,
    tokenizer_folder,
    with_scaling_factor,
)
from contextualstory_jax.training.metric_writers import NoWriter, ScalarWriter
from contextualstory_jax.training.progress import Profile, Progress, starting
from contextualstory_jax.training.start_state import abstract_state, start_state, to_items
from contextualstory_jax.training.train_step import (
    Batch,
    TrainState,
    make_train_step,
    make_validation,
)
from contextualstory_jax.training.trainable import merge_parts
from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.atomic import atomic_path
from contextualstory_jax.utils.errors import UserError, require

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
Flow = Callable[[TrainState], list[float]]  # the mean scene changes that sampling uses
Validation = Callable[[TrainState], dict[str, float]]  # `validation_loss` among them


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message names the step and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that need no parameters."""

    config: TrainConfig
    workdir: Path
    mesh: Mesh
    placement: Placement
    model: StoryModel
    tokenizer: Tokenizer
    splits: Splits


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss that a run optimizes, and how its states are measured and shown."""

    stories: Readable
    flops: int  # of a step
    make_step: Callable[[TrainState], jax.stages.Wrapped]
    make_validation: Callable[[], Validation | None]
    generate_samples: Callable[[ScalarWriter | NoWriter, TrainState], None]
    flow: Flow
    check_weights: Callable[[Parts], None] = lambda _: None  # may refuse those to start from


def train_and_evaluate(config: TrainConfig, workdir: Path) -> TrainState:
    """Train a config in a workdir, from where its last checkpoint is, and return the last state.

    In several processes all call it. Raises `UserError` for what the user can fix and
    `NonFiniteLoss` where training diverges.
    """
    setup = set_up(config, workdir)
    config, model, tokenizer = setup.config, setup.model, setup.tokenizer
    train, held_out = setup.splits
    latents = open_latents(config, tokenizer, train) if config.data.latents else None
    null_ids = tokenizer([""])[0]
    null_text = None if latents is None else latents.cache.null_text
    flow = storyflow_mean if latents is None else lambda _: latents.cache.storyflow
    shared = model, config, setup.placement, tokenizer, held_out

    def make_validation() -> Validation | None:
        if not config.keep_best:
            return None
        validate = validation(*shared)
        return lambda state: {"validation_loss": validate(state)}

    def check_weights(params: Parts) -> None:
        if latents is not None:
            require_same_weights(latents.cache, params)

    objective = Objective(
        stories=TokenizedStories(train, tokenizer) if latents is None else latents,
        flops=training_step_flops(config).total(),
        make_step=lambda state: make_train_step(
            model, config, setup.placement, state, null_ids, null_text
        ),
        make_validation=make_validation,
        generate_samples=lambda writer, state: generate_samples(
            *shared, workdir, writer, flow, state
        ),
        flow=flow,
        check_weights=check_weights,
    )
    return optimize(setup, objective)


def set_up(config: TrainConfig, workdir: Path, parts: Collection[str] = PARTS) -> Setup:
    """The model's `parts`, the data and the devices of a run, checked; nothing is written.

    Raises `UserError` where they do not fit.
    """
    use_compilation_cache()
    require_agreement({"workdir": str(workdir), **dotted(dataclasses.asdict(config))})
    config = with_scaling_factor(config, workdir)
    mesh = make_mesh(config.mesh)
    placement = Placement(mesh, config.mesh.rules)
    model = StoryModel(config.model, jnp.dtype(config.compute_dtype), config.remat, parts)
    files = tokenizer_folder(config, workdir)
    tokenizer = Tokenizer(files, config.model.text_encoder.max_position_embeddings)
    splits = open_splits(config.data, config.model.height)
    check(config, mesh, tokenizer, splits)
    say(placement.check(model.shapes))
    return Setup(config, workdir, mesh, placement, model, tokenizer, splits)


def optimize(setup: Setup, objective: Objective) -> TrainState:
    """Run an objective from the workdir's last checkpoint, if any, and return the last state.

    Raises as `train_and_evaluate` does.
    """
    config, workdir, model = setup.config, setup.workdir, setup.model
    abstract = abstract_state(model, config, setup.placement)
    # Before anything is written, because it may refuse.
    fresh = latest_step(workdir) is None
    params = initial_params(model, config, setup.placement) if fresh else None
    if params is not None:
        objective.check_weights(params)
    by_first(lambda: write_model(workdir, config.model, setup.tokenizer.folder))
    kept = config.keep_checkpoints, config.keep_every, config.keep_best
    with Checkpoints(workdir, *kept) as checkpoints, StopRequest() as stop:
        state = start_state(abstract, params, config, checkpoints)
        if params is None:
            objective.check_weights(state.frozen)
        del params
        if int(state.step) >= config.steps:
            say(f"already finished at step {int(state.step)}; raise --config.steps to train longer")
            return state
        say(starting(config, workdir, int(state.step)))
        by_first(lambda: describe(config, state, workdir))
        by_first(lambda: record_vocabulary(config, workdir, setup.splits))
        step = objective.make_step(state)
        data = device_batches(config, setup.mesh, objective.stories, int(state.step))
        validate = objective.make_validation()
        with contextlib.closing(open_writer(config, workdir, int(state.step))) as writer:
            run = Run(config, workdir, checkpoints, writer, stop, objective, validate)
            say(compiling("training step", max(map(len, model.shapes.values())), TRAINING_SECONDS))
            return loop(state, compiled_together(step), data, run)


def check(config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer, splits: Splits) -> None:
    """Raise `UserError` where the config does not fit its data, the devices or the tokenizer."""
    require_square(config.model)
    check_batch(config, mesh)
    vocab_size = config.model.text_encoder.vocab_size
    needed = int(tokenizer([""]).max()) + 1  # in CLIP's vocabularies the end token is the last
    require(
        vocab_size >= needed,
        f"model.text_encoder.vocab_size = {vocab_size} is under the tokenizer's {needed}",
    )
    for note in story_notes(splits.train, tokenizer.truncation_note):
        say(note)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raise `UserError` where the batch does not divide."""
    require(
        config.batch_size % (config.accumulation_steps * batch_ways(mesh)) == 0,
        f"batch_size = {config.batch_size} is not divisible by accumulation_steps x data x fsdp = "
        f"{config.accumulation_steps} x {mesh.shape['data']} x {mesh.shape['fsdp']}",
    )


def describe(config: TrainConfig, state: TrainState, workdir: Path) -> None:
    """Write the config and the table of parameters; print how many there are.

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


def record_vocabulary(config: TrainConfig, workdir: Path, splits: Splits) -> None:
    """Write the words of the training stories, of which `generate` warns where one is unknown."""
    write_vocabulary(workdir, vocabulary_of(config.data.name, splits.train))


def validation(
    model: StoryModel,
    config: TrainConfig,
    placement: Placement,
    tokenizer: Tokenizer,
    held_out: StorySource | ShapesSource,
) -> Callable[[TrainState], float]:
    """The averaged weights' loss on held-out stories, always with the same noise and timesteps."""
    size = config.batch_size // config.accumulation_steps
    chosen = validation_stories(held_out, size)
    sharding = NamedSharding(placement.mesh, BATCH)
    batch = Batch(
        images=jax.device_put(np.stack([story.images for story in chosen]), sharding),
        ids=jax.device_put(np.stack([tokenizer(story.sentences) for story in chosen]), sharding),
    )
    null_ids = tokenizer([""])[0]
    compute = compiled_together(make_validation(model, config, null_ids, placement))
    return lambda state: float(compute(state.ema_params, state.frozen, batch))


def validation_stories(held_out: StorySource | ShapesSource, count: int) -> list[Example]:
    """The first held-out stories, repeated in order where there are fewer than `count`."""
    stories = first_stories(held_out, count)
    # Round and round, not the last repeated: a mean over them is of all alike.
    return [stories[i % len(stories)] for i in range(count)]


def open_writer(config: TrainConfig, workdir: Path, first_step: int) -> ScalarWriter | NoWriter:
    """The run's metric writer: in the first process alone."""
    if not is_first():
        return NoWriter()
    return ScalarWriter(workdir, first_step, config.wandb_project)


def generate_samples(
    model: StoryModel,
    config: TrainConfig,
    placement: Placement,
    tokenizer: Tokenizer,
    held_out: StorySource | ShapesSource,
    workdir: Path,
    writer: ScalarWriter | NoWriter,
    flow: Flow,
    state: TrainState,
) -> None:
    """Generate held-out stories with the EMA weights; one row a story, the originals above.

    All devices generate; the first process writes.
    """
    stories = first_stories(held_out, config.sample_stories)
    params = merge_parts(state.ema_params, state.frozen)
    pipeline = StoryPipeline(model, params, tokenizer, flow(state), placement=placement)
    images = pipeline.draw(stories_of(stories, model.config.unet)).images
    show_samples(workdir, writer, int(state.step), stories, images)


def show_samples(
    workdir: Path,
    writer: ScalarWriter | NoWriter,
    step: int,
    stories: Sequence[Example],
    images: Iterable[UInt8[np.ndarray, "f h w 3"]],
) -> None:
    """Write one row a story, its own images above those given; in the first process."""
    if not is_first():
        return
    rows = [
        np.concatenate(list(frames), axis=1)
        for story, generated in zip(stories, images, strict=True)
        for frames in (story.images, generated)
    ]
    image = np.concatenate(rows)
    with atomic_path(workdir / "samples" / f"step_{step:07d}.png") as temporary:
        Image.fromarray(image).save(temporary, format="PNG")
    writer.picture(step, "samples", image)


def storyflow_mean(state: TrainState) -> list[float]:
    """The mean scene changes of all stories trained on; zeros before the first."""
    return np.asarray(state.storyflow_sum / jnp.maximum(state.stories, 1)).tolist()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's objective and outputs."""

    config: TrainConfig
    workdir: Path
    checkpoints: Checkpoints
    writer: ScalarWriter | NoWriter
    stop: StopRequest
    objective: Objective
    validate: Validation | None

    def save(self, state: TrainState, loss: float | None) -> None:
        """Write a checkpoint in the background; `loss` says how good it is."""
        step, items = int(state.step), to_items(state)
        named = {name: items[name] for name in ("params", "ema_params", "frozen")}
        meta = {"step": step, "storyflow": self.objective.flow(state), "items": contents(named)}
        self.checkpoints.save(step, items, meta, loss)


def loop(state: TrainState, train_step: Step, data: Iterator[Any], run: Run) -> TrainState:
    """Step until the config's end, SIGTERM or Ctrl-C; log, save, sample, profile."""
    config, first, stopped = run.config, int(state.step), False
    unchecked: list[tuple[int, dict[str, jax.Array]]] = []
    data = WaitMeter(data)
    with (
        contextlib.closing(Progress(config, run.writer, first, run.objective.flops)) as progress,
        contextlib.closing(Profile(config, run.workdir)) as profile,
    ):
        for number in range(first + 1, config.steps + 1):
            profile.before(number)
            state, values = train_step(state, next(data))
            unchecked.append((number, values))
            progress.add(number, values)
            profile.after(number, values)
            stopped = run.stop.after(number)
            last = stopped or number == config.steps or progress.out_of_time
            saves = last or number % config.checkpoint_every == 0
            # A checkpoint is logged, so that no mean is of steps from before and after a restart.
            if saves or number % config.log_every == 0:
                require_finite(unchecked, run.checkpoints.latest)
                with progress.paused():
                    measured = run.validate(state) if saves and run.validate else {}
                progress.log(unchecked, data.take(), measured, aloud=saves)
                unchecked.clear()
                if saves:
                    with progress.paused():
                        run.save(state, measured.get("validation_loss"))
            if stopped:  # perhaps the machine is about to go: nothing that is not needed
                break
            if last or number % config.sample_every == 0:
                with progress.paused():
                    run.objective.generate_samples(run.writer, state)
            if last:
                break
    if stopped or int(state.step) < config.steps:
        report_stop(int(state.step), run.checkpoints, "SIGTERM" if stopped else "max_minutes")
    return state


def report_stop(step: int, checkpoints: Checkpoints, reason: str) -> None:
    """Print where and why a run stopped before its end, and how to resume it."""
    stop = f"{reason}: stopped after step {step}"
    if interruption.requested():
        checkpoints.wait()
        stop = f"interrupted, checkpoint {step} saved"
    say(f"{stop}; the same command resumes from there")


def require_finite(steps: list[tuple[int, dict[str, jax.Array]]], last_good: int | None) -> None:
    """Raise `NonFiniteLoss` for the first step whose loss or new parameters are not finite."""
    for number, values in steps:
        for name in ("loss", "param_norm"):
            if not math.isfinite(values[name]):
                raise NonFiniteLoss(
                    f"{name} is {float(values[name])} at step {number}; the last good checkpoint "
                    f"is {last_good or 'none'}; lower optimizer.learning_rate and start again"
                )
