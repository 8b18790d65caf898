"""Every number the original computed, computed again: one test a case file.

`pytest tests/parity --parity-dir DIR` runs the cases found in DIR, whatever their names and sizes;
without the option, the project's own copies. Tolerances are relative L2 errors in float32 on a CPU,
where a float32 rounding of an input moves an output by a few 1e-6.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange, repeat

from contextualstory_jax import weights
from contextualstory_jax.config import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TrainConfig,
    UNetConfig,
    build,
)
from contextualstory_jax.diffusion.schedules import add_noise, noise_schedule
from contextualstory_jax.model import StoryModel, clamp
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.storyflow import storyflow
from contextualstory_jax.models.temporal import clamp_alphas
from contextualstory_jax.models.unet import UNet
from contextualstory_jax.state import Draws, TrainState, init_state, loss, optimizer, update
from tests.parity import recipe

MODULE_TOLERANCE = 1e-5
UNET_TOLERANCE = 2e-5


class Case:
    """What was run (`info`), inputs and outputs (`arrays`), the UNet with the recipe's weights."""

    def __init__(self, path: Path):
        self.info = json.loads(path.read_text())
        self.arrays = dict(np.load(path.with_suffix(".npz")))
        values = dict(self.info["unet_config"], max_text_length=self.info["max_text_length"])
        assert values["cross_attention_dim"] == self.info["text_dim"]
        self.config = build(UNetConfig, values, "unet.")
        self.network = Network(lambda: UNet(self.config))
        self.params = clamp_alphas(recipe.params(self.network, self.info["weight_seed"]))

    def run(self, function, *inputs):
        """Call `function(unet, *inputs)` in one compiled program."""
        return np.asarray(
            jax.jit(lambda params, *x: function(self.network.bind(params), *x))(
                self.params, *inputs
            )
        )

    def frames(self, name: str) -> np.ndarray:
        """An array of frames (b f) c h w as b f h w c."""
        return rearrange(self.arrays[name], "(b f) c h w -> b f h w c", f=self.config.n_frames)


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error <= tolerance, f"relative error {error:.2e}"


def check_module(case: Case) -> None:
    path = case.info["path"].split(".")

    def module(unet, hidden):
        found = functools.reduce(
            lambda m, word: m[int(word)] if word.isdigit() else getattr(m, word), path, unet
        )
        return found(hidden)

    assert_close(case.run(module, case.frames("hidden")), case.frames("output"), MODULE_TOLERANCE)


def check_storyline(case: Case) -> None:
    ours = case.run(lambda unet, text: unet.contextualize(text), case.arrays["context"])
    assert_close(ours, case.arrays["output"], MODULE_TOLERANCE)


def check_storyflow(case: Case) -> None:
    f = case.config.n_frames
    motion = case.arrays["motion"]
    ours = case.run(lambda unet, m: unet.storyflow(m), motion)
    assert_close(
        rearrange(ours, "b f c -> (b f) c"), case.arrays["train_embedding"], MODULE_TOLERANCE
    )
    shared = case.run(lambda unet, m: unet.storyflow(m), motion[:1])
    stories = case.arrays["test_embedding"].shape[0] // f
    assert_close(
        repeat(shared, "1 f c -> (b f) c", b=stories),
        case.arrays["test_embedding"],
        MODULE_TOLERANCE,
    )


def check_unet(case: Case) -> None:
    arrays, f = case.arrays, case.config.n_frames
    sample = rearrange(arrays["sample"], "b c f h w -> b f h w c")
    text = rearrange(arrays["text"], "(b f) l d -> b f l d", f=f)
    null_text = arrays["null_text"][None]
    first_frame = arrays.get("first_frame_latents")
    if first_frame is not None:
        first_frame = rearrange(first_frame, "b c 1 h w -> b h w c")
    is_train = case.info["mode"] == "train"
    # Guidance: so many branches with the null text stand before the conditional one.
    unconditional = {None: 0, "text": 1, "both": 2}[case.info["guidance"]]

    def predict(unet, sample, text, null_text, motion, first_frame):
        storyline = unet.contextualize(text)
        null_text = jnp.broadcast_to(null_text, storyline.shape)
        if is_train:
            storyline = jnp.where(arrays["is_null"][:, None, None, None], null_text, storyline)
        storyline = jnp.concatenate([null_text] * unconditional + [storyline])

        def branches(x):
            return jnp.concatenate([x] * (unconditional + 1))

        sample = branches(sample)
        timesteps = jnp.broadcast_to(arrays["timesteps"], sample.shape[:1])
        return unet(
            sample,
            timesteps,
            unet.text_keys_values(storyline),
            unet.storyflow(motion),
            None if first_frame is None else branches(first_frame),
        )

    ours = case.run(predict, sample, text, null_text, arrays["motion"], first_frame)
    assert_close(rearrange(ours, "b f h w c -> b c f h w"), arrays["noise_pred"], UNET_TOLERANCE)


