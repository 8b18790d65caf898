"""The training loop on a tiny model: its workdir, going on, stopping, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from contextualstory_jax.checkpoints.layout import load_weights
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.config.train_config import DataConfig, TrainConfig
from contextualstory_jax.data import folder
from contextualstory_jax.data.loader import (
    TOKENIZER_DIR,
    TokenizedStories,
    held_out_source,
    training_source,
)
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.testing.published_folders import write_story_folder
from contextualstory_jax.training import start_state, trainer
from contextualstory_jax.training.train_step import TrainState, init_state
from contextualstory_jax.training.trainer import NonFiniteLoss, train_and_evaluate
from contextualstory_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def recipe(tiny_train_config: TrainConfig) -> TrainConfig:
    """The tiny config with attention in the middle block alone, which compiles in half the time."""
    model = tiny_train_config.model
    unet = dataclasses.replace(
        model.unet, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    return dataclasses.replace(tiny_train_config, model=dataclasses.replace(model, unet=unet))


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """One program for all runs that differ only in the loop: tracing takes longer than they do."""
    make_train_step, programs = trainer.make_train_step, {}

    def make_new(model: StoryModel, config: TrainConfig, *arguments: Any) -> trainer.Step:
        loop = {"log_every": 1, "checkpoint_every": 1, "sample_every": 1, "max_minutes": None}
        key = dataclasses.replace(config, data=DataConfig(), **loop)
        if key not in programs:
            programs[key] = make_train_step(model, config, *arguments)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", make_new)
        yield


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "generate_samples", lambda *_: None)


@pytest.fixture(scope="module")
def whole(recipe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    """A run without interruption, and its workdir."""
    workdir = tmp_path_factory.mktemp("whole") / "new" / "run"
    return train_and_evaluate(recipe, workdir), workdir


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the clock's."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    for name in ("stories_per_second", "step_time", "data_wait"):
        assert all(line.pop(name) >= 0 for line in lines)
    return lines


def files(root: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def assert_same(ours: Any, theirs: Any) -> None:
    """Every array is equal, bit for bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_workdir_holds_all_of_the_run(whole, recipe):
    state, workdir = whole

    names = "checkpoints config.json metrics.jsonl model.json parameters.txt samples tensorboard"
    names += " tokenizer vocabulary.json"
    assert {path.name for path in workdir.iterdir()} == set(names.split())
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}
    config = json.loads((workdir / "config.json").read_text())
    assert config == json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert "unet/conv_in.kernel" in (workdir / "parameters.txt").read_text()
    assert (workdir / "tokenizer" / "vocab.json").is_file()
    (events,) = (workdir / "tensorboard").iterdir()
    assert b"param_norm" in events.read_bytes()
    with Image.open(workdir / "samples" / "step_0000004.png") as picture:
        assert picture.size == (5 * 16, 2 * 16)  # originals above, drawn ones below
    assert int(state.step) == 4


def test_each_split_is_opened_and_parsed_once(recipe, tmp_path, monkeypatch):
    root = write_story_folder(tmp_path / "stories", counts={"train": 2, "test": 1})
    data = DataConfig(name="folder", root=str(root))
    parsed, read = [], folder._read
    monkeypatch.setattr(folder, "_read", lambda path: (parsed.append(path), read(path))[1])

    train_and_evaluate(dataclasses.replace(recipe, data=data), tmp_path / "run")

    assert len(parsed) == 2  # for the training and for the test split
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1


def test_metrics_are_finite_and_of_every_step(whole):
    lines = metrics(whole[1])

    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = {"step", "loss", "grad_norm", "param_norm", "update_norm", "learning_rate"}
    assert all(line.keys() == names for line in lines)
    assert all(np.isfinite(value) and value > 0 for line in lines for value in line.values())


