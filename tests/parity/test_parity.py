"""Every number the original computed, computed again: one test a case.

`pytest tests/parity --parity-dir DIR` runs the cases found in DIR, whatever their names and sizes;
without the option, the project's own copies. Tolerances are relative L2 errors in float32 on a CPU,
where a float32 rounding of an input moves an output by a few 1e-6.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from PIL import Image

import convert_weights
from contextualstory_jax import StoryPipeline, generate
from contextualstory_jax.config.model_config import (
    ModelConfig,
    SamplingConfig,
    SchedulerConfig,
    TextEncoderConfig,
)
from contextualstory_jax.config.train_config import OptimizerConfig, TrainConfig
from contextualstory_jax.conversion import torch_names
from contextualstory_jax.diffusion.denoising import make_sampler
from contextualstory_jax.diffusion.noise_schedules import add_noise, noise_schedule
from contextualstory_jax.models.story_model import StoryModel, clamp
from contextualstory_jax.models.storyflow import storyflow
from contextualstory_jax.sampling.prompts import read_jsonl
from contextualstory_jax.testing import parity_weights
from contextualstory_jax.testing.parity_cases import (
    COMPARE,
    LATENTS_TOLERANCE,
    MODULE_TOLERANCE,
    UNET_TOLERANCE,
    Case,
    compare,
    predict_noise,
    relative_error,
    unet_inputs,
)
from contextualstory_jax.testing.released_folders import PREFIXES, write_folder
from contextualstory_jax.training.optimizer import optimizer
from contextualstory_jax.training.train_step import (
    RandomInputs,
    TrainState,
    init_state,
    loss,
    update,
)
from tests.parity.conftest import OWN, find_cases

GRADIENT_TOLERANCE = 5e-5  # of the sample


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    error = relative_error(ours, theirs)
    assert error <= tolerance, f"relative error {error:.2e}"


def check_outputs(path: Path, tmp_path: Path) -> None:
    for comparison in compare(Case(path)):
        assert_close(comparison.ours, comparison.theirs, comparison.tolerance)


def check_gradient(path: Path, tmp_path: Path) -> None:
    """A prediction, and the gradient of its product with a given array, in every parameter."""
    case = Case(path)
    arrays, seed = case.arrays, case.info["weight_seed"]

    @jax.jit
    def gradient(params, sample, *more):
        def total(params, sample):
            out = predict_noise(case, case.network.bind(params), sample, *more)
            out = rearrange(out, "b f h w c -> b c f h w")
            return jnp.sum(out * arrays["cotangent"]), out

        return jax.grad(total, argnums=(0, 1), has_aux=True)(params, sample)

    (of_params, of_sample), out = gradient(case.params, *unet_inputs(case))

    assert_close(np.asarray(out), arrays["noise_pred"], UNET_TOLERANCE)
    of_sample = rearrange(np.asarray(of_sample), "b f h w c -> b c f h w")
    assert_close(of_sample, arrays["sample_grad"], GRADIENT_TOLERANCE)
    # A tensor whose gradient all but cancels holds little beside what the sums were rounded by.
    rounding = 1e-6 * np.linalg.norm(arrays["grad_norm"])
    for (key, name), norm, probe in zip(
        parameter_names(case), arrays["grad_norm"], arrays["grad_probe"], strict=True
    ):
        if name is None:
            assert norm == 0, key
            continue
        tensor = torch_names.to_torch(name, np.asarray(of_params[name])).astype(np.float64)
        assert abs(np.linalg.norm(tensor) - norm) <= 1e-3 * norm + rounding, key
        ours = np.sum(tensor * parity_weights.randn(f"probe.{key}", tensor.shape, seed))
        assert abs(ours - probe) <= 1e-3 * norm + rounding, key


def check_train(path: Path, tmp_path: Path) -> None:
    case = Case(path)
    arrays, info = case.arrays, case.info["optimizer"]
    scheduler, text_encoder = (
        SchedulerConfig(),
        TextEncoderConfig(hidden_size=case.info["text_dim"]),
    )
    model = StoryModel(
        ModelConfig(unet=case.config, scheduler=scheduler, text_encoder=text_encoder)
    )
    config = OptimizerConfig(
        learning_rate=info["lr"],
        beta1=info["beta1"],
        beta2=info["beta2"],
        eps=info["eps"],
        weight_decay=info["weight_decay"],
        max_grad_norm=info["max_grad_norm"],
        ema_decay=case.info["ema_decay"],
    )
    initial = {"unet": parity_weights.params(case.network, case.info["weight_seed"])}
    steps = len(arrays["loss"])
    train = TrainConfig(model=model.config, optimizer=config, steps=steps, trainable=(".*",))
    tx = optimizer(config, steps)

    @jax.jit
    def step(state, sampled, text, null_text):
        state = dataclasses.replace(state, params=clamp(state.params))
        value, gradient = jax.value_and_grad(
            lambda params: loss(model, params, sampled, text, null_text, case.info["snr_gamma"])
        )(state.params)
        state = update(state, gradient, tx, config.ema_decay)
        return state, value, optax.global_norm(gradient), storyflow(sampled.latents).mean(axis=0)

    state = init_state(initial, train)
    motions = []
    for i in range(steps):
        latents, noise = (
            jnp.asarray(rearrange(arrays[n][i], "b c f h w -> b f h w c"))
            for n in ("latents", "noise")
        )
        sampled = RandomInputs(
            latents, noise, arrays["timesteps"][i], arrays["is_null"][i], arrays["null_image"][i]
        )
        noisy = add_noise(noise_schedule(scheduler), latents, noise, jnp.asarray(sampled.timesteps))
        noisy_theirs = rearrange(arrays["noisy_latents"][i], "b c f h w -> b f h w c")
        assert_close(np.asarray(noisy), noisy_theirs, MODULE_TOLERANCE)
        text = rearrange(arrays["text"][i], "(b f) l d -> b f l d", f=case.config.n_frames)
        state, value, norm, motion = step(state, sampled, text, arrays["null_text"][i][None])
        motions.append(np.asarray(motion))
        np.testing.assert_allclose(value, arrays["loss"][i], rtol=1e-5)
        np.testing.assert_allclose(norm, arrays["grad_norm"][i], rtol=1e-5)
        mean = np.mean(motions, axis=0, keepdims=True)
        assert_close(mean, arrays["cumulative_motion"][i], MODULE_TOLERANCE)
    check_probes(case, initial["unet"], state)


def parameter_names(case: Case) -> Iterator[tuple[str, str | None]]:
    """The original's name of each tensor and ours, which is None where nothing reads it."""
    shapes = case.network.shapes
    ours = {torch_names.torch_key(name, len(shapes[name].shape)): name for name in shapes}
    for key in map(str, case.arrays["param_names"]):
        name = ours.pop(key, None)
        assert name or any(re.fullmatch(pattern, key) for pattern, _ in torch_names.DEAD), key
        yield key, name
    assert not ours, f"not in the case: {sorted(ours)[:3]}"


