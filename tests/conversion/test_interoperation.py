"""Pickles are read without running their code, and exported folders load in PyTorch's libraries."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.conversion.export_torch import export_released
from contextualstory_jax.conversion.import_torch import (
    checkpoint_items,
    import_released,
    read_source,
)
from contextualstory_jax.testing.released_folders import WEIGHT_FILES, read_weights, tiny_folder
from contextualstory_jax.utils.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("released"))


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "source")


def bin_path(folder: Path, part: str) -> Path:
    name = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    return folder / part / f"{name}.bin"


def written(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor that a conversion would write, as float32."""
    items = checkpoint_items(read_source(folder), "float32", [])
    return {
        f"{item}.{part}.{name}": tensor.read()
        for item, tree in items.items()
        for part, leaves in tree.items()
        for name, tensor in leaves.items()
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pickles_hold_what_safetensors_do(source, dtype, zipped):
    import safetensors.torch

    for part, file in WEIGHT_FILES.items():
        tensors = safetensors.torch.load_file(source / file)
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        safetensors.torch.save_file(tensors, source / file)
        torch.save(tensors, bin_path(source, part), _use_new_zipfile_serialization=zipped)
    expected = written(source)
    for file in WEIGHT_FILES.values():
        (source / file).unlink()

    found = written(source)

    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_code_in_a_hostile_pickle_does_not_run(source, tmp_path, wrapped):
    proof = tmp_path / "proof"
    hostile = {"conv_in.weight": Hostile(proof)}
    (source / WEIGHT_FILES["unet"]).unlink()
    if wrapped:
        torch.save(hostile, bin_path(source, "unet"))
    else:
        bin_path(source, "unet").write_bytes(pickle.dumps(hostile))

    with pytest.raises(UserError, match="is refused: .* holds more than tensors") as caught:
        read_source(source)

    assert "\n" not in str(caught.value)
    assert not proof.exists()
    pickle.loads(pickle.dumps(hostile))  # it would have: the proof is none otherwise
    assert proof.exists()


@pytest.mark.parametrize("content", [{"a": 3}, [1, 2], {"state": {"a": None}}])
def test_a_pickle_of_anything_else_is_refused(source, content):
    (source / WEIGHT_FILES["vae"]).unlink()
    torch.save(content, bin_path(source, "vae"))

    with pytest.raises(UserError, match="is refused: it is no table of tensors by name"):
        read_source(source)


def test_a_truncated_pickle_is_refused(source):
    path = bin_path(source, "vae")
    torch.save({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:200])
    (source / WEIGHT_FILES["vae"]).unlink()

    with pytest.raises(UserError, match="is refused: it is damaged"):
        read_source(source)


def test_an_exported_folder_loads_in_diffusers_and_transformers(whole, tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextModel

    import_released(whole, tmp_path / "checkpoint")
    export_released(tmp_path / "checkpoint", tmp_path / "out")

    vae, of_vae = AutoencoderKL.from_pretrained(
        tmp_path / "out", subfolder="vae", output_loading_info=True
    )
    tower, of_tower = CLIPTextModel.from_pretrained(
        tmp_path / "out" / "text_encoder", output_loading_info=True
    )
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")

    for information in (of_vae, of_tower):
        assert not information["missing_keys"]
    assert not of_vae["unexpected_keys"]
    theirs = read_weights(whole, "vae")
    for key, tensor in vae.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), theirs[key])
    assert tower.config.num_hidden_layers == 1
    assert scheduler.config.beta_schedule == "linear"
