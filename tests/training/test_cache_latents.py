"""Latent caches: what they hold, that training from one is training without, what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.checkpoints.manager import Checkpoints
from contextualstory_jax.commands import storyflow_mean
from contextualstory_jax.config.build import build
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.config.train_config import DataConfig, TrainConfig
from contextualstory_jax.data.latent_cache import EncodedStories, LatentCache, tabulate
from contextualstory_jax.data.loader import TOKENIZER_DIR, TokenizedStories, training_source
from contextualstory_jax.distributed.sharding import make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.models.storyflow import storyflow
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.testing.published_folders import write_flintstones, write_pororo
from contextualstory_jax.training import cache_latents as cache_module
from contextualstory_jax.training import trainer
from contextualstory_jax.training.cache_latents import cache_latents, open_latents, stories_on_disk
from contextualstory_jax.training.train_step import encode
from contextualstory_jax.training.trainer import train_and_evaluate
from contextualstory_jax.utils.errors import UserError
from tests.conftest import write_untrained
from tests.helpers.devices import environment

ROOT = Path(__file__).parents[2]
VAE = {"kind": "kl", "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
LENGTH = 64  # tokens, so that sentences differ before they are cut


@pytest.fixture(scope="module")
def recipe(tiny_model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two steps with a KL codec, on stories each of whose frames has two to four pictures."""
    folder = tmp_path_factory.mktemp("latents")
    values = dataclasses.asdict(tiny_model_config)
    values["unet"].update(in_channels=4, out_channels=4, max_text_length=LENGTH)
    values["text_encoder"]["max_position_embeddings"] = LENGTH
    model = build(ModelConfig, {**values, "vae": VAE})
    root = write_flintstones(folder / "flintstones")
    return TrainConfig(
        model=model,
        data=DataConfig(name="flintstones", root=str(root), seed=3),
        init_from=str(write_untrained(model, folder / "checkpoint")),
        steps=2,
        batch_size=2,
        compute_dtype="float32",
        log_every=1,
        sample_every=1000,
        sample_stories=1,
    )


@pytest.fixture(scope="module")
def cache(recipe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    out = tmp_path_factory.mktemp("cache") / "latents"
    return cache_latents(recipe, Path(str(recipe.init_from)), out)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER_DIR, LENGTH)


def with_data(recipe: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))


def with_cache(recipe: TrainConfig, cache: LatentCache) -> TrainConfig:
    return with_data(recipe, latents=str(cache.folder))


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to float32 rounding: batches of other sizes add up in another order."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_every_picture_and_every_sentence_is_there_once(recipe, cache):
    source = stories_on_disk(recipe)
    stories = [source.story(i) for i in range(len(source))]
    clips = {path: len(np.load(path)) for story in stories for path in story.paths}
    sentences = {sentence for story in stories for sentence in story.sentences}

    assert len(clips) < 5 * len(stories)  # else nothing is shared
    assert cache.picture_counts.tolist() == list(clips.values())
    mean, logvar = cache.moments(np.arange(sum(clips.values())))
    assert mean.shape == logvar.shape == (sum(clips.values()), 8, 8, 4)
    assert cache.text(np.arange(1 + len(sentences))).shape == (1 + len(sentences), LENGTH, 32)


def test_pictures_of_pororo_are_shared(recipe, tmp_path):
    data = DataConfig(name="pororo", root=str(write_pororo(tmp_path / "pororo")))
    table = tabulate(stories_on_disk(dataclasses.replace(recipe, data=data)))

    assert len(table.paths) == len(set(table.frames.ravel().tolist())) < table.frames.size
    assert len(table.sentences) == 1 + len(set(table.texts.ravel().tolist()))


def test_batches_are_those_of_training_without_it_in_every_epoch(recipe, cache, tokenizer):
    config = with_cache(recipe, cache)
    model, mesh = StoryModel(recipe.model), make_mesh(MeshConfig())
    params = jax.tree.map(
        jnp.asarray, cache_module._encoder_params(recipe.model, Path(recipe.init_from))
    )
    null_ids = jnp.asarray(tokenizer([""])[0])
    encode_batch = jax.jit(lambda batch: encode(model, params, batch, null_ids))
    # Pickled, as processes that read get them.
    source = stories_on_disk(recipe)
    stories = pickle.loads(pickle.dumps(open_latents(config, tokenizer, source)))
    first = 2  # as after a resume
    plain = trainer.device_batches(recipe, mesh, TokenizedStories(source, tokenizer), first)
    cached = trainer.device_batches(config, mesh, stories, first)

    seen = []
    for _ in range(2 * len(stories)):  # several epochs
        expected, null_text = encode_batch(next(plain))
        given = next(cached)
        jax.tree.map(close, given, expected)
        close(cache.null_text, null_text)
        seen.append(np.asarray(given.moments.mean))

    distinct = {frame.tobytes() for frame in np.concatenate(np.concatenate(seen))}
    assert len(distinct) > len(tabulate(stories.source).paths)  # pictures change with the epoch


