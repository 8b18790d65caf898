"""What is not whole, or not this model, is refused in one line, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert_weights
from contextualstory_jax.conversion import import_torch
from contextualstory_jax.conversion.import_torch import import_released, read_source
from contextualstory_jax.testing.released_folders import (
    WEIGHT_FILES,
    change_json,
    change_weights,
    shard_weights,
    tiny_folder,
)
from contextualstory_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("released"))


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    """A released folder to spoil."""
    return shutil.copytree(whole, tmp_path / "source")


def refusal(source: Path) -> str:
    """The one line that a conversion ends with; nothing is left of it."""
    output = source.parent / "output"
    before = set(source.parent.iterdir())
    with pytest.raises(UserError) as caught:
        import_released(source, output)
    assert set(source.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_all_that_is_wrong_with_tensors_is_in_one_message(source):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors.pop("conv_in.weight")
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["conv_out.bias"] = np.zeros((2, 2), np.float32)
        tensors["conv_norm_out.weight"] = np.ones(32, np.int64)
        tensors["conv_norm_out.bias"][3] = np.nan

    def spoil_vae(tensors: dict[str, np.ndarray]) -> None:
        tensors["quant_conv.bias"][0] = np.inf
        key = "decoder.mid_block.attentions.0.to_q.bias"
        tensors[key.replace("to_q", "query")] = tensors[key]

    def spoil_text(tensors: dict[str, np.ndarray]) -> None:
        key = "text_model.final_layer_norm.bias"
        tensors[key] = np.full_like(tensors[key], -np.inf, ml_dtypes.bfloat16)

    change_weights(source, "unet", spoil)
    change_weights(source, "vae", spoil_vae)
    change_weights(source, "text_encoder", spoil_text)

    message = refusal(source)

    for problem in (
        "unet: conv_in.weight: missing",
        "unet: extra.weight: no such parameter in this model",
        "unet: conv_out.bias: shape (2, 2), expected (4,)",
        "unet: conv_norm_out.weight: int64, expected one of float32, float16, bfloat16",
        "unet: conv_norm_out.bias: not finite",
        "vae: quant_conv.bias: not finite",
        "vae: decoder.mid_block.attentions.0.to_q.bias: the same tensor as",
        "text_encoder: text_model.final_layer_norm.bias: not finite",
    ):
        assert problem in message
    assert message.count(";") == 7


def test_values_that_are_not_finite_are_refused_though_all_else_is_right(source):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["mid_block.conv3ds.0.alpha"][:] = np.nan

    change_weights(source, "unet", spoil)

    assert refusal(source).endswith("converted: unet: mid_block.conv3ds.0.alpha: not finite")


def test_all_that_this_model_cannot_be_is_in_one_message(source):
    change_json(
        source / "unet/config.json",
        lambda v: v.update(act_fn="gelu", class_embed_type="timestep", dropout=0.1, depth=3),
    )
    change_json(source / "vae/config.json", lambda v: v.update(_class_name="VQModel"))
    change_json(source / "text_encoder/config.json", lambda v: v.update(model_type="bert"))
    change_json(
        source / "scheduler/scheduler_config.json",
        lambda v: v.update(thresholding=True, prediction_type="flow"),
    )

    message = refusal(source)

    for problem in (
        "unet/config.json: act_fn = 'gelu'; this model only has 'silu'",
        "class_embed_type = 'timestep'; this model only has None",
        "dropout = 0.1; this model only has 0.0",
        "unet/config.json: unknown key depth",
        "vae/config.json is of class VQModel; this reads AutoencoderKL",
        "model_type = 'bert'; this model only has 'clip_text_model'",
        "thresholding = True; this model only has False",
        "prediction_type must be",
    ):
        assert problem in message


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def with_header(data: bytes, change: Callable[[dict], object]) -> bytes:
    """A safetensors file's bytes with another header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def shift_offsets(header: dict) -> None:
    key = max(header, key=lambda k: header[k].get("data_offsets", [0])[0])
    header[key]["data_offsets"][1] += 4


def overlap(header: dict) -> None:
    first, second = sorted(k for k in header if k != "__metadata__")[:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]


