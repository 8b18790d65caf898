"""Programs compiled for devices that are not there, and what they move between them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from contextualstory_jax.analysis.ahead_of_time import (
    Part,
    Program,
    absent_devices,
    generation,
    needed_memory,
    total_use,
    training,
)
from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.distributed.sharding import make_mesh
from contextualstory_jax.utils.errors import UserError
from tests.helpers.devices import environment

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "helpers" / "tiny_config.py"
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs libtpu, of the extra [tpu]")


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"libtpu, is not installed; .* the extra \[tpu\]"):
        absent_devices("v5e:2x2")
    for name in ("h100", "h100:8"):
        with pytest.raises(UserError, match=r"CUDA compiler is not .* the extra \[gpu\]"):
            absent_devices(name)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (20.50G) exceeds available HBM (15.75G).",
            (20.5 * 2**30, 15.75 * 2**30),
        ),
        ("temporaries (1.25T) exceeds available HBM (512M).", (1.25 * 2**40, 512 * 2**20)),
        ("INTERNAL: no (1G) of that kind", None),
    ],
)
def test_what_a_refused_program_needs_is_in_the_message(message, expected):
    assert needed_memory(RuntimeError(message)) == expected


@pytest.mark.parametrize("compile_", [training, generation])
def test_a_mesh_that_is_not_of_the_devices_is_refused(compile_):
    config = load_config(RECIPE, ["mesh.data=1", "mesh.fsdp=3"])

    with pytest.raises(UserError, match="does not make up the 1 devices"):
        compile_(config, jax.devices())


def test_fifty_steps_are_fifty_times_the_body_of_the_loop():
    def multiply(x):
        return x @ x

    def loop(x, last):
        return jax.lax.fori_loop(0, last, lambda _, x: multiply(x), x)

    x, product = jnp.ones((128, 128)), 2 * 128**3
    once, steps = jax.jit(multiply).trace(x), jax.jit(loop).trace(x, 1)

    def program(steps_taken: int) -> Program:
        parts = {"prepare": Part(once), "steps": Part(steps, steps_taken)}
        return Program(parts, make_mesh(MeshConfig(), jax.devices()[:1]), "float32", 1, 0)

    uses = {n: total_use(program(n)) for n in (1, 2, 50)}
    # The counter is two operations more.
    assert uses[50].flops - uses[1].flops == pytest.approx(49 * product, rel=1e-5)
    assert uses[50].traffic - uses[1].traffic == 49 * (uses[2].traffic - uses[1].traffic) > 0
    assert program(50).padded_flops == 51 * product


def script(*arguments: str) -> subprocess.CompletedProcess:
    """Run `compile_for_tpu.py` on the tiny recipe."""
    path = ROOT / "scripts" / "compile_for_tpu.py"
    command = [sys.executable, str(path), "--config", str(RECIPE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "no TPU topology 'v9:2x2': "),
        (["--topology", "v5e:2x2", "--config.mesh.fsdp=3"], "does not make up the 4 devices"),
        (["--topology", "v5e:2x2", "--config.batch_size=6"], "batch_size = 6 is not divisible by"),
        (
            ["--topology=v5e:2x2", "--sampler", "--config.batch_size=6"],
            "batch_size = 6 is not divisible by data x fsdp = 4",
        ),
    ],
)
def test_what_does_not_fit_a_slice_is_told_in_a_line(arguments, message):
    done = script(*arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@needs_compiler
@pytest.mark.heavy
@pytest.mark.parametrize("effort", [[], ["--quick"]], ids=["whole", "quick"])
def test_a_training_step_compiles_for_a_slice(effort):
    done = script("--topology=v5e:2x2", "--config.batch_size=8", "--config.mesh.fsdp=4", *effort)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["quick"] == bool(effort)
    assert (found["fits"], found["device"], found["chips"]) == (True, "TPU v5 lite", 4)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert found["hbm_limit"] == 15.75 * 2**30
    memory = found["hbm_bytes_per_chip"]
    assert memory["total"] == sum(memory[name] for name in memory if name != "total")
    # Four float32 copies of the parameters, a quarter of each.
    assert 4 * 600_000 < memory["arguments"] < 4 * 4 * 600_000
    assert found["flops_per_chip"] > 1e8 and found["useful_flops_per_chip"] > 1e8
    assert set(found["collectives"]) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert found["compile_seconds"] > 0


@needs_compiler
@pytest.mark.heavy
def test_what_a_slice_cannot_hold_does_not_fit():
    done = script("--topology", "v4:2x2x1", "--sampler", f"--config.batch_size={2**24}")

    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["fits"]
    assert found["chips"] == 4  # not 8: users see a chip's two cores as one device
    assert found["hbm_bytes_per_chip"]["total"] > found["hbm_limit"] == 30.75 * 2**30


def test_ways_of_seta_are_asked_of_a_compiler_for_a_slice_there_is():
    path = ROOT / "scripts" / "benchmark_seta_tpu.py"
    command = [sys.executable, str(path), "--topology", "v9:1x1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    expected = "no TPU topology 'v9:1x1': " if HAS_COMPILER else "libtpu, is not installed"
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


# What the step and generation move between eight devices; and what of the parameters is split.
PROGRAM = """
import json, math, sys
import jax
from contextualstory_jax.analysis.ahead_of_time import generation, total_use, training
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.distributed.sharding import Placement
from contextualstory_jax.analysis.tpu_padding import padded_flops

