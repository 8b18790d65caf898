"""Meshes and rules; in a process of its own, training on eight devices as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from optax import ScaleByAdamState

from contextualstory_jax.config import MeshConfig
from contextualstory_jax.errors import UserError
from contextualstory_jax.recipes import load_recipe
from contextualstory_jax.sharding import make_mesh, shardings, spec
from contextualstory_jax.trainer import train_and_evaluate

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "tiny_recipe.py"


def test_the_mesh_of_one_device_is_the_default():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    ("data", "fsdp", "message"),
    [
        (-1, -1, "axes must be at least 1, at most one of them -1"),
        (0, 1, "axes must be at least 1"),
        (-2, 1, "axes must be at least 1"),
        (3, 1, "'data': 3, 'fsdp': 1} does not make up the 1 devices there are"),
        (-1, 5, "'fsdp': 5} does not make up the 1 devices there are"),
    ],
)
def test_axes_that_do_not_make_up_the_devices_are_named(data, fsdp, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(data=data, fsdp=fsdp))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("unet.conv_in.kernel", (3, 3, 48, 32), (None, None, None, "fsdp")),
        ("unet.attn1.to_q.kernel", (32, 64), (None, "fsdp")),
        ("unet.conv_out.kernel", (3, 3, 32, 12), (None,) * 4),  # 8 does not divide 12
        ("text_encoder.token_embedding.embedding", (400, 32), (None, "fsdp")),
        ("unet.norm.scale", (32,), ()),
        ("unet.temp.alpha", (), ()),
    ],
)
def test_what_is_large_is_split_by_its_last_axis(path, shape, expected):
    mesh = AbstractMesh((1, 8), ("data", "fsdp"))

    assert spec(path, shape, mesh) == PartitionSpec(*expected)


def test_optimizer_and_average_lie_where_their_parameter_does():
    kernel = np.zeros((4, 8))
    moments = ScaleByAdamState(jnp.zeros(()), {"unet": {"conv_in.kernel": kernel}}, {})

    placed = shardings((None, (moments,)), AbstractMesh((1, 8), ("data", "fsdp")))

    assert placed[1][0].mu["unet"]["conv_in.kernel"].spec == PartitionSpec(None, "fsdp")
    assert placed[1][0].count.spec == PartitionSpec()


# Trains two steps on each mesh; the last goes on, on another mesh, from a checkpoint of the first.
PROGRAM = """
import json, sys
from pathlib import Path
from contextualstory_jax import trainer
from contextualstory_jax.recipes import load_recipe

recipe, out, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]

def train(name, steps, *mesh):
    config = load_recipe(recipe, [*overrides, f"steps={steps}", *mesh])
    return trainer.train_and_evaluate(config, out / name)

shards = {}
for name, mesh in {"data": ["mesh.data=8"], "fsdp": ["mesh.data=1", "mesh.fsdp=8"]}.items():
    state = train(name, 2, *mesh)
    kernels = {name: p for name, p in state.params["unet"].items() if name.endswith("kernel")}
    shards[name] = {
        name: (p.shape, p.sharding.shard_shape(p.shape)) for name, p in kernels.items()
    }
train("both", 1, "mesh.data=2", "mesh.fsdp=4")
train("both", 2, "mesh.data=4", "mesh.fsdp=2")
(out / "shards.json").write_text(json.dumps(shards))
"""
TWO_STEPS = ("batch_size=8", "optimizer.schedule=constant", "optimizer.warmup_steps=0")


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program leaves, run where a CPU passes for eight."""
    out = tmp_path_factory.mktemp("eight")
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(RECIPE), str(out), *TWO_STEPS],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        check=True,
        timeout=600,
    )
    return out


def metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


@pytest.mark.multiprocess
def test_training_on_eight_devices_is_training_on_one(eight_devices, tmp_path):
    train_and_evaluate(load_recipe(RECIPE, [*TWO_STEPS, "steps=2"]), tmp_path)

    one = metrics(tmp_path)
    assert one[0]["loss"] != one[1]["loss"]
    for mesh in ("data", "fsdp", "both"):
        for ours, theirs in zip(metrics(eight_devices / mesh), one, strict=True):
            for name in ("loss", "grad_norm", "param_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (mesh, name)


@pytest.mark.multiprocess
def test_kernels_are_split_over_fsdp_alone(eight_devices):
    shards = json.loads((eight_devices / "shards.json").read_text())

    assert all(shard == whole for whole, shard in shards["data"].values())
    for name, (whole, shard) in shards["fsdp"].items():
        *before, last = whole
        assert shard == ([*before, last // 8] if last % 8 == 0 else whole), name
    assert any(shard != whole for whole, shard in shards["fsdp"].values())


@pytest.mark.multiprocess
def test_samples_are_drawn_on_eight_devices(eight_devices):
    for mesh in ("data", "fsdp", "both"):
        assert (eight_devices / mesh / "samples" / "step_0000002.png").is_file()