def test_the_storyflow_mean_is_that_of_drawn_latents_of_the_first_epoch(recipe, cache):
    model, stories = StoryModel(recipe.model), EncodedStories(stories_on_disk(recipe), cache)
    mean, logvar = stories.moments([(i, 0) for i in range(len(stories))])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(recipe.seed), i))(
        jnp.arange(len(stories))
    )
    drawn = jax.jit(model.sample)(
        cache_module.Moments(jnp.asarray(mean), jnp.asarray(logvar)), keys
    )

    np.testing.assert_allclose(cache.storyflow, storyflow(drawn).mean(axis=0), rtol=1e-6)
    assert f"mean StoryFlow values {cache.storyflow[0]:.3g}, " in str(cache)


@pytest.mark.slow
def test_the_storyflow_mean_is_the_same_without_a_cache_and_is_stored_where_drawing_finds_it(
    recipe, cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cache_module, "STORIES_AT_ONCE", 2)  # of three: the last batch is not full
    monkeypatch.setattr(storyflow_mean, "load_config", lambda *_: recipe)
    checkpoint = shutil.copytree(str(recipe.init_from), tmp_path / "checkpoint")
    before = StoryPipeline.load(checkpoint).storyflow

    def run(*more: str) -> str:
        storyflow_mean.main(["--config", "a.py", "--checkpoint", str(checkpoint), *more])
        return capsys.readouterr().out

    shown = run()
    assert shown == f"mean StoryFlow values: {', '.join(f'{v:.6g}' for v in cache.storyflow)}\n"
    np.testing.assert_array_equal(StoryPipeline.load(checkpoint).storyflow, before)

    assert run("--write") == f"{shown}stored in checkpoint 0 of {checkpoint}\n"
    np.testing.assert_allclose(StoryPipeline.load(checkpoint).storyflow, cache.storyflow, rtol=1e-5)


def test_a_prepared_dataset_and_the_published_folder_share_a_cache(recipe, cache, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from contextualstory_jax.data.preparation import prepare

    prepare(recipe.data, tmp_path / "shards", recipe.model.height)
    prepared = with_data(recipe, root=str(tmp_path / "shards"))

    made = cache_latents(prepared, Path(str(recipe.init_from)), tmp_path / "latents")

    assert made.about == cache.about
    rows = np.arange(made.picture_counts.sum())
    jax.tree.map(close, made.moments(rows), cache.moments(rows))
    read = EncodedStories(stories_on_disk(prepared), cache).read([(1, 3)])
    np.testing.assert_array_equal(
        read["mean"], EncodedStories(stories_on_disk(recipe), cache).read([(1, 3)])["mean"]
    )


def test_a_cache_at_a_url_is_read_as_one_on_this_machine(
    recipe, cache, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fsspec.filesystem("memory").put(str(cache.folder), "/bucket/latents", recursive=True)

    source = stories_on_disk(recipe)
    there = open_latents(with_data(recipe, latents="memory://bucket/latents"), tokenizer, source)

    here = open_latents(with_cache(recipe, cache), tokenizer, source)
    assert tmp_path in there.cache.folder.parents
    jax.tree.map(np.testing.assert_array_equal, there.read([(0, 0)]), here.read([(0, 0)]))


@pytest.mark.slow
def test_training_from_a_cache_is_training_without(recipe, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "generate_samples", lambda *_: None)

    plain = train_and_evaluate(recipe, tmp_path / "plain")
    cached = train_and_evaluate(with_cache(recipe, cache), tmp_path / "cached")

    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()]
        for run in ("plain", "cached")
    ]
    assert len(losses[0]) == 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(cached.storyflow_sum, plain.storyflow_sum, rtol=1e-5)
    with Checkpoints(tmp_path / "cached") as checkpoints:
        assert checkpoints.meta(2)["storyflow"] == cache.storyflow
    with pytest.raises(UserError, match="was made by another vae than this run's; train with"):
        workdir = tmp_path / "cached"  # going on, with a cache of the workdir's recipe but not its
        other = dataclasses.replace(recipe, init_from=str(other_weights(recipe, tmp_path)))
        made = cache_latents(other, Path(str(other.init_from)), tmp_path / "other_cache")
        train_and_evaluate(with_cache(recipe, made), workdir)