VAE = WEIGHT_FILES["vae"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: rewrite(f / VAE, lambda d: d[:-100]),
            "vae.*no intact safetensors file: .*not fully",
        ),
        (
            lambda f: rewrite(f / VAE, lambda d: d[:200]),
            "vae.*file: invalid header length; copy it again",
        ),
        (lambda f: rewrite(f / VAE, lambda d: b""), "vae.*file: header too small; copy it again"),
        (
            lambda f: rewrite(f / VAE, lambda d: d + b"more"),
            "file not fully covered; copy it again",
        ),
        (lambda f: rewrite(f / VAE, lambda d: b"\xff" * 8 + d[8:]), "file: header too large; copy"),
        (lambda f: rewrite(f / VAE, lambda d: d[:8] + b"x" + d[9:]), "no intact safetensors file"),
        (lambda f: rewrite(f / VAE, lambda d: with_header(d, shift_offsets)), "invalid .*offset"),
        (
            lambda f: rewrite(f / VAE, lambda d: with_header(d, overlap)),
            "invalid offset for tensor",
        ),
        (
            lambda f: rewrite(
                f / VAE, lambda d: with_header(d, lambda h: h["quant_conv.bias"].pop("shape"))
            ),
            "missing field `shape`.*; copy it again",
        ),
        (
            lambda f: rewrite(
                f / VAE, lambda d: with_header(d, lambda h: h["quant_conv.bias"].update(dtype="X"))
            ),
            "unknown variant `X`.*; copy it again",
        ),
        (lambda f: (f / VAE).unlink(), "vae holds no weights: .*safetensors or .*bin is missing"),
        (lambda f: shutil.rmtree(f / "vae"), "source has no vae; give a complete pipeline folder"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "source has no tokenizer"),
        (lambda f: (f / "vae/config.json").unlink(), "vae/config.json is missing"),
        (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json is no JSON"),
        (lambda f: (f / "vae/config.json").write_text("[]"), "holds no names and values"),
        (lambda f: (f / "cumulative_motion.json").unlink(), "cumulative_motion.json is missing"),
        (
            lambda f: (f / "cumulative_motion.json").write_text("[[1, 2, NaN, 4]]"),
            "cumulative_motion.json must be .* 4 finite numbers",
        ),
        (lambda f: (f / "cumulative_motion.json").write_text("[1]"), "must be .* 4 finite numbers"),
        (
            lambda f: change_json(f / "model_index.json", lambda v: v.update(_class_name="Flux")),
            "model_index.json is of class Flux; this reads ConditionalAnimationPipeline",
        ),
        (
            lambda f: change_json(f / "unet/config.json", lambda v: v.update(_class_name="DiT")),
            "unet/config.json is of class DiT; this reads VideoLDMUNet3DConditionModel",
        ),
        (
            lambda f: change_json(
                f / "text_encoder/config.json", lambda v: v.update(hidden_size=4)
            ),
            "unet.cross_attention_dim = 32 must be text_encoder.hidden_size = 4",
        ),
    ],
)
def test_a_damaged_folder_is_refused(source: Path, spoil: Callable[[Path], object], message: str):
    spoil(source)

    with pytest.raises(UserError, match=message) as caught:
        read_source(source)

    assert "\n" not in str(caught.value)


def shards(folder: Path) -> tuple[Path, Path]:
    shard_weights(folder, "vae")
    return (
        folder / "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        folder / "vae/diffusion_pytorch_model.safetensors.index.json",
    )


def test_a_tensor_in_two_shards_is_refused(source):
    shard, _ = shards(source)
    second = shard.with_name(shard.name.replace("00001", "00002", 1))
    second.write_bytes(shard.read_bytes())

    with pytest.raises(UserError, match="decoder.conv_in.bias is in .*00002.* and in another file"):
        read_source(source)


def test_a_shard_that_is_missing_is_refused(source):
    shards(source)[0].unlink()

    with pytest.raises(UserError, match="00001-of-00002.safetensors cannot be read: No such file"):
        read_source(source)


def test_a_tensor_that_is_not_in_its_shard_is_refused(source):
    _, index = shards(source)
    change_json(
        index, lambda v: v["weight_map"].update({"gone.weight": v["weight_map"].popitem()[1]})
    )

    with pytest.raises(UserError, match="gone.weight is not in .*, where the index has it"):
        read_source(source)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(source, name):
    _, index = shards(source)
    change_json(index, lambda v: v["weight_map"].update({"gone.weight": name}))

    with pytest.raises(UserError, match="index.json is no index of shards"):
        read_source(source)


def test_a_pickle_without_pytorch_says_what_to_install(source, monkeypatch):
    path = source / WEIGHT_FILES["unet"]
    path.rename(path.with_suffix(".bin"))
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(UserError, match=r"pip install 'contextualstory-jax\[torch\]'"):
        read_source(source)


def test_an_output_that_holds_something_is_refused(source, tmp_path):
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    file.touch()

    for output in (taken, file):
        with pytest.raises(UserError, match=f"{output} is there and not empty"):
            import_released(source, output)

    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


def test_an_empty_output_is_taken(source, tmp_path):
    (tmp_path / "out").mkdir()

    import_released(source, tmp_path / "out")

    assert (tmp_path / "out" / "model.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize("when", ["stream_weights", "copy_json", "write_model"])
def test_an_interruption_leaves_nothing(source, tmp_path, monkeypatch, when):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_torch, when, interrupted)

    with pytest.raises(KeyboardInterrupt):
        import_released(source, tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_killed_conversion_left_does_not_count(source, tmp_path):
    partial = tmp_path / ".out.partial"
    (partial / "checkpoints" / "0").mkdir(parents=True)
    assert not (tmp_path / "out").exists()

    import_released(source, tmp_path / "out")

    assert not partial.exists()
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["0"]


def test_a_disk_without_room_is_named_before_anything_is_written(source, monkeypatch):
    usage = shutil.disk_usage(source)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    assert "output needs 0.0 GB, and its disk has 0.0 GB left; make room" in refusal(source)


def test_a_full_disk_while_json_is_copied_is_named(source, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(import_torch, "copy_json", full)

    assert "No space left on device; choose another folder or disk" in refusal(source)


def test_a_full_disk_while_weights_are_written_ends_in_one_line(source, tmp_path):
    limit = 100_000  # bytes a file, which the weights exceed
    program = (
        "import resource, runpy, sys; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    process = subprocess.run(
        [sys.executable, "-c", program, convert_weights.__file__, source, tmp_path / "out"],
        capture_output=True,
        text=True,
    )

    lines = [line for line in process.stderr.splitlines() if "B/s" not in line and line]
    assert lines == [
        f"error: cannot write {tmp_path / 'out'}: File too large [os_error_code='27']; "
        "choose another folder or disk"
    ]
    assert process.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