def check_train(case: Case) -> None:
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
    initial = {"unet": recipe.params(case.network, case.info["weight_seed"])}
    steps = len(arrays["loss"])
    train = TrainConfig(model=model.config, optimizer=config, steps=steps, trainable=(".*",))
    tx = optimizer(config, steps)

    @jax.jit
    def step(state, draws, text, null_text):
        state = dataclasses.replace(state, params=clamp(state.params))
        value, gradient = jax.value_and_grad(
            lambda params: loss(model, params, draws, text, null_text, case.info["snr_gamma"])
        )(state.params)
        state = update(state, gradient, tx, config.ema_decay)
        return state, value, optax.global_norm(gradient), storyflow(draws.latents).mean(axis=0)

    state = init_state(jax.tree.map(jnp.asarray, initial), train)
    motions = []
    for i in range(steps):
        latents, noise = (
            jnp.asarray(rearrange(arrays[n][i], "b c f h w -> b f h w c"))
            for n in ("latents", "noise")
        )
        draws = Draws(
            latents, noise, arrays["timesteps"][i], arrays["is_null"][i], arrays["null_image"][i]
        )
        noisy = add_noise(noise_schedule(scheduler), latents, noise, jnp.asarray(draws.timesteps))
        noisy_theirs = rearrange(arrays["noisy_latents"][i], "b c f h w -> b f h w c")
        assert_close(np.asarray(noisy), noisy_theirs, MODULE_TOLERANCE)
        text = rearrange(arrays["text"][i], "(b f) l d -> b f l d", f=case.config.n_frames)
        state, value, norm, motion = step(state, draws, text, arrays["null_text"][i][None])
        motions.append(np.asarray(motion))
        np.testing.assert_allclose(value, arrays["loss"][i], rtol=1e-5)
        np.testing.assert_allclose(norm, arrays["grad_norm"][i], rtol=1e-5)
        mean = np.mean(motions, axis=0, keepdims=True)
        assert_close(mean, arrays["cumulative_motion"][i], MODULE_TOLERANCE)
    check_probes(case, initial["unet"], state)


def check_probes(case: Case, initial: dict[str, np.ndarray], state: TrainState) -> None:
    """Every tensor after the last step, by its projection on a random vector."""
    arrays, seed = case.arrays, case.info["weight_seed"]
    ours = {weights.torch_key(name, p.ndim): name for name, p in initial.items()}
    unmoved = 0
    for key, probe, delta, ema_probe in zip(
        *(arrays[n] for n in ("param_names", "param_probe", "param_delta_norm", "ema_probe")),
        strict=True,
    ):
        name = ours.pop(str(key), None)
        if name is None:  # a tensor that nothing reads is no parameter of ours
            assert any(re.fullmatch(pattern, key) for pattern, _ in weights.DEAD), key
            assert delta == 0, key
            unmoved += 1
            continue

        def projected(array, name=name, key=key):
            tensor = weights.to_torch(name, np.asarray(array)).astype(np.float64)
            return np.sum(tensor * recipe.randn(f"probe.{key}", tensor.shape, seed))

        final = np.asarray(state.params["unet"][name])
        moved = np.linalg.norm(final.astype(np.float64) - initial[name])
        assert abs(moved - delta) <= 1e-3 * delta + 1e-6, (key, moved, delta)
        tolerance = 2e-3 * delta + 1e-5
        assert abs(projected(final) - probe) <= tolerance, key
        assert abs(projected(state.ema_params["unet"][name]) - ema_probe) <= tolerance, key
    assert not ours, f"not in the case: {sorted(ours)[:3]}"
    assert unmoved == np.sum(arrays["param_delta_norm"] == 0)


CHECKS = {
    "temporal_conv": check_module,
    "temporal_transformer": check_module,
    "storyline": check_storyline,
    "storyflow": check_storyflow,
    "unet": check_unet,
    "train": check_train,
}


def test_case(case_path: Path) -> None:
    kind = json.loads(case_path.read_text())["kind"]
    assert kind in CHECKS, (
        f"{case_path.name}: no check for cases of kind {kind!r}; known: {', '.join(CHECKS)}"
    )
    CHECKS[kind](Case(case_path))


def test_own_cases_are_there() -> None:
    own = Path(__file__).parent / "cases"
    kinds = {json.loads(path.read_text())["kind"] for path in own.glob("*.json")}
    assert kinds == set(CHECKS), "pytest without cases would pass for nothing"


def test_unknown_kind_fails(tmp_path: Path) -> None:
    case = tmp_path / "strange.json"
    case.write_text(json.dumps({"kind": "strange"}))
    with pytest.raises(AssertionError, match="no check for cases of kind 'strange'"):
        test_case(case)
