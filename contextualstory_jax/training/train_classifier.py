"""Fine-tuning of InceptionV3 to a dataset's characters, by the loop of `trainer.py`.

One frame of each story is shown in an epoch. Its workdir ends up with `characters_DATASET
.safetensors`, in torchvision's names, which the metric `characters` reads.

Source: StoryViz `train_classifier.py`, which trains all weights from ImageNet's with torchvision's
`transform_input`: after ImageNet's normalisation and that transform an input is 2 x - 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, UInt8

from contextualstory_jax.checkpoints.manager import Checkpoints, latest_step
from contextualstory_jax.config.train_config import DataConfig, OptimizerConfig, TrainConfig
from contextualstory_jax.conversion import torch_names
from contextualstory_jax.conversion.tensor_files import (
    read_pickle,
    read_safetensors,
    write_safetensors,
)
from contextualstory_jax.data.characters import LabelledFrames, characters_of
from contextualstory_jax.data.loader import open_stories
from contextualstory_jax.data.story_source import EmptySplit, StorySource
from contextualstory_jax.distributed.compilation import (
    TRAINING_SECONDS,
    compiling,
    use_compilation_cache,
)
from contextualstory_jax.distributed.multihost import (
    StopRequest,
    by_first,
    compiled_together,
    require_agreement,
    say,
)
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.inception import SIDE, InceptionV3
from contextualstory_jax.models.layers import start_training
from contextualstory_jax.models.network import Network, Params
from contextualstory_jax.models.story_model import Parts
from contextualstory_jax.training.device_batches import device_arrays
from contextualstory_jax.training.progress import starting
from contextualstory_jax.training.start_state import abstract_state, start_state
from contextualstory_jax.training.train_step import TrainState, jitted_step, updated
from contextualstory_jax.training.trainer import (
    Objective,
    Run,
    Validation,
    check_batch,
    loop,
    open_writer,
)
from contextualstory_jax.utils.atomic import atomic_path, check_writable

PART = "classifier"
AUXILIARY = 0.4  # weight of the auxiliary classifier's loss
DROPOUT = 0.5  # of the last features. Source: torchvision Inception3
FLOPS = 6 * 5_713_000_000  # of an image in a step, forward and backward
VALIDATION_FRAMES = 256


class Frames(NamedTuple):
    """Labelled frames on the device."""

    images: UInt8[Array, "b h w 3"]
    labels: Float[Array, "b k"]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """InceptionV3 with a logit for each character of a dataset."""

    characters: tuple[str, ...]

    @functools.cached_property
    def network(self) -> Network[InceptionV3]:
        """The network, its auxiliary classifier included."""
        return Network(lambda: InceptionV3(len(self.characters), aux=True))

    @property
    def shapes(self) -> dict[str, dict]:
        """Shape and dtype of every parameter."""
        return {PART: dict(self.network.shapes)}


def classifier_config(
    data: DataConfig, stories: int, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> TrainConfig:
    """How the classifier is trained: Adam, a checkpoint each epoch."""
    epoch = max(stories // batch_size, 1)  # steps
    adam = OptimizerConfig(
        learning_rate=learning_rate, weight_decay=0.0, max_grad_norm=math.inf, ema_decay=0.0
    )
    return TrainConfig(
        data=data,
        optimizer=adam,
        steps=epochs * epoch,
        batch_size=batch_size,
        seed=seed,
        compute_dtype="float32",
        trainable=(rf"{PART}\..*\.(kernel|scale|bias)",),  # running statistics follow by themselves
        checkpoint_every=epoch,
        keep_checkpoints=1,
        sample_every=epochs * epoch,
    )


def train_classifier(
    data: DataConfig,
    workdir: Path,
    *,
    init_from: Path | None = None,
    epochs: int = 50,
    batch_size: int = 8,
    learning_rate: float = 1e-5,
    seed: int = 0,
) -> TrainState:
    """Train a dataset's classifier in a workdir, from where its last checkpoint is.

    Args:
        data: the dataset.
        workdir: for checkpoints, logs and the result.
        init_from: torchvision's file of ImageNet weights; None: fresh weights.
        epochs: each with one frame of every training story.
        batch_size: frames a step.
        learning_rate: Adam's.
        seed: of order, flips and dropout.

    Raises:
        UserError: for what the user can fix.
        NonFiniteLoss: where training diverges.
    """
    use_compilation_cache()
    classifier = Classifier(characters_of(data.name))
    source = open_stories(data, "train", SIDE)
    assert isinstance(source, StorySource)
    config = classifier_config(data, len(source), epochs, batch_size, learning_rate, seed)
    config = dataclasses.replace(config, init_from=None if init_from is None else str(init_from))
    require_agreement({"workdir": str(workdir), **dataclasses.asdict(config)})
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    check_writable(workdir)
    frames = LabelledFrames(source, classifier.characters)
    frames.read([(0, 0)])  # which refuses a dataset without labels, before anything is written
    state = optimize(classifier, frames, config, workdir, Placement(mesh))
    if int(state.step) >= config.steps:
        write(workdir / f"characters_{data.name}.safetensors", classifier.network, state)
    return state


def optimize(
    classifier: Classifier,
    frames: LabelledFrames,
    config: TrainConfig,
    workdir: Path,
    placement: Placement,
) -> TrainState:
    """Run from the workdir's last checkpoint, if any, and return the last state.

    Raises as `train_classifier` does.
    """
    network, mesh = classifier.network, placement.mesh
    fresh = latest_step(workdir) is None
    params = {PART: initial_params(network, config.init_from, config.seed)} if fresh else None
    objective = Objective(
        stories=frames,
        flops=FLOPS * config.batch_size,
        make_step=lambda state: make_step(network, config, placement, state),
        make_validation=lambda: validation(classifier, config.data),
        generate_samples=lambda writer, state: None,
        flow=lambda state: [],
    )
    with Checkpoints(workdir, config.keep_checkpoints) as checkpoints, StopRequest() as stop:
        abstract = abstract_state(classifier, config, placement)
        state = start_state(abstract, params, config, checkpoints)
        first = int(state.step)
        if first >= config.steps:
            say(f"already finished at step {first}; raise --epochs to train longer")
            return state
        say(starting(config, workdir, first))
        step = compiled_together(objective.make_step(state))
        validate = objective.make_validation()
        with contextlib.closing(open_writer(config, workdir, first)) as writer:
            run = Run(config, workdir, checkpoints, writer, stop, objective, validate)
            say(compiling("training step", len(network.shapes), TRAINING_SECONDS))
            return loop(state, step, device_frames(config, mesh, frames, first), run)


def initial_params(network: Network, file: str | None, seed: int) -> Params:
    """Fresh parameters or, from a file of ImageNet's, all but the last layers'.

    Raises `UserError` where the file is not torchvision's InceptionV3.
    """
    params = network.init(seed)
    if file is None:
        return params
    path = Path(file)
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    kept = {name: shape for name, shape in network.shapes.items() if not _is_last(name)}
    dead = torch_names.match_tensors(tensors, kept).dead.values()
    read = {key: t.read() for key, t in tensors.items() if not _is_last(key) and key not in dead}
    return params | torch_names.convert(read, kept)


def _is_last(name: str) -> bool:
    """Whether a parameter, by either name, is of a layer that makes logits."""
    return name.rpartition(".")[0] in ("fc", "AuxLogits.fc")


def device_frames(
    config: TrainConfig, mesh: Any, frames: LabelledFrames, first_step: int
) -> Iterator[Frames]:
    """Batches on the mesh, one for each step from `first_step` on."""
    for arrays in device_arrays(config, mesh, frames, first_step):
        yield Frames(**arrays)


def scaled(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Levels 0 to 255 to -1 to 1, as ImageNet's weights for InceptionV3 read them."""
    return images.astype(jnp.float32) / 127.5 - 1