def check_probes(case: Case, initial: dict[str, jax.Array], state: TrainState) -> None:
    """Every tensor after the last step, by its projection on a random vector."""
    arrays, seed = case.arrays, case.info["weight_seed"]
    unmoved = 0
    for (key, name), probe, delta, ema_probe in zip(
        parameter_names(case),
        *(arrays[n] for n in ("param_probe", "param_delta_norm", "ema_probe")),
        strict=True,
    ):
        if name is None:
            assert delta == 0, key
            unmoved += 1
            continue

        def projected(array, name=name, key=key):
            tensor = torch_names.to_torch(name, np.asarray(array)).astype(np.float64)
            return np.sum(tensor * parity_weights.randn(f"probe.{key}", tensor.shape, seed))

        final = np.asarray(state.params["unet"][name])
        moved = np.linalg.norm(final.astype(np.float64) - np.asarray(initial[name]))
        assert abs(moved - delta) <= 1e-3 * delta + 1e-6, (key, moved, delta)
        tolerance = 2e-3 * delta + 1e-5
        assert abs(projected(final) - probe) <= tolerance, key
        assert abs(projected(state.ema_params["unet"][name]) - ema_probe) <= tolerance, key
    assert unmoved == np.sum(arrays["param_delta_norm"] == 0)