config = load_config(sys.argv[1], ["batch_size=8"])
shapes = StoryModel(config.model).shapes
found = {"parameters": sum(p.size for p in jax.tree.leaves(shapes))}
found["pictures"] = 8 * config.model.unet.n_frames * config.model.height * config.model.width * 3
for name, axes in {"data": ["mesh.data=8"], "fsdp": ["mesh.data=1", "mesh.fsdp=8"]}.items():
    config = load_config(sys.argv[1], ["batch_size=8", "model.sampling.steps=50", *axes])
    step, sampler = training(config, jax.devices()), generation(config, jax.devices())
    found["operations"] = {
        part: [padded_flops(traced.jaxpr), padded_flops(traced.jaxpr, steps)]
        for part, (traced, steps) in sampler.parts.items()
    }
    found["sampler operations"] = sampler.padded_flops
    found[name] = total_use(step).collectives
    found[name + " sampler"] = total_use(sampler).collectives
placement = Placement(step.mesh).shardings(shapes)
split = jax.tree.map(lambda p, s: p.size if any(s.spec) else 0, shapes, placement)
found["split"] = sum(jax.tree.leaves(split))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def eight_devices() -> dict:
    """What the program prints, run where a CPU passes for eight."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(RECIPE)],
        cwd=ROOT,
        env=environment(devices=8),
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    return json.loads(done.stdout)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_a_data_parallel_step_moves_the_gradient_alone(eight_devices):
    found = eight_devices["data"]

    # All parameters are trained. Beside the gradient there are loss, norms and scene changes.
    assert list(found) == ["all-reduce"]
    assert found["all-reduce"][1] == pytest.approx(4 * eight_devices["parameters"], rel=0.05)


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_an_fsdp_step_gathers_parameters_and_scatters_gradients(eight_devices):
    found = eight_devices["fsdp"]

    # On CPUs a scattered sum is an all-reduce of which each device takes its part.
    assert set(found) == {"all-gather", "all-reduce"}
    assert found["all-gather"][1] == pytest.approx(4 * eight_devices["split"], rel=0.05)
    assert found["all-reduce"][1] == pytest.approx(4 * eight_devices["parameters"], rel=0.05)
    assert eight_devices["split"] > 0.95 * eight_devices["parameters"]


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_generation_in_fifty_steps_runs_its_loop_fifty_times(eight_devices):
    once, in_fifty = zip(*eight_devices["operations"].values(), strict=True)

    prepare, step, decode = once
    assert in_fifty == (prepare, 50 * step, decode)
    assert eight_devices["sampler operations"] == sum(in_fifty) > 50 * prepare > 0


@pytest.mark.heavy
@pytest.mark.multiprocess
def test_drawing_moves_the_pictures_alone(eight_devices):
    latents = 4 * eight_devices["pictures"]  # as many values: the codec rearranges them
    out = latents + eight_devices["pictures"]

    assert eight_devices["data sampler"] == {"all-gather": [2, out]}
    found = eight_devices["fsdp sampler"]
    assert set(found) == {"all-gather"}
    # Weights are bfloat16, which CPUs gather as float32.
    assert found["all-gather"][1] - out in (
        pytest.approx(2 * eight_devices["split"], rel=0.05),
        pytest.approx(4 * eight_devices["split"], rel=0.05),
    )
