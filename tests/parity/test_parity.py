"""Every number the original computed, computed again: one test a case file, whatever its name and sizes.

`pytest tests/parity --parity-dir DIR` runs the cases found in DIR; without the option, the project's own copies.
Tolerances are relative L2 errors in float32 on a CPU: a float32 rounding of an input moves an output by a few 1e-6.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange, repeat

from contextualstory_jax.config import UNetConfig, build
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.temporal import clamp_alphas
from contextualstory_jax.models.unet import UNet
from tests.parity import recipe

MODULE_TOLERANCE = 1e-5
UNET_TOLERANCE = 2e-5


class Case:
    """A case file: what was run (`info`), inputs and outputs (`arrays`), and the UNet with the recipe's weights."""

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


CHECKS = {
    "temporal_conv": check_module,
    "temporal_transformer": check_module,
    "storyline": check_storyline,
    "storyflow": check_storyflow,
    "unet": check_unet,
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