def other_weights(recipe: TrainConfig, folder: Path) -> Path:
    """A checkpoint like the recipe's, with another codec."""
    from contextualstory_jax.checkpoints.layout import write_weights

    params = StoryModel(recipe.model).init(1)
    meta = {"step": 0, "storyflow": [0.0] * 4}
    write_weights(folder / "other", recipe.model, TOKENIZER_DIR, {"params": params}, meta)
    return folder / "other"


def with_model(recipe: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: dataclasses.replace(r, trainable=(r"unet\..*", r"text_encoder\..*")),
            "data.latents keeps what frozen networks make, and the config trains text_enc",
        ),
        (
            lambda r: dataclasses.replace(r, trainable=(r"vae\.encoder\..*",)),
            "data.latents keeps what frozen networks make, and the config trains vae.encoder.",
        ),
        (
            lambda r: with_model(r, height=32, width=32),
            "was made with model.height = 16, and the config says 32; train with",
        ),
        (
            lambda r: dataclasses.replace(r, compute_dtype="bfloat16"),
            "made with compute_dtype = 'float32', and the config says 'bfloat16'",
        ),
        (
            lambda r: with_data(r, split_policy="strict"),
            "made with data.split_policy = 'published', and the config says 'strict'",
        ),
        (lambda r: with_data(r, name="folder"), "with data.name = 'flintstones', .* says 'folder'"),
        (lambda r: with_data(r, latents="lost"), "lost holds no latent cache: cache.json is miss"),
    ],
)
def test_another_recipe_is_refused(recipe, cache, tokenizer, change, message):
    refuses(change(with_cache(recipe, cache)), tokenizer, message)


def refuses(config: TrainConfig, tokenizer: Tokenizer, message: str) -> None:
    source = training_source(dataclasses.replace(config.data, name="flintstones"), 16)
    with pytest.raises(UserError, match=message) as caught:
        open_latents(config, tokenizer, source)
    assert "\n" not in str(caught.value)


def test_a_model_of_images_that_are_not_square_is_refused(recipe):
    with pytest.raises(UserError, match=r"model.height = 16 and model.width = 32 differ"):
        stories_on_disk(with_model(recipe, width=32))


def test_other_stories_are_refused(recipe, cache, tokenizer, tmp_path):
    root = shutil.copytree(recipe.data.root, tmp_path / "flintstones")
    annotations = root / "flintstones_annotations_v1-0.json"
    annotations.write_text(annotations.read_text().replace("They are in", "Nobody is in"))

    refuses(
        with_data(with_cache(recipe, cache), root=str(root)),
        tokenizer,
        "the latent cache .* is of other stories than the config's data; ",
    )


def test_another_tokenizer_is_refused(recipe, cache, tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer.folder, tmp_path / "tokenizer")
    merges = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(merges[:-1]) + "\n")

    refuses(with_cache(recipe, cache), Tokenizer(folder, LENGTH), "with another tokenizer; train")


def test_other_weights_are_refused_before_anything_is_written(recipe, cache, tmp_path):
    other = dataclasses.replace(recipe, init_from=str(other_weights(recipe, tmp_path)))

    with pytest.raises(UserError, match="was made by another vae than this run's; train with"):
        train_and_evaluate(with_cache(other, cache), tmp_path / "run")

    assert not (tmp_path / "run").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: cut(next(d.glob("moments-*"))),
            "is damaged .moments-.* has no readable records, not",
        ),
        (
            lambda d: next(d.glob("text-*")).unlink(),
            "is damaged .text-.* has no readable records, not",
        ),
        (lambda d: (d / "pictures.npy").unlink(), "is damaged .*pictures.npy"),
        (lambda d: np.save(d / "pictures.npy", np.ones(3)), "pictures.npy counts other images"),
        (lambda d: (d / "cache.json").write_text("{"), "cache.json cannot be read .*; make the"),
        (lambda d: (d / "cache.json").write_text("{}"), "cache.json does not describe .* format 1"),
        (lambda d: (d / "cache.json").write_text('{"format": 1}'), "does not describe a latent"),
    ],
)
def test_a_damaged_cache_is_refused(recipe, cache, tokenizer, tmp_path, damage, message):
    folder = Path(shutil.copytree(cache.folder, tmp_path / "latents"))
    damage(folder)

    refuses(with_data(recipe, latents=str(folder)), tokenizer, message)