def losses(logits: Float[Array, "b k"], labels: Float[Array, "b k"]) -> Float[Array, ""]:
    """The mean binary cross-entropy."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))


def classifier_loss(
    network: Network[InceptionV3],
    trained: Parts,
    running: Parts,
    batch: Frames,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Parts]:
    """The loss of a batch, half of its images flipped, and the running statistics after it."""
    flip_key, dropout_key = jax.random.split(key)
    images = scaled(batch.images)
    flipped = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
    inception = network.bind({**trained[PART], **running[PART]})
    start_training(inception)
    middle = inception.middle(jnp.where(flipped, images[:, :, ::-1], images))
    features = inception.top(middle)
    kept = jax.random.bernoulli(dropout_key, 1 - DROPOUT, features.shape)
    logits = inception.fc(jnp.where(kept, features / (1 - DROPOUT), 0.0))
    value = losses(logits, batch.labels)
    value += AUXILIARY * losses(inception.AuxLogits(middle), batch.labels)
    after = network.values(inception)
    return value, {PART: {name: after[name] for name in running[PART]}}


def classifier_step(
    network: Network[InceptionV3], config: TrainConfig, state: TrainState, batch: Frames
) -> tuple[TrainState, dict[str, Array]]:
    """The state after a batch, and the step's metrics."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    of_batch = functools.partial(classifier_loss, network)
    (value, running), gradient = jax.value_and_grad(of_batch, has_aux=True)(
        state.params, state.frozen, batch, key
    )
    new, metrics = updated(state, value, gradient, config)
    return dataclasses.replace(new, frozen=running), metrics


def make_step(
    network: Network[InceptionV3], config: TrainConfig, placement: Placement, state: TrainState
) -> jax.stages.Wrapped:
    """The jitted step."""
    return jitted_step(classifier_step, (network, config), placement, state)


def validation(classifier: Classifier, data: DataConfig) -> Validation | None:
    """Loss and frame accuracy on frames of the validation split; None where it has no stories."""
    try:
        source = open_stories(data, "val", SIDE)
    except EmptySplit:
        return None
    assert isinstance(source, StorySource)
    frames = LabelledFrames(source, classifier.characters)
    count = min(VALIDATION_FRAMES, len(source))

    @jax.jit
    def logits(params: Params, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b k"]:
        return classifier.network.bind(params)(scaled(images))

    def validate(state: TrainState) -> dict[str, float]:
        params = {**state.params[PART], **state.frozen[PART]}
        found, right = 0.0, 0
        for index in range(count):
            batch = frames.read([(index, 0)])
            logit = np.asarray(logits(params, batch["images"]))
            found += float(losses(jnp.asarray(logit), jnp.asarray(batch["labels"])))
            right += int(((logit > 0) == batch["labels"]).all())
        return {"validation_loss": found / count, "validation_frame_accuracy": right / count}

    return validate


def write(path: Path, network: Network, state: TrainState) -> None:
    """Write the weights as torchvision names them, in the first process."""
    params = {**state.params[PART], **state.frozen[PART]}
    names = sorted(network.shapes)
    arrays = {name: np.asarray(params[name]) for name in names}
    tensors = {
        torch_names.torch_key(name, arrays[name].ndim): torch_names.to_torch(name, arrays[name])
        for name in names
    }

    def save() -> None:
        with atomic_path(path) as temporary:
            kinds = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
            write_safetensors(temporary, kinds, tensors.values())

    by_first(save)