def test_the_last_checkpoint_is_the_state_returned(whole, recipe):
    state, workdir = whole
    shapes = StoryModel(recipe.model).shapes

    raw, meta = load_weights(workdir, "raw", shapes)
    ema, _ = load_weights(workdir, "ema", shapes)

    assert_same(raw, state.params)
    assert_same(ema, state.ema_params)
    assert meta["storyflow"] == pytest.approx((state.storyflow_sum / 8).tolist())


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, steps: int, config: TrainConfig, workdir: Path
) -> None:
    """Train, and press Control-C after so many steps."""
    device_batches = trainer.device_batches

    def interrupted(*arguments: Any) -> Iterator:
        batches = device_batches(*arguments)
        for _ in range(steps):
            yield next(batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "device_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(config, workdir)


# Before the first checkpoint, and between two.
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    whole, recipe, tmp_path, monkeypatch, no_samples, steps
):
    interrupt_after(monkeypatch, steps, recipe, tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, steps + 1))

    state = train_and_evaluate(recipe, tmp_path)

    assert_same(state, whole[0])
    assert metrics(tmp_path) == metrics(whole[1])


@pytest.mark.slow
def test_logged_means_are_of_the_same_steps_after_a_restart(
    whole, recipe, tmp_path, monkeypatch, no_samples
):
    recipe = dataclasses.replace(recipe, log_every=3)
    interrupt_after(monkeypatch, 3, recipe, tmp_path)

    train_and_evaluate(recipe, tmp_path)

    losses = {line["step"]: line["loss"] for line in metrics(tmp_path)}
    each = [line["loss"] for line in metrics(whole[1])]
    assert losses == {
        2: pytest.approx(np.mean(each[:2])),  # a checkpoint
        3: pytest.approx(each[2]),
        4: pytest.approx(each[3]),
    }


@pytest.mark.slow
def test_a_run_out_of_time_is_saved_and_goes_on(whole, recipe, tmp_path, no_samples, capsys):
    hurried = dataclasses.replace(recipe, max_minutes=1e-9)

    assert int(train_and_evaluate(hurried, tmp_path).step) == 1
    assert (tmp_path / "checkpoints" / "1").is_dir()
    assert "max_minutes: stopped after step 1; the same command resumes" in capsys.readouterr().out
    assert_same(train_and_evaluate(recipe, tmp_path), whole[0])


def test_a_run_that_is_done_stays_as_it_is(whole, recipe):
    state, workdir = whole
    before = metrics(workdir)

    assert_same(train_and_evaluate(recipe, workdir), state)
    assert metrics(workdir) == before


def make_step(monkeypatch: pytest.MonkeyPatch, number: int, change: Callable[[dict], dict]) -> None:
    """Change the metrics of one step."""
    make_train_step = trainer.make_train_step

    def make_changed(*arguments: Any) -> trainer.Step:
        step = make_train_step(*arguments)

        def changed(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
            state, values = step(state, batch)
            return state, change(values) if int(state.step) == number else values

        return changed

    monkeypatch.setattr(trainer, "make_train_step", make_changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "param_norm"])
def test_divergence_stops_the_run_and_leaves_the_last_good_checkpoint(
    whole, recipe, tmp_path, monkeypatch, no_samples, name
):
    with monkeypatch.context() as patch:
        make_step(patch, 3, lambda values: {**values, name: jnp.float32(jnp.nan)})
        with pytest.raises(
            NonFiniteLoss, match=f"{name} is nan at step 3; the last good checkpoint is 2; lower"
        ):
            train_and_evaluate(recipe, tmp_path)

    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2"}
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert_same(train_and_evaluate(recipe, tmp_path), whole[0])


