"""Programs compiled by XLA's CUDA compiler for eight GPUs that are not there; `make cuda`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.narrow_config import NARROW

ROOT = Path(__file__).parents[2]
HAS_COMPILER = importlib.util.find_spec("jax_cuda12_plugin") is not None
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.mark.cuda_aot
@pytest.mark.skipif(not HAS_COMPILER, reason="needs the CUDA compiler, of the extra [gpu]")
@pytest.mark.parametrize("axes", [["mesh.data=8"], ["mesh.data=4", "mesh.tensor=2"]], ids=str)
@pytest.mark.parametrize("program", [[], ["--sampler"]], ids=["training", "generation"])
@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_eight_gpus_compute_attention_by_cudnn(task, program, axes):
    changes = [*NARROW, "batch_size=8", "model.sampling.steps=3", *axes]
    command = [sys.executable, "scripts/compile_for_tpu.py", "--topology=h100:8", *program]
    command += [f"--config=configs/pororo_{task}.py", *(f"--config.{c}" for c in changes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["chips"], found["device"]) == (8, "NVIDIA H100 80GB HBM3")
    calls = {k: n for k, n in found["custom_calls"].items() if "fmha" in k}
    # The contextualizer's once, those of four transformers in every step of generation.
    expected = {FORWARD: 1 + 3 * 8} if program else {FORWARD: 9, BACKWARD: 9}
    assert calls == expected