def broken_picture(recipe: TrainConfig, folder: Path) -> TrainConfig:
    root = shutil.copytree(recipe.data.root, folder / "flintstones")
    sorted((root / "video_frames_sampled").iterdir())[-1].write_bytes(b"no array")
    sorted((root / "video_frames_sampled").iterdir())[3].write_bytes(b"no array")
    return with_data(recipe, root=str(root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken_picture, ".npy cannot be read as an image; replace it"),
        (lambda r, _: with_data(r, name="shapes", root=None), "'shapes' never runs out of stories"),
        (
            lambda r, _: with_model(r, vae=dataclasses.replace(r.model.vae, layers_per_block=2)),
            "model.vae.layers_per_block = 1, but the config says 2; use another --checkpoint",
        ),
    ],
)
def test_what_cannot_be_cached_leaves_nothing_behind(recipe, tmp_path, change, message):
    out = tmp_path / "out"
    out.mkdir()

    with pytest.raises(UserError, match=message) as caught:
        config = change(recipe, tmp_path)
        cache_latents(config, Path(str(recipe.init_from)), out / "latents")

    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


def test_a_cache_that_is_there_is_not_written_over(recipe, cache):
    with pytest.raises(UserError, match="latents is there already; delete it, or choose another"):
        cache_latents(recipe, Path(str(recipe.init_from)), cache.folder)


def test_a_disk_that_fills_up_is_named(recipe, tmp_path, monkeypatch):
    class Full(cache_module.ArrayRecordWriter):
        def close(self) -> None:
            raise RuntimeError("write() failed: No space left on device\nat byte 1")

    monkeypatch.setattr(cache_module, "ArrayRecordWriter", Full)
    out = tmp_path / "latents"

    with pytest.raises(UserError, match="cannot write .*moments.*No space left on device.; choose"):
        cache_latents(recipe, Path(str(recipe.init_from)), out)

    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- several devices

PROCESS = """
import json, sys, jax
from pathlib import Path
number, processes, port, recipe, out = sys.argv[1:]
if processes != "1":
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(number))
from contextualstory_jax.training.cache_latents import cache_latents, storyflow_of_split
from contextualstory_jax.config.config_files import train_config
config = train_config(json.loads(Path(recipe).read_text()))
cache_latents(config, Path(config.init_from), Path(out))
mean = storyflow_of_split(config, Path(config.init_from))
Path(f"{out}-{number}.json").write_text(json.dumps(mean))
"""


@pytest.fixture
def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.mark.multiprocess
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 1)])
def test_several_devices_and_processes_make_the_same_cache(
    recipe, cache, tmp_path, free_port, processes, devices
):
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    arguments = [str(processes), free_port, str(tmp_path / "recipe.json"), str(tmp_path / "out")]

    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), *arguments],
            cwd=ROOT,
            env=environment(devices),
        )
        for number in range(processes)
    ]

    assert [process.wait(timeout=300) for process in running] == [0] * processes
    made = LatentCache.open(tmp_path / "out")
    assert len(made.about["moments"]["files"]) == processes
    pictures, sentences = (sum(cache.about[k]["files"].values()) for k in ("moments", "text"))
    jax.tree.map(close, made.moments(np.arange(pictures)), cache.moments(np.arange(pictures)))
    close(made.text(np.arange(sentences)), cache.text(np.arange(sentences)))
    np.testing.assert_array_equal(made.picture_counts, cache.picture_counts)
    np.testing.assert_allclose(made.storyflow, cache.storyflow, rtol=1e-5)
    for number in range(processes):
        mean = json.loads((tmp_path / f"out-{number}.json").read_text())
        np.testing.assert_allclose(mean, cache.storyflow, rtol=1e-5)


@pytest.mark.multiprocess
def test_two_processes_store_one_storyflow_mean(recipe, cache, tmp_path, free_port):
    values = json.dumps(dataclasses.asdict(recipe))
    config, checkpoint = tmp_path / "config.py", tmp_path / "checkpoint"
    config.write_text(f"import json\ndef get_config():\n    return json.loads({values!r})\n")
    shutil.copytree(recipe.init_from, checkpoint)
    command = [sys.executable, "-m", "contextualstory_jax", "storyflow-mean", "--write"]
    command += ["--config", str(config)]
    command += ["--checkpoint", str(checkpoint), "--coordinator", f"127.0.0.1:{free_port}"]

    running = [
        subprocess.Popen([*command, "--processes", "2", "--process", str(number)], cwd=ROOT)
        for number in range(2)
    ]

    assert [process.wait(timeout=300) for process in running] == [0, 0]
    with Checkpoints(checkpoint) as checkpoints:
        stored = checkpoints.meta(0)["storyflow"]
    np.testing.assert_allclose(stored, cache.storyflow, rtol=1e-5)