def check_pipeline(path: Path, tmp_path: Path) -> None:
    """A released folder: converted by the command, drawn by the command."""
    info, arrays = json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))
    manifests = json.loads((path.parent / "manifest.json").read_text())
    assert info["prefixes"] == PREFIXES
    folder = tmp_path / "released"
    write_folder(folder, path.parent / "checkpoint", manifests, info["weight_seed"])
    convert_weights.main([str(folder), str(tmp_path / "checkpoint")])
    stories = write_stories(tmp_path / "stories.jsonl", info, arrays.get("first_frames_uint8"))
    np.save(tmp_path / "initial.npy", rearrange(arrays["latents"], "b c f h w -> b f h w c"))

    generate.main(
        ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]
        + ["--stories", str(tmp_path / "stories.jsonl")]
        + ["--initial-latents", str(tmp_path / "initial.npy")]
        + ["--save-latents", str(tmp_path / "final.npy"), *pipeline_options(info)]
    )

    pipeline = StoryPipeline.load(tmp_path / "checkpoint")
    sentences = [s for story in read_jsonl(tmp_path / "stories.jsonl") for s in story.sentences]
    ids = pipeline.tokenizer(sentences)
    np.testing.assert_array_equal(ids, arrays["input_ids"])
    some = ids[: len(arrays["text_embeddings"])]
    text = jax.jit(pipeline.model.encode_text)(pipeline.params, jnp.asarray(some[None]))
    assert_close(np.asarray(text[0]), arrays["text_embeddings"], MODULE_TOLERANCE)
    sampling = SamplingConfig(steps=info["num_inference_steps"])
    sampler = make_sampler(pipeline.model.config.scheduler, sampling)
    np.testing.assert_array_equal(sampler.timesteps, arrays["timesteps"])
    latents = rearrange(np.load(tmp_path / "final.npy"), "b f h w c -> b c f h w")
    assert_close(latents, arrays["final_latents"], LATENTS_TOLERANCE)
    pictures = np.array(
        [
            [np.asarray(Image.open(tmp_path / "out" / id / f"frame_{i}.png")) for i in range(f)]
            for id, f in stories.items()
        ]
    )
    off = np.abs(rearrange(pictures, "b f h w c -> b c f h w").astype(int) - arrays["pictures"])
    assert off.max() <= 1
    assert np.mean(off == 0) >= 0.999


def write_stories(path: Path, info: dict, first_frames: np.ndarray | None) -> dict[str, int]:
    """Write a case's stories as a user would; gives how many frames each id has."""
    f, lines, frames = info["n_frames"], [], {}
    for i in range(len(info["prompts"]) // f):
        line = {"id": f"story_{i}", "sentences": info["prompts"][i * f : (i + 1) * f]}
        if first_frames is not None:
            line["first_frame"] = f"first_{i}.png"
            Image.fromarray(first_frames[i]).save(path.parent / line["first_frame"])
        lines.append(json.dumps(line))
        frames[line["id"]] = f
    path.write_text("\n".join(lines))
    return frames


def pipeline_options(info: dict) -> list[str]:
    """What was run, as options of the command."""
    values = {
        "steps": info["num_inference_steps"],
        "guidance-scale": info["guidance_scale_txt"],
        "image-guidance-scale": info["guidance_scale_img"],
        "guidance-rescale": info["guidance_rescale"],
        "eta": info["eta"],
        "height": info["height"],
        "width": info["width"],
    }
    if info["frameinit"]:
        low_pass = info["frameinit"]["filter_params"]
        names = {"method": "", "n": "-order", "d_s": "-spatial", "d_t": "-temporal"}
        values |= {f"frameinit{names[name]}": value for name, value in low_pass.items()}
        values["frameinit-level"] = info["frameinit"]["noise_level"]
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


CHECKS = {
    **dict.fromkeys(COMPARE, check_outputs),
    "gradient": check_gradient,
    "train": check_train,
    "pipeline": check_pipeline,
}


def test_case(case_path: Path, tmp_path: Path) -> None:
    kind = json.loads(case_path.read_text())["kind"]
    assert kind in CHECKS, (
        f"{case_path.name}: no check for cases of kind {kind!r}; known: {', '.join(CHECKS)}"
    )
    CHECKS[kind](case_path, tmp_path)


def test_own_cases_are_there() -> None:
    kinds = {json.loads(path.read_text())["kind"] for path in find_cases(OWN)}
    assert kinds == set(CHECKS), "pytest without cases would pass for nothing"


def test_unknown_kind_fails(tmp_path: Path) -> None:
    case = tmp_path / "strange.json"
    case.write_text(json.dumps({"kind": "strange"}))
    assert find_cases(tmp_path) == [case]
    with pytest.raises(AssertionError, match="no check for cases of kind 'strange'"):
        test_case(case, tmp_path)