def test_divergence_between_logs_is_found_before_anything_is_saved(
    recipe, tmp_path, monkeypatch, no_samples
):
    make_step(monkeypatch, 1, lambda values: {**values, "loss": jnp.float32(jnp.inf)})

    with pytest.raises(NonFiniteLoss, match="loss is inf at step 1; .* checkpoint is none"):
        train_and_evaluate(dataclasses.replace(recipe, log_every=100), tmp_path)

    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_every_trained_parameter_has_a_gradient(recipe):
    # Random weights all over, and blends that let both their sides through: what is zero then is
    # a parameter that nothing computes with. Adam's first moment is the gradient, scaled.
    model = StoryModel(recipe.model)
    rng = np.random.default_rng(0)
    params = {
        part: {
            name: np.float32(0.3) * np.ones(p.shape, np.float32)
            if name.endswith("alpha")
            else p + rng.normal(size=p.shape).astype(np.float32) * 0.1
            for name, p in leaves.items()
        }
        for part, leaves in model.init(0).items()
    }
    placement = Placement(make_mesh(MeshConfig()))
    tokenizer = Tokenizer(TOKENIZER_DIR, recipe.model.text_encoder.max_position_embeddings)
    state = jax.device_put(
        init_state(params, recipe),
        jax.tree.map(lambda s: s.sharding, start_state.abstract_state(model, recipe, placement)),
    )
    step = trainer.make_train_step(model, recipe, placement, state, tokenizer([""])[0])

    stories = TokenizedStories(training_source(recipe.data, 16), tokenizer)

    state, _ = step(state, next(trainer.device_batches(recipe, placement.mesh, stories, 0)))

    moments = state.opt_state[1][0].mu
    dead = [n for part in moments.values() for n, m in part.items() if not np.any(m)]
    assert dead == []
    assert sum(len(part) for part in moments.values()) > 100


@pytest.mark.slow
def test_a_continuation_model_trains(recipe, tmp_path):
    unet = dataclasses.replace(recipe.model.unet, first_frame_condition_mode="conv2d")
    model = dataclasses.replace(recipe.model, unet=unet)

    state = train_and_evaluate(dataclasses.replace(recipe, model=model, steps=1), tmp_path)

    assert np.isfinite(metrics(tmp_path)[0]["loss"])
    assert int(state.step) == 1
    assert (tmp_path / "samples" / "step_0000001.png").is_file()


def with_model(recipe: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changes))


@pytest.mark.slow
def test_the_loss_goes_down(recipe, tmp_path, no_samples):
    # The objective of the embedded stories: pictures themselves, every timestep of one weight.
    scheduler = dataclasses.replace(recipe.model.scheduler, prediction_type="sample")
    recipe = dataclasses.replace(
        with_model(recipe, scheduler=scheduler),
        snr_gamma=None,
        steps=300,
        batch_size=8,
        checkpoint_every=300,
    )

    train_and_evaluate(recipe, tmp_path)

    losses = [line["loss"] for line in metrics(tmp_path)]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: with_model(r, height=32, width=32), "model.height = 16, but the config says 32"),
        (
            lambda r: with_model(
                r, unet=dataclasses.replace(r.model.unet, first_frame_condition_mode="concat")
            ),
            "model.unet.first_frame_condition_mode = 'none', but the config says 'concat'",
        ),
        (
            lambda r: dataclasses.replace(r, trainable=(r"unet\..*",)),
            "checkpoint 4 .* params does not fit this model: .* is not of this model",
        ),
    ],
)
def test_a_workdir_of_another_shape_is_refused_and_stays_as_it_is(whole, recipe, change, message):
    _, workdir = whole
    before = files(workdir)

    with pytest.raises(UserError, match=message) as caught:
        train_and_evaluate(change(recipe), workdir)

    assert "\n" not in str(caught.value)
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: dataclasses.replace(r, trainable=("unet",)),
            "trainable: no parameter's path matches 'unet'; paths look like ",
        ),
        (
            lambda r: dataclasses.replace(r, mesh=MeshConfig(data=3)),
            "mesh: .*'data': 3.* does not make up the 1 devices there are",
        ),
        (
            lambda r: with_model(r, width=32),
            "model.height = 16 and model.width = 32 differ, and the images of a dataset are square",
        ),
        (
            lambda r: with_model(
                r, text_encoder=dataclasses.replace(r.model.text_encoder, vocab_size=100)
            ),
            "model.text_encoder.vocab_size = 100 is under the tokenizer's 261",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(
    recipe, tmp_path, change, message
):
    with pytest.raises(UserError, match=message) as caught:
        train_and_evaluate(change(recipe), tmp_path / "new")

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_workdir_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("precious")

    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"cannot write to {workdir}: "):
            train_and_evaluate(recipe, workdir)

    assert files(tmp_path) == {tmp_path / "file": b"precious"}


