"""A released model at its published size goes in, out and in again: bit by bit, in little memory.

Writes some 30 GB below the folder of temporary files.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convert_weights
from contextualstory_jax.checkpoints.layout import read_model
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.conversion import diffusers_format
from contextualstory_jax.conversion.streaming import StoredWeights, groups
from contextualstory_jax.conversion.tensor_files import read_safetensors
from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.testing.released_folders import WEIGHT_FILES, write_folder

pytestmark = pytest.mark.heavy

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published_shapes.json.gz"
TENSORS = {"unet": 1537, "vae": 248, "text_encoder": 373}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The visualization model's folder: the UNet in float32, 5.7 GB, the others in bfloat16."""
    base = tmp_path_factory.mktemp("full_size")
    if shutil.disk_usage(base).free < 32e9:
        pytest.skip(f"needs 32 GB below {base}")
    for name, values in diffusers_format.json_files(
        ModelConfig(), [31.5, 28.25, 32.125, 18.875]
    ).items():
        (base / "skeleton" / name).parent.mkdir(parents=True, exist_ok=True)
        (base / "skeleton" / name).write_text(json.dumps(values))
    shutil.copytree(TOKENIZER_DIR, base / "skeleton" / "tokenizer")
    published = json.loads(gzip.decompress(PUBLISHED.read_bytes()))
    models = {"unet": "unet_visualization", "vae": "vae", "text_encoder": "text_encoder"}
    manifests = {
        part: {
            key: (tuple(shape), "float32" if part == "unet" else "bfloat16")
            for key, shape in published[model].items()
        }
        for part, model in models.items()
    }
    return write_folder(base / "released", base / "skeleton", manifests)


# The kernel's own mark of a process's peak memory: what getrusage says of a child begins at the
# size of the process that started it, here one that may have held a model of published size.
CONVERT = """
import re, runpy, sys
from pathlib import Path
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def run(*arguments: object) -> int:
    """Run the converter in a process of its own; returns its peak memory in bytes."""
    command = [sys.executable, "-c", CONVERT, convert_weights.__file__, *map(str, arguments)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return 1024 * int(result.stdout.splitlines()[-1])


def test_a_released_model_goes_in_out_and_in_again(folder):
    first, back, second = (folder.with_name(name) for name in ("first", "back", "second"))

    peak = run(folder, first)
    run("--export", first, back)
    run(back, second)

    size = (folder / WEIGHT_FILES["unet"]).stat().st_size
    assert 1e8 < peak < 1.3 * size
    for part, file in WEIGHT_FILES.items():
        theirs, ours = read_safetensors(folder / file), read_safetensors(back / file)
        assert len(theirs) == TENSORS[part]
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype)
            assert ours[key].read().tobytes() == tensor.read().tobytes(), key
    for path in folder.rglob("*.json"):
        assert (back / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert_same_checkpoints(first, second)


def assert_same_checkpoints(first: Path, second: Path) -> None:
    shapes = StoryModel(read_model(first)).shapes
    ours, theirs = (StoredWeights(path, None, shapes) for path in (first, second))
    for tensors in ([*ours.params.values()], [*ours.dead.values()]):
        for leaves in tensors:
            stored = list(leaves.values())
            for group in groups(stored, [tensor.nbytes for tensor in stored]):
                for tensor, a, b in zip(group, ours.read(group), theirs.read(group), strict=True):
                    assert a.tobytes() == b.tobytes(), tensor.name
