"""Meshes and rules; in a process of its own, training on eight devices as on one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from optax import ScaleByAdamState

from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.config.mesh_config import MeshConfig, ShardingRule
from contextualstory_jax.distributed.sharding import Placement, make_mesh
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.training import start_state
from contextualstory_jax.training.trainer import train_and_evaluate
from contextualstory_jax.utils.errors import UserError
from tests.helpers.devices import environment

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "helpers" / "tiny_config.py"


EIGHT = AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))


def test_the_mesh_of_one_device_is_the_default():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": -1}, "axes must be at least 1, at most one of them -1"),
        ({"data": 0}, "axes must be at least 1"),
        ({"tensor": -2}, "axes must be at least 1"),
        ({"data": 3}, "'data': 3, 'fsdp': 1, 'tensor': 1} does not make up the 1 devices there"),
        ({"fsdp": 5}, "'fsdp': 5, 'tensor': 1} does not make up the 1 devices there are"),
    ],
)
def test_axes_that_do_not_make_up_the_devices_are_named(axes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**axes))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("unet.conv_in.kernel", (3, 3, 48, 32), (None, None, None, "fsdp")),
        ("unet.attn1.to_q.kernel", (32, 64), ("fsdp", "tensor")),
        ("unet.attn1.to_out.0.kernel", (64, 32), ("tensor", "fsdp")),
        ("unet.resnets.0.conv1.kernel", (3, 3, 32, 64), (None, None, "fsdp", "tensor")),
        ("unet.resnets.0.conv2.kernel", (3, 3, 63, 64), (None, None, None, "fsdp")),
        ("unet.conv_out.kernel", (3, 3, 32, 12), (None,) * 4),  # 8 does not divide 12
        ("text_encoder.token_embedding.embedding", (400, 32), (None, "fsdp")),
        ("unet.norm.scale", (32,), ()),
        ("unet.temp.alpha", (), ()),
    ],
)
def test_what_is_large_is_split(path, shape, expected):
    mesh = AbstractMesh((1, 8, 2), ("data", "fsdp", "tensor"))

    assert Placement(mesh).spec(path, shape) == PartitionSpec(*expected)


def test_a_recipe_s_rules_come_first():
    rule = ShardingRule(r"unet\..*\.kernel", ("fsdp", None))

    placement = Placement(EIGHT, (rule,))

    assert placement.spec("unet.conv_in.kernel", (3, 3, 8, 32)) == PartitionSpec(
        None, None, "fsdp", None
    )
    assert placement.spec("vae.conv_in.kernel", (3, 3, 8, 32))[3] == "fsdp"


def test_the_table_says_what_each_rule_splits():
    shapes = {"unet": {"a.to_q.kernel": np.zeros((8, 4)), "a.conv2.kernel": np.zeros((2, 8))}}
    shapes["vae"] = {"conv.kernel": np.zeros((3, 16)), "conv.bias": np.zeros(16)}

    lines = Placement(EIGHT).check(shapes).splitlines()[1:]

    assert [line.split()[:2] for line in lines] == [["32", "4"], ["16", "2"], ["48", "6"]] + [
        ["16", "16"]
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([ShardingRule("lost", ("fsdp",))], "mesh.rules: no parameter's path matches 'lost'"),
        (
            [ShardingRule(r"unet\.table\.embedding", ("tensor",))],
            r"no rule splits unet.table.embedding \(1024, 1024\) over fsdp = 8; add one",
        ),
    ],
)
def test_rules_that_split_nothing_are_refused(rules, message):
    table = {"table.embedding": np.zeros((1024, 1024), np.int8), "a.to_q.kernel": np.zeros((8, 4))}
    shapes = {"unet": {**table, "a.to_out.0.kernel": np.zeros((8, 4)), "b.kernel": np.zeros(8)}}

    with pytest.raises(UserError, match=message):
        Placement(EIGHT, rules).check(shapes)


@pytest.mark.parametrize(
    ("pattern", "axes", "message"),
    [
        ("(", ("fsdp",), r"mesh.rules: '\(' is no regular expression"),
        (".*", ("fsdp", "fsdp"), "each once at most"),
        (".*", (None,), "each once at most, or null"),
    ],
)
def test_rules_that_are_none_are_refused(pattern, axes, message):
    with pytest.raises(UserError, match=message):
        ShardingRule(pattern, axes)


def test_optimizer_and_average_lie_where_their_parameter_does():
    kernel = np.zeros((4, 8))
    moments = ScaleByAdamState(jnp.zeros(()), {"unet": {"conv_in.kernel": kernel}}, {})

    placed = Placement(EIGHT).shardings((None, (moments,)))

    assert placed[1][0].mu["unet"]["conv_in.kernel"].spec == PartitionSpec(None, "fsdp")
    assert placed[1][0].count.spec == PartitionSpec()


@pytest.mark.parametrize("name", ["pororo_visualization", "flintstones_continuation"])
def test_each_of_eight_devices_keeps_an_eighth_of_the_published_state(name):
    recipe = load_config(ROOT / "configs" / f"{name}.py")
    model = StoryModel(recipe.model)
    placement = Placement(EIGHT)

    placement.check(model.shapes)  # every rule is used, everything large split
    leaves = jax.tree.leaves(start_state.abstract_state(model, recipe, placement))

    whole = sum(math.prod(leaf.shape) for leaf in leaves)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert whole > 4 * 1.4e9  # parameters, two moments, average
    assert held <= 1.05 * whole / 8


# Trains two steps on each mesh; the last goes on, on another mesh, from a checkpoint of the first.
PROGRAM = """
import json, sys
from pathlib import Path
from contextualstory_jax.training import trainer
from contextualstory_jax.config.config_files import load_config

recipe, out, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]

def train(name, steps, *mesh):
    config = load_config(recipe, [*overrides, f"steps={steps}", *mesh])
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
        env=environment(devices=8),
        check=True,
        timeout=600,
    )
    return out


def metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_training_on_eight_devices_is_training_on_one(eight_devices, tmp_path):
    train_and_evaluate(load_config(RECIPE, [*TWO_STEPS, "steps=2"]), tmp_path)

    one = metrics(tmp_path)
    assert one[0]["loss"] != one[1]["loss"]
    for mesh in ("data", "fsdp", "both"):
        for ours, theirs in zip(metrics(eight_devices / mesh), one, strict=True):
            for name in ("loss", "grad_norm", "param_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (mesh, name)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_kernels_are_split_over_fsdp_alone(eight_devices):
    shards = json.loads((eight_devices / "shards.json").read_text())

    assert all(shard == whole for whole, shard in shards["data"].values())
    for name, (whole, shard) in shards["fsdp"].items():
        split = Placement(EIGHT).spec(f"unet.{name}", tuple(whole))
        assert shard == [
            size // 8 if axis == "fsdp" else size for size, axis in zip(whole, split, strict=True)
        ], name
    assert any(shard != whole for whole, shard in shards["fsdp"].values())


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_samples_are_drawn_on_eight_devices(eight_devices):
    for mesh in ("data", "fsdp", "both"):
        assert (eight_devices / mesh / "samples" / "step_0000002.png").is_file()