def test_a_used_workdir_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "config.json").mkdir()

    with pytest.raises(UserError, match="cannot write to .*: Is a directory"):
        train_and_evaluate(recipe, tmp_path)


def test_a_finished_run_says_so_and_stays_as_it_is(whole, recipe, capsys):
    before = files(whole[1])

    state = train_and_evaluate(recipe, whole[1])

    line = "already finished at step 4; raise --config.steps to train longer"
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert_same(state, whole[0])
    assert {path: data for path, data in files(whole[1]).items() if path in before} == before


def spoil(checkpoint: Path) -> None:
    """Damage a checkpoint as a disk would: its files are there, and shorter."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    whole, recipe, tmp_path, capsys, no_samples
):
    workdir = shutil.copytree(whole[1], tmp_path / "run")
    spoil(workdir / "checkpoints" / "4")

    state = train_and_evaluate(recipe, workdir)

    printed = capsys.readouterr().out
    assert "checkpoint 4 of " in printed and "; resuming from checkpoint 2" in printed
    line = f"training in {workdir} on 1 x cpu, float32; resuming from step 2 of 4"
    assert line in printed.splitlines()
    assert "compiling the training step (about " in printed
    assert_same(state, whole[0])
    assert metrics(workdir) == metrics(whole[1])
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4", "4.damaged"}


def test_where_every_checkpoint_is_damaged_nothing_begins_anew(whole, recipe, tmp_path):
    workdir = shutil.copytree(whole[1], tmp_path / "run")
    for step in ("2", "4"):
        spoil(workdir / "checkpoints" / step)

    with pytest.raises(UserError, match="checkpoint 2 of .*; no older checkpoint is intact"):
        train_and_evaluate(recipe, workdir)


@pytest.mark.slow
def test_the_best_and_every_nth_checkpoint_stay(recipe, tmp_path, monkeypatch, no_samples):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(trainer, "validation", lambda *_: lambda _: next(losses))
    kept = {"keep_checkpoints": 1, "keep_every": 3, "keep_best": 1}

    train_and_evaluate(
        dataclasses.replace(recipe, steps=6, checkpoint_every=1, **kept), tmp_path / "run"
    )

    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"2", "3", "6"}  # the least loss; multiples of three, and the last
    assert metrics(tmp_path / "run")[1]["validation_loss"] == 1.0


@pytest.mark.slow
def test_a_profile_is_written_of_the_steps_asked_for(recipe, tmp_path, no_samples):
    train_and_evaluate(dataclasses.replace(recipe, profile_at=2, profile_steps=1), tmp_path)

    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_the_validation_loss_is_the_same_for_the_same_weights(recipe, whole):
    config = dataclasses.replace(recipe, text_drop=1.0)
    model = StoryModel(config.model)
    tokenizer = Tokenizer(TOKENIZER_DIR, config.model.text_encoder.max_position_embeddings)
    placement, held_out = Placement(make_mesh(MeshConfig())), held_out_source(config.data, 16)
    validate = trainer.validation(model, config, placement, tokenizer, held_out)
    other = dataclasses.replace(whole[0], ema_params=model.init(7))

    assert validate(whole[0]) == validate(whole[0]) > 0
    assert validate(other) != validate(whole[0])


def test_a_disk_that_fills_up_ends_the_run_and_leaves_what_there_was(
    whole, recipe, tmp_path, monkeypatch, no_samples
):
    workdir = shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    before = files(workdir / "checkpoints")

    def full(*_: Any, **__: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match="cannot write a checkpoint to .*No space left on device"):
        train_and_evaluate(recipe, workdir)

    assert files(workdir / "checkpoints") == before
